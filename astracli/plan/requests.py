"""How many requests an engine decodes at once, when the recipe leaves it to the machine (`auto`). Pure.

An engine reserves a part of its GPU: weights, a recurrent state for every request, and the KV cache; its memory model
(`engines/memory.py`) says how much of each. With a GPU of its own every request gets the KV cache of a full context, so
that none is ever retracted; beside a trainer one in four does (`COMFORT`). More requests than admission lets be under
way would never come, and a recipe may know of a limit that memory does not show (`rollout.running_ceiling`).
"""

from __future__ import annotations

from math import ceil

from astracli.config.recipe import Recipe
from astracli.engines import registry as engines
from astracli.machine.memory import safe, words
from astracli.models.adapter import MemoryShape
from astracli.plan.cost import Pace
from astracli.plan.memory import COMFORT
from astracli.plan.offload import options, recomputing, trainer_needs
from astracli.plan.placement import Gpus, shares_time
from astracli.plan.trainer import context_bytes

MOST = 256
"""Decoding gains little from more; every one of them costs a CUDA graph's buffers and logits."""
FEW = 8
"""Beside a trainer, more of that one moves to the host rather than fewer requests than this."""


def settle(recipe: Recipe, shape: MemoryShape | None, gpus: Gpus) -> tuple[Recipe, str | None]:
    """(the recipe with `rollout.max_running_requests` set, how it was derived). A recipe that says it stays as it is,
    with nothing to say; without a GPU or a known model it takes `recipe.RUNNING`."""
    if recipe.rollout.max_running_requests != "auto":
        return recipe, None
    gpu_bytes = gpus.engine_bytes
    if shape is None or gpu_bytes is None:
        unknown = "the memory of its GPU is not known" if shape is not None else "the model's sizes are not known"
        return _with(recipe, recipe.rollout.running), unknown
    useful, no_more = _most(recipe, len(gpus.engine), gpu_bytes)
    if gpus.shared:
        return _beside(recipe, shape, gpu_bytes, len(gpus.trainer), useful, no_more, gpus.pace)
    model = engines.of(recipe).memory
    share = model.share(recipe)
    fit = _fit(recipe, shape, int(share * gpu_bytes), gpu_bytes, 1)
    why = f"{share:.0%} of {words(gpu_bytes)} less {words(model.weight_bytes * shape.parameters)} of weights"
    return _settled(recipe, shape, fit, useful, 1, why, no_more)


def _beside(
    recipe: Recipe, shape: MemoryShape, gpu_bytes: int, ranks: int, useful: int, no_more: str, pace: Pace
) -> tuple[Recipe, str | None]:
    """On a GPU that holds a trainer, too: what the trainer leaves when as little of it as possible is on the host."""
    model = engines.of(recipe).memory
    share, own = model.share(recipe), model.beside(shape, _with(recipe, useful))
    if shares_time(_with(recipe, FEW), shape, gpu_bytes, ranks):
        static = min(int(share * gpu_bytes), gpu_bytes - safe(context_bytes(ranks) + own))
        fit = _fit(recipe, shape, static, gpu_bytes, COMFORT)
        return _settled(
            recipe, shape, fit, useful, COMFORT, f"{words(gpu_bytes)} shared in time with the trainer", no_more
        )
    fit = 1
    for option in recomputing(options(recipe, shape, ranks, pace)):
        left = gpu_bytes - trainer_needs(recipe, shape, ranks, option)[1]
        static = min(int(share * gpu_bytes), left - safe(own))
        fit = _fit(recipe, shape, static, gpu_bytes, COMFORT)
        if fit >= FEW:
            break
    return _settled(recipe, shape, fit, useful, COMFORT, f"what the trainer leaves of {words(gpu_bytes)}", no_more)


def _fit(recipe: Recipe, shape: MemoryShape, static: int, gpu_bytes: int, comfort: int) -> int:
    """Requests of which one in `comfort` finds the KV cache of a full context in `static` bytes; at least 1."""
    model = engines.of(recipe).memory
    each = shape.state_bytes_per_sequence + model.cache(shape, recipe) / comfort
    room = static - model.reserved(shape, _with(recipe, 0), requests=0)
    fit = max(1, int(room // each)) if each else MOST
    while fit > 1 and static + safe(model.beside(shape, _with(recipe, fit))) > gpu_bytes:
        fit -= 1
    return fit


def _most(recipe: Recipe, engines: int, gpu_bytes: int) -> tuple[int, str]:
    """(requests that an engine may have, why no more): those that it can ever have, of rollouts under way or of an
    evaluation, or what the recipe says of a GPU of this memory."""
    under_way = (recipe.effective_staleness + 1) * recipe.batch_sequences
    asked = recipe.eval.max_concurrency
    useful = min(MOST, max(ceil(under_way / engines), 0 if asked == "auto" else asked))
    useful -= useful % 8 if useful > 8 else 0
    found = recipe.rollout.ceiling(gpu_bytes / 2**30)
    if found is not None and found[1] < useful:
        return found[1], f"rollout.running_ceiling of GPUs of up to {found[0]} GiB is {found[1]}"
    return useful, f"more than {useful} are of no use"


def _settled(
    recipe: Recipe, shape: MemoryShape, fit: int, most: int, comfort: int, why: str, no_more: str
) -> tuple[Recipe, str]:
    """(the recipe with that many, how they were found): multiples of 8 of what fits."""
    count = min(fit - (fit % 8 if fit > 8 else 0), most)
    kv = words(engines.of(recipe).memory.cache(shape, recipe))
    state = f" and {words(shape.state_bytes_per_sequence)} of state" if shape.state_bytes_per_sequence else ""
    parts = f"a full context of {kv}{state} each" if comfort == 1 else f"a full context of {kv} for one in {comfort}"
    if comfort != 1 and state:
        parts += f",{state.removeprefix(' and')} each"
    limit = f"; {no_more}" if fit > most else ""
    return _with(recipe, count), f"{why}: {fit} fit, with {parts}{limit}"


def _with(recipe: Recipe, count: int) -> Recipe:
    rollout = recipe.rollout.model_copy(update={"max_running_requests": count})
    return recipe.model_copy(update={"rollout": rollout})
