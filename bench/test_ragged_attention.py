"""Ragged attention against torch's attention on padded, static, nested and single molecules."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import edt_kernels
from bench.attention import (
    DROPOUT,
    exact,
    flops,
    heads,
    nested_attention,
    operands,
    padded_attention,
    padding,
    single_molecules,
    static_attention,
)
from bench.contest import OURS, Layout, Task
from bench.layouts import padded_heads, padded_pairs, real_rows
from bench.workloads import HEAD_WIDTH, HEADS, SLOTS, SMALL, rows

GOALS = {
    ("C-S", torch.float32, False): {"padded": 4.5, "static 32": 2},
    ("C-S", torch.float32, True): {"padded": 5},
    ("C-S", torch.bfloat16, False): {"padded": 8, "static 32": 4},
    ("C-S", torch.bfloat16, True): {"padded": 30},
    ("C-L", torch.float32, False): {"padded": 3},
    ("C-L", torch.bfloat16, False): {"padded": 5},
}


def test_plain(contest, workload, dtype, backward):
    q_offsets, k_offsets = workload.query_offsets, workload.atom_offsets
    inputs = operands(q_offsets, k_offsets, dtype)
    task = Task.of(lambda *x: exact(q_offsets, k_offsets)(*x)[0], inputs, backward=backward)
    contest(
        "ragged_attention",
        workload.name,
        task,
        [
            task.contender(
                OURS, lambda q, k, v: edt_kernels.ragged_attention(q, k, v, q_offsets, k_offsets)
            ),
            padded_attention(task, "padded", q_offsets, k_offsets),
            padded_attention(task, "padded 96", q_offsets, k_offsets, slots=SLOTS),
            static_attention(workload, dtype, backward=backward),
            nested_attention(task, q_offsets, k_offsets),
            single_molecules(task, q_offsets, k_offsets),
            padding(task, q_offsets, k_offsets),
        ],
        work=task.work(flops=flops(q_offsets, k_offsets, backward=backward)),
        goals=GOALS.get((workload.name, dtype, backward)),
        budget=3.0,
    )


def test_causal(contest, dtype, backward):
    """Self-attention over the atoms, as a next-atom predictor has it."""
    offsets = SMALL.atom_offsets
    inputs = [heads(offsets, dtype, seed) for seed in (1, 2, 3)]
    formula = exact(offsets, offsets, causal=True)
    task = Task.of(lambda *x: formula(*x)[0], inputs, backward=backward)
    contest(
        "ragged_attention",
        f"{SMALL.name} causal",
        task,
        [
            task.contender(
                OURS,
                lambda *x: edt_kernels.ragged_attention(*x, offsets, offsets, causal=True),
            ),
            padded_attention(task, "padded", offsets, offsets, causal=True),
            nested_attention(task, offsets, offsets, causal=True),
            single_molecules(task, offsets, offsets, causal=True),
            padding(task, offsets, offsets),
        ],
        work=task.work(flops=flops(offsets, offsets, backward=backward) / 2),
    )


def test_bias_and_scores(contest, dtype, backward):
    """Pair bias in, scores out, both differentiable: a layer of Uni-Mol."""
    offsets = SMALL.atom_offsets
    pairs = int(offsets.diff().square().sum())
    inputs = [heads(offsets, dtype, seed) for seed in (1, 2, 3)]
    inputs.append(rows(pairs, HEADS, dtype=dtype, seed=4))
    task = Task.of(exact(offsets, offsets), inputs, backward=backward)
    layouts: list[Layout] = [padded_heads(offsets)] * 3 + [padded_pairs(offsets, offsets)]
    hidden = ~real_rows(offsets)[:, None, None]

    def by_products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.mT * HEAD_WIDTH**-0.5 + bias
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v, scores

    contest(
        "ragged_attention",
        f"{SMALL.name} bias, scores",
        task,
        [
            task.contender(
                OURS,
                lambda q, k, v, bias: edt_kernels.ragged_attention(
                    q, k, v, offsets, offsets, bias=bias, return_scores=True
                ),
            ),
            task.contender(
                "padded products",
                by_products,
                inputs=layouts,
                outputs=[layouts[0], layouts[3]],
            ),
        ],
        work=task.work(flops=flops(offsets, offsets, backward=backward)),
    )


def test_dropout(contest, dtype, backward):
    """torch draws other pairs to drop, so its result is checked without dropout."""
    q_offsets, k_offsets = SMALL.query_offsets, SMALL.atom_offsets
    inputs = operands(q_offsets, k_offsets, dtype)
    seed = torch.tensor([5])

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return edt_kernels.ragged_attention(
            q, k, v, q_offsets, k_offsets, dropout_p=DROPOUT, seed=seed
        )

    keep = kept_pairs(ours, q_offsets, k_offsets)
    dropped = exact(q_offsets, k_offsets, keep=keep)
    task = Task.of(lambda *x: dropped(*x)[0], inputs, backward=backward)
    whole = Task.of(lambda *x: exact(q_offsets, k_offsets)(*x)[0], inputs, backward=backward)
    contest(
        "ragged_attention",
        f"{SMALL.name} dropout {DROPOUT}",
        task,
        [
            task.contender(OURS, ours),
            padded_attention(whole, "padded", q_offsets, k_offsets, dropout=DROPOUT),
            padded_attention(
                whole, "padded 96", q_offsets, k_offsets, slots=SLOTS, dropout=DROPOUT
            ),
        ],
        work=task.work(flops=flops(q_offsets, k_offsets, backward=backward)),
        budget=2.0,
    )


def kept_pairs(attention: Callable[..., Tensor], q_offsets: Tensor, k_offsets: Tensor) -> Tensor:
    """Which pairs [B, H, Lq, Lk] a dropout keeps, read off values that name their key.

    With value j the j-th unit vector, column j of the output is the weight of key j.
    """
    lengths = k_offsets.diff()
    place = torch.cat([torch.arange(length) for length in lengths.tolist()])
    names = F.one_hot(place, HEAD_WIDTH).float().unsqueeze(1).expand(-1, HEADS, -1).contiguous()
    q, k = torch.zeros(int(q_offsets[-1]), HEADS, HEAD_WIDTH), torch.zeros_like(names)
    weights = padded_heads(q_offsets).into(attention(q, k, names))
    keep = weights[..., : int(lengths.max())] > 0
    real = real_rows(k_offsets)[:, None, None] & real_rows(q_offsets)[:, None, :, None]
    share = float((keep & real).sum() / (HEADS * real.sum()))
    assert abs(share - (1 - DROPOUT)) < 0.01, f"{share:.3f} of the weights are kept"
    return keep
