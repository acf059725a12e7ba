"""Softmax within segments."""

from __future__ import annotations

import torch
from torch import Tensor

from edt_kernels import _check, reference
from edt_kernels._library import define, kernel_checks, needs_grad, second_order


def _fake(values: Tensor, offsets: Tensor) -> Tensor:
    return values.new_empty(values.shape)


def _fake_bwd(grad: Tensor, out: Tensor, offsets: Tensor) -> Tensor:
    return out.new_empty(out.shape)


_segment_softmax = define(
    "segment_softmax(Tensor values, Tensor offsets) -> Tensor",
    reference=reference.segment_softmax,
    fake=_fake,
    triton="segment_softmax:segment_softmax",
)
_segment_softmax_bwd = define(
    "segment_softmax_bwd(Tensor grad, Tensor out, Tensor offsets) -> Tensor",
    reference=reference.segment_softmax_bwd,
    fake=_fake_bwd,
    triton="segment_softmax:segment_softmax_bwd",
)


class _SegmentSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, offsets: Tensor) -> Tensor:
        out = _segment_softmax(values, offsets)
        ctx.save_for_backward(out, offsets)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        bwd = reference.segment_softmax_bwd if second_order() else _segment_softmax_bwd
        return bwd(grad, *ctx.saved_tensors), None


def segment_softmax(values: Tensor, offsets: Tensor) -> Tensor:
    """Softmax over the rows of every segment, column by column.

    y_i = e^(x_i - m) / sum_j e^(x_j - m) over the rows j of the segment of row i, m their maximum;
    the gradient is y (g - sum_j y_j g_j). A value of -inf has probability 0, also where all values
    of a segment are -inf.

    Args:
        values: [N, ...], float32, bfloat16, float16 or float64.
        offsets: [P + 1], int32 or int64, from 0, not decreasing, offsets[-1] <= N. Rows beyond
            offsets[-1] are tail: output 0, gradient 0, and a NaN there does not spread.

    Returns:
        [N, ...], in the dtype of `values`; half types are computed in float32. Differentiable
        twice.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices disagree, or `offsets` is malformed.

    A segment has the same bits alone or in any batch.

    Example:
        >>> import torch, edt_kernels
        >>> edt_kernels.segment_softmax(torch.zeros(3), torch.tensor([0, 2, 3]))
        tensor([0.5000, 0.5000, 1.0000])
    """
    if not kernel_checks(values):
        _check_arguments(values, offsets)
    try:
        if needs_grad(values):
            return _SegmentSoftmax.apply(values, offsets)
        return _segment_softmax(values, offsets)
    except Exception:
        _check_arguments(values, offsets)
        _check.offsets_content("offsets", offsets, values.shape[0])
        raise


def _check_arguments(values: object, offsets: object) -> None:
    _check.tensor("values", values)
    _check.rows("values", values)
    _check.offsets("offsets", offsets, values)
