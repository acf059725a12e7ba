from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from rdkit import Chem
from rdkit.Chem.rdMolDescriptors import CalcMolFormula, CalcNumRings

from edt_former.tasks.heldout import HeldOut, heldout_molecules

FORMULAS = Path(__file__).with_name("heldout_formulas.tsv")


@pytest.fixture(scope="module")
def molecules():
    return heldout_molecules()


@pytest.fixture(scope="module")
def held_out():
    return HeldOut()


def test_the_list_is_long_and_names_are_distinct(molecules):
    assert len(molecules) >= 300
    assert len({name for name, _ in molecules}) == len(molecules)


def test_every_smiles_parses_to_five_to_eighty_heavy_atoms(molecules):
    sizes = {name: Chem.MolFromSmiles(smiles).GetNumHeavyAtoms() for name, smiles in molecules}
    assert {name: size for name, size in sizes.items() if not 5 <= size <= 80} == {}


def test_formulas_agree_with_the_independent_table(molecules):
    lines = FORMULAS.read_text(encoding="utf-8").splitlines()[1:]
    expected = dict(line.split("\t") for line in lines)
    assert {name: CalcMolFormula(Chem.MolFromSmiles(smiles)) for name, smiles in molecules} == (
        expected
    )


def test_skeletons_are_distinct_and_each_entry_excludes_itself(molecules, held_out):
    assert len(held_out.blocks) == len(molecules)
    assert [held_out.excludes(smiles) for _, smiles in molecules] == [
        f"is {name}" for name, _ in molecules
    ]


def test_random_spelling_does_not_matter(molecules, held_out):
    for seed, (name, smiles) in enumerate(molecules[::7]):
        spelling = Chem.MolToRandomSmilesVect(Chem.MolFromSmiles(smiles), 1, randomSeed=seed)[0]
        assert held_out.excludes(spelling) == f"is {name}"


@pytest.mark.parametrize(
    ("smiles", "reason"),
    [
        pytest.param("OC(=O)C1=C(OC(C)=O)C=CC=C1", "is Aspirin", id="kekule"),
        pytest.param("[Na+].CC(=O)Oc1ccccc1C([O-])=O", "is Aspirin", id="salt"),
        pytest.param("[2H]C([2H])([2H])C(=O)Oc1ccccc1C(=O)O", "is Aspirin", id="deuterated"),
        pytest.param("Cl.CN(C)C(=N)NC(N)=N", "is Metformin", id="hydrochloride"),
        pytest.param("CN(C)C(N)=NC(=N)N", "is Metformin", id="tautomer"),
        pytest.param("[Cl-].CC(=O)OCC[N+](C)(C)C", "is Acetylcholine", id="quaternary"),
        pytest.param("CCCC(CCC)C(=O)O", "is Sodium valproate", id="acid-of-a-listed-salt"),
        pytest.param("CC1CCC(C(C)C)C(O)C1", "is Menthol", id="no-stereochemistry"),
        pytest.param("CC[NH+]1CCC[C@@H]1c1cccnc1", "shares the scaffold of Nicotine", id="ion"),
        pytest.param(
            "CCOc1ccc2CC3N(C)CCC45C3C=CC(OC)C4Oc1c25",
            "shares the scaffold of Morphine",
            id="morphine-scaffold",
        ),
    ],
)
def test_excluded(held_out, smiles, reason):
    assert held_out.excludes(smiles) == reason
    assert held_out.excludes(Chem.AddHs(Chem.MolFromSmiles(smiles))) == reason


@pytest.mark.parametrize(
    "smiles",
    [
        pytest.param("", id="empty"),
        pytest.param("[Na+].[Cl-]", id="inorganic"),
        pytest.param("CCCCCCCC(C)Cl", id="acyclic"),
        pytest.param("CCc1cccc(CBr)c1", id="one-ring-as-in-aspirin"),
        pytest.param("O=C(NC1CC2CC2C1)c1ncc(-c2ccsc2)o1", id="other-scaffold"),
    ],
)
def test_passed(held_out, smiles):
    assert held_out.excludes(smiles) is None


def test_scaffolds_have_two_rings_and_are_their_own_scaffold(held_out):
    scaffolds = held_out.scaffolds
    assert all(CalcNumRings(Chem.MolFromSmiles(each)) >= 2 for each in scaffolds)
    assert HeldOut((each, each) for each in scaffolds).scaffolds.keys() == scaffolds.keys()


def test_a_copy_in_another_process_agrees(held_out):
    copy = pickle.loads(pickle.dumps(held_out))
    assert copy.excludes("CC(=O)Oc1ccccc1C([O-])=O") == "is Aspirin"
    assert copy.excludes("CCCCCCCC(C)Cl") is None


def test_unreadable_input_is_named(held_out):
    with pytest.raises(ValueError, match=r"molecule must be a SMILES .* got 'C1CC'"):
        held_out.excludes("C1CC")
    with pytest.raises(TypeError, match="got int"):
        held_out.excludes(7)
