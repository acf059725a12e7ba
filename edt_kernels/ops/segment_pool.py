"""Pooling of segments: sum, mean, max and min of the rows that belong together."""

from __future__ import annotations

import torch
from torch import Tensor

from edt_kernels import _check, reference
from edt_kernels._library import define, distinct, kernel_checks, needs_grad, second_order
from edt_kernels.reference.segment_pool import source_dtype

REDUCTIONS = ("mean", "sum", "max", "min")


def _fake(
    values: Tensor, offsets: Tensor, order: Tensor | None, weight: Tensor | None, mean: bool
) -> Tensor:
    return values.new_empty(offsets.shape[0] - 1, *values.shape[1:])


def _fake_bwd(
    grad: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    weight: Tensor | None,
    rows: int,
    mean: bool,
) -> Tensor:
    return grad.new_empty(rows, *grad.shape[1:])


def _fake_weight_bwd(
    grad: Tensor,
    values: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    weight: Tensor,
    mean: bool,
) -> Tensor:
    return weight.new_empty(weight.shape)


def _fake_extreme(
    values: Tensor, offsets: Tensor, order: Tensor | None, largest: bool
) -> tuple[Tensor, Tensor]:
    out = values.new_empty(offsets.shape[0] - 1, *values.shape[1:])
    return out, torch.empty_like(out, dtype=source_dtype(values.dtype))


def _fake_extreme_bwd(
    grad: Tensor, source: Tensor, offsets: Tensor, order: Tensor | None, rows: int
) -> Tensor:
    return grad.new_empty(rows, *grad.shape[1:])


def _fake_sort_ids(ids: Tensor, segments: int) -> tuple[Tensor, Tensor]:
    return ids.new_empty(ids.shape), ids.new_empty(segments + 1)


_pool = define(
    "segment_pool(Tensor values, Tensor offsets, Tensor? order, Tensor? weight, bool mean)"
    " -> Tensor",
    reference=reference.segment_pool,
    fake=_fake,
    triton="segment_pool:segment_pool",
)
_pool_bwd = define(
    "segment_pool_bwd(Tensor grad, Tensor offsets, Tensor? order, Tensor? weight, SymInt rows,"
    " bool mean) -> Tensor",
    reference=reference.segment_pool_bwd,
    fake=_fake_bwd,
    triton="segment_pool:segment_pool_bwd",
)
_weight_bwd = define(
    "segment_pool_weight_bwd(Tensor grad, Tensor values, Tensor offsets, Tensor? order,"
    " Tensor weight, bool mean) -> Tensor",
    reference=reference.segment_pool_weight_bwd,
    fake=_fake_weight_bwd,
    triton="segment_pool:segment_pool_weight_bwd",
)
_extreme = define(
    "segment_extreme(Tensor values, Tensor offsets, Tensor? order, bool largest)"
    " -> (Tensor, Tensor)",
    reference=reference.segment_extreme,
    fake=_fake_extreme,
    triton="segment_pool:segment_extreme",
)
_extreme_bwd = define(
    "segment_extreme_bwd(Tensor grad, Tensor source, Tensor offsets, Tensor? order, SymInt rows)"
    " -> Tensor",
    reference=reference.segment_extreme_bwd,
    fake=_fake_extreme_bwd,
    triton="segment_pool:segment_extreme_bwd",
)
_sort_ids = define(
    "sort_ids(Tensor ids, SymInt segments) -> (Tensor, Tensor)",
    reference=reference.sort_ids,
    fake=_fake_sort_ids,
    triton="sort_ids:sort_ids",
)


class _SegmentPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        values: Tensor,
        weight: Tensor | None,
        rest: tuple[Tensor, Tensor | None, bool],
    ) -> Tensor:
        offsets, order, mean = rest
        # The values are kept for the gradient of the weight alone.
        kept = values if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(kept, offsets, order, weight)
        ctx.options = values.shape[0], mean
        return _pool(values, offsets, order, weight, mean)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, *places, weight = ctx.saved_tensors
        rows, mean = ctx.options
        twice = second_order()
        of_values = of_weight = None
        if ctx.needs_input_grad[0]:
            bwd = reference.segment_pool_bwd if twice else _pool_bwd
            of_values = bwd(grad, *places, weight, rows, mean)
        if ctx.needs_input_grad[1]:
            bwd = reference.segment_pool_weight_bwd if twice else _weight_bwd
            of_weight = bwd(grad, values, *places, weight, mean)
        return of_values, of_weight, None


class _SegmentExtreme(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, rest: tuple[Tensor, Tensor | None, bool]) -> Tensor:
        out, source = _extreme(values, *rest)
        ctx.save_for_backward(source, *rest[:2])
        ctx.rows = values.shape[0]
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        bwd = reference.segment_extreme_bwd if second_order() else _extreme_bwd
        return bwd(grad, *ctx.saved_tensors, ctx.rows), None


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

    Sums run in an order that the segment alone decides: it has the same bits alone or in any
    batch, and for any number of threads.

    Example:
        >>> import torch, edt_kernels
        >>> atoms = torch.tensor([[1.0], [3.0], [5.0]])
        >>> edt_kernels.segment_pool(atoms, torch.tensor([0, 2, 2, 3]))
        tensor([[2.],
                [0.],
                [5.]])
    """
    if not kernel_checks(values):
        _check_arguments(values, offsets, order, weight, reduce)
    try:
        return _reduce(values, offsets, order, weight, reduce)
    except Exception:
        _check_arguments(values, offsets, order, weight, reduce)
        _check.offsets_content("offsets", offsets, values.shape[0])
        if order is not None:
            _check_order_content(order, offsets)
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
        ids: [N] int64, in any order; fastest where they ascend, as in `batch`. A row whose id is
            not in [0, num_segments) is in no segment: it is never read and its gradient is 0.
        num_segments: P, the number of segments to return.
        weight: [N], the dtype of `values`, for sum and mean.
        reduce: "mean", "sum", "max" or "min".

    Returns:
        [P, ...] as `segment_pool` returns it for rows in their order: ties go to the first row.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices disagree; `num_segments` is negative; the reduction is
            unknown, or takes no weight.

    Example:
        >>> import torch, edt_kernels
        >>> edt_kernels.pool_by_id(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 0, 1]), 2)
        tensor([2., 2.])
    """
    if not kernel_checks(values):
        _check_ids(values, ids, num_segments, weight, reduce)
    try:
        order, offsets = _sort_ids(ids, num_segments)
        return _reduce(values, offsets, order, weight, reduce)
    except Exception:
        _check_ids(values, ids, num_segments, weight, reduce)
        raise


def _reduce(
    values: Tensor, offsets: Tensor, order: Tensor | None, weight: Tensor | None, reduce: str
) -> Tensor:
    """`segment_pool` of arguments that were checked, or that the kernel will check."""
    if reduce == "mean" or reduce == "sum":
        mean = reduce == "mean"
        if needs_grad(values, weight):
            return _SegmentPool.apply(*distinct(values, weight), (offsets, order, mean))
        return _pool(values, offsets, order, weight, mean)
    if weight is not None or (reduce != "max" and reduce != "min"):
        raise ValueError("reduce")  # the checks of the public functions say it well
    if needs_grad(values):
        return _SegmentExtreme.apply(values, (offsets, order, reduce == "max"))
    return _extreme(values, offsets, order, reduce == "max")[0]


def _check_values(values: object, weight: object, reduce: object) -> None:
    _check.tensor("values", values)
    _check.rows("values", values)
    _check.choice("reduce", reduce, REDUCTIONS)
    if weight is not None:
        if reduce in ("max", "min"):
            raise ValueError(f"weight must be None for reduce={reduce!r}, got a tensor")
        _check.tensor("weight", weight, dims=1)
        _check.same_dtype("weight", weight, values)
        _per_row("weight", weight, values)


def _check_arguments(
    values: object, offsets: object, order: object, weight: object, reduce: object
) -> None:
    _check_values(values, weight, reduce)
    _check.offsets("offsets", offsets, values)
    if order is not None:
        _check.tensor("order", order, dims=1, dtypes=(torch.int64,))
        _per_row("order", order, values)


def _check_ids(
    values: object, ids: object, num_segments: object, weight: object, reduce: object
) -> None:
    _check_values(values, weight, reduce)
    _check.tensor("ids", ids, dims=1, dtypes=(torch.int64,))
    _per_row("ids", ids, values)
    _check.number("num_segments", num_segments, whole=True, scalar=True)
    if num_segments < 0:
        raise ValueError(f"num_segments must be at least 0, got {num_segments}")


def _per_row(name: str, value: Tensor, values: Tensor) -> None:
    """One entry per row of `values`, on its device."""
    if value.shape[0] != values.shape[0]:
        raise ValueError(
            f"{name} must have shape [N] with N = {values.shape[0]} rows of values, "
            f"got shape {tuple(value.shape)}"
        )
    _check.same_device(name, value, values)


def _check_order_content(order: Tensor, offsets: Tensor) -> None:
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
