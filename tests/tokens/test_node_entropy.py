"""Entropy of the surroundings against a walk in plain Python."""

from collections import Counter
from math import log

import pytest
import torch
from rdkit import Chem

from edt_former.chem import rdkit_mol, read_molecules
from edt_former.graph import GraphBatch
from edt_former.tokens import node_entropies

SMILES = ["CC(=O)Oc1ccccc1C(=O)O", "C", "[Na+].[Cl-]", "FC(F)(F)c1ccc2[nH]ncc2c1", "C1CC1"]


def walked(mol, radius):
    distance = Chem.GetDistanceMatrix(mol)
    for atom in mol.GetAtoms():
        near = [i for i, d in enumerate(distance[atom.GetIdx()]) if d <= radius]
        counts = Counter(mol.GetAtomWithIdx(i).GetAtomicNum() for i in near)
        yield -sum(c / len(near) * log(c / len(near)) for c in counts.values())


@pytest.mark.parametrize("radius", [0, 1, 2, 3])
def test_entropies(radius):
    molecules = read_molecules(SMILES)
    graph = GraphBatch.pack(molecules)
    found = node_entropies(graph.elements, graph.bond_index, radius=radius)
    expected = [h for molecule in molecules for h in walked(rdkit_mol(molecule), radius)]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)


def test_no_atoms():
    nothing = torch.zeros(0, dtype=torch.long)
    assert node_entropies(nothing, torch.zeros(2, 0, dtype=torch.long)).shape == (0,)
