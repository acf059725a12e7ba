"""Ways to compute the same with torch or torch-scatter that more than one contest takes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor


def from_log_softmax(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def from_clamped_softmax(logits: Tensor) -> Tensor:
    """As the published program writes it."""
    p = logits.softmax(-1).clamp(min=1e-12)
    return -(p * p.log()).sum(-1)


def quantile_rule(entropy: Tensor) -> Tensor:
    """Patch of every atom by the published rule; entropies [B, L], NaN in the padding."""
    threshold = torch.nanquantile(entropy, 0.75, dim=1, keepdim=True)
    high = entropy > threshold
    rising = high.clone()
    rising[:, 1:] &= ~high[:, :-1]
    return rising.cumsum(1) - rising.long()


def torch_scatter(name: str, **options: object) -> Callable[..., Tensor]:
    """A function of torch-scatter with options; where it is not installed, one that says so."""

    def missing(*_: object) -> Tensor:
        raise ModuleNotFoundError("torch-scatter is not installed")

    try:
        return partial(getattr(importlib.import_module("torch_scatter"), name), **options)
    except ImportError:
        return missing
