"""Patches lie on their own atoms, and everything lies inside of the picture."""

from __future__ import annotations

import re
import struct
import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import AllChem

from edt_former.chem import brics_fragments, rdkit_mol, read_molecule
from edt_former.report.drawing import (
    MAX_PIXELS,
    SCALE,
    bonded_atoms,
    describe_patches,
    draw_patches,
    draw_patches_png,
)
from edt_former.report.patch_colours import patch_colours

MOLECULES = {
    "one atom": "[Na+]",
    "wildcard": "*",
    "five atoms": "CCOCC",
    "aspirin": "CC(=O)Oc1ccccc1C(=O)O",
    "salt": "[Na+].[Na+].O=C([O-])CC(O)(CC(=O)[O-])C(=O)O.O",
    "sildenafil": "CCCc1nn(C)c2c(=O)[nH]c(nc12)-c1cc(ccc1OCC)S(=O)(=O)N1CCN(C)CC1",
    "fused rings, stereocentres": "CN1CC[C@]23c4c5ccc(O)c4O[C@H]2[C@@H](O)C=C[C@H]3[C@H]1C5",
    "macrocycle": "O=C1CCCCCCCCCCCCCCO1",
    "peptide": "".join(f"N[C@@H]({side})C(=O)" for side in ("C", "Cc1ccccc1", "CO", "CCSC") * 4)
    + "O",
    "long chain": "CCCCCCCCCC" * 12,
}
NAMES = {"svg": "http://www.w3.org/2000/svg"}


def runs(count: int, size: int = 3) -> list[int]:
    return [atom // size for atom in range(count)]


def parsed(svg: str) -> ET.Element:
    return ET.fromstring(svg.encode("iso-8859-1"))


def areas(svg: str) -> dict[int, tuple[str, float, float]]:
    """Colour and place of the area around every atom."""
    found = {}
    for ellipse in parsed(svg).iterfind("svg:ellipse", NAMES):
        (atom,) = re.findall(r"^atom-(\d+)$", ellipse.get("class"))
        fill = re.search(r"fill:(#[0-9A-F]{6})", ellipse.get("style"))[1]
        assert int(atom) not in found
        found[int(atom)] = (fill, float(ellipse.get("cx")), float(ellipse.get("cy")))
    return found


@pytest.mark.parametrize("smiles", MOLECULES.values(), ids=MOLECULES)
def test_every_atom_has_the_colour_of_its_patch(smiles):
    molecule = read_molecule(smiles)
    ids = runs(molecule.num_atoms)
    found = areas(draw_patches(molecule, ids))
    colours = patch_colours(ids, bonded_atoms(rdkit_mol(molecule)))
    assert {atom: colour for atom, (colour, *_) in found.items()} == {
        atom: colours[patch] for atom, patch in enumerate(ids)
    }


@pytest.mark.parametrize("smiles", MOLECULES.values(), ids=MOLECULES)
def test_bonds_are_coloured_inside_of_patches_only(smiles):
    molecule = read_molecule(smiles)
    ids = runs(molecule.num_atoms)
    mol = rdkit_mol(molecule)
    colours = patch_colours(ids, bonded_atoms(mol))
    drawn = {}
    for path in parsed(draw_patches(molecule, ids)).iterfind("svg:path", NAMES):
        fill = re.search(r"fill:(#[0-9A-F]{6})", path.get("style", ""))
        bond = re.match(r"bond-(\d+) ", path.get("class", ""))
        if bond and fill and fill[1] in colours.values():
            drawn[int(bond[1])] = fill[1]
    assert drawn == {
        index: colours[ids[a]] for index, (a, b) in enumerate(bonded_atoms(mol)) if ids[a] == ids[b]
    }


def test_atoms_are_those_of_the_smiles_however_it_is_written():
    """Carbons only: an atom's area lies exactly at its place in RDKit's layout, up to a scale."""
    for smiles in ("CC(C)CC1CC1C", "C1(C)C(CC(C)C)C1", "C(C1CC1C)C(C)C"):
        mol = Chem.MolFromSmiles(smiles)
        ids = list(range(mol.GetNumAtoms()))
        AllChem.Compute2DCoords(mol, canonOrient=True)
        places = mol.GetConformer().GetPositions()[:, :2]
        found = areas(draw_patches(smiles, ids))
        drawn = np.array([found[atom][1:] for atom in ids])
        drawn, places = drawn - drawn[0], (places - places[0]) * [1, -1]
        scale = np.abs(drawn).max() / np.abs(places).max()
        np.testing.assert_allclose(drawn, scale * places, atol=0.2)


def test_ids_follow_the_molecule_that_is_given():
    """The oxygen is atom 0 of the SMILES and atom 2 of the `Molecule`."""
    molecule = read_molecule("OCC")
    assert molecule.smiles == "CCO"
    assert "0: O, 1 atom; 1: C2, 2 atoms" in draw_patches("OCC", [0, 1, 1])
    assert "0: O, 1 atom; 1: C2, 2 atoms" in draw_patches(Chem.MolFromSmiles("OCC"), [0, 1, 1])
    assert "0: O, 1 atom; 1: C2, 2 atoms" in draw_patches(molecule, [1, 1, 0])


@pytest.mark.parametrize("smiles", MOLECULES.values(), ids=MOLECULES)
def test_nothing_is_cut_off(smiles):
    molecule = read_molecule(smiles)
    root = parsed(draw_patches(molecule, runs(molecule.num_atoms)))
    _, _, width, height = map(float, root.get("viewBox").split())
    for path in root.iterfind("svg:path", NAMES):
        places = np.array(re.findall(r"-?\d+\.?\d*", path.get("d")), dtype=float).reshape(-1, 2)
        assert (places >= 0).all() and (places <= [width, height]).all()
    for e in root.iterfind("svg:ellipse", NAMES):
        x, y, rx, ry = (float(e.get(name)) for name in ("cx", "cy", "rx", "ry"))
        assert rx <= x <= width - rx and ry <= y <= height - ry


def test_the_picture_grows_and_the_bonds_do_not():
    widths = []
    for smiles in ("CCOCC", MOLECULES["sildenafil"], MOLECULES["peptide"]):
        molecule = read_molecule(smiles)
        svg = draw_patches(molecule, runs(molecule.num_atoms))
        found = areas(svg)
        lengths = [
            np.hypot(*np.subtract(found[a][1:], found[b][1:]))
            for a, b in bonded_atoms(rdkit_mol(molecule))
        ]
        assert np.median(lengths) == pytest.approx(1.5 * SCALE, rel=0.05)
        widths.append(float(parsed(svg).get("width").removesuffix("px")))
    assert widths == sorted(widths) and widths[0] < 300 < widths[-1]


def test_a_very_long_molecule_stays_within_bounds():
    root = parsed(draw_patches("C" * 1000, [0] * 1000))
    assert max(float(root.get(side).removesuffix("px")) for side in ("width", "height")) < 1.1 * (
        MAX_PIXELS
    )


def test_components_stand_apart():
    found = areas(draw_patches("[Na+].[Cl-].[K+]", [0, 1, 2]))
    (x0, y0), (x1, y1), (x2, y2) = (found[atom][1:] for atom in range(3))
    assert x1 - x0 > SCALE and x2 - x1 > SCALE
    assert max(y0, y1, y2) - min(y0, y1, y2) < 5


def test_an_own_layout_is_kept_and_a_conformer_is_flattened():
    mol = Chem.MolFromSmiles("CCC")
    AllChem.Compute2DCoords(mol)
    conformer = mol.GetConformer()
    for atom, x in enumerate((0, 1, 5)):
        conformer.SetAtomPosition(atom, (x, 0, 0))
    found = areas(draw_patches(mol, [0, 0, 1]))
    assert (found[2][1] - found[1][1]) / (found[1][1] - found[0][1]) == pytest.approx(4, rel=0.02)
    assert conformer.GetAtomPosition(2).x == 5 and not mol.GetAtomWithIdx(0).HasProp("atomNote")

    solid = Chem.AddHs(Chem.MolFromSmiles("CCO"))
    AllChem.EmbedMolecule(solid, randomSeed=0)
    places = [place for _, *place in areas(draw_patches(solid, [0] * 9)).values()]
    assert min(np.hypot(*np.subtract(a, b)) for a, b in combinations(places, 2)) > SCALE / 2


def test_numbers_stand_at_every_piece():
    """Glyphs of notes are the paths of class `note`, one per digit."""

    def notes(smiles, ids):
        paths = parsed(draw_patches(smiles, ids)).iterfind("svg:path", NAMES)
        return sum(path.get("class") in ("note", "CIP_Code") for path in paths)

    assert notes("CCCCC", [0, 0, 0, 0, 0]) == 1
    assert notes("CCCCC", [0, 0, 1, 0, 0]) == 3
    assert notes("CCCCC", [0, 0, 12, 0, 0]) == 4


@pytest.mark.parametrize("smiles", MOLECULES.values(), ids=MOLECULES)
def test_a_png_is_twice_as_large(smiles):
    molecule = read_molecule(smiles)
    ids = runs(molecule.num_atoms)
    png, root = draw_patches_png(molecule, ids), parsed(draw_patches(molecule, ids))
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and png.endswith(b"IEND\xaeB`\x82")
    width, height = (float(root.get(side).removesuffix("px")) for side in ("width", "height"))
    assert struct.unpack(">II", png[16:24]) == (2 * width, 2 * height)


def test_the_legend_names_elements_carbon_first():
    assert describe_patches("BrCCS(=O)(=O)N[2H]", [5, 5, 5, 7, 7, 7, 7, 7]) == (
        "2 patches: 5: C2Br, 3 atoms; 7: HNO2S, 5 atoms"
    )
    assert describe_patches("*", [0]) == "1 patch: 0: *, 1 atom"


def test_any_integers_serve_as_ids():
    molecule = read_molecule(MOLECULES["aspirin"])
    fragments = brics_fragments(molecule)
    assert draw_patches(molecule, fragments) == draw_patches(molecule, fragments.tolist())
    assert "-3: C2, 2 atoms; 100: O, 1 atom" in draw_patches("CCO", [-3, -3, 100])


def test_what_is_wrong_is_told():
    with pytest.raises(ValueError, match="ids must be one per atom, 3, got 2"):
        draw_patches("CCO", [0, 0])
    with pytest.raises(ValueError, match="molecule 'C1CC' cannot be read: unclosed ring"):
        draw_patches_png("C1CC", [0, 0, 0])
    graph = replace(read_molecule("CCO"), smiles="")
    with pytest.raises(ValueError, match="molecule must have a SMILES to be drawn"):
        draw_patches(graph, [0, 0, 0])


def test_no_atoms():
    assert "<title>0 patches: </title>" in draw_patches(Chem.Mol(), [])
