"""Accounts of scripted runs, whose seconds are known, and of random ones under a fake clock."""

import json
import math
import os
import random

import pytest

from vitjax import goodput

SEED = int(os.environ.get("VITJAX_TEST_SEED", 0))
EPOCH = 1_700_000_000.0
HOUR = 3600.0


class Script:
    """Writes the events of a run under a clock that the test winds by hand."""

    def __init__(self):
        self.now, self.events = EPOCH, []

    def launch(
        self, resume=None, *, imports=2.0, start=3.0, compile=4.0, restore=1.0, trained=True
    ):
        self.began, self.spent = self.now, {}
        self.now += imports
        self.add("start")
        self.spend("start", start)
        self.spend("compile", compile)
        self.add("compile")
        if trained:
            self.spend("restore", restore)
            if resume is not None:
                self.add("resume", step=resume)
        return self

    def spend(self, kind, seconds):
        self.now += seconds
        self.spent[kind] = self.spent.get(kind, 0.0) + seconds
        return self

    def add(self, event, **facts):
        clock = self.now - self.began
        line = {"event": event, "time": self.now, "clock": clock, "spent": dict(self.spent)}
        self.events.append(line | facts)
        return self

    def steps(self, first, last, seconds=1.0):
        for step in range(first, last + 1):
            self.now += seconds
            self.add("progress", step=step)
        return self

    def wait(self, seconds):
        self.now += seconds
        return self

    @property
    def account(self):
        return goodput.account(self.events)


def seconds_of(account, **expected):
    """The categories that are not zero are these."""
    found = {k: v for k, v in account.seconds.items() if abs(v) > 1e-6}
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_run_without_faults_loses_nothing():
    run = Script().launch().wait(5).add("first_step", step=1).spend("data", 2).steps(2, 10)
    run.spend("checkpoint", 0.5).add("checkpoint", step=10).wait(1).add("stop", step=10)
    seconds_of(
        run.account, productive=15.0, start=5.0, compile=4.0, restore=1.0, data=2.0, checkpoint=0.5
    )
    assert run.account.wall == pytest.approx(run.now - EPOCH)
    assert run.account.goodput == pytest.approx(15 / 27.5)
    assert run.account.launches == 1 and run.account.lost_to_faults == 0


def test_a_kill_loses_the_steps_after_the_checkpoint_and_the_time_until_the_next_start():
    run = Script().launch().steps(1, 6).add("checkpoint", step=6).steps(7, 9)
    run.wait(100).launch(resume=6).steps(7, 10).add("stop", step=10)
    seconds_of(
        run.account, productive=10.0, lost=3.0, down=100.0, start=10.0, compile=8.0, restore=2.0
    )
    assert run.account.lost_to_faults == pytest.approx(103.0)
    assert run.account.launches == 2


def test_a_segment_that_straddles_the_checkpoint_is_divided():
    run = Script().launch().wait(8).add("progress", step=8)
    run.launch(resume=6).steps(7, 10).add("stop", step=10)
    assert (run.account.productive, run.account.lost) == pytest.approx((10.0, 2.0))


def test_a_preempted_run_loses_only_the_time_that_it_was_away():
    run = Script().launch().steps(1, 5).spend("checkpoint", 2).add("preempt", step=5)
    run.wait(60).launch(resume=5).steps(6, 10).add("stop", step=10)
    account = run.account
    assert (account.productive, account.lost, account.down) == pytest.approx((10.0, 0.0, 60.0))


def test_seconds_of_a_step_that_a_kill_cut_off_are_lost_but_not_those_of_one_under_way():
    run = Script().launch().steps(1, 5).add("checkpoint", step=5).wait(3).add("saved", step=5)
    assert (run.account.productive, run.account.lost) == pytest.approx((8.0, 0.0))
    run.launch(resume=5)
    assert (run.account.productive, run.account.lost) == pytest.approx((5.0, 3.0))


def test_a_hang_is_lost():
    run = Script().launch().steps(1, 5).wait(300).add("hang", seconds=300)
    assert (run.account.productive, run.account.lost) == pytest.approx((5.0, 300.0))
    run = Script().launch().wait(300).add("hang", seconds=300)
    assert (run.account.start, run.account.lost) == pytest.approx((5.0, 300.0))


def test_a_rollback_loses_its_steps_and_their_numbers():
    run = Script().launch().steps(1, 9).wait(1)
    run.add("fault", step=10, kind="spike", action="rollback", to=4).spend("restore", 2)
    run.steps(11, 14)
    seconds_of(run.account, productive=8.0, lost=6.0, start=5.0, compile=4.0, restore=3.0)
    run.launch(resume=12)  # the steps that were given up do not count again
    assert (run.account.productive, run.account.lost) == pytest.approx((6.0, 8.0))


def test_a_rollback_can_undo_steps_of_the_launch_before():
    run = Script().launch().steps(1, 6).add("preempt", step=6).launch(resume=6).steps(7, 8)
    run.wait(1).add("fault", step=9, kind="spike", action="rollback", to=2)
    assert (run.account.productive, run.account.lost) == pytest.approx((2.0, 7.0))


@pytest.mark.parametrize("is_late", [False, True])
def test_a_skip_loses_the_mean_step_of_its_interval(is_late):
    run = Script().launch().steps(1, 2).wait(8)
    if is_late:  # both of 3 to 6
        run.add("progress", step=6)
    run.add("fault", step=4 if is_late else 6, kind="non_finite", action="skip")
    run.steps(7, 7)
    assert (run.account.productive, run.account.lost) == pytest.approx((9.0, 2.0))
    run.launch(resume=5)  # and it is not lost twice
    assert run.account.lost == pytest.approx(2.0 + 1.0 + (2.0 if is_late else 0.0))


def test_a_fault_that_stops_the_run_keeps_its_steps_until_it_is_launched_again():
    run = Script().launch().steps(1, 4).wait(1)
    run.add("fault", step=5, kind="non_finite", action="stop")
    assert (run.account.productive, run.account.lost) == pytest.approx((5.0, 0.0))
    run.launch(resume=2)
    assert (run.account.productive, run.account.lost) == pytest.approx((2.0, 3.0))


def test_a_launch_without_a_checkpoint_does_everything_again():
    run = Script().launch().steps(1, 4).wait(10).launch().steps(1, 2)
    assert (run.account.productive, run.account.lost) == pytest.approx((2.0, 4.0))


def test_a_launch_that_did_not_come_to_its_steps_loses_none():
    run = Script().launch().steps(1, 6).add("checkpoint", step=6).wait(10)
    run.launch(trained=False).wait(10).launch(resume=6).steps(7, 8)
    account = run.account
    assert (account.productive, account.lost, account.down) == pytest.approx((8.0, 0.0, 20.0))


def test_a_launch_of_a_complete_run_loses_none():
    run = Script().launch().steps(1, 6).add("stop", step=6)
    run.launch(trained=False).add("stop", step=6)
    assert (run.account.productive, run.account.lost) == pytest.approx((6.0, 0.0))


def test_a_clock_that_jumps_back_between_launches_only_hides_the_time_away():
    run = Script().launch().steps(1, 6).add("preempt", step=6).wait(60 - HOUR)
    run.launch(resume=6).steps(7, 9).add("stop", step=9)
    seconds_of(run.account, productive=9.0, start=10.0, compile=8.0, restore=2.0)


@pytest.mark.parametrize("jump", [HOUR, -HOUR])
def test_a_clock_that_jumps_during_a_launch_changes_nothing(jump):
    run = Script().launch().steps(1, 9)
    before = run.account
    for event in run.events[5:]:
        event["time"] += jump
    assert run.account == before


def test_seconds_that_a_kind_claims_late_are_not_productive():
    """What writes from another thread does so while the loop is in the middle of something."""
    run = Script().launch().steps(1, 4).add("checkpoint", step=4).wait(30).add("alarm")
    run.add("progress", step=4)
    run.spent["evaluate"] = 30.0
    run.steps(5, 6)
    assert (run.account.productive, run.account.evaluate) == pytest.approx((6.0, 30.0))


def test_lines_of_two_threads_may_change_places():
    run = Script().launch().steps(1, 1).spend("evaluate", 1).steps(2, 3).add("saved", step=2)
    late = run.events.pop()
    before = run.spend("evaluate", 5).steps(4, 4).account
    run.events.append(late)
    assert run.account == before


def test_kinds_that_overlap_do_not_make_more_time_than_there_was():
    run = Script().launch(imports=0, start=2, compile=4, restore=2)
    run.spent |= {"data": 8.0}
    run.add("progress", step=1)
    seconds_of(run.account, start=1.0, compile=2.0, restore=1.0, data=4.0)


def test_what_comes_before_a_preemption_without_a_step_is_start():
    run = Script().launch().steps(1, 6).add("preempt", step=6)
    run.launch(resume=6).wait(7).add("preempt", step=6)
    assert (run.account.productive, run.account.start) == pytest.approx((6.0, 10.0 + 7.0))


def test_old_lines_are_told_apart_by_time():
    run = Script().launch().wait(5).add("first_step", step=1).wait(20).add("checkpoint", step=10)
    run.wait(30).launch(resume=10).wait(5).add("stop", step=12)
    for event in run.events:
        del event["clock"], event["spent"]
    # The imports are not in the times, and nothing tells a restore without a "resume" from steps.
    seconds_of(run.account, productive=31.0, start=7.0 + 8.0, down=32.0)


def test_half_written_lines_are_left_out(tmp_path):
    run = Script().launch().steps(1, 6).add("checkpoint", step=6)
    whole = [json.dumps(event) for event in run.events]
    cut = json.dumps(run.events[-1])[:-9]
    others = ["", "7", "[]", '{"time": 3}', '{"event": 4}', '{"event": "progress", "step"', cut]
    text = "\n".join(whole[:4] + others + whole[4:]) + "\n" + cut
    (tmp_path / "events.jsonl").write_bytes(text.encode() + b"\xff")
    assert goodput.read_events(tmp_path) == run.events


def test_no_events_are_no_time(tmp_path):
    assert goodput.read_events(tmp_path) == []
    account = goodput.account([])
    assert account.goodput == account.wall == account.launches == 0
    assert goodput.describe(account) == "goodput 0.0%: no time yet (0 launches)"


def test_the_line_names_what_has_time():
    account = goodput.Account(productive=3723.4, compile=32.0, lost=190.0, data=0.2, launches=3)
    line = "goodput 94.4%: productive 1:02:03, compile 0:32, lost 3:10 (3 launches)"
    assert goodput.describe(account) == line
    assert goodput.describe(goodput.Account(productive=60.0, launches=1)).endswith("(1 launch)")


class RandomRun(Script):
    """A run that keeps its own books: by step what it keeps, and by category the rest."""

    def __init__(self, seed):
        super().__init__()
        self.key, self.saved, self.kept, self.pending = random.Random(seed), [0], {}, 0.0
        self.books = dict.fromkeys((*goodput.KINDS, "lost", "down"), 0.0)
        for _ in range(self.key.randint(1, 6)):
            self.random_launch()
        self.books["productive"] = sum(self.kept.values()) + self.pending

    def chance(self, of):
        return self.key.random() < of

    def some(self, most=8):
        """Seconds, such that sums of them are exact."""
        return self.key.randint(1, most * 64) / 64

    def spend(self, kind, seconds):
        self.books[kind] += seconds
        return super().spend(kind, seconds)

    def work(self, step):
        seconds = self.some()
        self.now += seconds
        self.kept[step] = self.kept.get(step, 0.0) + seconds

    def lose(self, after):
        for step in [step for step in self.kept if step > after]:
            self.books["lost"] += self.kept.pop(step)

    def random_launch(self):
        self.books["lost"] += self.pending
        self.pending = 0.0
        if self.events:
            away = self.some(500)
            self.now += away
            self.books["down"] += away
        trained, resume, imports = self.chance(0.8), self.saved[-1], self.some()
        self.books["start"] += imports
        seconds = {kind: self.some() for kind in ("start", "compile", "restore")}
        self.launch(resume or None, imports=imports, trained=trained, **seconds)
        if trained:
            self.lose(resume)
            self.train(resume)

    def train(self, origin):
        for step in range(origin + 1, origin + 1 + self.key.randint(1, 30)):
            if self.chance(0.5):
                self.spend("data", self.some(1))
            self.work(step)
            self.add("progress", step=step)
            if self.chance(0.2):
                self.fault(step)
            if self.chance(0.2):
                self.spend("evaluate", self.some())
            if self.chance(0.2):
                self.spend("checkpoint", self.some(1))
                self.work(step)  # what a save needs beside the wait belongs to its step
                self.add("checkpoint", step=step)
                self.saved.append(step)
        self.pending = self.some()
        self.wait(self.pending).add("alarm")

    def fault(self, step):
        if self.chance(0.5):
            self.books["lost"] += self.kept.pop(step)
            self.add("fault", step=step, kind="non_finite", action="skip")
        else:
            to = self.key.choice(self.saved)
            self.lose(to)
            self.saved = [saved for saved in self.saved if saved <= to]
            self.add("fault", step=step, kind="spike", action="rollback", to=to)
            self.spend("restore", self.some())


@pytest.mark.parametrize("seed", range(SEED, SEED + 200))
def test_random_runs_are_accounted_for_to_the_microsecond(seed):
    run = RandomRun(seed)
    assert run.account.seconds == pytest.approx(run.books, abs=1e-6)
    assert run.account.wall == pytest.approx(run.now - EPOCH, abs=1e-6)


@pytest.mark.parametrize("seed", range(SEED, SEED + 50))
def test_fewer_lines_of_progress_only_blur_what_was_lost(seed):
    run = RandomRun(seed)
    run.events = [e for e in run.events if e["event"] != "progress" or run.chance(0.2)]
    found, books = run.account.seconds, run.books
    assert all(value >= 0 for value in found.values())
    assert run.account.wall == pytest.approx(run.now - EPOCH, abs=1e-6)
    # The first step is told from the start by the first line with a step.
    others = set(books) - {"productive", "lost", "start"}
    assert {k: found[k] for k in others} == pytest.approx({k: books[k] for k in others}, abs=1e-6)


@pytest.mark.parametrize("seed", range(SEED, SEED + 50))
def test_no_file_makes_negative_time(seed):
    run = RandomRun(seed)
    odd = [None, "x", True, -5, 10**6, math.nan, math.inf, 2.5, {}, {"data": 1e9, "restore": None}]
    for event in run.events:
        for name in list(event):
            if name != "event" and run.chance(0.1):
                event[name] = run.key.choice(odd)
            elif name != "event" and run.chance(0.1):
                del event[name]
    run.events = [event for event in run.events if run.chance(0.9)]
    account = run.account
    assert all(0 <= value < math.inf for value in account.seconds.values())
    assert 0 <= account.goodput <= 1
    assert goodput.describe(account)
