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


def mean_by_index_add(ids: Tensor, counts: Tensor):
    def run(x: Tensor) -> Tensor:
        total = x.new_zeros(len(counts), *x.shape[1:]).index_add_(0, ids, x)
        return total / counts.to(x.dtype).unsqueeze(1)

    return run


def by_scatter_reduce(ids: Tensor, segments: int, reduce: str):
    def run(x: Tensor) -> Tensor:
        index = ids.unsqueeze(1).expand_as(x)
        out = x.new_zeros(segments, *x.shape[1:])
        return out.scatter_reduce(0, index, x, reduce, include_self=False)

    return run


def by_segment_reduce(offsets: Tensor, reduce: str):
    def run(x: Tensor) -> Tensor:
        return torch.segment_reduce(x, reduce, offsets=offsets, axis=0, unsafe=True)

    return run


def by_masked_scatter(slots: Tensor):
    def run(embeds: Tensor, tokens: Tensor) -> Tensor:
        return embeds.masked_scatter(slots.unsqueeze(-1), tokens)

    return run


def by_where(slots: Tensor):
    def run(embeds: Tensor, tokens: Tensor) -> Tensor:
        rank = (slots.flatten().cumsum(0) - 1).clamp(min=0).view(slots.shape)
        return torch.where(slots.unsqueeze(-1), tokens[rank], embeds)

    return run
