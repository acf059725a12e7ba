"""Attention that torch has on a GPU only, and attention that its compiler makes."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.contest import Contender, Task, compiled
from bench.layouts import padded_heads, real_rows
from bench.workloads import HEAD_WIDTH, Workload

VARLEN, EFFICIENT, COMPILED = "varlen_attn", "mem-efficient varlen", "compiled padded"


def _bounds(workload: Workload) -> tuple[Tensor, Tensor, int, int]:
    """Offsets of queries and keys, and the longest, which these peers want on the host."""
    offsets = workload.query_offsets.int(), workload.atom_offsets.int()
    return *offsets, int(workload.queries.max()), int(workload.atoms.max())


def varlen(task: Task, workload: Workload) -> Contender:
    """`torch.nn.attention.varlen`: FlashAttention 2, half types only."""
    bounds = _bounds(workload)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(q, k, v, *bounds)

    return task.contender(VARLEN, run)


def efficient(task: Task, workload: Workload) -> Contender:
    """The CUTLASS kernel behind `scaled_dot_product_attention`, given offsets."""
    bounds = _bounds(workload)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gradient = torch.is_grad_enabled() and q.requires_grad
        return torch.ops.aten._efficient_attention_forward(
            *(x.unsqueeze(0) for x in (q, k, v)), None, *bounds, 0.0, 0, gradient
        )[0].squeeze(0)

    return task.contender(EFFICIENT, run)


def compiled_attention(
    task: Task, q_offsets: Tensor, k_offsets: Tensor, *, backend: str
) -> Contender:
    """The formula on padded rectangles, compiled."""
    q_layout, k_layout = padded_heads(q_offsets), padded_heads(k_offsets)
    hidden = ~real_rows(k_offsets)[:, None, None]

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * HEAD_WIDTH**-0.5
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v

    layouts = [q_layout, k_layout, k_layout]
    fast = compiled(formula, backend=backend)
    return task.contender(COMPILED, fast, inputs=layouts, outputs=[q_layout])
