"""Graph encoder and next-atom predictor of the recipe."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from edt_former.chem.features import ATOM_FEATURE_SIZES
from edt_former.graph import make_encoder
from edt_former.tokens.predictor import EOS, VOCABULARY_SIZE, NextAtomPredictor, atom_tokens
from edt_former.train.tiny import encoder as encoder_module
from edt_former.train.tiny import predictor as predictor_module
from edt_former.train.tiny.data import MoleculeTable
from edt_former.train.tiny.encoder import MASKED, _Pretraining, train_encoder
from edt_former.train.tiny.predictor import surprise, train_predictor

SMALL_ENCODER = {"name": "gin", "layers": 2, "width": 16}
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
