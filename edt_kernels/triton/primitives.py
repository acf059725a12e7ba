"""What kernels of several ops share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TAIL_PROGRAMS = 64
"""Programs that write zeros behind offsets[-1], where there is anything."""


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """What sums of a dtype run in: fp32, and fp64 where the numbers are."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def dense(x: torch.Tensor) -> torch.Tensor:
    """`x` contiguous and aligned to 16 bytes, itself where it is.

    Another alignment is another compiled kernel, which may sum in another order.
    """
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


@triton.jit
def zero_tail(
    out_ptr,
    end,
    rows,
    width,
    program,
    programs,
    column,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Zeros in rows `end` to `rows` of out [rows, width], BLOCK_N at a time and strided by program.

    `column` is the first of BLOCK_D columns.
    """
    columns = column + tl.arange(0, BLOCK_D)
    for first in range(end + program * BLOCK_N, rows, programs * BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        inside = (row < rows)[:, None] & (columns < width)[None, :]
        place = row[:, None].to(tl.int64) * width + columns[None, :]
        tl.store(out_ptr + place, tl.zeros((BLOCK_N, BLOCK_D), out_ptr.dtype.element_ty), inside)
