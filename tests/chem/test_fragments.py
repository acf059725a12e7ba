from __future__ import annotations

import pytest
from rdkit import Chem

from edt_former.chem import brics_fragments, functional_groups, read_molecule


@pytest.mark.parametrize(
    ("smiles", "expected"),
    [
        pytest.param("CC(=O)Oc1ccccc1C(=O)O", [0] * 3 + [1] + [2] * 6 + [3] * 3, id="aspirin"),
        pytest.param("CCO", [0, 0, 0], id="no such bond"),
        pytest.param("[Na+].[Cl-]", [0, 1], id="salt"),
        pytest.param("c1ccccc1-c1ccccc1", [0] * 6 + [1] * 6, id="biphenyl"),
        pytest.param("c1ccc(cc1)OC", [0] * 6 + [1, 1], id="anisole, one bond"),
        pytest.param("C", [0], id="one atom"),
        pytest.param("", [], id="no atom"),
    ],
)
def test_brics_groups_are_numbered_by_their_first_atom(smiles, expected):
    assert brics_fragments(Chem.MolFromSmiles(smiles)).tolist() == expected


def test_brics_of_a_molecule_stands_in_our_order():
    written = "OC(=O)c1ccccc1OC(C)=O"
    molecule = read_molecule(written)
    ours = brics_fragments(molecule).tolist()
    assert ours == [0] * 3 + [1] + [2] * 6 + [3] * 3
    callers = brics_fragments(Chem.MolFromSmiles(written))
    same = {tuple(pair) for pair in zip(ours, callers[molecule.order].tolist(), strict=True)}
    assert len(same) == 4


@pytest.mark.parametrize(
    ("smiles", "expected"),
    [
        pytest.param("CC(=O)O", {"carboxylic acid"}, id="acetic acid"),
        pytest.param("OC=O", {"carboxylic acid"}, id="formic acid"),
        pytest.param("CC(=O)[O-]", {"carboxylic acid"}, id="acetate"),
        pytest.param("CCOC(C)=O", {"ester"}, id="ethyl acetate"),
        pytest.param("O=C1CCCO1", {"ester"}, id="lactone"),
        pytest.param("CC(=O)OC(C)=O", set(), id="anhydride"),
        pytest.param("CC(=O)NC", {"amide"}, id="methylacetamide"),
        pytest.param("NC=O", {"amide"}, id="formamide"),
        pytest.param("NC(N)=O", set(), id="urea"),
        pytest.param("CN", {"amine"}, id="primary amine"),
        pytest.param("C[NH3+]", {"amine"}, id="ammonium"),
        pytest.param("CN(C)C", {"amine"}, id="tertiary amine"),
        pytest.param("Nc1ccccc1", {"amine"}, id="aniline"),
        pytest.param("c1ccncc1", set(), id="pyridine"),
        pytest.param("c1cc[nH]c1", set(), id="pyrrole"),
        pytest.param("CC(N)=NC", set(), id="amidine"),
        pytest.param("CNN", set(), id="hydrazine"),
        pytest.param("N", set(), id="ammonia"),
        pytest.param("CO", {"hydroxyl group"}, id="methanol"),
        pytest.param("Oc1ccccc1", {"hydroxyl group"}, id="phenol"),
        pytest.param("O", set(), id="water"),
        pytest.param("COC", {"ether"}, id="dimethyl ether"),
        pytest.param("c1ccoc1", set(), id="furan"),
        pytest.param("CC(C)=O", {"ketone"}, id="acetone"),
        pytest.param("CC=O", set(), id="acetaldehyde"),
        pytest.param("CS(=O)(=O)NC", {"sulfonamide"}, id="methanesulfonamide"),
        pytest.param("CS(C)(=O)=O", set(), id="sulfone"),
        pytest.param("CC#N", {"nitrile"}, id="acetonitrile"),
        pytest.param("C[N+]#[C-]", set(), id="isonitrile"),
        pytest.param("C[N+](=O)[O-]", {"nitro group"}, id="nitromethane"),
        pytest.param("CO[N+](=O)[O-]", set(), id="nitrate"),
    ],
)
def test_functional_groups(smiles, expected):
    for molecule in (Chem.MolFromSmiles(smiles), read_molecule(smiles)):
        groups = functional_groups(molecule)
        assert {name for name, present in groups.items() if present} == expected
        assert len(groups) == 10
