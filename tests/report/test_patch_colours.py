"""Neighbouring patches differ in colour, also for eyes that see fewer colours."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from rdkit import Chem

from edt_former.chem import brics_fragments
from edt_former.report.drawing import bonded_atoms
from edt_former.report.patch_colours import PALETTE, patch_colours
from edt_former.tasks.heldout import heldout_molecules

# Fullerene C60: twenty hexagons, twelve pentagons.
FULLERENE = (
    "c12c3c4c5c1c1c6c7c2c2c8c3c3c9c4c4c%10c5c5c1c1c6c6c%11c7c2c2c7c8c3c3c8c9c4c4c9c%10c5c5c1"
    "c1c6c6c%11c2c2c7c3c3c8c4c4c9c5c1c1c6c2c3c41"
)


def assert_neighbours_differ(ids, bonds):
    colours = patch_colours(ids, bonds)
    assert list(colours) == sorted(set(ids)) and set(colours.values()) <= set(PALETTE)
    for a, b in [*bonds, *pairwise(range(len(ids)))]:
        assert ids[a] == ids[b] or colours[ids[a]] != colours[ids[b]]


@pytest.mark.parametrize("size", [1, 2, 3], ids=lambda size: f"runs of {size}")
def test_neighbours_differ_in_known_drugs(size):
    for _, smiles in heldout_molecules():
        mol = Chem.MolFromSmiles(smiles)
        assert_neighbours_differ([i // size for i in range(mol.GetNumAtoms())], bonded_atoms(mol))


def test_neighbours_differ_among_fragments():
    for _, smiles in heldout_molecules():
        mol = Chem.MolFromSmiles(smiles)
        assert_neighbours_differ(brics_fragments(mol).tolist(), bonded_atoms(mol))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_neighbours_differ_in_a_fullerene(size):
    mol = Chem.MolFromSmiles(FULLERENE)
    assert mol.GetNumAtoms() == 60 and mol.GetNumBonds() == 90
    assert_neighbours_differ([i // size for i in range(60)], bonded_atoms(mol))


def test_few_patches_have_colours_of_their_own_in_the_palettes_order():
    ids = [4, 4, 0, 2, 9]
    assert patch_colours(ids, []) == dict(zip([0, 2, 4, 9], PALETTE, strict=False))
    assert list(patch_colours(range(7), [(0, 6)]).values()) == list(PALETTE)


def test_colours_are_used_evenly():
    used = list(patch_colours(range(70), []).values())
    assert {used.count(colour) for colour in PALETTE} <= set(range(8, 13))


def test_more_neighbours_than_colours_share_them():
    everyone = list(combinations(range(9), 2))
    assert set(patch_colours(range(9), everyone).values()) == set(PALETTE)


def test_no_atom_no_colour():
    assert patch_colours([], []) == {}


# Machado, Oliveira, Fernandes, doi:10.1109/TVCG.2009.113: linear RGB as seen without one cone.
SEEN = {
    "all cones": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def lab(colour: str, seen: np.ndarray) -> np.ndarray:
    """CIE L*a*b* under D65."""
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = to_xyz @ np.clip(seen @ linear, 0, 1) / [0.9505, 1, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN)
def test_colours_differ_for_every_kind_of_colour_vision(seen):
    seen = np.array(seen)
    places = [lab(colour, seen) for colour in (*PALETTE, "#FFFFFF")]
    # Two to three steps are just seen side by side.
    assert min(np.linalg.norm(a - b) for a, b in combinations(places, 2)) > 12


@pytest.mark.parametrize("colour", PALETTE)
def test_black_text_is_legible_on_every_colour(colour):
    # Contrast of 7 is the strictest level of WCAG 2.
    lightness = lab(colour, np.eye(3))[0]
    luminance = ((lightness + 16) / 116) ** 3
    assert (luminance + 0.05) / 0.05 >= 7
