"""Builds a config for devices that are not there; a process of its own, since it starts JAX."""

import json
import sys

import jax

from vitjax import config as config_lib
from vitjax.errors import InputError

GIB = 2**30


def main(asked: dict) -> None:
    """Raises InputError for a config that cannot run on the devices, or does not fit."""
    config = config_lib.override(config_lib.load_config(asked["config"]), asked["assignments"])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", asked["devices"])
    from vitjax import experiment
    from vitjax.planning import estimate, search
    from vitjax.planning.targets import CHIPS

    if config.precision.compute == "auto" and asked["platform"] != "cpu":
        config = search.changed(config, precision__compute="bfloat16")
    if config.mesh == "auto":
        return  # chosen there, from what the real devices are
    exp = experiment.build(config, devices=jax.devices("cpu"))
    chip = CHIPS.get(asked["kind"])
    if chip is None:
        return
    needed = sum(estimate.memory_bytes(exp).values())
    if needed > chip.memory:
        raise InputError(
            f"{asked['config']} needs about {needed / GIB:.1f} GiB a device, and a {asked['kind']} "
            f"has {chip.memory / GIB:.1f}: more devices, a smaller --config.batch_size, or "
            "--config.model.remat=full; vitjax plan --search finds what fits"
        )


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except InputError as error:
        print(f"{error}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
