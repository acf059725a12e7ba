"""Pooling of segments as a module, with weights that may be learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edt_kernels import _check
from edt_kernels.ops.segment_pool import REDUCTIONS, segment_pool
from edt_kernels.ops.segment_softmax import segment_softmax


class SegmentPool(nn.Module):
    """One vector per segment: mean, sum, max, min, or an average with learned weights.

    "attention" is sum_i a_i x_i with a = softmax over the segment of gate(x_i), gate a learned
    linear map to one number: attention pooling (arXiv:1802.04712) with a linear score.

    Args:
        reduce: "mean", "sum", "max", "min" or "attention".
        width: D, of the rows; for "attention" only.

    Raises:
        ValueError: the reduction is unknown, or `width` is missing or has no use.

    Example:
        >>> import torch
        >>> from edt_kernels.nn import SegmentPool
        >>> atoms, offsets = torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 2, 3])
        >>> SegmentPool("sum")(atoms, offsets)
        tensor([[4.],
                [5.]])
        >>> SegmentPool("attention", width=1)(atoms, offsets).shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        reduce: str = "mean",
        *,
        width: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check.choice("reduce", reduce, (*REDUCTIONS, "attention"))
        if (width is None) == (reduce == "attention"):
            required = "given" if width is None else "None"
            raise ValueError(f"width must be {required} for reduce={reduce!r}, got {width}")
        self.reduce = reduce
        self.gate = None
        if width is not None:
            self.gate = nn.Linear(width, 1, device=device, dtype=dtype)

    def forward(self, values: Tensor, offsets: Tensor, *, order: Tensor | None = None) -> Tensor:
        """Pooled rows [P, ...] of `values` [N, ...] by `offsets` [P + 1].

        Args:
            values: [N, ...]; [N, D] for "attention".
            offsets: [P + 1], int32 or int64. Rows beyond offsets[-1] are tail.
            order: [N] int64, for segments that are no contiguous run.

        Returns:
            [P, ...]; an empty segment is 0. With "attention", rows of tail must be finite where
            the gate is trained.

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: shapes, devices or contents do not fit (see `edt_kernels.segment_pool`).
        """
        if self.gate is None:
            return segment_pool(values, offsets, order=order, reduce=self.reduce)
        # In the dtype of the rows also where autocast has computed the scores in half of it.
        scores = self.gate(values).squeeze(-1).to(values.dtype)
        weight = _softmax(scores, offsets, order)
        return segment_pool(values, offsets, order=order, weight=weight, reduce="sum")

    def extra_repr(self) -> str:
        """What `print` shows beside the parts."""
        return repr(self.reduce)


def _softmax(scores: Tensor, offsets: Tensor, order: Tensor | None) -> Tensor:
    """The softmax of every row's segment [N], where the row stands."""
    if order is None:
        return segment_softmax(scores, offsets)
    # What lies beyond offsets[-1] in `order` may be anything; its weight is 0.
    order = order.clamp(0, max(scores.shape[0] - 1, 0))
    weight = segment_softmax(scores.index_select(0, order), offsets)
    return torch.zeros_like(weight).index_add(0, order, weight)
