"""What a config leaves open is decided for the devices, and said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitjax import choices, experiment, parallel
from vitjax.choices import Choice
from vitjax.models import attention
from vitjax.precision import Precision

SHAPE = 2, 2, 8, 16


@pytest.mark.parametrize(
    ("depth", "platform", "is_scanned"),
    [
        (12, "cpu", False),
        (48, "cpu", True),
        (32, "gpu", False),
        (48, "gpu", True),
        (2, "tpu", True),
    ],
)
def test_blocks_are_unrolled_where_it_pays(depth, platform, is_scanned):
    assert choices.scan(depth, platform).value == is_scanned


@pytest.mark.parametrize(
    ("available", "policy"),
    [(None, "none"), (100, "none"), (60, "dots"), (11, "full"), (1, "full")],
)
def test_recomputation_is_the_least_that_fits(available, policy):
    needs = {"none": 85.0, "dots": 50.0, "full": 5.0}
    choice = choices.remat(needs.__getitem__, available)
    assert choice.value == policy
    assert available is None or choice.reason.startswith(f"recomputation {policy} (GiB")


def test_the_fastest_kernel_that_works_is_taken_and_the_others_named():
    choice = choices.fastest({"xla": 4.0, "cudnn": 1.5, "pallas": "ValueError: no"})
    assert choice == Choice(
        "cudnn", "attention cudnn (xla 4 ms; cudnn 1.5 ms; pallas: ValueError: no)"
    )
    assert choices.fastest({"xla": "OutOfMemory"}).value == "xla"


def test_a_kernel_that_fails_or_is_wrong_is_not_taken(monkeypatch):
    def wrong(query, key, value, is_causal):
        return attention.KERNELS["xla"](query, key, value, not is_causal)

    def failing(query, key, value, is_causal):
        raise NotImplementedError("not on this device\nand more")

    monkeypatch.setitem(attention.KERNELS, "wrong", wrong)
    monkeypatch.setitem(attention.KERNELS, "failing", failing)
    assert str(choices.measure("wrong", SHAPE)).startswith("wrong by")
    assert choices.measure("failing", SHAPE) == "NotImplementedError: not on this device"
    assert 0 < float(choices.measure("xla", SHAPE)) < 1e5


def test_on_an_accelerator_kernels_are_measured_where_products_are_narrow(monkeypatch):
    mesh = parallel.make_mesh({"fsdp": 1}, jax.devices()[:1])
    monkeypatch.setattr(attention, "available", lambda platform: ["xla", "cudnn"])
    asked = []

    def measure(name, shape):
        asked.append((name, shape))
        return {"xla": 2.0, "cudnn": 1.0}[name]

    monkeypatch.setattr(choices, "measure", measure)
    sizes = {"rows": 512, "num_tokens": 9, "num_heads": 4, "head_dim": 8}
    narrow = choices.attention_kernel(mesh, Precision(compute="bfloat16"), **sizes)
    assert narrow.value == "cudnn" and asked == [(n, (128, 4, 9, 8)) for n in ("xla", "cudnn")]
    assert choices.attention_kernel(mesh, Precision(), **sizes).value == "xla"


def test_an_experiment_takes_what_is_decided_and_says_so(make_config):
    config = make_config(model__scan=None)
    exp = experiment.build(config, devices=jax.devices()[:1])
    arguments = dict(exp.model.arguments)
    assert (arguments["scan"], arguments["attention"]) == (False, "xla")
    assert "chosen: 2 blocks unrolled; attention xla; no recomputation" in exp.summary()
    assert config.model.scan is None and exp.contract(None)["model"]["scan"] is None
    given = make_config(model__scan=True, model__remat="full", model__attention="xla")
    exp = experiment.build(given, devices=jax.devices()[:1])
    assert exp.choices == {} and dict(exp.model.arguments)["remat"] == "full"
    assert "chosen" not in exp.summary()


def test_recomputation_follows_the_memory_of_the_device(make_config, monkeypatch):
    one = jax.devices()[:1]
    for gib, policy in ((1e6, "none"), (1e-6, "full")):
        monkeypatch.setattr(choices, "device_memory", lambda mesh, gib=gib: gib * 2**30)
        exp = experiment.build(make_config(), devices=one)
        assert dict(exp.model.arguments)["remat"] == policy
        assert exp.choices["remat"].reason.startswith(f"recomputation {policy} (GiB by estimate")


def test_the_kernels_gradient_is_compared_too(monkeypatch):
    @jax.custom_vjp
    def bent(query, key, value):
        return attention.KERNELS["xla"](query, key, value, False)

    bent.defvjp(lambda *x: (bent(*x), x), lambda x, grad: tuple(jnp.ones_like(v) for v in x))
    monkeypatch.setitem(attention.KERNELS, "bent", lambda q, k, v, _: bent(q, k, v))
    assert str(choices.measure("bent", SHAPE)).startswith("wrong by")
    assert np.isfinite(float(choices.measure("xla", SHAPE)))
