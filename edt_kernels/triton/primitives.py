"""What kernels of several ops share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """What sums of a dtype run in: fp32, and fp64 where the numbers are."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as torch's matrix products are; with float16 in its digits."""
    if torch.version.hip is not None:
        return "ieee"
    if dtype == torch.float16:
        return "tf32"
    return {"highest": "ieee", "high": "tf32x3"}.get(torch.get_float32_matmul_precision(), "tf32")


def dense(x: torch.Tensor) -> torch.Tensor:
    """`x` contiguous and aligned to 16 bytes, itself where it is.

    Another alignment is another compiled kernel, which may sum in another order.
    """
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def tail_programs(rows: int, block: int) -> int:
    """Programs that share what stands behind the last offset, at most all `rows` in blocks."""
    return min(64, triton.cdiv(rows, 8 * block))


@triton.jit
def zero_rows(
    out_ptr,  # [rows, width]
    begin,
    rows,
    width,
    program,
    programs,
    column,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Zeros in rows `begin` to `rows`, BLOCK_D columns from `column` on; shared by `programs`."""
    columns = column + tl.arange(0, BLOCK_D)
    zeros = tl.zeros((BLOCK_N, BLOCK_D), out_ptr.dtype.element_ty)
    for first in range(begin + program * BLOCK_N, rows, programs * BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        place = row[:, None].to(tl.int64) * width + columns[None, :]
        tl.store(out_ptr + place, zeros, (row < rows)[:, None] & (columns < width)[None, :])


@triton.jit
def count_at_most(sorted_ptr, count, x, steps):
    """How many of the first `count` numbers, which ascend, are at most `x`, a block.

    `steps` is the bit length of `count`.
    """
    low = tl.zeros_like(x).to(tl.int64)
    high = low + count
    for _ in range(steps):
        middle = (low + high) // 2
        searching = low < high
        counts = searching & (tl.load(sorted_ptr + middle, searching, 0) <= x)
        low = tl.where(counts, middle + 1, low)
        high = tl.where(searching & (counts == 0), middle, high)
    return low


@triton.jit
def copy_rows(
    in_ptr,  # [.., width]
    source,
    found,
    out_ptr,  # [.., width]
    row,
    exists,
    width,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows `source` to rows `row` where they exist, 0 where nothing is found; each [BLOCK_N]."""
    for column in range(0, width, BLOCK_D):
        columns = column + tl.arange(0, BLOCK_D)
        known = (columns < width)[None, :]
        from_row = in_ptr + source[:, None] * width + columns[None, :]
        x = tl.load(from_row, found[:, None] & known, 0.0)
        tl.store(out_ptr + row[:, None] * width + columns[None, :], x, exists[:, None] & known)
