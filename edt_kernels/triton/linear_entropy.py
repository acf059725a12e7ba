"""Entropy of softmax(hidden weight^T + bias) by tiles of logits that are made, read and forgotten.

The forward keeps sums of a row: m the maximum, S = sum e^(x-m), T = sum e^(x-m) (x-m). The backward
makes logits again, a block of rows by a span of tokens at a time, whose slopes it multiplies with
the weight and with the hidden rows; the block has a constant size whatever N and V are.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from edt_kernels.reference.linear_entropy import kept_shape
from edt_kernels.triton.entropy import (
    empty_rows,
    entropy_from_sums,
    entropy_step,
    finite_log,
    slope,
)
from edt_kernels.triton.launch import Configuration, launch
from edt_kernels.triton.primitives import accumulator, dense, precision

SPAN = 4096  # tokens of one program of the forward, and of a block of slopes
SLOPES = 1 << 24  # numbers in a block of slopes


@triton.jit
def _logits(
    hidden_ptr,  # [rows, depth]
    weight_ptr,  # [tokens, depth]
    bias_ptr,  # [tokens] or None
    row,
    row_exists,
    token,
    token_exists,
    depth,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of logits [BLOCK_N, BLOCK_V], -inf where no token is."""
    x_ptr = hidden_ptr + row[:, None].to(tl.int64) * depth
    w_ptr = weight_ptr + token[None, :].to(tl.int64) * depth
    logits = tl.zeros((BLOCK_N, BLOCK_V), ACC)
    for first in range(0, depth, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + k[None, :], row_exists[:, None] & (k < depth)[None, :], 0.0)
        w = tl.load(w_ptr + k[:, None], token_exists[None, :] & (k < depth)[:, None], 0.0)
        logits = tl.dot(x, w, logits, input_precision=PRECISION, out_dtype=ACC)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + token, token_exists, 0.0).to(ACC)[None, :]
    return tl.where(token_exists[None, :], logits, float("-inf"))


@triton.jit(do_not_specialize=["rows"])
def _linear_entropy_kernel(
    hidden_ptr,  # [rows, depth]
    weight_ptr,  # [tokens, depth]
    bias_ptr,  # [tokens] or None
    h_ptr,  # [rows], or T [spans, rows]
    top_ptr,  # [rows], or m [spans, rows]
    log_total_ptr,  # [rows], or S [spans, rows]
    rows,
    tokens,
    depth,
    scale: tl.float64,
    SPAN: tl.constexpr,
    WHOLE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = row < rows
    top = tl.full((BLOCK_N,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_N,), ACC)
    moment = tl.zeros((BLOCK_N,), ACC)
    begin = tl.program_id(1) * SPAN
    for first in range(begin, tl.minimum(begin + SPAN, tokens), BLOCK_V):
        token = first + tl.arange(0, BLOCK_V)
        x = _logits(
            *(hidden_ptr, weight_ptr, bias_ptr, row, exists, token, token < tokens, depth),
            *(ACC, PRECISION, BLOCK_N, BLOCK_V, BLOCK_K),
        )
        top, total, moment = entropy_step(x, top, total, moment)
    if WHOLE:
        h, top, log_total = entropy_from_sums(top, total, moment, scale, ACC)
        tl.store(h_ptr + row, h, exists)
        tl.store(top_ptr + row, top, exists)
        tl.store(log_total_ptr + row, log_total, exists)
    else:
        place = tl.program_id(1).to(tl.int64) * rows + row
        tl.store(h_ptr + place, moment, exists)
        tl.store(top_ptr + place, top, exists)
        tl.store(log_total_ptr + place, total, exists)


@triton.jit(do_not_specialize=["rows"])
def _merge_kernel(
    moments_ptr,  # [spans, rows]
    tops_ptr,  # [spans, rows]
    totals_ptr,  # [spans, rows]
    h_ptr,  # [rows]
    top_ptr,  # [rows]
    log_total_ptr,  # [rows]
    rows,
    spans,
    scale: tl.float64,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = row < rows
    top = tl.full((BLOCK_N,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_N,), ACC)
    moment = tl.zeros((BLOCK_N,), ACC)
    place = row
    for _ in range(spans):
        own_top = tl.load(tops_ptr + place, exists, float("-inf"))
        own_total = tl.load(totals_ptr + place, exists, 0.0)
        own_moment = tl.load(moments_ptr + place, exists, 0.0)
        higher = tl.maximum(top, own_top)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        fall = finite_log(top - shift)
        own_fall = finite_log(own_top - shift)
        moment = tl.exp(fall) * (moment + fall * total)
        moment += tl.exp(own_fall) * (own_moment + own_fall * own_total)
        total = tl.exp(fall) * total + tl.exp(own_fall) * own_total
        top = higher
        place += rows
    h, top, log_total = entropy_from_sums(top, total, moment, scale, ACC)
    tl.store(h_ptr + row, h, exists)
    tl.store(top_ptr + row, top, exists)
    tl.store(log_total_ptr + row, log_total, exists)


@triton.jit(do_not_specialize=["rows", "first_row", "first_token"])
def _slopes_kernel(
    hidden_ptr,  # [rows, depth]
    weight_ptr,  # [tokens, depth]
    bias_ptr,  # [tokens] or None
    grad_ptr,  # [rows]
    h_ptr,  # [rows]
    top_ptr,  # [rows]
    log_total_ptr,  # [rows]
    slopes_ptr,  # [block of rows, SPAN], the gradient of the logits
    rows,
    first_row,
    first_token,
    tokens,
    depth,
    scale: tl.float64,
    SPAN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    here = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row = first_row + here
    exists = row < rows
    token = first_token + column
    x = _logits(
        *(hidden_ptr, weight_ptr, bias_ptr, row, exists, token, token < tokens, depth),
        *(ACC, PRECISION, BLOCK_N, BLOCK_V, BLOCK_K),
    )
    g = tl.load(grad_ptr + row, exists, 0.0).to(ACC)
    h = tl.load(h_ptr + row, exists, 0.0)
    top = tl.load(top_ptr + row, exists, 0.0)
    log_total = tl.load(log_total_ptr + row, exists, 0.0)
    dx = slope(x, h, top, log_total, g, scale, ACC)
    dx = tl.where(exists[:, None] & (token < tokens)[None, :], dx, 0.0)
    place = here[:, None] * SPAN + column[None, :]
    tl.store(slopes_ptr + place, dx.to(slopes_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["rows", "first_row", "first_token"])
def _hidden_bwd_kernel(
    slopes_ptr,  # [block of rows, SPAN]
    weight_ptr,  # [tokens, depth]
    out_ptr,  # [rows, depth], and what earlier spans gave if FURTHER
    rows,
    first_row,
    first_token,
    tokens,
    depth,
    FURTHER: tl.constexpr,
    SPAN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    here = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = first_row + here
    known = (columns < depth)[None, :]
    out = out_ptr + row[:, None] * depth + columns[None, :]
    inside = (row < rows)[:, None] & known
    total = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    if FURTHER:
        total += tl.load(out, inside, 0.0)
    for first in range(0, tl.minimum(tokens - first_token, SPAN), BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        token = first_token + column
        dx = tl.load(slopes_ptr + here[:, None] * SPAN + column[None, :])
        from_weight = weight_ptr + token[:, None].to(tl.int64) * depth + columns[None, :]
        w = tl.load(from_weight, (token < tokens)[:, None] & known, 0.0).to(dx.dtype)
        total = tl.dot(dx, w, total, input_precision=PRECISION, out_dtype=ACC)
    tl.store(out, total.to(out_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows", "first_row", "last_row", "first_token", "part_rows"])
def _weight_bwd_kernel(
    slopes_ptr,  # [block of rows, SPAN]
    hidden_ptr,  # [rows, depth]
    weight_out_ptr,  # [parts, tokens, depth], and what earlier rows gave if FURTHER
    bias_out_ptr,  # [parts, tokens], likewise
    first_row,
    last_row,
    first_token,
    part_rows,
    tokens,
    depth,
    FURTHER: tl.constexpr,
    SPAN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    part = tl.program_id(2).to(tl.int64)
    token = first_token + column
    known = (columns < depth)[None, :]
    place = part * tokens + token
    out = weight_out_ptr + place[:, None] * depth + columns[None, :]
    inside = (token < tokens)[:, None] & known
    total = tl.zeros((BLOCK_V, BLOCK_D), ACC)
    along = tl.zeros((BLOCK_V,), ACC)
    if FURTHER:
        total += tl.load(out, inside, 0.0)
        along += tl.load(bias_out_ptr + place, token < tokens, 0.0)
    count = tl.minimum(last_row - first_row, (part + 1) * part_rows)
    for first in range(part * part_rows, count, BLOCK_K):
        here = first + tl.arange(0, BLOCK_K)
        exists = here < count
        from_slopes = slopes_ptr + here[None, :] * SPAN + column[:, None]
        dx = tl.load(from_slopes, exists[None, :], 0.0)
        from_hidden = hidden_ptr + (first_row + here)[:, None] * depth + columns[None, :]
        x = tl.load(from_hidden, exists[:, None] & known, 0.0).to(dx.dtype)
        total = tl.dot(dx, x, total, input_precision=PRECISION, out_dtype=ACC)
        along += tl.sum(dx.to(ACC), 1)
    tl.store(out, total, inside)
    if tl.program_id(1) == 0:
        tl.store(bias_out_ptr + place, along, token < tokens)


def linear_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch `_linear_entropy_kernel`, and for more than SPAN tokens `_merge_kernel`.

    No logits are kept, whatever `keep` is.
    """
    h, top, log_total = empty_rows(hidden)
    rows, (tokens, depth) = h.numel(), weight.shape
    block = _tile(hidden.dtype, tokens)
    spans = triton.cdiv(tokens, SPAN)
    sums = (h, top, log_total)
    if spans > 1:
        sums = tuple(h.new_empty(spans, rows) for _ in range(3))
    launch(
        _linear_entropy_kernel,
        (triton.cdiv(rows, block["BLOCK_N"]), spans),
        *(dense(hidden), dense(weight), None if bias is None else dense(bias), *sums),
        *(rows, tokens, depth, scale),
        SPAN=SPAN,
        WHOLE=spans == 1,
        **block,
    )
    if spans > 1:
        grid = (triton.cdiv(rows, 128),)
        options = {"ACC": block["ACC"], "BLOCK_N": 128, "num_warps": 4}
        launch(_merge_kernel, grid, *sums, h, top, log_total, rows, spans, scale, **options)
    return h, top, log_total, h.new_empty(kept_shape(hidden, weight, keep=False))


def linear_entropy_bwd(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    top: Tensor,
    log_total: Tensor,
    kept: Tensor,
    scale: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Block of slopes by block: `_slopes_kernel`, then the kernels of what is needed."""
    rows, (tokens, depth) = h.numel(), weight.shape
    wide = h.dtype
    block = _tile(hidden.dtype, tokens)
    span = min(SPAN, triton.cdiv(tokens, block["BLOCK_V"]) * block["BLOCK_V"])
    block_rows = min(SLOPES // span, triton.cdiv(max(rows, 1), 128) * 128)
    spans = range(0, tokens, span)
    # Slopes of float16 would vanish: they are kept and multiplied as wide.
    narrow = hidden.dtype if hidden.dtype == torch.bfloat16 else wide
    slopes = hidden.new_empty(block_rows, span, dtype=narrow)
    of_hidden = hidden.new_empty(rows if need_hidden else 0, depth)
    sums = of_hidden if len(spans) == 1 else of_hidden.to(wide)
    parts, part_rows = _parts(block_rows, tokens, depth)
    of_weight = hidden.new_zeros(parts if need_weight else 0, tokens, depth, dtype=wide)
    of_bias = hidden.new_zeros(parts if need_weight else 0, tokens, dtype=wide)

    hidden_rows, weight = dense(hidden), dense(weight)
    per_row = tuple(map(dense, (grad, h, top, log_total)))
    bias = None if bias is None else dense(bias)
    product = {name: block[name] for name in ("ACC", "PRECISION")}
    half = hidden.dtype.itemsize == 2
    product |= {"SPAN": span, "BLOCK_D": 128 if half else 64, "BLOCK_K": 32 if half else 16}
    product |= {"num_warps": 8 if wide == torch.float64 else 4}
    outer = 64 if half else 32
    depths = triton.cdiv(depth, product["BLOCK_D"])
    for first_row in range(0, rows, block_rows):
        last_row = min(rows, first_row + block_rows)
        here = last_row - first_row
        for first_token in spans:
            width = min(span, tokens - first_token)
            launch(
                _slopes_kernel,
                (triton.cdiv(here, block["BLOCK_N"]), triton.cdiv(width, block["BLOCK_V"])),
                *(hidden_rows, weight, bias, *per_row, slopes),
                *(rows, first_row, first_token, tokens, depth, scale),
                SPAN=span,
                **block,
            )
            if need_hidden:
                launch(
                    _hidden_bwd_kernel,
                    (triton.cdiv(here, outer), depths),
                    *(slopes, weight, sums, rows, first_row, first_token, tokens, depth),
                    FURTHER=first_token > 0,
                    BLOCK_N=outer,
                    **product,
                )
            if need_weight:
                launch(
                    _weight_bwd_kernel,
                    (triton.cdiv(width, outer), depths, parts),
                    *(slopes, hidden_rows, of_weight, of_bias),
                    *(first_row, last_row, first_token, part_rows, tokens, depth),
                    FURTHER=first_row > 0,
                    BLOCK_V=outer,
                    **product,
                )
    if not need_weight:
        of_weight, of_bias = weight.new_empty(0, depth), weight.new_empty(0)
    else:
        of_weight, of_bias = of_weight.sum(0), of_bias.sum(0)
    shape = hidden.shape if need_hidden else (0, depth)
    dtype = hidden.dtype
    return sums.to(dtype).view(shape), of_weight.to(dtype), of_bias.to(dtype)


def _parts(rows: int, tokens: int, depth: int) -> tuple[int, int]:
    """Into how many parts the rows of a block fall for the gradient of the weight, and their size.

    As many as keep a GPU busy; every part has a gradient of its own, and they are summed in order.
    """
    programs = triton.cdiv(tokens, 64) * triton.cdiv(depth, 128)
    parts = max(1, min(256 // programs, rows // 256))
    part_rows = triton.cdiv(triton.cdiv(rows, parts), 32) * 32
    return triton.cdiv(rows, part_rows), part_rows


def _tile(dtype: torch.dtype, tokens: int) -> dict[str, object]:
    """A tile of logits and how it is made; what is multiplied exactly takes more registers."""
    rows, columns, depth, warps = 64, 64, 32, 4
    if dtype == torch.float32:
        depth, warps = 16, 8
    elif dtype == torch.float64:
        rows, columns, depth = 32, 32, 16
    elif tokens > 512:
        rows, columns, depth, warps = 128, 128, 64, 8
    return {
        "ACC": accumulator(dtype),
        "PRECISION": precision(dtype),
        "BLOCK_N": rows,
        "BLOCK_V": columns,
        "BLOCK_K": depth,
        "num_warps": warps,
    }


def configurations(device: torch.device, dtype: torch.dtype) -> Iterator[Configuration]:
    """A vocabulary of atoms, with a bias, and that of a language model, without."""
    row = torch.zeros(16, dtype=torch.promote_types(dtype, torch.float32), device=device)
    for tokens, depth in ((38, 128), (4112, 64)):
        hidden = torch.zeros(16, depth, dtype=dtype, device=device)
        weight = torch.zeros(tokens, depth, dtype=dtype, device=device)
        operands = (hidden, weight, weight[:, 0].clone() if tokens == 38 else None)
        yield Configuration(f"{tokens}x{depth}", linear_entropy, (*operands, 1.0, False))
        call = (row, *operands, row, row, row, row.new_empty(0, 0), 1.0, True, True)
        yield Configuration(f"{tokens}x{depth}", linear_entropy_bwd, call)
