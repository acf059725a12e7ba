"""Softmax within every segment, in plain torch: the definition of correct."""

from __future__ import annotations

import torch
from torch import Tensor

from edt_kernels.reference.entropy import accumulation_dtype
from edt_kernels.reference.ragged import add_rows, check_offsets, column, segment_ids, take


def segment_softmax(values: Tensor, offsets: Tensor) -> Tensor:
    """e^(x - m) / sum e^(x - m) with m the maximum of the segment; rows of the tail are 0."""
    check_offsets("offsets", offsets, values.shape[0])
    segments = offsets.shape[0] - 1
    ids = segment_ids(offsets, values.shape[0])
    x = values.to(accumulation_dtype(values.dtype))
    x = x.masked_fill(column(ids == segments, x), -torch.inf)

    top = x.new_full((segments + 1, *x.shape[1:]), -torch.inf)
    top = top.scatter_reduce(0, column(ids, x).expand(x.shape), x, "amax")
    weight = (x - top.masked_fill(top == -torch.inf, 0).index_select(0, ids)).exp()
    total = take(add_rows(weight, ids, segments), ids)
    return (weight / total.masked_fill(total == 0, 1)).to(values.dtype).contiguous()


def segment_softmax_bwd(grad: Tensor, out: Tensor, offsets: Tensor) -> Tensor:
    """Gradient y (g - sum y g) of the softmax `out`; differentiable in `grad` and `out`."""
    segments = offsets.shape[0] - 1
    ids = segment_ids(offsets, out.shape[0])
    y = out.to(accumulation_dtype(out.dtype))
    g = grad.to(y.dtype).masked_fill(column(ids == segments, y), 0)
    grad_values = y * (g - take(add_rows(y * g, ids, segments), ids))
    return grad_values.to(out.dtype).contiguous()
