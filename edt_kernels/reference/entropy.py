"""Entropy of softmax(logits), in plain torch: the definition of correct."""

from __future__ import annotations

import torch
from torch import Tensor


def entropy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy in nats and log-sum-exp of every row of `logits` [..., V]; half types in fp32.

    With m the row maximum, S = sum e^(x-m) and T = sum e^(x-m) (x-m): H = ln S - T / S, which
    loses no digits at large |x| as lse - sum p x does. A logit of -inf contributes 0.
    """
    x = logits.to(accumulation_dtype(logits.dtype))
    m = x.detach().amax(-1, keepdim=True)
    shifted = x - m
    weight = shifted.exp()
    total = weight.sum(-1)
    moment = (weight * shifted.masked_fill(shifted == -torch.inf, 0)).sum(-1)
    lse = total.log() + m.squeeze(-1)
    return (total.log() - moment / total).to(logits.dtype), lse


def entropy_bwd(grad: Tensor, logits: Tensor, lse: Tensor) -> Tensor:
    """Gradient -g p (ln p + H) of the entropy; `lse` as the forward returned it."""
    log_p = logits.to(lse.dtype) - lse.unsqueeze(-1)
    p = log_p.exp()
    finite = log_p.masked_fill(log_p == -torch.inf, 0)
    h = -(p * finite).sum(-1, keepdim=True)
    return (-grad.to(lse.dtype).unsqueeze(-1) * p * (finite + h)).to(logits.dtype)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums of half types run in fp32."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32
