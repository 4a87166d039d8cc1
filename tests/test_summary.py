"""The summary document of a run and the table that shows it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub_tools import hub_state
from rich.console import Console

from astracli.config.recipe import Recipe
from astracli.hub.types import Counts, EvaluationStatus, HubState
from astracli.launch import summary
from astracli.report.live import eval_line
from astracli.report.results import result_lines
from astracli.report.summary_table import benchmark_table, dropped_words, print_summary, summary_rows


def figures(avg: float, passed: float) -> dict[str, Any]:
    return {"items": 256, "n": 8, "avg_at_n": avg, "stderr": 0.02, "k": 4, "pass_at_k": passed}


def evaluation(step: int, avg: float, passed: float) -> EvaluationStatus:
    both = {"arithmetic-heldout": figures(avg, passed), "overall": figures(avg, passed)}
    return EvaluationStatus(step, step, step, "done", both)


def state(step: int, *evals: EvaluationStatus) -> HubState:
    return hub_state(counts=Counts(consumed_steps=step, dropped=3), evals=list(evals))


def trainer(step: int, **more: float) -> dict[str, Any]:
    return {
        "step": step,
        "process": "trainer",
        "reward_mean": 0.43,
        "tokens_per_s": 210.4,
        "staleness_mean": 0.94,
    } | more


def recipe(**more: Any) -> Recipe:
    document = {
        "name": "tiny",
        "model": {"path": "astra:tiny"},
        "data": {"source": "arithmetic"},
        "train": {"steps": 100},
        "weights": {"transfer": "delta"},
    }
    return Recipe.model_validate(document | more)


def make_summary(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    records = [
        trainer(step, tokens=1000.0, step_s=2.0, wait_s=0.5, train_s=1.4, full_bytes=2e6,
                arrived_reward_mean=0.3 + step / 100,
                **{f"arrived_parts/p{i}": 0.1 * step for i in range(9)}, **{"arrived_reward_mean/sums": 0.5},
                delta_bytes=4e5, delta_density=0.2, publish_s=0.1, parity_mean_abs=2e-6, parity_max_abs=3e-5,
                bytes_per_changed=2.0, snapshot_s=0.003, publish_wait_s=0.1)
        for step in range(4)
    ] + [
        {"step": s, "process": "rollout", "pause_s": p, "apply_s": p / 2} for s, p in ((1, 0.01), (2, 0.03), (3, 0.02))
    ]  # fmt: skip
    records.append({"step": 3, "process": "trainer", "export_s": 2.0})
    fields: dict[str, Any] = dict(
        run_dir=tmp_path,
        state="done",
        attempt=1,
        first_step=0,
        evaluations_s={"0": 3.5},
        phases={"starting": 11.0, "running": 190.0, "finishing": 5.0, "stopping": 0.2},
        records=records,
        hub=state(4, evaluation(0, 0.35, 0.6), evaluation(2, 0.5, 0.7), evaluation(4, 0.875, 0.95)),
        memory={},
        restarts={"engine0": 0, "rollout": 2},
    )
    expected = {
        "source": "measured",
        "machine": "two cores",
        "avg_at_n_first": 0.36,
        "avg_at_n_last": 0.87,
        "steps": 100,
    }
    return summary.build(recipe(expected=expected), **(fields | changes))


def test_summary_figures(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    found = make_summary(tmp_path)
    assert json.loads(json.dumps(found)) == found
    assert found["steps"] == 4 and found["wall_s"] == pytest.approx(206.2)
    (row,) = found["benchmarks"]
    assert row["benchmark"] == "arithmetic-heldout" and (row["first"]["step"], row["last"]["step"]) == (0, 4)
    assert row["difference_avg_at_n"] == pytest.approx(0.525)
    assert found["training"]["wait_share"] == pytest.approx(0.25)
    assert found["training"]["tokens"] == 4000 and found["training"]["tokens_per_s"] == pytest.approx(500)
    rewards = [found["training"][f"arrived_reward_mean_{which}"] for which in ("first", "last")]
    assert rewards == [0.3, pytest.approx(0.33)]
    assert found["weights"] == {
        "transfer": "delta", "full_bytes": 2e6, "delta_bytes_mean": 4e5, "ratio": 5.0,
        "density_mean": pytest.approx(0.2), "bytes_per_changed_p50": 2.0, "publish_s_p50": 0.1,
        "publish_wait_s": pytest.approx(0.4), "seconds_p50": {"snapshot": 0.003, "apply": 0.01},
        "pause_s_p50": 0.02, "resyncs": 0,
    }  # fmt: skip
    assert found["parity"] == {"mean_abs": pytest.approx(2e-6), "max_abs": 3e-5}
    assert found["restarts"] == {"rollout": 2}
    assert set(found["paths"]) == {"run", "metrics"}


def test_summary_of_a_resumed_attempt_times_its_own_steps(tmp_path: Path) -> None:
    found = make_summary(tmp_path, first_step=2)
    assert (found["steps"], found["steps_this_attempt"], found["training"]["tokens"]) == (4, 2, 2000)
    facts = dict(summary_rows(make_summary(tmp_path, first_step=2, attempt=3)))
    assert facts["wall time"].startswith("3 min 26 s in attempt 3: start-up 11 s, ")
    assert facts["steps"] == "4 of 100, 2 in attempt 3, 2.00 s each (the first included), the trainer waited 25% of it"
    assert facts["tokens"] == "2,000 trained in attempt 3, 500 a second"


def test_waiting_for_an_engine_to_start_is_start_up_and_no_part_of_a_step(tmp_path: Path) -> None:
    """Ready at 111: the step that began at 103 and ended at 117 waited 8 of its 10 s before, and worked 4."""
    records = [
        {"time": 117.0, "step": 0, "process": "trainer", "step_s": 14.0, "wait_s": 10.0, "train_s": 4.0, "tokens": 60},
        {"time": 121.0, "step": 1, "process": "trainer", "step_s": 4.0, "wait_s": 1.0, "train_s": 3.0, "tokens": 40},
    ]
    found = make_summary(tmp_path, records=records, since=100.0, phases={"planning": 3.0, "starting": 11.0})["training"]
    assert (found["step_s_mean"], found["wait_s"], found["wait_share"]) == (5.0, 3.0, pytest.approx(0.3))
    assert found["tokens_per_s"] == 10.0


def test_what_a_killed_attempt_trained_after_its_checkpoint_is_no_part_of_the_run(tmp_path: Path) -> None:
    before = [{"time": 100.0 + s, "step": s, "process": "trainer", "step_s": 2.0, "tokens": 1000} for s in range(4)]
    after = [{"time": 200.0, "step": 2, "process": "trainer", "step_s": 3.0, "tokens": 10}]
    found = make_summary(tmp_path, records=before, first_step=2, since=150.0)
    assert (found["steps"], found["steps_this_attempt"], found["training"]["tokens"]) == (2, 0, 0)
    found = make_summary(tmp_path, records=before + after, first_step=2, since=150.0)
    assert (found["steps"], found["training"]["tokens"], found["training"]["step_s_mean"]) == (3, 10, 3.0)
    # killed behind the checkpoint of step 1, before its figures were written
    found = make_summary(tmp_path, records=before[:1] + after, first_step=2, since=150.0)
    assert (found["steps"], found["steps_this_attempt"]) == (3, 1)


def test_an_export_of_an_earlier_attempt_is_no_part_of_this_ones_time(tmp_path: Path) -> None:
    """A run that was done and trains on exports twice."""
    exports = [
        {"time": time, "step": step, "process": "trainer", "step_s": 2.0, "export_s": seconds}
        for time, step, seconds in ((100.0, 1, 40.0), (200.0, 3, 2.0))
    ]
    phases = {"starting": 5.0, "running": 30.0}
    found = make_summary(tmp_path, records=exports, first_step=2, since=150.0, phases=phases)
    assert found["phases_s"] == {"start-up": 5.0, "training": 28.0, "export": 2.0}


def test_one_evaluation_shows_no_difference(tmp_path: Path) -> None:
    """Of a run that ended before its second."""
    found = make_summary(tmp_path, hub=state(1, evaluation(0, 0.35, 0.6)))
    (row,) = found["benchmarks"]
    assert (row["first"], row["difference_avg_at_n"]) == (row["last"], None)
    out = io.StringIO()
    print_summary(found, Console(file=out, width=220))
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert "benchmark figure step 0" in lines
    assert "arithmetic-heldout avg@8 0.350 ± 0.020" in lines and "pass@4 0.600" in lines
    assert not any(line.startswith("expected avg@n") for line in lines), "its figures are of a whole run"


def test_the_table_of_a_command_without_a_trainer_has_no_steps(tmp_path: Path) -> None:
    found = make_summary(tmp_path, records=[], hub=hub_state(), plan={"command": "rollout"})
    assert found["steps_planned"] is None and list(found["phases_s"])[:2] == ["start-up", "running"]
    assert "steps" not in dict(summary_rows(found))


def test_summary_of_a_run_that_never_began(tmp_path: Path) -> None:
    found = make_summary(tmp_path, records=[], hub=hub_state(), phases={"starting": 1.0})
    assert found["steps"] == 0 and found["benchmarks"] == [] and found["weights"]["ratio"] is None
    out = io.StringIO()
    print_summary(found, Console(file=out, width=140))
    assert "0 of 100" in out.getvalue()
    found["wall_s"], found["phases_s"] = 0.4, {"start-up": 0.4}
    assert dict(summary_rows(found))["wall time"] == "0 s", "no phase is long enough to be named"


def test_one_evaluation_is_not_compared_with_itself(tmp_path: Path) -> None:
    out = io.StringIO()
    found = make_summary(tmp_path, hub=state(1, evaluation(0, 0.35, 0.6)))
    print_summary(found, Console(file=out, width=140))
    head, average, passed = (" ".join(line.split()) for line in out.getvalue().splitlines()[:3])
    assert (head, average) == ("benchmark figure step 0", "arithmetic-heldout avg@8 0.350 ± 0.020")
    assert passed == "pass@4 0.600"


def test_slots_busy_by_engine_is_weighted_by_time_and_leaves_start_and_end_out(tmp_path: Path) -> None:
    """Step 0 starts everything; the last two steps of 100 (staleness 2) were granted all their prompts before."""

    def told(step: int | None, engine: str, share: float, seconds: float) -> dict[str, Any]:
        record = {"process": "rollout", "engine": engine, "slots_busy": share, "interval_s": seconds}
        return record if step is None else record | {"step": step}

    records = [told(0, "engine0", 0.0, 60.0), told(1, "engine0", 0.1, 60.0), told(2, "engine0", 0.9, 30.0)]
    records += [told(98, "engine0", 1.0, 10.0), told(99, "engine0", 0.0, 50.0), told(50, "engine1", 0.5, 1.0)]
    busy = summary.slots_busy(records, 1, 98)
    assert busy == {"engine0": pytest.approx((0.9 * 30 + 1.0 * 10) / 40), "engine1": 0.5}
    assert summary.slots_busy([told(None, "engine0", 0.7, 5.0)], 1, 98) == {"engine0": pytest.approx(0.7)}
    found = make_summary(tmp_path, records=[trainer(3, step_s=2.0), told(3, "engine0", 0.968, 9.0)])
    assert dict(summary_rows(found))["slots busy"] == "engine0 97%, with rollouts, over time"
    assert "slots busy" not in dict(summary_rows(make_summary(tmp_path)))


def test_summary_table(tmp_path: Path) -> None:
    found = make_summary(tmp_path)
    found["memory"] = {"peak_bytes": 1_900_000_000, "kind": "pss", "peak_bytes_by_process": {"trainer": 800_000_000}}
    out = io.StringIO()
    print_summary(found, Console(file=out, width=160))
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert "benchmark figure step 0 step 4 difference" in lines
    assert "arithmetic-heldout avg@8 0.350 ± 0.020 0.875 ± 0.020 +0.525" in lines
    assert "pass@4 0.600 0.950 +0.350" in lines
    assert "expected avg@n 0.360 0.870 +0.510" in lines
    assert "expected measured (two cores, 100 steps)" in lines
    assert "wall time 3 min 26 s: start-up 11 s, training 3 min 08 s, export 2 s, last evaluations 5 s" in lines
    assert "steps 4 of 100, 2.00 s each (the first included), the trainer waited 25% of it" in lines
    assert "reward 0.300 -> 0.330, of all that arrived, first and last step" in lines
    parts = ", ".join(f"p{i} 0.000 -> 0.300" for i in range(8))
    assert f"parts of the reward: {parts}, and 1 more" in lines and "sources reward: sums 0.500 -> 0.500" in lines
    assert "tokens 4,000 trained, 500 a second" in lines
    assert (
        "weights full 2 MB, mean delta 400 kB (5.0x smaller), 20.0% of the values change in a version, "
        "2.00 bytes per changed value, median engine pause 20 ms" in lines
    )
    assert "an update median ms: snapshot 3.0, apply 10.0; the trainer waited 0.4 s to publish" in lines
    assert "parity mean |trainer - engine| log-probability 2.0e-06, largest 3.0e-05" in lines
    assert "peak memory 1.9 GB (sum of PSS): trainer 800 MB" in lines
    assert "restarts rollout 2" in lines
    found["restarts"] = {}
    assert "restarts" not in dict(summary_rows(found))


@pytest.mark.parametrize("width", [80, 100])
def test_every_figure_is_there_whatever_a_benchmark_and_its_grader_are_called(tmp_path: Path, width: int) -> None:
    found = make_summary(tmp_path)
    found["benchmarks"][0]["benchmark"] = "a_long_name_of_a_benchmark_of_my_own"
    found["benchmarks"][0]["last"]["grader"] = "my.package.module:graded_by_rules + 0.25 brevity + 0.5 politeness"
    out = io.StringIO()
    Console(file=out, width=width).print(benchmark_table(found))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    said = " ".join(out.getvalue().split())
    for figure in ("difference", "0.350 ± 0.020", "0.875 ± 0.020", "+0.525", "0.600", "0.950", "+0.350", "politeness)"):
        assert figure in said, figure


def test_an_evaluation_of_a_long_grader_is_a_paragraph_on_a_narrow_terminal() -> None:
    figures = {"grader": "accuracy + 0.25 brevity", "items": 30, "n": 4, "avg_at_n": 0.842, "stderr": 0.03, "k": 4}
    figures |= {"ci95_low": 0.7, "ci95_high": 0.9, "pass_at_k": 1.0, "majority_at": {"4": 0.9}}
    figures |= {"response_tokens_mean": 11.2, "truncated_fraction": 0.0, "no_answer_fraction": 0.1}
    document = {"results": {"holdout": figures}, "greedy": {"holdout": {"avg_at_n": 0.5}}}
    assert result_lines(document, 80) == [
        "holdout (accuracy + 0.25 brevity): items 30, avg@4 0.842 ± 0.030, 95 %",
        "  0.700-0.900, pass@4 1.000, maj@4 0.900, greedy 0.500, tokens 11.2, cut 0.0%,",
        "  no answer 10.0%",
    ]
    assert result_lines(document, 200) == result_lines(document) and len(result_lines(document)) == 2


def test_an_evaluation_that_had_to_wait_says_so() -> None:
    late = replace(evaluation(13, 0.5, 0.7), due_step=10)
    assert eval_line(late).startswith("eval step 13 (due at 10): arithmetic-heldout avg@8 0.500")
    (row,) = summary.benchmarks([evaluation(0, 0.3, 0.6), late])
    headings = benchmark_table({"benchmarks": [row], "expected": None}).columns
    assert [column.header for column in headings][2:4] == ["step 0", "step 13 (due at 10)"]


def test_two_benchmarks_show_their_mean(tmp_path: Path) -> None:
    results = {"a": figures(0.2, 0.3), "overall": figures(0.3, 0.4), "b": figures(0.4, 0.5)}
    found = make_summary(tmp_path, hub=state(0, EvaluationStatus(0, 0, 0, "done", results)))
    assert [row["benchmark"] for row in found["benchmarks"]] == ["a", "b", "overall"]


def test_the_share_of_dropped_groups_is_of_all_that_were_finished() -> None:
    # 6 of 6 + 2 + 1 + 3
    words = dropped_words({"dropped": 6, "consumed_groups": 2, "waiting": 1, "expired": 3})
    assert words.startswith("50% of the groups (6), for equal rewards") and dropped_words({"consumed_groups": 4}) == ""
