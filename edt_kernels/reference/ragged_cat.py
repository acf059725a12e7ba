"""Concatenation molecule by molecule, in plain torch: the definition of correct."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edt_kernels.reference.entropy import accumulation_dtype
from edt_kernels.reference.ragged import add_rows, check_offsets, segment_ids


def ragged_cat(parts: Sequence[Tensor], offsets: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Rows [T, ...] and their offsets [B + 1]; a part without offsets goes to every molecule."""
    for k, (part, own) in enumerate(zip(parts, offsets, strict=True)):
        if own is not None:
            check_offsets(f"offsets[{k}]", own, part.shape[0])
    rows = [part.shape[0] for part in parts]
    places, joined = _places(rows, offsets)
    capacity = ragged_cat_capacity(rows, offsets)
    out = parts[0].new_zeros(capacity + 1, *parts[0].shape[1:])
    for part, place in zip(parts, places, strict=True):
        out.index_put_((place,), part)
    return out[:capacity], joined


def ragged_cat_bwd(
    grad: Tensor, offsets: Sequence[Tensor | None], rows: Sequence[int], wanted: Sequence[bool]
) -> list[Tensor]:
    """Gradient of every part; of a broadcast part the sum over molecules, in their order.

    `rows` are the numbers of rows of the parts. A gradient that is not `wanted` is [0].
    Differentiable in `grad`.
    """
    places, _ = _places(rows, offsets)
    padded = torch.cat([grad, grad.new_zeros(1, *grad.shape[1:])])
    found = []
    for own, place, count, want in zip(offsets, places, rows, wanted, strict=True):
        if not want:
            found.append(grad.new_empty(0))
            continue
        part = padded.index_select(0, place.flatten())
        if own is None:
            row = torch.arange(count, device=grad.device).expand(place.shape).flatten()
            part = add_rows(part.to(accumulation_dtype(grad.dtype)), row, count).to(grad.dtype)
        found.append(part)
    return found


def ragged_cat_capacity(rows: Sequence[int], offsets: Sequence[Tensor | None]) -> int:
    """Rows of the output: a function of shapes alone, at least the last joined offset."""
    molecules = next(own for own in offsets if own is not None).shape[0] - 1
    return sum(
        count if own is not None else molecules * count
        for count, own in zip(rows, offsets, strict=True)
    )


def _places(rows: Sequence[int], offsets: Sequence[Tensor | None]) -> tuple[list[Tensor], Tensor]:
    """Where every row of every part goes, and the joined offsets [B + 1].

    Places are [N_k] for a ragged part, the capacity for its tail; [B, L] for a broadcast part.
    """
    ragged = next(own for own in offsets if own is not None)
    molecules = ragged.shape[0] - 1
    index = torch.arange(molecules + 1, device=ragged.device)
    starts = [
        index * count if own is None else own.long()
        for count, own in zip(rows, offsets, strict=True)
    ]
    joined = torch.stack(starts).sum(0)

    places = []
    begin = joined[:-1]
    for count, own, start in zip(rows, offsets, starts, strict=True):
        row = torch.arange(count, device=ragged.device)
        if own is None:
            places.append(begin.unsqueeze(1) + row)
        else:
            shift = torch.cat([begin - start[:-1], start.new_zeros(1)])
            ids = segment_ids(own, count)
            place = row + shift.index_select(0, ids)
            places.append(place.masked_fill(ids == molecules, ragged_cat_capacity(rows, offsets)))
        begin = begin + start.diff()
    return places, joined.to(ragged.dtype)
