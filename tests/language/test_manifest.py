from __future__ import annotations

import json

import pytest

from edt_former.language.manifest import FrozenPart, Manifest


def test_paths_are_relative_on_disk_and_absolute_in_memory(tmp_path):
    root, part = tmp_path / "a" / "connector", tmp_path / "a" / "llm"
    root.mkdir(parents=True)
    part.mkdir()
    parts = {
        "language_model": FrozenPart("ab", str(part), "tiny", ("table",)),
        "predictor": FrozenPart("cd"),
    }
    Manifest(root, parts).write()
    on_disk = json.loads((root / "manifest.json").read_text())["parts"]
    assert on_disk["language_model"]["path"] == "../llm"
    assert on_disk["predictor"]["path"] is None
    read = Manifest.read(root)
    assert read.parts == parts
    assert read.folder("language_model") == part
    (tmp_path / "a").rename(tmp_path / "b")
    moved = Manifest.read(tmp_path / "b" / "connector")
    assert moved.folder("language_model") == tmp_path / "b" / "llm"


def test_parts_of_the_package_are_found_wherever_it_is(tmp_path, monkeypatch):
    for name in ("here", "there"):
        (tmp_path / name / "graph_encoder").mkdir(parents=True)
    monkeypatch.setattr("edt_former.shipped.folder", lambda: tmp_path / "here")
    encoder = str(tmp_path / "here/graph_encoder")
    for root in (tmp_path / "run", tmp_path / "here/edt_former"):
        root.mkdir()
        Manifest(root, {"graph_encoder": FrozenPart("ab", encoder)}).write()
        assert Manifest.read(root).folder("graph_encoder") == tmp_path / "here/graph_encoder"
    told = json.loads((tmp_path / "run/manifest.json").read_text())["parts"]
    assert told["graph_encoder"]["path"] == "shipped:graph_encoder"
    told = json.loads((root / "manifest.json").read_text())["parts"]
    assert told["graph_encoder"]["path"] == "../graph_encoder", "among the models themselves"
    monkeypatch.setattr("edt_former.shipped.folder", lambda: tmp_path / "there")
    found = Manifest.read(tmp_path / "run").folder("graph_encoder")
    assert found == tmp_path / "there/graph_encoder"


def test_a_manifest_of_something_else_is_an_error(tmp_path):
    (tmp_path / "manifest.json").write_text('{"seed": 0}')
    with pytest.raises(ValueError, match=r"must be the folder of a checkpoint"):
        Manifest.read(tmp_path)


def test_a_part_that_is_nowhere_is_asked_for(tmp_path):
    parts = {"predictor": FrozenPart("cd"), "graph_encoder": FrozenPart("ef", str(tmp_path / "x"))}
    manifest = Manifest(tmp_path, parts)
    with pytest.raises(FileNotFoundError, match=r"predictor= is needed: .* does not say"):
        manifest.folder("predictor")
    with pytest.raises(FileNotFoundError, match=r"graph_encoder= is needed: .* no folder"):
        manifest.folder("graph_encoder")


@pytest.mark.parametrize("text", ["", "[]", '{"parts": [1]}', '{"parts": {"predictor": {}}}'])
def test_a_damaged_manifest_is_an_error(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"its manifest\.json is not"):
        Manifest.read(tmp_path)
