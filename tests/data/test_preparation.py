"""Data that are prepared: what comes back, what is left out and why, and stops at any moment."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from edt_former.chem import ConformerOptions, read_molecule
from edt_former.data import Columns, PreparedData, PrepareOptions, preparation, prepare
from edt_former.data.overlap import blocks_of, find_overlaps
from edt_former.language.frozen import content_hash, save_part
from edt_former.tokens import NextAtomPredictor, PatchOptions
from tests.conftest import WRITTEN, described

pytest.importorskip("pyarrow", reason="prepared data need pyarrow")


def test_rows_come_back_as_they_were_read(prepared_data):
    data = PreparedData(prepared_data)
    assert len(data) == 49
    row = data[10]
    (prepared,) = row.molecules
    read = read_molecule(prepared.molecule.smiles)
    assert row.text == described(WRITTEN[10])
    for name in ("atom_features", "bond_index", "bond_features"):
        stored, fresh = getattr(prepared.molecule, name), getattr(read, name)
        assert np.array_equal(stored, fresh) and stored.dtype == fresh.dtype
    assert prepared.coordinates is None and prepared.patches == {}


def test_every_row_of_the_file_is_there_in_order(prepared_data, caption_file):
    data = PreparedData(prepared_data)
    lines = caption_file.read_text().splitlines()[1:]
    assert [row.number for row in (data[i] for i in range(len(data)))] == [
        i for i, line in enumerate(lines) if "C1CC" not in line
    ]
    for i in range(len(data)):
        cid, _, text = lines[data[i].number].split("\t")
        assert (data[i].id, data[i].text) == (cid, text)
    assert data[48].molecules[0].molecule.smiles == "C/C=C\\C"


def test_bad_rows_are_kept_with_the_reason(prepared_data):
    manifest = json.loads((prepared_data / "data.json").read_text())
    assert (manifest["rows"], manifest["usable"]) == (50, 49)
    assert manifest["reasons"] == {"unclosed ring": 1}
    part = preparation.Part(prepared_data / "part-00000.arrow")
    bad = part.row(3)
    assert (bad.id, bad.reason, bad.molecules) == ("900", "unclosed ring", ())


@pytest.fixture
def predictor(tmp_path) -> Path:
    torch.manual_seed(0)
    model = NextAtomPredictor({"layers": 1, "heads": 2, "width": 16, "positions": 64})
    save_part(model, tmp_path / "predictor")
    return tmp_path / "predictor"


def test_patches_and_conformers(tmp_path, predictor):
    source = tmp_path / "some.csv"
    source.write_text("smiles\nOCCO\nc1ccccc1CCOC\n[Na+].[Cl-]\n")
    patches = PatchOptions(sources=("brics", "entropy"))
    options = PrepareOptions(
        patches=patches, predictor=predictor, conformers=ConformerOptions(flat=True)
    )
    prepare([source], tmp_path / "out", options, progress=False)
    data = PreparedData(tmp_path / "out")
    found = [data[i].molecules[0] for i in range(3)]
    by_hand = preparation.find_patch_ids(
        [m.molecule for m in found],
        patches,
        preparation.load_part(NextAtomPredictor, predictor).eval(),
    )
    for source_name, ids in by_hand.items():
        assert [m.patches[source_name].tolist() for m in found] == ids
    assert [m.coordinates.shape for m in found] == [(m.molecule.num_atoms, 3) for m in found]
    model = NextAtomPredictor({"layers": 1, "heads": 2, "width": 16, "positions": 64})
    hashed = content_hash(model.state_dict().items())
    assert not data.has_patches(patches, hashed), "another predictor cuts otherwise"
    stored = json.loads((tmp_path / "out" / "data.json").read_text())["predictor"]
    assert data.has_patches(patches, stored)
    assert not data.has_patches(PatchOptions(sources=("entropy",)), stored)


def stop_after(parts: int, monkeypatch) -> None:
    write = preparation.write_part
    written = []

    def stopping(path, rows):
        if len(written) == parts:
            raise KeyboardInterrupt
        written.append(path)
        write(path, rows)

    monkeypatch.setattr(preparation, "write_part", stopping)


def test_a_run_that_was_stopped_goes_on(tmp_path, caption_file, prepared_data, monkeypatch):
    options = PrepareOptions(rows_per_part=16)
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(KeyboardInterrupt):
            prepare([caption_file], tmp_path, options, progress=False)
    with pytest.raises(FileNotFoundError, match="are not complete, run edt prepare again"):
        PreparedData(tmp_path)
    first = (tmp_path / "part-00000.arrow").stat().st_mtime_ns
    prepare([caption_file], tmp_path, options, progress=False)
    assert (tmp_path / "part-00000.arrow").stat().st_mtime_ns == first
    for file in sorted(prepared_data.iterdir()):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_processes_change_nothing(tmp_path, caption_file, prepared_data):
    prepare([caption_file], tmp_path, PrepareOptions(rows_per_part=16), processes=2, progress=False)
    for file in sorted(prepared_data.iterdir()):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_parts_of_other_settings_are_refused(tmp_path, caption_file):
    prepare([caption_file], tmp_path, progress=False)
    with pytest.raises(ValueError, match="data of another run, which differs in rows_per_part"):
        prepare([caption_file], tmp_path, PrepareOptions(rows_per_part=7), progress=False)


def test_no_more_rows_are_read_than_are_worked_on(tmp_path, monkeypatch):
    """A source that never ends is read part by part."""
    made, read = [], []

    def endless(*_):
        number = 0
        while True:
            read.append(number)
            yield preparation.RawRow(number, "", ("C",))
            number += 1

    class Enough(Exception):
        pass

    def few(path, rows):
        made.append(len(rows))
        if len(made) == 3:
            raise Enough

    monkeypatch.setattr(preparation, "read_rows", endless)
    monkeypatch.setattr(preparation, "write_part", few)
    source = tmp_path / "endless.smi"
    source.write_text("C\n")
    with pytest.raises(Enough):
        prepare([source], tmp_path / "out", PrepareOptions(rows_per_part=8), progress=False)
    assert made == [8, 8, 8] and len(read) == 24


def test_molecules_of_a_test_set_are_left_out_and_counted(tmp_path):
    train, test = tmp_path / "train.csv", tmp_path / "test.smi"
    train.write_text("smiles,text\nC[C@H](N)C(=O)O,alanine\nCCO,ethanol\nCC(=O)[O-],acetate\n")
    test.write_text("C[C@@H](N)C(O)=O D-alanine\nCC(=O)O acid\nCCC propane\n")
    prepare([train], tmp_path / "all", progress=False)
    (overlap,) = find_overlaps(PreparedData(tmp_path / "all").blocks(), [test])
    assert (overlap.molecules, overlap.shared) == (3, 2)
    assert str(overlap) == "2 of the 3 molecules of test.smi (66.7%)"

    options = PrepareOptions(exclude=(test,))
    found = prepare([train], tmp_path / "clean", options, progress=False)
    assert found["reasons"] == {"is in test.smi": 2}
    data = PreparedData(tmp_path / "clean")
    assert [data[i].text for i in range(len(data))] == ["ethanol"]
    assert find_overlaps(data.blocks(), [test])[0].shared == 0
    assert set(blocks_of(tmp_path / "clean")) == data.blocks()


def test_rows_of_every_kind_and_what_is_wanted_of_them(tmp_path):
    source = tmp_path / "some.jsonl"
    turns = [{"user": "<mol> or <mol>?", "assistant": "both"}]
    records = [
        {"smiles": "CC", "text": "ethane", "y": 1},
        {"smiles": ["CC", "CO"], "conversations": turns, "y": None},
        {"conversations": [{"user": "hello", "assistant": "hi"}]},
        {"smiles": "CC", "conversations": turns},
        {"text": "nothing"},
        {"smiles": "C", "messages": [{"role": "user", "content": "?"}]},
    ]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = PrepareOptions(columns=Columns(targets=("y",)))
    found = prepare([source, source], tmp_path / "out", options, progress=False)
    assert found["reasons"] == {
        "2 <mol> in the conversation, and 1 molecules": 2,
        "no molecule and no conversation": 2,
        "nobody answers in the conversation": 2,
    }
    folder = tmp_path / "out"
    counts = {w: len(PreparedData(folder, wants=[w])) for w in ("text", "turns", "said", "targets")}
    assert counts == {"text": 2, "turns": 4, "said": 6, "targets": 2}
    assert len(PreparedData(folder, wants=["molecule"])) == 2
    assert len(PreparedData(folder, wants=["molecules"])) == 4
    data = PreparedData([folder, folder], wants=["turns"])
    assert len(data) == 8 and data[0].turns == (("user", "<mol> or <mol>?"), ("assistant", "both"))
    assert len(data[0].molecules) == 2 and data[1].molecules == ()
    assert data.atoms().tolist() == [4, 0] * 4
    assert data.characters().tolist() == [19, 7] * 4
    assert data.target_names() == ("y",)
    both = PreparedData(folder)
    assert both[0].targets == (1.0,) and np.isnan(both[1].targets[0])
    assert [both[i].file for i in range(6)] == [0, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="wants must be of text, turns"):
        PreparedData(folder, wants=["caption"])


def test_public_captions_are_read_whole(tmp_path):
    if "EDT_SHARED" not in os.environ:
        pytest.skip("EDT_SHARED (folder of public data) is not set")
    source = Path(os.environ["EDT_SHARED"], "data/chebi20/validation.txt")
    lines = source.read_text().splitlines()
    doubled = [line for line in lines if "\\\\" in line.split("\t")[1]][:20]
    quoted = [line for line in lines if '"' in line.split("\t")[2]][:20]
    few = tmp_path / "few.txt"
    few.write_text("\n".join([lines[0], *doubled, *quoted]) + "\n")
    found = prepare([few], tmp_path / "out", progress=False)
    assert found["rows"] == found["usable"] == len(doubled) + len(quoted) > 20
    data = PreparedData(tmp_path / "out")
    for i, line in enumerate(csv.reader([*doubled, *quoted], delimiter="\t", quoting=3)):
        assert data[i].text == line[2].strip()
        once = read_molecule(line[1].replace("\\\\", "\\"))
        assert data[i].molecules[0].molecule.smiles == once.smiles


@pytest.fixture
def copied(prepared_data, tmp_path):
    """Prepared data that a test may damage."""
    shutil.copytree(prepared_data, tmp_path / "copied")
    return tmp_path / "copied"


def test_a_part_that_is_cut_off_is_refused(copied):
    file = copied / "part-00000.arrow"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"part-00000\.arrow must be a part of prepared data"):
        PreparedData(copied)


def test_a_bond_beyond_its_molecule_is_refused(copied):
    file = copied / "part-00000.arrow"
    part = preparation.Part(file)
    bonds = part.values["bonds"].tobytes()
    content = file.read_bytes()
    assert content.count(bonds) == 1
    file.write_bytes(content.replace(bonds, b"\xff\x7f" + bonds[2:]))
    with pytest.raises(ValueError, match="a bond leads to atom 32767, beyond its molecule"):
        preparation.Part(file)


@pytest.mark.parametrize("count", [10**12, -1, "1", None])
def test_a_false_number_of_parts_is_refused(copied, count):
    manifest = json.loads((copied / "data.json").read_text())
    (copied / "data.json").write_text(json.dumps({**manifest, "parts": count}))
    with pytest.raises(ValueError, match=r"data\.json counts"):
        PreparedData(copied)
    del manifest["columns"]
    (copied / "data.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"data\.json is damaged: KeyError\('columns'\)"):
        PreparedData(copied)
