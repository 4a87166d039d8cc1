"""The examples of docs/rewards.md: its modules, its judge over HTTP, its recipe."""

import http.server
import json
import re
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_reward_pool import items

from astracli.config.recipe_data import DataTable
from astracli.rewards.grade_process import RewardSetting
from astracli.rewards.reward import GradePool, Rewards

PAGE = Path(__file__).resolve().parent.parent / "docs" / "rewards.md"


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python blocks of docs/rewards.md as modules of the working directory."""
    blocks = re.findall(r"<!-- (\w+\.py) -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == PAGE.read_text(encoding="utf-8").count("```python") == 7
    for name, text in blocks:
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)


class Judge(http.server.BaseHTTPRequestHandler):
    """Answers like a chat server: 7 for an answer that holds a digit, else 0; and fails on `down`."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
        answer = asked.split("Answer: ")[1].splitlines()[0]
        body = json.dumps({"choices": [{"message": {"content": "7" if re.search(r"\d", answer) else "0"}}]}).encode()
        self.send_response(500 if answer == "down" else 200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("JUDGE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield
        server.shutdown()


def rewards_of(spec: str, texts: list[str], **row: Any) -> list[tuple[float, str]]:
    with GradePool(rewards=Rewards([RewardSetting(spec, timeout_s=30.0)])) as pool:
        return [(g.reward, g.verdict) for g in pool.grade(items(*texts, **row))]


def test_the_examples_of_the_page(page: None) -> None:
    assert rewards_of("columns:short", ["one two", "one two three"], words=2) == [(1.0, "right"), (0.0, "wrong")]
    assert rewards_of("columns:short", ["one two three"], words=2, style="long") == [(1.0, "right")]
    assert rewards_of("figures:graded", ["it is 2", "2 it is"]) == [(1.0, "right"), (0.0, "wrong")]
    assert rewards_of("lexicon:Known", ["one two", "one four"]) == [(1.0, "right"), (0.5, "wrong")]
    assert rewards_of("from_trl:correct", ["2", "3"], solution="2") == [(1.0, "right"), (0.0, "wrong")]
    turns = [{"role": "user", "content": "1+1"}]
    assert rewards_of("from_trl:correct", ["2", "3"], solution="2", prompt=turns) == [(1.0, "right"), (0.0, "wrong")]
    assert rewards_of("from_verl:compute_score", ["2 ", "3"]) == [(1.0, "right"), (0.0, "wrong")]


def test_the_judge_of_the_page_asks_a_server(page: None, judge: None) -> None:
    with GradePool(rewards=Rewards([RewardSetting("judge:helpful", timeout_s=30.0)])) as pool:
        found = pool.grade(items("it is 2", "no idea", "down"))
    assert [(g.reward, g.verdict) for g in found] == [(0.7, "wrong"), (0.0, "wrong"), (0.0, "error")]
    assert "500 Internal Server Error" in found[2].detail


def test_the_rewards_of_a_recipe(page: None) -> None:
    toml = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]
    data = DataTable(source="arithmetic", **tomllib.loads(toml)["data"], reward_timeout_s=7.0, reward_memory_gib=0.5)
    assert data.grader == "correct + 0.2 polite + 0 words"
    found = Rewards.of(data)
    assert [(each.spec, each.name, each.weight) for each in found.each] == [
        ("math", "correct", 1.0), ("style:polite", "polite", 0.2), ("style:words", "words", 0.0),
    ]  # fmt: skip
    assert {(each.timeout_s, each.memory_bytes) for each in found.each} == {(7.0, 1 << 29)}
    with GradePool(rewards=Rewards.of(data.model_copy(update={"reward_memory_gib": None}))) as pool:
        polite, rude = pool.grade(items(r"please, \boxed{2}", r"\boxed{2}"))
    assert (polite.reward, polite.verdict, rude.reward, rude.verdict) == (1.2, "right", 1.0, "wrong")
    assert polite.parts == {"correct": 1.0, "polite": 1.0, "words": 2.0}
    (alone,) = Rewards.of(DataTable(source="arithmetic", reward="number")).each
    assert (alone.spec, alone.name) == ("number", "") and DataTable(source="arithmetic").by("code").grader == "code"
