"""The page of a run: one file, nothing loaded, everything in it. In a browser: `bench/loop/report_page.py`."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from astracli.config import recipe_io
from astracli.report import samples as report_samples
from astracli.report.page import data as report_data
from astracli.report.page import html as report_html
from astracli.runs.run_dir import RunDir

STEPS = 6


def sample(step: int, number: int, **more: Any) -> dict[str, Any]:
    row = {
        "step": step, "version": step, "problem_id": f"p{number}", "answer": "2",
        "problem": "1+1</script><script>alert(1)",
        "sample": number, "completion": "2", "tokens": [5, 1], "logprobs": [-0.25, -1.5],
        "advantage": 0.5, "reward": 1.0,
        "verdict": "right" if number % 2 else "wrong", "finish_reason": "stop",
    }  # fmt: skip
    return row | more


def write_run(path: Path, steps: int = STEPS, per_step: int = 4) -> RunDir:
    """A run directory as a training run leaves it, without a model."""
    (path / "samples").mkdir(parents=True)
    (path / "eval" / "items").mkdir(parents=True)
    run = RunDir(path)
    run.recipe_json.write_text(recipe_io.to_json(recipe_io.load("qwen3.5-tiny-m2po-delta")))
    run.start(recipe="tiny", steps=steps)
    run.end("done", exit_code=0)
    with run.metrics_jsonl.open("w") as file:
        for step in range(steps):
            trainer = {
                "reward_mean": step / steps,
                "grad_norm": 1.5,
                "staleness_mean": 1.0,
                "ratio_mean": 1.0,
                "kl": 0.01,
            }
            trainer |= {"step_s": 2.0, "wait_s": 0.5, "forward_s": 0.4, "backward_s": 0.6, "checkpoint_s": 0.1}
            file.write(json.dumps({"step": step, "process": "trainer"} | trainer) + "\n")
            update = {"engine": "engine0", "pause_s": 0.05, "fetched_bytes": 1000, "kind": "delta"}
            file.write(json.dumps({"step": step + 1, "process": "rollout"} | update) + "\n")
    for step in range(steps):
        rows = [json.dumps(sample(step, i)) for i in range(per_step)]
        (path / "samples" / f"step_{step:06d}.jsonl").write_text("\n".join(rows) + "\n")
    for step in (0, steps):
        rows = [json.dumps(sample(step, i, benchmark="b", advantage=None)) for i in range(3)]
        (path / "eval" / "items" / f"step_{step:06d}_b.jsonl").write_text("\n".join(rows) + "\n")
    run.eval_csv.write_text(
        "step,version,benchmark,items,n,avg_at_n,stderr,k,pass_at_k\n"
        f"0,0,b,3,1,0.2,0.05,1,0.2\n0,0,overall,3,1,0.2,0.05,1,0.2\n"
        f"{steps},{steps},b,3,1,0.5,0.05,1,0.5\n{steps},{steps},overall,3,1,0.5,0.05,1,0.5\n"
    )
    return run


class Page(HTMLParser):
    """What the page holds: the text of every script by id, what it would load, its ids."""

    def __init__(self, text: str):
        super().__init__()
        self.scripts: dict[str, str] = {}
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self._script: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.loads += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "action")]
        if found.get("id"):
            self.ids.append(str(found["id"]))
        if tag == "script":
            self._script = found.get("id") or f"script{len(self.scripts)}"
            self.scripts[self._script] = ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.scripts[self._script] += data


def unpacked(page: Page) -> dict[str, Any]:
    return json.loads(gzip.decompress(base64.b64decode(page.scripts["packed"])))


@pytest.fixture
def page(tmp_path: Path) -> Page:
    return Page(report_html.write(write_run(tmp_path / "run")).read_text())


def test_it_loads_nothing_and_what_the_script_looks_for_is_there(page: Page) -> None:
    assert {load for load in page.loads if not load.startswith("#")} == {"data:,"}
    text = "".join(page.scripts.values())
    assert "http://www.w3.org/2000/svg" in text
    assert text.count("http") == 1 and "import(" not in text and "fetch(" not in text
    assert len(page.ids) == len(set(page.ids))
    wanted = {part.split('"')[0] for part in page.scripts["script3"].split('byId("')[1:]}
    assert len(wanted) > 10 and wanted <= set(page.ids)


def test_the_document_holds_what_the_run_wrote(page: Page) -> None:
    found = json.loads(page.scripts["data"])
    assert [c["title"] for c in found["curves"]] == [
        "Reward", "KL to the initial model", "Staleness", "Ratio policy / behaviour", "Gradient norm"
    ]  # fmt: skip
    assert found["curves"][0]["lines"][0]["points"][-1] == [STEPS - 1, 0.83333]
    (benchmark,) = found["evals"]  # `overall` of one benchmark says nothing new
    assert benchmark["late"] == ""
    assert benchmark["points"][0] == {"step": 0, "avg": 0.2, "low": 0.1203, "high": 0.31368, "pass": 0.2}
    assert found["phases"]["names"] == ["wait", "forward", "backward", "checkpoint", "other"]
    assert [seconds[0] for seconds in found["phases"]["seconds"]] == [0.5, 0.4, 0.6, 0.1, 0.4]
    assert (found["weights"]["count"], found["weights"]["bytes"], found["weights"]["pause_ms_p50"]) == (6, 6000, 50.0)
    assert found["recipe"]["train"]["steps"] == recipe_io.load("qwen3.5-tiny-m2po-delta").train.steps
    assert found["machine"] == [["machine", "not recorded by this run"]]


def test_the_phases_of_a_step_add_up_to_it() -> None:
    """A checkpoint is written inside the step that it ends."""
    spent = {"wait_s": 0.5, "forward_s": 0.4, "backward_s": 0.6, "publish_s": 0.1, "checkpoint_s": 0.3}
    found = report_data.step_phases([{"step": 3, "process": "trainer", "step_s": 2.0, **spent}])
    assert found["names"] == ["wait", "forward", "backward", "publish", "checkpoint", "other"]
    assert [seconds for (seconds,) in found["seconds"]] == [0.5, 0.4, 0.6, 0.1, 0.3, 0.1]


def test_one_evaluation_has_no_trend(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    run.eval_csv.write_text("".join(run.eval_csv.read_text().splitlines(keepends=True)[:3]))
    tile = report_data.tiles(run, [], {})[0]
    assert tile == {"label": "b avg@1", "value": "0.200", "note": "at step 0"}


def test_samples_are_whole_and_a_problem_cannot_break_out_of_its_script(page: Page) -> None:
    assert len(page.scripts) == 4  # data, packed, charts, report: none that a sample made
    found = unpacked(page)
    assert found["total"] == len(found["step"]) == 4 * STEPS + 6
    assert found["texts"][found["problem"][0]] == "1+1</script><script>alert(1)"
    assert found["logprobs"][0] == [25, 150]
    assert [found["texts"][place] for place in found["verdict"][:2]] == ["wrong", "right"]
    assert "".join(found["vocabulary"][t] for t in found["tokens"][0]) == "2<eos>"  # by the recipe's tokenizer


def test_the_name_of_a_run_is_escaped(tmp_path: Path) -> None:
    document = report_data.document(write_run(tmp_path / "run"))
    document["run"]["run"] = "<b>&@@DATA@@"
    text = report_html.page(document, "")
    assert "<h1>&lt;b&gt;&amp;@@DATA@@</h1>" in text and "\\u003cb>" in text


def test_machine_goes_with_the_run_without_its_environment(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    report_data.write_machine(run)
    rows = dict(report_data.machine_rows(run))
    assert {"python", "torch", "transformers"} <= rows.keys() and "PATH" not in str(rows)


def test_too_many_and_too_long_samples_are_spread_and_clipped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=10, per_step=50)
    rows, total = report_samples.chosen(run, 100)
    assert (len(rows), total) == (100, 506)
    assert {row["step"] for row in rows if "benchmark" not in row} == set(range(10))
    long = sample(0, 0, tokens=list(range(5000)), logprobs=[-0.001 * i for i in range(5000)])
    found = report_samples.columns([long], 1, str)
    assert (found["length"], found["cut"], len(found["tokens"][0])) == ([5000], [4200], 800)
    assert found["vocabulary"][found["tokens"][0][-1]] == "4999" and found["logprobs"][0][-1] == 500
    told = report_samples.columns([sample(0, 0, tokens=[5, 6], logprobs=[None, -1.0])], 1, str)
    assert told["logprobs"] == [[None, 100]], "a token that the policy did not draw has none"
    logs = {"parts": {"exact": 1.0, "short": 0.25}, "notes": {"read": "7", "why": "<b>"}}
    found = report_samples.columns([sample(0, 0, **logs), sample(0, 1)], 2, str)
    assert [found["texts"][place] for place in found["logged"]] == ["exact 1, short 0.25\nread: 7\nwhy: <b>", None]
    small = report_samples.packed(run, str, budget=2000)
    assert len(base64.b64decode(small)) <= 2000 and json.loads(gzip.decompress(base64.b64decode(small)))["total"] == 506


def test_command_writes_the_page(tmp_path: Path, astra: Callable[..., Any]) -> None:
    run = write_run(tmp_path / "run")
    done = astra("runs", "report", str(run.path))
    assert done.code == 0 and f"wrote {run.path}/report.html" in done.err
    assert (run.path / "report.html").stat().st_size > 10_000
