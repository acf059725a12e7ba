"""Pooling of segments: sum, mean, max and min of the rows that belong together."""

from __future__ import annotations

import torch
from torch import Tensor

from edt_kernels import _check, reference
from edt_kernels._library import define, needs_grad, second_order

REDUCTIONS = ("mean", "sum", "max", "min")


def _fake(
    values: Tensor, offsets: Tensor, order: Tensor | None, weight: Tensor | None, reduce: str
) -> tuple[Tensor, Tensor]:
    shape = (offsets.shape[0] - 1, *values.shape[1:])
    source = shape if reduce in ("max", "min") else (0,)
    return values.new_empty(shape), offsets.new_empty(source, dtype=torch.int64)


def _fake_bwd(
    grad: Tensor,
    values: Tensor | None,
    offsets: Tensor,
    order: Tensor | None,
    weight: Tensor | None,
    source: Tensor,
    rows: int,
    reduce: str,
) -> tuple[Tensor, Tensor]:
    grad_weight = grad.new_empty(0 if weight is None else rows)
    return grad.new_empty(rows, *grad.shape[1:]), grad_weight


_segment_pool = define(
    "segment_pool(Tensor values, Tensor offsets, Tensor? order, Tensor? weight, str reduce)"
    " -> (Tensor, Tensor)",
    reference=reference.segment_pool,
    fake=_fake,
)
_segment_pool_bwd = define(
    "segment_pool_bwd(Tensor grad, Tensor? values, Tensor offsets, Tensor? order, Tensor? weight,"
    " Tensor source, SymInt rows, str reduce) -> (Tensor, Tensor)",
    reference=reference.segment_pool_bwd,
    fake=_fake_bwd,
)


class _SegmentPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        values: Tensor,
        offsets: Tensor,
        order: Tensor | None,
        weight: Tensor | None,
        reduce: str,
    ) -> Tensor:
        out, source = _segment_pool(values, offsets, order, weight, reduce)
        # Without a weight the gradient does not depend on the values: they are not kept.
        kept = None if weight is None else values
        ctx.save_for_backward(kept, offsets, order, weight, source)
        ctx.rows, ctx.reduce = values.shape[0], reduce
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        bwd = reference.segment_pool_bwd if second_order() else _segment_pool_bwd
        grad_values, grad_weight = bwd(grad, *ctx.saved_tensors, ctx.rows, ctx.reduce)
        return grad_values, None, None, grad_weight if ctx.needs_input_grad[3] else None, None


def segment_pool(
    values: Tensor,
    offsets: Tensor,
    *,
    order: Tensor | None = None,
    weight: Tensor | None = None,
    reduce: str = "mean",
) -> Tensor:
    """Sum, mean, maximum or minimum of the rows of every segment.

    Segment p holds rows offsets[p] to offsets[p+1] of `values`, or with `order` the rows
    order[offsets[p]:offsets[p+1]]. With weights, sum = sum w x and mean = sum w x / sum w.

    Args:
        values: [N, ...], float32, bfloat16, float16 or float64.
        offsets: [P + 1], int32 or int64, from 0, not decreasing, offsets[-1] <= N. Rows beyond
            offsets[-1] are tail: they are never read and their gradient is 0.
        order: [N] int64, for segments that are no contiguous run, such as BRICS fragments. A row
            is in at most one segment; entries beyond offsets[-1] are never read.
        weight: [N], the dtype of `values`; weight[i] belongs to values[i]. For sum and mean only.
        reduce: "mean", "sum", "max" or "min".

    Returns:
        [P, ...], in the dtype of `values`; half types are summed in float32. An empty segment, and
        a mean whose weights sum to 0, is 0 and has gradient 0. Differentiable twice in `values`
        and `weight`. The gradient of max and min goes to the first row, in the order of the
        segment, that holds the extreme; a NaN is the extreme of its segment.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices disagree; `offsets` or `order` is malformed; the reduction is
            unknown, or takes no weight.

    Sums run in row order, so a segment has the same bits alone or in any batch.

    Example:
        >>> import torch, edt_kernels
        >>> atoms = torch.tensor([[1.0], [3.0], [5.0]])
        >>> edt_kernels.segment_pool(atoms, torch.tensor([0, 2, 2, 3]))
        tensor([[2.],
                [0.],
                [5.]])
    """
    _check.tensor("values", values)
    _check.rows("values", values)
    _check.offsets("offsets", offsets, values)
    _check.choice("reduce", reduce, REDUCTIONS)
    if order is not None:
        _check.tensor("order", order, dims=1, dtypes=(torch.int64,))
        _per_row("order", order, values)
    if weight is not None:
        if reduce in ("max", "min"):
            raise ValueError(f"weight must be None for reduce={reduce!r}, got a tensor")
        _check.tensor("weight", weight, dims=1)
        _check.same_dtype("weight", weight, values)
        _per_row("weight", weight, values)
    try:
        if needs_grad(values, weight):
            return _SegmentPool.apply(values, offsets, order, weight, reduce)
        return _segment_pool(values, offsets, order, weight, reduce)[0]
    except RuntimeError:
        _check.offsets_content("offsets", offsets, values.shape[0])
        if order is not None:
            _order_content(order, offsets)
        raise


def pool_by_id(
    values: Tensor,
    ids: Tensor,
    num_segments: int,
    *,
    weight: Tensor | None = None,
    reduce: str = "mean",
) -> Tensor:
    """`segment_pool` where every row names its segment, as `batch` does in PyTorch Geometric.

    Args:
        values: [N, ...], float32, bfloat16, float16 or float64.
        ids: [N] int64, in any order. A row whose id is not in [0, num_segments) is in no segment:
            it is never read and its gradient is 0.
        num_segments: P, the number of segments to return.
        weight: [N], the dtype of `values`, for sum and mean.
        reduce: "mean", "sum", "max" or "min".

    Returns:
        [P, ...] as `segment_pool` returns it: sums run in row order, ties go to the first row.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices disagree; `num_segments` is negative; the reduction is
            unknown, or takes no weight.

    Example:
        >>> import torch, edt_kernels
        >>> edt_kernels.pool_by_id(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 0, 1]), 2)
        tensor([2., 2.])
    """
    _check.tensor("values", values)
    _check.rows("values", values)
    _check.tensor("ids", ids, dims=1, dtypes=(torch.int64,))
    _per_row("ids", ids, values)
    if num_segments < 0:
        raise ValueError(f"num_segments must be at least 0, got {num_segments}")
    inside = (ids >= 0) & (ids < num_segments)
    ids, order = ids.where(inside, num_segments).sort(stable=True)
    offsets = torch.searchsorted(ids, torch.arange(num_segments + 1, device=ids.device))
    return segment_pool(values, offsets, order=order, weight=weight, reduce=reduce)


def _per_row(name: str, value: Tensor, values: Tensor) -> None:
    """One entry per row of `values`, on its device."""
    if value.shape[0] != values.shape[0]:
        raise ValueError(
            f"{name} must have shape [N] with N = {values.shape[0]} rows of values, "
            f"got shape {tuple(value.shape)}"
        )
    _check.same_device(name, value, values)


def _order_content(order: Tensor, offsets: Tensor) -> None:
    """Raise for the first entry of `order` that is out of range or comes twice."""
    seen = {}
    for i, row in enumerate(order[: int(offsets[-1])].tolist()):
        if not 0 <= row < order.shape[0]:
            raise ValueError(
                f"order must hold rows from 0 to {order.shape[0] - 1}, got order[{i}] = {row}"
            )
        if row in seen:
            raise ValueError(
                f"order must hold every row at most once, got {row} at {seen[row]} and at {i}"
            )
        seen[row] = i
