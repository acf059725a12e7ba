"""Entropy of softmax(hidden weight^T + bias) by chunks of rows, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edt_kernels.reference.entropy import accumulation_dtype, entropy, entropy_bwd

CHUNK = 1 << 22  # logits alive at a time


def linear_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """`scale` times the entropy in nats of every row of `hidden` [..., D]; half types in fp32."""
    rows, weight, bias = _widen(hidden, weight, bias)
    parts = [entropy(F.linear(x, weight, bias), scale)[0] for x in _chunks(rows, weight)]
    return torch.cat(parts).reshape(hidden.shape[:-1])


def linear_entropy_bwd(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias from logits computed again; [0] for those not needed."""
    rows, wide, wide_bias = _widen(hidden, weight, bias)
    v, d = weight.shape
    grad_hidden = rows.new_empty(rows.shape[0] if needed[0] else 0, d)
    grad_weight = rows.new_zeros(v if needed[1] else 0, d)
    grad_bias = rows.new_zeros(v if needed[2] else 0)
    grads = _chunks(grad.reshape(-1), wide)
    parts = zip(_chunks(rows, wide), grads, _chunks(grad_hidden, wide), strict=False)
    for x, g, dx in parts:
        logits = F.linear(x, wide, wide_bias)
        dlogits = entropy_bwd(g, logits, *entropy(logits, scale), scale, None)
        if needed[0]:
            torch.mm(dlogits, wide, out=dx)
        if needed[1]:
            grad_weight.addmm_(dlogits.T, x)
        if needed[2]:
            grad_bias += dlogits.sum(0)
    grad_hidden = grad_hidden.reshape(hidden.shape) if needed[0] else grad_hidden
    return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _widen(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype = accumulation_dtype(hidden.dtype)
    rows = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
    return rows, weight.to(dtype), None if bias is None else bias.to(dtype)


def _chunks(rows: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return rows.split(max(64, CHUNK // weight.shape[0]))
