"""Components of patches against RDKit's fragments of the molecule with the other bonds cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rdkit import Chem

from edt_former.chem import rdkit_mol, read_molecules
from edt_former.graph import GraphBatch
from edt_former.tokens import connected_patches, split_components

SMILES = ["CC(=O)Oc1ccccc1C(=O)O", "[Na+].[Cl-]", "C", "C1CC1C2CCC(CC2)OCC(N)C(=O)O", "CCOCC.O"]


def fragments(molecule, ids) -> list[int]:
    """The first atom of every atom's piece."""
    cut = Chem.RWMol(rdkit_mol(molecule))
    for bond in rdkit_mol(molecule).GetBonds():
        ends = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        if ids[ends[0]] != ids[ends[1]]:
            cut.RemoveBond(*ends)
    first = [0] * len(ids)
    for piece in Chem.GetMolFrags(cut):
        for atom in piece:
            first[atom] = min(piece)
    return first


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_components(seed):
    molecules = read_molecules(SMILES)
    graph = GraphBatch.pack(molecules)
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, (m.num_atoms,), generator=generator) for m in molecules]
    apart = torch.cat([3 * i + x for i, x in enumerate(ids)])
    found = split_components(apart, graph.bond_index)
    expected, starts = [], graph.offsets.tolist()
    for molecule, own, start in zip(molecules, ids, starts[:-1], strict=True):
        expected += [start + atom for atom in fragments(molecule, own.tolist())]
    assert found.tolist() == expected
    pieces = {
        patch: {first for first, own in zip(expected, apart.tolist(), strict=True) if own == patch}
        for patch in apart.unique().tolist()
    }
    connected = connected_patches(apart, graph.bond_index)
    assert connected.tolist() == [len(firsts) == 1 for firsts in pieces.values()]


@pytest.mark.parametrize("atoms", [0, 1, 400])
def test_long_chains(atoms):
    chain = torch.arange(max(atoms - 1, 0))
    bonds = torch.stack([torch.cat([chain, chain + 1]), torch.cat([chain + 1, chain])])
    assert split_components(torch.zeros(atoms, dtype=torch.long), bonds).tolist() == [0] * atoms
    assert connected_patches(torch.zeros(atoms, dtype=torch.long), bonds).tolist() == [True] * min(
        atoms, 1
    )
