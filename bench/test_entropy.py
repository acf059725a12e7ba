"""Entropy of logits against torch's ways to write it, eager and compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import edt_kernels
from bench.contest import OURS, Task, compiled
from bench.peers import from_clamped_softmax, from_log_softmax
from bench.workloads import SMALL, rows

# Rows, vocabulary, and how many times faster than compiled torch to be.
CASES = {
    "C-S, V=38": (int(SMALL.atoms.sum()), 38, 2.0),
    "4096 molecules, V=38": (4096 * 30, 38, 2.0),
    "128 rows, V=32000": (128, 32000, 5.0),
}


def from_distribution(logits: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits, validate_args=False).entropy()


@pytest.mark.parametrize("case", CASES)
def test_entropy(contest, case, dtype, backward):
    count, vocabulary, goal = CASES[case]
    logits = rows(count, vocabulary, dtype=dtype)
    task = Task.of(from_log_softmax, [logits], backward=backward)
    contest(
        "entropy",
        case,
        task,
        [
            task.contender(OURS, edt_kernels.entropy),
            # ln p rounded to bf16 costs it a twentieth of the largest gradient at V=32000
            task.contender("log_softmax", from_log_softmax, optional=True),
            task.contender("softmax, clamp, log", from_clamped_softmax),
            task.contender("Categorical", from_distribution),
            task.contender("compiled", compiled(from_log_softmax), optional=True),
        ],
        goals=None if backward and vocabulary > 38 else {"compiled": goal},
    )
