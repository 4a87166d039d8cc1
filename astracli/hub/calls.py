"""The hub's endpoints as clients call them: each function makes the call, whose type says what is answered."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from astracli.hub.slot_shares import User
from astracli.hub.types import (
    EngineState,
    GpuLeaseReply,
    Holders,
    HubState,
    Leases,
    NextBatch,
    NextEvaluation,
    PutStatus,
    SlotLimit,
    Target,
)
from astracli.hub.wire import MAX_WAIT_S, plain_json
from astracli.rl.types import Group, pack_group

T = TypeVar("T")


@dataclass(frozen=True)
class Call(Generic[T]):
    """A call that is answered with a T."""

    path: str
    content: bytes
    kind: Any
    """T as `wire.unpack_answer` takes it."""
    method: str = "POST"


def _post(path: str, kind: Any, **body: Any) -> Call[Any]:
    return Call(path, plain_json(body), kind)


def lease(worker: str, n: int, *, engine: str | None = None, wait_s: float = 0.0) -> Call[Leases]:
    request = uuid.uuid4().hex
    return _post("/lease", Leases, worker=worker, n=n, engine=engine, wait_s=wait_s, request=request)


def renew(lease_ids: Iterable[int], worker: str | None = None) -> Call[list[int]]:
    """Answers those of the leases that are lost."""
    return _post("/lease/renew", list[int], lease_ids=list(lease_ids), worker=worker)


def give_back(lease_ids: Iterable[int]) -> Call[None]:
    """Leases that will not be filled return to the queue."""
    return _post("/lease/return", None, lease_ids=list(lease_ids))


def release(worker: str) -> Call[int]:
    """Every lease that `worker` holds returns to the queue. Answers how many."""
    return _post("/lease/release", int, worker=worker)


def put_group(group: Group) -> Call[PutStatus]:
    return Call("/group", pack_group(group), PutStatus, "PUT")


def skip(lease_id: int, reason: str) -> Call[None]:
    return _post("/skip", None, lease_id=lease_id, reason=reason)


def batch(step: int, wait_s: float = MAX_WAIT_S) -> Call[NextBatch]:
    return _post("/batch", NextBatch, step=step, wait_s=wait_s)


def ack(step: int, version: int, checkpoint_step: int | None = None) -> Call[None]:
    return _post("/ack", None, step=step, version=version, checkpoint_step=checkpoint_step)


def announce(version: int, step: int) -> Call[list[int]]:
    """Answers the versions that must stay on disk."""
    return _post("/announce", list[int], version=version, step=step)


def target(engine: str, *, have: int | None = None, pinned: bool | None = None, wait_s: float = 0.0) -> Call[Target]:
    """Waits up to `wait_s` for another version than `have`, for the other of `pinned`, or for someone who wants the
    engine's GPU."""
    return _post("/engine/target", Target, engine=engine, have=have, pinned=pinned, wait_s=wait_s)


def slots(engine: str, user: User, wants: int, holds: int) -> Call[SlotLimit]:
    return _post("/engine/slots", SlotLimit, engine=engine, user=user, wants=wants, holds=holds)


def take_gpu_lease(gpu_lease: str, who: str, wait_s: float = 0.0) -> Call[GpuLeaseReply]:
    """Waits up to `wait_s`, and keeps its place in the queue between two calls."""
    return _post("/gpu_lease/take", GpuLeaseReply, gpu_lease=gpu_lease, who=who, wait_s=wait_s)


def give_gpu_lease(gpu_lease: str, who: str) -> Call[None]:
    return _post("/gpu_lease/give", None, gpu_lease=gpu_lease, who=who)


def engine_state(engine: str, version: int | None, state: EngineState) -> Call[None]:
    return _post("/engine/state", None, engine=engine, version=version, state=state)


def eval_next(wait_s: float = MAX_WAIT_S, *, finishing: Iterable[int] = ()) -> Call[NextEvaluation]:
    """`finishing`: versions whose results are being written, which are left out."""
    return _post("/eval/next", NextEvaluation, wait_s=wait_s, finishing=list(finishing))


def eval_engines(version: int, have: list[str] | None = None, wait_s: float = 0.0) -> Call[Holders]:
    """Waits up to `wait_s` for other engines than `have`."""
    return _post("/eval/engines", Holders, version=version, have=have, wait_s=wait_s)


def eval_release(step: int, version: int, engine: str) -> Call[None]:
    """The engine has served its share of this evaluation, and every sample of it is on disk."""
    return _post("/eval/release", None, step=step, version=version, engine=engine)


def eval_done(step: int, version: int, results: Any) -> Call[None]:
    return _post("/eval/done", None, step=step, version=version, results=results)


def metrics(records: list[dict[str, Any]]) -> Call[None]:
    """Records {"step", "process", figures with their unit in the name}."""
    return _post("/metrics", None, records=records)


def state() -> Call[HubState]:
    return _post("/state", HubState)
