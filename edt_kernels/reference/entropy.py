"""Entropy of softmax(logits), in plain torch: the definition of correct."""

from __future__ import annotations

import torch
from torch import Tensor


def entropy(logits: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """`scale` times the entropy in nats of every row of `logits` [..., V]; row maxima m; and ln S.

    With S = sum e^(x-m) and T = sum e^(x-m) (x-m): H = ln S - T / S, which loses no digits at
    large |x| as lse - sum p x does. A logit of -inf contributes 0. Half types run in fp32.
    """
    x = logits.to(accumulation_dtype(logits.dtype))
    top = x.detach().amax(-1, keepdim=True)
    shifted = x - top
    weight = shifted.exp()
    total = weight.sum(-1)
    moment = (weight * shifted.masked_fill(shifted == -torch.inf, 0)).sum(-1)
    log_total = total.log()
    h = scale * (log_total - moment / total)
    return h.contiguous(), top.squeeze(-1).contiguous(), log_total.contiguous()


def entropy_bwd(
    grad: Tensor,
    logits: Tensor,
    h: Tensor,
    top: Tensor,
    log_total: Tensor,
    scale: float,
    offsets: Tensor | None,
) -> Tensor:
    """Gradient -g p (ln p + H) of the entropy; `h`, `top`, `log_total` as the forward gave them.

    With `offsets`, rows from offsets[-1] on have gradient 0 whatever they hold.
    """
    log_p = logits.to(h.dtype) - top.unsqueeze(-1) - log_total.unsqueeze(-1)
    p = log_p.exp()
    slope = log_p.masked_fill(p == 0, 0) * scale + h.unsqueeze(-1)
    dlogits = -grad.unsqueeze(-1) * p * slope
    if offsets is not None:
        row = torch.arange(logits.shape[0], device=logits.device)
        dlogits = dlogits.masked_fill((row >= offsets[-1]).unsqueeze(-1), 0)
    return dlogits.to(logits.dtype).contiguous()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums of half types run in fp32."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32
