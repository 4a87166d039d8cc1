"""Stop strings: where a completion ends, on the embedded engine by itself and in the client for any other."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from engine_models import VOCAB, tiny_model

from astracli.engines.client import EngineClient
from astracli.engines.contract import GenRequest, GenResult
from astracli.engines.embedded import kernels
from astracli.engines.embedded.decoder import Decoder
from astracli.engines.embedded.scheduler import Scheduler
from astracli.engines.embedded.table import Request
from astracli.engines.sglang.client import SglangClient
from astracli.engines.stops import StopStrings
from astracli.errors import RunFailed

PIECES = ["a", "b", "ab", "ba", "", "c", "\n"]


class Pieces:
    """Token i says PIECES[i]."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(PIECES[i] for i in ids)


def naive(tokens: list[int], texts: tuple[str, ...]) -> int | None:
    for end in range(1, len(tokens) + 1):
        if any(text in Pieces().decode(tokens[:end]) for text in texts):
            return end
    return None


def test_a_completion_ends_with_the_token_that_completes_a_text() -> None:
    chance = random.Random(4)
    for _ in range(2000):
        tokens = chance.choices(range(len(PIECES)), k=chance.randrange(25))
        texts = tuple(chance.sample(["abba", "c\n", "bab", "\n\n", "aaa"], 2))
        stop = StopStrings(texts, Pieces())
        assert stop.cut(tokens) == (end := naive(tokens, texts))
        one_by_one = next((n for n in range(1, len(tokens) + 1) if stop.ends(tokens[:n])), None)
        assert one_by_one == end, "as an engine looks, token by token"


@pytest.mark.parametrize("known", [0, 2, 4])
def test_a_result_is_cut_with_what_was_drawn_before(known: int) -> None:
    """A continued completion: the text may have begun in an earlier request."""
    drawn = [0, 5, 1, 3, 6, 0, 0]  # a c b|ba ...: `bb` is complete with the fourth token
    result = GenResult(
        np.array(drawn[known:], np.int32), np.arange(len(drawn) - known, dtype=np.float32), "length", 3, 3, "r"
    )
    ended = StopStrings(("bb",), Pieces()).ended(drawn[:known], result)
    assert (ended.tokens.tolist(), ended.finish_reason, ended.version) == (drawn[known:4], "stop", 3)
    assert ended.logprobs.tolist() == list(range(max(0, 4 - known)))
    assert StopStrings(("xx",), Pieces()).ended(drawn[:known], result) is result


def answer(tokens: list[int], **finish: str) -> dict[str, Any]:
    meta = {"finish_reason": {"type": "length"} | finish, "weight_version": "0", "id": "r"}
    return {"output_ids": tokens, "index": 0, "meta_info": meta | {"output_token_logprobs": [[-0.5] for _ in tokens]}}


class Answers(BaseHTTPRequestHandler):
    """An engine with these answers to whatever it is asked."""

    answers: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        said = json.dumps(self.answers).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *_: object) -> None:
        pass


def asked(client: Callable[[str], EngineClient], requests: list[GenRequest], *answers: Any) -> list[GenResult]:
    """What a client makes of an engine's answers."""

    async def ask(url: str) -> list[GenResult]:
        async with client(url) as engine:
            return await engine.generate(requests)

    kind = type("Handler", (Answers,), {"answers": list(answers)})
    with HTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            return asyncio.run(ask(f"http://127.0.0.1:{server.server_port}"))
        finally:
            server.shutdown()


def test_the_client_cuts_for_engines_that_do_not() -> None:
    requests = [
        GenRequest([9, 0, 0], 8, stop=StopStrings(("aba",), Pieces()), draw_offset=2),
        GenRequest([9], 8),
    ]
    first, second = asked(lambda url: EngineClient(url, "t"), requests, *[answer([3, 3, 6, 0])] * 2)
    assert (first.tokens.tolist(), first.finish_reason) == ([3], "stop"), "`aa` was there, `ba` completes `aba`"
    assert (second.tokens.tolist(), second.finish_reason) == ([3, 3, 6, 0], "length")


def test_what_sglang_answers(tmp_path: Path) -> None:
    """As its scheduler does: all tokens that were drawn, the limit looked at before stop tokens and stop strings."""

    def sglang(url: str) -> SglangClient:
        return SglangClient(url, "t", stage_dir=tmp_path)

    stop = StopStrings(("ba",), Pieces())
    requests = [GenRequest([9], 3, stop_token_ids=(4, 6), stop=stop) for _ in range(5)]
    found = asked(
        sglang,
        requests,
        answer([2, 0], type="stop", matched="ba"),
        answer([1, 0, 5]),  # it looked at too few tokens, and went on to the limit
        answer([0, 5, 6]),  # a stop token, and the last one allowed
        answer([0, 5, 5]),
        answer([0, 5], type="abort"),
    )
    assert [(each.tokens.tolist(), each.finish_reason) for each in found] == [
        ([2, 0], "stop"),
        ([1, 0], "stop"),
        ([0, 5, 6], "stop"),
        ([0, 5, 5], "length"),
        ([0, 5], "abort"),
    ]
    assert [len(each.logprobs) for each in found] == [2, 2, 3, 3, 2]
    broken = answer([0, 4], type="stop", matched="NaN happened") | {"index": 0}
    with pytest.raises(RunFailed, match="engine: the model produces NaN at weight version 0"):
        asked(sglang, requests[:1], broken)


def test_what_engines_are_asked(tmp_path: Path) -> None:
    asked = [GenRequest([1], 8, stop=StopStrings(("\n\n", "Q:"), Pieces())), GenRequest([1], 8)]
    first, second = EngineClient("http://127.0.0.1:9", "t").body(asked)["sampling_params"]
    assert first["stop"] == ["\n\n", "Q:"] and "stop" not in second
    first, second = SglangClient("http://127.0.0.1:9", "t", stage_dir=tmp_path).body(asked)["sampling_params"]
    assert first["no_stop_trim"] is True and "no_stop_trim" not in second, "tokens as they were drawn"


class Digits:
    """Every token says one of ten letters."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join("abcdefghij"[i % 10] for i in ids)


@pytest.mark.parametrize("retracted", [False, True])
def test_the_embedded_engine_stops_by_itself(retracted: bool) -> None:
    """The same draws up to the cut, and not a token more; also when a sequence is prefilled again in between."""
    model = tiny_model("llama")
    kernels.install(model)
    stop = StopStrings(("ab", "f", "dd"), Digits())

    def drawn(stop: StopStrings | None) -> dict[str, GenResult]:
        out: dict[str, GenResult] = {}
        scheduler = Scheduler(Decoder(model, 6, prefill_tokens=8192))
        prompt = np.arange(3, 9, dtype=np.int64)
        scheduler.submit(
            [
                Request(
                    f"r{i}", prompt, 24, seed=i, stop=stop, draw_offset=i % 3, deliver=lambda c: out.update({c.rid: c})
                )
                for i in range(12)
            ]
        )
        for step in range(400):
            if retracted and step == 2:
                scheduler.pause("retract")
                scheduler.resume()
            if not scheduler.run_once():
                return out
        raise AssertionError("no end")

    free, ended = drawn(None), drawn(stop)
    cuts = 0
    for i in range(12):
        before = list(range(9 - i % 3, 9))
        wanted = stop.ended(before, free[f"r{i}"])
        got = ended[f"r{i}"]
        assert (got.tokens.tolist(), got.finish_reason) == (wanted.tokens.tolist(), wanted.finish_reason)
        assert got.logprobs == pytest.approx(wanted.logprobs, abs=1e-5)
        cuts += wanted.finish_reason == "stop"
    assert cuts >= 8 and VOCAB >= 20
