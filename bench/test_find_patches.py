"""Cutting molecules into patches against the published loop and padded torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import edt_kernels
from bench import published
from bench.contest import OURS, Contender, Task
from bench.layouts import padded
from bench.peers import quantile_rule
from bench.workloads import LARGE, SMALL, rows


def peak_rule(entropy: Tensor) -> Tensor:
    """Patch of every atom, a new one at every peak; no two neighbours are equal."""
    opens = torch.zeros_like(entropy, dtype=torch.bool)
    opens[:, 1:] = entropy[:, 1:] > entropy[:, :-1]
    opens[:, 1:-1] &= ~(entropy[:, 2:] > entropy[:, 1:-1])
    return opens.cumsum(1)


@pytest.mark.parametrize(
    ("rule", "vectorised", "fill"),
    [("published", quantile_rule, torch.nan), ("local_max", peak_rule, -torch.inf)],
    ids=["published", "local_max"],
)
def test_find_patches(contest, caveats, workload, rule, vectorised, fill):
    """fp32: bf16 entropies have equal neighbours, which torch's formulas do not treat."""
    offsets = workload.atom_offsets
    layout = padded(offsets, fill=fill)
    entropy = rows(int(offsets[-1])).abs()
    truth = layout.back(vectorised(layout.into(entropy.double())))
    task = Task((entropy,), (), (truth,), 1)
    contenders = [
        task.contender(OURS, lambda h: edt_kernels.find_patches(h, offsets, rule=rule).ids),
        task.contender("padded torch", vectorised, inputs=[layout], outputs=[layout]),
    ]
    goals = {}
    if rule == "published":
        contenders.append(loop(task, offsets, caveats[published.group_ids]))
        if workload in (SMALL, LARGE):
            goals = {"padded torch": 5.0, "published loop": 150.0}
    contest("find_patches", f"{workload.name} {rule}", task, contenders, goals=goals)


def loop(task: Task, offsets: Tensor, caveat: str) -> Contender:
    molecules = edt_kernels.ragged_split(task.inputs[0], offsets)
    found: list[list[int]] = []

    def run() -> tuple[()]:
        found[:] = published.group_ids(molecules)
        return ()

    return Contender(
        "published loop",
        run,
        task.truth,
        packed=lambda _: [torch.tensor([i for ids in found for i in ids])],
        caveat=caveat,
    )
