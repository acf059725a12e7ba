"""Cutting molecules into patches at entropy peaks, in plain torch and without a host sync."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from edt_kernels import _check
from edt_kernels.reference.entropy import accumulation_dtype


class Rule(IntEnum):
    """Where patches open; the kernels know the rules by these numbers."""

    LOCAL_MAX = 0
    RISING_EDGE = 1
    THRESHOLD = 2
    MONOTONIC = 3


def find_patches(
    entropy: Tensor,
    offsets: Tensor,
    rule: int,
    level: float,
    min_size: int,
    max_size: int | None,
    max_patches: int | None,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(ids [N], atom_offsets [capacity + 1], patch_offsets [B + 1], count [], threshold [B]).

    `level` is the quantile of `RISING_EDGE`, the threshold of `THRESHOLD` and `MONOTONIC`.
    """
    rows = entropy.shape[0]
    if offsets.device.type == "cpu":
        _check.offsets_content("offsets", offsets, rows)
    offsets = offsets.long()
    entropy = entropy.to(accumulation_dtype(entropy.dtype))
    batch = _Rows(offsets, rows)
    threshold = entropy.new_full((offsets.shape[0] - 1,), level)
    deciding = entropy
    if rule == Rule.LOCAL_MAX:
        threshold.fill_(torch.nan)
        opens = _local_max(entropy, batch)
    elif rule == Rule.RISING_EDGE:
        threshold = _quantile(entropy, offsets, batch, level)
        opens = _after_edges(entropy, threshold, batch)
        deciding = entropy.roll(1)
    elif rule == Rule.THRESHOLD:
        opens = (entropy > level) & batch.inside & ~batch.first
    else:
        opens = (entropy - entropy.roll(1) > level) & batch.inside & ~batch.first

    if min_size > 1:
        opens = _keep_min_size(opens, min_size, batch)
    if max_size is not None:
        start = torch.where(opens | batch.first, batch.row, 0).cummax(0).values
        opens = opens | (batch.inside & ((batch.row - start) % max_size == 0))
    if max_patches is not None:
        opens = _keep_highest(opens & ~batch.first, deciding, max_patches - 1, offsets, batch)
    return *_number(opens | batch.first, offsets, batch, capacity), threshold


class _Rows:
    """Where every row of the batch lies."""

    def __init__(self, offsets: Tensor, rows: int):
        self.row = torch.arange(rows, device=offsets.device)
        self.molecule = torch.searchsorted(offsets, self.row, right=True) - 1  # B for the tail
        self.inside = self.row < offsets[-1]
        self.first = self.inside & (self.row == offsets[self.molecule])


def _quantile(entropy: Tensor, offsets: Tensor, batch: _Rows, q: float) -> Tensor:
    """`torch.quantile(entropy of the molecule, q)`; NaN for an empty molecule."""
    order = entropy.argsort(stable=True)
    order = order[batch.molecule[order].argsort(stable=True)]
    ordered = torch.cat([entropy[order], entropy.new_full((1,), torch.nan)])
    begin = offsets[:-1]
    last = (offsets.diff() - 1).clamp(min=0)
    rank = torch.tensor(q, dtype=entropy.dtype, device=entropy.device) * last
    # The number of atoms may round up.
    below, above = rank.long().minimum(last), rank.ceil().long().minimum(last)
    value = torch.lerp(ordered[begin + below], ordered[begin + above], rank - below)
    # NaN sorts last: one is enough to make the quantile NaN.
    unknown = ordered[begin + last].isnan() | (offsets.diff() == 0)
    return value.masked_fill(unknown, torch.nan)


def _after_edges(entropy: Tensor, threshold: Tensor, batch: _Rows) -> Tensor:
    """Rows after an atom that exceeds the threshold while the atom before it does not."""
    threshold = torch.cat([threshold, threshold.new_full((1,), torch.nan)])
    high = entropy > threshold[batch.molecule]
    edge = high & (batch.first | ~high.roll(1))
    return edge.roll(1) & batch.inside & ~batch.first


def _local_max(entropy: Tensor, batch: _Rows) -> Tensor:
    """First rows of the runs of equal values whose neighbours on both sides are lower."""
    rows = batch.row.shape[0]
    molecule = torch.cat([batch.molecule, batch.molecule.new_full((1,), -1)])
    turn = (entropy != entropy.roll(1)) | (batch.molecule != batch.molecule.roll(1))
    end = _next(turn, rows).roll(-1)  # the row after the run
    end = torch.where(batch.row == rows - 1, rows, end)
    last = molecule[end] != batch.molecule
    lower = torch.cat([entropy, entropy.new_zeros(1)])[end] < entropy
    rises = (entropy > entropy.roll(1)) & ~batch.first
    return batch.inside & rises & (last | lower)


def _next(mask: Tensor, none: int) -> Tensor:
    """The first set row at or after every row, or `none`."""
    row = torch.arange(mask.shape[0], device=mask.device)
    return torch.where(mask, row, none).flip(0).cummin(0).values.flip(0)


def _keep_min_size(opens: Tensor, min_size: int, batch: _Rows) -> Tensor:
    """Drops, from left to right, a boundary less than `min_size` rows after the last one kept.

    The kept boundaries are the orbit of the first row under "next boundary far enough", which
    doubling finds in log2(rows) steps.
    """
    rows = opens.shape[0]
    following = torch.cat([_next(opens | batch.first, rows), batch.row.new_full((1,), rows)])
    jump = following[(torch.arange(rows + 1, device=opens.device) + min_size).clamp(max=rows)]
    molecule = torch.cat([batch.molecule, batch.molecule.new_full((1,), -1)])
    jump = torch.where(molecule[jump] == molecule, jump, rows)
    kept = torch.cat([batch.first, batch.first.new_zeros(1)])
    for _ in range(rows.bit_length()):
        kept = kept | (torch.zeros_like(jump).scatter_add(0, jump, kept.long()) > 0)
        jump = jump[jump]
    return kept[:rows] & opens


def _keep_highest(
    opens: Tensor, deciding: Tensor, keep: int, offsets: Tensor, batch: _Rows
) -> Tensor:
    """Per molecule, the `keep` boundaries that the highest entropies decided, first of equals."""
    order = deciding.nan_to_num(-torch.inf, torch.inf, -torch.inf).argsort(
        descending=True, stable=True
    )
    order = order[(~opens[order]).int().argsort(stable=True)]
    order = order[batch.molecule[order].argsort(stable=True)]
    rank = torch.empty_like(order).scatter(0, order, batch.row) - offsets[batch.molecule]
    return opens & (rank < keep)


def _number(
    opens: Tensor, offsets: Tensor, batch: _Rows, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids and offsets from the rows that open a patch."""
    before = torch.cat([offsets.new_zeros(1), opens.cumsum(0)])  # patches opened before each row
    ids = (before[1:] - before[offsets[batch.molecule]] - 1).masked_fill(~batch.inside, 0)
    atom_offsets = offsets[-1].repeat(capacity + 2)
    slot = torch.where(opens, before[:-1], capacity + 1)
    atom_offsets = atom_offsets.scatter(0, slot, batch.row)[: capacity + 1].clone()
    patch_offsets = before[offsets]
    return ids, atom_offsets, patch_offsets, patch_offsets[-1].clone()
