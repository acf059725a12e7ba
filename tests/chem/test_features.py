from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from rdkit import Chem

from edt_former.chem import (
    ATOM_FEATURE_SIZES,
    BOND_FEATURE_SIZES,
    FEATURES_ID,
    PRETRAIN_FEATURES_ID,
    read_molecule,
)
from edt_former.chem.features import atom_features, bond_features

# Columns: element - 1, chirality, degree, charge + 5, hydrogens, radicals, hybridisation (sp 0,
# sp2 1, sp3 2, other 5), aromatic, in a ring.
ATOMS = [
    pytest.param("C", [[5, 0, 4, 5, 4, 0, 2, 0, 0]], id="methane"),
    pytest.param("[CH3]", [[5, 0, 3, 5, 3, 1, 2, 0, 0]], id="methyl radical"),
    pytest.param("[NH4+]", [[6, 0, 4, 6, 4, 0, 2, 0, 0]], id="ammonium"),
    pytest.param("[Cl-]", [[16, 0, 0, 4, 0, 0, 2, 0, 0]], id="chloride"),
    pytest.param("C#N", [[5, 0, 2, 5, 1, 0, 0, 0, 0], [6, 0, 1, 5, 0, 0, 0, 0, 0]], id="HCN"),
    pytest.param("[H][H]", [[0, 0, 1, 5, 0, 0, 5, 0, 0]] * 2, id="hydrogen"),
    pytest.param("*", [[118, 0, 0, 5, 0, 0, 5, 0, 0]], id="wildcard"),
    pytest.param("c1ccccc1", [[5, 0, 3, 5, 1, 0, 1, 1, 1]] * 6, id="benzene"),
]


@pytest.mark.parametrize(("smiles", "expected"), ATOMS)
def test_atom_rows(smiles, expected):
    assert atom_features(Chem.MolFromSmiles(smiles)).tolist() == expected


def test_aromatic_heteroatoms():
    furan = read_molecule("c1ccoc1")
    oxygen = furan.atom_features[furan.elements == 8]
    assert oxygen.tolist() == [[7, 0, 2, 5, 0, 0, 1, 1, 1]]
    selenophene = read_molecule("c1cc[se]c1")
    selenium = selenophene.atom_features[selenophene.elements == 34]
    assert selenium.tolist() == [[33, 0, 2, 5, 0, 0, 1, 1, 1]]


@pytest.mark.parametrize(
    ("smiles", "column", "value"),
    [
        pytest.param("[Fe+6]", 3, 11, id="charge"),
        pytest.param("[Fe-6]", 3, 11, id="negative charge"),
        pytest.param("[Fe+5]", 3, 10, id="last charge in the table"),
        pytest.param("[UH12]", 2, 11, id="degree"),
        pytest.param("[UH12]", 4, 9, id="hydrogens"),
        pytest.param("F[P@TB1](Cl)(Br)(I)C", 1, 3, id="chirality"),
    ],
)
def test_values_outside_a_table_go_to_its_last_bin(smiles, column, value):
    features = atom_features(Chem.MolFromSmiles(smiles))
    assert value in features[:, column]
    assert (features < np.array(ATOM_FEATURE_SIZES)).all()


def test_chirality_follows_the_tags():
    tags = [atom_features(Chem.MolFromSmiles(s))[1, 1] for s in ("N[C@@H](C)O", "N[C@H](C)O")]
    assert tags == [1, 2]


@pytest.mark.parametrize(
    ("smiles", "expected"),
    [
        pytest.param("CC", [0, 0, 0], id="single"),
        pytest.param("C=C", [1, 0, 0], id="double"),
        pytest.param("C#C", [2, 0, 0], id="triple"),
        pytest.param("[Na]->[Fe]", [4, 0, 0], id="dative"),
    ],
)
def test_bond_rows(smiles, expected):
    index, features = bond_features(Chem.MolFromSmiles(smiles))
    assert index.tolist() == [[1, 0], [0, 1]]
    assert features.tolist() == [expected, expected]


@pytest.mark.parametrize(("smiles", "stereo"), [("F/C=C/F", 2), ("F/C=C\\F", 1), ("FC=CF", 0)])
def test_double_bond_stereo(smiles, stereo):
    _, features = bond_features(Chem.MolFromSmiles(smiles))
    assert features[features[:, 0] == 1, 1].tolist() == [stereo, stereo]


def test_aromatic_bonds_are_conjugated():
    _, features = bond_features(Chem.MolFromSmiles("c1ccccc1"))
    assert features.tolist() == [[3, 0, 1]] * 12


def test_bonds_come_in_both_directions_sorted_by_target_then_source():
    mol = Chem.MolFromSmiles("OC1CC(C)C1(F)Cl")
    index, features = bond_features(mol)
    pairs = [tuple(pair) for pair in index[::-1].T.tolist()]
    assert pairs == sorted(pairs)
    assert len(pairs) == 2 * mol.GetNumBonds()
    for source, target in index.T.tolist():
        assert mol.GetBondBetweenAtoms(source, target) is not None
    assert (features < np.array(BOND_FEATURE_SIZES)).all()


def test_no_bonds_and_no_atoms_keep_shapes_and_types():
    for mol, atoms in ((Chem.MolFromSmiles("[He]"), 1), (Chem.Mol(), 0)):
        index, features = bond_features(mol)
        assert atom_features(mol).shape == (atoms, 9)
        assert (index.shape, features.shape) == ((2, 0), (0, 3))
        assert {atom_features(mol).dtype, index.dtype, features.dtype} == {np.dtype(np.int64)}


def test_the_scheme_has_a_name():
    assert FEATURES_ID == "ogb-9-3"
    assert (sum(ATOM_FEATURE_SIZES), sum(BOND_FEATURE_SIZES)) == (173, 13)


class TestPretrainFeatures:
    """The two features per atom and bond of pretrain-gnns."""

    @staticmethod
    def bonds(smiles: str) -> dict[tuple[int, int], list[int]]:
        molecule = read_molecule(smiles)
        _, features = molecule.features(PRETRAIN_FEATURES_ID)
        return dict(zip(map(tuple, molecule.bond_index.T.tolist()), features.tolist(), strict=True))

    @pytest.mark.parametrize(
        ("smiles", "expected"),
        [
            pytest.param("CO", [[5, 0], [7, 0]], id="no tag"),
            pytest.param("C[C@@H](N)O", [[5, 0], [5, 1], [6, 0], [7, 0]], id="clockwise"),
            pytest.param("C[C@H](N)O", [[5, 0], [5, 2], [6, 0], [7, 0]], id="counterclockwise"),
            pytest.param("*", [[118, 0]], id="wildcard"),
            pytest.param("[Og]", [[117, 0]], id="last element"),
        ],
    )
    def test_atoms(self, smiles, expected):
        atoms, _ = read_molecule(smiles).features(PRETRAIN_FEATURES_ID)
        assert sorted(atoms.tolist()) == sorted(expected)

    def test_a_tag_without_a_row_reads_as_none(self):
        atoms, _ = read_molecule("F[P@TB1](Cl)(Br)(I)C").features(PRETRAIN_FEATURES_ID)
        assert not atoms[:, 1].any()

    @pytest.mark.parametrize(
        ("smiles", "kind"),
        [("CC", 0), ("C=C", 1), ("C#C", 2), ("N->[Pt]", 0)],
        ids=["single", "double", "triple", "dative"],
    )
    def test_types(self, smiles, kind):
        assert self.bonds(smiles) == {(0, 1): [kind, 0], (1, 0): [kind, 0]}

    def test_aromatic_bonds(self):
        assert set(map(tuple, self.bonds("c1ccccc1").values())) == {(3, 0)}

    def test_directions_are_those_of_the_canonical_smiles(self):
        assert read_molecule("C(\\C)=C\\C").smiles == "C/C=C\\C"
        bonds = self.bonds("C(\\C)=C\\C")
        assert (bonds[0, 1], bonds[1, 2], bonds[2, 3]) == ([0, 1], [1, 0], [0, 2])
        assert all(bonds[i, j] == bonds[j, i] for i, j in bonds)

    def test_graph_data_without_smiles_has_no_directions(self):
        plain = dataclasses.replace(read_molecule("CC=O"), smiles="")
        expected = read_molecule("CC=O").features(PRETRAIN_FEATURES_ID)
        for found, wanted in zip(plain.features(PRETRAIN_FEATURES_ID), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
        sided = dataclasses.replace(read_molecule("C/C=C/C"), smiles="")
        with pytest.raises(ValueError, match="double bond with a side need a molecule's SMILES"):
            sided.features(PRETRAIN_FEATURES_ID)

    def test_atoms_without_bonds(self):
        atoms, bonds = read_molecule("[Na+]").features(PRETRAIN_FEATURES_ID)
        assert atoms.tolist() == [[10, 0]] and bonds.shape == (0, 2)

    def test_schemes(self):
        molecule = read_molecule("CO")
        assert molecule.features(FEATURES_ID) == (molecule.atom_features, molecule.bond_features)
        with pytest.raises(
            ValueError, match="scheme must be 'ogb-9-3' or 'pretrain-gnns-2-2', got"
        ):
            molecule.features("ecfp")
