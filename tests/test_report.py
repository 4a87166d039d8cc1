"""What people see of a run while it goes on: plain lines, the live picture, the figures behind them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_summary import evaluation, make_summary, state

from astracli.errors import UserError
from astracli.process.worker import Status
from astracli.report.live import LiveView, PlainView, RunProgress, draw
from astracli.report.words import duration, size
from astracli.runs.metrics import Tail, mean, median, mend, open_sinks, read, series


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def trainer(step: int, **more: float) -> dict[str, Any]:
    return {
        "step": step,
        "process": "trainer",
        "reward_mean": 0.6,
        "arrived_reward_mean": 0.43,
        "tokens_per_s": 210.4,
        "staleness_mean": 0.94,
    } | more


def test_plain_lines_say_the_figures_and_after_a_silence_who_waits_for_what() -> None:
    clock, lines = Clock(), list[str]()
    view = PlainView(lines.append, clock)
    progress = RunProgress("tiny", 100, clock=clock)
    statuses = {"trainer": Status("starting"), "engine0": Status("ready", heard=1.0)}
    progress.feed([], state(0), statuses, "starting")
    view.update(progress)
    assert lines == ["starting"]
    clock.now += 20
    view.update(progress)
    assert lines.pop() == "starting; trainer: has not reported yet"
    statuses["trainer"] = Status("ready", "3 of 16 groups", heard=1.0)
    clock.now += 5
    progress.feed([trainer(11)], state(12, evaluation(0, 0.352, 0.6)), statuses, "running")
    view.update(progress)
    assert lines[1:] == [
        "eval step 0: arithmetic-heldout avg@8 0.352 ± 0.020 pass@4 0.600",
        "all processes are ready",
    ]
    clock.now += 2.5
    view.update(progress)
    assert lines[3] == "step 12/100 reward 0.43 avg@8 0.352 (step 0) 210 trained tok/s staleness 0.9"
    clock.now += 16
    view.update(progress)
    assert lines[4] == (
        "step 12/100 reward 0.43 avg@8 0.352 (step 0) 210 trained tok/s staleness 0.9; "
        "trainer: waiting for 3 of 16 groups"
    )


def test_plain_lines_of_a_resumed_run_begin_where_it_goes_on() -> None:
    clock, lines = Clock(), list[str]()
    view = PlainView(lines.append, clock)
    progress = RunProgress("tiny", 100, clock=clock)
    progress.feed([], state(4, evaluation(0, 0.352, 0.6)), {}, "starting")
    view.update(progress)
    clock.now += 3
    view.update(progress)
    assert lines == ["starting"]


def test_plain_lines_come_at_most_every_two_seconds_and_never_stay_away() -> None:
    clock, lines = Clock(), list[str]()
    view = PlainView(lines.append, clock)
    progress = RunProgress("tiny", 100, clock=clock)
    for step in range(1, 41):  # 10 s at four steps a second
        progress.feed([trainer(step)], state(step), {}, "running")
        view.update(progress)
        clock.now += 0.25
    assert 4 <= len([line for line in lines if line.startswith("step ")]) <= 5
    count = len(lines)
    for _ in range(40):  # 20 s without a step
        progress.feed([], state(40), {"trainer": Status("ready", "waiting: engine0 is down", heard=1.0)}, "running")
        view.update(progress)
        clock.now += 0.5
    assert lines[count:] and all("trainer: waiting: engine0 is down" in line for line in lines[count + 1 :])


def test_what_is_waited_for_says_how_far_an_evaluation_is() -> None:
    progress = RunProgress("tiny", 100)
    statuses = {
        "trainer": Status("ready", "groups for step 9: 0 of 64", heard=1.0),
        "eval": Status("ready", progress={"step": 0, "benchmark": "gsm8k", "done": 120, "total": 6595}, heard=1.0),
        "eval1": Status("ready", progress={"benchmark": "math500", "done": 500, "total": 500}, heard=1.0),
    }
    progress.feed([], state(9), statuses, "running")
    waited = ["trainer: waiting for groups for step 9: 0 of 64", "eval: step 0 benchmark gsm8k done 120 total 6595"]
    assert progress.waits() == waited


def test_time_left_follows_the_pace() -> None:
    clock = Clock()
    progress = RunProgress("tiny", 100, clock=clock)
    progress.feed([], state(0), {}, "running")
    assert progress.left_s() is None
    for step in range(1, 11):
        clock.now += 2
        progress.feed([], state(step), {}, "running")
    assert progress.left_s() == pytest.approx(180)
    clock.now += 1
    assert progress.left_s() == pytest.approx(179)


def test_live_picture() -> None:
    clock = Clock()
    progress = RunProgress("tiny", 100, clock=clock)
    progress.began = clock.now - 65
    statuses = {
        "trainer": Status("ready", "3 of 16 groups", {"loss": 0.12345}, 1.0),
        "engine0": Status("ready", None, {}, 1.0, restarts=1),
    }
    progress.feed([trainer(11)], state(12, evaluation(0, 0.35, 0.6), evaluation(10, 0.4, 0.7)), statuses, "running")
    progress.figures |= {"step_s": 2.0, "backward_s": 1.0, "wait_s": 0.1}
    out = io.StringIO()
    Console(file=out, width=140).print(draw(progress))
    text = out.getvalue()
    assert next(line.split() for line in text.splitlines() if "backward" in line)[-3:] == ["1.00", "s", "50%"]
    for words in (
        "step 12/100", "1 min 05 s gone", "reward 0.43", "210 trained tok/s", "staleness 0.9",
        "waiting for 3 of 16 groups", "avg@8 0.350 (step 0), avg@8 0.400 (step 10)", "loss 0.123", "restarted 1x",
    ):  # fmt: skip
        assert words in text
    screen = io.StringIO()
    view = LiveView(Console(file=screen, force_terminal=True, width=140))
    view.update(progress)
    view.close()
    assert "step 12/100" in screen.getvalue()


def test_tail_gives_whole_lines_once(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    tail = Tail(path)
    assert tail.new() == []
    path.write_text('{"step": 1}\n{"step": 2')
    assert tail.new() == [{"step": 1}]
    with path.open("a") as file:
        file.write('}\nnot json\n{"step": 3}\n')
    assert tail.new() == [{"step": 2}, {"step": 3}]
    assert tail.new() == []


def test_a_torn_line_costs_nothing_but_itself(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a"')
    mend(path)
    with path.open("a") as file:
        file.write('{"step": 1, "a": 5}\n')
    mend(path)
    assert read(path) == [{"step": 1, "a": 1}, {"step": 1, "a": 5}]
    assert series(read(path), "a") == [(1, 5.0)]


def test_a_step_that_is_null_is_none(tmp_path: Path) -> None:
    """A worker that had no step yet wrote one; whoever reads it compares steps with integers."""
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": null, "pause_s": 1.5}\n{"step": 0, "pause_s": 0.5}\n')
    records = read(path)
    assert records == [{"pause_s": 1.5}, {"step": 0, "pause_s": 0.5}] and Tail(path).new() == records
    found = make_summary(tmp_path, records=records)
    assert (found["steps"], found["weights"]["pause_s_p50"]) == (0, 1.0)


def test_averages() -> None:
    assert (mean([]), median([])) == (None, None)
    assert (mean([1, 2, 6]), median([6, 1, 2]), median([1, 2, 3, 10])) == (3, 2, 2.5)


def test_unknown_sink_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no sink `nowhere:Sink`"):
        open_sinks(["nowhere:Sink"], tmp_path)


@pytest.mark.parametrize(("seconds", "words"), [(42.4, "42 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")])
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"), [(None, "?"), (12, "12 B"), (1912345, "1.91 MB"), (3e9, "3 GB"), (5e12, "5 TB")]
)
def test_size(count: float | None, words: str) -> None:
    assert size(count) == words


def test_a_job_without_steps_says_what_its_workers_count() -> None:
    clock, lines = Clock(), []
    progress = RunProgress("tiny-eval", 0, clock=clock)
    view = PlainView(lines.append, clock)
    statuses = {"engine0": Status("ready"), "eval": Status("ready", None, {"done": 12, "total": 64})}
    progress.feed([], state(0), statuses, "running")
    view.update(progress)
    clock.now += 20
    view.update(progress)
    assert lines[-1] == "eval: done 12 total 64"
    out = io.StringIO()
    Console(file=out, width=140).print(draw(progress))
    assert "done 12 total 64" in out.getvalue() and "step" not in out.getvalue()
