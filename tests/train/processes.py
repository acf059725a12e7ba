"""What `test_processes` runs in every process: torchrun -m tests.train.processes ..."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from edt_former import shipped
from edt_former.data import Row
from edt_former.train import objectives
from edt_former.train.conversations import ConversationBatch
from edt_former.train.objectives import Negatives
from edt_former.train.ranks import rank
from edt_former.train.stage1 import train_stage1
from edt_former.train.stage2 import train_stage2
from edt_former.train.trainer import ConnectorTrainer
from tests.train import runs

IN_RANK = {3: [1, 2, 0], 6: [3, 2, 5, 4, 0, 1]}
"""Negatives within the rows that a process has: of a process's three, and of both their six rows as
one process has them, by their costs."""

CONNECTOR = {**runs.CONNECTORS["edt_former"], **runs.SIZE, "dropout": 0.0}


def fix_negatives() -> None:
    def drawn(similarity, generator=None):
        other = torch.tensor(IN_RANK[len(similarity)])
        return Negatives(other, other)

    objectives.draw_negatives = drawn


def stage1(out: Path, data: Path, **training) -> None:
    train_stage1(runs.stage1(out, data, connector={"dropout": 0.0}, training=training))


def stage2(out: Path, data: Path, language_model: Path, **training) -> None:
    train_stage2(runs.stage2(out, data, language_model, connector=CONNECTOR, training=training))


def without_molecules_on_rank_1() -> None:
    collate = ConversationBatch.__call__
    text = Row(0, turns=(("user", "a chain"), ("assistant", "of carbon")))

    def call(self, rows):
        return collate(self, [text] * len(rows) if rank() == 1 else rows)

    ConversationBatch.__call__ = call


def count_shards(out: Path) -> None:
    """What this process has of the first sharded model: parameters, whole and its own values."""
    wrap = ConnectorTrainer._wrap_model

    def counted(self, *args, **kwargs):
        if self.sharded and not (out / f"shards-{rank()}.json").exists():
            spread = [p for p in self.model.parameters() if isinstance(p, DTensor)]
            own = sum(p.to_local().numel() for p in spread)
            whole = sum(p.numel() for p in spread)
            found = {"spread": len(spread), "all": len(list(self.model.parameters()))}
            (out / f"shards-{rank()}.json").write_text(
                json.dumps({**found, "own": own, "whole": whole})
            )
        return wrap(self, *args, **kwargs)

    ConnectorTrainer._wrap_model = counted


def stopped(call, step: int) -> None:
    run = ConnectorTrainer.training_step

    def stopping(self, *args):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return run(self, *args)

    ConnectorTrainer.training_step = stopping
    with suppress(KeyboardInterrupt):
        call()
    ConnectorTrainer.training_step = run


def main(out: Path, data: Path, language_model: Path, miniature: Path) -> None:
    shipped.folder = lambda: miniature
    fix_negatives()
    count_shards(out)
    half = {"batch_size": 3}
    stage1(out / "stage1-ddp", data, **half)
    stage1(out / "stage1-sharded", data, **half, sharding=True)
    stage2(out / "stage2-ddp", data, language_model, **half)
    resumed = out / "stage2-sharded"
    sharded = {**half, "sharding": True, "accumulation": 1}
    stopped(lambda: stage2(resumed, data, language_model, **sharded), 3)
    stage2(resumed, data, language_model, **sharded)
    summed = {"batch_size": 1, "accumulation": 3, "sharding": True}
    stage2(out / "stage2-summed", data, language_model, **summed)
    without_molecules_on_rank_1()
    evaluated = {**half, "evaluate_every": 3}
    for name, sharding in (("text-ddp", False), ("text-sharded", True)):
        train_stage2(
            runs.stage2(
                out / name,
                data,
                language_model,
                connector=CONNECTOR,
                data={"validation": [str(data)]},
                training={**evaluated, "sharding": sharding},
            )
        )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
