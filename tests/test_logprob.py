"""Chunked log-probabilities equal the plain ones, with their gradients, and never hold [tokens, vocabulary]."""

from __future__ import annotations

import pytest
import torch
from training_tools import save_model

from astracli.adapters.qwen3_5 import ADAPTER
from astracli.training.logprob import PolicyModel, chunk_tokens, chunked_logprob


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equal_to_log_softmax_with_gradients(chunk: int, with_bias: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(20, 8, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    bias = torch.randn(50, requires_grad=True) if with_bias else None
    target, pull = torch.randint(0, 50, (20,)), torch.randn(20)

    logprob, entropy = chunked_logprob(hidden, weight, target, bias_V=bias, chunk=chunk)
    inputs = [t for t in (hidden, weight, bias) if t is not None]
    gradients = torch.autograd.grad((logprob * pull).sum(), inputs)

    logits = torch.nn.functional.linear(hidden, weight, bias)
    plain = logits.log_softmax(-1)
    expected = plain.gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(logprob, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, -(plain.exp() * plain).sum(-1), atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(gradients, torch.autograd.grad((expected * pull).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    assert not entropy.requires_grad


@pytest.mark.parametrize("with_bias", [False, True])
def test_at_a_temperature_it_is_the_policy_that_draws(with_bias: bool) -> None:
    """softmax(logits / 0.7) by autograd of its definition; at temperature 1 not a byte is another."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    bias = torch.randn(50, requires_grad=True) if with_bias else None
    target, pull = torch.randint(0, 50, (20,)), torch.randn(20)
    inputs = [t for t in (hidden, weight, bias) if t is not None]

    def found(**settings: float) -> list[torch.Tensor]:
        logprob, entropy = chunked_logprob(hidden, weight, target, bias_V=bias, chunk=7, **settings)  # type: ignore[arg-type]
        return [logprob, entropy, *torch.autograd.grad((logprob * pull).sum(), inputs)]

    plain = (torch.nn.functional.linear(hidden, weight, bias).double() / 0.7).log_softmax(-1)
    expected = plain.gather(1, target[:, None])[:, 0]
    entropy = -(plain.exp() * plain).sum(-1)
    for mine, theirs in zip(
        found(temperature=0.7),
        [expected, entropy, *torch.autograd.grad((expected * pull).sum(), inputs)],
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs.float(), atol=2e-5, rtol=1e-4)
    for mine, same in zip(found(temperature=1.0), found(), strict=True):
        assert torch.equal(mine, same)


def test_a_temperature_by_hand() -> None:
    """Logits 0 and log 2 at temperature 0.5 are 0 and log 4: p = 0.2, 0.8; d log p0 / d logits = (0.8, -0.8) / 0.5."""
    weight = torch.tensor([[0.0], [1.0]], requires_grad=True)
    hidden = torch.tensor([[0.6931472]])
    logprob, entropy = chunked_logprob(hidden, weight, torch.tensor([0]), temperature=0.5)
    logprob.sum().backward()
    assert logprob.exp().item() == pytest.approx(0.2)
    assert entropy.item() == pytest.approx(0.5004024)
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == pytest.approx([1.6 * 0.6931472, -1.6 * 0.6931472])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_one_chunk_not_the_batch(dtype: torch.dtype) -> None:
    tokens, vocabulary, chunk = 512, 4096, 16
    hidden = torch.randn(tokens, 4).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, 4).to(dtype).requires_grad_()
    biggest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal biggest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                biggest = max(biggest, out.numel())
            return out

    with Watch():
        logprob, _ = chunked_logprob(hidden, weight, torch.zeros(tokens, dtype=torch.int64), chunk=chunk)
        logprob.sum().backward()
    assert biggest == chunk * vocabulary


def test_a_chunk_of_the_real_vocabulary_is_half_a_gibibyte() -> None:
    """8k tokens over 248,320 words would be 7.6 GiB of fp32 logits; a chunk is a multiple of a product's tile."""
    chunk = chunk_tokens(248_320, "cuda")
    assert chunk == 512 and chunk * 248_320 * 4 <= 2**29
    assert chunk_tokens(64, "cpu") == 2**17


def test_bf16_gradients_of_the_weight_add_up_in_fp32() -> None:
    """Many chunks of one token each: a bf16 sum would stop growing at 256 equal terms."""
    tokens = 1024
    hidden = torch.ones(tokens, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    logprob, _ = chunked_logprob(hidden, weight, torch.zeros(tokens, dtype=torch.int64), chunk=1)
    logprob.sum().backward()
    assert weight.grad is not None and weight.grad.flatten().tolist() == [512.0, -512.0]


def test_a_model_gives_the_same_through_its_head(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = ADAPTER.load_for_training(save_model(tmp_path / "m"), attention="sdpa")
    policy = PolicyModel(model, chunk=3)
    tokens = torch.randint(2, 64, (2, 9))
    predict, target = torch.tensor([2, 3, 4, 9 + 5, 9 + 6]), torch.tensor([3, 4, 5, 6, 7])
    logprob, _ = policy(tokens, None, None, predict, target)
    plain = model(input_ids=tokens).logits.flatten(0, 1)[predict].log_softmax(-1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(logprob, plain, atol=1e-6, rtol=1e-6)
    mine = torch.autograd.grad(logprob.sum(), list(model.parameters()))
    theirs = torch.autograd.grad(plain.sum(), list(model.parameters()))
    for (name, _), a, b in zip(model.named_parameters(), mine, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1.0, float(b.abs().max())), name


def test_no_tokens_still_reach_every_parameter(tmp_path) -> None:  # type: ignore[no-untyped-def]
    policy = PolicyModel(ADAPTER.load_for_training(save_model(tmp_path / "m"), attention="sdpa"))
    empty = torch.zeros(0, dtype=torch.int64)
    logprob, _ = policy(torch.zeros(1, 1, dtype=torch.int64), None, None, empty, empty)
    logprob.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())
