"""Slot decoding against full forwards: staggered arrivals, refilled slots, abort, retract, exclusive calls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from engine_models import VOCAB, reference_logprobs, tiny_model

from astracli.adapters import qwen3_5
from astracli.engines.contract import GenResult
from astracli.engines.embedded import kernels
from astracli.engines.embedded.decoder import Decoder
from astracli.engines.embedded.scheduler import Scheduler
from astracli.engines.embedded.table import Request

KINDS = ["qwen3_5", "qwen3_5 by its own decoding", "llama", "qwen3", "qwen2"]


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    kind, own, _ = request.param.partition(" by its own decoding")
    model = tiny_model(kind)
    model.own_decoding = qwen3_5.decoding(model) if own else None
    assert bool(own) is (model.own_decoding is not None)
    return model


def _scheduler(model: Any, slots: int, **options: Any) -> Scheduler:
    kernels.install(model)
    own = getattr(model, "own_decoding", None)
    return Scheduler(Decoder(model, slots, prefill_tokens=options.pop("prefill_tokens", 8192), decoding=own), **options)


def _requests(count: int, out: dict[str, GenResult], *, seed: int = 0, **fields: Any) -> list[Request]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        settings = {
            "max_new_tokens": int(rng.integers(1, 24)),
            "temperature": float(rng.choice([0.7, 1.0, 1.4])),
            "top_p": float(rng.choice([1.0, 0.9])),
            "stop_token_ids": (1, 2),
            "seed": int(rng.integers(2**62)),
        } | fields
        prompt = rng.integers(3, VOCAB, int(rng.integers(1, 20))).astype(np.int64)
        made.append(Request(f"r{i}", prompt, deliver=lambda c: out.__setitem__(c.rid, c), **settings))
    return made


def _finish(scheduler: Scheduler) -> None:
    for _ in range(2000):
        if not scheduler.run_once():
            return
    raise AssertionError("the scheduler does not come to an end")


def _check_exact(model: Any, requests: list[Request], out: dict[str, GenResult]) -> None:
    assert sorted(out) == sorted(request.rid for request in requests)
    for request in requests:
        done = out[request.rid]
        expected = reference_logprobs(model, request.prompt.tolist(), done.tokens.tolist(), request.temperature)
        assert done.logprobs == pytest.approx(expected, abs=1e-5), request.rid
        ended = done.tokens[-1] in request.stop_token_ids
        assert done.finish_reason == ("stop" if ended else "length")
        assert ended or len(done.tokens) == request.max_new_tokens
        assert not set(done.tokens[:-1].tolist()) & set(request.stop_token_ids)


def test_log_probabilities_equal_full_forwards_with_staggered_arrivals_and_refilled_slots(model: Any) -> None:
    out: dict[str, GenResult] = {}
    scheduler = _scheduler(model, 5)
    requests = _requests(24, out)
    pending = list(requests)
    while pending:
        scheduler.submit([pending.pop(0) for _ in range(min(3, len(pending)))])
        scheduler.run_once()
        scheduler.run_once()
        assert scheduler.table.active <= 5
    _finish(scheduler)
    _check_exact(model, requests, out)
    assert {done.finish_reason for done in out.values()} == {"stop", "length"}


def test_a_sequence_does_not_depend_on_its_company(model: Any) -> None:
    together: dict[str, GenResult] = {}
    alone: dict[str, GenResult] = {}
    scheduler = _scheduler(model, 8)
    scheduler.submit(_requests(20, together, seed=5))
    _finish(scheduler)
    for request in _requests(20, alone, seed=5):
        single = _scheduler(model, 1)
        single.submit([request])
        _finish(single)
    for rid, done in alone.items():
        assert together[rid].tokens.tolist() == done.tokens.tolist()


def test_equal_prompts_are_computed_once_and_prefills_are_cut_by_tokens(model: Any) -> None:
    out: dict[str, GenResult] = {}
    scheduler = _scheduler(model, 16, prefill_tokens=40)
    requests = _requests(12, out, seed=2, temperature=1.0)
    for i, request in enumerate(requests):
        request.prompt = requests[i % 5].prompt
    seen: list[tuple[int, ...]] = []
    forward = scheduler.decoder.prefill_rows
    scheduler.decoder.prefill_rows = lambda prompts, copies, first: (  # type: ignore[method-assign]
        seen.append((len(prompts), len(copies), max(map(len, prompts)))) or forward(prompts, copies, first)
    )
    scheduler.submit(requests)
    _finish(scheduler)
    _check_exact(model, requests, out)
    assert sum(prompts for prompts, _, _ in seen) == 5 and sum(copies for _, copies, _ in seen) == 12
    assert len(seen) > 1 and all(prompts == 1 or prompts * longest <= 40 for prompts, _, longest in seen)


def test_greedy_equals_transformers_generate(model: Any) -> None:
    out: dict[str, GenResult] = {}
    requests = _requests(6, out, seed=9, temperature=0.0, top_p=1.0, max_new_tokens=12, stop_token_ids=(1,))
    scheduler = _scheduler(model, 4)
    scheduler.submit(requests)
    _finish(scheduler)
    for request in requests:
        ids = torch.from_numpy(request.prompt)[None]
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=1, pad_token_id=0
        )[0, ids.shape[1] :]
        assert out[request.rid].tokens.tolist() == expected.tolist()


def test_an_aborted_completion_continues_with_the_same_tokens(model: Any) -> None:
    whole: dict[str, GenResult] = {}
    settings: dict[str, Any] = {"max_new_tokens": 20, "stop_token_ids": (), "temperature": 1.0, "top_p": 0.95}
    scheduler = _scheduler(model, 6)
    scheduler.submit(_requests(6, whole, seed=4, **settings))
    _finish(scheduler)

    parts: dict[str, GenResult] = {}
    first = _requests(6, parts, seed=4, **settings)
    scheduler.submit(first)
    for _ in range(8):
        scheduler.run_once()
    future = scheduler.call(lambda: scheduler.abort(["r1", "r4"]))
    scheduler.run_once()
    assert future.result(timeout=0) == 2 and sorted(parts) == ["r1", "r4"]
    prefix = dict(parts)
    for request in first:
        if request.rid in prefix:
            done = prefix[request.rid]
            assert done.finish_reason == "abort" and 0 < len(done.tokens) < 20
            scheduler.submit(
                [
                    Request(
                        request.rid,
                        np.concatenate([request.prompt, done.tokens]).astype(np.int64),
                        20 - len(done.tokens),
                        top_p=0.95,
                        seed=request.seed,
                        draw_offset=len(done.tokens),
                        deliver=lambda c: parts.__setitem__(c.rid, c),
                    )
                ]
            )
    _finish(scheduler)
    for rid, done in whole.items():
        joined = [*prefix[rid].tokens, *parts[rid].tokens] if rid in prefix else parts[rid].tokens
        assert list(joined) == done.tokens.tolist()


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_pause_keeps_requests_and_their_draws(model: Any, mode: Any) -> None:
    whole: dict[str, GenResult] = {}
    scheduler = _scheduler(model, 4)
    scheduler.submit(_requests(7, whole, seed=6, max_new_tokens=15, stop_token_ids=()))
    _finish(scheduler)

    paused: dict[str, GenResult] = {}
    requests = _requests(7, paused, seed=6, max_new_tokens=15, stop_token_ids=())
    scheduler.submit(requests)
    for _ in range(6):
        scheduler.run_once()
    scheduler.call(lambda: scheduler.pause(mode))
    assert not scheduler.run_once() and not paused
    assert scheduler.table.active == (0 if mode == "retract" else 4)
    assert scheduler.flush() is (mode == "retract")
    scheduler.call(lambda: setattr(scheduler, "version", 3))
    scheduler.call(scheduler.resume)
    _finish(scheduler)
    for rid, done in whole.items():
        assert paused[rid].tokens.tolist() == done.tokens.tolist()
        assert paused[rid].version == 3
        assert paused[rid].version_start == (0 if rid in ("r0", "r1", "r2", "r3") else 3)
    _check_exact(model, requests, paused)


def test_pause_abort_returns_running_and_waiting_requests(model: Any) -> None:
    out: dict[str, GenResult] = {}
    scheduler = _scheduler(model, 2)
    scheduler.submit(_requests(5, out, max_new_tokens=30, stop_token_ids=()))
    for _ in range(4):
        scheduler.run_once()
    scheduler.call(lambda: scheduler.pause("abort"))
    assert not scheduler.run_once()
    assert [len(out[f"r{i}"].tokens) for i in range(5)] == [5, 5, 0, 0, 0]
    assert {done.finish_reason for done in out.values()} == {"abort"}
    late: dict[str, GenResult] = {}
    scheduler.submit(_requests(1, late))
    assert not scheduler.run_once() and not late
    scheduler.call(scheduler.resume)
    _finish(scheduler)
    assert "r0" in late


def test_exclusive_calls_give_the_same_bits_whatever_else_runs() -> None:
    model = tiny_model("qwen3_5")

    def run(arrivals: list[int]) -> dict[str, GenResult]:
        out: dict[str, GenResult] = {}
        scheduler = _scheduler(model, 4, exclusive_calls=True)
        calls = {i: _requests(7, out, seed=i, max_new_tokens=9, call=i) for i in range(3)}
        for call, requests in calls.items():
            for request in requests:
                request.rid = f"{call}-{request.rid}"
        for call in arrivals:
            scheduler.submit(calls[call])
            scheduler.run_once()
            scheduler.run_once()
        _finish(scheduler)
        return out

    one, other = run([0, 1, 2]), run([2, 0, 1])
    assert len(one) == 21
    for rid, done in one.items():
        assert done.tokens.tolist() == other[rid].tokens.tolist()
        assert done.logprobs.tobytes() == other[rid].logprobs.tobytes()


def test_a_model_that_produces_nan_stops_the_engine() -> None:
    from astracli.errors import RunFailed

    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    scheduler = _scheduler(model, 2)
    scheduler.submit(_requests(1, {}))
    with pytest.raises(RunFailed, match="NaN at weight version 0"):
        scheduler.run_once()


def test_gated_delta_step_equals_the_reference_rule() -> None:
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    reference = modeling.torch_recurrent_gated_delta_rule
    reference = getattr(reference, "reference", reference)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 1, 4, size, generator=generator) for size in (16, 16, 24))
    g, beta = -torch.rand(3, 1, 4, generator=generator), torch.rand(3, 1, 4, generator=generator)
    state = torch.randn(3, 4, 16, 24, generator=generator)
    expected, expected_state = reference(
        q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    out, same = kernels.step_(q, k, v, g, beta, state, norm=True)
    assert same is state
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(state, expected_state, atol=1e-6, rtol=1e-5)
    assert kernels.install(tiny_model("qwen3_5")) and not kernels.install(tiny_model("llama"))


def test_the_convolution_s_step_equals_the_reference_and_is_left_out_when_bytes_must_stay() -> None:
    """Window [1, 2, 3, 4] and token 5 with taps [0.1, 0.2, 0.3, 0.4]: 0.2 + 0.6 + 1.2 + 2 = 4."""
    state, taps = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    found = kernels.convolve_(torch.tensor([[[5.0]]]), state, taps)
    assert state.tolist() == [[[2.0, 3.0, 4.0, 5.0]]]
    torch.testing.assert_close(found, torch.nn.functional.silu(torch.tensor([[[4.0]]])))
    generator = torch.Generator().manual_seed(0)
    quick, plain = tiny_model("qwen3_5"), tiny_model("qwen3_5")
    kernels.install(quick)
    kernels.install(plain, convolution=False)
    updates = [getattr(module, "causal_conv1d_update", None) for model in (quick, plain) for module in model.modules()]
    own, reference = {type(update).__name__: update for update in updates if update is not None}.values()
    x = torch.randn(5, 7, 12, generator=generator)[:, :1].transpose(1, 2)
    states = [torch.randn(5, 12, 4, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    with torch.inference_mode():
        got, wanted = (
            f(x, s, torch.ones(12, 4) / 3, None, "silu") for f, s in zip((own, reference), states, strict=True)
        )
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)
    assert torch.equal(*states) and own.reference is reference
