"""Large host memory: zeros, aligned to huge pages and asking for them."""

from __future__ import annotations

import mmap
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from skyline.ops import host_memory
from skyline.ops.host_memory import HUGE_PAGE, give_back, reserve, reserve_weight, use_huge_pages


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(0,), (3, 5), (1500, 2049), (3, HUGE_PAGE // 2)])
@pytest.mark.parametrize("make", [reserve, reserve_weight])
def test_zeros_that_can_be_written(make: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    memory = make(shape, dtype, torch.device("cpu"))
    assert memory.shape == shape and memory.dtype == dtype and memory.is_contiguous()
    assert not memory.any()
    memory.fill_(3)
    assert (memory == 3).all()


def test_large_memory_begins_on_a_huge_page_and_lives_as_long_as_its_views() -> None:
    memory = reserve_weight((100 * HUGE_PAGE + 100,), torch.uint8)
    assert memory.data_ptr() % HUGE_PAGE == 0
    view = memory[HUGE_PAGE:]
    del memory
    view.fill_(7)
    assert int(view.sum()) == 7 * (99 * HUGE_PAGE + 100)


def test_small_weights_lie_side_by_side_and_are_freed_together() -> None:
    use_huge_pages()  # begins anew
    first, second = reserve_weight((3, 7), torch.float32), reserve_weight((50,), torch.int8)
    assert second.data_ptr() == first.data_ptr() + 128 and first.data_ptr() % HUGE_PAGE == 0
    owner = weakref.ref(host_memory._waiting[-1].memory)  # of which they are parts
    del first
    assert owner() is not None
    del second
    assert owner() is None
    assert not reserve_weight((10,), torch.uint8).any()  # there is room of its own for the next
    use_huge_pages()
    later = reserve_weight((10,), torch.uint8)
    assert later.data_ptr() % HUGE_PAGE == 0, "what has moved is not added to"


@pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE") or not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="this system has no huge pages on request",
)
def test_whole_huge_pages_are_requested() -> None:
    memory = reserve((2 * HUGE_PAGE,), torch.uint8, torch.device("cpu"))
    flags = ""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= memory.data_ptr() < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            flags = line
    assert " hg" in flags


def test_weights_move_to_huge_pages_as_they_are() -> None:
    use_huge_pages()  # what other tests have left
    sizes = (1000, 5 * HUGE_PAGE + 12_345, 70 * HUGE_PAGE + 1, 40 * HUGE_PAGE)
    weights = [reserve_weight((size,), torch.uint8) for size in sizes]
    for index, weight in enumerate(weights):
        weight.copy_((torch.arange(len(weight)) * (index + 3)).to(torch.uint8))
    before = [weight.clone() for weight in weights]
    moved = use_huge_pages(share=1.0)
    assert moved in (0, (46 + 71) * HUGE_PAGE), "all, or none where the kernel cannot"
    assert all(torch.equal(weight, copy) for weight, copy in zip(weights, before, strict=True))
    assert use_huge_pages() == 0


def test_what_is_given_back_is_zeros_and_its_neighbours_are_not() -> None:
    first, middle, last = (reserve_weight((size,), torch.uint8) for size in (1000, 3 * mmap.PAGESIZE, 1000))
    for part in (first, middle, last):
        part.fill_(7)
    give_back(middle)
    assert first.min() == 7 and last.min() == 7
    assert int((middle == 0).sum()) == 2 * mmap.PAGESIZE
    give_back(first)  # less than a page
    assert first.min() == 7


def test_a_gap_does_not_keep_others_from_moving() -> None:
    use_huge_pages()
    written, hole, after = (reserve_weight((32 * HUGE_PAGE,), torch.uint8) for _ in range(3))
    written.fill_(1)
    after.fill_(2)
    moved = use_huge_pages(share=1.0)
    assert moved == 0 or moved >= 64 * HUGE_PAGE
    assert written.min() == 1 and after.min() == 2 and not hole.any()


def test_another_device_is_left_to_torch() -> None:
    for make in (reserve, reserve_weight):
        assert make((4, 4), torch.float32, torch.device("meta")).device.type == "meta"
