"""The layouts that peers want: padded rectangles, nested tensors, padded pairs."""

from __future__ import annotations

import torch
from torch import Tensor

import edt_kernels
from bench.contest import Layout


def padded(offsets: Tensor, length: int | None = None, *, fill: float = 0.0) -> Layout:
    """[B, L, ...], L the longest molecule unless given."""
    return Layout(
        lambda x: edt_kernels.pad(x, offsets, length=length, fill=fill)[0],
        lambda x: edt_kernels.unpad(x, offsets),
    )


def padded_heads(offsets: Tensor, length: int | None = None) -> Layout:
    """[B, H, L, D], contiguous, as torch's attention wants it."""
    rows = padded(offsets, length)
    return Layout(
        lambda x: rows.into(x).transpose(1, 2).contiguous(),
        lambda x: rows.back(x.transpose(1, 2)),
    )


def padded_pairs(q_offsets: Tensor, k_offsets: Tensor) -> Layout:
    """Pairs [sum Lq Lk, H] as [B, H, Lq, Lk]."""
    rows, columns = q_offsets.diff(), k_offsets.diff()
    most = int(rows.max()), int(columns.max())
    index = torch.arange(max(most), device=q_offsets.device)
    query = index[: most[0]].view(1, -1, 1) < rows.view(-1, 1, 1)
    key = index[: most[1]].view(1, 1, -1) < columns.view(-1, 1, 1)
    real = (query & key).flatten().nonzero().squeeze(1)
    shape = (len(rows), *most)

    def into(x: Tensor) -> Tensor:
        full = x.new_zeros(len(rows) * most[0] * most[1], x.shape[1])
        return full.index_copy(0, real, x).unflatten(0, shape).permute(0, 3, 1, 2).contiguous()

    return Layout(into, lambda x: x.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, real))


def nested(offsets: Tensor) -> Layout:
    """A jagged nested tensor."""
    return Layout(
        lambda x: edt_kernels.to_nested(x, offsets),
        lambda x: edt_kernels.from_nested(x.contiguous())[0],
    )


def real_rows(offsets: Tensor, length: int | None = None) -> Tensor:
    """[B, L], True where a molecule has a row."""
    lengths = offsets.diff()
    place = torch.arange(length or int(lengths.max()), device=offsets.device)
    return place < lengths.unsqueeze(1)
