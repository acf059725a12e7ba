"""The next-atom predictor of the recipe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edt_former.tokens.predictor import NextAtomPredictor
from edt_former.train.tiny.data import MoleculeTable
from edt_former.train.tiny.loop import fit

CONFIG = {"layers": 2, "heads": 2, "width": 128, "positions": 512}


def train_predictor(
    table: MoleculeTable, checkpoint: Path, *, steps: int, seed: int, batch: int = 64
) -> NextAtomPredictor:
    """Guess each atom from those before it, in the order of the canonical SMILES."""
    torch.manual_seed(seed)
    model = NextAtomPredictor(CONFIG)

    def loss(rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        graph = table.batch(rng.choice(len(table), batch, replace=False))
        value = model.loss(graph.elements, graph.offsets)
        return value, {"nats": value.item()}

    fit(
        model,
        loss,
        label="next-atom predictor",
        checkpoint=checkpoint,
        steps=steps,
        lr=1e-3,
        seed=seed,
    )
    return model.eval().requires_grad_(False)


@torch.no_grad()
def surprise(model: NextAtomPredictor, table: MoleculeTable, *, batch: int = 512) -> float:
    """Mean negative log-likelihood in nats per atom (end included) of a table."""
    total, atoms = 0.0, 0
    for start in range(0, len(table), batch):
        graph = table.batch(np.arange(start, min(start + batch, len(table))))
        predicted = graph.num_atoms + graph.num_molecules
        total += float(model.loss(graph.elements, graph.offsets)) * predicted
        atoms += predicted
    return total / atoms
