"""Pooling of the rows of every segment, in plain torch: the definition of correct."""

from __future__ import annotations

import torch
from torch import Tensor

from edt_kernels.reference.entropy import accumulation_dtype
from edt_kernels.reference.ragged import add_rows, check_offsets, column, segment_ids, take


def segment_pool(
    values: Tensor, offsets: Tensor, order: Tensor | None, weight: Tensor | None, mean: bool
) -> Tensor:
    """Sum of every segment's rows [P, ...], or their mean."""
    rows, ids = _segment_rows(values, offsets, order)
    segments = offsets.shape[0] - 1
    if weight is not None:
        rows = rows * column(_in_segment_order(weight, order, ids, segments), rows)
    total = add_rows(rows, ids, segments)
    if mean:
        total = _divide(total, _mass(offsets, order, weight, ids, total))
    return total.to(values.dtype)


def segment_pool_bwd(
    grad: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    weight: Tensor | None,
    rows: int,
    mean: bool,
) -> Tensor:
    """Gradient of the values [rows, ...]; differentiable in `grad` and `weight`."""
    g, ids = _mean_grad(grad, offsets, order, weight, rows, mean)
    segments = offsets.shape[0] - 1
    grad_rows = take(g, ids)
    if weight is not None:
        grad_rows = grad_rows * column(_in_segment_order(weight, order, ids, segments), grad_rows)
    return _in_row_order(grad_rows, order, ids, segments).to(grad.dtype)


def segment_pool_weight_bwd(
    grad: Tensor,
    values: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    weight: Tensor,
    mean: bool,
) -> Tensor:
    """Gradient of the weight [N]; differentiable in every float argument."""
    g, ids = _mean_grad(grad, offsets, order, weight, values.shape[0], mean)
    segments = offsets.shape[0] - 1
    x = _in_segment_order(values, order, ids, segments)
    deviation = x
    if mean:
        w = column(_in_segment_order(weight, order, ids, segments), x)
        mass = _mass(offsets, order, weight, ids, x)
        deviation = x - take(_divide(add_rows(x * w, ids, segments), mass), ids)
    # Twice, because torch splits the sum of one row alone among threads, which changes its bits.
    products = (take(g, ids) * deviation).unsqueeze(-1).flatten(1)
    grad_weight = products.expand(2, *products.shape).sum(-1)[0]
    return _in_row_order(grad_weight, order, ids, segments).to(grad.dtype)


def segment_extreme(
    values: Tensor, offsets: Tensor, order: Tensor | None, largest: bool
) -> tuple[Tensor, Tensor]:
    """The maximum or minimum of every segment [P, ...], and the first row that holds it.

    NaN wins. In an empty segment the extreme is 0 and its row is N.
    """
    rows, ids = _segment_rows(values, offsets, order)
    segments, count = offsets.shape[0] - 1, rows.shape[0]
    index = column(ids, rows).expand(rows.shape)
    best = rows.new_full((segments + 1, *rows.shape[1:]), -torch.inf if largest else torch.inf)
    best = best.scatter_reduce(0, index, rows, "amax" if largest else "amin")

    hit = (rows == best.gather(0, index)) | rows.isnan()
    position = column(torch.arange(count, device=rows.device), rows).expand(rows.shape)
    first = torch.full_like(best, count, dtype=torch.int64)
    first = first.scatter_reduce(0, index, position.where(hit, count), "amin")[:segments]

    beyond = order.new_full((1,), count) if order is not None else None
    source = first if order is None else torch.cat([order, beyond])[first]
    nothing = values.new_zeros(1, *values.shape[1:])
    out = torch.cat([values, nothing]).gather(0, source)
    return out, source.to(source_dtype(values.dtype))


def segment_extreme_bwd(
    grad: Tensor, source: Tensor, offsets: Tensor, order: Tensor | None, rows: int
) -> Tensor:
    """Gradient of the values [rows, ...]; differentiable in `grad`."""
    zeros = grad.new_zeros(rows + 1, *grad.shape[1:])
    return zeros.scatter(0, source.long(), grad)[:rows]


def source_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the row that an extreme came from: as wide as the number that it is found with."""
    return torch.int64 if dtype == torch.float64 else torch.int32


def sort_ids(ids: Tensor, segments: int) -> tuple[Tensor, Tensor]:
    """Rows in the order of their ids, and the offsets [segments + 1] of the ids 0, 1, ...

    Rows of one id stay in their order; those with an id outside [0, segments) come last.
    """
    inside = (ids >= 0) & (ids < segments)
    ids, order = ids.where(inside, segments).sort(stable=True)
    return order, torch.searchsorted(ids, torch.arange(segments + 1, device=ids.device))


def _check_order(order: Tensor, offsets: Tensor) -> None:
    """RuntimeError unless every row is in range and in at most one segment; on the CPU only."""
    if order.device.type != "cpu":
        return
    used, rows = order[: offsets[-1]], order.shape[0]
    in_range = ((used >= 0) & (used < rows)).all()
    if not in_range or (used.bincount(minlength=1) > 1).any():
        raise RuntimeError(f"order must hold rows from 0 to {rows - 1}, each at most once")


def _segment_rows(values: Tensor, offsets: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows of `values` in the order of the segments, widened, and the segment of each."""
    check_offsets("offsets", offsets, values.shape[0])
    if order is not None:
        _check_order(order, offsets)
    ids = segment_ids(offsets, values.shape[0])
    return _in_segment_order(values, order, ids, offsets.shape[0] - 1), ids


def _mean_grad(
    grad: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    weight: Tensor | None,
    rows: int,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of the sums, widened, from that of the output; and the segment of every place."""
    ids = segment_ids(offsets, rows)
    g = grad.to(accumulation_dtype(grad.dtype))
    return _divide(g, _mass(offsets, order, weight, ids, g)) if mean else g, ids


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
