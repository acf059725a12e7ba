"""Entropy of every atom's distribution and the patches it cuts, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from edt_kernels.reference.entropy import entropy
from edt_kernels.reference.find_patches import find_patches


def entropy_patches(
    logits: Tensor,
    offsets: Tensor,
    scale: float,
    rule: int,
    level: float,
    min_size: int,
    max_size: int | None,
    max_patches: int | None,
    capacity: int,
) -> tuple[Tensor, ...]:
    """What `entropy` returns, 0 in the tail, and what `find_patches` returns for it."""
    tail = torch.arange(logits.shape[0], device=logits.device) >= offsets[-1]
    rows = entropy(logits.masked_fill(tail.unsqueeze(-1), 0), scale)
    rows = tuple(x.masked_fill(tail, 0) for x in rows)
    cut = find_patches(
        rows[0].detach(), offsets, rule, level, min_size, max_size, max_patches, capacity
    )
    return *rows, *cut
