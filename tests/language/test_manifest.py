from __future__ import annotations

import json

import pytest

from edt_former.graph import make_encoder
from edt_former.language.frozen import content_hash, save_part
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
    encoder = make_encoder({"name": "gin", "layers": 1, "width": 8})
    save_part(encoder, tmp_path / "there/graph_encoder")
    sha256 = content_hash(encoder.state_dict().items())
    gone = str(tmp_path / "here/graph_encoder")
    manifest = Manifest(tmp_path, {"graph_encoder": FrozenPart(sha256, gone, "graph_encoder")})
    monkeypatch.setattr("edt_former.shipped.folder", lambda: tmp_path / "there")
    assert manifest.folder("graph_encoder") == tmp_path / "there/graph_encoder"
    others = ((sha256, "other"), (sha256, "../there/graph_encoder"), ("ab", "graph_encoder"))
    for digest, name in others:
        manifest = Manifest(tmp_path, {"graph_encoder": FrozenPart(digest, gone, name)})
        with pytest.raises(FileNotFoundError, match=r"graph_encoder= is needed: .* is no folder"):
            manifest.folder("graph_encoder")


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
