"""Rewards put together, in their processes: weights, thresholds, several at once, failures and what misbehaves."""

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from children import children
from test_sandbox import alive, ids, needs_linux

from astracli.config import recipe_io
from astracli.data import benchmarks
from astracli.data.prompts import Problem
from astracli.errors import RunFailed, UserError
from astracli.launch.inputs import check_rewards
from astracli.rewards.grade_process import RewardSetting
from astracli.rewards.reward import Grade, GradeItem, GradePool, Rewards, open_pools, validate_rewards
from astracli.rewards.scores import MOST_PARTS, NOTE_CHARACTERS
from astracli.rl.sample_log import group_line
from astracli.rl.types import Group, Sample, pack_group, unpack_group

MODULE = '''
import asyncio, os, sys, time
RUNNING = 0
made = 0

def length(completion):
    return {"reward": len(completion), "even": len(completion) % 2 == 0}

def polite(completion):
    return "please" in completion

def fails(completion):
    if completion == "hang":
        time.sleep(600)
    if completion == "exit":
        os._exit(7)
    if completion == "bad":
        raise ValueError("the \\x1b[31mreason")
    return 1.0

def some(completions, **columns):
    return [1.0 if c == "yes" else None for c in completions]

def pids(group):
    return {"reward": len(group), "pid": os.getpid()}

class Once:
    maximum = 3
    def __init__(self):
        global made
        made += 1
        self.calls = 0
    def __call__(self, completion):
        self.calls += 1
        return {"reward": self.calls, "made": made}

class Broken:
    def __init__(self):
        raise RuntimeError("no model file")

async def together(completion):
    """Ends when four calls run at once, and never otherwise."""
    global RUNNING
    RUNNING += 1
    while RUNNING < 4:
        await asyncio.sleep(0.001)
    return 1.0

async def waits(completion):
    if completion == "hang":
        await asyncio.sleep(600)
    if completion == "block":
        time.sleep(600)
    return 1.0

async def trl_async(prompts, completions):
    await asyncio.sleep(0)
    return [float(p == c) for p, c in zip(prompts, completions)]

def logs(prompts, completions, log_extra=None, log_metric=None, **columns):
    log_metric("mean", sum(map(len, completions)) / len(completions))
    log_extra("said", ["\x1b[31m" + c for c in completions])
    return [float(len(c)) for c in completions]

async def logs_async(completions, log_metric):
    await asyncio.sleep(0)
    log_metric("n", len(completions))
    return [1.0] * len(completions)

def many_processes(completion):
    import multiprocessing, subprocess
    from concurrent.futures import ThreadPoolExecutor
    with multiprocessing.get_context("fork").Pool(2) as pool, ThreadPoolExecutor(2) as threads:
        half = sum(pool.map(abs, [-0.125, -0.125])) + sum(threads.map(abs, [-0.125, -0.125]))
    said = subprocess.run([sys.executable, "-c", "print(0.25)"], capture_output=True, text=True).stdout
    print("x" * 100_000)
    os.write(1, b"raw" * 1000)
    return half + float(said) if sys.stdin.read() == "" else 0.0

def noise(completion):
    for fd in range(3, 1024):
        try:
            os.write(fd, b"\\xff\\xff\\xff\\xff" if completion == "long" else b"\\0\\0\\0\\4\\xc1\\xc1\\xc1\\xc1")
        except OSError:
            pass
    return 1.0

def big(completion):
    raise ValueError("z" * 50_000_000)

def daemon(completion):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            open(os.environ["PIDS"], "a").write(f"{os.getpid()}\\n")
            os.closerange(0, 64)
            time.sleep(600)
        os._exit(0)
    while not os.path.exists(os.environ["PIDS"]):
        time.sleep(0.01)
    return 1.0

def eats(completion):
    return float(len(bytearray(10 << 30)) > 0)

HUGE = {
    "text": lambda: "x" * (200 << 20),
    "list": lambda: [0.0] * (4 << 20),
    "integer": lambda: 1 << (1 << 26),
    "note": lambda: {"reward": 1.0, "why": "x" * (200 << 20)},
    "figures": lambda: {"reward": 1.0, **{f"f{n}": n for n in range(50_000)}},
}

def huge(completion):
    return HUGE[completion]()

def chosen(completion):
    return {"reward": 1.0, "adj": int(open("/proc/self/oom_score_adj").read())}
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module `mine` in the working directory."""
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)


def items(*texts: str, **row: Any) -> list[GradeItem]:
    return [GradeItem("1+1", "2", text, [1], (), row) for text in texts]


def grades(*settings: RewardSetting, texts: tuple[str, ...], workers: int = 1, **more: Any) -> list[Grade]:
    with GradePool(rewards=Rewards(settings, workers, **more)) as pool:
        return pool.grade(items(*texts))


def test_weights_parts_and_the_threshold(mine: None) -> None:
    both = (
        RewardSetting("math", "correct"),
        RewardSetting("mine:polite", "polite", 0.5),
        RewardSetting("mine:length", "length", 0.0),
    )
    right, rude, wrong = r"please \boxed{2}", r"\boxed{2}", r"please \boxed{3}"
    found = grades(*both, texts=(right, rude, wrong, ""))
    assert [g.reward for g in found] == [1.5, 1.0, 0.5, 0.0]
    assert [g.verdict for g in found] == ["right", "wrong", "wrong", "no_answer"], "the largest sum is 1.5"
    assert found[1].parts == {"correct": 1.0, "polite": 0.0, "length": 9.0, "length/even": 0.0}
    assert [g.verdict for g in grades(*both, texts=(right, rude, wrong), right_at=1.0)] == ["right", "right", "wrong"]
    # a negative weight adds nothing to the largest sum
    against = (RewardSetting("math", "a"), RewardSetting("mine:polite", "b", -0.5))
    assert [(g.reward, g.verdict) for g in grades(*against, texts=(right, rude))] == [(0.5, "wrong"), (1.0, "right")]


def test_one_reward_is_right_at_its_maximum(mine: None) -> None:
    for maximum, verdicts in ((None, ["right", "right"]), (3.0, ["wrong", "right"])):
        setting = RewardSetting("mine:length", maximum=maximum)
        found = grades(setting, texts=("a", "abc"))
        assert [g.verdict for g in found] == verdicts and found[0].parts == {"even": 0.0}


def test_a_reward_over_its_maximum_is_told_once(mine: None) -> None:
    """`length` declares no maximum, so 1 is assumed: any answer of two letters would count as right."""
    told: list[str] = []
    grades(RewardSetting("mine:length"), texts=("a", "abc", "abcd"), on_excess=told.append)
    assert len(told) == 1 and told[0].startswith("reward `mine:length` gave 3, and its maximum is 1, from which on")
    grades(RewardSetting("mine:length", maximum=4.0), texts=("abcd",), on_excess=told.append)
    grades(RewardSetting("mine:length"), texts=("abcd",), right_at=2.0, on_excess=told.append)
    assert len(told) == 1


def test_what_a_reward_logs_comes_with_its_samples(mine: None) -> None:
    settings = (RewardSetting("mine:logs", "length"), RewardSetting("mine:logs_async", "other"))
    found = grades(*settings, texts=("a", "abc"))
    assert [g.parts for g in found] == [
        {"length": n, "length/mean": 2.0, "other": 1.0, "other/n": 2.0} for n in (1.0, 3.0)
    ]
    assert [g.notes for g in found] == [{"length/said": "\\x1b[31ma"}, {"length/said": "\\x1b[31mabc"}]
    (alone,) = grades(RewardSetting("mine:logs"), texts=("ab",))
    sample = Sample(0, [], "stop", alone.reward, alone.verdict, "ab", dict(alone.parts), dict(alone.notes))
    group = unpack_group(pack_group(Group(1, "p", np.zeros(1, np.int32), [sample])))
    line = group_line(group, group.samples[0])
    assert (line["parts"], line["notes"]) == ({"mean": 2.0}, {"said": "\\x1b[31mab"})


def test_a_reward_may_start_processes_and_threads_and_print(mine: None) -> None:
    (found,) = grades(RewardSetting("mine:many_processes", timeout_s=30.0), texts=("a",))
    assert (found.reward, found.verdict, found.detail) == (0.75, "wrong", ""), "a number under its maximum, no error"
    (found,) = grades(RewardSetting("mine:many_processes", timeout_s=30.0), texts=("a",), right_at=0.75)
    assert found.verdict == "right"


def test_a_class_is_made_once_a_process_and_declares_its_maximum(mine: None) -> None:
    with GradePool("mine:Once") as pool:
        found = pool.grade(items("a", "b")) + pool.grade(items("c"))
        assert pool.right_at == 3
    assert [(g.reward, g.verdict, g.parts["made"]) for g in found] == [
        (1, "wrong", 1),
        (2, "wrong", 1),
        (3, "right", 1),
    ]
    with pytest.raises(UserError, match="making the class failed: RuntimeError: no model file"):
        validate_rewards(Rewards([RewardSetting("mine:Broken")]))


def test_a_reward_that_does_not_apply_is_left_out(mine: None) -> None:
    yes, no = grades(RewardSetting("mine:some"), texts=("yes", "no"))
    assert (yes.verdict, no.verdict, no.detail) == (
        "right",
        "error",
        "no reward applies to this row: each returned None",
    )
    _, no = grades(
        RewardSetting("mine:some", "some"), RewardSetting("mine:polite", "polite"), texts=("yes", "no please")
    )
    assert (no.reward, no.parts, no.verdict) == (1.0, {"polite": 1.0}, "wrong")


def test_timeout_error_and_wrong_are_three_things_and_the_first_error_is_told(mine: None) -> None:
    told: list[str] = []
    setting = RewardSetting("mine:fails", timeout_s=1.0)
    with GradePool(rewards=Rewards([setting], right_at=2.0, on_error=told.append)) as pool:
        found = pool.grade(items("fine", "hang", "bad", "bad", "exit", "fine"))
        assert [g.verdict for g in found] == ["wrong", "timeout", "error", "error", "error", "wrong"]
        assert pool.counts == {"wrong": 2, "timeout": 1, "error": 3} and "exit code 7" in found[4].detail
    assert told == [found[2].detail] == [pool.first_error]
    assert 'mine.py", line' in told[0] and "in fails" in told[0] and told[0].endswith("ValueError: the \\x1b[31mreason")
    assert "grade_worker" not in told[0], "from the reward's own frames on"


def test_failures_in_a_row_end_the_run_in_the_errors_own_words(mine: None) -> None:
    with GradePool(rewards=Rewards([RewardSetting("mine:fails")], max_errors=3)) as pool:
        for _ in range(3):  # one that works in between starts the count again
            pool.grade(items("bad", "bad", "fine"))
        pool.grade(items("bad", "bad"))
        with pytest.raises(
            RunFailed, match=r"(?s)reward `mine:fails` failed for 3 samples in a row:.*line.*ValueError: the"
        ):
            pool.grade(items("bad"))
    late = RewardSetting("mine:fails", timeout_s=0.2)
    with GradePool(rewards=Rewards([late], max_errors=1)) as pool, pytest.raises(RunFailed, match=r"longer than 0.2 s"):
        pool.grade(items("hang"))


def test_a_group_stays_in_one_process(mine: None) -> None:
    with GradePool("mine:pids", workers=2) as pool:
        for texts in (("a",) * 5, ("b",) * 3):
            found = pool.grade(items(*texts))
            assert {g.reward for g in found} == {len(texts)} and len({g.parts["pid"] for g in found}) == 1


def test_async_calls_run_at_once_over_groups(mine: None) -> None:
    async def two_groups(pool: GradePool) -> list[list[Grade]]:
        return list(await asyncio.gather(pool.agrade(items("a", "b")), pool.agrade(items("c", "d"))))

    with GradePool(rewards=Rewards([RewardSetting("mine:together", timeout_s=60.0)])) as pool:
        assert [g.verdict for group in asyncio.run(two_groups(pool)) for g in group] == ["right"] * 4
    found = grades(RewardSetting("mine:trl_async"), texts=("1+1", "2"))
    assert [g.reward for g in found] == [1.0, 0.0]


def test_an_async_call_that_waits_too_long_or_blocks(mine: None) -> None:
    one_by_one = RewardSetting("mine:waits", timeout_s=0.5, concurrency=1)
    found = grades(RewardSetting("mine:waits", timeout_s=0.5), texts=("a", "hang", "b"))
    assert [g.verdict for g in found] == ["right", "timeout", "right"]
    found = grades(one_by_one, texts=("a", "block", "b"))
    assert [g.verdict for g in found] == ["right", "timeout", "right"]


@pytest.mark.parametrize("texts", [("long",), ("short",)])
def test_garbage_in_its_frames_costs_the_sample_alone(mine: None, texts: tuple[str, ...]) -> None:
    found = grades(RewardSetting("mine:noise"), texts=texts)
    assert [g.verdict for g in found] == ["error"] and "no grade" in found[0].detail


def test_a_huge_error_is_cut(mine: None) -> None:
    (found,) = grades(RewardSetting("mine:big", timeout_s=20.0), texts=("a",))
    assert found.verdict == "error" and len(found.detail) < 5000 and "ValueError: zzz" in found.detail


def test_a_process_that_does_not_read_is_given_up() -> None:
    before = children(recursive=True)
    with GradePool("number", timeout_s=1.0) as pool:
        pool.grade(items("2"))
        (worker,) = [c for c in children(recursive=True) - before if c.cmdline()[1:3] == ["-P", "-m"]]
        worker.suspend()
        found = pool.grade([GradeItem("p" * 100_000, "7", "7")] * 8)
    assert [g.verdict for g in found][1:] == ["right"] * 7 and found[0].verdict in ("right", "timeout")


def test_a_row_that_cannot_be_sent_fails_its_group_alone(mine: None) -> None:
    with GradePool("mine:some") as pool:
        with pytest.raises(Exception, match="pickle"):
            pool.grade(items("yes", odd=lambda: None))
        assert pool.grade(items("yes"))[0].verdict == "right"


@needs_linux
def test_a_daemon_of_a_reward_ends_with_its_process(
    mine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    with GradePool("mine:daemon") as pool:
        pool.grade(items("a", "b"))
        left = ids(tmp_path / "pids")
        assert left and all(map(alive, left))
    assert not any(map(alive, ids(tmp_path / "pids")))


@pytest.mark.skipif(sys.platform != "linux", reason="not every platform bounds address space")
def test_a_reward_that_takes_ten_gigabytes_costs_its_sample_alone(mine: None) -> None:
    for memory, words in ((1 << 30, "1"), (3 << 29, "1.5")):
        (found,) = grades(RewardSetting("mine:eats", memory_bytes=memory), texts=("a",))
        assert found.verdict == "error", found
        assert f"MemoryError: more than the {words} GiB that this process may take (`data.reward_memory_gib`" in (
            found.detail
        )


def test_a_huge_object_of_a_reward_costs_its_sample_alone(mine: None) -> None:
    setting = RewardSetting("mine:huge", memory_bytes=4 << 30, timeout_s=60.0)
    found = grades(setting, texts=("text", "list", "integer", "note", "figures"))
    assert [one.verdict for one in found] == ["error", "error", "error", "right", "right"]
    for one, words in zip(found, ("a str, not a number", "a list, not a number", "too large"), strict=False):
        assert words in one.detail and len(one.detail) < 500
    assert len(found[3].notes["why"]) == NOTE_CHARACTERS and len(found[4].parts) <= MOST_PARTS + 1


@pytest.mark.skipif(sys.platform != "linux", reason="the killer of processes is Linux's")
def test_the_system_ends_a_grader_first_when_memory_runs_out(mine: None) -> None:
    (found,) = grades(RewardSetting("mine:chosen"), texts=("a",))
    assert found.parts == {"adj": 1000.0}


# -- before the start, and in an evaluation ----------------------------------------------------------------------------


def test_columns_are_checked_for_every_source_and_benchmark(mine: None, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODULE + "\ndef wants(completion, level):\n    return 1.0\n")
    (tmp_path / "bench.jsonl").write_text('{"problem": "1+1", "answer": "2", "difficulty": 3}\n')
    data = {"source": "arithmetic", "reward": "mine:wants"}
    recipe = recipe_io.check(
        recipe_io.to_document(recipe_io.load("qwen3.5-tiny-m2po-delta")) | {"data": data, "eval": {}}, "r"
    )
    with pytest.raises(UserError, match=r"`level`, which is no column of the training problems \(columns: none\)"):
        check_rewards(recipe, {}, {}, trains=True)
    first = Problem("0", "1+1", "2", row={"level": 1})
    check_rewards(recipe, {"": first}, {}, trains=True)
    benchmark = str(tmp_path / "bench.jsonl")
    with pytest.raises(
        UserError, match=r"no column of benchmark `.*bench.jsonl` .columns: `problem`, `answer`, `difficulty"
    ):
        check_rewards(recipe, {"": first}, {benchmark: benchmark}, trains=False)


def test_a_benchmark_of_ones_own_is_graded_by_the_recipes_reward(mine: None, tmp_path: Path) -> None:
    """A reward that is always 0 scores 0 there, whatever the answers are."""
    (tmp_path / "mine.py").write_text("def nothing(completion):\n    return 0.0\n")
    (tmp_path / "bench.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n{"problem": "2+3", "answer": "5"}\n')
    base = recipe_io.to_document(recipe_io.load("qwen3.5-tiny-m2po-delta"))
    for reward, score in (("mine:nothing", 0.0), ("number", 1.0)):
        recipe = recipe_io.check(base | {"data": {"source": "arithmetic", "reward": reward}, "eval": {}}, "r")
        benchmark = benchmarks.load(str(tmp_path / "bench.jsonl"), tmp_path / "bench.jsonl", recipe=recipe)
        assert benchmark.grader == reward and benchmark.data is not None
        right = [GradeItem(p.question, p.answer, f"\\boxed{{{p.answer}}}") for p in benchmark.items]
        with contextlib.ExitStack() as stack:
            pools = open_pools(stack, {"a": Rewards.of(benchmark.data), "b": Rewards.of(benchmark.data)})
            assert pools["a"] is pools["b"], "the same rewards share their processes"
            assert {g.reward for g in pools["a"].grade(right)} == {score}
            assert [g.verdict == "right" for g in pools["a"].grade(right)] == [score == 1.0] * 2
