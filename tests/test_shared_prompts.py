"""A group's prompt that stands once: the division, and the same log-probabilities and gradients as separate rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_packing import Largest, tiny
from training_tools import TWO_LAYERS, make_trainer, recipe, sample_groups, save_model, spawn
from transformers import AutoConfig, AutoModelForCausalLM

from astracli.adapters import qwen3_5_shared
from astracli.adapters.qwen3_5 import ADAPTER
from astracli.backends import choice as backend
from astracli.errors import RunFailed, UserError
from astracli.kernels import shared_attention, varlen
from astracli.kernels.cpu import delta_state
from astracli.kernels.shared_rows import SharedRow
from astracli.models import registry
from astracli.models.adapter import ModelAdapter
from astracli.rl.batch import build_batch, pad_rows
from astracli.rl.rows import Row, rows_of
from astracli.rl.types import Group, Sample, Segment
from astracli.training import fsdp, packing, parity, shared_prompts
from astracli.training.logprob import PolicyModel

CPU = torch.device("cpu")
SHARES: dict[str, Any] = {"share_prompts": True}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def group(place: int, prompt: int, *samples: Sequence[int], seed: int = 0) -> Group:
    """A group with random tokens. A sample is the lengths of its segments: drawn, masked, drawn, ..."""
    draw = np.random.default_rng([seed, place])

    def tokens(count: int) -> np.ndarray:
        return draw.integers(2, 64, count).astype(np.int32)

    asked, found = tokens(prompt), []
    for index, lengths in enumerate(samples):
        segments = [
            Segment(None if i % 2 else 0, tokens(n), np.full(0 if i % 2 else n, -4.0, np.float32))
            for i, n in enumerate(lengths)
        ]
        found.append(Sample(index, segments, "stop", float(index % 2)))
    return Group(place, f"p{place}", asked, found)


def rows_in(*groups: Group) -> list[Row]:
    return rows_of(groups, recipe().algorithm, recipe().rollout)


def mixed() -> list[Row]:
    """Samples of one token and of many, tool results in between, prompts of one, two and 70 tokens, a sample that was
    never drawn, and one without a sibling."""
    return rows_in(
        group(0, 9, [5], [1], [40]),
        group(1, 70, [3, 4, 2], [1], [2, 9, 1]),
        group(2, 1, [4], [6]),
        group(3, 2, [3], [7]),
        group(4, 12, [5], []),
    )


# ---- the division


def test_a_prompt_stands_once_and_its_samples_go_on() -> None:
    one, other = group(0, 3, [2], [1], seed=1), group(1, 1, [2], seed=1)
    micro = shared_prompts.pack(rows_in(other, one))
    a, b, c = (int(t) for t in one.prompt_tokens)
    (d, e), (f,) = (sample.tokens.tolist() for sample in one.samples)
    g, (h, i) = int(other.prompt_tokens[0]), other.samples[0].tokens.tolist()
    assert micro.tokens_BL.tolist() == [[a, b, c, d, e, c, f, g, h, i]]
    assert micro.bounds_S1 is not None and micro.parents_S is not None
    assert micro.bounds_S1.tolist() == [0, 2, 5, 7, 10]
    assert micro.parents_S.tolist() == [-1, 0, 0, -1]
    assert packing.positions(micro.bounds_S1, micro.parents_S).tolist() == [0, 1, 2, 3, 4, 2, 3, 0, 1, 2]
    assert [row.group for row in micro.rows] == [one, one, other]
    assert micro.predict_N.tolist() == [2, 3, 5, 7, 8] and micro.target_N.tolist() == [d, e, f, h, i]
    longer = packing.rounded(micro, 8)
    assert longer.parents_S is not None and longer.parents_S.tolist() == [-1, 0, 0, -1, -1]
    assert longer.target_N.tolist() == micro.target_N.tolist()
    assert packing.filled([micro])["shared_tokens"] == 5 + 4 + 3 - 10
    assert "shared_tokens" not in packing.filled([packing.pack_rows(rows_in(one))])


def test_the_budget_counts_what_is_computed() -> None:
    # 9 + 4 x 3 tokens: 8 for the prompt, 4 x (1 + 3) behind it
    rows = rows_in(*(group(place, 9, [3], [3], [3], [3]) for place in range(3)))
    assert shared_prompts.cost(rows) == 3 * (8 + 4 * 4) and sum(map(len, rows)) == 3 * 4 * 12
    assert shared_prompts.saved(rows) == 0.5
    micros = shared_prompts.micro_batches(rows, 48, 0)
    assert [m.tokens_BL.size for m in micros] == [48, 24]
    assert all(len({row.group.lease_id for row in m.rows}) * 4 == len(m.rows) for m in micros)
    divided = shared_prompts.micro_batches(rows[:4], 16, 0)  # 8 + 2 x 4: two samples a row, each with the prompt
    assert [m.tokens_BL.size for m in divided] == [16, 16]
    assert sorted(r.index for m in divided for r in m.rows) == [0, 1, 2, 3]
    alone = shared_prompts.micro_batches(rows[:4], 5, 0)
    assert [m.tokens_BL.size for m in alone] == [12] * 4 and all(m.parents_S is None for m in alone)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7, 12])
def test_parts_hold_whole_groups_where_that_is_less(parts: int) -> None:
    rows = rows_in(*(group(place, 40, [3], [3], [3], [3]) for place in range(3)))
    divided = shared_prompts.divide(rows, parts)
    assert sorted(row.index for part in divided for row in part) == list(range(12)) and all(divided)
    costs = [shared_prompts.cost(part) for part in divided]
    owners = [len({row.group.lease_id for row in part}) for part in divided]
    whole, half = 39 + 4 * 4, 39 + 2 * 4
    largest = {1: 3 * whole, 2: whole + half, 3: whole, 4: whole, 7: half, 12: 39 + 4}
    assert max(costs) == largest[parts]
    assert parts == 2 or owners == ([3] if parts == 1 else [1] * parts)
    # one group and two parts: each has half of the samples, and the prompt
    assert [len(part) for part in shared_prompts.divide(rows[:4], 2)] == [2, 2]


def test_every_rank_gets_its_share_of_the_same_division() -> None:
    groups = sample_groups(None, 5, seed=3)
    chosen = recipe(train={"tokens_per_microbatch": 48})
    counts, seen = [], []
    for rank in range(3):
        batch = build_batch(
            groups, chosen, step=0, rank=rank, world_size=3, instead=lambda rows: shared_prompts.division(rows, 0.0)
        )
        counts.append([len(micros) for micros in batch.minibatches])
        seen += [row.index for micros in batch.minibatches for micro in micros for row in micro.rows]
        assert sum(batch.minibatch_tokens) == sum(row.loss_tokens for row in batch.rows)
    assert counts[0] == counts[1] == counts[2] and sorted(seen) == list(range(20))


def test_a_batch_shares_where_that_pays() -> None:
    rows = rows_in(*(group(place, 9, [3], [3], [3], [3]) for place in range(3)))  # half of the tokens
    assert shared_prompts.division(rows, 0.49) is not None and shared_prompts.division(rows, 0.5) is None
    assert shared_prompts.division(rows_in(group(0, 1, [3], [3])), 0.0) is None


def test_a_row_in_another_order_is_refused() -> None:
    for parents in ([-1, 1, -1], [0, -1, -1], [-1, -1, 0], [-1, -1, 1, 0]):
        with pytest.raises(ValueError, match="holds the prompts, then their samples"):
            SharedRow.of(np.arange(len(parents) + 1), np.array(parents), CPU)


# ---- layers


def policy_of(name: str, **changed: Any) -> tuple[ModelAdapter, PolicyModel]:
    adapter, model = tiny(name, **(TWO_LAYERS if name == "qwen3_5" else {}) | changed)
    varlen.install(model, adapter)
    return adapter, PolicyModel(model)


def both_ways(adapter: ModelAdapter, policy: PolicyModel, rows: list[Row]) -> tuple[float, float]:
    """(largest difference of a log-probability, relative difference of a gradient) between shared prompts and each row
    by itself."""
    ordered = shared_prompts.in_order(rows)
    pull = torch.randn(sum(row.loss_tokens for row in rows), generator=torch.Generator().manual_seed(3))
    parameters = list(policy.parameters())

    def run(micros: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        logprob_N = torch.cat([parity.logprobs(policy, adapter, micro, CPU)[0] for micro in micros])
        grads = torch.autograd.grad((logprob_N * pull).sum(), parameters, allow_unused=True)
        return logprob_N, torch.cat([g.flatten() for g in grads if g is not None])

    alone, wanted = run([pad_rows([row], 0) for row in ordered])
    micro = shared_prompts.pack(rows)
    assert micro.parents_S is not None and [row.index for row in micro.rows] == [row.index for row in ordered]
    shared, found = run([micro])
    return float((shared - alone).detach().abs().max()), float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", ["qwen2", "llama", "qwen3_5", "generic"])
def test_samples_of_one_prompt_are_rows_of_their_own(name: str) -> None:
    logprob, gradient = both_ways(*policy_of(name, initializer_range=0.05), mixed())
    assert logprob <= 2e-6 and gradient <= 1e-6


def test_kernels_of_transformers_share_too() -> None:
    rows = rows_in(group(0, 9, [5], [1], [20]), group(1, 1, [3], [4]))
    logprob, gradient = both_ways(*policy_of("qwen3_5", cpu=False, initializer_range=0.05), rows)
    assert logprob <= 2e-6 and gradient <= 1e-6


def test_a_sliding_window_reaches_into_the_prompt() -> None:
    torch.manual_seed(0)
    document = registry.get("llama").tiny_config()  # type: ignore[misc]
    own = {"model_type": "mistral", "sliding_window": 8, "initializer_range": 0.15, "architectures": None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**document | own))
    varlen.install(model, registry.get("generic"))
    rows = rows_in(group(0, 9, [5], [1], [30]), group(1, 30, [3], [12]), group(2, 3, [2], [4]))
    logprob, gradient = both_ways(registry.get("generic"), PolicyModel(model), rows)
    assert logprob <= 5e-6 and gradient <= 2e-6


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_group_over_several_rows_and_recomputed_blocks(checkpointing: Any) -> None:
    adapter, policy = policy_of("qwen3_5", initializer_range=0.05)
    fsdp.recompute(policy, adapter.block_classes(policy.model), checkpointing)
    rows = rows_in(group(0, 30, [5], [9], [2], [7], [1]))
    divided = shared_prompts.micro_batches(rows, 52, 0)
    assert len(divided) == 2 and all(m.parents_S is not None for m in divided)
    parameters = [p for p in policy.parameters() if p.requires_grad]

    def gradient(micros: list[Any]) -> torch.Tensor:
        policy.zero_grad()
        for micro in micros:
            parity.logprobs(policy, adapter, micro, CPU)[0].sum().backward()
        return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])

    wanted = gradient([pad_rows([row], 0) for row in rows])
    assert (gradient(divided) - wanted).norm() <= 1e-6 * wanted.norm()


def test_nothing_of_the_size_of_all_samples_and_their_prompts_is_made() -> None:
    """Scores of the samples over their prompt are never held, nor keys and values for every sample."""
    adapter, policy = policy_of("llama", vocab_size=200)
    rows = rows_in(group(0, 400, *([30] for _ in range(8))))
    micro = shared_prompts.pack(rows)
    with Largest() as watch:
        parity.logprobs(policy, adapter, micro, CPU)[0].sum().backward()
    assert watch.elements <= 2 * micro.tokens_BL.size * 64 < 8 * 430 * 32


def test_the_delta_rule_goes_from_a_state_to_a_state() -> None:
    """Three chunks and a part of one, in fp64: token by token, as it is defined."""

    def by_token(q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
        outs = []
        for t in range(q.shape[1]):
            state = state * g[:, t].exp()[..., None, None]
            held = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
            state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * (v[:, t] - held))
            outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * q.shape[-1] ** -0.5, state))
        return torch.stack(outs, 1), state

    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    exact = [normal(2, 150, 3, 8), normal(2, 150, 3, 8), normal(2, 150, 3, 6)]
    exact += [-torch.nn.functional.softplus(normal(2, 150, 3) - 2), normal(2, 150, 3).sigmoid(), normal(2, 3, 8, 6)]
    exact = [x.requires_grad_() for x in exact]
    pulls = normal(2, 150, 3, 6), normal(2, 3, 8, 6)

    def both(found: tuple[torch.Tensor, torch.Tensor], given: list[torch.Tensor]) -> list[torch.Tensor]:
        total = sum((x * pull.to(x.dtype)).sum() for x, pull in zip(found, pulls, strict=True))
        return [*found, *torch.autograd.grad(total, given)]  # type: ignore[arg-type]

    wanted = both(by_token(*exact), exact)
    single = [x.detach().float().requires_grad_() for x in exact]
    for mine, theirs in zip(both(delta_state.rule(*single), single), wanted, strict=True):
        assert (mine - theirs).norm() <= 1e-6 * theirs.norm()
    padded = [torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, 20)) for x in single[:5]]
    out, state = delta_state.rule(*padded, single[5])  # g = beta = 0 changes nothing
    assert (out[:, :150] - wanted[0]).norm() <= 1e-6 * wanted[0].norm()
    assert (state - wanted[1]).norm() <= 1e-6 * wanted[1].norm()


@pytest.mark.parametrize("kernel", ["cpu", "plain"])
def test_attention_over_a_prompt_has_its_derivatives(kernel: str) -> None:
    row = SharedRow.of(np.array([0, 3, 5, 7, 8, 12, 15]), np.array([-1, -1, 0, 0, 1, -1]), CPU)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(15, heads, 4, generator=draw, dtype=torch.float64) for heads in (4, 2, 2))
    own = shared_attention.CpuKernel(row, 0.7) if kernel == "cpu" else shared_attention.PlainKernel(row, 0.7, None)

    def attend(*given: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = shared_attention.Attention.apply(*given, own, varlen.one_launch())
        return out

    seen = torch.zeros(15, 15, dtype=torch.bool)
    spans = {(0, 3): [(0, 3)], (3, 5): [(3, 5)], (5, 7): [(0, 3), (5, 7)], (7, 8): [(0, 3), (7, 8)]}
    spans |= {(8, 12): [(3, 5), (8, 12)], (12, 15): [(12, 15)]}
    for (a, b), keys in spans.items():
        for c, d in keys:
            seen[a:b, c:d] = True
    heads = (x.transpose(0, 1) for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
    mask = seen & torch.ones(15, 15).tril().bool()
    wanted = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask, scale=0.7).transpose(0, 1)
    assert (attend(q, k, v) - wanted).abs().max() <= 1e-12
    assert torch.autograd.gradcheck(attend, [x.requires_grad_() for x in (q, k, v)])


# ---- the trainer


@pytest.mark.parametrize("table", [{}, {"activation_checkpointing": "selective", "packing": "packed"}])
def test_training_with_shared_prompts_is_training(model_dir: Path, table: dict[str, Any]) -> None:
    """With a reference, over updates of one minibatch each: minibatches of whole groups would be others."""
    results = []
    for share in (False, True):
        own = table | {"share_prompts": share, "minibatches": 1, "tokens_per_microbatch": 60}
        trainer = make_trainer(model_dir, recipe(train=own, algorithm={"kl_coef": 0.01}))
        figures = []
        for step in range(2):
            result = trainer.train(sample_groups(None, 4, seed=step, version=step - 1), step, step)
            micros = result.batch.minibatches[0]
            assert any(m.parents_S is not None for m in micros) == share and len(micros) > 1
            figures.append([result.metrics[k] for k in ("loss", "grad_norm", "entropy", "kl", "ratio_mean")])
            if share and not step:
                assert result.metrics["rows_gradient_error"] < 1e-5 and result.metrics["shared_tokens"] > 0
        results.append((figures, trainer.masters.values))
    assert np.allclose(results[1][0], results[0][0], rtol=2e-3, atol=1e-6)
    for name, value in results[0][1].items():
        torch.testing.assert_close(value, results[1][1][name], atol=2e-5, rtol=0.0, msg=name)


def test_adapters_are_trained_with_shared_prompts(model_dir: Path) -> None:
    norms = []
    for share in (False, True):
        chosen = recipe(train={"share_prompts": share, "minibatches": 1}, lora={"rank": 4}, algorithm={"kl_coef": 0.01})
        trainer = make_trainer(model_dir, chosen)
        metrics = trainer.train(sample_groups(trainer, 4, seed=0), 0, 0).metrics
        norms.append([metrics["grad_norm"], metrics["kl"], metrics["entropy"]])
    assert norms[1] == pytest.approx(norms[0], rel=1e-5, abs=1e-7)


def test_a_batch_that_does_not_share_is_computed_as_ever(model_dir: Path) -> None:
    """`auto`: to the bit what `false` trains, also behind a batch that shared."""
    results = []
    for share in (False, "auto"):
        trainer = make_trainer(model_dir, recipe(train={"share_prompts": share}))
        values = {name: value.clone() for name, value in trainer.masters.values.items()}
        long = [replace(one, prompt_tokens=np.tile(one.prompt_tokens, 6)) for one in sample_groups(None, 4, seed=9)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer.masters, "update", lambda step, grads=trainer.masters.grads: grads.clear() or 0.0)
            patch.setattr(trainer, "require_agreement", lambda work: None)
            shared = trainer.train(long, 0, 0).metrics
        assert ("shared_tokens" in shared) == (share == "auto")
        assert all(torch.equal(value, trainer.masters.values[name]) for name, value in values.items())
        groups = [
            replace(one, prompt_tokens=one.prompt_tokens[:2]) for one in sample_groups(None, 4, seed=1, version=-1)
        ]
        metrics = trainer.train(groups, 1, 1).metrics
        assert "shared_tokens" not in metrics
        results.append((metrics["grad_norm"], trainer.masters.values))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(value, results[1][1][name]) for name, value in results[0][1].items())


def test_a_sample_that_does_not_go_on_from_its_prompt_ends_the_run(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recurrent state, then the convolution, then attention forget the prompt; then samples see each other."""
    begin, spread = qwen3_5_shared.begin, SharedRow.spread

    def forgets(states: torch.Tensor, row: SharedRow) -> torch.Tensor:
        return torch.zeros_like(begin(states, row))

    def swaps(row: SharedRow, x: torch.Tensor) -> torch.Tensor:
        return spread(row, x.flip(0))

    def sees_nothing(self: Any, q: torch.Tensor, k: Any, v: Any) -> Any:
        return torch.zeros_like(q), torch.full(q.shape[:2], -1e9)

    def start() -> None:
        trainer = make_trainer(model_dir, recipe(train=SHARES))
        trainer.train(sample_groups(trainer, 4, seed=0), 0, 0)

    start()
    broken = [
        (qwen3_5_shared, "begin", forgets),
        (SharedRow, "spread", swaps),
        (shared_attention.CpuKernel, "prompt", sees_nothing),
    ]
    for where, name, other in broken:
        with monkeypatch.context() as patch:
            patch.setattr(where, name, other)
            with pytest.raises(RunFailed, match="rows that share a prompt differ") as raised:
                start()
            assert "--set train.share_prompts=false" in str(raised.value.hint)


RANKS = """
import json, sys
from pathlib import Path
from training_tools import make_trainer, recipe, uneven_groups
from astracli.training import fsdp

ranks, found = fsdp.join("cpu"), []
for ranks.sharding in ("optimizer", "full"):
    chosen = recipe(train={"share_prompts": True, "tokens_per_microbatch": 40, "minibatches": 1})
    trainer = make_trainer(Path(sys.argv[1]), chosen, ranks)
    result = trainer.train(uneven_groups(0), 0, 0)
    figures = [result.metrics[name] for name in ("loss", "grad_norm", "entropy")]
    found.append([figures, [len(m.rows) for m in result.batch.minibatches[0]]])
ranks.close()
print(json.dumps(found))
"""


def test_ranks_share_prompts_as_one_does(model_dir: Path) -> None:
    from training_tools import uneven_groups

    chosen = recipe(train=SHARES | {"tokens_per_microbatch": 40, "minibatches": 1})
    one = make_trainer(model_dir, chosen).train(uneven_groups(0), 0, 0)
    wanted = [one.metrics[name] for name in ("loss", "grad_norm", "entropy")]
    both = [json.loads(said) for said in spawn(RANKS, [str(model_dir)], 2)]
    for (figures, mine), (other, theirs) in zip(*both, strict=True):
        assert figures == other == pytest.approx(wanted, rel=1e-5)
        assert len(mine) == len(theirs) and sum(mine) + sum(theirs) == len(one.batch.rows)


# ---- who shares


def test_who_shares() -> None:
    def of(device: str = "cpu", adapter: ModelAdapter = ADAPTER, config: Any = None, **tables: Any) -> backend.Sharing:
        tables["train"] = {"share_prompts": "auto"} | tables.get("train", {})
        return backend.sharing(recipe(**tables), adapter, device, config)

    assert of().above == 0.35 and of("cuda").above == 0.45 and "a tenth of a step" in of().reason
    assert of(train=SHARES).above == 0.0 and of(train={"share_prompts": False}).above is None
    generic, foreign = registry.get("generic"), replace(ADAPTER, shares_prompts=False)
    assert "does not say that its attention allows it" in of(adapter=generic).reason
    assert of(adapter=generic).above is None and of(adapter=generic, train=SHARES).above == 0.0
    window = {"sliding_window": 32}
    assert "sliding window of 32" in of(adapter=registry.get("llama"), config=window).reason
    assert of(adapter=registry.get("qwen2"), config=window | {"use_sliding_window": False}).above == 0.35
    for word, tables in {
        "packing = padded": {"train": {"packing": "padded"}},
        "attention = eager": {"train": {"attention": "eager"}},
        "row_boundaries = ignored": {"train": {"packing": "packed", "row_boundaries": "ignored"}},
        "a prompt of its own": {"sft": {}},
    }.items():
        found = of(**tables)
        assert found.above is None and word in found.reason
        with pytest.raises(UserError, match=r"train\.share_prompts = true: "):
            of(**tables | {"train": tables.get("train", {}) | SHARES})
    assert of(adapter=foreign).above is None
    with pytest.raises(UserError, match="cannot take its recurrent state on"):
        of(adapter=foreign, train=SHARES)
