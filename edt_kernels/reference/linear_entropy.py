"""Entropy of softmax(hidden weight^T + bias) by chunks of rows, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edt_kernels.reference.entropy import accumulation_dtype, entropy, entropy_bwd

CHUNK = 1 << 22  # logits alive at a time


def linear_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What `entropy` returns for the logits of every row of `hidden` [..., D], made by chunks.

    Half types are multiplied and summed in float32.
    """
    rows, weight, bias = _widen(hidden, weight, bias)
    parts = [entropy(F.linear(x, weight, bias), scale) for x in _chunks(rows, weight)]
    return tuple(torch.cat(part).reshape(hidden.shape[:-1]) for part in zip(*parts, strict=True))


def linear_entropy_bwd(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    top: Tensor,
    log_total: Tensor,
    scale: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias from logits computed again; no rows where not needed.

    The bias goes with the weight.
    """
    rows, wide, wide_bias = _widen(hidden, weight, bias)
    v, d = weight.shape
    grad_hidden = rows.new_empty(rows.shape[0] if need_hidden else 0, d)
    grad_weight = rows.new_zeros(v if need_weight else 0, d)
    grad_bias = rows.new_zeros(v if need_weight else 0)
    per_row = (_chunks(row.reshape(-1), wide) for row in (grad, h, top, log_total))
    start = 0
    for x, g, *saved in zip(_chunks(rows, wide), *per_row, strict=True):
        logits = F.linear(x, wide, wide_bias)
        dlogits = entropy_bwd(g, logits, *saved, scale, None)
        if need_hidden:
            torch.mm(dlogits, wide, out=grad_hidden[start : start + len(x)])
        if need_weight:
            grad_weight.addmm_(dlogits.T, x)
            grad_bias += dlogits.sum(0)
        start += len(x)
    grad_hidden = grad_hidden.reshape(hidden.shape) if need_hidden else grad_hidden
    return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _widen(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype = accumulation_dtype(hidden.dtype)
    rows = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
    return rows, weight.to(dtype), None if bias is None else bias.to(dtype)


def _chunks(rows: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return rows.split(max(64, CHUNK // weight.shape[0]))
