"""The table of runs, over directories made by hand."""

import json
import subprocess
import sys
import time

import pytest

from vitjax import lock, runs
from vitjax.errors import InputError

ENDINGS = {
    "done": [{"event": "stop", "step": 100}],
    "preempted": [{"event": "preempt", "step": 60}, {"event": "saved", "step": 60}],
    "stopped": [{"event": "fault", "step": 60, "kind": "non_finite", "action": "stop"}],
    "hung": [{"event": "hang", "seconds": 300.0}],
    "killed": [{"event": "progress", "step": 60}],
}


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def make_run(workdir, ending=(), *, rows=(), metric=None, total=100, age=0.0, half=""):
    """A run of one launch that took ten seconds to start and forty to train 50 steps."""
    workdir.mkdir(parents=True)
    events = [
        {"event": "start", "clock": 10.0, "spent": {"start": 10.0}},
        {"event": "progress", "step": 50, "clock": 50.0, "spent": {"start": 10.0}},
    ]
    events = [event | {"time": time.time() - age} for event in [*events, *ending]]
    config = {"total_steps": total, "checkpoint": {"metric": metric}}
    (workdir / "config.json").write_text(json.dumps({"config": config, "environment": {}}))
    (workdir / "events.jsonl").write_text(lines(events) + half)
    (workdir / "metrics.jsonl").write_text(lines(rows) + half)
    return workdir


def row(step, **values):
    return {"step": step, "time": 0.0} | {k.replace("__", "/"): v for k, v in values.items()}


def shown(capsys, *argv):
    """The table's lines by the first word, which is the run's name."""
    assert runs.main([str(word) for word in argv]) == 0
    out = capsys.readouterr().out.splitlines()
    return {line.split()[0]: line for line in out[1:]}


def listed(capsys, *argv):
    assert runs.main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_each_state_is_told_by_how_the_last_launch_ended(tmp_path, capsys):
    for state, ending in ENDINGS.items():
        make_run(tmp_path / state, ending)
        make_run(tmp_path / f"again-{state}", [*ending, {"event": "start"}, {"event": "resume",
                 "step": 60}, *ENDINGS["killed"]])  # fmt: skip
        make_run(tmp_path / f"before-{state}", [*ENDINGS["killed"], {"event": "start"}, *ending])
    for run in listed(capsys, tmp_path):
        first, _, state = run["run"].rpartition("-")
        assert run["state"] == ("killed" if first == "again" else state), run["run"]


def test_a_run_whose_lock_is_held_is_running(tmp_path, capsys):
    for state, ending in ENDINGS.items():
        make_run(tmp_path / state, ending)
    with lock.on_run(tmp_path / "killed"):
        states = {run["run"]: run["state"] for run in listed(capsys, tmp_path)}
    assert states == {state: state for state in ENDINGS} | {"killed": "running"}


def test_a_complete_run_stays_done_when_it_is_launched_again(tmp_path, capsys):
    make_run(tmp_path / "a", [*ENDINGS["done"], {"event": "start"}])
    (run,) = listed(capsys, tmp_path)
    assert (run["state"], run["step"], run["launches"]) == ("done", 100, 2)


def test_the_table_says_how_a_run_is_doing(tmp_path, capsys):
    values = {"eval__test__accuracy": 0.51234, "perf__images_per_second": 1234.5}
    make_run(tmp_path / "sweep" / "a", rows=[row(25, **values), row(50, train__loss=2.0)],
             metric="eval/test/accuracy", total=12000, age=185)  # fmt: skip
    line = " ".join(shown(capsys, tmp_path)["sweep/a"].split())
    assert line == "sweep/a killed 50/12,000 test/accuracy 0.5123 1,234 80.0% 1 3 min ago"


@pytest.mark.parametrize("rate, text", [(0.314159, "0.31"), (9.87, "9.9"), (98765.4, "98,765")])
def test_slow_runs_are_shown_with_two_digits(tmp_path, capsys, rate, text):
    make_run(tmp_path / "a", rows=[row(50, perf__images_per_second=rate)])
    assert f" {text} " in shown(capsys, tmp_path)["a"]


@pytest.mark.parametrize(
    "age, text", [(-50, "0 s"), (30, "30 s"), (190, "3 min"), (7300, "2 h"), (9e5, "10 d")]
)
def test_ages_are_shown_in_one_unit_and_the_future_is_now(tmp_path, capsys, age, text):
    make_run(tmp_path / "a", age=age)
    assert shown(capsys, tmp_path)["a"].endswith(f" {text} ago")


def test_json_has_full_precision(tmp_path, capsys):
    rows = [row(50, train__loss=1 / 3, perf__images_per_second=2 / 3)]
    make_run(tmp_path / "a", rows=rows)
    (run,) = listed(capsys, tmp_path)
    assert (run["metric"], run["value"], run["images_per_second"]) == ("train/loss", 1 / 3, 2 / 3)
    assert (run["goodput"], run["wall_seconds"], run["seconds"]["start"]) == (0.8, 50.0, 10.0)
    assert (run["step"], run["total_steps"], run["path"]) == (50, 100, str(tmp_path / "a"))


@pytest.mark.parametrize(
    "asked, configured, name, value",
    [
        (None, None, "eval/a/accuracy", 0.5),
        (None, "eval/b/loss", "eval/b/loss", 3.0),
        ("train/loss", "eval/b/loss", "train/loss", 1.0),
        ("eval/no/such", None, "eval/no/such", None),
    ],
)
def test_the_metric_is_the_one_asked_for_or_configured(
    tmp_path, capsys, asked, configured, name, value
):
    evaluated = row(40, eval__b__loss=3.0, eval__a__accuracy=0.5, eval__c__accuracy=0.7)
    rows = [row(30, eval__c__accuracy=0.1), evaluated, row(50, train__loss=1.0)]
    make_run(tmp_path / "a", rows=rows, metric=configured)
    (run,) = listed(capsys, tmp_path, *(["--metric", asked] if asked else []))
    assert (run["metric"], run["value"]) == (name, value)


def test_a_metric_that_is_not_finite_is_shown_as_such(tmp_path, capsys):
    make_run(tmp_path / "a", rows=[row(40, train__loss=1.0), row(50, train__loss=None)])
    assert listed(capsys, tmp_path)[0]["value"] is None
    assert "loss nan" in shown(capsys, tmp_path)["a"]


def test_only_the_end_of_the_metrics_is_read(tmp_path, monkeypatch):
    """The first line of the part that is read is cut anywhere, and is left out."""
    rows = [row(i, train__loss=float(i), name="x" * (i % 90)) for i in range(3000)]
    workdir = make_run(tmp_path / "a", rows=rows)
    assert (workdir / "metrics.jsonl").stat().st_size > 2 * runs.TAIL_BYTES
    for size in range(runs.TAIL_BYTES - 150, runs.TAIL_BYTES):
        monkeypatch.setattr(runs, "TAIL_BYTES", size)
        found = runs._last_rows(workdir)
        assert found == rows[-len(found) :]
        assert size - 200 < len(lines(found)) <= size


@pytest.mark.parametrize("half", ["{", '{"event": "stop", "step": 9', '7\n"x"\n[]\n', "\n\n"])
def test_half_written_lines_are_left_out(tmp_path, capsys, half):
    make_run(tmp_path / "a", rows=[row(50, train__loss=2.0)], half=half)
    (run,) = listed(capsys, tmp_path)
    assert (run["step"], run["value"], run["state"]) == (50, 2.0, "killed")


def test_empty_files_are_a_run_of_which_nothing_is_known(tmp_path, capsys):
    workdir = make_run(tmp_path / "a")
    for name in ("config.json", "events.jsonl", "metrics.jsonl"):
        (workdir / name).write_text("")
    (run,) = listed(capsys, tmp_path)
    unknown = ("step", "total_steps", "value", "images_per_second", "last_sign", "age_seconds")
    assert {run[name] for name in unknown} == {None} and run["launches"] == 0
    assert shown(capsys, tmp_path)["a"].split()[2] == "-/-"
    (workdir / "metrics.jsonl").unlink()
    assert listed(capsys, tmp_path) == [run]


def test_the_step_is_that_of_the_later_file(tmp_path, capsys):
    make_run(tmp_path / "a", rows=[row(70, train__loss=2.0) | {"time": time.time() + 1}], age=5)
    make_run(tmp_path / "b", rows=[row(70, train__loss=2.0) | {"time": time.time() - 9}], age=5)
    make_run(tmp_path / "c", [{"event": "start"}, {"event": "resume", "step": 40}], age=5)
    assert [run["step"] for run in listed(capsys, tmp_path)] == [70, 50, 40]
    ages = [run["age_seconds"] for run in listed(capsys, tmp_path)]
    assert ages[0] < 4.9 < ages[1]


def test_runs_are_found_below_but_not_in_runs_or_behind_links(tmp_path, capsys):
    make_run(tmp_path / "top" / "a")
    make_run(tmp_path / "top" / "a" / "inside")
    make_run(tmp_path / "top" / "deep" / "er" / "b")
    make_run(tmp_path / "elsewhere")
    (tmp_path / "top" / "no-run").mkdir()
    (tmp_path / "top" / "no-run" / "config.json").write_text("{}")
    (tmp_path / "top" / "link").symlink_to(tmp_path / "elsewhere")
    assert list(shown(capsys, tmp_path / "top")) == ["a", "deep/er/b"]


def test_with_several_folders_names_are_whole_and_each_run_comes_once(
    tmp_path, capsys, monkeypatch
):
    for name in ("x/a", "y/a"):
        make_run(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert list(shown(capsys, "x", "y", "x/a", tmp_path / "y")) == ["x/a", "y/a"]
    assert list(shown(capsys, "x/a")) == ["x/a"]


def test_names_are_shown_as_they_are_and_on_one_line(tmp_path, capsys):
    name = "[bold]:car:" + "long-" * 45
    make_run(tmp_path / name)
    assert list(shown(capsys, tmp_path)) == [name]


@pytest.mark.parametrize(
    "sort, expected",
    [
        ("run", "a b c d"),
        ("state", "b d a c"),
        ("step", "b d a c"),
        ("metric", "c d a b"),
        ("speed", "d c b a"),
        ("goodput", "d a b c"),
        ("age", "c b a d"),
    ],
)
def test_rows_are_sorted(tmp_path, capsys, sort, expected):
    def ending(state, step, idle):  # time without a step, after its end
        return [{"event": "progress", "step": step, "clock": 60.0, "spent": {"start": 10.0 + idle}},
                *ENDINGS[state]]  # fmt: skip

    def rows(loss, speed):
        return [row(50, train__loss=loss, perf__images_per_second=speed)]

    make_run(tmp_path / "d", ending("done", 70, 5), rows=rows(2.0, 9.0), age=80)
    make_run(tmp_path / "c", ending("killed", 60, 30)[:1], rows=rows(9.0, 7.5), age=20)
    make_run(tmp_path / "b", ending("done", 80, 20), rows=rows(None, 7.0), age=40)
    make_run(tmp_path / "a", ending("hung", 65, 10), rows=rows(-4.0, 6.0), age=60)
    assert list(shown(capsys, tmp_path, "--sort", sort)) == expected.split()


def test_folders_without_runs_are_refused_by_name(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no folder .*missing"):
        runs.main([str(tmp_path), str(tmp_path / "missing")])
    with pytest.raises(InputError, match=r"no run .*empty.*config\.json and events\.jsonl"):
        runs.main([str(tmp_path / "empty")])
    with pytest.raises(SystemExit):
        runs.main([str(tmp_path), "--sort=colour"])


def test_the_table_comes_up_without_jax():
    code = "import sys, vitjax.runs; print([m for m in sys.modules if m in ('jax', 'numpy')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
