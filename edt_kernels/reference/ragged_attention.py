"""Attention within every molecule of a packed batch, in plain torch: the definition of correct."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from edt_kernels import _check
from edt_kernels.reference.entropy import accumulation_dtype


class Span(NamedTuple):
    """Where one molecule lies: its rows among queries and keys, and its (query, key) pairs."""

    index: int
    queries: slice
    keys: slice
    pairs: slice
    shape: tuple[int, int]  # Lq, Lk


def spans(q: Tensor, k: Tensor, q_offsets: Tensor, k_offsets: Tensor) -> Iterator[Span]:
    """The span of every molecule of the batch; ValueError where offsets are malformed."""
    _check.offsets_content("q_offsets", q_offsets, q.shape[0])
    _check.offsets_content("k_offsets", k_offsets, k.shape[0])
    starts_q, starts_k, pair = q_offsets.tolist(), k_offsets.tolist(), 0
    for m in range(len(starts_q) - 1):
        queries, keys = slice(*starts_q[m : m + 2]), slice(*starts_k[m : m + 2])
        shape = (queries.stop - queries.start, keys.stop - keys.start)
        yield Span(m, queries, keys, slice(pair, pair + shape[0] * shape[1]), shape)
        pair += shape[0] * shape[1]


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v per molecule and head, and the log-sum-exp of the logits.

    Without a scale it is 1 / sqrt(D).
    """
    return ragged_attention_general(
        q, k, v, None, None, q_offsets, k_offsets, causal, scale, 0.0, False
    )[:2]


def ragged_attention_bwd(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; `lse` as the forward returned it, which kernels start from."""
    return ragged_attention_general_bwd(
        grad, grad_lse, None, q, k, v, None, None, lse, q_offsets, k_offsets, causal, scale, 0.0
    )[:3]


def ragged_attention_general(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    q_offsets: Tensor,
    k_offsets: Tensor,
    causal: bool,
    scale: float | None,
    dropout_p: float,
    return_scores: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and logits (no rows unless `return_scores`); half types in fp32."""
    dtype, heads = accumulation_dtype(q.dtype), q.shape[1]
    outs, lses, scores = [], [], []
    used, pairs = 0, 0
    for span in spans(q, k, q_offsets, k_offsets):
        used, pairs = span.queries.stop, span.pairs.stop
        if 0 in span.shape:
            outs.append(q.new_zeros(span.shape[0], *q.shape[1:]))
            lses.append(q.new_full((span.shape[0], heads), -torch.inf, dtype=dtype))
            continue
        x = _logits(q, k, bias, span, causal, scale, dtype)
        p, lse = _softmax(x)
        if dropout_p > 0:
            p = p * _dropout(seed, span, x, dropout_p)
        o = p @ _per_head(v, span.keys, heads, dtype)
        outs.append(o.transpose(0, 1).to(q.dtype))
        lses.append(lse.transpose(0, 1))
        if return_scores:
            scores.append(x.permute(1, 2, 0).reshape(-1, heads).to(q.dtype))

    outs.append(q.new_zeros(q.shape[0] - used, *q.shape[1:]))
    lses.append(q.new_full((q.shape[0] - used, heads), -torch.inf, dtype=dtype))
    tail = bias.shape[0] - pairs if return_scores and bias is not None else 0
    scores.append(q.new_zeros(tail, heads))
    return torch.cat(outs), torch.cat(lses), torch.cat(scores)


def ragged_attention_general_bwd(
    grad: Tensor,
    grad_lse: Tensor | None,
    grad_scores: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    lse: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    causal: bool,
    scale: float | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the bias (no rows without one).

    With x the logits, P = softmax(x) and dP = dO V^T:
    dx = P (dP - rowsum(P dP) + dlse) + dscores, dq = dx K, dk = dx^T Q, dv = P^T dO.
    """
    dtype, heads, kv_heads = lse.dtype, q.shape[1], k.shape[1]
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    dbias = q.new_zeros(0 if bias is None else bias.shape[0], heads)
    for span in spans(q, k, q_offsets, k_offsets):
        if 0 in span.shape:
            continue
        _, rows, keys, pairs, shape = span
        x = _logits(q, k, bias, span, causal, scale, dtype)
        p, _ = _softmax(x)
        drop = _dropout(seed, span, x, dropout_p) if dropout_p > 0 else 1.0
        do = _per_head(grad, rows, heads, dtype)

        dp = (do @ _per_head(v, keys, heads, dtype).mT) * drop
        dx = dp - (p * dp).sum(-1, keepdim=True)
        if grad_lse is not None:
            dx = dx + grad_lse[rows].to(dtype).transpose(0, 1).unsqueeze(-1)
        dx = p * dx
        if grad_scores is not None:
            dscores = grad_scores[pairs].to(dtype).unflatten(0, shape).permute(2, 0, 1)
            dx = dx + (dscores.masked_fill(_hidden(x), 0) if causal else dscores)

        dx_scaled = dx * _scale(q, scale)
        dq[rows] = (dx_scaled @ _per_head(k, keys, heads, dtype)).transpose(0, 1).to(q.dtype)
        dk[keys] = _shared(dx_scaled.mT @ _per_head(q, rows, heads, dtype), kv_heads).to(q.dtype)
        dv[keys] = _shared((p * drop).mT @ do, kv_heads).to(q.dtype)
        if bias is not None:
            dbias[pairs] = dx.permute(1, 2, 0).reshape(-1, heads).to(q.dtype)
    return dq, dk, dv, dbias


def _per_head(x: Tensor, rows: slice, heads: int, dtype: torch.dtype) -> Tensor:
    """Rows of x [T, Hkv, D] as [H, L, D]: query head h reads key head h // (H / Hkv)."""
    x = x[rows].to(dtype).transpose(0, 1)
    return x if x.shape[0] == heads else x.repeat_interleave(heads // x.shape[0], 0)


def _shared(x: Tensor, kv_heads: int) -> Tensor:
    """Gradients [H, L, D] per query head as [L, Hkv, D], summed over heads that share a key."""
    return x.unflatten(0, (kv_heads, -1)).sum(1).transpose(0, 1)


def _logits(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    span: Span,
    causal: bool,
    scale: float | None,
    dtype: torch.dtype,
) -> Tensor:
    heads = q.shape[1]
    x = _per_head(q, span.queries, heads, dtype) @ _per_head(k, span.keys, heads, dtype).mT
    x = x * _scale(q, scale)
    if bias is not None:
        if span.pairs.stop > bias.shape[0]:
            raise ValueError(
                f"bias must have one row per (query, key) pair, at least {span.pairs.stop}, "
                f"got {bias.shape[0]}"
            )
        x = x + bias[span.pairs].to(dtype).unflatten(0, span.shape).permute(2, 0, 1)
    return x.masked_fill(_hidden(x), -torch.inf) if causal else x


def _scale(q: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(q.shape[2]) if scale is None else scale


def _hidden(x: Tensor) -> Tensor:
    """The pairs [Lq, Lk] that a causal query does not see; the last query sees every key."""
    lq, lk = x.shape[-2:]
    return torch.ones(lq, lk, dtype=torch.bool, device=x.device).triu(lk - lq + 1)


def _softmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and log-sum-exp over the last dimension; a row of -inf has weights 0, not NaN."""
    m = _finite(x.detach().amax(-1))
    weight = (x - m.unsqueeze(-1)).exp()
    total = weight.sum(-1)
    dead = total == 0
    total = total.masked_fill(dead, 1)
    return weight / total.unsqueeze(-1), (total.log() + m).masked_fill(dead, -torch.inf)


def _finite(x: Tensor) -> Tensor:
    """0 in place of -inf, so that exp(-inf - x) is 0."""
    return x.masked_fill(x == -torch.inf, 0)


def _dropout(seed: Tensor, span: Span, x: Tensor, p: float) -> Tensor:
    """What dropout multiplies the weights [H, Lq, Lk] with: 0 or 1 / (1 - p).

    The bits are a hash of (seed, head, query, key), indices within the molecule: the same seed
    drops the same pairs whatever else is in the batch. `seed` has one element, or one a molecule.
    """
    heads, queries, keys = (torch.arange(n, device=x.device) for n in x.shape)
    seed = seed.reshape(-1)
    seed = seed[span.index if len(seed) > 1 else 0].reshape(1)
    bits = _mix(_mix(seed) + (seed >> 32))
    bits = _mix(bits + heads.view(-1, 1, 1))
    bits = _mix(bits + queries.view(-1, 1))
    bits = _mix(bits + keys)
    return (bits >= int(p * 2**32)).to(x.dtype) / (1 - p)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32 bits in which every bit of the result depends on every bit of x."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
