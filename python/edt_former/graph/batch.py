"""Molecules packed end to end, without padding."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from edt_kernels import offsets_from_lengths

FEATURE_SCHEMES = {"ogb-9-3": (9, 3), "pretrain-gnns-2-2": (2, 2)}
"""Features per atom and per bond of the schemes that `edt_former.chem` can compute."""

OGB, PRETRAIN = FEATURE_SCHEMES

MOTIF_WIDTH = 73
"""Numbers per motif, as `edt_former.chem` computes them."""


def scheme_of(atom_width: int, bond_width: int) -> str | None:
    """The scheme with that many features per atom and per bond; None where none has a name.

    >>> scheme_of(9, 3), scheme_of(1, 1)
    ('ogb-9-3', None)
    """
    names = {widths: name for name, widths in FEATURE_SCHEMES.items()}
    return names.get((atom_width, bond_width))


class MoleculeArrays(Protocol):
    """What `GraphBatch.pack` reads of a molecule, all numpy int64."""

    atom_features: object  # [n, F]
    bond_index: object  # [2, 2E], sorted by target
    bond_features: object  # [2E, G]
    elements: object  # [n]

    def features(self, scheme: str) -> tuple[object, object]:
        """Atom and bond features of another scheme."""


class MotifFeatures(NamedTuple):
    """What the motifs of B molecules are made of: `values` uint8 [M, 73], `offsets` [B + 1]."""

    values: Tensor
    offsets: Tensor

    def to(self, device: torch.device | str | None, non_blocking: bool = False) -> MotifFeatures:
        """The same on another device."""
        return MotifFeatures(*(x.to(device, non_blocking=non_blocking) for x in self))

    def take(self, molecules: Sequence[int]) -> MotifFeatures:
        """Those of some of the molecules, in that order."""
        bounds = self.offsets.tolist()
        spans = [(bounds[m], bounds[m + 1]) for m in molecules]
        sizes = torch.tensor([stop - start for start, stop in spans], dtype=torch.int64)
        offsets = offsets_from_lengths(sizes.to(self.offsets.device))
        return MotifFeatures(self.values[_ranges(spans, offsets.device)], offsets)

    @classmethod
    def pack(cls, features: Sequence[np.ndarray]) -> MotifFeatures:
        """Packs what `edt_former.chem.motif_features` gives.

        >>> from edt_former.chem import motif_features, read_molecules
        >>> MotifFeatures.pack(motif_features(read_molecules(["CCO", "C"]))).offsets
        tensor([0, 2, 2])
        """
        offsets = offsets_from_lengths(torch.tensor([len(f) for f in features], dtype=torch.int64))
        rows = np.concatenate([np.zeros((0, MOTIF_WIDTH), np.uint8), *features])
        return cls(torch.from_numpy(rows), offsets)


@dataclass
class GraphBatch:
    """B molecules with N atoms in all; bonds in both directions, sorted by target.

    Attributes:
        atom_features: int64 [N, F], F = 9 in the scheme of the Open Graph Benchmark.
        bond_index: int64 [2, E2], row 0 the source and row 1 the target, indices into N.
        bond_features: int64 [E2, G], G = 3 there.
        bond_offsets: int64 [N + 1], the bonds that end in atom i are
            `bond_offsets[i]:bond_offsets[i + 1]`.
        offsets: int64 [B + 1], the atoms of molecule m are `offsets[m]:offsets[m + 1]`.
        elements: int64 [N], atomic numbers, 0 for a wildcard.
        coordinates: float32 [N, 3] in angstrom, None where no encoder reads them.
        motifs: of the molecules, None where no connector reads them.
    """

    atom_features: Tensor
    bond_index: Tensor
    bond_features: Tensor
    bond_offsets: Tensor
    offsets: Tensor
    elements: Tensor
    coordinates: Tensor | None = None
    motifs: MotifFeatures | None = None

    @property
    def num_molecules(self) -> int:
        """Number of molecules B."""
        return self.offsets.shape[0] - 1

    @property
    def num_atoms(self) -> int:
        """Number of atoms N."""
        return self.atom_features.shape[0]

    @property
    def features(self) -> str | None:
        """The scheme of the features, by their number; None for one without a name."""
        return scheme_of(self.atom_features.shape[1], self.bond_features.shape[1])

    def to(self, device: torch.device | str | None, non_blocking: bool = False) -> GraphBatch:
        """The batch on another device."""
        tensors = (getattr(self, f.name) for f in fields(self))
        return GraphBatch(
            *(None if x is None else x.to(device, non_blocking=non_blocking) for x in tensors)
        )

    def take(self, molecules: Sequence[int]) -> GraphBatch:
        """Some of the molecules, in that order.

        >>> from edt_former.chem import read_molecules
        >>> one, two = read_molecules(["CO", "c1cc[nH]c1"])
        >>> taken = GraphBatch.pack([one, two, one]).take([1])
        >>> taken.offsets.tolist(), taken.bond_index.max().item()
        ([0, 5], 4)
        """
        bounds, ends = self.offsets.tolist(), self.bond_offsets.tolist()
        spans = [(bounds[m], bounds[m + 1]) for m in molecules]
        device = self.offsets.device
        atoms = _ranges(spans, device)
        bonds = _ranges([(ends[start], ends[stop]) for start, stop in spans], device)
        sizes = torch.tensor([stop - start for start, stop in spans], dtype=torch.int64)
        offsets = offsets_from_lengths(sizes.to(device))
        moved = offsets[:-1] - torch.tensor([start for start, _ in spans], device=device)
        moved = moved.repeat_interleave(offsets.diff(), output_size=len(atoms))
        lengths = self.bond_offsets.diff()[atoms]
        shift = moved.repeat_interleave(lengths, output_size=len(bonds))
        return GraphBatch(
            atom_features=self.atom_features[atoms],
            bond_index=self.bond_index[:, bonds] + shift,
            bond_features=self.bond_features[bonds],
            bond_offsets=offsets_from_lengths(lengths),
            offsets=offsets,
            elements=self.elements[atoms],
            coordinates=None if self.coordinates is None else self.coordinates[atoms],
            motifs=None if self.motifs is None else self.motifs.take(molecules),
        )

    def keys(self) -> list[bytes]:
        """A digest of every molecule: equal where all its arrays are, wherever it stands.

        Molecules in the order of their canonical SMILES have equal digests when they are the same.

        >>> from edt_former.chem import read_molecules
        >>> a, b, c = GraphBatch.pack(read_molecules(["CCO", "CCN", "OCC"])).keys()
        >>> a == c, a == b
        (True, False)
        """
        here = self.to("cpu")
        ends, found = here.bond_offsets.tolist(), []
        for start, stop in pairwise(here.offsets.tolist()):
            bonds = slice(ends[start], ends[stop])
            arrays = [
                here.atom_features[start:stop],
                here.bond_index[:, bonds] - start,
                here.bond_features[bonds],
            ]
            if here.coordinates is not None:
                arrays.append(here.coordinates[start:stop])
            digest = hashlib.blake2b(digest_size=16)
            for array in arrays:
                digest.update(repr(tuple(array.shape)).encode())
                digest.update(array.contiguous().numpy())
            found.append(digest.digest())
        return found

    @classmethod
    def pack(
        cls,
        molecules: Sequence[MoleculeArrays],
        coordinates: Sequence[np.ndarray] | None = None,
        *,
        features: str | None = OGB,
        motifs: Sequence[np.ndarray] | None = None,
    ) -> GraphBatch:
        """Packs `edt_former.chem.Molecule`s; empty molecules and an empty list are legal.

        Args:
            molecules: in the order of the batch.
            coordinates: [n, 3] of every molecule, in the order of its atoms
                (`edt_former.chem.make_conformers`); None where no encoder reads them.
            features: the scheme that the graph encoder reads (`GraphEncoder.features`); None takes
                what is stored, as of graphs that are no molecules (`edt_former.graph.Graph`).
            motifs: uint8 [motifs, 73] of every molecule (`edt_former.chem.motif_features`); None
                where no connector reads them.

        Raises:
            ValueError: a scheme of features that is not known, or that a molecule cannot give;
                coordinates are not as many as molecules, or not as many as atoms; motifs are not
                as many as molecules; there is nothing, and no scheme says how wide it is.

        >>> from edt_former.chem import read_molecules
        >>> batch = GraphBatch.pack(read_molecules(["CO", "[Na+]", "CC"]))
        >>> batch.offsets.tolist(), batch.bond_index.tolist(), batch.bond_offsets.tolist()
        ([0, 2, 3, 5], [[1, 0, 4, 3], [0, 1, 3, 4]], [0, 1, 2, 2, 3, 4])
        """
        if features is not None or not molecules:
            check_scheme(features)
        positions = None if coordinates is None else _positions(molecules, coordinates)
        if motifs is not None and len(motifs) != len(molecules):
            raise ValueError(
                f"motifs must be one array per molecule, {len(molecules)}, got {len(motifs)}"
            )
        packed = None if motifs is None else MotifFeatures.pack(motifs)
        if not molecules:
            none = cls.empty(*FEATURE_SCHEMES[features])
            return replace(none, coordinates=positions, motifs=packed)
        if features in (OGB, None):
            rows = [(m.atom_features, m.bond_features) for m in molecules]
        else:
            rows = [m.features(features) for m in molecules]
        atom_features, bond_features = map(_cat, zip(*rows, strict=True))
        bond_index = _cat([m.bond_index for m in molecules], dim=1)
        offsets = offsets_from_lengths(torch.tensor([len(m.atom_features) for m in molecules]))
        bonds = torch.tensor([m.bond_index.shape[1] for m in molecules])
        bond_index += offsets[:-1].repeat_interleave(bonds)
        incoming = torch.bincount(bond_index[1], minlength=atom_features.shape[0])
        return cls(
            atom_features=atom_features,
            bond_index=bond_index,
            bond_features=bond_features,
            bond_offsets=offsets_from_lengths(incoming),
            offsets=offsets,
            elements=_cat([m.elements for m in molecules]),
            coordinates=positions,
            motifs=packed,
        )

    @classmethod
    def empty(cls, atom_width: int, bond_width: int) -> GraphBatch:
        """No molecule, for encoders of so many features per atom and per bond, and any connector.

        >>> GraphBatch.empty(9, 3).num_molecules
        0
        """
        shapes = (0, atom_width), (2, 0), (0, bond_width), (1,), (1,), (0,)
        none = (torch.zeros(shape, dtype=torch.int64) for shape in shapes)
        return cls(*none, coordinates=torch.zeros(0, 3), motifs=MotifFeatures.pack([]))


def check_scheme(features: str | None) -> None:
    """Refuses a scheme of features that has no name here.

    Raises:
        ValueError: it has none.
    """
    if features not in FEATURE_SCHEMES:
        known = ", ".join(map(repr, FEATURE_SCHEMES))
        raise ValueError(f"features must be one of {known}, got {features!r}")


def _ranges(spans: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """The indices start, ..., stop - 1 of every span, one after the other."""
    parts = [torch.arange(*span, device=device) for span in spans]
    return torch.cat([torch.zeros(0, dtype=torch.int64, device=device), *parts])


def _cat(arrays: Sequence, dim: int = 0) -> Tensor:
    return torch.cat([torch.from_numpy(array) for array in arrays], dim)


def owners(offsets: Tensor, rows: int) -> Tensor:
    """The molecule [rows] of every row, by `offsets` [B + 1] that end at `rows`.

    >>> owners(torch.tensor([0, 2, 2, 3]), 3).tolist()
    [0, 0, 2]
    """
    molecules = torch.arange(len(offsets) - 1, device=offsets.device)
    return molecules.repeat_interleave(offsets.diff(), output_size=rows)


def _positions(molecules: Sequence[MoleculeArrays], coordinates: Sequence[np.ndarray]) -> Tensor:
    if len(coordinates) != len(molecules):
        raise ValueError(
            f"coordinates must be one array per molecule, {len(molecules)}, got {len(coordinates)}"
        )
    for index, (molecule, positions) in enumerate(zip(molecules, coordinates, strict=True)):
        shape = (len(molecule.atom_features), 3)
        if np.shape(positions) != shape:
            raise ValueError(
                f"coordinates of molecule {index} must have shape {shape}, "
                f"got {np.shape(positions)}"
            )
    rows = [np.zeros((0, 3)), *coordinates]
    return torch.from_numpy(np.concatenate(rows).astype(np.float32))
