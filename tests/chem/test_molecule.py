from __future__ import annotations

import builtins
import gzip
import logging

import numpy as np
import pytest
from rdkit import Chem, rdBase

from edt_former.chem import (
    Invalid,
    Molecule,
    rdkit_mol,
    read_file,
    read_molecule,
    read_molecules,
    read_selfies,
)
from edt_former.chem.rdkit_log import parse_error, quiet

ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"
# Stereocentres, both double-bond labels, charges, fused aromatic rings, a salt.
DRUGLIKE = [
    ASPIRIN,
    "C[C@H](N)C(=O)N1CCC[C@H]1C(=O)O",
    "CC/C(=C(/c1ccccc1)c1ccc(OCCN(C)C)cc1)c1ccccc1",
    "CN1C(=O)N(C)c2[nH]cnc2C1=O",
    "C[N+](C)(C)CC(=O)[O-]",
    "[Na+].[O-]C(=O)c1ccccc1",
    "OC[C@H]1O[C@@H](O)[C@H](O)[C@@H](O)[C@@H]1O",
]


def arrays(molecule: Molecule) -> tuple[np.ndarray, ...]:
    return molecule.atom_features, molecule.bond_index, molecule.bond_features


@pytest.mark.parametrize(
    ("smiles", "canonical", "elements"),
    [
        pytest.param("C", "C", [6], id="methane"),
        pytest.param(" OCC\n", "CCO", [6, 6, 8], id="white space around"),
        pytest.param("[Na+].[Cl-]", "[Cl-].[Na+]", [17, 11], id="salt"),
        pytest.param("[2H]C", "[2H]C", [1, 6], id="deuterium is an atom"),
        pytest.param("[H][C]([H])[H]", "[CH3]", [6], id="hydrogens fold"),
        pytest.param("[H][H]", "[H][H]", [1, 1], id="molecular hydrogen"),
        pytest.param("[H-].[Na+]", "[H-].[Na+]", [1, 11], id="hydride"),
        pytest.param("[Fe]", "[Fe]", [26], id="metal"),
        pytest.param("c1ccoc1", "c1ccoc1", [6, 6, 6, 8, 6], id="furan"),
        pytest.param("c1cc[se]c1", "c1cc[se]c1", [6, 6, 6, 34, 6], id="selenophene"),
        pytest.param("*C", "*C", [0, 6], id="wildcard"),
        pytest.param("[CH3:7][OH:1]", "CO", [6, 8], id="atom maps go"),
        pytest.param("CCO |$a;b;c$|", "CCO", [6, 6, 8], id="extended SMILES"),
    ],
)
def test_reads(smiles, canonical, elements):
    molecule = read_molecule(smiles)
    assert molecule.smiles == canonical
    assert molecule.elements.tolist() == elements
    assert molecule.num_atoms == len(elements)
    assert molecule.atom_features.shape == (len(elements), 9)


@pytest.mark.parametrize("smiles", DRUGLIKE)
def test_order_of_writing_does_not_matter(smiles):
    expected = read_molecule(smiles)
    mol = Chem.MolFromSmiles(smiles)
    for seed in range(5):
        shuffled = np.random.default_rng(seed).permutation(mol.GetNumAtoms()).tolist()
        written = Chem.MolToSmiles(Chem.RenumberAtoms(mol, shuffled), canonical=False)
        molecule = read_molecule(written)
        assert molecule.smiles == expected.smiles
        for ours, theirs in zip(arrays(molecule), arrays(expected), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert_order_maps_back(molecule, Chem.MolFromSmiles(written))


def assert_order_maps_back(molecule: Molecule, caller: Chem.Mol) -> None:
    """Every atom and bond of `molecule` is the caller's one that `order` points to."""
    heavy = [atom.GetIdx() for atom in caller.GetAtoms() if atom.GetAtomicNum() > 1]
    assert sorted(molecule.order.tolist()) == heavy
    order = molecule.order.tolist()
    elements = [caller.GetAtomWithIdx(i).GetAtomicNum() for i in order]
    assert elements == molecule.elements.tolist()
    bonds = {(order[source], order[target]) for source, target in molecule.bond_index.T.tolist()}
    ends = [(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in caller.GetBonds()]
    ends = [pair for pair in ends if set(pair) <= set(heavy)]
    assert bonds == {*ends, *(pair[::-1] for pair in ends)}


@pytest.mark.parametrize("smiles", DRUGLIKE)
def test_mol_with_hydrogens_keeps_the_callers_indices(smiles):
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    shuffled = np.random.default_rng(0).permutation(mol.GetNumAtoms()).tolist()
    mol = Chem.RenumberAtoms(mol, shuffled)
    binary = mol.ToBinary()
    molecule = read_molecule(mol)
    assert molecule.smiles == read_molecule(smiles).smiles
    assert_order_maps_back(molecule, mol)
    assert mol.ToBinary() == binary


def test_hydrogen_that_marks_nothing_is_folded():
    molecule = read_molecule("[H]/N=C(C)C")
    assert molecule.smiles == "CC(C)=N"
    assert molecule.elements.tolist() == [6, 6, 6, 7]
    caller = Chem.MolFromSmiles("[H]/N=C(C)C")
    symbols = [caller.GetAtomWithIdx(i).GetSymbol() for i in molecule.order.tolist()]
    assert symbols == ["C", "C", "C", "N"]


def test_rdkit_mol_has_our_order():
    for smiles in DRUGLIKE:
        molecule = read_molecule(smiles)
        mol = rdkit_mol(molecule)
        assert [a.GetAtomicNum() for a in mol.GetAtoms()] == molecule.elements.tolist()
        for source, target in molecule.bond_index.T.tolist():
            assert mol.GetBondBetweenAtoms(source, target) is not None


def test_a_thousand_atoms():
    molecule = read_molecule("C" * 999 + "O")
    assert molecule.num_atoms == 1000
    assert molecule.bond_index.shape == (2, 1998)
    assert molecule.elements[molecule.order.argmax()] == 8


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        pytest.param("", "empty SMILES", id="empty"),
        pytest.param(" \t\n", "empty SMILES", id="blank"),
        pytest.param("C1CC", "unclosed ring", id="ring"),
        pytest.param("CC(", "syntax error at position 3", id="syntax"),
        pytest.param("CC)C", "extra close parentheses at position 3", id="parenthesis"),
        pytest.param(
            "CC(C)(C)(C)C",
            "Explicit valence for atom # 1 C, 5, is greater than permitted",
            id="valence",
        ),
        pytest.param(
            "c1cccc1", "Can't kekulize mol. Unkekulized atoms: 0 1 2 3 4", id="aromaticity"
        ),
        pytest.param("CCO ethanol", "white space inside the SMILES", id="name"),
        pytest.param("C\nC", "white space inside the SMILES", id="two lines"),
        pytest.param("CÖ", "a SMILES holds ASCII characters only", id="not ascii"),
        pytest.param(None, "must be a SMILES string or an RDKit Mol, got NoneType", id="None"),
        pytest.param(3.5, "must be a SMILES string or an RDKit Mol, got float", id="number"),
    ],
)
def test_invalid_says_why(source, reason):
    invalid = read_molecule(source)
    expected = source if isinstance(source, str) else repr(source)
    assert invalid == Invalid(expected, reason)


def test_invalid_mol_says_why():
    mol = Chem.MolFromSmiles("CC(C)(C)(C)C", sanitize=False)
    invalid = read_molecule(mol)
    assert invalid.reason == "Explicit valence for atom # 1 C, 5, is greater than permitted"
    assert invalid.source == "CC(C)(C)(C)C"


def test_max_atoms():
    assert read_molecule("CCC", max_atoms=3).num_atoms == 3
    assert read_molecule("CCCC", max_atoms=3).reason == "4 atoms, more than max_atoms=3"


def test_terminal_stays_quiet_and_logging_as_it_was(capfd):
    handlers = list(logging.getLogger("rdkit").handlers)
    for source in ("C1CC", "CC(C)(C)(C)C", "[H-]"):
        read_molecule(source)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert logging.getLogger("rdkit").handlers == handlers
    Chem.MolFromSmiles("C1CC")
    assert "unclosed ring" in capfd.readouterr().err


def test_it_stays_quiet_after_a_reason_was_found(capfd):
    with quiet():
        for source in ("C1CC", "CC(C)(C)(C)C"):
            assert parse_error(source)
            Chem.MolFromSmiles(source)
    assert capfd.readouterr().err == ""
    Chem.MolFromSmiles("C1CC")
    assert "unclosed ring" in capfd.readouterr().err


def test_a_log_that_was_off_stays_off():
    rdBase.DisableLog("rdApp.error")
    try:
        before = rdBase.LogStatus()
        read_molecule("C1CC")
        assert rdBase.LogStatus() == before
    finally:
        rdBase.EnableLog("rdApp.error")


def test_read_molecules_keeps_the_order(capsys):
    items = read_molecules(["CCO", "C1CC", "", "N"], progress=True)
    assert [getattr(item, "smiles", None) for item in items] == ["CCO", None, None, "N"]
    assert "4/4" in capsys.readouterr().err
    assert read_molecules([]) == []


def test_selfies():
    pytest.importorskip("selfies")
    assert read_selfies("[C][C][O]").smiles == "CCO"
    assert isinstance(read_selfies("[C][nonsense]"), Invalid)


def test_selfies_names_the_missing_package(monkeypatch):
    real = builtins.__import__

    def without_selfies(name, *args):
        if name == "selfies":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_selfies)
    with pytest.raises(ImportError, match="pip install selfies"):
        read_selfies("[C]")


def test_smi_file(tmp_path):
    path = tmp_path / "set.smi"
    path.write_text("Smiles\tTitle\nCCO ethanol of wine\n\nC1CC\tbroken\n  N  \nF/C=C\\\\F z\n")
    assert list(read_file(path)) == [
        ("ethanol of wine", "CCO"),
        ("broken", "C1CC"),
        ("", "N"),
        ("z", "F/C=C\\F"),
    ]


@pytest.mark.parametrize("name", ["set.csv", "set.csv.gz"])
def test_csv_file(tmp_path, name):
    text = '\ufeffName,y,SMILES\n"a, b",1,CCO\n\nshort\n,2,F/C=C\\\\F\n'
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert list(read_file(str(path))) == [("a, b", "CCO"), ("short", ""), ("", "F/C=C\\F")]


def test_csv_file_of_semicolons(tmp_path):
    path = tmp_path / "set.csv"
    path.write_text("name;y;SMILES\na;1,5;CCO\n")
    assert list(read_file(path)) == [("a", "CCO")]


def test_tsv_file_without_names(tmp_path):
    path = tmp_path / "set.tsv"
    path.write_text("label\tCanonical_SMILES\n1\tCCO\n0\tnonsense\n")
    rows = list(read_file(path))
    assert rows == [("", "CCO"), ("", "nonsense")]
    read = read_molecules(smiles for _, smiles in rows)
    assert [type(item) for item in read] == [Molecule, Invalid]


def test_quotes_between_tabs_are_quotes(tmp_path):
    text = 'smiles\tname\nCCO\t"ethanol\nCCC\tpropane" x\n'
    (tmp_path / "set.tsv").write_text(text)
    assert list(read_file(tmp_path / "set.tsv")) == [('"ethanol', "CCO"), ('propane" x', "CCC")]


def test_a_text_file_may_be_a_table(tmp_path):
    (tmp_path / "a.txt").write_text("CID\tSMILES\tdescription\n1\tCCO\tan alcohol\n")
    (tmp_path / "b.txt").write_text("CCO\tethanol\n")
    assert list(read_file(tmp_path / "a.txt")) == [("1", "CCO")]
    assert list(read_file(tmp_path / "b.txt")) == [("ethanol", "CCO")]


def test_what_spreadsheets_and_big_tables_write(tmp_path):
    (tmp_path / "a.csv").write_bytes("Name,Drug\nethanol,CCO\n".encode("utf-16"))
    (tmp_path / "b.CSV.GZ").write_bytes(gzip.compress(b"smiles,text\nCCO," + b"x" * 200_000))
    assert list(read_file(tmp_path / "a.csv")) == [("ethanol", "CCO")]
    assert list(read_file(tmp_path / "b.CSV.GZ")) == [("", "CCO")]


def test_file_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.smi"):
        read_file(tmp_path / "absent.smi")
    table = tmp_path / "table.csv"
    table.write_text("compound,activity\nx,1\n")
    with pytest.raises(ValueError, match="no SMILES column; its columns are compound, activity"):
        list(read_file(table))
    other = tmp_path / "set.mol2"
    other.touch()
    with pytest.raises(ValueError, match="must end in"):
        read_file(other)
