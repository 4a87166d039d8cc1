"""The embedded engine as core sees it: our own decoder in plain torch, for a CPU, with nothing to install."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import PositiveInt

from astracli.config.recipe_run import Table
from astracli.engines.contract import Case, Engine, Serving, Start
from astracli.machine.findings import Check
from astracli.models.preflight import Obstacle, sliding_window

if TYPE_CHECKING:
    from astracli.config.recipe import Recipe
    from astracli.models.adapter import ModelAdapter


PRELOAD = ("astracli.engines.embedded.engine", "astracli.engines.embedded.http", "astracli.process.server")


class EmbeddedTable(Table):
    chunked_prefill_size: PositiveInt = 8192
    """Tokens of one prefill."""


class Embedded(Engine):
    name = "embedded"
    settings = EmbeddedTable
    summary = "the engine that runs on a CPU"
    auto_on = frozenset({"cpu"})
    fp32_on = frozenset({"cpu"})
    whole_calls = True

    def start(self, recipe: Recipe) -> Start:
        own = recipe.resources.engine
        return Start("astracli.engines.embedded.process", own.python, own.env, PRELOAD)

    def choose(self, case: Case) -> Serving:
        linear = ("none", "a dense model has no linear attention")
        if case.adapter is not None and case.adapter.hybrid:
            linear = ("torch", "the delta rule in torch, one step a token")
        return Serving(("sdpa", "exact and quick in the embedded engine"), linear)

    def obstacles(self, case: Case) -> Iterator[Obstacle]:
        assert case.recipe is not None
        window, context = sliding_window(case.config or {}), case.recipe.rollout.context_length
        if window is not None and window < context:
            path = case.recipe.model.path
            hint = f"`--set rollout.context_length={window}`, within which every layer sees the whole row"
            if case.recipe.rollout.max_new_tokens >= window:
                hint += f", and `--set rollout.max_new_tokens={max(1, window // 2)}`"
            yield Obstacle(
                f"a window of {context} tokens, {path} has {window}",
                f"`{path}` has layers that see the last {window} tokens (sliding_window in its config.json), "
                f"rollout.context_length is {context}: the embedded engine decodes full attention",
                hint,
            )

    def checks(self, case: Case) -> Iterator[Check]:
        yield Check("engine", "serving", "ok", "embedded: ships with astra, nothing to install")

    def sample(self, adapter: ModelAdapter, path: Path, prompts: Sequence[Sequence[int]], tokens: int) -> list[Any]:
        from astracli.engines.embedded.engine import EmbeddedEngine
        from astracli.engines.embedded.process import loader

        engine = EmbeddedEngine(path, loader(adapter, "cpu"), slots=len(prompts), context_length=64)
        done: dict[int, Any] = {}
        sampling = {"temperature": 1.0, "max_new_tokens": tokens, "sampling_seed": 1, "ignore_eos": True}
        engine.generate({"input_ids": prompts, "sampling_params": sampling}, done.__setitem__)
        while len(done) < len(prompts):
            engine.scheduler.run_once()
        return [(done[place].tokens, done[place].logprobs) for place in range(len(prompts))]


ENGINE = Embedded()
