"""Entropy of rows of logits: short rows by the block, long rows one to a program."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from edt_kernels.triton.launch import Configuration, launch
from edt_kernels.triton.primitives import accumulator, dense


@triton.jit
def entropy_of_rows(
    logits_ptr,  # [rows, width]
    row,
    exists,
    width,
    scale,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """H, m and ln S of BLOCK_N rows [BLOCK_N], read in blocks of BLOCK_V tokens.

    Of the tokens so far m is the maximum, S = sum e^(x-m) and T = sum e^(x-m) (x-m).
    """
    top = tl.full((BLOCK_N,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_N,), ACC)
    moment = tl.zeros((BLOCK_N,), ACC)
    for first in range(0, width, BLOCK_V):
        token = first + tl.arange(0, BLOCK_V)
        inside = exists[:, None] & (token < width)[None, :]
        place = row[:, None].to(tl.int64) * width + token[None, :]
        x = tl.load(logits_ptr + place, inside, float("-inf")).to(ACC)
        top, total, moment = entropy_step(x, top, total, moment)
    return entropy_from_sums(top, total, moment, scale, ACC)


@triton.jit
def entropy_step(x, top, total, moment):
    """m, S and T with a block x [rows, tokens] added."""
    higher = tl.maximum(top, tl.max(x, 1))
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    fall = finite_log(top - shift)
    decay = tl.exp(fall)
    shifted = x - shift[:, None]
    weight = tl.exp(shifted)
    moment = decay * (moment + fall * total) + tl.sum(weight * finite_log(shifted), 1)
    total = decay * total + tl.sum(weight, 1)
    return higher, total, moment


@triton.jit
def finite_log(x):
    """x where e^x is not 0, and elsewhere a number that may be multiplied with it."""
    return tl.where(x < -1e4, -1e4, x)


@triton.jit
def entropy_from_sums(top, total, moment, scale, ACC: tl.constexpr):
    """scale (ln S - T / S), m and ln S; NaN where no logit is finite."""
    total = tl.where(top == float("-inf"), float("nan"), total)
    log_total = tl.log(total)
    return tl.full((), scale, ACC) * (log_total - moment / total), top, log_total


@triton.jit
def slope(x, h, top, log_total, g, scale, ACC: tl.constexpr):
    """Gradient -g p (ln p + H) of logits x [rows, tokens]; the rest is [rows]."""
    log_p = x - top[:, None] - log_total[:, None]
    rise = finite_log(log_p) * tl.full((), scale, ACC) + h[:, None]
    return -g[:, None] * tl.exp(log_p) * rise


@triton.jit(do_not_specialize=["rows", "molecules"])
def _entropy_kernel(
    logits_ptr,  # [rows, width]
    offsets_ptr,  # [molecules + 1] or None: rows from the last on are 0
    h_ptr,  # [rows]
    top_ptr,  # [rows]
    log_total_ptr,  # [rows]
    rows,
    molecules,
    width,
    scale: tl.float64,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = row < rows
    end = rows if offsets_ptr is None else tl.load(offsets_ptr + molecules)
    counts = row < end
    h, top, log_total = entropy_of_rows(
        logits_ptr, row, counts, width, scale, ACC, BLOCK_N, BLOCK_V
    )
    tl.store(h_ptr + row, tl.where(counts, h, 0.0), exists)
    tl.store(top_ptr + row, tl.where(counts, top, 0.0), exists)
    tl.store(log_total_ptr + row, tl.where(counts, log_total, 0.0), exists)


@triton.jit(do_not_specialize=["rows", "molecules"])
def _entropy_bwd_kernel(
    grad_ptr,  # [rows]
    logits_ptr,  # [rows, width]
    h_ptr,  # [rows]
    top_ptr,  # [rows]
    log_total_ptr,  # [rows]
    offsets_ptr,  # [molecules + 1] or None
    out_ptr,  # [rows, width]
    rows,
    molecules,
    width,
    scale: tl.float64,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    exists = row < rows
    end = rows if offsets_ptr is None else tl.load(offsets_ptr + molecules)
    counts = row < end
    g = tl.load(grad_ptr + row, counts, 0.0).to(ACC)
    h = tl.load(h_ptr + row, counts, 0.0)
    top = tl.load(top_ptr + row, counts, 0.0)
    log_total = tl.load(log_total_ptr + row, counts, 0.0)
    place = row[:, None] * width + token[None, :]
    known = (token < width)[None, :]
    x = tl.load(logits_ptr + place, counts[:, None] & known, float("-inf")).to(ACC)
    dx = tl.where(counts[:, None], slope(x, h, top, log_total, g, scale, ACC), 0.0)
    tl.store(out_ptr + place, dx.to(out_ptr.dtype.element_ty), exists[:, None] & known)


def tile(width: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows and tokens that a program reads at a time."""
    tokens = min(4096, triton.next_power_of_2(width))
    rows = max(1, (128 if dtype == torch.float64 else 512) // tokens)
    return {"BLOCK_N": rows, "BLOCK_V": tokens, "num_warps": 8 if tokens == 4096 else 4}


def entropy(
    logits: Tensor, scale: float, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `_entropy_kernel`; with `offsets`, rows from offsets[-1] on are 0."""
    h, top, log_total = empty_rows(logits)
    rows, width = h.numel(), logits.shape[-1]
    block = tile(width, logits.dtype)
    launch(
        _entropy_kernel,
        (triton.cdiv(rows, block["BLOCK_N"]),),
        *(dense(logits), None if offsets is None else dense(offsets), h, top, log_total),
        *(rows, 0 if offsets is None else offsets.shape[0] - 1, width, scale),
        ACC=accumulator(logits.dtype),
        **block,
    )
    return h, top, log_total


def empty_rows(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `entropy` returns, not written yet."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return tuple(logits.new_empty(logits.shape[:-1], dtype=dtype) for _ in range(3))


def entropy_bwd(
    grad: Tensor,
    logits: Tensor,
    h: Tensor,
    top: Tensor,
    log_total: Tensor,
    scale: float,
    offsets: Tensor | None,
) -> Tensor:
    """Launch `_entropy_bwd_kernel`."""
    out = logits.new_empty(logits.shape)
    rows, width = h.numel(), logits.shape[-1]
    block = tile(width, logits.dtype)
    launch(
        _entropy_bwd_kernel,
        (triton.cdiv(rows, block["BLOCK_N"]), triton.cdiv(width, block["BLOCK_V"])),
        *map(dense, (grad, logits, h, top, log_total)),
        None if offsets is None else dense(offsets),
        out,
        rows,
        0 if offsets is None else offsets.shape[0] - 1,
        *(width, scale),
        ACC=accumulator(h.dtype),
        **block,
    )
    return out


def configurations(device: torch.device, dtype: torch.dtype) -> Iterator[Configuration]:
    """A vocabulary of atoms and that of a language model."""
    offsets = torch.zeros(2, dtype=torch.int64, device=device)
    row = torch.zeros(2, dtype=torch.promote_types(dtype, torch.float32), device=device)
    for width in (38, 32000):
        logits = torch.zeros(2, width, dtype=dtype, device=device)
        saved = (row, logits, row, row, row, 1.0)
        yield Configuration(f"{width}", entropy, (logits, 1.0))
        yield Configuration(f"{width}", entropy_bwd, (*saved, None))
        yield Configuration(f"{width}-offsets", entropy_bwd, (*saved, offsets))
