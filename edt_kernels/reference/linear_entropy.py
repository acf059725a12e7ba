"""Entropy of softmax(hidden weight^T + bias) by chunks of rows, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edt_kernels.reference.entropy import accumulation_dtype, entropy, entropy_bwd

CHUNK = 1 << 22  # logits alive at a time
# What rows of kept logits are filled up to: whole vectors of any instruction set.
KEPT_MULTIPLE = 16


def kept_shape(hidden: Tensor, weight: Tensor, keep: bool) -> tuple[int, int]:
    """Shape of the logits that are kept for the backward, on the CPU, if at all."""
    tokens = -(-weight.shape[0] // KEPT_MULTIPLE) * KEPT_MULTIPLE
    if not keep or hidden.device.type != "cpu":
        return 0, tokens
    return hidden.shape[:-1].numel(), tokens


def linear_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `entropy` returns for the logits of every row of `hidden` [..., D], and those kept.

    Logits are made by chunks; half types are multiplied and summed in float32. Kept are
    [N, V filled up with -inf], in the dtype of sums, or no rows: if not asked to `keep`, or not on
    the CPU.
    """
    rows, wide, bias = _widen(hidden, weight, bias)
    kept = rows.new_full(kept_shape(hidden, weight, keep), -torch.inf)
    parts, start = [], 0
    for x in _chunks(rows, wide):
        logits = F.linear(x, wide, bias)
        parts.append(entropy(logits, scale))
        if len(kept):
            kept[start : start + len(x), : logits.shape[1]] = logits
        start += len(x)
    sums = (torch.cat(part).reshape(hidden.shape[:-1]) for part in zip(*parts, strict=True))
    return *sums, kept


def linear_entropy_bwd(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    top: Tensor,
    log_total: Tensor,
    kept: Tensor,
    scale: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, with no rows where not needed.

    The bias goes with the weight. Logits that are not `kept` are computed again.
    """
    rows, wide, wide_bias = _widen(hidden, weight, bias)
    v, d = weight.shape
    grad_hidden = rows.new_empty(rows.shape[0] if need_hidden else 0, d)
    grad_weight = rows.new_zeros(v if need_weight else 0, d)
    grad_bias = rows.new_zeros(v if need_weight else 0)
    per_row = (_chunks(row.reshape(-1), wide) for row in (grad, h, top, log_total))
    start = 0
    for x, g, *saved in zip(_chunks(rows, wide), *per_row, strict=True):
        here = slice(start, start + len(x))
        logits = kept[here, :v] if len(kept) else F.linear(x, wide, wide_bias)
        dlogits = entropy_bwd(g, logits, *saved, scale, None)
        if need_hidden:
            torch.mm(dlogits, wide, out=grad_hidden[here])
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
    rows = hidden.reshape(hidden.shape[:-1].numel(), hidden.shape[-1]).to(dtype)
    return rows, weight.to(dtype), None if bias is None else bias.to(dtype)


def _chunks(rows: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return rows.split(max(64, CHUNK // weight.shape[0]))
