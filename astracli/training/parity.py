"""The check at the start of a run: rows together == rows alone. (`agreement` is the other one: trainer == engine.)

The log-probabilities of rows joined into one micro-batch, and their gradient, equal those of each row alone. A model
whose recurrent or convolution state leaks between rows fails here.

In bf16 two right ways to compute one gradient differ by percents at 32 layers: another number of rows means another
kernel for a product, which adds up in another order, and from there every rounding differs. So on a GPU the gradient
of a row alone is also computed in the shape of all of them (`in_the_shape_of_all`), with attention that adds up in one
order (`varlen.one_order`): the same kernels see the same numbers, and without a leak the difference is a thousandth.
That does not show a kernel that is wrong in every row alike. So each row is also computed in its own shape, under a
wider limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from astracli.errors import RunFailed
from astracli.kernels import varlen
from astracli.kernels.upload import upload
from astracli.models.adapter import ModelAdapter
from astracli.rl.batch import Join, MicroBatch, pad_rows
from astracli.rl.rows import Row
from astracli.training import packing, shared_prompts
from astracli.training.agreement import TIMES_NOISE
from astracli.training.logprob import PolicyModel
from astracli.training.optimizer import Masters

ROWS_TOLERANCE = {"cpu": 1e-4, "cuda": 0.25}
"""Largest |difference| of one token. On a GPU bf16 kernels choose other tilings for other shapes, so single tokens
move by a few hundredths, those of a pretrained model with large logits by tenths; a leak moves them by whole units."""
ROWS_CEILING = 2.0
"""What rounding may excuse of that where each row has a shape of its own, never more."""
GRADIENT_TOLERANCE = {"cpu": 1e-4, "cuda": 1e-2}
"""Largest |difference| of the gradient over its norm. A leak through Gated DeltaNet layers gives 0.96; without one an
H200 gives 0.001 at 4.2 B parameters (what a convolution's gradient loses when it is rounded to bf16 row by row)."""
GRADIENT_CEILING = 0.15
"""What may be added to that, never more: a leak gives 0.26 at four layers and grows with depth."""
TIMES_REPEAT = 2.0
"""Kernels that do not repeat themselves excuse twice what they are apart from themselves, and nothing else does."""
MOST_ROWS = 8
WORDS = {
    "rows_max_abs": "log-probability",
    "rows_own_shape_max_abs": "log-probability, each row in a shape of its own",
    "rows_gradient_error": "gradient, relative to its norm",
    "rows_gradient_own_shape": "gradient, relative to its norm, each row in a shape of its own",
}
Pass = tuple[MicroBatch, slice]
"""A micro-batch, and which of its loss tokens count"""


def logprobs(
    policy: PolicyModel,
    adapter: ModelAdapter,
    micro: MicroBatch,
    device: torch.device,
    target_N: np.ndarray | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy, each fp32 [N], of a micro-batch's loss tokens; with a `target_N` (int64), of those
    tokens at the same places."""
    wanted_N = micro.target_N if target_N is None else target_N
    if device.type == "cuda":
        micro = packing.rounded(micro)
    predict_N, chosen_N = (upload(x, device) for x in (micro.predict_N, wanted_N))
    tokens_BL = upload(micro.tokens_BL, device)
    if micro.bounds_S1 is not None:
        positions_1T = upload(packing.positions(micro.bounds_S1, micro.parents_S)[None], device)
        boundaries = varlen.boundaries(micro.bounds_S1, device, micro.parents_S)
        return policy(tokens_BL, None, positions_1T, predict_N, chosen_N, **boundaries)
    mask = upload(micro.mask_BL, device)
    position_ids = adapter.position_ids(mask) if adapter.position_ids else None
    return policy(tokens_BL, adapter.attention_mask(mask), position_ids, predict_N, chosen_N)


def spread(rows: Sequence[Row], tokens_per_microbatch: int) -> list[Row]:
    """Up to MOST_ROWS rows from short to long that fit in one micro-batch; at least two where there are two."""
    by_length = sorted(rows, key=lambda r: (len(r), r.index))
    fit = max(2, tokens_per_microbatch // len(by_length[-1]))
    count = min(MOST_ROWS, fit, len(by_length))
    return [by_length[(i * (len(by_length) - 1)) // max(1, count - 1)] for i in range(count)]


def in_the_shape_of_all(rows: Sequence[Row], index: int, *, join: Join, pad_token: int) -> Pass:
    """Row `index` alone, in a micro-batch of the shape that all rows make together, and where its loss tokens are.

    It comes first, where nothing can reach it, and padding fills the place of the others behind it. Loss tokens keep
    their order, so that chunks of the output head are the same too. For `logprobs` alone: the rest of the micro-batch,
    which a loss would read, is in the order of its columns.
    """
    order = [index, *(i for i in range(len(rows)) if i != index)]
    micro = join([rows[i] for i in order], pad_token)
    micro.tokens_BL.reshape(-1)[len(rows[index]) :] = pad_token
    counts = [row.loss_tokens for row in rows]
    starts = dict(zip(order, np.cumsum([0, *(counts[i] for i in order)]).tolist(), strict=False))
    taken = np.concatenate([np.arange(starts[i], starts[i] + counts[i]) for i in range(len(rows))])
    before = sum(counts[:index])
    ordered = replace(micro, predict_N=micro.predict_N[taken])
    return ordered, slice(before, before + counts[index])


def a_unit_off(hidden: torch.Tensor, seed: int) -> torch.Tensor:
    """Each value times 1 - 2^-8, 1 or 1 + 2^-8, by chance; the same ones for the same seed, as when a block is computed
    again in a backward pass. In fp32, and then rounded: 1 + 2^-8 itself is no number in bf16."""
    draw = torch.Generator(hidden.device).manual_seed(seed)
    signs = torch.randint(-1, 2, hidden.shape, generator=draw, device=hidden.device, dtype=torch.int8)
    return (hidden.float() * (1 + signs * 2.0**-8)).to(hidden.dtype)


def logprob_limits(found: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """What the differences of `logprob_figures` may be, by name. In shapes of their own, rows in bf16 may differ by
    `TIMES_NOISE` times what a unit in bf16's last place does to a token."""
    tolerance = ROWS_TOLERANCE[device.type]
    if device.type == "cpu":
        return {"rows_max_abs": tolerance}
    excuse = TIMES_NOISE * found.get("rows_max_noise", 0.0)
    return {"rows_max_abs": tolerance, "rows_own_shape_max_abs": max(tolerance, min(excuse, ROWS_CEILING))}


def gradient_limits(found: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """What the two errors of `gradient_figures` may be, by name.

    In one shape only kernels that do not repeat themselves excuse more than the tolerance; in shapes of their own what
    a unit in bf16's last place does.
    """
    tolerance = GRADIENT_TOLERANCE[device.type]
    if device.type == "cpu":
        return {"rows_gradient_error": tolerance}
    excuses = {
        "rows_gradient_error": TIMES_REPEAT * found.get("rows_gradient_repeat", 0.0),
        "rows_gradient_own_shape": found.get("rows_gradient_noise", 0.0),
    }
    return {name: max(tolerance, min(excuse, GRADIENT_CEILING)) for name, excuse in excuses.items()}


@dataclass(frozen=True)
class RowCheck:
    """How a trainer computes rows, and the checks of it. With a sharded policy each is a collective: every rank must
    bring the same rows. Gradients: `masters` hold none before and after."""

    policy: PolicyModel
    adapter: ModelAdapter
    masters: Masters
    packed: bool = False
    pad_token: int = 0
    shared: bool = False
    """The rows stand in the order of `shared_prompts.in_order`, and joined, samples share their group's prompt."""

    @property
    def device(self) -> torch.device:
        return self.masters.ranks.device

    @property
    def _join(self) -> Join:
        return shared_prompts.pack if self.shared else packing.pack_rows if self.packed else pad_rows

    def logprobs(self, micro: MicroBatch) -> torch.Tensor:
        """fp32 [N]"""
        return logprobs(self.policy, self.adapter, micro, self.device)[0]

    def together(self, rows: Sequence[Row]) -> Pass:
        """The rows joined into one micro-batch."""
        return self._join(list(rows), self.pad_token), slice(None)

    def alone(self, rows: Sequence[Row]) -> Iterator[Pass]:
        """Each as an ordinary row of its own length."""
        return ((pad_rows([row], self.pad_token), slice(None)) for row in rows)

    @torch.no_grad()
    def difference(self, rows: Sequence[Row], *, same_shape: bool = False) -> float:
        """Largest |difference of log-probabilities| between rows joined into one micro-batch and each alone.
        `same_shape` as in `gradient_error`."""
        with varlen.one_order() if same_shape else nullcontext():
            passes = self._in_one_shape(rows) if same_shape else self.alone(rows)
            alone = torch.cat([self.logprobs(micro)[its] for micro, its in passes])
            return float((self.logprobs(self.together(rows)[0]) - alone).abs().max())

    def logprob_figures(self, rows: Sequence[Row], *, in_bf16: bool) -> dict[str, float]:
        """What `require` judges of log-probabilities; as `gradient_figures`."""
        found = {"rows_max_abs": self.difference(rows, same_shape=in_bf16)}
        if in_bf16:
            found["rows_own_shape_max_abs"] = self.difference(rows)
            if found["rows_own_shape_max_abs"] > ROWS_TOLERANCE["cuda"]:
                found["rows_max_noise"] = float(self._changes(rows).max())
        return found

    def _in_one_shape(self, rows: Sequence[Row]) -> Iterator[Pass]:
        if self.shared:
            return (shared_prompts.alone_in(rows, i, self.pad_token) for i in range(len(rows)))
        return (in_the_shape_of_all(rows, i, join=self._join, pad_token=self.pad_token) for i in range(len(rows)))

    def gradient_error(self, rows: Sequence[Row], *, same_shape: bool) -> float:
        """|difference| / |gradient of the rows together| of their mean log-probability, over all parameters of all
        ranks.

        With `same_shape` every row costs the passes that all of them cost together, and sums are taken in one order;
        without, a row alone is an ordinary one: in fp32 other shapes change a millionth, and that is the plainer check.
        """
        if not same_shape:
            return self._minus(self.together(rows), self.alone(rows))
        with varlen.one_order():
            return self._minus(self.together(rows), self._in_one_shape(rows))

    def gradient_repeat(self, rows: Sequence[Row]) -> float:
        """The same of joined rows and themselves, computed twice: 0 where the kernels repeat themselves in
        `one_order`."""
        with varlen.one_order():
            return self._minus(self.together(rows), [self.together(rows)])

    def gradient_figures(self, rows: Sequence[Row], *, in_bf16: bool) -> dict[str, float]:
        """What `require` judges and metrics.jsonl records (docs/run-directory.md).

        `in_bf16`, as on a GPU: `rows_gradient_error` is taken in one shape and one order, `rows_gradient_own_shape` as
        in fp32; and, where they are over the tolerance, what excuses it: `rows_gradient_repeat` and
        `rows_gradient_noise`.
        """
        found = {"rows_gradient_error": self.gradient_error(rows, same_shape=in_bf16)}
        if not in_bf16:
            return found
        tolerance = GRADIENT_TOLERANCE["cuda"]
        if found["rows_gradient_error"] > tolerance:
            found["rows_gradient_repeat"] = self.gradient_repeat(rows)
        found["rows_gradient_own_shape"] = self.gradient_error(rows, same_shape=False)
        if found["rows_gradient_own_shape"] > tolerance:
            found["rows_gradient_noise"] = self.rounding_noise(rows)
        return found

    def rounding_noise(self, rows: Sequence[Row]) -> float:
        """How far the gradient moves, relative to its norm, when every block's input moves by a unit in bf16's last
        place.

        Other kernels round otherwise, so two right ways to compute one gradient in bf16 differ, the more the deeper the
        model: with random weights (CPU, 32 layers) both packed and separate rows lie 0.05 from the gradient in fp32,
        and 0.02 from each other; in fp32 they are 2.5e-6 apart. Rows in shapes of their own are held against this.
        """
        tokens = sum(row.loss_tokens for row in rows)
        with self._jolted():
            for alone in self.alone(rows):
                self._pull(alone, 1 / tokens)
        return self._difference(self.alone(rows), tokens)

    def logprob_noise(self, rows: Sequence[Row]) -> float:
        """Mean |change of a token's log-probability| when every block's input moves by a unit in bf16's last place.

        What two right implementations in bf16 may differ by depends on the model: SmolLM2-135M, whose logits go up to
        37, in fp32 lies 0.03 from one in bf16, and this is 0.03 too (docs/benchmarks.md, "A pretrained checkpoint").
        """
        return float(self._changes(rows).mean())

    @torch.no_grad()
    def _changes(self, rows: Sequence[Row]) -> torch.Tensor:
        """fp32 [N]: that change of every loss token."""
        changes = []
        for micro, _ in self.alone(rows):
            plain_N = self.logprobs(micro)
            with self._jolted():
                changes.append((self.logprobs(micro) - plain_N).abs())
        return torch.cat(changes)

    @contextmanager
    def _jolted(self) -> Iterator[None]:
        """Every block of the policy sees its input `a_unit_off`."""

        def jolt(block: int) -> Callable[..., Any]:
            def hook(_: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
                hidden = a_unit_off(inputs[0] if inputs else named["hidden_states"], block)
                return ((hidden, *inputs[1:]), named) if inputs else (inputs, named | {"hidden_states": hidden})

            return hook

        blocks = self.adapter.blocks(self.policy.model)
        hooks = [block.register_forward_pre_hook(jolt(i), with_kwargs=True) for i, block in enumerate(blocks)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _pull(self, one: Pass, weight: float) -> None:
        """Add the gradient of a pass's log-probabilities, times `weight`, to what there is."""
        micro, its = one
        (self.logprobs(micro)[its].sum() * weight).backward()

    def _minus(self, together: Pass, passes: Iterable[Pass]) -> float:
        """|gradient of a micro-batch's mean log-probability, minus that of `passes`| over the former."""
        tokens = len(together[0].target_N)
        self._pull(together, 1 / tokens)
        return self._difference(passes, tokens)

    def _difference(self, passes: Iterable[Pass], tokens: int) -> float:
        """|gradient that is there, minus that of `passes`| over the former. None is there afterwards.

        The passes are taken off what is there, so no second set of gradients is held.
        """

        def norm() -> float:
            return self.masters.ranks.squares(self.masters.grads.found().values()) ** 0.5

        whole = norm()
        for one in passes:
            self._pull(one, -1 / tokens)
        difference = norm()
        self.masters.grads.clear()
        return difference / whole if whole else difference

    def require(self, found: Mapping[str, float]) -> None:
        """Raise RunFailed when joined rows do not equal separate ones, by the figures there are."""
        limits = logprob_limits(found, self.device) | gradient_limits(found, self.device)
        wrong = [name for name, limit in limits.items() if name in found and not found[name] <= limit]
        if not wrong:
            return
        joined = "packed in one row" if self.packed else "padded together"
        joined = "that share a prompt" if self.shared else joined
        why = f"adapter `{self.adapter.name}` gives this model a wrong attention mask; run `astra doctor`"
        if self.packed:
            why = f"adapter `{self.adapter.name}` loses the boundaries of a packed row; "
            why += "`--set train.packing=padded` trains on"
        if self.shared:
            why = (
                f"adapter `{self.adapter.name}` does not take a sample on from its prompt as a row of its own goes on; "
            )
            why += "`--set train.share_prompts=false` trains on"
        raise RunFailed(
            f"rows {joined} differ from separate rows by {found[wrong[0]]:.2e} in {WORDS[wrong[0]]}, "
            f"allowed {limits[wrong[0]]:.1e}: state leaks between positions or rows",
            why,
        )
