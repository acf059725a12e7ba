"""Conformers of the recipe's molecules: which have one, and that a killed run goes on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edt_former.chem import ConformerOptions, ConformerPool, Invalid, make_conformer, read_molecule
from edt_former.graph import GraphBatch
from edt_former.tasks.questions import answer_ids
from edt_former.train.tiny import conformers, data
from edt_former.train.tiny.conformers import place
from edt_former.train.tiny.data import MoleculeTable

NO_CONFORMER = "F[C@]12C[C@@](F)(C1)C2"
SMILES = ["CCO", "c1ccccc1", NO_CONFORMER, "C[NH3+].[Cl-]", "[Na+]", NO_CONFORMER, "CC(N)=O", "CCC"]


@pytest.fixture(scope="module")
def table() -> MoleculeTable:
    molecules = [read_molecule(smiles) for smiles in SMILES]
    return data._table(
        [
            {
                "molecule": molecule,
                "answers": answer_ids(molecule).astype(np.int8),
                "targets": np.full(3, row, np.float32),
                "smiles": molecule.smiles,
            }
            for row, molecule in enumerate(molecules)
        ]
    )


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(conformers, "CHUNK", 3)


def test_what_has_no_conformer_is_left_out_and_counted(table, tmp_path):
    placed, left_out = place(table, tmp_path, 7, seed=3, processes=2)
    assert left_out == {"RDKit cannot embed the molecule": 2}
    assert placed.targets[:, 0].tolist() == [0, 1, 3, 4, 6]
    rows = np.array([4, 0, 2])
    molecules = placed.molecules(rows)
    made = [make_conformer(molecule, ConformerOptions(seed=3)) for molecule in molecules]
    expected = GraphBatch.pack(molecules, [conformer.coordinates for conformer in made])
    batch = placed.batch(rows)
    assert batch.motifs is None and expected.motifs is None
    for name in vars(expected).keys() - {"motifs"}:
        assert torch.equal(getattr(batch, name), getattr(expected, name)), name
    assert placed.answers[rows].tolist() == [answer_ids(m).tolist() for m in molecules]


def test_a_killed_run_goes_on_after_its_last_chunk(table, tmp_path, monkeypatch):
    make, calls = ConformerPool.make, []

    def dying(pool, molecules):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append([molecule.smiles for molecule in molecules])
        return make(pool, molecules)

    monkeypatch.setattr(ConformerPool, "make", dying)
    with pytest.raises(KeyboardInterrupt):
        place(table, tmp_path, 8, seed=0, processes=1)
    calls.clear()
    placed, _ = place(table, tmp_path, 8, seed=0, processes=1)
    assert calls == [[str(smiles) for smiles in table.smiles[6:]]]
    monkeypatch.setattr(ConformerPool, "make", None)
    again, _ = place(table, tmp_path, 8, seed=0, processes=1)
    assert np.array_equal(again.coordinates, placed.coordinates)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "000000.npz",
        "000003.npz",
        "000006.npz",
    ]


def test_some_molecule_must_have_one(table, tmp_path, monkeypatch):
    monkeypatch.setattr(
        ConformerPool, "make", lambda _, molecules: [Invalid("", "no time")] * len(molecules)
    )
    with pytest.raises(ValueError, match=r"must have a conformer, got \{'no time': 4\}"):
        place(table, tmp_path, 4, seed=0, processes=1)


def test_a_table_of_some_rows_is_those_molecules(table):
    rows = np.array([6, 1, 1])
    taken = table.take(rows)
    assert taken.smiles.tolist() == table.smiles[rows].tolist()
    for name in ("atom_features", "bond_index", "bond_features", "bond_offsets", "offsets"):
        ours, theirs = (getattr(b, name) for b in (taken.batch(np.arange(3)), table.batch(rows)))
        assert torch.equal(ours, theirs), name
