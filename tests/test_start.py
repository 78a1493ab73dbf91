"""What a start does before JAX is imported."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.environment import of_a_process
from vitjax import cpu


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    return tmp_path / "vitjax"


def test_compiled_programs_are_kept_for_this_kind_of_processor(home, monkeypatch):
    cpu.remember_compilations()
    first = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    assert first.parent == home and first.name.startswith("compiled-")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setattr(Path, "read_text", lambda path: "flags : fpu another_instruction\n")
    cpu.remember_compilations()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] != str(first)


def test_a_folder_that_the_user_names_is_left(home, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    cpu.remember_compilations()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/elsewhere"


def test_a_second_run_finds_the_programs_of_the_first(home, tmp_path):
    """Both compile the step; the second adds none, since it read them."""
    environment = of_a_process()
    del environment["JAX_COMPILATION_CACHE_DIR"]
    environment.pop("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", None)
    kept = []
    for number in range(2):
        words = ["--config.total_steps=1", "--config.optimizer.schedule.warmup_steps=1",
                 "--config.model.width=16", "--config.model.depth=1", "--config.model.mlp_dim=16",
                 "--config.model.num_heads=1", f"--workdir={tmp_path}/{number}"]  # fmt: skip
        command = [sys.executable, "-m", "vitjax", "train", "--config=quickstart", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        kept.append({p.name for p in home.glob("compiled-*/*") if p.name.endswith("-cache")})
    for program in ("train_step", "fresh"):
        assert any(program in name for name in kept[0])
    assert kept[0] == kept[1]


FAULTS = """
import resource
from vitjax import cpu
assert cpu.keep_freed_memory()
import jax, jax.numpy as jnp
product = jax.jit(lambda x: jnp.tanh(x @ x.T).sum())  # 137 MiB between
x = jnp.ones((6000, 8))
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    product(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(8)))  # the first calls still find their places
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no settings")
def test_a_program_finds_its_memory_of_the_call_before():
    """35,000 pages were cleared anew in each call without the settings."""
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, env=of_a_process(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1000


def test_the_command_line_imports_no_plotting_before_it_plots():
    code = "import sys, vitjax.train_verb; print('matplotlib' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "False", found.stderr


def test_a_run_imports_neither_torch_nor_scikit_learn(tmp_path):
    """Seconds of every process where they are installed; torch is what tensorboardX looks for."""
    (tmp_path / "run").mkdir()
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    code = (
        "import sys; from pathlib import Path; from vitjax.telemetry import MetricWriter;"
        "from vitjax.data.sources.arrays import Digits; Digits('train');"
        "writer = MetricWriter(Path(sys.argv[1])); writer.add(1, {'loss': 1.0}); writer.flush();"
        "writer.close(); print('sklearn' in sys.modules, 'torch' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        env=of_a_process(PYTHONPATH=str(tmp_path)), capture_output=True, text=True,
    )  # fmt: skip
    assert found.stdout.strip() == "False False", found.stderr
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
