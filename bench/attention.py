"""What attention benches share: operands, the formula, and torch's ways to compute it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contest import Contender, Task
from bench.layouts import nested, padded_heads, padded_pairs, real_rows
from bench.workloads import ANCHORS, HEAD_WIDTH, HEADS, Workload, rows

DROPOUT = 0.1


def flops(q_offsets: Tensor, k_offsets: Tensor, *, backward: bool) -> float:
    """Of the valid pairs: two products forward, five more backward."""
    pairs = int((q_offsets.diff() * k_offsets.diff()).sum())
    return (14 if backward else 4) * pairs * HEADS * HEAD_WIDTH


def heads(offsets: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """Rows [T, H, D]."""
    return rows(int(offsets[-1]), HEADS, HEAD_WIDTH, dtype=dtype, seed=seed, device=offsets.device)


def operands(q_offsets: Tensor, k_offsets: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values."""
    return [heads(q_offsets, dtype, 1), heads(k_offsets, dtype, 2), heads(k_offsets, dtype, 3)]


def exact(
    q_offsets: Tensor, k_offsets: Tensor, *, causal: bool = False, keep: Tensor | None = None
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Output and scores by the formula, over padded molecules; `keep` is what dropout leaves."""
    q_layout, k_layout = padded_heads(q_offsets), padded_heads(k_offsets)
    pairs = padded_pairs(q_offsets, k_offsets)
    hidden = ~real_rows(k_offsets)[:, None, None]
    if causal:
        longest = hidden.shape[-1]
        hidden = hidden | torch.ones_like(hidden[0, 0]).expand(longest, -1).triu(1)

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scores = q_layout.into(q) @ k_layout.into(k).mT / HEAD_WIDTH**0.5
        if bias is not None:
            scores = scores + pairs.into(bias)
        p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        if keep is not None:
            p = p * keep / (1 - DROPOUT)
        return q_layout.back(p @ k_layout.into(v)), pairs.back(scores)

    return run


def padded_attention(
    task: Task,
    name: str,
    q_offsets: Tensor,
    k_offsets: Tensor,
    *,
    slots: int | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    **options: object,
) -> Contender:
    """torch's attention on [B, H, L, D], queries padded to `slots`, keys to the longest.

    Causal molecules have as many keys as queries: what hides later keys hides padding, too. Where
    no key is padding there is no mask, which torch does fastest.
    """
    q_layout, k_layout = padded_heads(q_offsets, slots), padded_heads(k_offsets)
    real = real_rows(k_offsets)
    mask = None if causal or bool(real.all()) else real[:, None, None]

    def run(q: Tensor, k: Tensor, v: Tensor, dropout: float = dropout) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout
        )

    if dropout:
        options["checked"] = lambda *leaves: run(*leaves, dropout=0.0)
    layouts = [q_layout, k_layout, k_layout]
    return task.contender(name, run, inputs=layouts, outputs=[q_layout], **options)


def single_molecules(
    task: Task, q_offsets: Tensor, k_offsets: Tensor, *, causal: bool = False
) -> Contender:
    """A call of torch's attention per molecule."""
    queries, keys = q_offsets.diff().tolist(), k_offsets.diff().tolist()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
        return torch.cat(
            [
                F.scaled_dot_product_attention(
                    *(x.transpose(0, 1).unsqueeze(0) for x in part), is_causal=causal
                )[0].transpose(0, 1)
                for part in parts
            ]
        )

    return task.contender("loop", run)


def nested_attention(
    task: Task, q_offsets: Tensor, k_offsets: Tensor, *, causal: bool = False
) -> Contender:
    """torch's attention on jagged nested tensors."""
    layouts = [nested(q_offsets), nested(k_offsets), nested(k_offsets)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    return task.contender("nested", run, inputs=layouts, outputs=layouts[:1], optional=True)


def padding(task: Task, q_offsets: Tensor, k_offsets: Tensor) -> Contender:
    """What it costs to pad q, k and v and to unpad the output."""
    q_layout, k_layout = padded_heads(q_offsets), padded_heads(k_offsets)
    q, k, v = task.inputs

    def run() -> tuple[Tensor, ...]:
        q_padded = q_layout.into(q)
        k_layout.into(k), k_layout.into(v)
        return q_layout.back(q_padded)

    return Contender("pad and unpad", run, (q.double(),), aside=True)


def static_attention(workload: Workload, dtype: torch.dtype, *, backward: bool) -> Contender:
    """The static Q-Former's: 32 queries for every molecule, none of them padding."""
    k_offsets = workload.atom_offsets
    q_offsets = ANCHORS * torch.arange(len(k_offsets), device=k_offsets.device)
    inputs = operands(q_offsets, k_offsets, dtype)
    task = Task.of(lambda *x: exact(q_offsets, k_offsets)(*x)[0], inputs, backward=backward)
    return padded_attention(task, "static 32", q_offsets, k_offsets)
