"""Rows and their segments: what the references of the packed ops share."""

from __future__ import annotations

import torch
from torch import Tensor


def check_offsets(name: str, offsets: Tensor, rows: int) -> None:
    """RuntimeError where the contents are malformed; on the CPU only, elsewhere it would sync."""
    if offsets.device.type != "cpu":
        return
    if offsets[0] != 0 or offsets[-1] > rows or (offsets.diff() < 0).any():
        raise RuntimeError(
            f"{name} must start at 0, not decrease and end at or below the number of rows {rows}"
        )


def segment_ids(offsets: Tensor, rows: int) -> Tensor:
    """The segment of every row [rows]; P, the number of segments, for rows of the tail."""
    index = torch.arange(rows, device=offsets.device)
    return torch.searchsorted(offsets.contiguous(), index, right=True) - 1


def take(per_segment: Tensor, ids: Tensor) -> Tensor:
    """The entry of every row's segment; 0 for rows of the tail (id P)."""
    nothing = per_segment.new_zeros(1, *per_segment.shape[1:])
    return torch.cat([per_segment, nothing]).index_select(0, ids)


def add_rows(rows: Tensor, ids: Tensor, size: int) -> Tensor:
    """[size, ...]: the sum of the rows of every id, in row order; rows of id `size` are left out.

    The order of additions is that of the rows on every device and for any number of threads.
    """
    total = rows.new_zeros(size + 1, *rows.shape[1:])
    if rows.device.type == "cuda":  # index_add uses atomics there, index_put sorts
        return total.index_put((ids,), rows, accumulate=True)[:size]
    return total.index_add(0, ids, rows)[:size]


def column(per_row: Tensor, like: Tensor) -> Tensor:
    """`per_row` [N] shaped to broadcast along the rows of `like` [N, ...]."""
    return per_row.reshape(-1, *[1] * (like.dim() - 1))
