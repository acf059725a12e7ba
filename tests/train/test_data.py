"""The recipe's molecules: what gets in, what never does, and how they are packed."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import fields

import numpy as np
import pytest
import torch
from rdkit import Chem
from rdkit.Chem import rdMolDescriptors
from rdkit.Chem.Scaffolds import MurckoScaffold

from edt_former.chem import read_molecule, read_molecules
from edt_former.graph import GraphBatch
from edt_former.tasks.heldout import HeldOut
from edt_former.tasks.questions import FACTS, answer_ids
from edt_former.train.tiny import data
from edt_former.train.tiny.data import MoleculeTable, gather_ranges, prepare

BROKEN = "C1CC"


@pytest.fixture(scope="module")
def train(prepared) -> MoleculeTable:
    return MoleculeTable.load(prepared / "train")


@pytest.fixture(scope="module")
def test(prepared) -> MoleculeTable:
    return MoleculeTable.load(prepared / "test")


def scaffolds(smiles: str) -> set[str]:
    """Of every part of a molecule; "" of a part without rings."""
    parts = Chem.GetMolFrags(Chem.MolFromSmiles(smiles), asMols=True)
    found = (MurckoScaffold.GetScaffoldForMol(part) for part in parts)
    return {Chem.MolToSmiles(scaffold, isomericSmiles=False) for scaffold in found}


def test_the_report_counts_every_job(prepared, corpora, train, test):
    report = json.loads((prepared / "data.json").read_text())
    assert report["molecules"] == {"train": len(train), "test": len(test)}
    lines = sum(1 for name in data.SOURCES for _ in data.read_file(corpora / name))
    left_out = report["left_out"]
    assert len(train) + len(test) + sum(left_out.values()) == lines + 40 + 40 + 120
    assert left_out["held out"] >= 2 and left_out["invalid drawn"] == 1
    assert left_out["seen before"] >= 5
    digest = hashlib.sha256((corpora / "zinc250k_valid.smi").read_bytes()).hexdigest()
    assert report["files"]["zinc250k_valid.smi"] == digest


def test_molecules_are_canonical_and_occur_once(train, test):
    everything = [*train.smiles, *test.smiles]
    assert len(set(everything)) == len(everything)
    assert all(smiles and Chem.CanonSmiles(str(smiles)) == smiles for smiles in everything)


def test_neither_held_out_drugs_nor_their_scaffolds_get_in(train, test):
    held_out = HeldOut()
    for smiles in (*train.smiles, *test.smiles):
        for part in str(smiles).split("."):
            assert held_out.excludes(part) is None, smiles


def test_no_scaffold_of_the_test_split_is_trained_on(train, test):
    tested = set().union(*map(scaffolds, test.smiles))
    assert len(tested) == len(test) >= 5
    for smiles in train.smiles:
        assert not scaffolds(smiles) & tested, smiles


def test_made_molecules_widen_the_training_split(train):
    parts = [str(smiles).count(".") for smiles in train.smiles]
    assert sum(part > 0 for part in parts) > 50
    rings = [rdMolDescriptors.CalcNumRings(Chem.MolFromSmiles(str(s))) for s in train.smiles]
    assert max(rings) == 4, "two molecules of two rings each were joined"


def test_answers_and_targets_are_those_of_the_molecule(train):
    for row in range(0, len(train), 37):
        mol = Chem.MolFromSmiles(str(train.smiles[row]))
        assert train.answers[row].tolist() == answer_ids(mol).tolist()
        described = [describe(mol) for describe in data.DESCRIPTORS.values()]
        np.testing.assert_allclose(train.targets[row, : len(described)], described, rtol=1e-6)
        bins = np.expm1(train.targets[row, len(described) :]).round()
        assert len(bins) == data.FINGERPRINT_BITS and bins.sum() > 0


def test_no_question_asks_for_what_the_encoder_learns_from():
    asked = {fact.key.lower() for fact in FACTS}
    assert not asked & {name.lower() for name in data.SELF_SUPERVISED}
    assert len(data.SELF_SUPERVISED) == 3 + len(data.DESCRIPTORS) + 1


def test_batches_equal_packed_molecules(train):
    rows = np.array([5, 0, 5, len(train) - 1, 17])
    batch = train.batch(rows)
    packed = GraphBatch.pack(read_molecules(map(str, train.smiles[rows])))
    assert_equal(batch, packed)


def assert_equal(batch, packed):
    for field in fields(GraphBatch):
        ours, theirs = getattr(batch, field.name), getattr(packed, field.name)
        if field.name in ("coordinates", "motifs"):
            assert ours is None and theirs is None
        else:
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), field.name


def test_batches_of_odd_atoms_and_of_nothing_equal_packed_molecules():
    smiles = ["[Na+]", "*C", "C", "C[C@H](N)O", "F/C=C/F", "[Cl-].[NH4+]"]
    molecules = read_molecules(smiles)
    records = [
        {
            "molecule": molecule,
            "answers": answer_ids(molecule).astype(np.int8),
            "targets": np.zeros(3, np.float32),
            "smiles": molecule.smiles,
        }
        for molecule in molecules
    ]
    table = data._table(records)
    for rows in ([0, 1, 2, 3, 4, 5], [4, 1], []):
        batch = table.batch(np.array(rows, dtype=np.int64))
        packed = GraphBatch.pack([molecules[row] for row in rows])
        assert_equal(batch, packed)


def test_molecules_are_read_again(train):
    (molecule,) = train.molecules(np.array([3]))
    assert molecule.smiles == train.smiles[3]
    assert molecule.num_atoms == train.offsets[4] - train.offsets[3]


def test_a_table_survives_saving(train, tmp_path):
    train.save(tmp_path / "new")
    loaded = MoleculeTable.load(tmp_path / "new")
    for field in fields(MoleculeTable):
        ours, theirs = getattr(train, field.name), getattr(loaded, field.name)
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs), field.name


def test_gathered_ranges():
    offsets = np.array([0, 2, 2, 5])
    indices, ends = gather_ranges(offsets, np.array([2, 1, 0, 2]))
    assert indices.tolist() == [2, 3, 4, 0, 1, 2, 3, 4] and ends.tolist() == [0, 3, 3, 5, 8]
    indices, ends = gather_ranges(offsets, np.array([], dtype=np.int64))
    assert indices.tolist() == [] and ends.tolist() == [0]


def test_seed_decides_and_scale_shrinks(corpora, tmp_path, monkeypatch):
    """The jobs alone: what is drawn, before any molecule is read."""
    drawn = []
    monkeypatch.setattr(data.multiprocessing, "get_context", lambda _: Recorder(drawn))
    for seed, scale in ((0, 0.01), (0, 0.01), (1, 0.01), (0, 0.005)):
        with pytest.raises(ValueError, match="both splits must have molecules"):
            prepare(corpora, tmp_path, seed=seed, processes=1, scale=scale)
    first, again, other_seed, smaller = drawn
    assert first == again != other_seed
    wanted = [int(0.01 * n) for n in (data.PIECES, data.PAIRS, data.SALTS)]
    kinds = [kind for kind, _, _ in first]
    assert [kinds.count(kind) for kind in ("piece", "pair", "salt")] == wanted
    most = sum(int(0.01 * count) for count in data.SOURCES.values())
    assert 0 < kinds.count("drawn") <= most
    assert len(smaller) < len(first)
    assert not (tmp_path / "data.json").exists()


class Recorder:
    """Stands in for a pool: takes the jobs and makes nothing of them."""

    def __init__(self, seen: list) -> None:
        self.seen = seen

    def Pool(self, _):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def imap(self, _, jobs, chunksize):
        self.seen.append(jobs)
        return iter([])


def test_missing_files_are_all_named(corpora, tmp_path):
    (tmp_path / "zinc250k_test.smi").write_text("C\n")
    with pytest.raises(FileNotFoundError, match=r"missing: zinc250k_valid\.smi, zinc_qed.*znp"):
        prepare(tmp_path, tmp_path, seed=0, processes=1)


def test_a_salt_is_judged_by_each_of_its_parts(test):
    held_out = data._record(("salt", "C1CCC1CCCCCCC1CCC1 CC(=O)Oc1ccccc1C(=O)O", draw_of_second()))
    assert held_out == ("held out", None)
    other = f"CCCCCCCCCCCCCCCCCCCC {test.smiles[0]}"
    assert data._record(("salt", other, draw_of_second())) == ("scaffold of the test split", None)
    assert data._record(("drawn", f"CCCCCC.{test.smiles[0]}", 0.0))[1]["split"] == "test"


def draw_of_second() -> float:
    """A draw for which `_salt` takes the second molecule."""
    for i in range(100):
        if "N" in data._salt("C N", random.Random(i / 100)):
            return i / 100
    raise AssertionError("no draw takes the second molecule")


def test_salts_have_a_small_partner():
    partners = {data._salt("CCC c1ccccc1", random.Random(i)) for i in range(200)}
    assert partners == {f"CCC.{ion}" for ion in (*data._COUNTERIONS, "c1ccccc1")}
    assert all(Chem.MolFromSmiles(smiles) is not None for smiles in partners)


def test_pieces_are_brics_fragments_with_hydrogens_where_they_were_cut():
    found = {data._piece("CC(=O)NCCn1cccc1", random.Random(i)) for i in range(20)}
    assert found == {"CC=O", "c1cc[nH]c1"}
    assert all(3 <= read_molecule(smiles).num_atoms <= 15 for smiles in found)


def test_no_piece_of_what_is_small_or_unreadable():
    assert data._piece("CO", random.Random(0)) is None
    assert data._piece(BROKEN, random.Random(0)) is None
    assert data._record(("piece", "CO", 0.5)) == ("invalid piece", None)


def test_pairs_are_joined_by_a_single_bond():
    for i in range(20):
        joined = Chem.MolFromSmiles(data._pair("CCO c1ccc[nH]1", random.Random(i)))
        assert joined.GetNumAtoms() == 8 and joined.GetNumBonds() == 8
        assert len(Chem.GetMolFrags(joined)) == 1
        assert rdMolDescriptors.CalcMolFormula(joined) == "C6H9NO"


def test_pairs_use_up_written_hydrogens():
    joined = Chem.MolFromSmiles(data._pair("[CH4] [CH4]", random.Random(0)))
    assert Chem.MolToSmiles(joined) == "CC"


@pytest.mark.parametrize("pair", [f"{BROKEN} CC", f"CC {BROKEN}", "O CC", "CC FC(F)(F)F"])
def test_what_cannot_be_joined_gives_no_pair(pair):
    assert data._pair(pair, random.Random(0)) is None
