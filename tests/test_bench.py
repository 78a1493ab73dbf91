"""`vitjax bench` and the engines of benchmarks/: which run, in which order, what they write."""

import argparse
import ast
import json
import re
import statistics
import sys

import pytest

from vitjax import bench, cli
from vitjax.errors import InputError

LAPTOP = bench.Machine("cpu", "cpu", 1, 16.0, 8, frozenset({"torch", "onnx", "grain"}))
SERVER = bench.Machine("gpu", "NVIDIA H100 80GB HBM3", 1, 128.0, 16, frozenset({"torch"}))


@pytest.fixture
def scripts(root, monkeypatch):
    """Makes the modules of benchmarks/ importable."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))


def test_the_set_follows_the_machine():
    names, left_out = bench.select([], LAPTOP)
    assert "objectives" in names and "interop" in names
    assert left_out == dict.fromkeys(
        ["input_pipeline", "augment"], "it needs photographs: --photos=FOLDER_OR_ZIP"
    )
    names, left_out = bench.select([], SERVER, photos="photos.zip")
    assert names[:2] == ["train_step", "attention"] and "augment" in names
    assert left_out["objectives"] == left_out["compile_time"] == "it is not for GPUs"
    assert left_out["interop"] == "onnx is not installed"


def test_a_small_machine_and_a_quick_run_get_what_fits():
    small = bench.Machine("cpu", "cpu", 1, 6.0, 2, frozenset())
    names, left_out = bench.select([], small)
    assert "train_step" not in names and "needs 14 GiB of memory, here are 6.0" in str(left_out)
    names, left_out = bench.select([], small, quick=True)
    assert names == ["train_step", "attention", "evaluation", "startup", "loop"]
    assert left_out["checkpointing"] == "it has no quick form"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train_stp"], "did you mean 'train_step'?"),
        (["augment"], "'augment' cannot run here: it needs photographs"),
        (["--photos=nowhere.zip"], "--photos=nowhere.zip: no such file"),
        (["loop", "--out=/dev/null/x"], "cannot write to --out=/dev/null/x"),
        (["loop", "--config.seed=1"], "takes no --config options"),
    ],
)
def test_wrong_input_is_told_before_anything_runs(argv, words, capsys, monkeypatch):
    monkeypatch.setattr(bench, "run", lambda *_, **__: pytest.fail("it ran"))
    assert cli.main(["bench", *argv]) == cli.WRONG_INPUT
    assert words in capsys.readouterr().err


def test_the_list_names_every_comparison_and_what_keeps_it_from_running(capsys):
    assert cli.main(["bench", "--list"]) == 0
    text = capsys.readouterr().out
    for name in bench.COMPARISONS:
        assert re.search(rf"^{name} +\w", text, re.M) and f"python benchmarks/{name}.py" in text
    assert "not here: it needs photographs" in text


@pytest.mark.parametrize("name", bench.COMPARISONS)
def test_every_comparison_is_a_script_that_takes_its_arguments(name):
    """The options of each form are options of the script, read from its source."""
    script = bench.folder() / f"{name}.py"
    calls = [node for node in ast.walk(ast.parse(script.read_text()))
             if isinstance(node, ast.Call)
             and getattr(node.func, "attr", "") == "add_argument"]  # fmt: skip
    options = {call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)}
    for place in bench.COMPARISONS[name].arguments:
        assert place in ("cpu", "cpu quick", "accelerator", "accelerator quick")
        words = bench.command(name, place, "out", photos="photos")
        assert words[1] == str(script)
        assert {w.partition("=")[0] for w in words if w.startswith("--")} <= options


def test_a_failure_is_told_and_the_rest_still_runs(tmp_path, monkeypatch, capfd):
    (tmp_path / "bad.py").write_text("raise SystemExit(3)")
    (tmp_path / "good.py").write_text(
        "import json, sys\n"
        "row = {'what': 'speed', 'median': 1.5, 'low': 1, 'high': 2, 'unit': '', 'goal': '<= 1',"
        " 'met': False}\n"
        "json.dump({'rows': [row]}, open(sys.argv[-1].partition('=')[2], 'w'))"
    )
    made = {n: bench.Comparison(n, {"cpu": "--rounds 1"}) for n in ("bad", "good")}
    monkeypatch.setattr(bench, "COMPARISONS", made)
    monkeypatch.setattr(bench, "folder", lambda: tmp_path)
    monkeypatch.setattr(bench, "this_machine", lambda: LAPTOP)
    out = tmp_path / "out"
    out.mkdir()
    (out / "bad.json").write_text('{"rows": [{"what": "of an earlier run"}]}')
    assert cli.main(["bench", f"--out={out}"]) == cli.FAILED
    text = capfd.readouterr().out
    assert re.search(r"speed +1\.5 +1 to 2 +<= 1 +MISSED", text)
    assert "failed: bad (exit status 3)" in text and "earlier" not in text
    found = json.loads((out / "summary.json").read_text())
    assert found["failed"] == {"bad": 3} and list(found["rows"]) == ["good"]


def test_what_a_benchmark_writes(scripts, tmp_path, monkeypatch):
    import record

    monkeypatch.setattr(sys, "argv", ["/somewhere/benchmarks/loop.py", "--rounds", "3"])
    rows = [record.row("loop", [1.2, 1.0, 1.1], at_most=1.05), record.row("x", [2.0], at_least=1)]
    options = argparse.Namespace(rounds=3, worker="")
    record.write(tmp_path / "x.json", options, rows=rows, used=["pytest", "no-such"], walls=[1, 2])
    found = json.loads((tmp_path / "x.json").read_text())
    assert set(found) == {
        "benchmark", "command", "date", "options", "versions", "python", "commit", "device",
        "platform", "processor", "cores", "load_before", "rows", "walls",
    }  # fmt: skip
    assert found["command"] == "python benchmarks/loop.py --rounds 3"
    assert found["options"] == {"rounds": 3} and found["walls"] == [1, 2]
    assert found["versions"].keys() >= {"vitjax", "jax", "jaxlib", "flax", "optax", "pytest"}
    assert "no-such" not in found["versions"]
    assert found["device"] == {"platform": "cpu", "kind": "cpu", "count": 8}
    assert found["rows"][0] | {"median": 1.1, "goal": "<= 1.05", "met": False} == found["rows"][0]
    assert found["rows"][1]["met"] and found["rows"][1]["low"] == 2.0


def test_a_busy_machine_is_told(scripts, monkeypatch, capsys):
    import record

    monkeypatch.setattr(record.os, "cpu_count", lambda: 4)
    for load, told in ((0.9, False), (1.1, True)):
        monkeypatch.setattr(record, "LOAD", load)
        record.warn_if_busy()
        assert ("the machine is busy" in capsys.readouterr().err) == told


def test_ratios_are_taken_round_by_round(scripts):
    import interleave

    slow = {"cpu": [2.0, 4.0, 6.0], "wall": [1.0, 2.0, 3.0], "rss_mib": [5.0, 7.0, 6.0]}
    fast = {"cpu": [1.0, 4.0, 2.0], "wall": [1.0, 1.0, 1.0], "rss_mib": [1.0, 1.0, 1.0]}
    lines = interleave.table({"fast": fast, "slow": slow}, "fast").splitlines()
    assert lines[2].split()[-4:] == ["2.00", "2.0000", "2.00", "7"]
    assert interleave.spread([3.0]) == (3.0, 3.0, 3.0)
    assert interleave.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


def report(wall, batch=8, **more):
    made = {"batch": batch, "flops_per_image": 2e9, "wall": list(wall), "cpu": list(wall),
            "rss_mib": [100.0]}  # fmt: skip
    return made | more


def test_the_table_of_training_steps(scripts):
    """Speeds an image, so that a halved batch is no slower; MFU of the model's FLOPs."""
    import sequential
    import train_step

    found = sequential.Found(
        {
            "S/16 vitjax": [report([0.5, 0.5], peak_flops=64e9), report([1.0, 1.0])],
            "S/16 torch.compile": [report([0.5, 0.5], batch=4), report([1.5, 1.5], batch=4)],
            "S/16 vitjax MAE": [report([0.25, 0.25], peak_mib=[300.0, 200.0])],
        },
        {"S/16 vitjax": [0, 1], "S/16 torch.compile": [0, 1], "S/16 vitjax MAE": [0]},
    )
    made = train_step.lines(found, ["vitjax", "torch.compile", "vitjax MAE"], ["S/16"])
    vitjax, torch, mae = made
    assert vitjax["speed_ratio"] == [2.0, 3.0] and torch["speed_ratio"] == [1.0, 1.0]
    assert vitjax["ratio_to"] == "torch.compile" and torch["batch"] == 4
    assert vitjax["images_per_second"] == statistics.median([16, 16, 8, 8])
    assert vitjax["mfu"] == pytest.approx(12 * 2e9 / 64e9)
    assert (mae["peak_mib"], vitjax["peak_mib"]) == (300.0, 100.0)
    rows = {row["what"]: row for row in train_step.summary(made, is_cpu=False)}
    row = rows["S/16 vitjax: images/s over torch.compile"]
    assert row["median"] == 2.5 and row["goal"] == ">= 1.1" and row["met"]
    assert rows["S/16 vitjax MAE, 75% masked: images/s over supervised"]["median"] == 32 / 12
    assert "2.50" in train_step.table(made)


def test_competitors_side_by_side_are_compared_step_by_step(scripts):
    import sequential
    import train_step

    found = sequential.Found(
        {
            "S/16 vitjax": [report([1.0, 2.0, 4.0], interleaved=True)],
            "S/16 torch eager": [report([2.0, 2.0, 5.0], interleaved=True)],
        },
        {"S/16 vitjax": [0], "S/16 torch eager": [0]},
    )
    vitjax, _ = train_step.lines(found, ["vitjax", "torch eager"], ["S/16"])
    assert vitjax["speed_ratio"] == [2.0, 1.0, 1.25] and vitjax["cpu_ratio"] == [0.5, 1.0, 0.8]


def test_the_most_important_is_measured_first(scripts):
    import train_step

    peers = ["vitjax", "torch.compile", "vitjax MAE", "torch eager"]
    names = [job.name for job in train_step.make_jobs(["S/16", "B/16", "L/16"], peers)]
    assert names[:4] == ["S/16 vitjax", "S/16 torch.compile", "B/16 vitjax", "B/16 torch.compile"]
    assert names[4:7] == ["S/16 vitjax MAE", "B/16 vitjax MAE", "L/16 vitjax"]
    assert all(name.endswith("eager") for name in names[-3:])


class Clock:
    """Time that passes only where a test lets it."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def visits(durations, seconds, rounds=3, fails=()):
    """Visits made-up jobs; returns what was found and the order of the visits."""
    import interleave
    import sequential

    clock, seen, saved = Clock(), [], []

    def visit(job, left):
        seen.append(job.name)
        if job.name in fails:
            clock.now += 1
            raise interleave.WorkerError(job.name, "a line\nno such thing\n")
        if durations[job.name] > left:
            clock.now += left
            raise interleave.OutOfTimeError(job.name)
        clock.now += durations[job.name]
        return len(seen)

    jobs = [sequential.Job(name, name.split()[1]) for name in durations]
    found = sequential.visit_all(
        jobs, visit, seconds=seconds, rounds=rounds, expected=20, clock=clock, tell=str,
        save=lambda found: saved.append(len(found.reports)),
    )  # fmt: skip
    assert len(saved) == len(seen) and clock.now - 100 <= seconds
    return found, seen


def test_jobs_run_while_there_is_time_for_them(scripts):
    durations = {"S slow": 60, "S fast": 5, "B slow": 70, "B fast": 5}
    found, seen = visits(durations, seconds=100)
    # After S slow and S fast 35 s are left: less than a slow one took, enough for a fast one; then
    # 30, in which the fast ones go round again.
    assert seen == ["S slow", "S fast", "B fast", "S fast", "B fast", "S fast", "B fast"]
    assert found.missing() == {"B slow": "no time: 35 s were left, it needs about 60"}
    assert found.rounds == {"S slow": [0], "S fast": [0, 1, 2], "B fast": [0, 1, 2]}


def test_what_takes_too_long_or_fails_is_named(scripts):
    found, seen = visits({"S a": 5, "S b": 500, "S c": 5}, seconds=60, fails=["S a"])
    assert seen == ["S a", "S b"]
    assert found.reports == {}
    assert found.missing()["S a"] == "S a: no such thing"
    assert found.missing()["S b"] == "it did not end within 59 s"
    assert found.missing()["S c"].startswith("no time: 0 s were left")


def test_what_failed_is_not_tried_again(scripts):
    found, seen = visits({"S a": 5, "S c": 5}, seconds=100, fails=["S a"])
    assert seen == ["S a", "S c", "S c", "S c"] and list(found.reports) == ["S c"]


def test_only_rounds_that_both_ran_in_are_paired(scripts):
    import sequential

    found = sequential.Found({"a": [1, 2, 3], "b": [20, 30]}, {"a": [0, 1, 2], "b": [1, 2]})
    assert sequential.paired(found, "a", "b") == [(2, 20), (3, 30)]
    assert sequential.paired(found, "a", "c") == []


WORKER = """
import sys; sys.path.insert(0, {folder!r})
import interleave
print("a library's greeting")
if {dies}: sys.exit("RESOURCE_EXHAUSTED: no memory")
interleave.serve(lambda: print("noise"), repeats=2, about={{"batch": 4}}, more=lambda: {{"x": 1.0}})
"""


def worker(root, dies=False):
    return [sys.executable, "-c", WORKER.format(folder=str(root / "benchmarks"), dies=dies)]


def test_competitors_are_asked_in_turn_and_may_print(scripts, root, capfd):
    import interleave

    about, failed = {}, {}
    commands = {"one": worker(root), "dead": worker(root, dies=True)}
    reports = interleave.compare(commands, 2, about=about, failed=failed)
    assert about == {"one": {"batch": 4}} and list(reports) == ["one"]
    assert reports["one"]["x"] == [1.0, 1.0] and len(reports["one"]["wall"]) == 2
    assert failed == {"dead": "dead: RESOURCE_EXHAUSTED: no memory"}
    with pytest.raises(interleave.WorkerError, match="no memory"):
        interleave.compare({"dead": worker(root, dies=True)}, 1)


def test_a_competitor_is_stopped_when_its_time_is_up(scripts):
    import interleave

    slow = interleave.Worker(
        "slow", [sys.executable, "-c", "import time; time.sleep(60)"], seconds=0.2
    )
    with pytest.raises(interleave.OutOfTimeError):
        slow.start()
    slow.close()


def test_a_batch_that_does_not_fit_is_halved(scripts, root, monkeypatch, capsys):
    import interleave
    import train_step

    asked = []

    class Full:
        def __init__(self, name, command, **_):
            self.batch = int(next(w for w in command if "--batch" in w).partition("=")[2])
            asked.append(self.batch)

        def start(self):
            if self.batch > 2:
                raise interleave.WorkerError("vitjax", "XlaRuntimeError: RESOURCE_EXHAUSTED: no")
            return {"batch": self.batch}

        def ask(self):
            return {"wall": 1.0}

        def close(self):
            pass

    monkeypatch.setattr(interleave, "Worker", Full)
    options = argparse.Namespace(
        shapes=["S/16"], batch=8, rounds=2, minutes=1, device="cpu", window=None
    )
    found = train_step.one_at_a_time(options, ["vitjax"], True, lambda found: None)
    assert asked == [8, 4, 2, 2]
    assert [r["batch"] for r in found.reports["S/16 vitjax"]] == [2, 2]
    assert "out of memory: batch 4 instead" in capsys.readouterr().err


def test_a_package_that_is_missing_is_named():
    with pytest.raises(bench.MissingPackageError, match=r"'no_such_one'.*pip install no-such-one"):
        bench.device({"JAX_PLATFORMS": "cpu"}, imports=["no_such_one.part"])


def test_an_unknown_name_is_told_before_the_machine_is_looked_at(monkeypatch):
    monkeypatch.setattr(bench, "this_machine", lambda: pytest.fail("it looked"))
    assert cli.main(["bench", "loop", "lop"]) == cli.WRONG_INPUT
    with pytest.raises(InputError, match="unknown benchmark 'lop'"):
        bench.select(["loop", "lop"], LAPTOP)
