"""Molecule tokens in a prompt against masked_scatter, index_put and cumsum with where."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import edt_kernels
from bench.contest import OURS, Task, Work, compiled
from bench.peers import by_masked_scatter, by_where
from bench.workloads import SMALL, Workload, rows

ROWS, LENGTH, WIDTH, VOCABULARY = 32, 128, 2048, 8192
BEFORE = 20  # text tokens before the molecule


def slots_of(workload: Workload) -> Tensor:
    """[B, S], True where a query of the molecule goes."""
    place = torch.arange(LENGTH)
    return (place >= BEFORE) & (place < BEFORE + workload.queries.unsqueeze(1))


def test_splice(contest, workload, dtype, backward):
    """The op alone: neither argument may be overwritten."""
    workload = workload.first(ROWS)
    slots, offsets = slots_of(workload), workload.query_offsets
    place = slots.flatten().nonzero().squeeze(1)
    inputs = [
        rows(len(slots), LENGTH, WIDTH, dtype=dtype),
        rows(int(offsets[-1]), WIDTH, dtype=dtype, seed=2),
    ]

    def by_index_put(embeds: Tensor, tokens: Tensor) -> Tensor:
        return embeds.flatten(0, 1).index_put((place,), tokens).view_as(embeds)

    task = Task.of(by_where(slots), inputs, backward=backward)
    contenders = [
        task.contender(OURS, lambda e, t: edt_kernels.splice(e, t, offsets, slots)),
        task.contender("masked_scatter", by_masked_scatter(slots)),
        task.contender("index_put", by_index_put),
        task.contender("cumsum, where", by_where(slots)),
    ]
    if workload.name == "C-S":
        fast = compiled(by_where(slots))
        contenders.append(task.contender("compiled where", fast, optional=True))
    contest("splice", workload.name, task, contenders, work=task.work(reread=False))


def test_splice_of_a_prompt(contest, dtype, backward):
    """From token ids: the frozen table is read, the molecule's tokens get their gradient."""
    workload = SMALL.first(ROWS)
    slots, offsets = slots_of(workload), workload.query_offsets
    place = slots.flatten().nonzero().squeeze(1)
    ids = torch.randint(VOCABULARY, slots.shape, generator=torch.Generator().manual_seed(3))
    table = rows(VOCABULARY, WIDTH, dtype=dtype)
    wide = table.double()
    tokens = rows(int(offsets[-1]), WIDTH, dtype=dtype, seed=2)

    def prompt(splice, table: Tensor = table):
        return lambda tokens: splice(F.embedding(ids, table), tokens)

    def in_place(embeds: Tensor, tokens: Tensor) -> Tensor:
        return embeds.flatten(0, 1).index_put_((place,), tokens).view_as(embeds)

    task = Task.of(prompt(by_where(slots), wide), [tokens], backward=backward)
    output = slots.numel() * WIDTH * table.element_size()
    work = Work(2 * output + (output + tokens.nbytes if backward else 0))
    contenders = [
        task.contender(OURS, prompt(lambda e, t: edt_kernels.splice(e, t, offsets, slots))),
        task.contender("masked_scatter", prompt(by_masked_scatter(slots))),
        task.contender("index_put_", prompt(in_place)),
        task.contender("cumsum, where", prompt(by_where(slots))),
    ]
    contest(
        "splice",
        f"{workload.name} after embedding",
        task,
        contenders,
        work=work,
        goals={"masked_scatter": 1.8},
    )
