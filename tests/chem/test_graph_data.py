from __future__ import annotations

import numpy as np
import pytest

from edt_former.chem import check_graph_data, read_molecules

# Stereo, charges, a wildcard, d orbitals for good (sulfur, phosphorus), an atom alone.
MOLECULES = read_molecules(
    ["C[C@H](N)C(=O)O", "CC(=O)[O-].[Na+]", "*C", "FS(F)(F)(F)(F)F", "[He]", "C" * 40]
)


def arrays(molecule):
    return molecule.atom_features, molecule.bond_index, molecule.bond_features


@pytest.mark.parametrize("molecule", MOLECULES, ids=lambda m: m.smiles[:20])
def test_molecules_are_right_in_any_order_of_bonds(molecule):
    x, index, features = arrays(molecule)
    check_graph_data(x, index, features)
    order = np.random.default_rng(0).permutation(len(features))
    check_graph_data(x.astype(np.int32), index[:, order], features[order])


def test_nothing_is_right():
    check_graph_data(np.zeros((0, 9), int), np.zeros((2, 0), int), np.zeros((0, 3), int))


def put(array, place, value):
    array = array.copy()
    array[place] = value
    return array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, i, f: (x[:, :2], i, f), r"x must have shape \[n, 9\], got \(3, 2\)"),
        (lambda x, i, f: (x.astype(float), i, f), "x must hold integers, got float64"),
        (
            lambda x, i, f: (put(x, (2, 0), 119), i, f),
            "x must hold values from 0 to 118 in column 0, got 119 for atom 2",
        ),
        (
            lambda x, i, f: (put(x, (1, 8), -1), i, f),
            "x must hold values from 0 to 1 in column 8, got -1 for atom 1",
        ),
        (
            lambda x, i, f: (x, i, put(f, (3, 0), 12)),
            "edge_attr must hold values from 0 to 4 in column 0, got 12 for bond 3",
        ),
        (lambda x, i, f: (x, i[:, :3], f), r"edge_index must have shape .*E = 4 .*\(2, 3\)"),
        (lambda x, i, f: (x, i.T, f), r"edge_index must have shape .*, got \(4, 2\)"),
        (lambda x, i, f: (x, i * 1.0, f), "edge_index must hold integers, got float64"),
        (lambda x, i, f: (x, i + 1, f), "edge_index must name atoms from 0 to 2, got 3"),
        (lambda x, i, f: (x, i * 0 + 1, f), "bind two atoms, got atom 1 with itself"),
        (
            lambda x, i, f: (x, i[:, [0, 1, 2]], f[:3]),
            r"both directions of every bond, got \(2, 1\) without \(1, 2\)",
        ),
        (lambda x, i, f: (x, i[:, [0, 1, 2, 3, 0]], f[[0] * 5]), r"once, got \(1, 0\) twice"),
        (
            lambda x, i, f: (x, i, put(f, (0, 2), 1)),
            "edge_attr must be the same for both directions of a bond, got [01] and [01] with two",
        ),
        (
            lambda x, i, f: (put(x, (0, 6), 4), i, f),
            "x must be numbered as OGB does, got element 6 with d orbitals for atom 0",
        ),
    ],
)
def test_what_cannot_be_right_is_named(change, message):
    ethanol = read_molecules(["CCO"])[0]
    with pytest.raises(ValueError, match=message):
        check_graph_data(*change(*arrays(ethanol)))
