"""The recipe from end to end, at a scale that teaches nothing."""

from __future__ import annotations

import json
import shutil
from functools import partial

import pytest
import torch

from edt_former import shipped
from edt_former.model import MoleculeLM
from edt_former.tasks.accuracy import Guesses
from edt_former.tasks.heldout import heldout_molecules
from edt_former.tasks.questions import QUESTION_TYPES
from edt_former.train.tiny import connector, encoder, predictor, recipe
from edt_former.train.tiny.reader import ReaderConfig
from edt_former.train.tiny.recipe import add_connector, round_weights, run_recipe

READER = ReaderConfig(width=16, intermediate=16, layers=1, heads=2)
WHO = [
    "model",
    "language model without molecule",
    "constant answer",
    "majority of the size bin",
    "token count alone",
]


@pytest.fixture(scope="module")
def small():
    """Every part as small as it can be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "STEPS", dict.fromkeys(recipe.STEPS, 2))
        patch.setattr(recipe, "TEST_MOLECULES", 2)
        patch.setattr(recipe, "heldout_molecules", lambda: heldout_molecules()[:3])
        reader = partial(recipe.train_reader, config=READER, held_out=8, molecules=2, questions=3)
        patch.setattr(recipe, "train_reader", reader)
        patch.setattr(recipe, "CONFORMERS", 200)
        patch.setattr(encoder, "CONFIG", {"name": "gin", "layers": 1, "width": 16})
        small = {"layers": 1, "width": 24, "heads": 2}
        unimol = {**encoder.SPATIAL_CONFIG, **small, "ffn": 16, "gaussians": 8}
        patch.setattr(encoder, "SPATIAL_CONFIG", unimol)
        patch.setattr(encoder, "BLENDING", {"name": "blended", **small, "width": 32})
        patch.setattr(predictor, "CONFIG", {"layers": 1, "heads": 2, "width": 16, "positions": 64})
        sizes = {"width": 16, "layers": 1, "heads": 2, "ffn": 16, "dropout": 0.0, "sum_tokens": 1}
        patch.setattr(connector, "SIZES", sizes)
        patch.setattr(connector._Alignment, "BATCH", 8)
        patch.setattr(connector._Telling, "BATCH", 8)
        patch.setattr(connector._Answering, "BATCH", 4)
        yield patch


@pytest.fixture(scope="module")
def out(small, prepared, corpora, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe") / "out"
    shutil.copytree(prepared, folder)
    run_recipe(corpora, folder, scale=0.5, processes=1)
    return folder


def test_everything_that_ships_is_there(out):
    manifest = json.loads((out / "shipped" / "manifest.json").read_text())
    names = list(manifest["accuracy"])
    assert names[:2] == ["edt_former", "qformer_32"] and names[2].startswith("qformer_")
    assert names[3:] == ["llamo", "mora", "edt_former_3d", "edt_former_both"]
    made = sorted(path.name for path in (out / "shipped").iterdir())
    frozen = ["graph_encoder", "graph_encoder_3d", "graph_encoder_both"]
    frozen += ["language_model", "predictor"]
    assert made == sorted([*names, *frozen, "manifest.json"])
    mean = manifest["mean tokens of EDT-Former"]
    assert names[2] == f"qformer_{round(mean)}" and mean > 33


def test_the_manifest_tells_how_it_was_made(out):
    manifest = json.loads((out / "shipped" / "manifest.json").read_text())
    assert manifest["seed"] == 0 and manifest["scale"] == 0.5
    assert manifest["data"] == json.loads((out / "data.json").read_text())
    assert set(manifest["steps"]) == set(recipe.STEPS)
    assert all(seconds >= 0 for seconds in manifest["seconds"].values())
    assert {"torch", "rdkit", "edt-kernels", "python"} <= manifest["versions"].keys()
    conformers = manifest["data"]["conformers"]
    assert conformers["molecules"] + sum(conformers["left_out"].values()) == 100
    assert conformers["drawn flat"] == {"known drugs": 0, "held-out scaffolds": 0}
    for both in manifest["accuracy"].values():
        assert list(both) == ["known drugs", "held-out scaffolds"]
        for by_who in both.values():
            assert list(by_who) == WHO
            for by_type in by_who.values():
                assert set(by_type) == {*QUESTION_TYPES, "macro"}
                assert all(0 <= a["low"] <= a["high"] <= 1 for a in by_type.values())
    assert Guesses.from_json(manifest["guesses"]).by_size


def test_the_shipped_models_load_and_answer(out, monkeypatch):
    monkeypatch.setattr(shipped, "folder", lambda: out / "shipped")
    assert shipped.connectors()[:6] == [*shipped.ENCODERS.values(), "llamo", "mora", "qformer_32"]
    for name in shipped.connectors():
        model = shipped.load(name)
        assert isinstance(model, MoleculeLM)
        assert isinstance(model.answer("CCO", "How many rings?", max_new_tokens=2)[0], str)
        assert model.graph_encoder.needs_coordinates == (shipped.encoder_of(name) != "2d")
    assert "guesses" in shipped.manifest()


def test_weights_on_disk_are_half_and_lose_nothing(out):
    from safetensors.torch import load_file

    for path in (out / "shipped").rglob("*.safetensors"):
        floats = [w for w in load_file(path).values() if w.is_floating_point()]
        assert floats and all(w.dtype == torch.float16 for w in floats), path
    for name in shipped.ENCODERS.values():
        model = MoleculeLM.from_pretrained(out / "shipped" / name)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        round_weights(model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_blending_holds_the_encoders_that_ship_beside_it(out):
    both = MoleculeLM.from_pretrained(out / "shipped" / "edt_former_both").graph_encoder
    for name, owner in (("moleculestm", "edt_former"), ("unimol", "edt_former_3d")):
        alone = MoleculeLM.from_pretrained(out / "shipped" / owner).graph_encoder.state_dict()
        copied = both.graph_encoder[name].state_dict()
        assert all(torch.equal(value, copied[key]) for key, value in alone.items())
    assert not both.train_blending and not any(p.requires_grad for p in both.parameters())


def test_the_same_call_again_trains_nothing_and_gives_the_same(out, corpora, small, monkeypatch):
    shipped_before = {
        path.relative_to(out): path.read_bytes()
        for path in (out / "shipped").rglob("*.safetensors")
    }
    manifest = json.loads((out / "shipped" / "manifest.json").read_text())
    monkeypatch.setattr(torch.optim.AdamW, "step", None)
    monkeypatch.setattr(recipe, "prepare", None)
    run_recipe(corpora, out, scale=0.5, processes=1)
    for path, content in shipped_before.items():
        assert (out / path).read_bytes() == content, path
    again = json.loads((out / "shipped" / "manifest.json").read_text())
    timeless = ("accuracy", "steps", "guesses", "reading", "next-atom surprise, nats")
    assert {k: again[k] for k in timeless} == {k: manifest[k] for k in timeless}


def test_one_connector_alone_is_trained_against_what_ships(
    out, small, corpora, prepared, tmp_path, monkeypatch
):
    monkeypatch.setattr(shipped, "folder", lambda: out / "shipped")
    shutil.copytree(prepared, tmp_path / "out")
    add_connector(corpora, tmp_path / "out", "llamo", scale=0.5, processes=1)
    before, after = out / "shipped", tmp_path / "out" / "shipped"
    for path in before.rglob("*.safetensors"):
        assert (after / path.relative_to(before)).read_bytes() == path.read_bytes(), path
    results = [json.loads((folder / "manifest.json").read_text()) for folder in (before, after)]
    assert results[0]["accuracy"] == results[1]["accuracy"]
    with pytest.raises(ValueError, match=r"name must be one of 'edt_former', .*'llamo', got 'mlp'"):
        add_connector(corpora, tmp_path / "other", "mlp", scale=0.5, processes=1)
    with pytest.raises(ValueError, match="has a run with"):
        add_connector(corpora, tmp_path / "out", "llamo", scale=0.25)


def test_another_run_does_not_go_on_from_these_checkpoints(out, corpora):
    with pytest.raises(ValueError, match=r"has a run with .*'seed': 0.*, this one has .*'seed': 1"):
        run_recipe(corpora, out, seed=1, scale=0.5)


def test_a_reader_that_does_not_read_stops_the_run(small, prepared, corpora, tmp_path):
    """At full scale the language model must pass its gate before a connector is trained."""
    shutil.copytree(prepared, tmp_path / "out")
    with pytest.raises(RuntimeError, match=r"must read at least 0\.970 of clean facts"):
        run_recipe(corpora, tmp_path / "out", scale=1.0)
    assert not (tmp_path / "out" / "shipped").exists()


def test_missing_data_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing: zinc250k_valid\.smi"):
        run_recipe(tmp_path, tmp_path / "out")
