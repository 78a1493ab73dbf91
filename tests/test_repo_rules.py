"""What keeps the code base small."""

import re
import subprocess

import pytest

MAX_LINES = 400
BANNED = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}


def tracked(root):
    listed = subprocess.run(["git", "-C", str(root), "ls-files"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [root / name for name in listed.stdout.splitlines() if (root / name).is_file()]


def test_no_source_file_is_two_ideas(root):
    for path in tracked(root):
        if path.suffix == ".py" and path.relative_to(root).parts[0] != "tests":
            assert len(path.read_text().splitlines()) <= MAX_LINES, path


def test_no_file_is_named_for_nothing(root):
    for path in tracked(root):
        assert path.stem.lower() not in BANNED, path


def test_only_one_file_names_mesh_axes(root):
    """Partition specs and mesh axes are spelt in parallel.py, and nowhere else."""
    for path in tracked(root):
        may = path.name in ("parallel.py", "config.py") or path.suffix != ".py"
        if path.is_relative_to(root / "vitjax") and not may:
            found = re.search(r"PartitionSpec|\"fsdp\"|\"replica\"|\"tensor\"", path.read_text())
            assert not found, f"{path}: {found}"


def test_no_large_files_and_no_addresses_of_one_machine(root):
    for path in tracked(root):
        assert path.stat().st_size <= 2**20, path
        if path.suffix in (".py", ".md", ".toml", ".sh", ".sbatch", ".yaml", ""):
            text = path.read_text(errors="ignore")
            assert not re.search(r"(?<![\w.~}$])/(work|root)/", text), path


def test_tensorflow_is_never_imported(root):
    for path in tracked(root):
        if path.suffix == ".py":
            assert not re.search(r"^\s*(import|from) tensorflow\b", path.read_text(), re.M), path
