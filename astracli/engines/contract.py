"""The Engine contract: what core asks of whatever generates. An engine is an entry point in `astra.engines` that names
an instance of a subclass of `Engine`; docs/extending.md shows one.

The module of an entry point is imported with every recipe: it imports torch, and the engine itself, inside functions.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from astracli.config.recipe_run import Table
from astracli.engines.memory import MemoryModel
from astracli.errors import UserError
from astracli.machine.facts import Capability, Machine
from astracli.machine.findings import Check, PlanProblem, Status

if TYPE_CHECKING:
    import numpy as np

    from astracli.config.recipe import Recipe
    from astracli.engines.client import EngineClient
    from astracli.engines.stops import StopStrings
    from astracli.models.adapter import ModelAdapter
    from astracli.models.preflight import Obstacle

GROUP = "astra.engines"
ASKED = "the recipe asks for it"


@dataclass(frozen=True)
class Start:
    """How an engine's process begins: `python -m module CONFIG.json`, a `process.worker.worker_main`."""

    module: str
    python: str | None = None
    """Interpreter of the process; None = the supervisor's."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Set over the supervisor's environment."""
    preload: tuple[str, ...] = ()
    """Modules that its process needs and that start neither threads nor CUDA when they are imported. In a run on a CPU
    the process is forked from one that has imported them, torch and transformers. (): it starts by itself."""


@dataclass(frozen=True)
class Case:
    """What an engine is asked to serve, and where."""

    facts: Machine
    device: str
    """`cpu` or `cuda`."""
    recipe: Recipe | None = None
    adapter: ModelAdapter | None = None
    config: Mapping[str, Any] | None = None
    """config.json of the model, when it is known."""
    attention: str | None = None
    """What `choose` took; None before, and after a refusal."""
    updated: bool = True
    """A trainer brings it new versions while it serves."""
    wanted: bool = True
    """The recipe generates with this engine: what is missing for it is a failure, else a warning."""

    @property
    def capability(self) -> Capability | None:
        """The lowest of the GPUs that it may serve on; None on a CPU, or where no GPU is known."""
        return self.facts.capability if self.device == "cuda" else None

    @property
    def foreign(self) -> bool:
        """The engine has an interpreter or a PYTHONPATH of its own: its packages are not the trainer's."""
        return self.recipe is not None and self.recipe.resources.engine.foreign

    @property
    def environment(self) -> Machine | None:
        """The facts as the engine's interpreter has them; None when it is another one and nothing is known of it."""
        return self.facts.as_engine(self.foreign)

    def bad(self, needed: bool = True) -> Status:
        return "fail" if needed and self.wanted else "warn"


@dataclass(frozen=True)
class Serving:
    """Which kernels an engine serves a model with, each with its reason."""

    attention: tuple[str, str] = ("auto", "the engine's own choice")
    linear_attention: tuple[str, str] = ("none", "the engine's own choice")
    reason: str = ""
    """A remark on an engine that the recipe asks for."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Set for every process of the run."""
    env_reason: str = ""


UNPROVEN = -1
"""The label of weights that nobody has checked yet, of an engine that cannot say `serving: false` instead."""
Finish = Literal["stop", "length", "abort"]
PauseMode = Literal["abort", "retract", "in_place"]
"""What becomes of the requests that run when an update pauses the engine (`weights.pause_mode`)."""


@dataclass(frozen=True)
class GenRequest:
    """One completion to generate."""

    input_ids: Sequence[int]
    """The prompt, and the tokens generated before when a completion is continued."""
    max_new_tokens: int
    temperature: float = 1.0
    """0 = greedy"""
    top_p: float = 1.0
    stop_token_ids: Sequence[int] = ()
    seed: int = 0
    """64-bit; the draw at completion position t depends on (seed, t) alone."""
    draw_offset: int = 0
    """Tokens of this completion that are already in `input_ids`."""
    rid: str | None = None
    stop: StopStrings | None = None
    """Texts that end it, as finished; the client sees to it where the engine does not."""


@dataclass(frozen=True)
class GenResult:
    """What one request produced; `abort`: up to where it was ended."""

    tokens: np.ndarray
    """int32 [t], the stop token included"""
    logprobs: np.ndarray
    """float32 [t], after temperature (0: that of 1) and before top-p"""
    finish_reason: Finish
    version: int
    """Weights in force at the end."""
    version_start: int
    """Weights in force at the first token; differs only for a request kept through an update."""
    rid: str
    cached_tokens: int | None = None
    """Tokens of `input_ids` whose keys and values a prefix cache had; None where the engine does not say."""
    engine_s: float | None = None
    """Seconds from its arrival at the engine to its end there, by the engine's clock; None where it does not say."""


@dataclass(frozen=True)
class UpdateReply:
    """The engine's answer to a weight update."""

    success: bool
    message: str
    outcome: Mapping[str, Any] = field(default_factory=dict)
    """What the engine says of it: `changed` elements, seconds under names that end in `_s`, and whether a read-back
    follows (`readback`). By our clock `begin_s` and `end_s`, where an engine is told of both."""

    @property
    def seconds(self) -> dict[str, float]:
        return {name: value for name, value in self.outcome.items() if name.endswith("_s") and value is not None}


Ended = Callable[[int, GenResult], None]
"""Called with a request's place in its call and its result."""


def flushes(pause_mode: str) -> bool:
    """Whether an update of this mode may ask for an empty cache: only with no request anywhere. Requests that were
    retracted wait, and those paused in place hold theirs (`Engine.cache_modes`)."""
    return pause_mode == "abort"


class WeightReceiver(Protocol):
    """Brings published versions to one engine, from where its client has them applied. Called in a thread."""

    def fetch(self, target_version: int, have_version: int | None = None) -> Any:
        """Fetch and stage; the answer has `kind`, `bytes`, `transfer_s` and `stage_s`."""

    @property
    def watched(self) -> bool:
        """The engine decodes what is staged while it generates."""

    def wake(self, version: int) -> None:
        """Stage an update that changes nothing. Applying it starts the decoding of an engine that is not `watched`."""

    def readback(self, version: int) -> Mapping[str, float]:
        """Wait for the read-back of a version, figures of it. Raises RunFailed when the engine holds other weights."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class FailureHint:
    """A pattern in an engine's output, what it means and what to do."""

    pattern: re.Pattern[str]
    cause: str
    """May use the pattern's groups, as in `re.Match.expand`."""
    hint: str


Sample = Callable[["ModelAdapter", Path, Sequence[Sequence[int]], int], Sequence[tuple[Any, Any]]]
"""(adapter, checkpoint directory, prompts, completion tokens) -> for each prompt (token ids, log-probabilities)."""


class Engine:
    """Base class. A subclass overrides what is special about its engine."""

    name: str
    """As `rollout.engine` and the entry point say it."""
    settings: type[Table] = Table
    """Its own table of a recipe, `[rollout.NAME]`."""
    summary: str = ""
    """A few words: `the engine for GPUs`."""
    auto_on: frozenset[str] = frozenset()
    """Devices (`cpu`, `cuda`) on which `rollout.engine = "auto"` takes it."""
    package: str | None = None
    """Distribution that it needs, perhaps in an environment of its own; None: astra alone is enough."""
    upgrade: str | None = None
    """Command that brings newer kernels into its environment and leaves `package` the torch that it is built for."""
    fp32_on: frozenset[str] = frozenset()
    """Devices on which it computes in fp32; elsewhere in bf16, and the trainer allows for that."""
    whole_calls: bool = False
    """In deterministic mode it runs one call at a time: bytes depend on what a call holds alone."""
    memory: MemoryModel = MemoryModel()
    sample: Sample | None = None
    """Draws tokens in the calling process, for `astra doctor --probe`; None: only a server of it can."""
    cache_modes: frozenset[str] = frozenset()
    """Values of `weights.pause_mode` under which its prefix cache gives no request what older weights computed. Empty:
    it has none. (`prefix_cache.py` decides.)"""
    hints: Sequence[FailureHint] = ()
    """In order: the first that is found in its last lines explains its end."""

    def own(self, recipe: Recipe) -> Any:
        """The engine's own table of the recipe."""
        return getattr(recipe.rollout, self.name)

    def start(self, recipe: Recipe) -> Start:
        raise NotImplementedError

    def choose(self, case: Case) -> Serving:
        """When it can serve, and with what. Raises UserError, with the ways out, for what cannot work here."""
        return Serving()

    def client(self, url: str, token: str, *, name: str, stage_dir: Path) -> AbstractAsyncContextManager[EngineClient]:
        from astracli.engines.client import EngineClient

        return EngineClient(url, token, name=name)

    def receiver(self, hub_url: str, token: str, stage_dir: Path, model: Path) -> WeightReceiver:
        """By default versions are staged in `stage_dir`; the engine's process applies and proves them with
        `weights.receive`."""
        from astracli.weights.receive.subscriber import Subscriber

        return Subscriber(hub_url, token, stage_dir, model)

    def problems(self, case: Case) -> Iterable[PlanProblem]:
        """What the machine lacks for it, of packages and system."""
        return ()

    def obstacles(self, case: Case) -> Iterable[Obstacle]:
        """What `case.config` says of the model that it cannot serve."""
        return ()

    def checks(self, case: Case) -> Iterator[Check]:
        """Its part of `astra doctor`."""
        yield Check("engine", "serving", "ok", f"{self.name}: nothing to install")

    def probes(self, case: Case) -> Iterable[Mapping[str, Any]]:
        """What `astra doctor --probe` tries of it: arguments of `doctor.probes.Probe`."""
        return ()


def known(key: str, value: str, names: tuple[str, ...], who: str) -> None:
    """Raise UserError, with the nearest name, when `value` of a recipe's `key` is none of `names`."""
    if value not in names:
        near = difflib.get_close_matches(value, names, n=1)
        guess = f"; did you mean `{near[0]}`?" if near else ""
        hint = f"`--set {key}=auto` lets astra choose"
        raise UserError(f"{key} = {value}: {who} takes {', '.join(names)}{guess}", hint)


_EXCEPTION = re.compile(r"^(?:\[[^\]]*\] ?)?(?:[\w.]*(?:Error|Exception|Interrupt)\b.*|AssertionError.*)")


def explain(hints: Iterable[FailureHint], lines: Iterable[str]) -> tuple[str | None, str | None]:
    """(cause, hint) of an engine's end, from its last lines; (None, None) when nothing in them says why."""
    text = "\n".join(lines)
    for known in hints:
        if match := known.pattern.search(text):
            return match.expand(known.cause), known.hint
    errors = [line.strip() for line in text.splitlines() if _EXCEPTION.match(line.strip())]
    return (errors[-1][:300] if errors else None), None
