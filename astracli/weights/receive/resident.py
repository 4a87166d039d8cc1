"""Changing an engine's weights where they lie: everything that can be done before the pause is done before it.

While the engine still generates, a decoded version is turned into flat indices and values on the device, and a table
of where each run of them goes; a full version is staged (`staging.py`). In the pause there is one scatter over all
tensors, or a copy for each of them, and one pass of digests.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from astracli.weights.device.difference import bits_torch, from_order, to_order
from astracli.weights.device.host import to_device
from astracli.weights.format import digest, flat
from astracli.weights.format.flat import KINDS
from astracli.weights.receive.placement import EngineSlice
from astracli.weights.receive.reading import Prepared
from astracli.weights.receive.staging import SPARE_BYTES, Copy, Held, Staging, Where


@dataclass
class Run:
    """Changes of one contiguous view."""

    view: torch.Tensor
    """Signed integers, sharing the parameter's memory."""
    values: slice
    """Of the scatter's values."""
    indices: slice | None
    """Of the scatter's indices; None: consecutive elements."""
    kind: int
    shift: int = 0
    """What is added to an index to count from the view's first element; without indices, the first of the elements."""


@dataclass
class Scatter:
    """All changes of one step among elements of one width."""

    runs: list[Run]
    values: torch.Tensor
    """int16 or int32: zigzag undone, modulo 2^width; on the device, or pinned."""
    indices: torch.Tensor
    """int32; with a run's shift, inside its view."""
    table: torch.Tensor | None = None
    """The kernel's work items; None without Triton."""

    def run(self, device: torch.device) -> None:
        values, indices = (t.to(device, non_blocking=True) for t in (self.values, self.indices))
        if self.table is None:
            self.by_torch(values, indices)
        else:
            from astracli.weights.device import scatter_kernels

            scatter_kernels.scatter(self.table, values, indices)

    def by_torch(self, values: torch.Tensor, indices: torch.Tensor) -> None:
        """The kernel's work in torch operations, a few for each run."""
        for run in self.runs:
            value = values[run.values]
            at: Any = slice(run.shift, run.shift + len(value))
            if run.indices is not None:
                at = indices[run.indices].long() + run.shift
            old = run.view[at]
            if run.kind == KINDS["ulp"]:
                value = from_order(to_order(old) + value)
            elif run.kind == KINDS["xor"]:
                value = old ^ value
            run.view[at] = value


@dataclass
class Step:
    scatters: list[Scatter]
    copies: list[Copy]
    """Of a full version, in its file: through pinned chunks in the pause."""
    held: Held | None = None
    """Of a full version, staged: then `copies` is empty."""


@dataclass
class Resident:
    """An engine's weights, as views of its parameters on one device: applies versions and takes digests."""

    placed: Mapping[str, Sequence[EngineSlice]]
    spent: dict[str, float] = field(default_factory=dict)
    """Seconds of the last `digests`: making tables, starting the kernels, waiting for the device."""
    _plans: dict[tuple[str, ...], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        views = (place.view for places in self.placed.values() for place in places)
        self.device = next((view.device for view in views), torch.device("cpu"))
        self._triton = self.device.type == "cuda" and find_spec("triton") is not None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        # made once: every torch call releases the interpreter, and a thread beside a busy one waits to get it back
        self._bits = {name: [(p, bits_torch(p.view)) for p in places] for name, places in self.placed.items()}

    # ---- before the pause ----

    def load(self, prepared: Prepared) -> None:
        """Bring a decoded version to the device, in any thread; its decoded form on the host is given up."""
        if prepared.loaded is not None:
            assert prepared.loaded_by is self, "loaded for other weights: its addresses are not these"
            return
        begin = time.perf_counter()
        if self._stream is None:
            steps = [self._step(step) for step in prepared.flat]
        else:
            with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
                steps = [self._step(step) for step in prepared.flat]
            self._stream.synchronize()
        prepared.loaded, prepared.loaded_by, prepared.flat = steps, self, []
        prepared.load_s += time.perf_counter() - begin

    def stage(self, prepared: Prepared, staging: Staging) -> None:
        """Bring the bits of a full version that is loaded out of its file, as near to the weights as there is room."""
        begin = time.perf_counter()
        bringing = [step for step in prepared.loaded or () if step.copies]
        for step in (
            bringing if len(bringing) == 1 else ()
        ):  # of two, an adapter behind a full version, the first is lost
            if (held := staging.hold(step.copies)) is not None:
                step.held, step.copies = held, []
        prepared.load_s += time.perf_counter() - begin

    def fits(self, prepared: Prepared) -> bool:
        """Whether what was loaded, if anything was, can still be applied to these weights."""
        steps = prepared.loaded
        return steps is None or (prepared.loaded_by is self and all(s.held is None or s.held.valid for s in steps))

    @staticmethod
    def waits(prepared: Prepared) -> Where | None:
        """Where a full version that is about to be applied has been staged; None for other versions."""
        if not prepared.brings_tensors:
            return None
        return next((step.held.where for step in prepared.loaded or () if step.held is not None), "file")

    def _step(self, step: flat.FlatStep) -> Step:
        copies = []
        for name, start, bits in step.raws:
            for place, view in self._bits[name]:
                low, high = max(start, place.offset), min(start + len(bits), place.end)
                if low < high:
                    whole = high - low == len(view)
                    target = view if whole else view[low - place.offset : high - place.offset]
                    copies.append((target, bits[low - start : high - start]))
        return Step([self._scatter(group, step.borrowed) for group in step.groups], copies)

    def _scatter(self, group: flat.WidthGroup, borrowed: bool) -> Scatter:
        """Few calls, each on whole arrays: this thread competes with the engine's for the interpreter."""
        values, indices = (torch.from_numpy(a) for a in (group.values.view(f"<i{group.width}"), group.indices))
        runs = [run for span in group.spans for run in self._runs(span, group.indices)]
        room = self._stream is not None
        if room:
            room = torch.cuda.mem_get_info(self.device)[0] > values.nbytes + indices.nbytes + SPARE_BYTES
        if room:
            values, indices = values.to(self.device), indices.to(self.device)
        elif self._stream is not None:
            values, indices = values.pin_memory(), indices.pin_memory()
        elif borrowed:
            values, indices = values.clone(), indices.clone()
        scatter = Scatter(runs, values, indices)
        if self._triton:
            from astracli.weights.device.scatter_kernels import work_items

            rows = [
                (
                    run.view.data_ptr() + run.shift * run.view.element_size(),
                    run.values.start,
                    -1 if run.indices is None else run.indices.start,
                    run.values.stop - run.values.start,
                    run.kind,
                )
                for run in runs
            ]
            scatter.table = torch.from_numpy(work_items(rows)).to(self.device)
        return scatter

    def _runs(self, span: flat.Span, indices: np.ndarray[Any, Any]) -> Iterator[Run]:
        """The parts of a span by the views that they fall into."""
        for place, view in self._bits[span.name]:
            low, high = max(span.start, place.offset), min(span.start + span.length, place.end)
            if low >= high:
                continue
            if span.index_at < 0:
                where = slice(span.value_at + low - span.start, span.value_at + high - span.start)
                yield Run(view, where, None, span.kind, low - place.offset)
                continue
            first, last = 0, span.size
            if high - low < span.length:
                own = indices[span.index_at : span.index_at + span.size]
                first, last = (int(k) for k in np.searchsorted(own, (low - span.start, high - span.start)))
            if first < last:
                where = slice(span.value_at + first, span.value_at + last)
                chosen = slice(span.index_at + first, span.index_at + last)
                yield Run(view, where, chosen, span.kind, span.start - place.offset)

    # ---- in the pause ----

    def apply(self, prepared: Prepared) -> None:
        self.load(prepared)
        if self._stream is not None:
            torch.cuda.synchronize(self.device)  # a batch that was under way has read the old weights by now
        for step in prepared.loaded or ():
            if step.held is not None:
                step.held.copy()
            to_device(step.copies)
            for scatter in step.scatters:
                scatter.run(self.device)
        if self._stream is not None:
            torch.cuda.synchronize(self.device)

    def plan(self, names: Iterable[str]) -> Any:
        """The tables of one pass of digests over `names`, made once; None: none are needed here."""
        wanted = tuple(names)
        if wanted and self._triton and wanted not in self._plans:
            from astracli.weights.device.scatter_kernels import DigestPlan

            pairs = [(place, slot) for slot, name in enumerate(wanted) for place in self.placed[name]]
            self._plans[wanted] = DigestPlan([(p.view, p.offset) for p, _ in pairs], [slot for _, slot in pairs])
        return self._plans.get(wanted)

    def digests(self, names: Iterable[str]) -> dict[str, str]:
        """HF name -> digest of what the views hold now: one pass, one wait. `spent` says where the time went."""
        wanted, times = tuple(names), [time.perf_counter()]
        plan = self.plan(wanted)
        times.append(time.perf_counter())
        sums = plan.launch() if plan is not None else None
        times.append(time.perf_counter())
        lanes = [_lanes(self.placed[name]) for name in wanted] if sums is None else digest.lanes_of(sums)
        times.append(time.perf_counter())
        parts = ("tables_s", "launch_s", "device_s")
        self.spent = {part: end - begin for part, (begin, end) in zip(parts, pairwise(times), strict=True)}
        return {name: digest.to_hex(found) for name, found in zip(wanted, lanes, strict=True)}


def _lanes(places: Sequence[EngineSlice]) -> digest.Lanes:
    return reduce(digest.add, (digest.digest_tensor(place.view, place.offset) for place in places), digest.ZERO)
