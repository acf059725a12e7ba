"""Integer atom and bond features: those of the Open Graph Benchmark, and of pretrain-gnns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from rdkit import Chem
from rdkit.Chem import BondDir, BondStereo, BondType, ChiralType, HybridizationType

FEATURES_ID = "ogb-9-3"
"""Names the scheme of the Open Graph Benchmark (arXiv:2005.00687) in a config: an encoder trained
on another must not read these numbers."""

PRETRAIN_FEATURES_ID = "pretrain-gnns-2-2"
"""Names the scheme of pretrain-gnns (arXiv:1905.12265): two features per atom, two per bond."""

ATOM_FEATURE_SIZES = (119, 4, 12, 12, 10, 6, 6, 2, 2)
"""Element, chirality, degree, charge, hydrogens, radicals, hybridisation, aromatic, in a ring."""

BOND_FEATURE_SIZES = (5, 6, 2)
"""Type, stereo, conjugated."""

PRETRAIN_ATOM_SIZES = (120, 3)
"""Element (118 what is none, 119 a hidden atom), chirality."""

PRETRAIN_BOND_SIZES = (6, 3)
"""Type (4 the loop of an atom with itself, 5 a hidden bond), direction."""

_LAST = tuple(size - 1 for size in ATOM_FEATURE_SIZES)
_LAST_TYPE, _LAST_STEREO, _ = (size - 1 for size in BOND_FEATURE_SIZES)
_BOND_DIRECTION = {BondDir.ENDUPRIGHT: 1, BondDir.ENDDOWNRIGHT: 2}


def _bins(values: Mapping[object, int], last: int) -> np.ndarray:
    """The bin of every value of an RDKit enumeration by its number, `last` for the others."""
    enumeration = type(next(iter(values)))
    bins = np.full(max(enumeration.values) + 1, last, dtype=np.int64)
    for value, bin_ in values.items():
        bins[int(value)] = bin_
    return bins


_CHIRALITY = _bins(
    {
        ChiralType.CHI_UNSPECIFIED: 0,
        ChiralType.CHI_TETRAHEDRAL_CW: 1,
        ChiralType.CHI_TETRAHEDRAL_CCW: 2,
    },
    _LAST[1],
)
_HYBRIDISATION = _bins(
    {
        HybridizationType.SP: 0,
        HybridizationType.SP2: 1,
        HybridizationType.SP3: 2,
        HybridizationType.SP3D: 3,
        HybridizationType.SP3D2: 4,
    },
    _LAST[6],
)
_BOND_TYPE = _bins(
    {BondType.SINGLE: 0, BondType.DOUBLE: 1, BondType.TRIPLE: 2, BondType.AROMATIC: 3}, _LAST_TYPE
)
_BOND_STEREO = _bins(
    {
        BondStereo.STEREONONE: 0,
        BondStereo.STEREOZ: 1,
        BondStereo.STEREOE: 2,
        BondStereo.STEREOCIS: 3,
        BondStereo.STEREOTRANS: 4,
    },
    _LAST_STEREO,
)
_ATOM, _BOND = Chem.Atom, Chem.Bond
_ATOM_READERS = (
    *(_ATOM.GetAtomicNum, _ATOM.GetChiralTag, _ATOM.GetTotalDegree, _ATOM.GetFormalCharge),
    *(_ATOM.GetTotalNumHs, _ATOM.GetNumRadicalElectrons, _ATOM.GetHybridization),
    *(_ATOM.GetIsAromatic, _ATOM.IsInRing),
)
_BOND_READERS = (_BOND.GetBondType, _BOND.GetStereo, _BOND.GetIsConjugated)


def _read(readers: Sequence[Callable], items: list) -> np.ndarray:
    """int64 [items, readers]; a call per item is what RDKit offers."""
    columns = [np.fromiter(map(read, items), np.int64, len(items)) for read in readers]
    return np.stack(columns, 1)


def atom_features(mol: Chem.Mol) -> np.ndarray:
    """Nine integers per atom, int64 [n, 9], each below its entry of `ATOM_FEATURE_SIZES`.

    A value outside a table goes to the last bin of its column. The chirality column has the four
    classes of the published checkpoints, the last being every tag that is not tetrahedral.

    >>> atom_features(Chem.MolFromSmiles("O")).tolist()
    [[7, 0, 2, 5, 2, 0, 2, 0, 0]]
    """
    # By index: the iterator of `GetAtoms` takes twice as long.
    x = _read(_ATOM_READERS, list(map(mol.GetAtomWithIdx, range(mol.GetNumAtoms()))))
    element, chirality, charge, hybridisation = x[:, 0], x[:, 1], x[:, 3], x[:, 6]
    listed = (element >= 1) & (element < ATOM_FEATURE_SIZES[0])
    x[:, 0] = np.where(listed, element - 1, _LAST[0])
    x[:, 1] = _CHIRALITY[chirality]
    x[:, 3] = np.where(np.abs(charge) <= 5, charge + 5, _LAST[3])
    x[:, 6] = _HYBRIDISATION[hybridisation]
    return np.minimum(x, _LAST)


def bond_features(mol: Chem.Mol) -> tuple[np.ndarray, np.ndarray]:
    """The bonds in both directions: int64 [2, 2E] (source, target) and their features [2E, 3].

    Sorted by target, then by source. An atom alone gives arrays of shape [2, 0] and [0, 3].

    >>> index, features = bond_features(Chem.MolFromSmiles("CC=O"))
    >>> index.tolist(), features.tolist()
    ([[1, 0, 2, 1], [0, 1, 1, 2]], [[0, 0, 0], [0, 0, 0], [1, 0, 0], [1, 0, 0]])
    """
    bonds = list(map(mol.GetBondWithIdx, range(mol.GetNumBonds())))
    x = _read(_BOND_READERS, bonds)
    x[:, 0], x[:, 1] = _BOND_TYPE[x[:, 0]], _BOND_STEREO[x[:, 1]]
    index, order = _both_directions(bonds)
    return index, np.concatenate([x, x])[order]


def bond_directions(mol: Chem.Mol) -> np.ndarray:
    """How the bonds beside a double bond are drawn, int64 [2E], in the order of `bond_features`.

    0 for a bond without a direction, 1 for RDKit's ENDUPRIGHT and 2 for its ENDDOWNRIGHT; both
    directions of a bond have the same. It is `/` and `\\` of the SMILES, and so depends on how
    that is written.

    >>> bond_directions(Chem.MolFromSmiles("C/C=C\\\\C")).tolist()
    [1, 1, 0, 0, 2, 2]
    """
    bonds = list(mol.GetBonds())
    rows = [_BOND_DIRECTION.get(bond.GetBondDir(), 0) for bond in bonds]
    _, order = _both_directions(bonds)
    return np.array(rows * 2, dtype=np.int64)[order]


def pretrain_features(
    atoms: np.ndarray, bonds: np.ndarray, directions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The features of pretrain-gnns (arXiv:1905.12265), from those of this module.

    An atom is (element, chirality): the atomic number less one, 118 for a wildcard; 0 without a
    tag, 1 clockwise, 2 counterclockwise. A bond is (type, direction): single, double, triple,
    aromatic; see `bond_directions`. The published tables have no row for what RDKit has learned
    since: a tag that is not tetrahedral reads as none, a bond of any other type as a single one.

    Args:
        atoms: int64 [n, 9], see `atom_features`.
        bonds: int64 [2E, 3], see `bond_features`.
        directions: int64 [2E].

    Returns:
        int64 [n, 2], below `PRETRAIN_ATOM_SIZES`, and [2E, 2], below `PRETRAIN_BOND_SIZES`.

    >>> mol = Chem.MolFromSmiles("C=O")
    >>> atoms, bonds = atom_features(mol), bond_features(mol)[1]
    >>> [x.tolist() for x in pretrain_features(atoms, bonds, bond_directions(mol))]
    [[[5, 0], [7, 0]], [[1, 0], [1, 0]]]
    """
    chirality = np.where(atoms[:, 1] == _LAST[1], 0, atoms[:, 1])
    types = np.where(bonds[:, 0] == _LAST_TYPE, 0, bonds[:, 0])
    return np.stack([atoms[:, 0], chirality], 1), np.stack([types, directions], 1)


def _both_directions(bonds: list) -> tuple[np.ndarray, np.ndarray]:
    """int64 [2, 2E], sorted by target, then by source; and where each bond stood before."""
    pairs = _read((_BOND.GetBeginAtomIdx, _BOND.GetEndAtomIdx), bonds)
    index = np.concatenate([pairs, pairs[:, ::-1]]).T
    order = np.lexsort(index)
    return np.ascontiguousarray(index[:, order]), order
