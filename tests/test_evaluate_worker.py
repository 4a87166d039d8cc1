"""The evaluation process against real sockets, and the files that it leaves."""

from __future__ import annotations

import csv
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import configs
import pytest
import warm
from eval_cases import (
    VOCABULARY,
    FakeEngine,
    answer_tokens,
    expected_average,
    run_benchmark,
    small,
)

from astracli.config.recipe import Recipe
from astracli.data import benchmarks
from astracli.errors import RunFailed
from astracli.evaluation import files as eval_files
from astracli.evaluation import passk
from astracli.evaluation import worker as evaluate
from astracli.hub.types import Evaluation
from astracli.process.config import EngineAddress, EvalConfig

TOKEN = "secret"
RECIPE: dict[str, Any] = {
    "seed": 5,
    "model": {"path": "astra:tiny"},
    "data": {"source": "arithmetic"},
    "train": {"steps": 10},
    "rollout": {"max_new_tokens": 24, "context_length": 64},
    "eval": {"benchmarks": ["arithmetic-heldout"], "samples": 4, "temperature": 1.0},
}


def test_rows_of_a_step_are_replaced_and_overall_is_the_unweighted_mean(tmp_path: Path) -> None:
    results = [run_benchmark(FakeEngine(), small(8)), replace(run_benchmark(FakeEngine(), small(3)), benchmark="other")]
    eval_files.write_results(tmp_path, Evaluation(10, 7, 8), results)
    eval_files.write_results(tmp_path, Evaluation(0, 0, 0), results)
    before = (tmp_path / "eval.csv").read_text()
    eval_files.write_results(tmp_path, Evaluation(10, 7, 8), results)
    assert (tmp_path / "eval.csv").read_text() == before
    rows = list(csv.DictReader((tmp_path / "eval.csv").open()))
    assert before.startswith(
        "step,version,benchmark,items,n,avg_at_n,stderr,k,pass_at_k,due_step,grader,no_answer,greedy,greedy_no_answer\n"
        "0,0,arithmetic-heldout,8,8,"
    )
    assert [row["due_step"] for row in rows] == ["0"] * 3 + ["8"] * 3
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


def test_what_an_earlier_attempt_left_is_taken_where_it_belongs(tmp_path: Path) -> None:
    """Not a sample of another version or of an item that is gone, and not a line that was torn."""
    first, second, third, fourth, *_ = run_benchmark(FakeEngine(), small(1)).samples
    kept = eval_files.Partial(tmp_path / "partial", small(1), 7)
    assert kept.read() == []
    kept.add([first, second])
    kept.add([replace(third, version=6), replace(fourth, problem=replace(fourth.problem, id="gone"))])
    with kept.path.open("a") as file:
        file.write('{"problem_id": "add2:')
    found = kept.read()
    assert [(s.problem, s.sample, s.version, s.text, s.finish_reason, s.grade) for s in found] == [
        (s.problem, s.sample, 7, s.text, s.finish_reason, s.grade) for s in (first, second)
    ]
    assert [s.tokens.tolist() for s in found] == [s.tokens.tolist() for s in (first, second)]
    assert [s.version for s in replace(kept, version=None).read()] == [7, 7, 6]


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
            left = [task for task in state["tasks"] if task["version"] not in body["finishing"]]
            if left:
                state["version"] = left[0]["version"]
            stop = not state["tasks"]
            self._answer({"evaluation": left[0] if left else None, "wait": "nothing", "stop": stop})
        elif self.path == "/engine/slots":
            self._answer({"limit": 1000, "shared": False})
        elif self.path == "/eval/engines":
            time.sleep(0.0 if body.get("have") is None else 0.2)
            self._answer({"engines": ["engine0"], "stop": False})
        else:
            state["calls"].append((self.path, body))
            if self.path == "/eval/done":
                state["tasks"].pop(0)
            self._answer({"stop": False} if self.path == "/status" else None)

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


@contextmanager
def standing() -> Iterator[Any]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stand)
    server.daemon_threads = True
    tasks = [{"step": s, "version": s, "due_step": due, "served": False} for s, due in ((0, 0), (10, 8))]
    server.state = {"tasks": tasks, "calls": [], "version": 3, "asked": 0}  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def stand() -> Iterator[Any]:
    with standing() as server:
        yield server


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one evaluation without a run wrote, of four samples an item and a greedy one."""
    folder = tmp_path_factory.mktemp("whole")
    with standing() as server:
        evaluate.run(worker_config(folder, server, folder / "out"), quiet())
    return folder / "out"


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


def worker_config(tmp_path: Path, server: Any, out: Path | None = None) -> EvalConfig:
    save_tokenizer(tmp_path / "model")
    url = f"http://127.0.0.1:{server.server_address[1]}"
    return configs.evaluation(
        run_dir=tmp_path / "run",
        hub_url=url,
        token=TOKEN,
        recipe=Recipe.model_validate(RECIPE),
        model_path=tmp_path / "model",
        benchmarks={"arithmetic-heldout": None},
        engines=(EngineAddress(name="engine0", url=url, stage_dir=tmp_path / "stage"),),
        out=out,
    )


def test_the_process_follows_the_hub(tmp_path: Path, stand: Any) -> None:
    table = {"benchmarks": ["arithmetic-heldout"], "samples": {"arithmetic-heldout": 4}, "greedy": True}
    recipe = Recipe.model_validate(RECIPE | {"eval": table | {"temperature": 1.0}})
    config = worker_config(tmp_path, stand).model_copy(update={"recipe": recipe})
    path = tmp_path / "eval.json"
    path.write_text(config.model_dump_json())
    done = warm.run(["-m", "astracli.evaluation.worker", str(path)])
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "run" / "eval" / "eval.csv").open()))
    items = benchmarks.load("arithmetic-heldout").items
    average = f"{expected_average(items, 4):.6f}"
    assert [(r["step"], r["version"], r["benchmark"], r["items"], r["n"], r["avg_at_n"], r["k"]) for r in rows] == [
        (s, s, name, "256", "4", average, "4") for s in ("0", "10") for name in ("arithmetic-heldout", "overall")
    ]
    greedy = "1.000000"  # of one sample an item; every fourth of the drawn ones is wrong
    assert {(r["no_answer"], r["greedy"], r["greedy_no_answer"]) for r in rows} == {("0.000000", greedy, "0.000000")}
    drawn = (tmp_path / "run" / "eval" / "greedy" / "items" / "step_000010_arithmetic-heldout.jsonl").read_text()
    assert len(drawn.splitlines()) == 256
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


def test_a_worker_that_begins_anew_asks_for_what_is_missing_and_writes_what_was_served(
    tmp_path: Path, stand: Any
) -> None:
    """Of the first evaluation every sample is on disk, of the second two thirds."""
    config = worker_config(tmp_path, stand, tmp_path / "whole")
    once = Recipe.model_validate(RECIPE | {"eval": RECIPE["eval"] | {"samples": 1, "pass_k": 1}})
    config = config.model_copy(update={"recipe": once})
    stand.state["version"] = 0
    evaluate.run(config, quiet())
    lines = (tmp_path / "whole/items/step_000000_arithmetic-heldout.jsonl").read_text().splitlines(keepends=True)
    folder = config.run_dir / "eval"
    for step, kept in ((0, lines), (10, [line for i, line in enumerate(lines) if i % 3])):
        place = eval_files.partial_of(folder, step) / "arithmetic-heldout.jsonl"
        place.parent.mkdir(parents=True)
        place.write_text("".join(kept).replace('"version": 0', f'"version": {step}'))
    stand.state["tasks"][0]["served"] = True
    before = stand.state["asked"]
    evaluate.run(config.model_copy(update={"out": None}), quiet())
    assert stand.state["asked"] - before == 256 - len(kept)
    both = [folder / f"items/step_{step:06d}_arithmetic-heldout.jsonl" for step in (0, 10)]
    answers = [[json.loads(line)["completion"] for line in path.read_text().splitlines()] for path in both]
    assert answers[0] == answers[1] == [json.loads(line)["completion"] for line in lines]
    assert sorted(path.name for path in folder.iterdir()) == ["eval.csv", "items"]
    released = [body for path, body in stand.state["calls"] if path == "/eval/release"]
    assert released[-1] == {"step": 10, "version": 10, "engine": "engine0"}


def test_samples_that_are_gone_after_the_engines_went_on_end_the_worker(tmp_path: Path, stand: Any) -> None:
    stand.state["tasks"][0]["served"] = True
    with pytest.raises(RunFailed, match="holds 0 of 1024 samples of arithmetic-heldout, and the engines have gone on"):
        evaluate.run(worker_config(tmp_path, stand), quiet())


def test_a_resume_forgets_the_files_of_later_steps(tmp_path: Path) -> None:
    result = run_benchmark(FakeEngine(), small(2))
    for step in (0, 10, 13):
        eval_files.write_results(tmp_path, Evaluation(step, step, min(step, 10)), [result])
    for step in (10, 13):
        eval_files.Partial(eval_files.partial_of(tmp_path, step), small(2), 7).add(result.samples)
    eval_files.forget_after(tmp_path, 12)
    assert {row["step"] for row in csv.DictReader((tmp_path / "eval.csv").open())} == {"0", "10"}
    assert sorted(path.name[:11] for path in (tmp_path / "items").iterdir()) == ["step_000000", "step_000010"]
    assert [path.name for path in (tmp_path / "partial").iterdir()] == ["step_000010"]
    eval_files.forget_after(tmp_path / "none", 0)


def test_once_on_an_engine_without_a_run(whole: Path) -> None:
    document = json.loads((whole / "results.json").read_text())
    assert document["version"] == 3
    assert document["greedy"]["arithmetic-heldout"]["avg_at_n"] == 1.0
    assert document["greedy"]["arithmetic-heldout"]["n"] == 1
    assert document["results"]["arithmetic-heldout"]["avg_at_n"] < 0.9


def quiet(stop: threading.Event | None = None) -> Any:
    return SimpleNamespace(
        ready=lambda: None, progress=lambda **_: None, waiting=lambda _: None, stop_requested=stop or threading.Event()
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_an_interrupted_evaluation_asks_for_the_rest_and_two_engines_say_the_same(
    whole: Path, tmp_path: Path, stand: Any
) -> None:
    config, wanted = worker_config(tmp_path, stand), files_of(whole)
    assert set(wanted) == {"results.json", "results.csv", "eval.csv", "items/step_000000_arithmetic-heldout.jsonl"}
    assert b"wall" not in wanted["results.json"]

    part = tmp_path / "part"
    (part / "partial").mkdir(parents=True)
    lines = wanted["items/step_000000_arithmetic-heldout.jsonl"].decode().splitlines(keepends=True)
    kept = [line for i, line in enumerate(lines) if i % 3][:600]
    (part / "partial" / "arithmetic-heldout.jsonl").write_text("".join(kept) + lines[0][:40])  # a torn last line
    second = config.engines[0].model_copy(update={"name": "engine1"})
    again = config.model_copy(update={"engines": (*config.engines, second), "out": part})
    before = stand.state["asked"]
    evaluate.run(again, quiet())
    assert files_of(part) == wanted
    assert stand.state["asked"] - before == 1024 - 600 + 256  # the missing samples and the greedy ones


def test_results_say_intervals_every_k_and_lengths(whole: Path) -> None:
    found = json.loads((whole / "results.json").read_text())["results"]["arithmetic-heldout"]
    assert list(found["pass_at"]) == ["1", "2", "3", "4"] and list(found["majority_at"]) == ["1", "2", "4"]
    assert found["pass_at"]["1"] == pytest.approx(found["avg_at_n"]) == pytest.approx(found["majority_at"]["1"])
    assert (found["ci95_low"], found["ci95_high"]) == passk.interval(found["avg_at_n"], found["stderr"], 256)
    assert found["ci95_high"] - found["ci95_low"] == pytest.approx(2 * 1.96 * found["stderr"], rel=0.02)
    assert found["pass_at"]["4"] == found["pass_at_k"] > found["pass_at"]["2"]
    assert found["response_tokens_max"] >= found["response_tokens_mean"] > 0
    (row, overall) = csv.DictReader((whole / "results.csv").open())
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
    config = worker_config(tmp_path, stand, tmp_path / "out")
    with pytest.raises(SystemExit) as caught:
        evaluate.run(config, quiet(stop))
    assert caught.value.code == 143
    assert not (tmp_path / "out" / "eval.csv").exists()
