"""Oversmoothing: how alike a graph encoder makes the atoms of a molecule, level by level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import edt_kernels
from edt_former.chem import Molecule
from edt_former.graph import GraphBatch, GraphEncoder
from edt_former.report.patch_colours import PALETTE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH = 32
"""Molecules that are encoded at a time."""
VIEWS = ("2D", "3D")
MARKERS = "osD^vP"


@dataclass(frozen=True)
class Smoothness:
    """Of one level and one view of an encoder.

    Attributes:
        level: 0 is what the atoms begin with.
        view: "" where there is one view only.
        cosine: between two atoms of a molecule, the mean over pairs and then over molecules.
        rank: effective rank of the vectors of all atoms, from 1 to their number.
        width: of a vector, what the rank can be at most.
    """

    level: int
    view: str
    cosine: float
    rank: float
    width: int


def mean_cosines(atoms: Tensor, offsets: Tensor) -> Tensor:
    """The mean cosine [M] over the pairs of atoms of every molecule with two atoms or more.

    With unit vectors u_i it is (|sum u_i|^2 - sum |u_i|^2) / (n (n - 1)).

    >>> atoms = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [3.0, 3.0], [1.0, 0.0]])
    >>> mean_cosines(atoms, torch.tensor([0, 2, 4, 5])).tolist()
    [0.0, 1.0]
    """
    unit = F.normalize(atoms.double(), dim=1)
    total = edt_kernels.segment_pool(unit, offsets, reduce="sum")
    own = edt_kernels.segment_pool(unit.square().sum(1, keepdim=True), offsets, reduce="sum")
    count = offsets.diff()
    several = count > 1
    pairs = total.square().sum(1) - own.squeeze(1)
    return (pairs[several] / (count * (count - 1))[several]).round(decimals=12)


def effective_rank(gram: Tensor) -> float:
    """exp(entropy of the singular values, as shares of their sum) (Roy and Vetterli 2007).

    Args:
        gram: X^T X [D, D] of rows X.

    >>> effective_rank(torch.diag(torch.tensor([4.0, 4.0, 0.0])))
    2.0
    """
    singular = torch.linalg.eigvalsh(gram.double()).clamp(min=0).sqrt()
    # Eigenvalues are known to the rounding of the largest, their roots to the root of that.
    singular = singular[singular > 1e-7 * singular.max()]
    shares = singular / singular.sum()
    return round(float((-(shares * shares.log()).sum()).exp()), 9)


@torch.no_grad()
def smoothness(
    encoder: GraphEncoder,
    molecules: Sequence[Molecule],
    coordinates: Sequence[np.ndarray] | None = None,
) -> list[Smoothness]:
    """Mean cosine and effective rank of every level, for every view of the encoder.

    Args:
        encoder: in eval mode.
        molecules: at least one with two atoms.
        coordinates: of every molecule, for an encoder that reads them.

    Raises:
        ValueError: no molecule has two atoms; the encoder reads what the molecules cannot give.
    """
    if all(molecule.num_atoms < 2 for molecule in molecules):
        raise ValueError("molecules must have one of two atoms or more, there is none")
    cosines: dict[tuple[int, int], list[Tensor]] = {}
    grams: dict[tuple[int, int], Tensor] = {}
    for first in range(0, len(molecules), BATCH):
        some = slice(first, first + BATCH)
        places = None if coordinates is None else coordinates[some]
        graph = GraphBatch.pack(molecules[some], places, features=encoder.features)
        for level, features in enumerate(encoder.levels(graph)):
            for view, atoms in enumerate(features.atoms()):
                key = (level, view)
                cosines.setdefault(key, []).append(mean_cosines(atoms, graph.offsets))
                grams[key] = grams.get(key, 0) + atoms.double().T @ atoms.double()
    names = VIEWS if any(view for _, view in grams) else ("",)
    return [
        Smoothness(
            level,
            names[view],
            float(torch.cat(cosines[level, view]).mean()),
            effective_rank(gram),
            len(gram),
        )
        for (level, view), gram in grams.items()
    ]


def level_rows(found: Mapping[str, Sequence[Smoothness]]) -> list[list[object]]:
    """Lines of a table: encoder, level, view, mean cosine, effective rank, width.

    >>> level_rows({"gin": [Smoothness(0, "", 0.25, 3.5, 16)]})
    [['gin', 0, '', '0.250', '3.5', 16]]
    """
    return [
        [name, s.level, s.view, f"{s.cosine:.3f}", f"{s.rank:.1f}", s.width]
        for name, levels in found.items()
        for s in levels
    ]


def oversmoothing_plot(found: Mapping[str, Sequence[Smoothness]]) -> Figure:
    """Mean cosine, and effective rank as a share of the width, over the levels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    cosine, rank = figure.subplots(1, 2)
    lines: dict[str, list[Smoothness]] = {}
    for name, levels in found.items():
        for s in levels:
            lines.setdefault(f"{name} {s.view}".strip(), []).append(s)
    for index, (name, levels) in enumerate(lines.items()):
        style = {"color": PALETTE[index % len(PALETTE)], "marker": MARKERS[index % len(MARKERS)]}
        numbers = [s.level for s in levels]
        cosine.plot(numbers, [s.cosine for s in levels], label=name, **style)
        rank.plot(numbers, [s.rank / s.width for s in levels], label=name, **style)
    cosine.set_ylabel("mean cosine of two atoms of a molecule")
    rank.set_ylabel("effective rank / width")
    for axes in (cosine, rank):
        axes.set_xlabel("level (0: before the first layer)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    cosine.legend(frameon=False)
    return figure
