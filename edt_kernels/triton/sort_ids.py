"""Rows in the order of their ids: a stable radix sort, eight bits at a time, without atomics."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from edt_kernels.triton.launch import Configuration, launch
from edt_kernels.triton.primitives import count_at_most, dense

DIGITS = tl.constexpr(256)
BLOCK = 128  # rows of a program, compared with one another


@triton.jit
def _digits(keys_ptr, row, exists, segments, shift, IDS: tl.constexpr):
    """Keys of rows and their digit from bit `shift` on; an id outside has the key `segments`."""
    key = tl.load(keys_ptr + row, exists, 0)
    if IDS:
        key = tl.where((key >= 0) & (key < segments), key, segments)
    return key, ((key >> shift) & (DIGITS - 1)).to(tl.int32)


@triton.jit(do_not_specialize=["rows", "segments", "shift"])
def _count_kernel(
    keys_ptr,  # [rows]
    counts_ptr,  # [DIGITS, blocks]
    rows,
    segments,
    shift,
    IDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    row = block * BLOCK_N + tl.arange(0, BLOCK_N)
    _, digit = _digits(keys_ptr, row, row < rows, segments, shift, IDS)
    counts = tl.histogram(digit, DIGITS, row < rows)
    place = tl.arange(0, DIGITS).to(tl.int64) * tl.num_programs(0) + block
    tl.store(counts_ptr + place, counts)


@triton.jit(do_not_specialize=["rows", "segments", "shift"])
def _move_kernel(
    keys_ptr,  # [rows]
    order_ptr,  # [rows] or None: rows stand in their order
    counts_ptr,  # [DIGITS, blocks], summed up to and with each
    sorted_ptr,  # [rows]
    sorted_order_ptr,  # [rows]
    rows,
    segments,
    shift,
    IDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_N)
    row = block * BLOCK_N + lane
    exists = row < rows
    key, digit = _digits(keys_ptr, row, exists, segments, shift, IDS)
    # Rows of the block with the same digit that come before.
    before = (digit[:, None] == digit[None, :]) & (lane[:, None] > lane[None, :])
    rank = tl.sum(before.to(tl.int32), 1)
    cell = digit.to(tl.int64) * tl.num_programs(0) + block
    place = tl.load(counts_ptr + cell - 1, exists & (cell > 0), 0) + rank
    moved = row if order_ptr is None else tl.load(order_ptr + row, exists, 0)
    tl.store(sorted_ptr + place, key, exists)
    tl.store(sorted_order_ptr + place, moved, exists)


@triton.jit(do_not_specialize=["rows", "segments", "steps"])
def _offsets_kernel(
    sorted_ptr,  # [rows]
    offsets_ptr,  # [segments + 1]
    rows,
    segments,
    steps,
    BLOCK_N: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    smaller = count_at_most(sorted_ptr, rows, segment - 1, steps)
    tl.store(offsets_ptr + segment, smaller, segment <= segments)


def sort_ids(ids: Tensor, segments: int) -> tuple[Tensor, Tensor]:
    """Launch `_count_kernel`, a sum and `_move_kernel` per eight bits, then `_offsets_kernel`."""
    rows = ids.shape[0]
    offsets = ids.new_empty(segments + 1)
    if rows == 0 or segments == 0:
        return torch.arange(rows, device=ids.device), offsets.zero_()
    keys, order = dense(ids), None
    blocks = triton.cdiv(rows, BLOCK)
    for shift in range(0, segments.bit_length(), 8):
        sizes = (rows, segments, shift)
        options = {"IDS": shift == 0, "BLOCK_N": BLOCK, "num_warps": 4}
        counts = ids.new_empty(DIGITS.value, blocks, dtype=torch.int32)
        launch(_count_kernel, (blocks,), keys, counts, *sizes, **options)
        starts = counts.flatten().cumsum(0)
        moved, moved_order = torch.empty_like(keys), torch.empty_like(keys)
        places = (keys, order, starts, moved, moved_order)
        launch(_move_kernel, (blocks,), *places, *sizes, **options)
        keys, order = moved, moved_order
    grid = (triton.cdiv(segments + 1, 512),)
    sizes = (rows, segments, rows.bit_length())
    launch(_offsets_kernel, grid, keys, offsets, *sizes, BLOCK_N=512, num_warps=4)
    return order, offsets


def configurations(device: torch.device, dtype: torch.dtype) -> Iterator[Configuration]:
    """Two passes, whatever the dtype of the values that are sorted by the ids."""
    ids = torch.zeros(16, dtype=torch.int64, device=device)
    yield Configuration("300", sort_ids, (ids, 300))
