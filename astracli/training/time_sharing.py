"""A trainer that shares its GPUs with engines, side by side or by time sharing.

Side by side: the engines reserve their memory first, and the trainer takes what they leave. Time sharing: when it has a
batch, the trainer asks the hub for the engines' GPU leases, brings its state back from the host, trains, publishes,
moves to the host again and gives the leases back. Rank 0 asks. Only ranks that share their GPU with an engine move.
"""

from __future__ import annotations

import time
from typing import Any

from astracli.errors import RunFailed
from astracli.hub.client import HubClient
from astracli.hub.types import GpuLeaseReply
from astracli.process.config import TrainerConfig
from astracli.process.health import answers
from astracli.process.worker import Reporter

WAIT_S = 5.0
"""One long poll for a GPU lease; between two, a stop is noticed."""
LOOK_S = 0.5
HEALTH_TIMEOUT_S = 25.0
_YES, _NO = b"1", b"0"


class TimeSharing:
    """One rank's part. Without shared GPUs every call does nothing, at once."""

    def __init__(self, config: TrainerConfig, reporter: Reporter, ranks: Any, hub: HubClient | None):
        self.gpu_leases = config.gpu_leases
        """Engines with which this trainer shares GPUs in time: the names of their leases."""
        self.leaves = bool(self.gpu_leases) and config.leaves
        """Whether an engine shares this rank's own GPU."""
        self._shared = config.shared
        self._config = config
        self._reporter = reporter
        self._ranks = ranks
        self._hub = hub
        self._mine = False

    def begin(self, trainer: Any = None) -> bool:
        """Wait until the GPUs are this trainer's; False when the run is asked to stop. A collective.

        The first call, before there is a `trainer`, also waits for the engines to be up. Raises RunFailed when they do
        not come up in time.
        """
        if not self._shared or self._mine:
            return True
        if trainer is None:
            self._await_engines()
        if self.gpu_leases:
            answer = None if self._hub is None else _YES if self._take(self._hub) else _NO
            if self._ranks.broadcast(answer) == _NO:
                return False
            if self.leaves and trainer is not None:
                trainer.to_device()
        self._mine = True
        return True

    def end(self, trainer: Any) -> None:
        """Leave the GPUs to the engines; nothing when they are shared side by side. A collective."""
        if not self.gpu_leases or not self._mine:
            return
        if self.leaves:
            trainer.to_host()
        self._ranks.barrier()
        self._mine = False
        if self._hub is not None:
            for gpu_lease in self.gpu_leases:
                self._hub.give_gpu_lease(gpu_lease, self._config.name)

    def _take(self, hub: HubClient) -> bool:
        for gpu_lease in self.gpu_leases:
            self._reporter.waiting(f"{gpu_lease} to leave the GPU")
            reply: GpuLeaseReply
            while not (reply := hub.take_gpu_lease(gpu_lease, self._config.name, wait_s=WAIT_S)).held:
                if reply.stop or self._reporter.stop_requested.is_set():
                    return False
        self._reporter.waiting(None)
        return True

    def _await_engines(self) -> None:
        limit = self._config.recipe.launch.ready_timeout_s
        deadline = time.monotonic() + limit
        for engine in self._config.engines:
            self._reporter.waiting(f"{engine.name} to reserve its part of the GPU")
            while not answers(
                f"{engine.url}/model_info", engine.token or self._config.token, timeout_s=HEALTH_TIMEOUT_S
            ):
                if self._reporter.stop_requested.is_set():
                    return
                if time.monotonic() > deadline:
                    raise RunFailed(f"{engine.name} was not up within {limit:g} s", "look at its log")
                time.sleep(LOOK_S)
        self._reporter.waiting(None)
