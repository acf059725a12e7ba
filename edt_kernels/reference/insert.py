"""Groups of tokens between the rows of packed text, in plain torch: the definition of correct."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edt_kernels.reference.ragged import check_offsets, segment_ids

IGNORED = -100
"""The label that torch's losses leave out."""


def insert(
    embeds: Tensor,
    embed_offsets: Tensor,
    tokens: Tensor,
    token_offsets: Tensor,
    at: Tensor,
    rows: Tensor | None,
    labels: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows [T + M, E], their offsets [B + 1], positions [T + M] and labels [T + M].

    Without `labels` the last is [0].
    """
    check_offsets("embed_offsets", embed_offsets, embeds.shape[0])
    check_offsets("token_offsets", token_offsets, tokens.shape[0])
    _check_contents(embed_offsets, at, rows)
    capacity = embeds.shape[0] + tokens.shape[0]
    text, inserted = _places(embed_offsets, token_offsets, at, embeds.shape[0], tokens.shape[0])
    out = embeds.new_zeros(capacity + 1, embeds.shape[1])
    out.index_put_((text,), embeds)
    out.index_put_((inserted,), tokens)

    if rows is None:
        rows = torch.searchsorted(embed_offsets[:-1], at, right=True) - 1
    index = torch.arange(embed_offsets.shape[0], device=rows.device)
    groups_before = torch.searchsorted(rows.contiguous(), index)
    offsets = embed_offsets + token_offsets.index_select(0, groups_before)

    ids = segment_ids(offsets, capacity)
    begins = offsets.long().index_select(0, ids)
    positions = torch.arange(capacity, device=at.device) - begins
    positions = positions.masked_fill(ids == offsets.shape[0] - 1, 0)

    if labels is None:
        return out[:capacity], offsets.to(embed_offsets.dtype), positions, at.new_empty(0)
    longer = labels.new_full((capacity + 1,), IGNORED).index_put((text,), labels)
    longer[capacity] = IGNORED
    return out[:capacity], offsets.to(embed_offsets.dtype), positions, longer[:capacity]


def insert_bwd(
    grad: Tensor,
    embed_offsets: Tensor,
    token_offsets: Tensor,
    at: Tensor,
    rows: int,
    tokens: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of the `rows` embeddings and of the `tokens` tokens.

    A gradient that is not `wanted` is [0]. Differentiable in `grad`.
    """
    padded = torch.cat([grad, grad.new_zeros(1, grad.shape[1])])
    places = _places(embed_offsets, token_offsets, at, rows, tokens)
    dembeds, dtokens = (
        padded.index_select(0, place) if want else grad.new_empty(0)
        for place, want in zip(places, wanted, strict=True)
    )
    return dembeds, dtokens


def _check_contents(embed_offsets: Tensor, at: Tensor, rows: Tensor | None) -> None:
    """RuntimeError where groups stand outside the text or out of order; on the CPU only."""
    if at.device.type != "cpu" or at.shape[0] == 0:
        return
    if embed_offsets.shape[0] == 1:
        raise RuntimeError("at must be empty where embed_offsets has no rows")
    if at[0] < 0 or at[-1] > embed_offsets[-1] or (at.diff() < 0).any():
        raise RuntimeError("at must lie between 0 and embed_offsets[-1] and not decrease")
    if rows is None:
        return
    if rows[0] < 0 or rows[-1] >= embed_offsets.shape[0] - 1 or (rows.diff() < 0).any():
        raise RuntimeError("rows must name rows of embed_offsets and not decrease")
    if (at < embed_offsets[rows]).any() or (at > embed_offsets[rows + 1]).any():
        raise RuntimeError("at must lie in the row of its group or at its end")


def _places(
    embed_offsets: Tensor, token_offsets: Tensor, at: Tensor, rows: int, tokens: int
) -> tuple[Tensor, Tensor]:
    """Where every text embedding [T] and every token [M] goes; T + M for tails."""
    nowhere = rows + tokens
    text = torch.arange(rows, device=at.device)
    before = torch.searchsorted(at.contiguous(), text, right=True)  # groups
    shift = token_offsets.long().index_select(0, before)
    text = (text + shift).masked_fill(text >= embed_offsets[-1], nowhere)

    groups = segment_ids(token_offsets, tokens)
    starts = torch.cat([at, at.new_zeros(1)]).index_select(0, groups)
    token = torch.arange(tokens, device=at.device) + starts
    return text, token.masked_fill(groups == at.shape[0], nowhere)
