"""Molecules with the patches they are cut into; rows that cannot be read stay, with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from edt_former.chem import Invalid, Molecule, read_molecule
from edt_former.graph import GraphBatch
from edt_former.report.drawing import draw_patches, draw_patches_png
from edt_former.report.entropy_curve import entropy_curve
from edt_former.tokens import (
    NextAtomPredictor,
    PatchOptions,
    alter_entropy_patches,
    cut_by_entropy,
    cut_molecules,
)
from edt_kernels import find_patches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AFTER = ("rising_edge", "published")
"""Rules by which the atom after the deciding one opens the patch."""


@dataclass(frozen=True)
class PatchedMolecule:
    """A molecule and its patches by one source, atoms in the order of `molecule`.

    Attributes:
        molecule: its `order` leads to the caller's atoms.
        ids: the patch of every atom, from 0.
        entropies: of every atom.
        opened_by: per patch, the atom whose entropy opened it; None for the first patch, for one
            that `max_size` or `tokens` opened, and for all patches that are fragments, connected
            pieces or a control.
        threshold: the entropy that opens a patch, None where the rule has none.
        unit: of the entropies, "nats" or "bits".
        after: with rule "published" an atom's entropy is that after it, not its own.

    A notebook shows it as the picture of `svg`.
    """

    molecule: Molecule
    ids: list[int]
    entropies: list[float]
    opened_by: list[int | None]
    threshold: float | None
    unit: str
    after: bool

    @property
    def num_patches(self) -> int:
        """How many patches there are."""
        return len(self.opened_by)

    def atoms(self, patch: int) -> list[int]:
        """The atoms of a patch."""
        return [atom for atom, own in enumerate(self.ids) if own == patch]

    def in_callers_order(self, values: Sequence) -> list:
        """One value per atom, in the order of the SMILES or `Mol` that was read.

        Hydrogens that became part of their heavy atoms have none.
        """
        return [values[atom] for atom in np.argsort(self.molecule.order)]

    def svg(self) -> str:
        """The picture of `draw_patches`."""
        return draw_patches(self.molecule, self.ids)

    _repr_svg_ = svg

    def png(self) -> bytes:
        """The picture of `draw_patches_png`."""
        return draw_patches_png(self.molecule, self.ids)

    def curve(self) -> Figure:
        """The picture of `entropy_curve`, the atoms marked that opened a patch."""
        return entropy_curve(
            self.molecule,
            self.entropies,
            self.ids,
            peaks=[atom for atom in self.opened_by if atom is not None],
            threshold=self.threshold,
            unit=self.unit,
            after=self.after,
        )


def patch_molecules(
    molecules: Sequence[Molecule],
    predictor: NextAtomPredictor,
    options: PatchOptions | None = None,
    *,
    unit: str = "nats",
) -> list[PatchedMolecule]:
    """Cut molecules into patches.

    Args:
        molecules: any number.
        predictor: gives the entropies.
        options: with one source; by default peaks of entropy.
        unit: of the entropies and of `options.threshold`, "nats" or "bits".

    Raises:
        ValueError: `options` name no source or two.

    Example:
        >>> import edt_former
        >>> from edt_former.chem import read_molecules
        >>> predictor = edt_former.load().predictor
        >>> (ether,) = patch_molecules(read_molecules(["CCOCC"]), predictor)
        >>> ether.ids, [ether.atoms(patch) for patch in range(ether.num_patches)]
        ([0, 0, 1, 1, 2], [[0, 1], [2, 3], [4]])
    """
    options = options or PatchOptions()
    if len(options.sources) != 1:
        raise ValueError(f"options must name one source, got {options.sources!r}")
    graph = GraphBatch.pack(list(molecules))
    (source,) = options.sources
    with torch.no_grad():
        entropies, patches = cut_by_entropy(graph, options, predictor, unit=unit)
        if source == "entropy":
            cut = alter_entropy_patches(entropies, patches, molecules, graph, options)
        else:
            cut = cut_molecules(source, molecules, graph, options, None)
    level = {name: getattr(options, name) for name in ("rule", "q", "threshold")}
    by_rule = find_patches(entropies, graph.offsets, **level)

    result, altered = [], options.control is not None or options.connected
    for index, (start, stop) in enumerate(pairwise(graph.offsets.tolist())):
        molecule, threshold = molecules[index], None
        ids = cut.ids[start:stop].tolist()
        if source == "brics" or altered:
            opened_by = [None] * len(set(ids))
        else:
            opened_by = _opened_by(ids, by_rule.ids[start:stop].tolist(), options.rule)
            # Peaks have no threshold, and that of "monotonic" is one of differences.
            if options.rule in ("threshold", *AFTER):
                threshold = float(patches.threshold[index])
        of_atoms, after = entropies[start:stop].tolist(), options.rule == "published"
        result.append(PatchedMolecule(molecule, ids, of_atoms, opened_by, threshold, unit, after))
    return result


def _opened_by(ids: list[int], by_rule: list[int], rule: str) -> list[int | None]:
    """`by_rule` are the patches that the rule alone gives, without limits of size."""
    deciding: list[int | None] = [None]
    for before, atom in pairwise(range(len(ids))):
        if ids[before] != ids[atom]:
            edge = before if rule in AFTER else atom
            deciding.append(edge if by_rule[before] != by_rule[atom] else None)
    return deciding if ids else []


@dataclass(frozen=True)
class PatchedRow:
    """One row of a file.

    Attributes:
        name: as the file gives it, or the SMILES.
        smiles: as the file gives it.
        reason: why the row could not be read, "" where it could.
        patched: None where it could not.
    """

    name: str
    smiles: str
    reason: str = ""
    patched: PatchedMolecule | None = None


def patch_rows(
    rows: Iterable[tuple[str, str]],
    predictor: NextAtomPredictor,
    options: PatchOptions | None = None,
    *,
    unit: str = "nats",
    chunk: int = 256,
) -> Iterator[PatchedRow]:
    """Cut the molecule of each (name, SMILES), in order; `chunk` molecules are in memory at a time.

    Args:
        rows: for instance `edt_former.chem.read_file(path)`.
        predictor, options, unit: as in `patch_molecules`.

    Example:
        >>> import edt_former
        >>> rows = [("ether", "CCOCC"), ("broken", "C1CC")]
        >>> for row in patch_rows(rows, edt_former.load().predictor):
        ...     print(row.name, row.reason or row.patched.ids)
        ether [0, 0, 1, 1, 2]
        broken unclosed ring
    """
    rows = iter(rows)
    while block := list(islice(rows, chunk)):
        read = [read_molecule(smiles) for _, smiles in block]
        molecules = [molecule for molecule in read if isinstance(molecule, Molecule)]
        patched = iter(patch_molecules(molecules, predictor, options, unit=unit))
        for (name, smiles), molecule in zip(block, read, strict=True):
            shown = name or smiles
            if isinstance(molecule, Invalid):
                yield PatchedRow(shown, smiles, reason=molecule.reason)
            else:
                yield PatchedRow(shown, smiles, patched=next(patched))
