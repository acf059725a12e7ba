"""The graph encoder of the recipe, trained without labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edt_kernels
from edt_former.chem.features import ATOM_FEATURE_SIZES
from edt_former.connectors.qformer import ATOMS_PER_UNIT
from edt_former.graph.batch import GraphBatch
from edt_former.graph.encoder import GraphEncoder, make_encoder
from edt_former.train.tiny.data import MoleculeTable
from edt_former.train.tiny.loop import fit

CONFIG = {"name": "gin", "layers": 5, "width": 128}

MASKED = {0: ATOM_FEATURE_SIZES[0] - 1, 4: ATOM_FEATURE_SIZES[4] - 1, 6: ATOM_FEATURE_SIZES[6] - 1}
"""Columns of the atom features that are hidden and guessed (atomic number, hydrogens,
hybridisation), and the entry that hides them: each table's last, "none of the above"."""

MASK_SHARE = 0.15


class _Pretraining(nn.Module):
    """The encoder with throw-away heads: one per hidden column, one for the molecule's targets."""

    def __init__(self, encoder: GraphEncoder, num_targets: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.columns = nn.ModuleList(
            nn.Linear(encoder.width, ATOM_FEATURE_SIZES[column]) for column in MASKED
        )
        self.targets = nn.Sequential(
            nn.Linear(encoder.width, 2 * encoder.width),
            nn.GELU(),
            nn.Linear(2 * encoder.width, num_targets),
        )

    def forward(self, graph: GraphBatch, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the hidden columns, and the smooth error of the molecule's targets."""
        truth = graph.atom_features
        masked = truth.clone()
        for column, entry in MASKED.items():
            masked[hidden, column] = entry
        graph.atom_features = masked
        features = self.encoder(graph)
        guessed = features.values[hidden]
        columns = [
            F.cross_entropy(head(guessed), truth[hidden, column])
            for head, column in zip(self.columns, MASKED, strict=True)
        ]
        sums = edt_kernels.segment_pool(features.values, features.offsets, reduce="sum")
        error = F.smooth_l1_loss(self.targets(sums / ATOMS_PER_UNIT), targets)
        return torch.stack(columns).mean(), error


def train_encoder(
    table: MoleculeTable, checkpoint: Path, *, steps: int, seed: int, batch: int = 64
) -> GraphEncoder:
    """Guess hidden atoms and the targets of `SELF_SUPERVISED`; returns the encoder, frozen."""
    torch.manual_seed(seed)
    mean, spread = table.targets.mean(0), table.targets.std(0) + 1e-3
    model = _Pretraining(make_encoder(CONFIG), table.targets.shape[1])

    def loss(rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = rng.choice(len(table), batch, replace=False)
        graph = table.batch(rows)
        hidden = torch.from_numpy(rng.random(graph.num_atoms) < MASK_SHARE)
        targets = torch.from_numpy((table.targets[rows] - mean) / spread)
        atoms, molecules = model(graph, hidden, targets)
        return atoms + 2 * molecules, {"atoms": atoms.item(), "molecules": molecules.item()}

    fit(model, loss, label="encoder", checkpoint=checkpoint, steps=steps, lr=2e-3, seed=seed)
    model.encoder.freeze()
    return model.encoder
