"""Softmax within segments: one program per segment and block of columns."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from edt_kernels.triton.launch import Configuration, launch
from edt_kernels.triton.primitives import accumulator, dense, tail_programs, zero_rows


@triton.jit(do_not_specialize=["rows", "segments"])
def _segment_softmax_kernel(
    values_ptr,  # [rows, width]
    offsets_ptr,  # [segments + 1]
    out_ptr,  # [rows, width]
    rows,
    segments,
    width,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D
    if segment >= segments:
        end = tl.load(offsets_ptr + segments).to(tl.int64)
        programs = tl.num_programs(0) - segments
        zero_rows(out_ptr, end, rows, width, segment - segments, programs, column, BLOCK_N, BLOCK_D)
        return
    begin = tl.load(offsets_ptr + segment).to(tl.int64)
    end = tl.load(offsets_ptr + segment + 1).to(tl.int64)
    columns = column + tl.arange(0, BLOCK_D)
    exists = columns < width

    # Running maximum m and sum of e^(x - m), column by column.
    top = tl.full((BLOCK_D,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_D,), ACC)
    for first in range(begin, end, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        inside = (row < end)[:, None] & exists[None, :]
        place = row[:, None] * width + columns[None, :]
        x = tl.load(values_ptr + place, inside, float("-inf")).to(ACC)
        higher = tl.maximum(top, tl.max(x, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift[None, :]), 0)
        top = higher

    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.where(total == 0, 1.0, total)
    for first in range(begin, end, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        inside = (row < end)[:, None] & exists[None, :]
        place = row[:, None] * width + columns[None, :]
        x = tl.load(values_ptr + place, inside, 0.0).to(ACC)
        y = tl.exp(x - top[None, :]) / total[None, :]
        tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows", "segments"])
def _segment_softmax_bwd_kernel(
    grad_ptr,  # [rows, width]
    y_ptr,  # [rows, width]
    offsets_ptr,  # [segments + 1]
    out_ptr,  # [rows, width]
    rows,
    segments,
    width,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D
    if segment >= segments:
        end = tl.load(offsets_ptr + segments).to(tl.int64)
        programs = tl.num_programs(0) - segments
        zero_rows(out_ptr, end, rows, width, segment - segments, programs, column, BLOCK_N, BLOCK_D)
        return
    begin = tl.load(offsets_ptr + segment).to(tl.int64)
    end = tl.load(offsets_ptr + segment + 1).to(tl.int64)
    columns = column + tl.arange(0, BLOCK_D)
    exists = columns < width

    along = tl.zeros((BLOCK_D,), ACC)  # sum y g
    for first in range(begin, end, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        inside = (row < end)[:, None] & exists[None, :]
        place = row[:, None] * width + columns[None, :]
        y = tl.load(y_ptr + place, inside, 0.0).to(ACC)
        along += tl.sum(y * tl.load(grad_ptr + place, inside, 0.0).to(ACC), 0)

    for first in range(begin, end, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        inside = (row < end)[:, None] & exists[None, :]
        place = row[:, None] * width + columns[None, :]
        y = tl.load(y_ptr + place, inside, 0.0).to(ACC)
        g = tl.load(grad_ptr + place, inside, 0.0).to(ACC)
        dx = y * (g - along[None, :])
        tl.store(out_ptr + place, dx.to(out_ptr.dtype.element_ty), inside)


def segment_softmax(values: Tensor, offsets: Tensor) -> Tensor:
    """Launch `_segment_softmax_kernel`."""
    out = values.new_empty(values.shape)
    _launch(_segment_softmax_kernel, values, offsets=offsets, out=out)
    return out


def segment_softmax_bwd(grad: Tensor, out: Tensor, offsets: Tensor) -> Tensor:
    """Launch `_segment_softmax_bwd_kernel`."""
    grad_values = out.new_empty(out.shape)
    _launch(_segment_softmax_bwd_kernel, grad, out, offsets=offsets, out=grad_values)
    return grad_values


def _launch(kernel, *inputs: Tensor, offsets: Tensor, out: Tensor) -> None:
    if out.numel() == 0:
        return
    rows, segments = out.shape[0], offsets.shape[0] - 1
    width = out.numel() // rows
    columns = min(64, triton.next_power_of_2(width))
    block = min(128, (512 if out.dtype == torch.float64 else 1024) // columns)
    launch(
        kernel,
        (segments + tail_programs(rows, block), triton.cdiv(width, columns)),
        *map(dense, inputs),
        dense(offsets),
        out,
        rows,
        segments,
        width,
        ACC=accumulator(out.dtype),
        BLOCK_N=block,
        BLOCK_D=columns,
        num_warps=4,
    )


def configurations(device: torch.device, dtype: torch.dtype) -> Iterator[Configuration]:
    """One column, and the heads of an attention."""
    offsets = torch.zeros(2, dtype=torch.int64, device=device)
    for width in (1, 12):
        values = torch.zeros(16, width, dtype=dtype, device=device)
        yield Configuration(f"{width}", segment_softmax, (values, offsets))
        yield Configuration(f"{width}", segment_softmax_bwd, (values, values, offsets))
