"""Pooling of segments: one program per segment and block of columns."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from edt_kernels.reference.segment_pool import source_dtype
from edt_kernels.triton.launch import Configuration, launch
from edt_kernels.triton.primitives import accumulator, dense, tail_programs, zero_rows


@triton.jit
def _mass(begin, end, order_ptr, weight_ptr, ACC: tl.constexpr):
    """What a mean divides by: the number of rows, or the sum of their weights."""
    if weight_ptr is None:
        return (end - begin).to(ACC)
    else:
        mass = tl.zeros((128,), ACC)
        for first in range(begin, end, 128):
            place = first + tl.arange(0, 128)
            row = place if order_ptr is None else tl.load(order_ptr + place, place < end, 0)
            mass += tl.load(weight_ptr + row, place < end, 0.0).to(ACC)
        return tl.sum(mass, 0)


@triton.jit
def _divide(x, mass):
    """x / mass, and 0 where the mass is 0."""
    return tl.where(mass == 0, 0.0, x / tl.where(mass == 0, 1.0, mass))


@triton.jit
def _sum_kernel(
    values_ptr,  # [rows, width]
    offsets_ptr,  # [segments + 1]
    order_ptr,  # [rows] or None
    weight_ptr,  # [rows] or None
    out_ptr,  # [segments, width]
    width,
    MEAN: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = tl.load(offsets_ptr + segment).to(tl.int64)
    end = tl.load(offsets_ptr + segment + 1).to(tl.int64)

    total = tl.zeros((BLOCK_D,), ACC)
    for first in range(begin, end, BLOCK_N):
        place = first + tl.arange(0, BLOCK_N)
        row = place if order_ptr is None else tl.load(order_ptr + place, place < end, 0)
        inside = (place < end)[:, None] & (columns < width)[None, :]
        x = tl.load(values_ptr + row[:, None] * width + columns[None, :], inside, 0.0).to(ACC)
        if weight_ptr is not None:
            x *= tl.load(weight_ptr + row, place < end, 0.0).to(ACC)[:, None]
        total += tl.sum(x, 0)

    if MEAN:
        total = _divide(total, _mass(begin, end, order_ptr, weight_ptr, ACC))
    out = out_ptr + segment * width + columns
    tl.store(out, total.to(out_ptr.dtype.element_ty), columns < width)


@triton.jit(do_not_specialize=["rows", "segments"])
def _sum_bwd_kernel(
    grad_ptr,  # [segments, width]
    offsets_ptr,  # [segments + 1]
    order_ptr,  # [rows] or None: then rows of no segment are 0 already
    weight_ptr,  # [rows] or None
    out_ptr,  # [rows, width]
    rows,
    segments,
    width,
    MEAN: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D
    if segment >= segments:
        tail = tl.load(offsets_ptr + segments).to(tl.int64)
        programs = tl.num_programs(0) - segments
        zero_rows(
            out_ptr, tail, rows, width, segment - segments, programs, column, BLOCK_N, BLOCK_D
        )
        return
    columns = column + tl.arange(0, BLOCK_D)
    begin = tl.load(offsets_ptr + segment).to(tl.int64)
    end = tl.load(offsets_ptr + segment + 1).to(tl.int64)
    g = tl.load(grad_ptr + segment * width + columns, columns < width, 0.0).to(ACC)
    if MEAN:
        g = _divide(g, _mass(begin, end, order_ptr, weight_ptr, ACC))

    for first in range(begin, end, BLOCK_N):
        place = first + tl.arange(0, BLOCK_N)
        row = place if order_ptr is None else tl.load(order_ptr + place, place < end, 0)
        inside = (place < end)[:, None] & (columns < width)[None, :]
        dx = tl.broadcast_to(g[None, :], (BLOCK_N, BLOCK_D))
        if weight_ptr is not None:
            dx *= tl.load(weight_ptr + row, place < end, 0.0).to(ACC)[:, None]
        out = out_ptr + row[:, None] * width + columns[None, :]
        tl.store(out, dx.to(out_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows", "segments"])
def _weight_bwd_kernel(
    grad_ptr,  # [segments, width]
    values_ptr,  # [rows, width]
    mean_ptr,  # [segments, width] or None, for a sum
    offsets_ptr,  # [segments + 1]
    order_ptr,  # [rows] or None: then rows of no segment are 0 already
    weight_ptr,  # [rows]
    out_ptr,  # [rows]
    rows,
    segments,
    width,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    if segment >= segments:
        tail = tl.load(offsets_ptr + segments).to(tl.int64)
        programs = tl.num_programs(0) - segments
        zero_rows(out_ptr, tail, rows, 1, segment - segments, programs, 0, 128, 1)
        return
    begin = tl.load(offsets_ptr + segment).to(tl.int64)
    end = tl.load(offsets_ptr + segment + 1).to(tl.int64)
    mass = tl.full((), 1.0, ACC)
    if mean_ptr is not None:
        mass = _mass(begin, end, order_ptr, weight_ptr, ACC)

    for first in range(begin, end, BLOCK_N):
        place = first + tl.arange(0, BLOCK_N)
        row = place if order_ptr is None else tl.load(order_ptr + place, place < end, 0)
        along = tl.zeros((BLOCK_N,), ACC)
        for column in range(0, width, BLOCK_D):
            columns = column + tl.arange(0, BLOCK_D)
            exists = columns < width
            inside = (place < end)[:, None] & exists[None, :]
            x = tl.load(values_ptr + row[:, None] * width + columns[None, :], inside, 0.0).to(ACC)
            g = tl.load(grad_ptr + segment * width + columns, exists, 0.0).to(ACC)
            if mean_ptr is not None:
                g = _divide(g, mass)
                mean = tl.load(mean_ptr + segment * width + columns, exists, 0.0)
                x = tl.where(inside, x - mean[None, :], 0.0)
            along += tl.sum(x * g[None, :], 1)
        tl.store(out_ptr + row, along.to(out_ptr.dtype.element_ty), place < end)


@triton.jit(do_not_specialize=["rows"])
def _extreme_kernel(
    values_ptr,  # [rows, width]
    offsets_ptr,  # [segments + 1]
    order_ptr,  # [rows] or None
    out_ptr,  # [segments, width]
    source_ptr,  # [segments, width]
    rows,
    width,
    LARGEST: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    exists = columns < width
    begin = tl.load(offsets_ptr + segment).to(tl.int64)
    end = tl.load(offsets_ptr + segment + 1).to(tl.int64)

    best = tl.full((BLOCK_D,), float("-inf"), ACC)
    nowhere = tl.full((), rows, tl.int64)
    at = tl.zeros((BLOCK_D,), tl.int64) + nowhere  # the first place that holds it
    unknown = at  # the first place that holds NaN
    for first in range(begin, end, BLOCK_N):
        place = first + tl.arange(0, BLOCK_N)
        row = place if order_ptr is None else tl.load(order_ptr + place, place < end, 0)
        inside = (place < end)[:, None] & exists[None, :]
        x = tl.load(values_ptr + row[:, None] * width + columns[None, :], inside, 0.0).to(ACC)
        x = x if LARGEST else -x
        defined = inside & (x == x)
        x = tl.where(defined, x, float("-inf"))
        here = tl.max(x, 0)
        hit = defined & (x == here[None, :])
        first_hit = tl.min(tl.where(hit, place[:, None], nowhere), 0)
        higher = (here > best) | (at == nowhere)
        best = tl.where(higher, here, best)
        at = tl.where(higher, first_hit, at)
        missing = tl.where(inside & (defined == 0), place[:, None], nowhere)
        unknown = tl.minimum(unknown, tl.min(missing, 0))

    at = tl.where(unknown < nowhere, unknown, at)
    found = (at < nowhere) & exists
    source = at if order_ptr is None else tl.load(order_ptr + at, found, 0)
    source = tl.where(found, source, rows)
    value = tl.load(values_ptr + source * width + columns, found, 0.0)
    tl.store(out_ptr + segment * width + columns, value, exists)
    source = source.to(source_ptr.dtype.element_ty)
    tl.store(source_ptr + segment * width + columns, source, exists)


@triton.jit(do_not_specialize=["rows", "segments"])
def _extreme_bwd_kernel(
    grad_ptr,  # [segments, width]
    source_ptr,  # [segments, width]
    offsets_ptr,  # [segments + 1]
    order_ptr,  # [rows] or None: then rows of no segment are 0 already
    out_ptr,  # [rows, width]
    rows,
    segments,
    width,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D
    if segment >= segments:
        tail = tl.load(offsets_ptr + segments).to(tl.int64)
        programs = tl.num_programs(0) - segments
        zero_rows(
            out_ptr, tail, rows, width, segment - segments, programs, column, BLOCK_N, BLOCK_D
        )
        return
    columns = column + tl.arange(0, BLOCK_D)
    begin = tl.load(offsets_ptr + segment).to(tl.int64)
    end = tl.load(offsets_ptr + segment + 1).to(tl.int64)
    g = tl.load(grad_ptr + segment * width + columns, columns < width, 0.0)
    source = tl.load(source_ptr + segment * width + columns, columns < width, 0)
    for first in range(begin, end, BLOCK_N):
        place = first + tl.arange(0, BLOCK_N)
        row = place if order_ptr is None else tl.load(order_ptr + place, place < end, 0)
        inside = (place < end)[:, None] & (columns < width)[None, :]
        dx = tl.where(row[:, None] == source[None, :], g[None, :], 0.0)
        out = out_ptr + row[:, None] * width + columns[None, :]
        tl.store(out, dx.to(out_ptr.dtype.element_ty), inside)


def _tile(width: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows and columns that a program reads at a time."""
    columns = min(256, triton.next_power_of_2(width))
    rows = (512 if dtype == torch.float64 else 1024) // columns
    return {"BLOCK_N": min(rows, 128), "BLOCK_D": columns, "num_warps": 4}


def _width(x: Tensor) -> int:
    """Columns of x [N, ...]."""
    return x[0].numel() if x.shape[0] else x.new_empty(1, *x.shape[1:]).numel()


def _optional(x: Tensor | None) -> Tensor | None:
    return None if x is None else dense(x)


def segment_pool(
    values: Tensor, offsets: Tensor, order: Tensor | None, weight: Tensor | None, mean: bool
) -> Tensor:
    """Launch `_sum_kernel`."""
    out = values.new_empty(offsets.shape[0] - 1, *values.shape[1:])
    _pool_into(out, values, offsets, order, weight, mean)
    return out


def _pool_into(
    out: Tensor,
    values: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    weight: Tensor | None,
    mean: bool,
) -> None:
    if out.numel() == 0:
        return
    width = out.numel() // out.shape[0]
    block = _tile(width, values.dtype)
    launch(
        _sum_kernel,
        (out.shape[0], triton.cdiv(width, block["BLOCK_D"])),
        *(dense(values), dense(offsets), _optional(order), _optional(weight), out),
        width,
        MEAN=mean,
        ACC=accumulator(values.dtype),
        **block,
    )


def segment_pool_bwd(
    grad: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    weight: Tensor | None,
    rows: int,
    mean: bool,
) -> Tensor:
    """Launch `_sum_bwd_kernel`."""
    shape = (rows, *grad.shape[1:])
    out = grad.new_empty(shape) if order is None else grad.new_zeros(shape)
    if out.numel() == 0:
        return out
    segments, width = grad.shape[0], out.numel() // rows
    block = _tile(width, grad.dtype)
    programs = _programs(segments, order, rows, block["BLOCK_N"])
    launch(
        _sum_bwd_kernel,
        (programs, triton.cdiv(width, block["BLOCK_D"])),
        *(dense(grad), dense(offsets), _optional(order), _optional(weight), out),
        *(rows, segments, width),
        MEAN=mean,
        ACC=accumulator(grad.dtype),
        **block,
    )
    return out


def segment_pool_weight_bwd(
    grad: Tensor,
    values: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    weight: Tensor,
    mean: bool,
) -> Tensor:
    """Launch `_sum_kernel` for the means, unless it is a sum, and `_weight_bwd_kernel`."""
    out = weight.new_empty(weight.shape) if order is None else weight.new_zeros(weight.shape)
    rows, segments = values.shape[0], grad.shape[0]
    if values.numel() == 0:
        return out.zero_()
    means = None
    if mean:
        means = grad.new_empty(grad.shape, dtype=torch.promote_types(grad.dtype, torch.float32))
        _pool_into(means, values, offsets, order, weight, True)
    width = values.numel() // rows
    block = _tile(width, grad.dtype)
    launch(
        _weight_bwd_kernel,
        (_programs(segments, order, rows, 128),),
        *(dense(grad), dense(values), means, dense(offsets), _optional(order), dense(weight), out),
        *(rows, segments, width),
        ACC=accumulator(grad.dtype),
        **block,
    )
    return out


def segment_extreme(
    values: Tensor, offsets: Tensor, order: Tensor | None, largest: bool
) -> tuple[Tensor, Tensor]:
    """Launch `_extreme_kernel`."""
    out = values.new_empty(offsets.shape[0] - 1, *values.shape[1:])
    source = torch.empty_like(out, dtype=source_dtype(values.dtype))
    if out.numel() == 0:
        return out, source
    width = out.numel() // out.shape[0]
    block = _tile(width, values.dtype)
    launch(
        _extreme_kernel,
        (out.shape[0], triton.cdiv(width, block["BLOCK_D"])),
        *(dense(values), dense(offsets), _optional(order), out, source),
        *(values.shape[0], width),
        LARGEST=largest,
        ACC=accumulator(values.dtype),
        **block,
    )
    return out, source


def segment_extreme_bwd(
    grad: Tensor, source: Tensor, offsets: Tensor, order: Tensor | None, rows: int
) -> Tensor:
    """Launch `_extreme_bwd_kernel`."""
    shape = (rows, *grad.shape[1:])
    out = grad.new_empty(shape) if order is None else grad.new_zeros(shape)
    if out.numel() == 0:
        return out
    segments, width = grad.shape[0], out.numel() // rows
    block = _tile(width, grad.dtype)
    programs = _programs(segments, order, rows, block["BLOCK_N"])
    launch(
        _extreme_bwd_kernel,
        (programs, triton.cdiv(width, block["BLOCK_D"])),
        *(dense(grad), dense(source), dense(offsets), _optional(order), out),
        *(rows, segments, width),
        **block,
    )
    return out


def _programs(segments: int, order: Tensor | None, rows: int, block: int) -> int:
    """One per segment; without an order the tail is contiguous and has some too."""
    return segments + (tail_programs(rows, block) if order is None else 0)


def configurations(device: torch.device, dtype: torch.dtype) -> Iterator[Configuration]:
    """One column, and atoms of a graph encoder, in runs and by order and weight."""
    offsets = torch.zeros(2, dtype=torch.int64, device=device)
    order = torch.zeros(16, dtype=torch.int64, device=device)
    for width in (1, 768):
        values = torch.zeros(16, width, dtype=dtype, device=device)
        weight, grad = values[:, 0].clone(), values[:1]
        source = torch.zeros(1, width, dtype=source_dtype(dtype), device=device)
        for kind, o, w in (("", None, None), ("-order-weight", order, weight)):
            name, call = f"{width}{kind}", (offsets, o, w)
            yield Configuration(name, segment_pool, (values, *call, True))
            yield Configuration(name, segment_pool_bwd, (grad, *call, 16, True))
            if width == 1:
                continue
            yield Configuration(name, segment_pool, (values, *call, False))
            yield Configuration(name, segment_extreme, (values, offsets, o, True))
            yield Configuration(name, segment_extreme_bwd, (grad, source, offsets, o, 16))
            if w is not None:
                yield Configuration(name, segment_pool_weight_bwd, (grad, values, *call, True))
