"""The trainer's side: diff against the last published version, write this rank's payload, then commit (`committer`)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from astracli.errors import RunFailed
from astracli.weights.format.manifest import STABLE, BaseFile, version_name
from astracli.weights.publish import payload, retention
from astracli.weights.publish.committer import Committer
from astracli.weights.publish.encoder import EncoderProcess
from astracli.weights.publish.snapshot import HostCopy, Snapshot, Source, lanes_of, local, take

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PublishResult:
    """What one version cost. Bytes and counts are of all ranks, seconds of this rank."""

    version: int
    bytes_delta: int
    """Of the delta, or of the adapter; 0 when the version has neither."""
    bytes_full: int
    """Of the full payload, or what one would take: every element in its wire dtype."""
    full_written: bool
    changed: int
    elements: int
    digest_s: float
    delta_s: float
    """From the first comparison to the delta's last byte."""
    diff_s: float
    encode_s: float
    write_s: float
    publish_s: float
    """Everything, the wait for other ranks included."""
    waited_s: float = 0.0
    """How long the caller stood still because the previous version was still being written."""
    snapshot_s: float = 0.0
    """How long the caller stood still for the copy that is published."""
    by_adapter: bool = False
    """`bytes_delta` is an adapter's; `changed` counts all elements that it belongs to."""

    @property
    def bytes(self) -> int:
        """What a receiver of the previous version fetches."""
        return self.bytes_delta or (self.bytes_full if self.full_written else 0)

    @property
    def density(self) -> float:
        """Changed elements as a fraction; 1 for a version without a delta."""
        return self.changed / self.elements if self.elements else 0.0

    @property
    def bytes_per_changed(self) -> float:
        return self.bytes / self.changed if self.changed else 0.0


class Publisher:
    """Publishes versions into `directory`. Keeps its own copy of the last version, in the wire dtype.

    With several ranks every rank makes one with the same `session` (a text that no earlier attempt used) and publishes
    the same versions; every element of a tensor is given by exactly one rank. `frozen` tensors never change: their
    digests stand in every manifest; `tied` maps a name that never travels to the one that does. `leaves`: the device is
    given up between versions; what the next is compared with waits on the host, and nothing is published in the
    background. `base`: with adapters, where the tensors lie that they are merged into.
    """

    def __init__(
        self, directory: Path, *, transfer: Literal["full", "delta", "adapter"] = "delta", full_interval: int = 10,
        keep: int = 12, level: int = 1, model_name: str = "", rank: int = 0, world_size: int = 1, session: str = "",
        frozen: Mapping[str, Source] | None = None, tied: Mapping[str, str] | None = None,
        pinned: Callable[[int], bool] = lambda version: False, threads: int = 1, leaves: bool = False,
        base: Mapping[str, BaseFile] | None = None, rank_timeout_s: float = 600.0,
    ):  # fmt: skip
        if world_size > 1 and not session:
            raise ValueError("several ranks need a session that no earlier attempt used")
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.transfer, self.full_interval, self.keep, self.level = transfer, full_interval, keep, level
        self.rank, self.pinned = rank, pinned
        frozen_locals = {name: local(source, copy=False) for name, source in (frozen or {}).items()}
        never_sent = payload.Part("full", payload.described(frozen_locals, lanes_of(frozen_locals)))
        self._ranks = Committer(
            model_name, rank, world_size, session, rank_timeout_s, never_sent, dict(tied or {}), dict(base or {})
        )
        self.base: dict[str, payload.Local] = {}
        self._base_version: int | None = None
        self._known: dict[str, tuple[Any, ...]] = {}
        """What the tensors of the last version were."""
        self._threads = ThreadPoolExecutor(threads, "weights-encode") if threads > 1 else None
        self._encoder = EncoderProcess(threads)
        self._background = ThreadPoolExecutor(1, "weights-publish")
        self._rest = HostCopy() if leaves else None
        self._pending: Future[PublishResult] | None = None
        self._stream: torch.cuda.Stream | None = None
        self.on_failure: Callable[[BaseException], None] | None = None
        """Called in the background with its error, before that comes out of the next call."""

    # ---- what the trainer calls ----

    def publish(
        self, version: int, tensors: Mapping[str, Source], *, owned: bool = False,
        factors: payload.Factors | None = None,
    ) -> PublishResult:  # fmt: skip
        """Publish now, in this thread. `tensors`: HF name -> tensor in its wire dtype (or this rank's Shard). With
        `transfer` "adapter", `factors` are those that are merged into them.

        `owned`: the caller never writes to `tensors` again, so they need no copy. From the second version on, tensors
        on a GPU with room for another version are compared and coded there; otherwise they come to the host.
        """
        waited = self.settle()
        taken = self._take(version, tensors, owned)
        result = self.publish_now(version, taken.tensors, taken.lanes, factors)
        return replace(result, waited_s=waited, snapshot_s=taken.seconds)

    def publish_async(
        self, version: int, tensors: Mapping[str, Source], on_published: Callable[[PublishResult], None] | None = None,
        *, owned: bool = False, factors: payload.Factors | None = None,
    ) -> float:  # fmt: skip
        """Publish a copy of `tensors` in the background. Returns the seconds waited for the previous version.

        An error of the background comes out of the next call, of `check`, `settle`, `wait` or `close`. `on_published`
        runs in the background, behind STABLE; what it raises is an error of the background too.
        """
        if self._rest is not None:
            raise ValueError("what leaves its device is not published in the background")
        waited = self.settle()
        taken = self._take(version, tensors, owned)

        def work() -> PublishResult:
            try:
                with self._beside(taken):
                    result = self.publish_now(version, taken.tensors, taken.lanes, factors)
                result = replace(result, waited_s=waited, snapshot_s=taken.seconds)
                if on_published:
                    on_published(result)
            except BaseException as error:
                if self.on_failure:
                    self.on_failure(error)
                raise
            return result

        self._pending = self._background.submit(work)
        return waited

    @property
    def busy(self) -> bool:
        """Whether the background is at work."""
        return self._pending is not None and not self._pending.done()

    def check(self) -> None:
        """Raise the background's error, if it has come to one."""
        if self._pending is not None and self._pending.done():
            self._pending.result()

    def settle(self) -> float:
        """Until the background is done: the seconds that took. Raises its error."""
        begin = time.perf_counter()
        self.wait()
        return time.perf_counter() - begin

    def wait(self) -> PublishResult | None:
        """Until the background is done: its result, or None when nothing was under way. Raises its error."""
        pending, self._pending = self._pending, None
        return pending.result() if pending else None

    def restart(
        self, version: int, tensors: Mapping[str, Source], *, owned: bool = False,
        factors: payload.Factors | None = None,
    ) -> PublishResult:  # fmt: skip
        """Continue from a checkpoint: forget every version after `version` and publish `version` anew, in full."""
        self.settle()
        self.base, self._base_version, self._known = {}, None, {}
        if self.rank == 0:
            for path in self.directory.glob("v[0-9]*"):
                number = int(path.name[1:])
                if number > version:
                    retention.remove(self.directory, number)
            (self.directory / version_name(version) / STABLE).unlink(missing_ok=True)
        taken = self._take(version, tensors, owned)
        return replace(self.publish_now(version, taken.tensors, taken.lanes, factors), snapshot_s=taken.seconds)

    def close(self) -> None:
        """Finish the background, end the threads. Raises the background's error."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._encoder.close()
            if self._threads:
                self._threads.shutdown()

    # ---- one version ----

    @property
    def _run(self) -> Callable[..., Iterable[Any]]:
        """`map` over chunks or pieces, in threads when there are some."""
        return self._threads.map if self._threads else map

    def by_digest(self, version: int) -> bool:
        """Whether no byte of the tensors of `version` is needed, only their digests: an adapter alone travels."""
        return self._base_version is not None and self.transfer == "adapter" and version % self.full_interval > 0

    def _take(self, version: int, tensors: Mapping[str, Source], owned: bool) -> Snapshot:
        if self.by_digest(version):
            begin = time.perf_counter()
            locals_ = {name: local(tensor, copy=False) for name, tensor in tensors.items()}
            return Snapshot(locals_, lanes_of(locals_), None, time.perf_counter() - begin)
        stay = self._rest is not None  # its copy is made behind the version, and nobody trains until then
        to_host = (
            self._base_version is None or self.transfer == "adapter"
        )  # with adapters, nothing is compared on a GPU
        return take(tensors, owned=owned or stay, first=to_host, stay=stay, run=self._run)

    @contextlib.contextmanager
    def _beside(self, taken: Snapshot) -> Iterator[None]:
        """On a GPU a stream of its own, behind the snapshot: training goes on beside it."""
        if taken.ready is None:
            yield
            return
        import torch

        self._stream = self._stream or torch.cuda.Stream(next(iter(taken.tensors.values())).flat.device)
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            self._stream.wait_event(taken.ready)
            try:
                yield
            finally:  # it reads what the caller may free
                self._stream.synchronize()

    def publish_now(
        self, version: int, tensors: dict[str, payload.Local], lanes: dict[str, str] | None,
        factors: payload.Factors | None = None,
    ) -> PublishResult:  # fmt: skip
        begin = time.perf_counter()
        directory = self.directory / version_name(version)
        if self.rank == 0 and (directory / STABLE).exists():
            raise RunFailed(f"version {version} is published already in `{directory}`", "continue with `restart`")
        if self._base_version is not None and version <= self._base_version:
            raise RunFailed(f"version {version} after version {self._base_version}")
        self._check_names(version, tensors)
        directory.mkdir(exist_ok=True)
        lanes = lanes or lanes_of(tensors)
        digest_s = time.perf_counter() - begin
        delta = self._base_version is not None and self.transfer == "delta"
        adapter = self._base_version is not None and self.transfer == "adapter"
        parts = []
        run, delta_s = self._run, 0.0
        if delta:
            compared = time.perf_counter()
            where = (directory, self.rank, tensors, self.base, lanes, self.level)
            parts.append(payload.write_delta(*where, run, self._encoder))
            delta_s = time.perf_counter() - compared
        if adapter:
            assert factors is not None, "an adapter travels, and none was given"
            parts.append(payload.write_adapter(directory, self.rank, tensors, lanes, factors))
        if not (delta or adapter) or version % self.full_interval == 0:
            parts.append(payload.write_full(directory, self.rank, tensors, lanes, run))
        manifests = self._ranks.commit(directory, version, self._base_version, parts)
        if self.transfer == "adapter":
            tensors = {}  # nothing is compared with them
        elif self._rest is not None:
            self._base_version = None  # its copy is overwritten: a delta from half of that would be from no version
            tensors = self._rest.take(tensors)
        self.base, self._base_version = tensors, version
        if self.rank == 0:
            retention.prune(self.directory, version, self.keep, self.pinned)
        first, size = manifests[0], {m.kind: m.payload_bytes for m in manifests}
        return PublishResult(
            version=version,
            bytes_delta=size.get("delta", size.get("adapter", 0)),
            bytes_full=size.get("full", sum(t.numel * t.itemsize for t in first.tensors)),
            full_written="full" in size,
            changed=first.changed,
            elements=first.elements,
            digest_s=digest_s,
            delta_s=delta_s,
            diff_s=sum(p.diff_s for p in parts),
            encode_s=sum(p.encode_s for p in parts),
            write_s=sum(p.write_s for p in parts),
            publish_s=time.perf_counter() - begin,
            by_adapter=adapter,
        )

    def _check_names(self, version: int, tensors: Mapping[str, payload.Local]) -> None:
        known = self._known
        given = {n: (t.dtype, t.shape, t.start, len(t)) for n, t in tensors.items()}
        if known and known != given:
            odd = sorted(n for n in known.keys() | given.keys() if known.get(n) != given.get(n))
            raise RunFailed(f"version {version} has other tensors than {self._base_version}: {', '.join(odd[:5])}")
        self._known = given
