"""Molecule tokens in their slots, in plain torch: the definition of correct."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edt_kernels.reference.entropy import accumulation_dtype
from edt_kernels.reference.ragged import add_rows, check_offsets


def splice(
    embeds: Tensor,
    tokens: Tensor,
    token_offsets: Tensor,
    slots: Tensor,
    new_rows: Tensor | None,
    new_ids: Tensor | None,
) -> Tensor:
    """`embeds` with tokens in the slots of their row, and `new_rows` where `new_ids` is >= 0."""
    added = 0 if new_rows is None else new_rows.shape[0]
    check_offsets("token_offsets", token_offsets, tokens.shape[0])
    _check_contents(token_offsets, slots, new_ids, added)
    source = _sources(token_offsets, slots, new_ids, tokens.shape[0], added)
    nothing = tokens.new_zeros(1, tokens.shape[1])
    table = torch.cat([tokens, nothing] if new_rows is None else [tokens, new_rows, nothing])
    kept = (source == tokens.shape[0] + added).unsqueeze(-1)
    return torch.where(kept, embeds, table[source]).contiguous()


def splice_bwd(
    grad: Tensor,
    token_offsets: Tensor,
    slots: Tensor,
    new_ids: Tensor | None,
    tokens: int,
    added: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `embeds`, of the `tokens` tokens and of the `added` new rows.

    A gradient that is not `wanted` is [0]. Differentiable in `grad`.
    """
    source = _sources(token_offsets, slots, new_ids, tokens, added)
    grad_embeds = grad_tokens = grad_rows = grad.new_empty(0)
    if wanted[0]:
        grad_embeds = grad.masked_fill((source < tokens + added).unsqueeze(-1), 0).contiguous()
    if wanted[1] or wanted[2]:
        rows = grad.flatten(0, -2).to(accumulation_dtype(grad.dtype))
        table = add_rows(rows, source.flatten(), tokens + added).to(grad.dtype)
        grad_tokens, grad_rows = table.split([tokens, added])
    return (
        grad_embeds,
        grad_tokens.clone() if wanted[1] else grad.new_empty(0),
        grad_rows.clone() if wanted[2] else grad.new_empty(0),
    )


def _check_contents(
    token_offsets: Tensor, slots: Tensor, new_ids: Tensor | None, added: int
) -> None:
    """RuntimeError where slots and tokens disagree, or an id is too large; on the CPU only."""
    if slots.device.type != "cpu":
        return
    if (_by_row(slots).sum(1) != token_offsets.diff()).any():
        raise RuntimeError("slots must hold as many slots in every row as the row has tokens")
    if new_ids is not None and (new_ids >= added).any():
        raise RuntimeError(f"new_ids must be below {added}, the number of new rows")


def _by_row(slots: Tensor) -> Tensor:
    """[B, S]: packed slots [T] are one row."""
    return slots if slots.dim() == 2 else slots.unsqueeze(0)


def _sources(
    token_offsets: Tensor, slots: Tensor, new_ids: Tensor | None, tokens: int, added: int
) -> Tensor:
    """Where every output row comes from, of the shape of `slots`.

    Tokens count from 0, new rows from `tokens`; `tokens + added` keeps the text embedding.
    """
    mask = _by_row(slots)
    rank = mask.cumsum(1) - 1
    lengths = token_offsets.diff().unsqueeze(1)
    source = (token_offsets[:-1].unsqueeze(1) + rank).long()
    kept = tokens + added
    source = source.where(mask & (rank < lengths), kept).reshape(slots.shape)
    if new_ids is None:
        return source
    is_new = ~slots & (new_ids >= 0) & (new_ids < added)
    return torch.where(is_new, tokens + new_ids, source)
