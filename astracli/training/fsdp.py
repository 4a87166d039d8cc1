"""The ranks of a trainer: their process group, what they exchange, and FSDP2 sharding of a policy.

One rank needs neither a process group nor wrapping. On a GPU its parameters are stored in bf16, and each is the upper
part of its split master (`split_masters`). FSDP2 on a mesh of one (`wrapped`, for comparison) computes the same, but it
copies and casts every parameter in every pass. Several ranks that divide the optimizer alone (`sharded_optimizer`)
compute as one rank does; with every other `train.sharding` FSDP2 wraps the policy. Ranks find each other by the
torchrun variables RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from astracli.config.recipe_train import RECOMPUTED_BLOCKS, Recomputed, Sharding
from astracli.errors import UserError
from astracli.machine.memory import CUDA_CONTEXT
from astracli.process import ports

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

RENDEZVOUS = timedelta(minutes=10)
WAIT = timedelta(days=7)
"""Ranks wait for rank 0, and rank 0 for the hub's batch, however long that takes. The heartbeat ends an orphan."""
COLLECTIVE = timedelta(minutes=30)
"""Limit of a collective inside a step, a checkpoint or an export: a rank that has not come by then never will."""
RELEASE_S = 0.2


@dataclass
class Ranks:
    """This process among the trainer's."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None
    """None: no process group, nothing is sharded."""
    cpu_group: Any = None
    """The gloo group of the messages between steps; the default group carries what a step computes."""
    compute: torch.dtype | None = None
    """What a policy computes in; None: bf16 on a GPU, fp32 on a CPU."""
    sharding: Sharding = "full"
    """What several ranks divide among them."""
    rate: float = 0.0
    """Bytes/s from each rank to the next, measured at the start; 0 of one rank."""

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def precision(self) -> torch.dtype:
        """What a policy computes in, except for the parameters that the engine holds in fp32."""
        return self.compute or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)

    @property
    def wraps(self) -> bool:
        """Whether FSDP shards the policy. Otherwise this rank holds it whole."""
        return self.mesh is not None and self.sharding != "optimizer"

    @property
    def divides_optimizer(self) -> bool:
        """Whether every rank holds all weights and gradients, and updates a part of them."""
        return self.world_size > 1 and self.sharding == "optimizer"

    @property
    def loss_factor(self) -> int:
        """What a rank's loss is multiplied by before its backward pass: FSDP averages gradients over the ranks, and the
        loss counts all of them."""
        return self.world_size if self.wraps else 1

    @property
    def stores_bf16(self) -> bool:
        """Whether parameters are stored in a `precision` below fp32. FSDP stores fp32, and casts when it gathers."""
        return not self.wraps and self.precision != torch.float32

    def sum(self, values: Iterable[float]) -> list[float]:
        """Element-wise sum over all ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Iterable[float]) -> list[float]:
        """Element-wise maximum over all ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Iterable[float], op: Any) -> list[float]:
        result = torch.tensor(list(values), dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(result, op=op, group=self.cpu_group)
        return [float(v) for v in result]

    def gather(self, tensor_N: Tensor) -> Tensor:
        """The 1-D tensors of all ranks, one after the other; lengths may differ. On the CPU."""
        mine = tensor_N.detach().cpu()
        if self.world_size == 1:
            return mine
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, mine.numpy(), group=self.cpu_group)
        return torch.from_numpy(np.concatenate(parts))

    def broadcast(self, payload: bytes | None) -> bytes:
        """Rank 0's bytes, on every rank."""
        received = [payload]
        if self.world_size > 1:
            dist.broadcast_object_list(received, src=0, group=self.cpu_group)
        assert received[0] is not None
        return received[0]

    def reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replace gradients of one dtype, on the device, that every rank holds whole by those of the loss of all ranks:
        everywhere the same bits."""
        if self.world_size == 1 or not tensors:
            return
        together = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(together)
        parts = (together / self.loss_factor).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def squares(self, gradients: Iterable[Tensor], parts: Iterable[Tensor] = ()) -> float:
        """Sum of squares of a model's gradients over all ranks. A gradient that every rank holds whole counts once.
        `parts`: of gradients of which every rank holds another part."""
        mine = [*parts, *(local(g) for g in gradients if self.first or hasattr(g, "to_local"))]
        norms = list(torch._foreach_norm(mine)) if mine else []
        found = float(torch.stack(norms).double().square().sum()) if norms else 0.0
        return self.sum([found])[0]

    def barrier(self) -> None:
        self.sum([0.0])

    def close(self) -> None:
        """Leave the process group, together with all other ranks.

        A mesh that something still refers to keeps the group's threads alive. A thread that releases a tensor needs the
        GIL, and asking for it while the interpreter ends aborts the process. The pause lets the threads have it before.
        """
        if self.mesh is None or not dist.is_initialized():
            return
        self.barrier()
        self.mesh = self.cpu_group = None
        gc.collect()
        dist.destroy_process_group()
        time.sleep(RELEASE_S)


def join(
    device: str,
    environment: Mapping[str, str] = os.environ,
    *,
    wrapped: bool = False,
    sharding: Sharding = "full",
) -> Ranks:
    """Join the process group that the environment describes. `device`: `cpu` or `cuda`. `wrapped`: a single rank gets a
    process group, too. `sharding`: what several ranks divide among them.

    Several ranks then prove that they reach each other (`collective_check`). Raises UserError when the environment
    names several ranks but no address at which they meet.
    """
    rank, world_size = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    if world_size == 1 and not wrapped:
        return Ranks(device=_own(device, 0, environment), sharding=sharding)
    from torch.distributed.device_mesh import init_device_mesh

    from astracli.training import collective_check

    chosen = _own(device, rank, environment)
    options: dict[str, Any] = {"backend": "gloo", "timeout": COLLECTIVE}
    if device == "cuda":
        # with a device NCCL connects at once, here, and not in the first step
        options |= {"backend": "cpu:gloo,cuda:nccl", "device_id": chosen}
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if world_size == 1:
        store: dist.Store = dist.HashStore()
    elif missing:
        raise UserError(f"WORLD_SIZE is {world_size}, {' and '.join(missing)} is not set", "start it with torchrun")
    else:
        store = _meet(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), rank, world_size)
    with collective_check.watched():
        dist.init_process_group(**options, store=store, rank=rank, world_size=world_size)
        rate = collective_check.check(rank, world_size, chosen)
    cpu_group = dist.new_group(backend="gloo", timeout=WAIT)
    return Ranks(
        rank, world_size, chosen, init_device_mesh(device, (world_size,)), cpu_group, sharding=sharding, rate=rate
    )


def _meet(host: str, port: int, rank: int, world_size: int) -> dist.Store:
    """The store by which the ranks find each other. Rank 0 listens at `host` alone: torch's own listener would take
    connections on every interface, and it knows no token."""
    listener = None
    if rank == 0:
        sock = ports.bind(host, port)
        sock.listen(128)
        listener = sock.detach()
    return dist.TCPStore(host, port, world_size, rank == 0, timeout=RENDEZVOUS, master_listen_fd=listener)


def _own(device: str, rank: int, environment: Mapping[str, str]) -> torch.device:
    """This rank's device, made the current one."""
    if device == "cpu":
        return torch.device("cpu")
    chosen = torch.device("cuda", int(environment.get("LOCAL_RANK", str(rank % max(1, torch.cuda.device_count())))))
    torch.cuda.set_device(chosen)
    return chosen


def limit_memory(device: torch.device, gib: float | None) -> None:
    """Let torch take no more of a GPU than `gib` GiB have beside its CUDA context; None: as much as there is. What it
    then lacks is an ordinary out-of-memory error."""
    if gib is not None and device.type == "cuda":
        room = gib * 2**30 - CUDA_CONTEXT
        share = room / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)


def shard(
    policy: nn.Module,
    block_classes: Iterable[str],
    ranks: Ranks,
    *,
    exact: Collection[nn.Parameter] = (),
    sharding: Sharding = "full",
) -> None:
    """FSDP2 in place: each block on its own, the root (embedding, head, last norm) as one more group. A policy of which
    only the optimizer is divided, and a single rank's, moves to its device as it is.

    `policy`'s forward must do everything that touches the root's parameters: outside it they are sharded. It computes
    in the ranks' precision, except for the `exact` parameters: FSDP gathers a block in one dtype, so every rank holds
    these whole, in their own dtype, and the optimizer averages their gradients. They should be few and small.
    """
    if ranks.mesh is None or sharding == "optimizer":
        policy.to(ranks.device)
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for parameter in exact:
        parameter.data = parameter.data.to(ranks.device)
    # FSDP moves each group to the device as it shards it: the whole fp32 model is never there at once
    settings: dict[str, Any] = {"mesh": ranks.mesh, "ignored_params": set(exact)}
    if sharding == "gradients":
        settings["reshard_after_forward"] = False
    if ranks.precision != torch.float32:
        settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=ranks.precision, reduce_dtype=torch.float32)
    names = frozenset(block_classes)
    for module in list(policy.modules()):
        if type(module).__name__ in names:
            fully_shard(module, **settings)
    fully_shard(policy, **settings)


def recompute(policy: nn.Module, block_classes: Iterable[str], mode: Recomputed) -> None:
    """Activation checkpointing of every block, before sharding.

    `full` keeps each block's input, and computes the block again in the backward pass; `selective` does so with every
    second block. To recompute chosen operators instead needs a Python hook on every operator: at 4B on an H200 that was
    slower than `full` and kept more (docs/benchmarks.md).
    """
    if mode == "none":
        return
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    names = frozenset(block_classes)
    blocks = [
        (parent, name, child)
        for parent in policy.modules()
        for name, child in parent.named_children()
        if type(child).__name__ in names
    ]
    for parent, name, child in blocks[:: RECOMPUTED_BLOCKS[mode]]:
        setattr(parent, name, checkpoint_wrapper(child, preserve_rng_state=False))


def free_gathered(policy: nn.Module) -> None:
    """Free what FSDP leaves gathered after a pass: embedding and head, or every block. Nothing when it is not
    sharded."""
    for module in policy.modules():
        reshard: Any = getattr(module, "reshard", None)
        if reshard is not None:
            reshard()


def before_backward(policy: nn.Module, ranks: Ranks, *, last: bool) -> None:
    """What FSDP does in the backward pass of a minibatch's micro-batch, and of its `last`: before an update gradients
    are summed over the ranks, and gathered weights are freed. Ranks must call this alike."""
    root: Any = policy
    if not ranks.wraps or ranks.sharding == "full":
        return
    if ranks.sharding == "gradients":
        root.set_reshard_after_backward(last)
    else:
        root.set_requires_gradient_sync(last)
    root.set_is_last_backward(last)


def start_of(parameter: Tensor, ranks: Ranks) -> int:
    """Where this rank's part begins in the flattened parameter; 0 where it holds all or nothing."""
    if ranks.mesh is None or not hasattr(parameter, "placements") or not local(parameter).numel():
        return 0
    sharded: Any = parameter
    _, offset = compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, sharded.placements)
    return int(offset[0]) * (sharded.numel() // sharded.shape[0])


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its storage; the tensor itself when it is not sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
