"""Evaluation: every item counted, pinned versions enforced, files rewritten, and the real process against real sockets.

The engine is a stand-in that answers held-out arithmetic: sample seeds that are multiples of four are answered wrong.
"""

import asyncio
import csv
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from astracli.data import benchmarks
from astracli.data.benchmarks import Benchmark
from astracli.data.prompts import Problem
from astracli.engines.client import GenRequest, GenResult
from astracli.errors import RunFailed
from astracli.recipe import Recipe
from astracli.rl import passk
from astracli.rl.evaluation import Sampling, evaluate_benchmark, sample_seed
from astracli.rl.reward import GradePool
from astracli.workers import evaluate
from astracli.workers.common import WorkerConfig

CHARACTERS = "0123456789+-= \\boxed{}"
VOCABULARY = {c: i for i, c in enumerate(["<pad>", "<eos>", *dict.fromkeys(CHARACTERS)])}
SYMBOLS = list(VOCABULARY)
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=24, context_length=64, stop_token_ids=(1,), seed=5)
TOKEN = "secret"


class CharTokenizer:
    chat_template = None
    eos_token_id = 1

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [VOCABULARY[c] for c in text]}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(SYMBOLS[i] for i in ids if i > 1)


def answer_tokens(prompt: Sequence[int], seed: int) -> list[int]:
    question = CharTokenizer().decode(prompt).rstrip("=")
    right = eval(question)
    return [*CharTokenizer()(f"\\boxed{{{right + (seed % 4 == 0)}}}")["input_ids"], 1]


class FakeEngine:
    """Answers at once; counts what is in flight; can abort, fail and change its version."""

    def __init__(self, version: int = 7) -> None:
        self.version = version
        self.in_flight = self.most = 0
        self.aborts = self.failures = 0
        self.healthy = True
        self.requests: list[GenRequest] = []
        self.calls: list[list[GenRequest]] = []

    async def health(self) -> bool:
        return self.healthy

    async def generate(self, requests: Sequence[GenRequest]) -> list[GenResult]:
        self.requests += requests
        self.calls.append(list(requests))
        self.in_flight += len(requests)
        self.most = max(self.most, self.in_flight)
        await asyncio.sleep(0.001)
        self.in_flight -= len(requests)
        if self.failures:
            self.failures -= 1
            raise RunFailed("engine at nowhere is gone")
        results = []
        for request in requests:
            tokens = np.array(answer_tokens(request.input_ids, request.seed), np.int32)
            reason: Any = "stop"
            if self.aborts:
                self.aborts -= 1
                tokens, reason = tokens[:2], "abort"
            version = self.version
            results.append(GenResult(tokens, np.full(len(tokens), -0.5, np.float32), reason, version, version, ""))
        return results


def small(n: int) -> Benchmark:
    return replace(benchmarks.load("arithmetic-heldout"), items=benchmarks.load("arithmetic-heldout").items[:n])


def run_benchmark(engine: FakeEngine, benchmark: Benchmark, **options: Any) -> Any:
    options = {"sampling": SAMPLING, "version": 7} | options
    with GradePool() as pool:
        return asyncio.run(evaluate_benchmark(engine, benchmark, CharTokenizer(), pool, **options))


def expected_average(items: Sequence[Problem], n: int) -> float:
    wrong = [sample_seed(5, "arithmetic-heldout", p.id, i) % 4 == 0 for p in items for i in range(n)]
    return 1 - sum(wrong) / len(wrong)


def test_seeds_depend_on_run_benchmark_item_and_sample_only() -> None:
    seeds = {sample_seed(s, b, p, i) for s in (0, 1) for b in ("a", "b") for p in ("x", "y") for i in range(4)}
    assert len(seeds) == 32 and all(0 <= seed < 2**63 for seed in seeds)
    first, second = FakeEngine(7), FakeEngine(8)
    run_benchmark(first, small(5))
    run_benchmark(second, small(5), version=8, max_concurrency=3)
    assert sorted(r.seed for r in first.requests) == sorted(r.seed for r in second.requests)


def test_average_is_over_all_items_and_samples() -> None:
    benchmark = small(40)
    progress: list[tuple[int, int]] = []
    result = run_benchmark(FakeEngine(), benchmark, on_progress=lambda done, total: progress.append((done, total)))
    assert result.score.avg_at_n == pytest.approx(expected_average(benchmark.items, 8))
    assert (result.score.items, result.score.n, result.score.k) == (40, 8, 4)
    assert progress[-1] == (320, 320)
    assert [(s.problem.id, s.sample) for s in result.samples[:9]] == [
        *((benchmark.items[0].id, i) for i in range(8)),
        (benchmark.items[1].id, 0),
    ]
    assert 0 < result.figures()["response_tokens_mean"] < 24


@pytest.mark.parametrize("limit", [1, 5, 16])
def test_no_more_samples_in_flight_than_allowed(limit: int) -> None:
    engine = FakeEngine()
    run_benchmark(engine, small(20), max_concurrency=limit)
    assert 0 < engine.most <= limit
    long = FakeEngine()
    run_benchmark(
        long, small(20), max_concurrency=limit, sampling=replace(SAMPLING, max_new_tokens=5000, context_length=9999)
    )
    assert long.most == limit


def test_fixed_calls_are_full_in_order_and_one_at_a_time() -> None:
    engine, usual = FakeEngine(), FakeEngine()
    exact = run_benchmark(engine, small(5), whole_calls=True, max_concurrency=16)
    assert [len(call) for call in engine.calls] == [16, 16, 8] and engine.most == 16
    assert [r.seed for r in engine.requests] == [
        sample_seed(5, "arithmetic-heldout", item.id, i) for item in small(5).items for i in range(8)
    ]
    same = run_benchmark(usual, small(5), max_concurrency=16)
    assert [(s.problem.id, s.sample, s.text) for s in exact.samples] == [
        (s.problem.id, s.sample, s.text) for s in same.samples
    ]


def test_aborted_requests_and_a_restarting_engine_are_asked_again() -> None:
    engine = FakeEngine()
    engine.aborts, engine.failures, engine.healthy = 11, 3, False
    benchmark = small(6)
    result = run_benchmark(engine, benchmark)
    assert result.score.avg_at_n == pytest.approx(expected_average(benchmark.items, 8))
    assert {s.finish_reason for s in result.samples} == {"stop"}


def test_a_healthy_engine_that_refuses_ends_the_evaluation() -> None:
    engine = FakeEngine()
    engine.failures = 10**6
    with pytest.raises(RunFailed, match="is gone"):
        run_benchmark(engine, small(1))


def test_another_version_is_an_error() -> None:
    with pytest.raises(RunFailed, match="pinned to version 7 was answered by version 9"):
        run_benchmark(FakeEngine(9), small(2))
    assert run_benchmark(FakeEngine(9), small(2), version=None).samples[0].version == 9


def test_prompts_that_do_not_fit_count_as_wrong() -> None:
    benchmark = small(4)
    length = len(benchmark.items[2].question)  # a three-digit problem
    result = run_benchmark(FakeEngine(), benchmark, sampling=replace(SAMPLING, context_length=length))
    figures = result.figures()
    assert figures["items"] == 4 and figures["prompts_too_long"] == 16
    assert all(s.grade.verdict == "no_answer" for s in result.samples if s.finish_reason == "prompt_too_long")


def test_rows_of_a_step_are_replaced_and_overall_is_the_unweighted_mean(tmp_path: Path) -> None:
    results = [run_benchmark(FakeEngine(), small(8)), replace(run_benchmark(FakeEngine(), small(3)), benchmark="other")]
    evaluate.write_results(tmp_path, 10, 7, results)
    evaluate.write_results(tmp_path, 0, 0, results)
    before = (tmp_path / "eval.csv").read_text()
    evaluate.write_results(tmp_path, 10, 7, results)
    assert (tmp_path / "eval.csv").read_text() == before
    rows = list(csv.DictReader((tmp_path / "eval.csv").open()))
    assert before.startswith("step,version,benchmark,items,n,avg_at_n,stderr,k,pass_at_k\n0,0,arithmetic-heldout,8,8,")
    assert [(r["step"], r["benchmark"], r["items"]) for r in rows] == [
        (step, name, items)
        for step in ("0", "10")
        for name, items in (("arithmetic-heldout", "8"), ("other", "3"), ("overall", "11"))
    ]
    mean = (float(rows[0]["avg_at_n"]) + float(rows[1]["avg_at_n"])) / 2
    assert float(rows[2]["avg_at_n"]) == pytest.approx(mean, abs=1e-6)
    lines = (tmp_path / "items" / "step_000010_other.jsonl").read_text().splitlines()
    assert len(lines) == 24
    assert list(json.loads(lines[0])) == [
        *("step", "version", "benchmark", "problem_id", "problem", "answer", "sample", "completion", "tokens"),
        *("logprobs", "advantage", "reward", "verdict", "finish_reason"),
    ]


class Stand(BaseHTTPRequestHandler):
    """Hub and engine in one server; the hub hands out two evaluations and then says stop."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer({} if self.path == "/health_generate" else {"error": {"message": self.path}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
        state = self.server.state  # type: ignore[attr-defined]
        assert self.headers["Authorization"] == f"Bearer {TOKEN}"
        if self.path == "/generate":
            state["asked"] += len(body["input_ids"])
            self._answer(
                [
                    self._completion(ids, p, state["version"])
                    for ids, p in zip(body["input_ids"], body["sampling_params"], strict=True)
                ]
            )
        elif self.path == "/eval/next":
            task = state["tasks"][0] if state["tasks"] else {"wait": "nothing", "stop": True}
            state["version"] = task.get("version", state["version"])
            self._answer(task)
        else:
            state["calls"].append((self.path, body))
            if self.path == "/eval/done":
                state["tasks"].pop(0)
            self._answer({"stop": False})

    def _completion(self, ids: list[int], params: dict[str, Any], version: int) -> dict[str, Any]:
        tokens = answer_tokens(ids, 1 if params["temperature"] == 0 else params["sampling_seed"])
        meta = {
            "id": "r",
            "finish_reason": {"type": "stop"},
            "weight_version": str(version),
            "output_token_logprobs": [[-0.25, token, None] for token in tokens],
        }
        return {"output_ids": tokens, "meta_info": meta}

    def _answer(self, document: Any) -> None:
        blob = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(blob)))
        self.end_headers()
        self.wfile.write(blob)


@pytest.fixture
def stand() -> Iterator[Any]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stand)
    server.daemon_threads = True
    tasks = [{"step": s, "version": v, "engine": "engine0"} for s, v in ((0, 0), (10, 10))]
    server.state = {"tasks": tasks, "calls": [], "version": 3, "asked": 0}  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def save_tokenizer(path: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(["<pad>", "<eos>"])
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", chat_template=template
    ).save_pretrained(path)


def worker_config(tmp_path: Path, server: Any, **extra: Any) -> WorkerConfig:
    save_tokenizer(tmp_path / "model")
    url = f"http://127.0.0.1:{server.server_address[1]}"
    recipe = {
        "seed": 5,
        "model": {"path": "astra:tiny"},
        "data": {"source": "arithmetic"},
        "train": {"steps": 10},
        "rollout": {"max_new_tokens": 24, "context_length": 64},
        "eval": {"benchmarks": ["arithmetic-heldout"], "samples": 4, "temperature": 1.0},
    }
    return WorkerConfig(
        name="eval",
        role="eval",
        run_dir=tmp_path / "run",
        hub_url=url,
        token=TOKEN,
        recipe=Recipe.model_validate(recipe),
        paths={"model": str(tmp_path / "model"), "data": None, "benchmarks": {"arithmetic-heldout": None}},
        engines=[{"name": "engine0", "url": url}],
        extra=extra,
    )


def test_the_process_follows_the_hub(tmp_path: Path, stand: Any) -> None:
    config = worker_config(tmp_path, stand)
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(config.document()))
    command = [sys.executable, "-m", "astracli.workers.evaluate", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "run" / "eval" / "eval.csv").open()))
    items = benchmarks.load("arithmetic-heldout").items
    average = f"{expected_average(items, 4):.6f}"
    assert [(r["step"], r["version"], r["benchmark"], r["items"], r["n"], r["avg_at_n"], r["k"]) for r in rows] == [
        (s, s, name, "256", "4", average, "4") for s in ("0", "10") for name in ("arithmetic-heldout", "overall")
    ]
    lines = (tmp_path / "run" / "eval" / "items" / "step_000010_arithmetic-heldout.jsonl").read_text().splitlines()
    assert len(lines) == 1024
    first = json.loads(lines[0])
    assert first["completion"].startswith("\\boxed{") and first["tokens"][-1] == 1 and first["version"] == 10
    calls = stand.state["calls"]
    finished = [body for path, body in calls if path == "/eval/done"]
    assert [(b["step"], b["version"]) for b in finished] == [(0, 0), (10, 10)]
    assert finished[0]["results"]["overall"]["avg_at_n"] == pytest.approx(float(average), abs=1e-6)
    records = [record for path, body in calls if path == "/metrics" for record in body["records"]]
    assert [(r["step"], r["benchmark"], r["process"]) for r in records] == [
        (s, name, "eval") for s in (0, 10) for name in ("arithmetic-heldout", "overall")
    ]
    assert any(body["state"] == "done" for path, body in calls if path == "/status")


def test_once_on_an_engine_without_a_run(tmp_path: Path, stand: Any) -> None:
    out = tmp_path / "out"
    config = worker_config(tmp_path, stand, standalone=True, out=str(out), weights_version=3, greedy=True)
    reporter = SimpleNamespace(
        ready=lambda: None, progress=lambda **_: None, waiting=lambda _: None, stop_requested=threading.Event()
    )
    evaluate.run(config, reporter)  # type: ignore[arg-type]
    document = json.loads((out / "results.json").read_text())
    assert document["version"] == 3
    assert document["greedy"]["arithmetic-heldout"]["avg_at_n"] == 1.0
    assert document["greedy"]["arithmetic-heldout"]["n"] == 1
    assert document["results"]["arithmetic-heldout"]["avg_at_n"] < 0.9
    again = tmp_path / "again"
    evaluate.run(replace(config, extra={**config.extra, "out": str(again)}), reporter)  # type: ignore[arg-type]
    for path in [*sorted(p.relative_to(out) for p in (out / "items").iterdir()), Path("eval.csv")]:
        assert (out / path).read_bytes() == (again / path).read_bytes()


def quiet(stop: threading.Event | None = None) -> Any:
    return SimpleNamespace(
        ready=lambda: None, progress=lambda **_: None, waiting=lambda _: None, stop_requested=stop or threading.Event()
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_an_interrupted_evaluation_asks_for_the_rest_and_two_engines_say_the_same(tmp_path: Path, stand: Any) -> None:
    config = worker_config(tmp_path, stand, standalone=True, out=str(tmp_path / "whole"), greedy=True)
    evaluate.run(config, quiet())
    whole = files_of(tmp_path / "whole")
    assert set(whole) == {"results.json", "results.csv", "eval.csv", "items/step_000000_arithmetic-heldout.jsonl"}
    assert b"wall" not in whole["results.json"]

    part = tmp_path / "part"
    (part / "partial").mkdir(parents=True)
    lines = whole["items/step_000000_arithmetic-heldout.jsonl"].decode().splitlines(keepends=True)
    kept = [line for i, line in enumerate(lines) if i % 3][:600]
    (part / "partial" / "arithmetic-heldout.jsonl").write_text("".join(kept) + lines[0][:40])  # a torn last line
    again = replace(config, engines=[*config.engines, {**config.engines[0], "name": "engine1"}])
    before = stand.state["asked"]
    evaluate.run(replace(again, extra={**config.extra, "out": str(part)}), quiet())
    assert files_of(part) == whole
    assert stand.state["asked"] - before == 1024 - 600 + 256  # the missing samples and the greedy ones


def test_results_say_intervals_every_k_and_lengths(tmp_path: Path, stand: Any) -> None:
    evaluate.run(worker_config(tmp_path, stand, standalone=True, out=str(tmp_path / "out")), quiet())
    found = json.loads((tmp_path / "out" / "results.json").read_text())["results"]["arithmetic-heldout"]
    assert list(found["pass_at"]) == ["1", "2", "3", "4"] and list(found["majority_at"]) == ["1", "2", "4"]
    assert found["pass_at"]["1"] == pytest.approx(found["avg_at_n"]) == pytest.approx(found["majority_at"]["1"])
    assert (found["ci95_low"], found["ci95_high"]) == passk.interval(found["avg_at_n"], found["stderr"], 256)
    assert found["ci95_high"] - found["ci95_low"] == pytest.approx(2 * 1.96 * found["stderr"], rel=0.02)
    assert found["pass_at"]["4"] == found["pass_at_k"] > found["pass_at"]["2"]
    assert found["response_tokens_max"] >= found["response_tokens_mean"] > 0
    (row, overall) = csv.DictReader((tmp_path / "out" / "results.csv").open())
    assert (row["pass_at_2"], overall["benchmark"]) == (f"{found['pass_at']['2']:.6f}", "overall")


def test_whole_calls_are_the_same_whatever_is_done(tmp_path: Path) -> None:
    first, second = FakeEngine(), FakeEngine()
    benchmark = small(10)
    whole = run_benchmark(first, benchmark, whole_calls=True, max_concurrency=32)
    done = whole.samples[:40]  # the first call of 32 is done, of the second a part
    rest = run_benchmark(second, benchmark, whole_calls=True, max_concurrency=32, done_before=done)
    assert [len(first.requests), len(second.requests)] == [80, 48]
    assert rest.score == whole.score and first.most == 32


def test_a_stop_ends_an_evaluation(tmp_path: Path, stand: Any) -> None:
    stop = threading.Event()
    stop.set()
    config = worker_config(tmp_path, stand, standalone=True, out=str(tmp_path / "out"))
    reporter = SimpleNamespace(ready=lambda: None, progress=lambda **_: None, stop_requested=stop)
    with pytest.raises(SystemExit) as caught:
        evaluate.run(config, reporter)  # type: ignore[arg-type]
    assert caught.value.code == 143
    assert not (tmp_path / "out" / "eval.csv").exists()
