"""fp32 masters as bf16 parameters and 16 bits beside them; moments that pass through a device set by set."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from astracli.config.recipe_train import TrainTable
from astracli.process.layout import BUCKETS_IN_FLIGHT
from astracli.training import adam
from astracli.training.adam import Adam, on_host
from astracli.training.cpu_offload import CpuOffload
from astracli.training.overlapped_offload import OverlappedOffload
from astracli.training.split_masters import SplitMasters, join, split


def split_masters_of(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    high = torch.empty_like(master, dtype=torch.bfloat16)
    rest, back = torch.empty_like(master, dtype=torch.int16), torch.empty_like(master)
    split(master, high, rest)
    join(high, rest, back)
    return high, rest, back


def bits(*values: int) -> torch.Tensor:
    """fp32 numbers of these bits."""
    return torch.tensor([v - 2**32 if v >= 2**31 else v for v in values]).to(torch.int32).view(torch.float32)


def test_by_hand() -> None:
    master = bits(0x3F800000, 0x3F807FFF, 0x3F80FFFF, 0xBF80C000, 0x7F7FFFFF, 0x80000000, 0x00000001)
    high, rest, back = split_masters_of(master)
    assert [v & 0xFFFF for v in high.view(torch.int16).tolist()] == [
        0x3F80, 0x3F80, 0x3F81, 0xBF81, 0x7F80, 0x8000, 0x0000
    ]  # fmt: skip
    assert rest.tolist() == [0, 0x7FFF, -1, -0x4000, -1, 0, 1]
    assert torch.equal(back.view(torch.int32), master.view(torch.int32))


def test_half_way_rounds_to_even_and_the_master_follows_by_its_last_place() -> None:
    master = bits(0x3F808000, 0x3F818000, 0xBF808000, 0xBF818000)
    high, rest, back = split_masters_of(master)
    assert torch.equal(high, master.to(torch.bfloat16))
    assert [v & 0xFFFF for v in high.view(torch.int16).tolist()] == [0x3F80, 0x3F82, 0xBF80, 0xBF82]
    assert rest.tolist() == [0x7FFF, -0x7FFF, 0x7FFF, -0x7FFF]
    moved = bits(0x3F807FFF, 0x3F818001, 0xBF807FFF, 0xBF818001)
    assert torch.equal(back, moved)
    assert torch.equal(split_masters_of(moved)[2], moved), "once"


def test_nan_and_infinity_stay_what_they_are() -> None:
    for pattern in (0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000, 0xFF80FFFF):
        high, _, back = split_masters_of(bits(pattern))
        assert high.isnan() and back.isnan(), hex(pattern)
    high, _, back = split_masters_of(bits(0x7F800000, 0xFF800000))
    assert high.tolist() == back.tolist() == [float("inf"), float("-inf")]


def test_all_others_come_back_bit_for_bit_and_rounding_is_torchs() -> None:
    drawn = torch.randint(-(2**31), 2**31, (2**20,), generator=torch.Generator().manual_seed(0))
    master = drawn.to(torch.int32).view(torch.float32)
    master = master[torch.isfinite(master)]
    high, _, back = split_masters_of(master)
    assert torch.equal(high.view(torch.int16), master.to(torch.bfloat16).view(torch.int16))
    apart = (back.view(torch.int32) - master.view(torch.int32)).abs()
    tie = (master.view(torch.int32) & 0xFFFF) == 0x8000
    assert tie.sum() > 3 and torch.equal(apart, tie.int())


def test_a_master_has_memory_inside_whole_alone_and_keeps_what_is_written_there() -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = (nn.Parameter(torch.randn(5, 3, generator=generator)) for _ in range(2))
    before = first.detach().clone()
    split_masters = SplitMasters()
    masters = {name: split_masters.take(name, p) for name, p in (("a", first), ("b", second))}
    assert first.dtype == torch.bfloat16 and [rest.dtype for rest in split_masters.rests] == [torch.int16] * 2
    assert [m.untyped_storage().nbytes() for m in masters.values()] == [0, 0]
    with split_masters.whole(["a", "not split"]):
        assert torch.equal(masters["a"], before) and masters["b"].untyped_storage().nbytes() == 0
        masters["a"].add_(2.0**-20)
    assert masters["a"].untyped_storage().nbytes() == 0
    with (
        split_masters.whole(["a"]),
        pytest.raises(AssertionError, match=r"in memory already: \['a'\]"),
        split_masters.whole(),
    ):
        pass
    with pytest.raises(KeyError), split_masters.whole():
        assert torch.equal(masters["a"], before + 2.0**-20), "less than bf16 can hold"
        raise KeyError("inside")
    assert masters["a"].untyped_storage().nbytes() == 0
    assert torch.equal(first, (before + 2.0**-20).to(torch.bfloat16))


def test_so_many_moments_wait_on_the_host_and_the_largest_do_not() -> None:
    sizes = {"head": 50, "a": 20, "b": 20, "c": 9, "d": 1, "empty": 0}
    assert on_host(sizes, 0.0) == frozenset()
    assert on_host(sizes, 0.05) == {"c"}, "9 %, and 1 % fits"
    assert on_host(sizes, 0.3) == {"b", "c", "d"}
    assert on_host(sizes, 0.5) == {"a", "b", "c", "d"}
    assert on_host(sizes, 1.0) == set(sizes) - {"empty"}
    for part in (0.1, 0.33, 0.8, 1.0):
        assert sum(sizes[name] for name in on_host(sizes, part)) >= part * 100


@pytest.mark.parametrize("part", [0.4, 1.0])
@pytest.mark.parametrize("lowered", [False, True])
def test_any_part_on_the_host_gives_the_numbers_of_all_at_once(
    part: float, lowered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adam, "BUCKET_BYTES", 400)
    table = TrainTable(steps=9)

    def run(moments_on_host: float) -> tuple[Adam, dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(2)
        values = {f"w{i}": torch.randn(4, 1 + i, generator=generator) for i in range(9)}
        split_masters = SplitMasters()
        if lowered:
            values = {n: split_masters.take(n, nn.Parameter(v)) for n, v in values.items()}
        made = Adam(values, table, moments_on_host=moments_on_host, split_masters=split_masters)
        for step in range(4):
            gradients = {n: torch.randn(v.shape, generator=generator) for n, v in values.items() if n != f"w{step}"}
            made.step(gradients, 0.1 / (1 + step))
        with split_masters.whole():
            result = {n: v.clone() for n, v in values.items()}
        first, second = made.moments()
        for name, moment in first.items():
            assert moment.abs().sum() > 0
            result |= {f"first {name}": moment.clone(), f"second {name}": second[name].clone()}
        return made, result

    (_, expected), (made, found) = run(0.0), run(part)
    assert 0 < len(made.away) <= 9 and (part < 1) == (len(made.away) < 9)
    held = {n: made.adamw.state[p]["exp_avg"].untyped_storage().nbytes() for n, p in made.optimized.items()}
    assert {name for name, size in held.items() if not size} == set(made.away)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_no_more_sets_than_planned_are_on_the_device_at_once() -> None:
    tensors = [torch.full((4,), float(i)) for i in range(7)]
    sets = [[CpuOffload([tensor])] for tensor in tensors]
    for (offload,) in sets:
        offload.to_host()
    seen, order = [], []

    def there() -> list[int]:
        return [i for i, tensor in enumerate(tensors) if tensor.untyped_storage().nbytes()]

    def work(index: int) -> Sequence[CpuOffload]:
        seen.append(there())
        order.append(index)
        tensors[index].add_(0.5)
        return sets[index]

    OverlappedOffload(torch.device("cpu")).through(sets, work, lambda: order.append(-1))
    assert order == [-1, *range(7)] and there() == []
    assert seen == [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 6], [5, 6]]
    assert max(map(len, seen)) == BUCKETS_IN_FLIGHT
    for index, (offload,) in enumerate(sets):
        assert offload.on_host(tensors[index]).tolist() == [index + 0.5] * 4


@pytest.mark.gpu
def test_a_gpu_splits_a_master_alike() -> None:
    drawn = torch.randint(-(2**31), 2**31, (2**22 + 77,), generator=torch.Generator().manual_seed(0))
    drawn[:4096] = (drawn[:4096] & ~0xFFFF) | 0x8000
    master = drawn.to(torch.int32).view(torch.float32)
    assert master.isnan().any(), "which become the same NaN"
    on_cpu, on_gpu = split_masters_of(master), split_masters_of(master.cuda())
    for mine, theirs in zip(on_cpu, on_gpu, strict=True):
        kind = torch.int32 if mine.dtype == torch.float32 else torch.int16
        assert torch.equal(mine.view(kind), theirs.cpu().view(kind))


@pytest.mark.gpu
def test_on_a_gpu_sets_come_and_go_beside_the_work_and_nothing_is_mixed_up() -> None:
    """Large enough that a copy is still under way when the next is asked for."""
    tensors = [torch.full((2**24,), float(i), device="cuda") for i in range(9)]
    sets = [[CpuOffload([tensor])] for tensor in tensors]
    for (offload,) in sets:
        offload.to_host()
    overlapped_offload = OverlappedOffload(torch.device("cuda"))
    held = []

    def work(index: int) -> Sequence[CpuOffload]:
        held.append(torch.cuda.memory_allocated())
        tensors[index].mul_(2.0).add_(1.0)
        return sets[index]

    before = torch.cuda.memory_allocated()
    for _ in range(3):
        overlapped_offload.through(sets, work)
    assert max(held) - before == BUCKETS_IN_FLIGHT * 2**26 and torch.cuda.memory_allocated() == before
    for index, (offload,) in enumerate(sets):
        found = offload.on_host(tensors[index])
        assert found.min() == found.max() == 8 * index + 7, index
