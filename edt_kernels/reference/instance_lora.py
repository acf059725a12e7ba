"""Low-rank adapters of their own for every molecule, in plain torch: the definition of correct."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from edt_kernels import _check
from edt_kernels.reference.entropy import accumulation_dtype


def instance_lora(
    x: Tensor, a: Tensor, b: Tensor, offsets: Tensor, scale: float, base: Tensor | None
) -> tuple[Tensor, Tensor]:
    """base + scale (x A_m) B^T [..., d_out], and x A_m [T, r]; half types in float32.

    A product of zeros is +0, and subtracting +0 changes no bit of the base, not even of -0: hence
    the signs.
    """
    rows, wide_a, wide_b = _widen(x, a, b)
    spans = list(_spans(offsets, rows.shape[0]))
    tail = rows.shape[0] - (spans[-1].stop if spans else 0)
    used = [rows[span] @ wide_a[m] for m, span in enumerate(spans)]
    shrunk = torch.cat([*used, rows.new_zeros(tail, a.shape[2])])
    less = (shrunk[: len(shrunk) - tail] * -scale) @ wide_b.T
    less = torch.cat([less, less.new_zeros(tail, b.shape[0])])
    wide_base = less.new_zeros(()) if base is None else base.reshape(less.shape).to(less.dtype)
    return (wide_base - less).to(x.dtype).reshape(*x.shape[:-1], b.shape[0]), shrunk


def instance_lora_bwd(
    grad: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    shrunk: Tensor,
    offsets: Tensor,
    scale: float,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, a and b from `shrunk` = x A_m; no rows where not needed.

    With u = scale dout B: dx = u A_m^T, dA_m = x_m^T u_m and dB = scale dout^T shrunk, summed
    molecule by molecule in their order.
    """
    rows, wide_a, wide_b = _widen(x, a, b)
    g = grad.reshape(rows.shape[0], b.shape[0]).to(rows.dtype) * scale
    dx = rows.new_zeros(rows.shape) if need_x else rows.new_empty(0, *rows.shape[1:])
    da = (
        a.new_zeros(a.shape, dtype=rows.dtype) if need_a else wide_a.new_empty(0, *wide_a.shape[1:])
    )
    db = (
        b.new_zeros(b.shape, dtype=rows.dtype) if need_b else wide_b.new_empty(0, *wide_b.shape[1:])
    )
    for m, span in enumerate(_spans(offsets, rows.shape[0])):
        u = g[span] @ wide_b
        if need_x:
            dx[span] = u @ wide_a[m].T
        if need_a:
            da[m] = rows[span].T @ u
        if need_b:
            db += g[span].T @ shrunk[span]
    dx = dx.reshape(x.shape) if need_x else dx
    return dx.to(x.dtype), da.to(a.dtype), db.to(b.dtype)


def instance_lora_many(
    x: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    offsets: Tensor,
    scale: float,
    base: Sequence[Tensor | None],
) -> list[Tensor]:
    """`instance_lora` of every linear layer of a list."""
    layers = zip(x, a, b, base, strict=True)
    return [instance_lora(x, a, b, offsets, scale, base)[0] for x, a, b, base in layers]


def _spans(offsets: Tensor, rows: int) -> Iterator[slice]:
    """The rows of every molecule; ValueError where offsets are malformed."""
    _check.offsets_content("offsets", offsets, rows)
    return itertools.starmap(slice, itertools.pairwise(offsets.tolist()))


def _widen(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(dtype), a.to(dtype), b.to(dtype)
