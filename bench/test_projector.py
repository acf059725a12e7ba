"""LLaMo's projector against its padded twin, and over the size of graphs against a plain MLP."""

from __future__ import annotations

import pytest
import torch

from bench.contest import OURS, Contender, Task, Work
from bench.layouts import padded, real_rows
from bench.pictures import MEMORY, SIZE
from bench.projectors import (
    HEADS,
    LEVELS,
    QUERIES,
    WIDTH,
    levels,
    offsets_of,
    padded_read,
    peak,
    plain,
    projected_read,
    projector,
    ragged_read,
    tokens,
)
from bench.workloads import SMALL

PLAIN = "MLP, a token per atom"
SIZES = (5, 10, 20, 50, 120, 300)


def test_levels(contest, dtype, backward):
    offsets = SMALL.atom_offsets
    atoms, real = int(offsets[-1]), real_rows(SMALL.atom_offsets)
    task = Task.of(
        lambda *x: ragged_read(projector(torch.float64), x, offsets),
        levels(atoms, dtype),
        backward=backward,
    )
    contenders = [
        task.contender(OURS, lambda *x: ragged_read(projector(dtype), x, offsets)),
        task.contender(
            "padded",
            lambda *x: padded_read(projector(dtype), x, real),
            inputs=[padded(offsets)] * LEVELS,
        ),
    ]
    contenders.append(
        task.contender(
            "ragged, atoms projected", lambda *x: projected_read(projector(dtype), x, offsets)
        )
    )
    pooled = 2 * 2.0 * atoms * LEVELS * QUERIES * HEADS * WIDTH
    projected = 2 * 2.0 * len(SMALL.atoms) * LEVELS * QUERIES * WIDTH * WIDTH
    contest(
        "multi-level projector",
        "C-S, 6 levels",
        task,
        contenders,
        work=task.work(flops=(3 if backward else 1) * (pooled + projected)),
        goals={"padded": 2.0},
        budget=2.0,
    )


@pytest.mark.parametrize("size", SIZES)
def test_size(contest, size):
    """As many atoms in molecules of any size: the projector's tokens are fewer, the MLP's not."""
    dtype, offsets = torch.float32, offsets_of(size)
    given = tuple(levels(int(offsets[-1]), dtype))
    wide = tuple(x.double() for x in given)
    with torch.no_grad():
        truths = (
            tokens(projector(torch.float64), wide, offsets),
            plain(torch.float64)(wide[-1]),
        )
        contenders = [
            Contender(OURS, lambda: tokens(projector(dtype), given, offsets), truths[:1]),
            Contender(PLAIN, lambda: plain(dtype)(given[-1]), truths[1:]),
        ]
        weights = sum(p.numel() for p in projector(dtype).net.parameters() if p.dim() == 2)
        outcome = contest(
            "projector over size",
            f"{size} atoms",
            Task(given, (), truths[:1], 1),
            contenders,
            work=Work(sum(x.nbytes for x in given), 2.0 * weights * len(truths[0])),
            budget=0.4,
        )
    outcome.extra[SIZE] = size
    for kind, name in (("levels", OURS), ("plain", PLAIN)):
        taken = peak(kind, size)
        if taken is not None:
            outcome.extra[f"{MEMORY}{name}"] = round(taken / 1e6, 1)
