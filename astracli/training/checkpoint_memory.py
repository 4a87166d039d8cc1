"""Host memory for the copies from which checkpoints are written, in blocks that are used again."""

from __future__ import annotations

import queue
import sys
import threading

from torch import Tensor

from astracli.kernels.upload import host_memory
from astracli.machine.read import system
from astracli.training.fsdp import Ranks

BLOCK_BYTES = 1 << 28
LEAST_BLOCKS = 4
"""Where there is no memory for all of them: one is filled, one written, two wait."""
ROOM = 0.8
"""Part of the host's spare memory, now and by the plan, that the copies of all ranks may fill."""


class CopyMemory:
    """One rank's blocks. A thread makes them: to pin tens of GB takes seconds."""

    def __init__(self, state: int, ranks: Ranks, *, beside: bool, others: int):
        """`state`: bytes of a whole copy. `beside`: steps go on meanwhile, so that it needs memory. `others`: bytes of
        the host's memory that everything else of the run may come to need."""
        self.block_bytes = min(BLOCK_BYTES, state)
        self.blocks: list[Tensor] = []
        self._free: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        most = LEAST_BLOCKS
        if beside:
            host = system()
            room = ROOM * min(host.memory_available, host.memory_total - others) / ranks.world_size
            most = max(LEAST_BLOCKS, int(room // self.block_bytes))
        count = min(-(-state // self.block_bytes), most)
        self._thread = threading.Thread(target=self._make, args=(count, ranks), name="checkpoint-memory", daemon=True)
        self._thread.start()

    def _make(self, count: int, ranks: Ranks) -> None:
        try:
            for _ in range(count):
                self.blocks.append(host_memory(self.block_bytes, ranks.device, self))
                self._free.put(self.blocks[-1])
        except Exception as error:
            found = f"{len(self.blocks)} of {count} blocks of memory for the checkpoint's copy: {error}"
            print(f"warning: {found}", file=sys.stderr, flush=True)
            if not self.blocks:  # with some blocks the copy is slower
                self._error = error
                self._free.put(None)

    def wait(self) -> None:
        """Until all blocks are made."""
        self._thread.join()

    def take(self) -> Tensor | None:
        """The next free block; None after `give(None)`. Raises the error of a host that has no memory at all."""
        block = self._free.get()
        if block is None and self._error is not None:
            raise self._error
        return block

    def give(self, block: Tensor | None) -> None:
        """Take back a block; None ends a `take` that waits."""
        self._free.put(block)
