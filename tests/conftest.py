"""Eight virtual devices, strict JAX, run-time shape checks, one compilation cache for all."""

import functools
import os
from pathlib import Path

import environment

os.environ.setdefault("XLA_FLAGS", f"{environment.EIGHT_DEVICES} {environment.QUICK_COMPILATION}")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from vitjax import cpu

cpu.give_virtual_devices_threads()

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("vitjax", "typecheck.check")

import jax  # noqa: E402
import pytest  # noqa: E402

from vitjax import curves  # noqa: E402
from vitjax.scaling import solve  # noqa: E402

# A picture takes longer than a tiny run's steps between two saves. test_train.py draws, and so do
# the processes that tests start.
draw_curves = curves._draw
curves._draw = lambda workdir: None


@functools.cache
def _solver(objective):
    """That of `solve`, optimised: this one program runs for far longer than it is compiled."""
    newton = jax.vmap(functools.partial(solve._newton, objective), in_axes=(0, 0, None))
    return jax.jit(newton, compiler_options={"xla_backend_optimization_level": 3})


solve._solver = _solver

ROOT = Path(__file__).parent.parent
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", environment.CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.devices()  # all eight, before a test sets the flags of the processes that it starts


@pytest.fixture
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Real data that is not part of the project; tests that need it skip where there is none."""
    for place in (os.environ.get("VITJAX_TEST_DATA"), ROOT.parent / "shared" / "data"):
        if place and Path(place).is_dir():
            return Path(place)
    pytest.skip("no test data: set VITJAX_TEST_DATA")


def tiny_config(**changes):
    """The quickstart's config, shrunk to seconds."""
    from vitjax import config as config_lib

    config = config_lib.load_config("quickstart")
    config.update(total_steps=8, batch_size=32, log_every=1, eval_every=4, checkpoint_every=4)
    config.model.update(width=32, depth=2, mlp_dim=64, num_heads=2, scan=True)
    config.optimizer.schedule.warmup_steps = 2
    config.mesh = {"replica": 1, "fsdp": 1, "tensor": 1}
    config.checkpoint.keep_last = 10
    config.evals.test.batch_size = 128
    return config_lib.override(config, [f"{k.replace('__', '.')}={v}" for k, v in changes.items()])


def use_one_device(patch):
    """Runs through train() use one of the eight devices."""
    from vitjax import parallel

    make_mesh = parallel.make_mesh
    patch.setattr(
        parallel,
        "make_mesh",
        lambda sizes, devices=None: make_mesh(sizes, devices or jax.devices()[:1]),
    )


@pytest.fixture
def make_config():
    return tiny_config


@pytest.fixture
def native():
    """Makes a small ViT of ours with random weights, as `vitjax.load` gives it."""
    import dataclasses

    from vitjax.data.preprocess import Preprocess
    from vitjax.inference import VisionModel
    from vitjax.interop.contents import full_model
    from vitjax.models.vit import vit

    def make(size=16, channels=3, num_classes=5, class_names=None, **options):
        block = {"width": 32, "depth": 2, "mlp_dim": 48, "num_heads": 4, "patch_size": 4}
        block |= {"num_classes": num_classes} | options
        model = vit(image_size=size, channels=channels, **block)
        keys = iter(jax.random.split(jax.random.key(0), 100))
        params = jax.tree.map(
            lambda x: jax.random.normal(next(keys), x.shape) * 0.2, model.abstract_params
        )
        contract = {
            "model": full_model(block),
            "preprocess": dataclasses.asdict(Preprocess(size, channels)),
            "class_names": class_names,
            "loss_type": "softmax" if num_classes else None,
            "precision": {},
            "description": dict(model.description),
        }
        return VisionModel(model, params, contract)

    return make


LONGEST_FIRST = (
    "test_survival.py", "test_docs.py", "test_slurm_real.py", "test_planning.py",
    "test_transfer.py", "test_faults.py", "test_train.py", "test_parallel.py", "test_sweep_run.py",
    "test_dino.py", "test_end_to_end.py", "test_processes.py", "test_distill.py",
    "test_conv_checks.py", "test_conv_models.py", "test_data_runs.py", "test_scaling_laws.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """The files that take longest begin, so that no worker ends alone with one."""

    def rank(item):
        name = item.path.name
        return LONGEST_FIRST.index(name) if name in LONGEST_FIRST else len(LONGEST_FIRST)

    items.sort(key=rank)


def pytest_sessionfinish(session, exitstatus):
    """Where everything is installed, a skipped test is a failed one."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    if os.environ.get("VITJAX_NO_SKIPS") and skipped and exitstatus == 0:
        print(f"\n{len(skipped)} skipped, but VITJAX_NO_SKIPS is set:")
        for report in skipped:
            print(" ", report.nodeid, report.longrepr)
        session.exitstatus = 1
