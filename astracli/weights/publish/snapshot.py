"""What is published: a copy of this rank's tensors in their wire dtypes.

It stays on the tensors' device. When there is no room for it, it goes to the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Union

from astracli.errors import RunFailed
from astracli.kernels.upload import host_memory
from astracli.weights.device.host import to_host
from astracli.weights.format import digest
from astracli.weights.format.manifest import ITEM_BYTES
from astracli.weights.publish import payload

if TYPE_CHECKING:
    import torch

SPARE_BYTES = 1 << 30
"""Device memory that the published versions leave free."""


@dataclass(frozen=True)
class Shard:
    """This rank's part of a tensor, when several ranks hold it: a contiguous range of the flattened tensor."""

    flat: torch.Tensor
    start: int
    shape: tuple[int, ...]
    """Of the whole tensor."""


Source = Union["torch.Tensor", Shard]


@dataclass(frozen=True)
class Snapshot:
    tensors: dict[str, payload.Local]
    lanes: dict[str, str] | None
    """Digests, when the tensors left a GPU, which is quicker at them."""
    ready: torch.cuda.Event | None
    """On a GPU: what another stream must wait for."""
    seconds: float


class HostCopy:
    """A version that waits on the host while its GPU is given up, in the same pinned memory as the one before it."""

    def __init__(self) -> None:
        self._there: dict[str, payload.Local] = {}

    def take(self, tensors: Mapping[str, payload.Local]) -> dict[str, payload.Local]:
        """Copies of `tensors`, where those of the last call were. All on one device, the same ones every time."""
        import torch

        if not tensors:
            return {}
        device = next(iter(tensors.values())).flat.device
        if not self._there:
            # all in one: memory is pinned by the page, and a page only once
            starts = list(accumulate((-(-t.flat.nbytes // 16) * 16 for t in tensors.values()), initial=0))
            memory = host_memory(starts[-1], device, self)
            for start, (name, local) in zip(starts, tensors.items(), strict=False):
                flat = memory[start : start + local.flat.nbytes].view(local.flat.dtype)
                self._there[name] = replace(local, flat=flat)
        for name, local in tensors.items():
            self._there[name].flat.copy_(local.flat, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return dict(self._there)


def take(
    tensors: Mapping[str, Source], *, owned: bool, first: bool, stay: bool = False,
    run: Callable[..., Iterable[Any]] = map,
) -> Snapshot:  # fmt: skip
    """Copies of `tensors`; the tensors themselves when they are `owned`. `first`: nothing was published before. `stay`:
    on their device in any case. `run` maps over chunks that go to the host: `map`, or a thread pool's."""
    lanes, begin = None, time.perf_counter()
    taken = {name: local(tensor, copy=not owned) for name, tensor in tensors.items()}
    if not stay and on_gpu(taken) and (first or not room_on_gpu(taken)):
        lanes = lanes_of(taken)
        hosted = to_host({name: t.flat for name, t in taken.items()}, run)
        taken = {name: replace(t, flat=hosted[name]) for name, t in taken.items()}
    ready = None
    if on_gpu(taken):
        import torch

        (device,) = {t.flat.device for t in taken.values()}
        with torch.cuda.device(device):
            ready = torch.cuda.Event()
            ready.record()
    return Snapshot(taken, lanes, ready, time.perf_counter() - begin)


def copies(sources: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.Tensor]:
    """Copies of tensors on one device, in these dtypes. Those of a dtype lie behind one another in one tensor: few
    kernels make them."""
    import torch

    found: dict[str, torch.Tensor] = {}
    for dtype in dict.fromkeys(dtypes[name] for name in sources):
        names = [name for name in sources if dtypes[name] == dtype]
        sizes = [sources[name].numel() for name in names]
        whole = torch.empty(sum(sizes), dtype=dtype, device=sources[names[0]].device)
        views = [part.view(sources[name].shape) for name, part in zip(names, whole.split(sizes), strict=True)]
        torch._foreach_copy_(views, [sources[name] for name in names])
        found |= zip(names, views, strict=True)
    return {name: found[name] for name in sources}


def local(source: Source, *, copy: bool) -> payload.Local:
    """A tensor or shard, flat on its own device. Raises RunFailed for a dtype that does not travel."""
    tensor, start = (source.flat, source.start) if isinstance(source, Shard) else (source, 0)
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in ITEM_BYTES:
        raise RunFailed(f"weights in {dtype} do not travel", f"publish one of {', '.join(ITEM_BYTES)}")
    flat = tensor.detach().contiguous().view(-1)
    if copy and flat.data_ptr() == tensor.data_ptr():
        flat = flat.clone()
    return payload.Local(dtype, tuple(source.shape), start, flat)


def on_gpu(tensors: Mapping[str, payload.Local]) -> bool:
    return any(t.flat.device.type == "cuda" for t in tensors.values())


def room_on_gpu(tensors: Mapping[str, payload.Local]) -> bool:
    """Whether a GPU that holds `tensors` has room for as much again at the moment when it was fullest so far.

    The first version is made before anything was trained, when that moment is not known: it always goes to the host.
    """
    import torch

    (device,) = {t.flat.device for t in tensors.values()}
    needed = sum(t.flat.nbytes for t in tensors.values())
    ours = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return ours - torch.cuda.max_memory_allocated(device) > needed + SPARE_BYTES


def lanes_of(tensors: Mapping[str, payload.Local]) -> dict[str, str]:
    """HF name -> digest of the local range; on a GPU in one pass over all of them."""
    ranges = [(t.flat, t.start) for t in tensors.values()]
    if on_gpu(tensors) and find_spec("triton"):
        from astracli.weights.device.scatter_kernels import DigestPlan

        lanes = DigestPlan(ranges, range(len(ranges))).lanes()
    else:
        lanes = [digest.digest_tensor(*there) for there in ranges]
    return {name: digest.to_hex(found) for name, found in zip(tensors, lanes, strict=True)}
