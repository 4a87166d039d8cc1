"""Where a model keeps every HF tensor, found through the `load_weights` of its own that fuses and shards them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from astracli.weights import WeightMismatch
from astracli.weights.format.manifest import TensorEntry

_MAX_RUNS = 1 << 16  # contiguous runs that one copy may fall into


@dataclass(frozen=True)
class EngineSlice:
    """Where a range of one flattened HF tensor lies in the engine."""

    view: torch.Tensor
    """Flat, contiguous, sharing memory with the engine's parameter, in the wire dtype."""
    offset: int
    """Of its first element in the flattened HF tensor."""

    @property
    def end(self) -> int:
        return self.offset + self.view.numel()


Target = torch.Tensor | Sequence[EngineSlice]
"""A contiguous tensor of the HF shape, or the slices that make it up."""


def placements(target: Target) -> Sequence[EngineSlice]:
    """A target as slices. Raises WeightMismatch for a tensor that is not contiguous."""
    if isinstance(target, Sequence):
        return target
    if not target.is_contiguous():
        raise WeightMismatch(f"a tensor of shape {list(target.shape)} is not contiguous and cannot change in place")
    return [EngineSlice(target.detach().view(-1), 0)]


class PlacementRecorder(TorchFunctionMode):
    """Records where the model keeps every HF tensor. Changes no weight.

    Sees every `dst.copy_(src)` and `dst[index] = src` whose source is one of the tensors being fed, and lets none run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fed: dict[int, tuple[str, torch.Tensor]] = {}
        self.found: dict[str, list[EngineSlice]] = {}

    def feed(self, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        if tensor.numel():
            self.fed[tensor.untyped_storage().data_ptr()] = (name, tensor)
        return name, tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.copy_:
            source = args[1] if len(args) > 1 else kwargs["src"]
            if name := self._name(source):
                self.moved(name, args[0], source)
                return args[0]
        if func is torch.Tensor.__setitem__ and (name := self._name(args[2])):
            target = args[0][args[1]]
            if target.untyped_storage().data_ptr() != args[0].untyped_storage().data_ptr():
                raise WeightMismatch(f"`{name}` is written through an index that is no slice")
            self.moved(name, target, args[2])
            return None
        return func(*args, **kwargs)

    def _name(self, source: Any) -> str:
        if not isinstance(source, torch.Tensor) or not source.numel():
            return ""
        return self.fed.get(source.untyped_storage().data_ptr(), ("", source))[0]

    def record(self, model: Any, entries: Iterable[TensorEntry]) -> dict[str, list[EngineSlice]]:
        """{HF name: placements in ascending order}. Raises WeightMismatch naming tensors that the model did not take
        whole, exactly once: a name that it does not know is otherwise skipped without a word."""
        entries = list(entries)
        self.found = {entry.name: [] for entry in entries}
        with torch.no_grad(), self:
            # never written, so never given physical memory
            model.load_weights(self.feed(e.name, torch.empty(e.shape, dtype=getattr(torch, e.dtype))) for e in entries)
        self.fed.clear()
        problems = []
        for entry in entries:
            places = self.found[entry.name] = _merged(sorted(self.found[entry.name], key=lambda p: p.offset))
            ends = [0, *(p.end for p in places)]
            if any(p.offset != end for p, end in zip(places, ends, strict=False)) or ends[-1] != entry.numel:
                problems.append(f"{entry.name} ({sum(p.view.numel() for p in places)} of {entry.numel} elements)")
        if problems:
            raise WeightMismatch(
                f"the engine's load_weights does not place {len(problems)} tensors: {', '.join(problems[:5])}",
                "the published names must be those that this engine's model class loads",
            )
        return self.found

    def moved(self, name: str, target: torch.Tensor, source: torch.Tensor) -> None:
        """`source`, a view of the tensor fed as `name`, is to be written to `target`."""
        if target.numel() != source.numel() or target.dtype != source.dtype:
            raise WeightMismatch(
                f"`{name}`: {source.dtype}{list(source.shape)} is loaded into {target.dtype}{list(target.shape)}",
                "publish this tensor in the dtype in which the engine holds it",
            )
        self.found[name] += [EngineSlice(view, offset) for view, offset in _runs(target.detach(), source)]
        if len(self.found[name]) > _MAX_RUNS:
            raise WeightMismatch(f"`{name}` lies in more than {_MAX_RUNS} places")


def _runs(target: torch.Tensor, source: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
    """(flat view of `target`, offset in the fed tensor) for the contiguous runs that both sides share."""
    if target.is_contiguous() and source.is_contiguous():
        yield target.view(-1), int(source.storage_offset())
    elif target.shape == source.shape and len(target) <= _MAX_RUNS:
        for one, other in zip(target, source, strict=True):
            yield from _runs(one, other)
    else:
        raise WeightMismatch(f"no contiguous runs in {list(target.shape)} loaded from {list(source.shape)}")


def _merged(places: list[EngineSlice]) -> list[EngineSlice]:
    """Neighbours that also lie side by side in memory become one."""
    merged: list[EngineSlice] = []
    for place in places:
        last = merged[-1] if merged else None
        if last is not None and place.offset == last.end and _adjacent(last.view, place.view):
            length = last.view.numel() + place.view.numel()
            merged[-1] = EngineSlice(last.view.as_strided((length,), (1,), last.view.storage_offset()), last.offset)
        else:
            merged.append(place)
    return merged


def _adjacent(one: torch.Tensor, two: torch.Tensor) -> bool:
    same = one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr()
    return same and one.storage_offset() + one.numel() == two.storage_offset()
