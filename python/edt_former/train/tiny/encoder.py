"""The graph encoders of the recipe, trained without labels: 2D, 3D, and the two blended."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edt_kernels
from edt_former.chem.features import ATOM_FEATURE_SIZES
from edt_former.connectors.qformer import ATOMS_PER_UNIT
from edt_former.graph.batch import GraphBatch
from edt_former.graph.blending import FLAT, SPATIAL
from edt_former.graph.encoder import GraphEncoder, make_encoder
from edt_former.graph.unimol import HIDDEN
from edt_former.train.tiny.conformers import PlacedTable
from edt_former.train.tiny.data import MoleculeTable
from edt_former.train.tiny.loop import fit

CONFIG = {"name": "gin", "layers": 5, "width": 128}
SPATIAL_CONFIG = {
    "name": "unimol",
    **{"layers": 4, "width": 128, "heads": 8, "ffn": 256, "gaussians": 32, "dropout": 0.0},
}
BLENDING = {"name": "blended", "layers": 2, "width": 128, "heads": 4}

MASKED = {0: ATOM_FEATURE_SIZES[0] - 1, 4: ATOM_FEATURE_SIZES[4] - 1, 6: ATOM_FEATURE_SIZES[6] - 1}
"""Columns of the atom features that are hidden and guessed (atomic number, hydrogens,
hybridisation), and the entry that hides them: each table's last, "none of the above"."""

UNREAD = (4, 6)
"""Of these, what Uni-Mol never reads and so can guess for every atom."""

SPATIALLY_SUPERVISED = ("distance by which a masked atom was moved",)
"""What the encoders that read coordinates learn from besides."""

MASK_SHARE = 0.15
SHIFT = 0.3
"""Angstrom, standard deviation per axis of what moves a hidden atom that has coordinates."""


class _Pretraining(nn.Module):
    """The encoder with throw-away heads: one per hidden column, one for the molecule's targets,
    and for 3D one for the distance by which a hidden atom was moved.

    Args:
        encoder: to be trained.
        num_targets: of a molecule.
        unread: columns that the encoder does not read, guessed for all atoms.
    """

    def __init__(
        self, encoder: GraphEncoder, num_targets: int, unread: Collection[int] = ()
    ) -> None:
        super().__init__()
        self.encoder, self.unread = encoder, unread
        self.columns = nn.ModuleList(
            nn.Linear(encoder.width, ATOM_FEATURE_SIZES[column]) for column in MASKED
        )
        self.targets = nn.Sequential(
            nn.Linear(encoder.width, 2 * encoder.width),
            nn.GELU(),
            nn.Linear(2 * encoder.width, num_targets),
        )
        if encoder.needs_coordinates:
            self.moved = nn.Linear(encoder.width, 1)

    def forward(
        self, graph: GraphBatch, hidden: Tensor, targets: Tensor, shift: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Errors of what is guessed of atoms and of molecules, means over the encoder's views.

        Args:
            graph: as it is.
            hidden: bool [N], the atoms to hide.
            targets: [B, num_targets].
            shift: [hidden atoms, 3], what moves them, for an encoder that needs coordinates.

        Returns:
            Cross-entropy of the columns, to which 3D adds the smooth error of the distances; and
            the smooth error of the targets.
        """
        features = self.encoder(_hide(graph, hidden, shift))
        columns, errors = [], []
        for atoms in features.atoms():
            guessed = atoms[hidden]
            columns.append(self._columns(atoms, guessed, graph.atom_features, hidden))
            if shift is not None:
                distance = shift.norm(dim=1)
                columns[-1] += F.smooth_l1_loss(self.moved(guessed).squeeze(1), distance)
            sums = edt_kernels.segment_pool(atoms, graph.offsets, reduce="sum")
            errors.append(F.smooth_l1_loss(self.targets(sums / ATOMS_PER_UNIT), targets))
        return torch.stack(columns).mean(), torch.stack(errors).mean()

    def _columns(self, atoms: Tensor, guessed: Tensor, truth: Tensor, hidden: Tensor) -> Tensor:
        losses = [
            F.cross_entropy(head(atoms), truth[:, column])
            if column in self.unread
            else F.cross_entropy(head(guessed), truth[hidden, column])
            for head, column in zip(self.columns, MASKED, strict=True)
        ]
        return torch.stack(losses).mean()


def _hide(graph: GraphBatch, hidden: Tensor, shift: Tensor | None) -> GraphBatch:
    """The batch with the columns and elements of `hidden` atoms masked, and these atoms moved."""
    masked, coordinates = graph.atom_features.clone(), graph.coordinates
    for column, entry in MASKED.items():
        masked[hidden, column] = entry
    if shift is not None:
        coordinates = coordinates.clone()
        coordinates[hidden] += shift
    elements = graph.elements.masked_fill(hidden, HIDDEN)
    return replace(graph, atom_features=masked, elements=elements, coordinates=coordinates)


def train_encoder(
    table: MoleculeTable, checkpoint: Path, *, steps: int, seed: int, batch: int = 64
) -> GraphEncoder:
    """Guess hidden atoms and the targets of `SELF_SUPERVISED`; returns the encoder, frozen."""
    torch.manual_seed(seed)
    model = _Pretraining(make_encoder(CONFIG), table.targets.shape[1])
    _pretrain(model, table, checkpoint, label="encoder", steps=steps, seed=seed, batch=batch)
    return model.encoder.freeze()


def train_spatial_encoder(
    table: PlacedTable, checkpoint: Path, *, steps: int, seed: int, batch: int = 64
) -> GraphEncoder:
    """Likewise from conformers, where hidden atoms are moved and the distance is guessed too.

    Uni-Mol reads elements and places alone: [MASK] hides an element, and hydrogens and
    hybridisation of every atom are there to be guessed.
    """
    torch.manual_seed(seed)
    model = _Pretraining(make_encoder(SPATIAL_CONFIG), table.targets.shape[1], UNREAD)
    _pretrain(model, table, checkpoint, label="3D encoder", steps=steps, seed=seed, batch=batch)
    return model.encoder.freeze()


def train_blending(
    table: PlacedTable,
    flat: GraphEncoder,
    spatial: GraphEncoder,
    checkpoint: Path,
    *,
    steps: int,
    seed: int,
    batch: int = 64,
) -> GraphEncoder:
    """Likewise the blending of two encoders that stay as they are; returns all three, frozen."""
    torch.manual_seed(seed)
    config = {**BLENDING, "flat": flat.config, "spatial": spatial.config}
    encoder = make_encoder({**config, "train_blending": True})
    for name, part in ((FLAT, flat), (SPATIAL, spatial)):
        encoder.graph_encoder[name].load_state_dict(part.state_dict())
    model = _Pretraining(encoder.freeze(), table.targets.shape[1])
    _pretrain(model, table, checkpoint, label="blending", steps=steps, seed=seed, batch=batch)
    blended = make_encoder(config)
    blended.load_state_dict(encoder.state_dict())
    return blended.freeze()


def _pretrain(
    model: _Pretraining,
    table: MoleculeTable,
    checkpoint: Path,
    *,
    label: str,
    steps: int,
    seed: int,
    batch: int,
) -> None:
    mean, spread = table.targets.mean(0), table.targets.std(0) + 1e-3

    def loss(rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = rng.choice(len(table), batch, replace=False)
        graph = table.batch(rows)
        hidden = torch.from_numpy(rng.random(graph.num_atoms) < MASK_SHARE)
        targets = torch.from_numpy((table.targets[rows] - mean) / spread)
        shift = None
        if graph.coordinates is not None:
            moves = rng.normal(scale=SHIFT, size=(int(hidden.sum()), 3))
            shift = torch.from_numpy(moves.astype(np.float32))
        atoms, molecules = model(graph, hidden, targets, shift)
        return atoms + 2 * molecules, {"atoms": atoms.item(), "molecules": molecules.item()}

    fit(model, loss, label=label, checkpoint=checkpoint, steps=steps, lr=2e-3, seed=seed)
