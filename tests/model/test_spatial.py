"""What somebody with a 3D encoder does, end to end, with small random parts."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from edt_former.chem import ConformerOptions, make_conformer, read_as_written, read_molecule
from edt_former.connectors import make_connector
from edt_former.graph import Blended, GraphBatch
from edt_former.model import MoleculeLM
from edt_former.tokens import NextAtomPredictor

IMPOSSIBLE = "C1C[C@H]2CC[C@H]1C2"
"""Norbornane with a bridgehead turned inside out: it has no conformer."""
MOLECULES = ["OCC", "CC(=O)[O-].[Na+]", "[2H]C([2H])([2H])O"]
TEXTS = ["<mol> question: how many rings does it have ? answer:"] * 3
ENCODERS = pytest.mark.parametrize("encoder", ["unimol", "blended"])


def published(make_parts, make_tokenizer, **options) -> MoleculeLM:
    """A model by the published rules: both views with their special rows, atoms as written."""
    text_model = make_parts()[0]
    spatial = {"layers": 2, "width": 8, "heads": 2, "ffn": 16, "hydrogens": False}
    flat = {"name": "gin", "layers": 2, "width": 8}
    encoder = Blended(flat, spatial, layers=1, width=8, heads=2, special_tokens=True)
    size = {"llm_width": 16, "encoder_width": 8, "width": 16, "layers": 2, "heads": 2, "ffn": 16}
    connector = make_connector({"name": "edt_former_published", **size, "dropout": 0.0})
    predictor = NextAtomPredictor({"layers": 1, "width": 16, "vocabulary": "published"})
    parts = text_model, encoder, connector, predictor
    return MoleculeLM.from_parts(*parts, tokenizer=make_tokenizer(), **options).eval()


@pytest.fixture
def make_spatial(make_model, make_parts, make_tokenizer):
    def make(encoder: str, connector: str, **options: object) -> MoleculeLM:
        if connector == "published":
            model = published(make_parts, make_tokenizer, **options)
        else:
            model = make_model(encoder=encoder, connector=connector, **options)
        # Weights at which molecules make a difference that a test can see.
        for part in (model.graph_encoder, model.connector):
            for parameter in part.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
        return model

    return make


MODELS = pytest.mark.parametrize(
    ("encoder", "connector"),
    [
        ("unimol", "qformer"),
        ("unimol", "edt_former_brics"),
        ("blended", "qformer"),
        ("blended", "edt_former_brics"),
        ("blended", "published"),
    ],
)


def logits(model: MoleculeLM, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@MODELS
def test_the_connector_learns_and_the_frozen_parts_do_not(make_spatial, encoder, connector):
    model = make_spatial(encoder, connector).train()
    inputs = model.processor(TEXTS, MOLECULES, answers=["0", "1", "2"])
    frozen = {k: v.clone() for k, v in model.state_dict().items() if "connector" not in k}
    optimizer = torch.optim.AdamW(model.connector.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("connector."), name
    for part in (model.graph_encoder, model.language_model, model.predictor):
        assert not any(module.training for module in part.modules())
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in frozen.items())


@MODELS
def test_the_model_comes_back_and_says_the_same(make_spatial, tmp_path, encoder, connector):
    model = make_spatial(encoder, connector, conformers=ConformerOptions(seed=5, timeout=20.0))
    inputs = model.processor(TEXTS, MOLECULES)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected, said = logits(model, inputs), model.generate(**inputs, **options)
    assert said.shape == (3, 4)
    model.save_pretrained(tmp_path, save_frozen=True)
    again = MoleculeLM.from_pretrained(tmp_path)
    assert again.processor.conformers == ConformerOptions(seed=5, timeout=20.0)
    inputs = again.processor(TEXTS, MOLECULES)
    torch.testing.assert_close(logits(again, inputs), expected)
    assert torch.equal(again.generate(**inputs, **options), said)
    answers = again.answer(MOLECULES, "how many rings ?", max_new_tokens=3)
    assert answers == model.answer(MOLECULES, "how many rings ?", max_new_tokens=3)


@MODELS
def test_a_row_does_not_depend_on_the_others(make_spatial, encoder, connector):
    model = make_spatial(encoder, connector)
    together = model.processor(TEXTS, MOLECULES)
    expected = logits(model, together)
    for row, smiles in enumerate(MOLECULES):
        alone = logits(model, model.processor(TEXTS[:1], [smiles]))[0]
        mine = expected[row][together["attention_mask"][row].bool()]
        torch.testing.assert_close(mine, alone, rtol=1e-4, atol=1e-4)


@MODELS
def test_space_matters_and_where_the_molecule_lies_does_not(make_spatial, encoder, connector):
    model = make_spatial(encoder, connector)
    inputs = model.processor(TEXTS[:1], ["CC(=O)Oc1ccccc1C(=O)O"])
    rotation = torch.linalg.qr(torch.randn(3, 3)).Q
    places = inputs["graph"].coordinates

    def at(coordinates):
        graph = dataclasses.replace(inputs["graph"], coordinates=coordinates)
        return logits(model, {**inputs, "graph": graph})

    expected = at(places)
    moved = at(places @ rotation.T + torch.tensor([1.0, -2.0, 3.0]))
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(at(places * 1.5), expected, atol=1e-4)


@MODELS
def test_a_molecule_without_a_conformer_is_named(make_spatial, encoder, connector):
    model = make_spatial(encoder, connector)
    match = r"molecule 1 \('C1C\[C@H\]2CC\[C@H\]1C2'\): RDKit cannot embed the molecule"
    with pytest.raises(ValueError, match=match):
        model.processor(TEXTS[:2], ["CCO", IMPOSSIBLE])
    with pytest.raises(ValueError, match=match):
        model.embed_molecules(["CCO", IMPOSSIBLE])
    with pytest.raises(ValueError, match=match):
        model.answer(["CCO", IMPOSSIBLE], "how many ?")

    flat = make_spatial(encoder, connector, conformers=ConformerOptions(flat=True))
    graph = flat.processor(TEXTS[:2], ["CCO", IMPOSSIBLE])["graph"]
    assert graph.coordinates[:3, 2].abs().sum() > 0
    assert (graph.coordinates[3:, 2] == 0).all() and graph.coordinates[3:].abs().sum() > 0
    assert len(flat.answer(["CCO", IMPOSSIBLE], "how many ?", max_new_tokens=2)) == 2


def test_the_processor_makes_conformers_in_the_workers_of_a_data_loader(make_spatial):
    processor = make_spatial("unimol", "edt_former_brics").processor
    expected = processor(TEXTS, MOLECULES)  # its pool has been at work before the workers start
    again = pickle.loads(pickle.dumps(processor))(TEXTS, MOLECULES)
    assert torch.equal(again["graph"].coordinates, expected["graph"].coordinates)
    smiles = [*MOLECULES, "c1ccccc1", "CCN", "C1CCOC1"]
    loader = DataLoader(
        smiles,
        batch_size=3,
        num_workers=2,
        collate_fn=lambda batch: processor(TEXTS, batch),
        multiprocessing_context="fork",
        timeout=60,
    )
    places = torch.cat([inputs["graph"].coordinates for inputs in loader])
    alone = [make_conformer(read_molecule(s)).coordinates for s in smiles]
    assert torch.equal(places, torch.from_numpy(np.concatenate(alone)))


@ENCODERS
def test_a_graph_without_coordinates_is_refused(make_model, encoder):
    model = make_model(connector="qformer", encoder=encoder)
    inputs = model.processor(TEXTS[:1], ["CCO"])
    graph = dataclasses.replace(inputs["graph"], coordinates=None)
    with pytest.raises(ValueError, match=r"batch\.coordinates must be given to a 3D encoder"):
        model(**{**inputs, "graph": graph})
    with pytest.raises(ValueError, match=r"must be one array per molecule, 1, got 0"):
        GraphBatch.pack([read_as_written("C")], [])


def test_published_molecules_are_read_and_placed_as_written(make_parts, make_tokenizer):
    model = published(make_parts, make_tokenizer)
    graph = model.processor(TEXTS[:2], ["OCC", "CCO"])["graph"]
    assert graph.elements.tolist() == [8, 6, 6, 6, 6, 8]
    for rows, smiles in ((slice(0, 3), "OCC"), (slice(3, 6), "CCO")):
        expected = make_conformer(read_as_written(smiles)).coordinates
        assert torch.equal(graph.coordinates[rows], torch.from_numpy(expected))
    first, second = model.embed_molecules(["OCC"]), model.embed_molecules(["CCO"])
    assert first.offsets.tolist()[1] >= 34 and second.offsets.tolist()[1] >= 34
