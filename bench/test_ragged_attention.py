"""Ragged attention against torch's attention on padded, static, nested and single molecules."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import edt_kernels
from bench.contest import OURS, Contender, Layout, Task
from bench.layouts import nested, padded_heads, padded_pairs, real_rows
from bench.workloads import ANCHORS, HEAD_WIDTH, HEADS, SLOTS, SMALL, Workload, rows

DROPOUT = 0.1
GOALS = {
    ("C-S", torch.float32, False): {"padded": 4.5, "static 32": 2},
    ("C-S", torch.float32, True): {"padded": 5},
    ("C-S", torch.bfloat16, False): {"padded": 8, "static 32": 4},
    ("C-S", torch.bfloat16, True): {"padded": 30},
    ("C-L", torch.float32, False): {"padded": 3},
    ("C-L", torch.bfloat16, False): {"padded": 5},
}


def flops(q_offsets: Tensor, k_offsets: Tensor, *, backward: bool) -> float:
    """Of the valid pairs: two products forward, five more backward."""
    pairs = int((q_offsets.diff() * k_offsets.diff()).sum())
    return (14 if backward else 4) * pairs * HEADS * HEAD_WIDTH


def heads(offsets: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """Rows [T, H, D]."""
    return rows(int(offsets[-1]), HEADS, HEAD_WIDTH, dtype=dtype, seed=seed)


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
        hidden = hidden | torch.ones(hidden.shape[-1], hidden.shape[-1], dtype=torch.bool).triu(1)

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

    Causal molecules have as many keys as queries: what hides later keys hides padding, too.
    """
    q_layout, k_layout = padded_heads(q_offsets, slots), padded_heads(k_offsets)
    mask = None if causal else real_rows(k_offsets)[:, None, None]

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
    q_offsets = ANCHORS * torch.arange(len(k_offsets))
    inputs = operands(q_offsets, k_offsets, dtype)
    task = Task.of(lambda *x: exact(q_offsets, k_offsets)(*x)[0], inputs, backward=backward)
    return padded_attention(task, "static 32", q_offsets, k_offsets)


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
