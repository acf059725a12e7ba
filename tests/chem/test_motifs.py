"""Motifs: the recorded published numbers, groups told atom by atom, and what must not matter."""

from __future__ import annotations

import json
import os
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rdkit import Chem

from edt_former.chem import MOTIF_WIDTH, Molecule, read_as_written, read_molecule
from edt_former.chem.motifs import find_motifs, motif_features
from edt_former.graph import batch

ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"
GROUPS = [
    pytest.param("C", [], id="methane"),
    pytest.param("[13CH4]", [], id="isotope-of-methane"),
    pytest.param("CC", [[0, 1]], id="ethane"),
    pytest.param("O", [[0]], id="water"),
    pytest.param("[Na+].[Cl-]", [[0], [1]], id="ions"),
    pytest.param("[NH3]->[Cu+2]", [[0, 1]], id="dative"),
    pytest.param("C1CC1", [[0, 1, 2]], id="ring-alone"),
    pytest.param("CC=CC", [[0, 1, 2, 3]], id="double-bond"),
    pytest.param("CC#CC", [[0, 1, 2, 3]], id="triple-bond"),
    pytest.param("COCOC", [[0, 1, 2, 3, 4]], id="acetal"),
    pytest.param("CCCOC", [[2, 3, 4], [0, 1], [1, 2]], id="ether"),
    pytest.param("COCCOC", [[0, 1, 2], [3, 4, 5], [2, 3]], id="two-ethers"),
    pytest.param("c1ccncc1", [[0, 1, 2, 3, 4, 5]], id="atom-in-a-ring-is-no-group"),
    pytest.param("Cn1cccc1", [[0, 1], [1, 2, 3, 4, 5]], id="atom-of-a-ring-with-a-neighbour"),
    pytest.param("C1CC2CCC1C2", [[0, 1, 2, 3, 4, 5, 6]], id="bridged-rings-are-one"),
    pytest.param("C1CC2CC1CC2", [[0, 1, 2, 3, 4, 5, 6]], id="bridged-again"),
    pytest.param(
        "c1ccc2ccccc2c1", [[0, 1, 2, 3, 8, 9], [3, 4, 5, 6, 7, 8]], id="fused-rings-are-two"
    ),
    pytest.param("C1CCC2(C1)CC2", [[0, 1, 2, 3, 4], [3, 5, 6]], id="spiro"),
    pytest.param(ASPIRIN, [[0, 1, 2, 3, 4], [9, 10, 11, 12], [4, 5, 6, 7, 8, 9]], id="aspirin"),
]


def groups(molecule: Molecule) -> list[list[int]]:
    atoms, offsets, _ = find_motifs([molecule])
    return [atoms[start:stop].tolist() for start, stop in pairwise(offsets)]


@pytest.mark.parametrize(("smiles", "expected"), GROUPS)
def test_groups(smiles, expected):
    assert sorted(groups(read_as_written(smiles))) == sorted(expected)


def bits(molecule: Molecule) -> list[list[int]]:
    (features,) = motif_features([molecule])
    return sorted(np.flatnonzero(row).tolist() for row in features)


def test_features_count_what_a_motif_is_made_of():
    (row,) = motif_features([read_as_written("CC(=O)N(C)C")])[0]
    # Four C, one O, one N, no P, no S; four single bonds, one double, no triple, none aromatic.
    expected = [4, 11 + 1, 17 + 1, 23, 29, 37 + 4, 48 + 1, 56, 64]
    assert np.flatnonzero(row).tolist() == expected


def test_halogens_other_elements_aromatic_bonds_and_rings_have_their_places():
    assert bits(read_as_written("CCl")) == [[1, 11, 17, 23, 29, 35, 38, 48, 56, 64]]
    assert bits(read_as_written("C[SiH3]")) == [[1, 11, 17, 23, 29, 36, 38, 48, 56, 64]]
    assert bits(read_as_written("c1ccccc1")) == [[6, 11, 17, 23, 29, 37, 48, 56, 70, 72]]


def test_counts_beyond_the_last_bin_share_it():
    (row,) = motif_features([read_as_written("C=C" * 9)])[0]
    carbons, singles, doubles = row[:11], row[37:48], row[48:56]
    assert [x.argmax() for x in (carbons, singles, doubles)] == [10, 8, 7]
    assert row.sum() == 9


def recorded_motifs() -> list[dict]:
    if "EDT_SHARED" not in os.environ:
        pytest.skip("EDT_SHARED (folder of the recorded published numbers) is not set")
    file = Path(os.environ["EDT_SHARED"], "oracles", "llamo_motifs.json")
    return json.loads(file.read_text())["molecules"]


def test_equal_the_published_bits_of_every_molecule_llamo_motifs():
    compared = 0
    for entry in recorded_motifs():
        molecule = read_as_written(entry["smiles"])
        if isinstance(molecule, Molecule) and entry["bits"] is not None:
            assert bits(molecule) == sorted(entry["bits"]), entry["name"]
            compared += 1
    assert compared == 60


def test_molecules_that_the_published_program_cannot_read_llamo_motifs():
    failed = {e["name"]: e["smiles"] for e in recorded_motifs() if e["bits"] is None}
    read = {name: read_as_written(smiles) for name, smiles in failed.items()}
    counts = {n: len(motif_features([m])[0]) for n, m in read.items() if isinstance(m, Molecule)}
    assert counts == {"methane": 0, "carbon13": 0, "dative": 1}


def shuffled(molecule: Molecule, seed: int) -> Molecule:
    """The same molecule with its atoms, so its bonds too, in another order."""
    mol = Chem.MolFromSmiles(molecule.smiles)
    order = list(range(mol.GetNumAtoms()))
    random.Random(seed).shuffle(order)
    written = Chem.MolToSmiles(Chem.RenumberAtoms(mol, order), canonical=False)
    return read_as_written(written)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(
        [
            ASPIRIN,
            "CC(C)(OC1CC1)OC(=O)N=NC(=O)OC(C)C",
            "OC(OC)C(O)(S)C=CC(=O)NCCOP(=O)(O)OCC1OC(n2cnc3c2ncnc3N)C(O)C1O",
            "C12C3C4C1C5C2C3C45",
            "C1C2CC3CC1CC(C2)C3",
            "CC(=O)[O-].[Na+].O",
        ]
    ),
    st.integers(0, 10**6),
)
def test_the_order_of_atoms_and_bonds_does_not_matter(smiles, seed):
    molecule = read_molecule(smiles)
    assert bits(shuffled(molecule, seed)) == bits(molecule)


def test_a_batch_is_its_molecules_one_by_one():
    smiles = ["C", ASPIRIN, "[Na+].[Cl-]", "C", "c1ccc2ccccc2c1", "CCO"]
    molecules = [read_molecule(s) for s in smiles]
    together = motif_features(molecules)
    assert [f.shape[1] for f in together] == [MOTIF_WIDTH] * 6
    for features, molecule in zip(together, molecules, strict=True):
        np.testing.assert_array_equal(features, motif_features([molecule])[0])
    assert motif_features([]) == []


def test_graph_data_without_a_smiles_has_motifs_too():
    molecule = read_molecule(ASPIRIN)
    bare = Molecule("", *(getattr(molecule, n) for n in list(molecule.__dataclass_fields__)[1:]))
    assert bits(bare) == bits(molecule)


def test_graphs_know_the_width():
    assert batch.MOTIF_WIDTH == MOTIF_WIDTH == 73
