"""The entropy of a molecule's atoms as a curve, with the borders of its patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rdkit import Chem

from edt_former.chem import Molecule
from edt_former.report.drawing import as_drawn, bonded_atoms
from edt_former.report.patch_colours import patch_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INCHES_PER_ATOM = 0.22
NARROWEST, WIDEST = 4.0, 50.0
"""Inches of the picture."""


def entropy_curve(
    molecule: Molecule | Chem.Mol | str,
    entropies: Sequence[float],
    ids: Sequence[int],
    *,
    peaks: Sequence[int] = (),
    threshold: float | None = None,
    unit: str = "nats",
    after: bool = False,
) -> Figure:
    """Entropies over the atoms of a molecule, on areas in the colours of its patches.

    Args:
        molecule: as in `draw_patches`.
        entropies: of every atom, in the order of the molecule's atoms.
        ids: the patch of every atom; a border is drawn wherever the next atom has another one.
        peaks: atoms to mark, those whose entropy opened a patch.
        threshold: a level to draw.
        unit: of the entropies, "nats" or "bits".
        after: the entropies are those after the atoms, not of the atoms.

    Returns:
        A figure that belongs to no window: `figure.savefig(path)` writes it.

    Raises:
        ValueError: `entropies` or `ids` are not one per atom, or the SMILES cannot be read.

    Example:
        >>> figure = entropy_curve("CCO", [1.0, 0.5, 1.5], [0, 0, 1], peaks=[2])
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['C', 'C', 'O']
    """
    from matplotlib.figure import Figure

    mol = as_drawn(molecule)
    count = mol.GetNumAtoms()
    for name, values in (("entropies", entropies), ("ids", ids)):
        if len(values) != count:
            raise ValueError(f"{name} must be one per atom, {count}, got {len(values)}")

    ids = [int(patch) for patch in ids]
    width = min(max(INCHES_PER_ATOM * count + 1, NARROWEST), WIDEST)
    figure = Figure(figsize=(width, 2.6), layout="constrained")
    axes = figure.add_subplot()
    _draw_patches(axes, ids, patch_colours(ids, bonded_atoms(mol)))
    axes.plot(entropies, color="black", linewidth=1.2, marker="o", markersize=3, clip_on=False)
    if peaks:
        heights = [entropies[atom] for atom in peaks]
        ring = {"markersize": 8, "markeredgecolor": "black", "markerfacecolor": "white"}
        axes.plot(peaks, heights, "o", **ring, label="opens a patch", clip_on=False)
    if threshold is not None:
        axes.axhline(threshold, color="black", linewidth=1, linestyle="--", label="threshold")
    if peaks or threshold is not None:
        figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=9)

    axes.set_xlim(-0.5, count - 0.5)
    axes.set_ylim(0, 1.1 * max(*entropies, threshold or 0) or 1)
    axes.set_xlabel("atoms in the order of the SMILES")
    axes.set_ylabel(f"entropy after ({unit})" if after else f"entropy ({unit})")
    axes.spines[["top", "right"]].set_visible(False)
    if INCHES_PER_ATOM * count + 1 <= WIDEST:
        axes.set_xticks(range(count), [atom.GetSymbol() for atom in mol.GetAtoms()])
    return figure


def _draw_patches(axes: Axes, ids: list[int], colours: Mapping[int, str]) -> None:
    """An area with its number for every run of atoms of one patch, and the borders between."""
    start = 0
    for patch, run in groupby(ids):
        stop = start + len(list(run))
        axes.axvspan(start - 0.5, stop - 0.5, color=colours[patch], alpha=0.6, linewidth=0)
        if start:
            axes.axvline(start - 0.5, color="black", linewidth=0.8)
        middle = (start + stop - 1) / 2
        place = {"xycoords": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
        axes.annotate(str(patch), (middle, 1.02), **place, fontsize=8, annotation_clip=False)
        start = stop
