"""Concatenation molecule by molecule: one program per molecule and block of columns.

Parts, their offsets and their lengths are tuples. A part without offsets goes to every molecule and
has a length; the length of the others is 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from edt_kernels.reference.ragged_cat import ragged_cat_capacity
from edt_kernels.triton.launch import Configuration, launch
from edt_kernels.triton.primitives import accumulator, dense, tail_programs, zero_rows

GROUP = 256  # molecules whose gradients of a broadcast part one program sums, in blocks


@triton.jit
def _ragged_cat_kernel(
    parts,
    offsets,
    lengths,
    out_ptr,  # [capacity, width]
    joined_ptr,  # [molecules + 1]
    molecules,
    capacity,
    width,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    molecule = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D
    columns = column + tl.arange(0, BLOCK_D)
    bound = tl.minimum(molecule, molecules)
    place = tl.zeros((), tl.int64)
    for k in tl.static_range(len(parts)):
        if offsets[k] is None:
            place += bound * lengths[k]
        else:
            place += tl.load(offsets[k] + bound)
    if (molecule <= molecules) & (column == 0):
        tl.store(joined_ptr + bound, place)
    if molecule >= molecules:
        programs = tl.num_programs(0) - molecules
        program = molecule - molecules
        zero_rows(out_ptr, place, capacity, width, program, programs, column, BLOCK_N, BLOCK_D)
        return

    for k in tl.static_range(len(parts)):
        begin = tl.zeros((), tl.int64)
        end = begin + lengths[k]
        if offsets[k] is not None:
            begin += tl.load(offsets[k] + molecule)
            end += tl.load(offsets[k] + molecule + 1)
        for first in range(begin, end, BLOCK_N):
            row = first + tl.arange(0, BLOCK_N)
            inside = (row < end)[:, None] & (columns < width)[None, :]
            x = tl.load(parts[k] + row[:, None] * width + columns[None, :], inside, 0.0)
            to = place + row - begin
            tl.store(out_ptr + to[:, None] * width + columns[None, :], x, inside)
        place += end - begin


@triton.jit
def _place(offsets, lengths, molecule, exists, PART: tl.constexpr):
    """Where the rows of molecules in a part go: behind their rows in the parts before."""
    place = molecule * 0
    for k in tl.static_range(len(lengths)):
        if offsets[k] is None:
            place += (molecule + (1 if k < PART else 0)) * lengths[k]
        else:
            place += tl.load(offsets[k] + molecule + (1 if k < PART else 0), exists, 0)
    return place


@triton.jit(do_not_specialize=["rows", "molecules"])
def _gather_kernel(
    grad_ptr,  # [capacity, width]
    offsets,
    lengths,
    out_ptr,  # [rows, width], the gradient of a ragged part
    rows,
    molecules,
    width,
    PART: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    molecule = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D
    if molecule >= molecules:
        tail = tl.load(offsets[PART] + molecules).to(tl.int64)
        programs = tl.num_programs(0) - molecules
        program = molecule - molecules
        zero_rows(out_ptr, tail, rows, width, program, programs, column, BLOCK_N, BLOCK_D)
        return
    columns = column + tl.arange(0, BLOCK_D)
    begin = tl.load(offsets[PART] + molecule).to(tl.int64)
    end = tl.load(offsets[PART] + molecule + 1).to(tl.int64)
    shift = _place(offsets, lengths, molecule, molecule < molecules, PART) - begin
    for first in range(begin, end, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        inside = (row < end)[:, None] & (columns < width)[None, :]
        g = tl.load(grad_ptr + (shift + row)[:, None] * width + columns[None, :], inside, 0.0)
        tl.store(out_ptr + row[:, None] * width + columns[None, :], g, inside)


@triton.jit(do_not_specialize=["molecules"])
def _sum_kernel(
    grad_ptr,  # [capacity, width]
    offsets,
    lengths,
    out_ptr,  # [groups, length, width], the gradient of a broadcast part by GROUPs of molecules
    molecules,
    width,
    PART: tl.constexpr,
    GROUP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(2).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), ACC)
    for first in range(group * GROUP, tl.minimum((group + 1) * GROUP, molecules), BLOCK_N):
        molecule = first + tl.arange(0, BLOCK_N)
        exists = molecule < molecules
        source = _place(offsets, lengths, molecule, exists, PART) + row
        inside = exists[:, None] & (columns < width)[None, :]
        g = tl.load(grad_ptr + source[:, None] * width + columns[None, :], inside, 0.0)
        total += tl.sum(g.to(ACC), 0)
    out = out_ptr + (group * tl.num_programs(0) + row) * width + columns
    tl.store(out, total.to(out_ptr.dtype.element_ty), columns < width)


def ragged_cat(parts: Sequence[Tensor], offsets: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Launch `_ragged_cat_kernel`."""
    rows = [part.shape[0] for part in parts]
    capacity = ragged_cat_capacity(rows, offsets)
    own = next(own for own in offsets if own is not None)
    joined = own.new_empty(own.shape)
    out = parts[0].new_empty(capacity, *parts[0].shape[1:])
    width, molecules = math.prod(out.shape[1:]), joined.shape[0] - 1
    block = _tile(width)
    programs = molecules + max(1, tail_programs(capacity, block["BLOCK_N"]))
    launch(
        _ragged_cat_kernel,
        (programs, max(1, triton.cdiv(width, block["BLOCK_D"]))),
        tuple(map(dense, parts)),
        *_layout(rows, offsets),
        *(out, joined, molecules, capacity, width),
        **block,
    )
    return out, joined


def ragged_cat_bwd(
    grad: Tensor, offsets: Sequence[Tensor | None], rows: Sequence[int], wanted: Sequence[bool]
) -> list[Tensor]:
    """Launch `_gather_kernel` or `_sum_kernel` per part."""
    grad, layout = dense(grad), _layout(rows, offsets)
    return [
        _part_bwd(grad, *layout, part, count) if want else grad.new_empty(0)
        for part, (count, want) in enumerate(zip(rows, wanted, strict=True))
    ]


def _part_bwd(grad: Tensor, offsets: tuple, lengths: tuple, part: int, rows: int) -> Tensor:
    width = math.prod(grad.shape[1:])
    molecules = next(own for own in offsets if own is not None).shape[0] - 1
    out = grad.new_empty(rows, *grad.shape[1:])
    if out.numel() == 0:
        return out
    block = _tile(width)
    columns = triton.cdiv(width, block["BLOCK_D"])
    if offsets[part] is not None:
        programs = molecules + tail_programs(rows, block["BLOCK_N"])
        arguments = (grad, offsets, lengths, out, rows, molecules, width)
        launch(_gather_kernel, (programs, columns), *arguments, PART=part, **block)
        return out
    groups = max(1, triton.cdiv(molecules, GROUP))
    wide = torch.promote_types(grad.dtype, torch.float32)
    sums = out if groups == 1 else out.new_empty(groups, *out.shape, dtype=wide)
    options = {"PART": part, "GROUP": GROUP, "ACC": accumulator(grad.dtype), **block}
    arguments = (grad, offsets, lengths, sums, molecules, width)
    launch(_sum_kernel, (rows, columns, groups), *arguments, **options)
    return out if groups == 1 else sums.sum(0).to(grad.dtype)


def _layout(rows: Sequence[int], offsets: Sequence[Tensor | None]) -> tuple[tuple, tuple]:
    """Offsets and lengths of the parts, as the kernels take them."""
    pairs = list(zip(rows, offsets, strict=True))
    return (
        tuple(None if own is None else dense(own) for _, own in pairs),
        tuple(count if own is None else 0 for count, own in pairs),
    )


def _tile(width: int) -> dict[str, int]:
    """Rows and columns that a program copies at a time."""
    columns = min(256, triton.next_power_of_2(max(width, 1)))
    return {"BLOCK_N": min(64, 2048 // columns), "BLOCK_D": columns, "num_warps": 4}


def configurations(device: torch.device, dtype: torch.dtype) -> Iterator[Configuration]:
    """Anchors and dynamic queries, and two ragged parts."""
    offsets = torch.zeros(2, dtype=torch.int64, device=device)
    part = torch.zeros(16, 768, dtype=dtype, device=device)
    for name, own in (("768-anchors", None), ("768-ragged", offsets)):
        layout = (own, offsets)
        yield Configuration(name, ragged_cat, ((part, part), layout))
        yield Configuration(name, ragged_cat_bwd, (part, layout, (16, 16), (True, True)))
