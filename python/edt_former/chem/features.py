"""The integer atom and bond features of the Open Graph Benchmark (arXiv:2005.00687)."""

from __future__ import annotations

import numpy as np
from rdkit import Chem
from rdkit.Chem import BondStereo, BondType, ChiralType, HybridizationType

FEATURES_ID = "ogb-9-3"
"""Names this scheme in a config: an encoder trained on another must not read these numbers."""

ATOM_FEATURE_SIZES = (119, 4, 12, 12, 10, 6, 6, 2, 2)
"""Element, chirality, degree, charge, hydrogens, radicals, hybridisation, aromatic, in a ring."""

BOND_FEATURE_SIZES = (5, 6, 2)
"""Type, stereo, conjugated."""

_CHIRALITY = {
    ChiralType.CHI_UNSPECIFIED: 0,
    ChiralType.CHI_TETRAHEDRAL_CW: 1,
    ChiralType.CHI_TETRAHEDRAL_CCW: 2,
}
_HYBRIDISATION = {
    HybridizationType.SP: 0,
    HybridizationType.SP2: 1,
    HybridizationType.SP3: 2,
    HybridizationType.SP3D: 3,
    HybridizationType.SP3D2: 4,
}
_BOND_TYPE = {
    BondType.SINGLE: 0,
    BondType.DOUBLE: 1,
    BondType.TRIPLE: 2,
    BondType.AROMATIC: 3,
}
_BOND_STEREO = {
    BondStereo.STEREONONE: 0,
    BondStereo.STEREOZ: 1,
    BondStereo.STEREOE: 2,
    BondStereo.STEREOCIS: 3,
    BondStereo.STEREOTRANS: 4,
}
_LAST = tuple(size - 1 for size in ATOM_FEATURE_SIZES)
_LAST_TYPE, _LAST_STEREO, _ = (size - 1 for size in BOND_FEATURE_SIZES)


def _atom_row(atom: Chem.Atom) -> tuple[int, ...]:
    element, charge = atom.GetAtomicNum(), atom.GetFormalCharge()
    return (
        element - 1 if 1 <= element < ATOM_FEATURE_SIZES[0] else _LAST[0],
        _CHIRALITY.get(atom.GetChiralTag(), _LAST[1]),
        min(atom.GetTotalDegree(), _LAST[2]),
        charge + 5 if -5 <= charge <= 5 else _LAST[3],
        min(atom.GetTotalNumHs(), _LAST[4]),
        min(atom.GetNumRadicalElectrons(), _LAST[5]),
        _HYBRIDISATION.get(atom.GetHybridization(), _LAST[6]),
        int(atom.GetIsAromatic()),
        int(atom.IsInRing()),
    )


def atom_features(mol: Chem.Mol) -> np.ndarray:
    """Nine integers per atom, int64 [n, 9], each below its entry of `ATOM_FEATURE_SIZES`.

    A value outside a table goes to the last bin of its column. The chirality column has the four
    classes of the published checkpoints, the last being every tag that is not tetrahedral.

    >>> atom_features(Chem.MolFromSmiles("O")).tolist()
    [[7, 0, 2, 5, 2, 0, 2, 0, 0]]
    """
    rows = [_atom_row(atom) for atom in mol.GetAtoms()]
    return np.array(rows, dtype=np.int64).reshape(-1, len(ATOM_FEATURE_SIZES))


def bond_features(mol: Chem.Mol) -> tuple[np.ndarray, np.ndarray]:
    """The bonds in both directions: int64 [2, 2E] (source, target) and their features [2E, 3].

    Sorted by target, then by source. An atom alone gives arrays of shape [2, 0] and [0, 3].

    >>> index, features = bond_features(Chem.MolFromSmiles("CC=O"))
    >>> index.tolist(), features.tolist()
    ([[1, 0, 2, 1], [0, 1, 1, 2]], [[0, 0, 0], [0, 0, 0], [1, 0, 0], [1, 0, 0]])
    """
    rows = [
        (
            bond.GetBeginAtomIdx(),
            bond.GetEndAtomIdx(),
            _BOND_TYPE.get(bond.GetBondType(), _LAST_TYPE),
            _BOND_STEREO.get(bond.GetStereo(), _LAST_STEREO),
            int(bond.GetIsConjugated()),
        )
        for bond in mol.GetBonds()
    ]
    bonds = np.array(rows, dtype=np.int64).reshape(-1, 2 + len(BOND_FEATURE_SIZES))
    index = np.concatenate([bonds[:, :2], bonds[:, 1::-1]]).T
    order = np.lexsort(index)
    return np.ascontiguousarray(index[:, order]), np.concatenate([bonds[:, 2:]] * 2)[order]
