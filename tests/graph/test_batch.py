from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from edt_former.chem import (
    FEATURES_ID,
    PRETRAIN_FEATURES_ID,
    motif_features,
    read_molecules,
)
from edt_former.graph import GraphBatch, read_graph
from edt_former.graph.batch import FEATURE_SCHEMES

NO_ATOMS = SimpleNamespace(
    atom_features=np.zeros((0, 9), np.int64),
    bond_index=np.zeros((2, 0), np.int64),
    bond_features=np.zeros((0, 3), np.int64),
    elements=np.zeros(0, np.int64),
)
MOLECULES = read_molecules(["CC(=O)Oc1ccccc1C(=O)O", "[He]", "[Na+].[Cl-]", "C" * 1000, "*C"])


@pytest.mark.parametrize(
    "molecules",
    [
        pytest.param(MOLECULES, id="mixed"),
        pytest.param([NO_ATOMS, *MOLECULES, NO_ATOMS, NO_ATOMS], id="with empty molecules"),
        pytest.param(MOLECULES[1:2], id="one atom"),
        pytest.param([NO_ATOMS], id="no atoms"),
        pytest.param([], id="no molecules"),
    ],
)
def test_every_molecule_is_found_again(molecules):
    batch = GraphBatch.pack(molecules)
    assert batch.num_molecules == len(molecules)
    assert batch.num_atoms == sum(len(m.elements) for m in molecules) == batch.offsets[-1]
    for m, molecule in enumerate(molecules):
        begin, end = batch.offsets[m : m + 2].tolist()
        bonds = slice(batch.bond_offsets[begin].item(), batch.bond_offsets[end].item())
        np.testing.assert_array_equal(batch.atom_features[begin:end], molecule.atom_features)
        np.testing.assert_array_equal(batch.elements[begin:end], molecule.elements)
        np.testing.assert_array_equal(batch.bond_index[:, bonds] - begin, molecule.bond_index)
        np.testing.assert_array_equal(batch.bond_features[bonds], molecule.bond_features)


def test_bond_offsets_frame_the_incoming_bonds():
    batch = GraphBatch.pack([*MOLECULES, NO_ATOMS])
    assert batch.bond_offsets.shape == (batch.num_atoms + 1,)
    assert batch.bond_offsets[0] == 0
    assert batch.bond_offsets[-1] == batch.bond_index.shape[1]
    owners = torch.repeat_interleave(torch.arange(batch.num_atoms), batch.bond_offsets.diff())
    assert torch.equal(batch.bond_index[1], owners)


def test_types_and_shapes():
    for molecules in ([], [NO_ATOMS], MOLECULES):
        batch = GraphBatch.pack(molecules)
        tensors = [x for x in vars(batch).values() if x is not None]
        assert {t.dtype for t in tensors} == {torch.int64}
        assert batch.atom_features.shape[1] == 9
        assert batch.bond_features.shape[1] == 3
        assert batch.bond_index.shape[0] == 2


def test_packing_leaves_the_molecules_alone():
    molecules = read_molecules(["CC", "CO"])
    before = [m.bond_index.copy() for m in molecules]
    batch = GraphBatch.pack(molecules[:1])
    batch.bond_index += 5
    batch.atom_features += 5
    GraphBatch.pack(molecules)
    for molecule, index in zip(molecules, before, strict=True):
        np.testing.assert_array_equal(molecule.bond_index, index)
        assert molecule.atom_features.max() < 9


def test_to_moves_every_tensor():
    batch = GraphBatch.pack(MOLECULES).to("meta")
    assert {t.device.type for t in vars(batch).values() if t is not None} == {"meta"}
    assert batch.num_molecules == len(MOLECULES)


def test_features_of_another_scheme():
    batch = GraphBatch.pack(MOLECULES, features=PRETRAIN_FEATURES_ID)
    usual = GraphBatch.pack(MOLECULES)
    assert (batch.features, usual.features) == (PRETRAIN_FEATURES_ID, FEATURES_ID)
    assert batch.atom_features.shape == (batch.num_atoms, 2)
    assert batch.bond_features.shape == (batch.bond_index.shape[1], 2)
    for name in ("bond_index", "bond_offsets", "offsets", "elements"):
        assert torch.equal(getattr(batch, name), getattr(usual, name)), name
    assert GraphBatch.pack([], features=PRETRAIN_FEATURES_ID).features == PRETRAIN_FEATURES_ID
    assert list(FEATURE_SCHEMES) == [FEATURES_ID, PRETRAIN_FEATURES_ID]
    with pytest.raises(ValueError, match=r"features must be one of 'ogb-9-3', .*, got 'ecfp'"):
        GraphBatch.pack(MOLECULES, features="ecfp")


def test_no_scheme_takes_what_is_stored_and_no_molecules_have_any_width():
    path = read_graph(SimpleNamespace(num_nodes=2, edge_index=[[0, 1], [1, 0]]))
    batch = GraphBatch.pack([path, path], features=None)
    assert batch.features is None and batch.atom_features.shape == (4, 1)
    assert batch.bond_index.tolist() == [[1, 0, 3, 2], [0, 1, 2, 3]]
    with pytest.raises(ValueError, match=r"features must be one of .*, got None"):
        GraphBatch.pack([], features=None)
    empty = GraphBatch.empty(2, 1)
    assert empty.atom_features.shape == (0, 2) and empty.motifs.values.shape == (0, 73)


def test_motifs_are_packed_and_move():
    molecules = read_molecules(["CCO", "C"])
    batch = GraphBatch.pack(molecules, motifs=motif_features(molecules))
    assert batch.to("meta").motifs.values.device.type == "meta"
    with pytest.raises(ValueError, match="motifs must be one array per molecule, 2, got 1"):
        GraphBatch.pack(molecules, motifs=motif_features(molecules[:1]))


def test_taken_molecules_are_packed_as_if_alone():
    molecules = read_molecules(["CCO", "[Na+].[Cl-]", "c1cc[nH]c1", "C"])

    def packed(rows):
        own = [molecules[row] for row in rows]
        places = [np.full((molecules[row].num_atoms, 3), float(row)) for row in rows]
        return GraphBatch.pack(own, places, motifs=motif_features(own))

    batch = packed(range(4))
    for rows in ([2], [3, 0, 2], []):
        expected, taken = packed(rows), batch.take(rows)
        for name, value in vars(expected).items():
            found = getattr(taken, name)
            if name != "motifs":
                found, value = (found,), (value,)
            assert all(map(torch.equal, found, value)), name
        assert taken.keys() == expected.keys() == [batch.keys()[row] for row in rows]


def test_keys_tell_molecules_and_conformers_apart():
    same, other = read_molecules(["CCO", "CCN"])
    assert len(set(GraphBatch.pack([same, other, same]).keys())) == 2
    places = [np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))]
    assert len(set(GraphBatch.pack([same] * 3, places).keys())) == 2
