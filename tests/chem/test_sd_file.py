"""SD files as toolkits write them, and as they come."""

from __future__ import annotations

import gzip

import pytest
from rdkit import Chem
from rdkit.Chem import rdDepictor, rdDistGeom

from edt_former.chem import Invalid, read_file, read_molecule
from edt_former.chem.sd_file import read_structures

ENDING = "$$$$\n"


def record(smiles, title="", *, flat=True, **properties):
    """As RDKit writes it: drawn, or with hydrogens in space."""
    mol = Chem.MolFromSmiles(smiles) or Chem.MolFromSmiles(smiles, sanitize=False)
    if flat:
        rdDepictor.Compute2DCoords(mol)
    else:
        mol = Chem.AddHs(mol)
        assert rdDistGeom.EmbedMolecule(mol, randomSeed=1) == 0
    mol.SetProp("_Name", title)
    items = "".join(f"> <{name}>\n{value}\n\n" for name, value in properties.items())
    return Chem.MolToMolBlock(mol) + items + ENDING


@pytest.fixture
def write(tmp_path):
    def write(*records, name="set.sdf"):
        path, text = tmp_path / name, "".join(records)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return write


@pytest.mark.parametrize("name", ["set.sdf", "set.SDF", "set.sdf.gz"])
@pytest.mark.parametrize("flat", [True, False], ids=["drawn", "in space"])
def test_structures_keep_their_stereochemistry(write, flat, name):
    known = ["C[C@H](N)C(=O)O", "C/C=C\\C", "[Cl-].[Na+]", "c1ccc2[nH]ccc2c1"]
    path = write(*(record(s, f"no. {i}", flat=flat) for i, s in enumerate(known)), name=name)
    found = list(read_file(path))
    assert [title for title, _ in found] == [f"no. {i}" for i in range(4)]
    assert [smiles for _, smiles in found] == [read_molecule(s).smiles for s in known]


def test_properties(write):
    found = list(read_structures(write(record("CCO", logP="-0.31", Text="an\nalcohol"))))
    assert found[0].properties == {"logP": "-0.31", "Text": "an\nalcohol"}


def test_a_property_names_what_has_no_title(write):
    path = write(
        record("CCO", Name="ethanol"), record("CN", "title", Name="x"), record("C", ID=" ")
    )
    assert list(read_file(path)) == [("ethanol", "CCO"), ("title", "CN"), ("", "C")]


def test_bad_records_are_kept_and_the_next_are_read(write):
    last = record("CN", "last").removesuffix(ENDING)  # some programs leave it out
    path = write(record("CC(C)(C)(C)C", "five"), "broken\nnonsense\n\n x\n", ENDING, ENDING, last)
    found = list(read_structures(path))
    assert [x.name for x in found] == ["five", "broken", "", "last"]
    assert [x.smiles for x in found] == ["CC(C)(C)(C)C", "", "", "CN"]
    five = read_molecule(found[0].smiles)
    assert isinstance(five, Invalid) and "valence" in five.reason


def test_nothing_is_logged(write, capfd):
    list(read_structures(write("a\nb\nc\nd\n", ENDING)))
    assert capfd.readouterr() == ("", "")
