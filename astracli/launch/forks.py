"""Which processes of a run are forked from one that has imported what they need, and that process: the fork server.

Importing torch and transformers takes seconds of a core; the engine, the rollout worker, each trainer rank and the
evaluation worker need both. On Linux, in a run on a CPU, they are imported once. Everything else starts by itself.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence

from astracli.config.recipe import Recipe
from astracli.engines import registry as engines
from astracli.plan.draft import MODULES
from astracli.plan.types import ProcessPlan
from astracli.process.children import ChildSpec, environment
from astracli.process.config import Role
from astracli.process.forking import Forked, ForkServer

COMMON = ("torch", "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto")
PRELOAD = {
    Role.ROLLOUT: (
        "astracli.rollout.engine_worker",
        "astracli.rollout.episodes",
        "astracli.weights.receive.subscriber",
    ),
    Role.TRAINER: ("astracli.training.loop",),
    Role.EVAL: ("astracli.evaluation.spread",),
}  # fmt: skip
"""What the process of each role imports besides `COMMON`; an engine says it itself (`engines.contract.Start`)."""
STARTS = 3
"""How often the fork server is started in a run; after that every process starts by itself."""


def preloads(plan: ProcessPlan, recipe: Recipe) -> tuple[str, ...]:
    """What a process needs of the fork server; () when it starts by itself."""
    if sys.platform != "linux" or plan.gpus or plan.python is not None:
        return ()
    if plan.role is Role.ENGINE:
        start = engines.of(recipe).start(recipe)
        return start.preload if start.module == plan.module else ()
    return PRELOAD[plan.role] if plan.module == MODULES[plan.role] else ()


class Forks:
    """Forks processes of a run, as `children.Child` asks for it. Where that is not possible, `log` is told why."""

    def __init__(self, plans: Sequence[ProcessPlan], recipe: Recipe, env: Callable[[ProcessPlan], Mapping[str, str]]):
        """`env`: what is set for a process over this one's environment, apart from what each has for itself."""
        self._recipe = recipe
        ours = [plan for plan in plans if preloads(plan, recipe)]
        needs = [name for plan in ours for name in preloads(plan, recipe)]
        self._modules = tuple(dict.fromkeys([*COMMON, *needs]))
        self._env = env(ours[0]) if ours else {}
        self._left = STARTS if ours else 0
        self._server: ForkServer | None = None
        self.start()

    @property
    def pid(self) -> int | None:
        """Of the fork server; None while there is none."""
        return self._server.pid if self._server is not None else None

    def start(self) -> None:
        """Start the fork server, unless there is one or it was started often enough."""
        if self._server is None and self._left:
            self._left -= 1
            with contextlib.suppress(OSError):  # no process, no descriptor: whoever needs one next says so
                self._server = ForkServer(self._modules, environment(self._env))

    def ready(self) -> bool:
        """Nothing is gained by waiting any longer."""
        return self._server is None or self._server.ready() or self._server.problem is not None

    def fork(self, plan: ProcessPlan, spec: ChildSpec, out: int) -> Forked | None:
        """None: it starts by itself."""
        server = self._server
        if server is None or not preloads(plan, self._recipe) or not server.fits(spec.environment()):
            return None
        module, *arguments = spec.argv[spec.argv.index("-m") + 1 :]
        child = server.fork(module, arguments, spec.environment(), out, spec.inherit)
        if server.problem is not None:
            os.write(
                out, f"warning: this process imports everything itself; the fork server: {server.problem}\n".encode()
            )
            self.close()
            self.start()
        return child

    def close(self) -> None:
        """End the fork server; what it has forked lives on."""
        if self._server is not None:
            self._server.close()
            self._server = None
