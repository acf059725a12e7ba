"""Entropy from hidden states against computing the logits first."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import edt_kernels
from bench.contest import OURS, Task, compiled
from bench.workloads import SMALL, rows

SIZES = {
    "C-S, 128 to V=38": (int(SMALL.atoms.sum()), 128, 38),
    "128 rows, 768 to V=32000": (128, 768, 32000),
}

# Logits that are rounded to bf16 cost torch a tenth of a gradient.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.15}


def from_logits(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    log_p = F.linear(hidden, weight, bias).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("case", SIZES)
def test_linear_entropy(contest, case, dtype, backward):
    count, width, vocabulary = SIZES[case]
    inputs = [
        rows(count, width, dtype=dtype),
        rows(vocabulary, width, dtype=dtype, seed=2) / width**0.5,
        rows(vocabulary, dtype=dtype, seed=3),
    ]
    task = Task.of(from_logits, inputs, backward=backward)
    products = 2 * count * width * vocabulary * (3 if backward else 1)
    contest(
        "linear_entropy",
        case,
        task,
        [
            task.contender(OURS, edt_kernels.linear_entropy),
            task.contender("log_softmax of logits", from_logits),
            task.contender("compiled", compiled(from_logits), optional=True),
        ],
        work=task.work(flops=products),
        goals={"log_softmax of logits": 1.7} if case == "C-S, 128 to V=38" else None,
        tolerance=TOLERANCES[dtype],
    )
