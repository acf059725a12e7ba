"""Fragments a chemist would name: BRICS groups and functional groups."""

from __future__ import annotations

import numpy as np
from rdkit import Chem
from rdkit.Chem import BRICS

from edt_former.chem.molecule import Molecule, rdkit_mol

FUNCTIONAL_GROUPS = {
    # Acids count with their anions; carbonic and carbamic acids are left out.
    "carboxylic acid": "[CX3;H1,$(C[#6])](=[OX1])[OX2H1,OX1-]",
    "ester": "[CX3;H1,$(C[#6])](=[OX1])[OX2H0][#6;!$([#6]=[O,N,S])]",
    "amide": "[CX3;H1,$(C[#6])](=[OX1])[#7X3]",
    # Alkyl and aryl amines, free or protonated; no amides, amidines, enamides or N-N, N-O, N-S.
    "amine": "[NX3,NX4+;!$(N~[!#6;!#1]);!$(N-C=[O,N,S]);!$(N-C#N);!$(N=*)][#6]",
    "hydroxyl group": "[OX2H1][#6;!$(C=[!#6])]",
    "ether": "[OX2H0]([#6;!$(C=[O,N,S])])[#6;!$(C=[O,N,S])]",
    "ketone": "[#6][CX3](=[OX1])[#6]",
    "sulfonamide": "[#6][SX4](=[OX1])(=[OX1])[#7]",
    "nitrile": "[NX1]#[CX2]",
    "nitro group": "[!#8][$([NX3](=O)=O),$([NX3+](=O)[O-])]",
}
"""SMARTS by name. A carbonyl inside an aromatic ring belongs to the ring, not to a group."""

_QUERIES = {name: Chem.MolFromSmarts(smarts) for name, smarts in FUNCTIONAL_GROUPS.items()}


def brics_fragments(molecule: Chem.Mol | Molecule) -> np.ndarray:
    """Group id of each atom, int64 [n], after the bonds of BRICS are cut.

    The rules are those of doi:10.1002/cmdc.200800178 as RDKit implements them. Groups are
    numbered by their first atom; a molecule without such a bond falls into its connected
    components. Atoms stand in the order of the argument.

    >>> brics_fragments(Chem.MolFromSmiles("CC(=O)Oc1ccccc1C(=O)O")).tolist()
    [0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3]
    """
    mol = _as_mol(molecule)
    cut = Chem.RWMol(mol)
    for (begin, end), _ in BRICS.FindBRICSBonds(mol):
        cut.RemoveBond(begin, end)
    ids = np.zeros(mol.GetNumAtoms(), dtype=np.int64)
    for group, atoms in enumerate(Chem.GetMolFrags(cut)):
        ids[list(atoms)] = group
    return ids


def functional_groups(molecule: Chem.Mol | Molecule) -> dict[str, bool]:
    """Which of the `FUNCTIONAL_GROUPS` the molecule holds.

    >>> groups = functional_groups(Chem.MolFromSmiles("CC(=O)Nc1ccc(O)cc1"))
    >>> [name for name, present in groups.items() if present]
    ['amide', 'hydroxyl group']
    """
    mol = _as_mol(molecule)
    return {name: mol.HasSubstructMatch(query) for name, query in _QUERIES.items()}


def _as_mol(molecule: Chem.Mol | Molecule) -> Chem.Mol:
    return rdkit_mol(molecule) if isinstance(molecule, Molecule) else molecule
