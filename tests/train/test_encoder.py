"""Graph encoder and next-atom predictor of the recipe."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from edt_former.chem.features import ATOM_FEATURE_SIZES
from edt_former.graph import make_encoder
from edt_former.graph.unimol import HIDDEN
from edt_former.tokens.predictor import EOS, VOCABULARY_SIZE, NextAtomPredictor, atom_tokens
from edt_former.train.tiny import encoder as encoder_module
from edt_former.train.tiny import predictor as predictor_module
from edt_former.train.tiny.conformers import PlacedTable
from edt_former.train.tiny.data import MoleculeTable
from edt_former.train.tiny.encoder import (
    MASKED,
    UNREAD,
    _Pretraining,
    train_blending,
    train_encoder,
    train_spatial_encoder,
)
from edt_former.train.tiny.predictor import surprise, train_predictor

SMALL_ENCODER = {"name": "gin", "layers": 2, "width": 16}
SMALL_SPATIAL = {
    "name": "unimol",
    **{"layers": 1, "width": 16, "heads": 2, "ffn": 16, "gaussians": 8, "dropout": 0.0},
}
SMALL_BLENDING = {"name": "blended", "layers": 1, "width": 16, "heads": 2}
SMALL_PREDICTOR = {"layers": 1, "heads": 2, "width": 16, "positions": 64}


@pytest.fixture(scope="module")
def table(prepared) -> MoleculeTable:
    return MoleculeTable.load(prepared / "train")


def test_hidden_columns_are_hidden_and_nothing_else(table):
    graph = table.batch(np.arange(8))
    truth = graph.atom_features.clone()
    hidden = torch.zeros(graph.num_atoms, dtype=torch.bool)
    hidden[::3] = True
    model = _Pretraining(make_encoder(SMALL_ENCODER), 5)
    seen = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].atom_features))
    model(graph, hidden, torch.zeros(8, 5))
    (shown,) = seen
    for column in range(truth.shape[1]):
        wanted = truth[:, column].clone()
        if column in MASKED:
            wanted[hidden] = ATOM_FEATURE_SIZES[column] - 1
        assert torch.equal(shown[:, column], wanted), column
    columns = {"element": 0, "hydrogens": 4, "hybridisation": 6}
    assert sorted(MASKED) == sorted(columns.values())


def test_the_encoder_learns_and_is_frozen(table, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder_module, "CONFIG", SMALL_ENCODER)
    losses = []
    fit = encoder_module.fit

    def watched(model, loss, **options):
        def inner(rng):
            value, figures = loss(rng)
            losses.append(value.item())
            return value, figures

        fit(model, inner, **options)

    monkeypatch.setattr(encoder_module, "fit", watched)
    encoder = train_encoder(table, tmp_path / "encoder.pt", steps=25, seed=0, batch=16)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert encoder.frozen and not encoder.training
    again = train_encoder(table, tmp_path / "encoder.pt", steps=25, seed=0, batch=16)
    assert len(losses) == 25
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.fixture(scope="module")
def placed(table) -> PlacedTable:
    """Places that say what the atoms are: elements in layers, neighbours in the SMILES near."""
    few = table.take(np.arange(64))
    rng = np.random.default_rng(0)
    places = rng.normal(size=(len(few.atom_features), 3)).cumsum(0)
    places[:, 0] = few.atom_features[:, 0]
    return PlacedTable(**vars(few), coordinates=places.astype(np.float32))


def test_in_3d_a_hidden_atom_is_masked_and_moved_and_no_other(placed):
    graph = placed.batch(np.arange(4))
    hidden = torch.arange(graph.num_atoms) % 5 == 0
    shift = torch.randn(int(hidden.sum()), 3)
    before = graph.coordinates.clone()
    model = _Pretraining(make_encoder(SMALL_SPATIAL), 5, UNREAD)
    seen = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(graph, hidden, torch.zeros(4, 5), shift)
    assert (seen[0].elements == HIDDEN).equal(hidden)
    assert torch.equal(seen[0].elements[~hidden], graph.elements[~hidden])
    torch.testing.assert_close(seen[0].coordinates[hidden], before[hidden] + shift)
    assert torch.equal(seen[0].coordinates[~hidden], before[~hidden])
    assert torch.equal(graph.coordinates, before), "the batch itself stays as it is"


@pytest.mark.parametrize("shifted", [False, True])
def test_errors_are_those_of_the_heads_written_out(placed, shifted):
    graph = placed.batch(np.arange(3))
    hidden = torch.arange(graph.num_atoms) % 4 == 1
    shift = torch.randn(int(hidden.sum()), 3) if shifted else None
    targets = torch.randn(3, 5)
    torch.manual_seed(0)
    model = _Pretraining(make_encoder(SMALL_SPATIAL), 5, UNREAD)
    seen = []
    model.encoder.register_forward_hook(lambda *call: seen.append(call[-1].values))
    atoms, molecules = model(graph, hidden, targets, shift)
    (values,) = seen
    truth = graph.atom_features
    terms = [
        F.cross_entropy(model.columns[0](values[hidden]), truth[hidden, 0]),
        F.cross_entropy(model.columns[1](values), truth[:, 4]),
        F.cross_entropy(model.columns[2](values), truth[:, 6]),
    ]
    expected = sum(terms) / 3
    if shifted:
        moved = model.moved(values[hidden])[:, 0]
        expected = expected + F.smooth_l1_loss(moved, shift.square().sum(1).sqrt())
    torch.testing.assert_close(atoms, expected)
    bounds = graph.offsets.tolist()
    sums = torch.stack([values[a:b].sum(0) / 16 for a, b in pairwise(bounds)])
    torch.testing.assert_close(molecules, F.smooth_l1_loss(model.targets(sums), targets))


def test_the_3d_encoder_and_the_blending_learn_and_are_frozen(placed, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder_module, "SPATIAL_CONFIG", SMALL_SPATIAL)
    monkeypatch.setattr(encoder_module, "BLENDING", SMALL_BLENDING)
    losses, fit = [], encoder_module.fit

    def watched(model, loss, **options):
        losses.append([])

        def inner(rng):
            value, figures = loss(rng)
            losses[-1].append(value.item())
            return value, figures

        fit(model, inner, **options)

    monkeypatch.setattr(encoder_module, "fit", watched)
    options = {"steps": 40, "seed": 0, "batch": 16}
    spatial = train_spatial_encoder(placed, tmp_path / "3d.pt", **options)
    torch.manual_seed(5)
    flat = make_encoder(SMALL_ENCODER).freeze()
    parts = {"moleculestm": flat, "unimol": spatial}
    before = {name: {k: v.clone() for k, v in p.state_dict().items()} for name, p in parts.items()}
    blended = train_blending(placed, flat, spatial, tmp_path / "both.pt", **options)
    for curve in losses:
        assert len(curve) == 40 and np.mean(curve[-5:]) < 0.9 * np.mean(curve[:5])
    for made in (spatial, blended):
        assert made.frozen and not made.training
        assert not any(parameter.requires_grad for parameter in made.parameters())
    for name, state in before.items():
        copied = blended.graph_encoder[name].state_dict()
        assert all(torch.equal(copied[key], value) for key, value in state.items()), name
    again = train_blending(placed, flat, spatial, tmp_path / "both.pt", **options)
    assert losses[-1] == []
    state = again.state_dict()
    assert all(torch.equal(state[key], value) for key, value in blended.state_dict().items())
    assert again.config["train_blending"] is False


def test_the_predictor_learns_and_is_frozen(table, tmp_path, monkeypatch):
    monkeypatch.setattr(predictor_module, "CONFIG", SMALL_PREDICTOR)
    predictor = train_predictor(table, tmp_path / "predictor.pt", steps=60, seed=0, batch=16)
    assert not predictor.training and not any(p.requires_grad for p in predictor.parameters())
    assert surprise(predictor, table) < 0.8 * math.log(VOCABULARY_SIZE)


@torch.no_grad()
def test_surprise_is_the_mean_over_atoms_and_ends_in_any_batch(table):
    torch.manual_seed(0)
    predictor = NextAtomPredictor(SMALL_PREDICTOR).eval()
    few = MoleculeTable(*(getattr(table, f) for f in table.__dataclass_fields__))
    total, count = 0.0, 0
    for row in range(len(few)):
        graph = few.batch(np.array([row]))
        logits = predictor(graph.elements, graph.offsets, end=True)
        said = torch.cat([atom_tokens(graph.elements), torch.tensor([EOS])])
        total += F.cross_entropy(logits, said, reduction="sum").item()
        count += len(said)
    for batch in (100, 512):
        assert surprise(predictor, few, batch=batch) == pytest.approx(total / count, rel=1e-5)
