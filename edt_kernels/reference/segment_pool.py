"""Pooling of the rows of every segment, in plain torch: the definition of correct."""

from __future__ import annotations

import torch
from torch import Tensor

from edt_kernels.reference.entropy import accumulation_dtype
from edt_kernels.reference.ragged import add_rows, check_offsets, column, segment_ids, take


def segment_pool(
    values: Tensor, offsets: Tensor, order: Tensor | None, weight: Tensor | None, reduce: str
) -> tuple[Tensor, Tensor]:
    """Pooled segments [P, ...], and for max and min the row that each entry came from.

    That second output is int64, N where a segment is empty, and [0] for sum and mean.
    """
    check_offsets("offsets", offsets, values.shape[0])
    if order is not None:
        _check_order(order, offsets)
    segments = offsets.shape[0] - 1
    ids = segment_ids(offsets, values.shape[0])
    rows = _in_segment_order(values, order, ids, segments)
    if reduce in ("max", "min"):
        return _extreme(values, rows, ids, order, segments, reduce)
    if weight is not None:
        rows = rows * column(_in_segment_order(weight, order, ids, segments), rows)
    total = add_rows(rows, ids, segments)
    if reduce == "mean":
        total = _divide(total, _mass(offsets, order, weight, ids, total))
    return total.to(values.dtype), offsets.new_empty(0, dtype=torch.int64)


def segment_pool_bwd(
    grad: Tensor,
    values: Tensor | None,
    offsets: Tensor,
    order: Tensor | None,
    weight: Tensor | None,
    source: Tensor,
    rows: int,
    reduce: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of the `rows` values and of the weight ([0] without one).

    `source` is the second output of the forward; `values` is needed with a weight only.
    Differentiable in every float argument.
    """
    g = grad.to(accumulation_dtype(grad.dtype))
    no_weight = grad.new_empty(0)
    if reduce in ("max", "min"):
        zeros = g.new_zeros(rows + 1, *g.shape[1:])
        return zeros.scatter(0, source, g)[:rows].to(grad.dtype), no_weight
    segments = offsets.shape[0] - 1
    ids = segment_ids(offsets, rows)
    mass = _mass(offsets, order, weight, ids, g) if reduce == "mean" else None
    if mass is not None:
        g = _divide(g, mass)
    grad_rows = take(g, ids)
    if weight is None:
        return _in_row_order(grad_rows, order, ids, segments).to(grad.dtype), no_weight

    x = _in_segment_order(values, order, ids, segments)
    w = column(_in_segment_order(weight, order, ids, segments), x)
    deviation = x
    if mass is not None:
        deviation = x - take(_divide(add_rows(x * w, ids, segments), mass), ids)
    # Twice, because torch splits the sum of one row alone among threads, which changes its bits.
    products = (grad_rows * deviation).unsqueeze(-1).flatten(1)
    grad_weight = products.expand(2, *products.shape).sum(-1)[0]
    return (
        _in_row_order(grad_rows * w, order, ids, segments).to(grad.dtype),
        _in_row_order(grad_weight, order, ids, segments).to(grad.dtype),
    )


def _check_order(order: Tensor, offsets: Tensor) -> None:
    """RuntimeError unless every row is in range and in at most one segment; on the CPU only."""
    if order.device.type != "cpu":
        return
    used, rows = order[: offsets[-1]], order.shape[0]
    in_range = ((used >= 0) & (used < rows)).all()
    if not in_range or (used.bincount(minlength=1) > 1).any():
        raise RuntimeError(f"order must hold rows from 0 to {rows - 1}, each at most once")


def _in_segment_order(x: Tensor, order: Tensor | None, ids: Tensor, segments: int) -> Tensor:
    """Rows of `x` in the order of the segments, widened; rows of the tail are 0."""
    tail = ids == segments
    if order is not None:
        x = x.index_select(0, order.masked_fill(tail, 0))
    return x.to(accumulation_dtype(x.dtype)).masked_fill(column(tail, x), 0)


def _in_row_order(x: Tensor, order: Tensor | None, ids: Tensor, segments: int) -> Tensor:
    """The transpose of `_in_segment_order`."""
    if order is None:
        return x
    rows = x.shape[0]
    return add_rows(x, order.masked_fill(ids == segments, rows), rows)


def _mass(
    offsets: Tensor, order: Tensor | None, weight: Tensor | None, ids: Tensor, like: Tensor
) -> Tensor:
    """What a mean divides by, shaped as a column of `like`: the number of rows, or their weight."""
    if weight is None:
        mass = offsets.diff().to(like.dtype)
    else:
        segments = offsets.shape[0] - 1
        mass = add_rows(_in_segment_order(weight, order, ids, segments), ids, segments)
    return column(mass, like)


def _divide(x: Tensor, mass: Tensor) -> Tensor:
    """x / mass, and 0 where the mass is 0."""
    nothing = mass == 0
    return (x / mass.masked_fill(nothing, 1)).masked_fill(nothing, 0)


def _extreme(
    values: Tensor, rows: Tensor, ids: Tensor, order: Tensor | None, segments: int, reduce: str
) -> tuple[Tensor, Tensor]:
    """The first row of every segment that holds its extreme, per column; NaN wins."""
    count = rows.shape[0]
    index = column(ids, rows).expand(rows.shape)
    worst = -torch.inf if reduce == "max" else torch.inf
    best = rows.new_full((segments + 1, *rows.shape[1:]), worst)
    best = best.scatter_reduce(0, index, rows, f"a{reduce}")

    hit = (rows == best.gather(0, index)) | rows.isnan()
    position = column(torch.arange(count, device=rows.device), rows).expand(rows.shape)
    first = torch.full_like(best, count, dtype=torch.int64)
    first = first.scatter_reduce(0, index, position.where(hit, count), "amin")[:segments]

    beyond = order.new_full((1,), count) if order is not None else None
    source = first if order is None else torch.cat([order, beyond])[first]
    nothing = values.new_zeros(1, *values.shape[1:])
    return torch.cat([values, nothing]).gather(0, source), source
