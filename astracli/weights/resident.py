"""Applying to weights that live on a GPU: everything that can be done before the pause is done before it.

While the engine still generates, a decoded version is turned into flat indices and values on the device, and a table
of where each run of them goes. In the pause there is one scatter over all tensors and one pass of digests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from astracli.weights import codec, digest
from astracli.weights.device import bits_torch, from_order, to_order
from astracli.weights.host import to_device
from astracli.weights.staged import Placement, Prepared, overlaps

BLOCK = 1024
"""Changed elements of one work item of the kernel."""
SPARE_BYTES = 1 << 30
"""Device memory that staging leaves free; what does not fit stays in pinned memory and is copied in the pause."""
_KINDS = {"ulp": 0, "xor": 1, "raw": 2}


@dataclass
class Run:
    """Changes of one contiguous view."""

    view: torch.Tensor
    """Signed integers, sharing the parameter's memory."""
    values: slice
    """Of the scatter's values."""
    indices: slice | None
    """Of the scatter's indices; None: every element of the view."""
    kind: int


@dataclass
class Scatter:
    """All changes of one step among elements of one width."""

    runs: list[Run]
    values: torch.Tensor
    """int16 or int32: zigzag undone, modulo 2^width; on the device, or pinned."""
    indices: torch.Tensor
    """int32, inside the run's view."""
    table: torch.Tensor | None = None
    """The kernel's work items; None without Triton."""

    def run(self, device: torch.device) -> None:
        values, indices = (t.to(device, non_blocking=True) for t in (self.values, self.indices))
        if self.table is None:
            self.by_torch(values, indices)
        else:
            from astracli.weights import kernels

            kernels.scatter(self.table, values, indices)

    def by_torch(self, values: torch.Tensor, indices: torch.Tensor) -> None:
        """The kernel's work in torch operations, a few for each run."""
        for run in self.runs:
            value = values[run.values]
            at = slice(None) if run.indices is None else indices[run.indices].long()
            old = run.view[at]
            if run.kind == _KINDS["ulp"]:
                value = from_order(to_order(old) + value)
            elif run.kind == _KINDS["xor"]:
                value = old ^ value
            run.view[at] = value


@dataclass
class Step:
    scatters: list[Scatter]
    copies: list[tuple[torch.Tensor, np.ndarray[Any, Any]]]
    """(view, its new bits in a mapped file): of a full version, copied in the pause."""


@dataclass
class Resident:
    """The hands of an engine whose weights are views of its parameters, on one device."""

    placed: Mapping[str, Sequence[Placement]]
    _digests: dict[tuple[str, ...], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device = next(p.view.device for places in self.placed.values() for p in places)
        self._triton = self.device.type == "cuda" and find_spec("triton") is not None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    # ---- before the pause ----

    def load(self, prepared: Prepared) -> None:
        """Bring a decoded version to the device, in any thread; its decoded form on the host is given up."""
        if prepared.loaded is not None:
            return
        if self._stream is None:
            steps = [self._step(updates) for updates in prepared.steps]
        else:
            with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
                steps = [self._step(updates) for updates in prepared.steps]
            self._stream.synchronize()
        prepared.loaded, prepared.steps = steps, []

    def _step(self, updates: Sequence[tuple[str, int, codec.Update]]) -> Step:
        found: dict[int, list[tuple[torch.Tensor, codec.Update]]] = {2: [], 4: []}
        copies = []
        for name, start, update in updates:
            for view, part in overlaps(update, start, self.placed[name]):
                if update.encoding == "raw":
                    copies.append((bits_torch(view), part.values))
                else:
                    found[view.element_size()].append((bits_torch(view), part))
        return Step([self._scatter(width, parts) for width, parts in found.items() if parts], copies)

    def _scatter(self, width: int, parts: Sequence[tuple[torch.Tensor, codec.Update]]) -> Scatter:
        on_gpu = self._stream is not None
        total = sum(len(part.values) for _, part in parts)
        indexed = sum(len(part.indices) for _, part in parts if part.indices is not None)
        values = torch.empty(total, dtype=torch.int16 if width == 2 else torch.int32, pin_memory=on_gpu)
        indices = torch.empty(indexed, dtype=torch.int32, pin_memory=on_gpu)
        to_values, to_indices = values.numpy().view(f"<u{width}"), indices.numpy()
        runs, at, index_at = [], 0, 0
        for view, part in parts:
            where = slice(at, at + len(part.values))
            to_values[where] = part.values
            at = where.stop
            chosen = None
            if part.indices is not None:
                chosen = slice(index_at, index_at + len(part.indices))
                to_indices[chosen] = part.indices
                index_at = chosen.stop
            runs.append(Run(view, where, chosen, _KINDS[part.encoding.split("-")[1]]))
        scatter = Scatter(runs, values, indices)
        if self._triton:
            scatter.table = torch.from_numpy(work_items(runs)).to(self.device)
        if on_gpu and torch.cuda.mem_get_info(self.device)[0] > values.nbytes + indices.nbytes + SPARE_BYTES:
            scatter.values, scatter.indices = (t.to(self.device, non_blocking=True) for t in (values, indices))
        return scatter

    # ---- in the pause ----

    def apply(self, prepared: Prepared) -> None:
        self.load(prepared)
        if self._stream is not None:
            torch.cuda.synchronize(self.device)  # a batch that was under way has read the old weights by now
        for step in prepared.loaded or ():
            to_device(step.copies)
            for scatter in step.scatters:
                scatter.run(self.device)
        if self._stream is not None:
            torch.cuda.synchronize(self.device)

    def digests(self, names: Iterable[str]) -> dict[str, str]:
        """HF name -> digest of what the views hold now. The first call for the same names also makes tables."""
        wanted = tuple(names)
        if wanted not in self._digests:
            self._digests[wanted] = self._plan(wanted) if wanted and self._triton else None
        plan = self._digests[wanted]
        if plan is not None:
            lanes = plan.lanes()
        else:
            lanes = [self._lanes(self.placed[name]) for name in wanted]
        return {name: digest.to_hex(found) for name, found in zip(wanted, lanes, strict=True)}

    def _plan(self, names: Sequence[str]) -> Any:
        from astracli.weights.kernels import DigestPlan

        pairs = [(place, slot) for slot, name in enumerate(names) for place in self.placed[name]]
        return DigestPlan([(place.view, place.offset) for place, _ in pairs], [slot for _, slot in pairs])

    @staticmethod
    def _lanes(places: Sequence[Placement]) -> digest.Lanes:
        lanes = digest.ZERO
        for found in digest.digest_many([(place.view, place.offset) for place in places]):
            lanes = digest.add(lanes, found)
        return lanes


def work_items(runs: Sequence[Run]) -> np.ndarray[Any, Any]:
    """int64 [n, 6], as `kernels.scatter` reads it: each run in items of at most BLOCK elements."""
    tables = []
    for run in runs:
        count = run.values.stop - run.values.start
        starts = np.arange(0, count, BLOCK)
        table = np.empty((len(starts), 6), np.int64)
        table[:, 0] = run.view.data_ptr()
        table[:, 1] = run.values.start + starts
        table[:, 2] = -1 if run.indices is None else run.indices.start + starts
        table[:, 3] = starts
        table[:, 4] = np.minimum(BLOCK, count - starts)
        table[:, 5] = run.kind
        tables.append(table)
    return np.concatenate(tables)
