"""How many requests an engine decodes at once, when the recipe leaves it to the machine (`auto`). Pure.

An engine reserves a part of its GPU for weights, a recurrent state per request and the KV cache; its memory model
(`engines/memory.py`) says how much of each. With a GPU of its own, every request gets the KV cache of a full context,
so that none is ever retracted. Beside a trainer, one in `COMFORT` does. There are never more requests than admission
lets start, and a recipe may state a limit that memory does not show (`rollout.running_ceiling`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from astracli.config.recipe import Recipe
from astracli.engines import registry as engines
from astracli.machine.memory import safe, words
from astracli.models.adapter import MemoryShape
from astracli.plan.cost import TrainerLoad
from astracli.plan.hints import changed
from astracli.plan.memory import COMFORT
from astracli.plan.offload import options, recomputing, trainer_needs
from astracli.plan.placement import Gpus, shares_time
from astracli.plan.trainer import context_bytes

MOST = 256
"""Decoding gains little from more; each one costs a CUDA graph's buffers and logits."""
FEW = 8
"""Beside a trainer, rather than fewer requests than this, more of the trainer moves to the host."""


def settle(recipe: Recipe, shape: MemoryShape | None, gpus: Gpus) -> tuple[Recipe, str | None]:
    """(the recipe with `rollout.max_running_requests` set, how it was derived). A recipe that sets it stays as it is,
    without a reason; where no GPU or model is known, the recipe's default is taken."""
    if recipe.rollout.max_running_requests != "auto":
        return recipe, None
    gpu_bytes = gpus.smallest(gpus.engine)
    if shape is None or gpu_bytes is None:
        unknown = "the memory of its GPU is not known" if shape is not None else "the model's sizes are not known"
        return _with(recipe, recipe.rollout.running), unknown
    return _Search(recipe, shape, gpus, gpu_bytes).settle()


@dataclass(frozen=True)
class _Search:
    recipe: Recipe
    shape: MemoryShape
    gpus: Gpus
    gpu_bytes: int

    def settle(self) -> tuple[Recipe, str]:
        model, size = engines.of(self.recipe).memory, words(self.gpu_bytes)
        share = model.share(self.recipe)
        own = int(share * self.gpu_bytes)
        useful, no_more = self._useful()
        if not self.gpus.shared:
            why = f"{share:.0%} of {size} less {words(model.weight_bytes * self.shape.parameters)} of weights"
            return self._settled(self._fit(own, 1), 1, why, useful, no_more)
        ranks, work = len(self.gpus.trainer), model.beside(self.shape, _with(self.recipe, useful))
        if shares_time(
            TrainerLoad(_with(self.recipe, FEW), self.shape, ranks, self.gpus.pace, self.gpus.train_hosts),
            self.gpu_bytes,
        ):
            static = min(own, self.gpu_bytes - safe(context_bytes(ranks) + work))
            why = f"{size} shared in time with the trainer"
            return self._settled(self._fit(static, COMFORT), COMFORT, why, useful, no_more)
        fit, load = 1, TrainerLoad(self.recipe, self.shape, ranks, self.gpus.pace, self.gpus.train_hosts)
        for option in recomputing(options(load)):  # as little of the trainer on the host as possible
            left = self.gpu_bytes - trainer_needs(load, option)[1]
            fit = self._fit(min(own, left - safe(work)), COMFORT)
            if fit >= FEW:
                break
        return self._settled(fit, COMFORT, f"what the trainer leaves of {size}", useful, no_more)

    def _fit(self, static: int, comfort: int) -> int:
        """Requests of which one in `comfort` finds the KV cache of a full context in `static` bytes; at least 1."""
        recipe, shape, model = self.recipe, self.shape, engines.of(self.recipe).memory
        each = shape.state_bytes_per_sequence * model.states(recipe) + model.cache(shape, recipe) / comfort
        room = static - model.reserved(shape, _with(recipe, 0), requests=0)
        fit = max(1, int(room // each)) if each else MOST
        while fit > 1 and static + safe(model.beside(shape, _with(recipe, fit))) > self.gpu_bytes:
            fit -= 1
        return fit

    def _useful(self) -> tuple[int, str]:
        """(requests that are of use to an engine, why no more): as many as rollouts under way or an evaluation can give
        it, or what the recipe says of a GPU of this memory."""
        recipe = self.recipe
        under_way = (recipe.effective_staleness + 1) * recipe.batch_sequences
        asked = recipe.eval.max_concurrency
        useful = min(MOST, max(ceil(under_way / len(self.gpus.engine)), 0 if asked == "auto" else asked))
        useful -= useful % 8 if useful > 8 else 0
        found = recipe.rollout.ceiling(self.gpu_bytes / 2**30)
        if found is not None and found[1] < useful:
            return found[1], f"rollout.running_ceiling of GPUs of up to {found[0]} GiB is {found[1]}"
        return useful, f"more than {useful} are of no use"

    def _settled(self, fit: int, comfort: int, why: str, most: int, no_more: str) -> tuple[Recipe, str]:
        """(the recipe with `most` requests, or a multiple of 8 of what fits; how they were found)."""
        count = min(fit - (fit % 8 if fit > 8 else 0), most)
        parts = f"a full context of {words(engines.of(self.recipe).memory.cache(self.shape, self.recipe))}"
        size = self.shape.state_bytes_per_sequence * engines.of(self.recipe).memory.states(self.recipe)
        state = f"{words(size)} of state each" if size else ""
        if comfort == 1:
            parts += f" and {state}" if state else " each"
        else:
            parts += f" for one in {comfort}" + (f", {state}" if state else "")
        return _with(self.recipe, count), f"{why}: {fit} fit, with {parts}{f'; {no_more}' if fit > most else ''}"


def _with(recipe: Recipe, count: int) -> Recipe:
    return changed(recipe, {"rollout.max_running_requests": count})
