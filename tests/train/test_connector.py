"""Connectors of the recipe: frozen features, and the two stages of training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edt_former.chem import motif_features
from edt_former.connectors import MoleculeTokens, make_connector
from edt_former.graph import GraphBatch, MotifFeatures, make_encoder
from edt_former.tasks.questions import FACTS, QUESTION_TYPES
from edt_former.tokens import NextAtomPredictor
from edt_former.train.tiny import connector as recipe
from edt_former.train.tiny.conformers import PlacedTable
from edt_former.train.tiny.connector import (
    FeatureTable,
    LevelTable,
    connector_configs,
    level_config,
    question_odds,
    read_features,
    train_connector,
)
from edt_former.train.tiny.data import MoleculeTable
from edt_former.train.tiny.fact_tokens import fact_embeddings
from edt_former.train.tiny.packing import QuestionBank
from edt_former.train.tiny.reader import ReaderConfig, build_reader
from edt_former.train.tiny.vocabulary import build_tokenizer

SMALL = {"width": 32, "layers": 1, "heads": 2, "ffn": 32, "dropout": 0.0, "sum_tokens": 1}


@pytest.fixture(scope="module")
def table(prepared) -> MoleculeTable:
    return MoleculeTable.load(prepared / "train")


@pytest.fixture(scope="module")
def frozen():
    torch.manual_seed(0)
    encoder = make_encoder({"name": "gin", "layers": 1, "width": 16})
    predictor = NextAtomPredictor({"layers": 1, "heads": 2, "width": 16, "positions": 64})
    return encoder.freeze(), predictor.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def features(table, frozen) -> FeatureTable:
    return read_features(table, *frozen, batch=100)


@pytest.fixture(scope="module")
def language_model():
    torch.manual_seed(0)
    config = ReaderConfig(width=32, intermediate=32, layers=1, heads=2)
    return build_reader(build_tokenizer(FACTS), config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def bank() -> QuestionBank:
    return QuestionBank.build(build_tokenizer(FACTS), FACTS)


@pytest.fixture
def config(monkeypatch) -> dict:
    monkeypatch.setattr(recipe, "SIZES", SMALL)
    return connector_configs(16, 32, 40)["edt_former"]


@torch.no_grad()
def test_features_are_what_the_frozen_parts_say(table, frozen, features):
    rows = np.array([7, 0, 7, len(table) - 1])
    encoder, predictor = frozen
    graph = table.batch(rows)
    atoms, found = features.batch(rows)
    assert torch.equal(atoms.offsets, graph.offsets)
    torch.testing.assert_close(atoms.values, encoder(graph).values, rtol=2e-3, atol=2e-3)
    _, patches = predictor.patches(graph.elements, graph.offsets, **recipe.PATCHES.cutting())
    patches = patches.trim()
    for name in ("ids", "atom_offsets", "patch_offsets", "count"):
        assert torch.equal(getattr(found["entropy"], name), getattr(patches, name)), name
    assert features.patch_counts[rows].tolist() == patches.patch_offsets.diff().tolist()


@torch.no_grad()
def test_a_connector_reads_features_as_it_reads_molecules(table, frozen, features, config):
    torch.manual_seed(1)
    connector = make_connector(config).eval()
    rows = np.arange(5)
    encoder, predictor = frozen
    graph = table.batch(rows)
    _, patches = predictor.patches(graph.elements, graph.offsets)
    live = connector(encoder(graph), {"entropy": patches.trim()})
    stored = connector(*features.batch(rows))
    assert torch.equal(live.offsets, stored.offsets)
    torch.testing.assert_close(stored.values, live.values, rtol=0, atol=1e-2)


@torch.no_grad()
def test_features_of_two_views_are_read_as_the_encoder_gives_them(prepared, frozen, tmp_path):
    """Rows of every view, and where the atoms are in each: a connector is given the same."""
    table = MoleculeTable.load(prepared / "train").take(np.array([5, 3, 8, 1, 0]))
    places = np.random.default_rng(0).normal(size=(table.offsets[-1], 3)).astype(np.float32)
    placed = PlacedTable(**vars(table), coordinates=places)
    torch.manual_seed(0)
    small = {"layers": 1, "width": 16, "heads": 2}
    spatial = {**small, "ffn": 8, "gaussians": 4}
    blended = make_encoder(
        {"name": "blended", "flat": frozen[0].config, "spatial": spatial, **small}
    ).freeze()
    features = read_features(placed, blended, frozen[1], batch=2)
    assert features.num_views == 2
    for rows in (np.array([4, 0, 2]), np.array([1])):
        live, (stored, _) = blended(placed.batch(rows)), features.batch(rows)
        assert torch.equal(stored.offsets, live.offsets)
        assert all(map(torch.equal, stored.views, live.views))
        torch.testing.assert_close(stored.values, live.values, rtol=2e-3, atol=2e-3)


def test_configs_differ_in_their_queries_only():
    configs = connector_configs(16, 32, 40)
    assert list(configs) == ["edt_former", "qformer_32", "qformer_40"]
    assert [c["num_queries"] for c in configs.values()] == [32, 32, 40]
    own = {"name", "num_queries", "patches"}
    shared = [{k: v for k, v in c.items() if k not in own} for c in configs.values()]
    assert shared[0] == shared[1] == shared[2]
    assert all(c["num_queries"] >= len(FACTS) for c in configs.values())
    assert all(make_connector(c).config["sum_tokens"] for c in configs.values())


def test_types_of_question_weigh_the_same_and_so_do_the_truths_of_a_group():
    rng = np.random.default_rng(0)
    answers = rng.integers(0, 2, size=(1000, len(FACTS)))
    amide = next(i for i, fact in enumerate(FACTS) if fact.key == "amide")
    answers[:, amide] = rng.random(1000) < 0.2
    weights = question_odds(answers)
    share = answers[:, amide].mean()
    expected = torch.tensor([0.5 / (1 - share), 0.5 / share]) / 10**0.5
    torch.testing.assert_close(weights[amide, :2], expected.float())
    for i, fact in enumerate(FACTS):
        kind = next(keys for keys in QUESTION_TYPES.values() if fact.key in keys)
        if fact.kind != "group":
            assert (weights[i] == weights[i, 0]).all()
            assert weights[i, 0] == pytest.approx(len(kind) ** -0.5)


def test_rare_groups_do_not_weigh_without_bound():
    weights = question_odds(np.zeros((10, len(FACTS)), dtype=np.int8))
    assert torch.isfinite(weights).all() and (weights > 0).all() and weights.max() <= 4


def test_alignment_teaches_queries_to_write_their_fact(
    config, features, language_model, bank, tmp_path, monkeypatch
):
    figures = watch(monkeypatch)
    train_connector(
        config,
        features,
        language_model,
        bank,
        tmp_path,
        label="toy",
        steps=(40, 1),
        seed=0,
        lr=1e-2,
    )
    nats = [step["nats"] for step in figures[0]]
    right = [step["right"] for step in figures[0]]
    assert np.mean(nats[-5:]) < 0.7 * np.mean(nats[:5])
    assert np.mean(right[-5:]) > right[0] + 0.2


def test_answering_teaches_the_language_models_answers(
    config, features, language_model, bank, tmp_path, monkeypatch
):
    figures = watch(monkeypatch)
    before = {name: p.clone() for name, p in language_model.named_parameters()}
    connector = train_connector(
        config,
        features,
        language_model,
        bank,
        tmp_path,
        label="toy",
        steps=(1, 20),
        seed=0,
        lr=1e-2,
    )
    nats = [step["nats"] for step in figures[1]]
    assert np.mean(nats[-4:]) < np.mean(nats[:4])
    assert all(torch.equal(p, before[name]) for name, p in language_model.named_parameters())
    assert not connector.training
    assert not any(p.requires_grad for p in connector.parameters())


def watch(monkeypatch) -> list[list[dict[str, float]]]:
    """The figures of every step, by stage."""
    stages = []
    fit = recipe.fit

    def watched(model, loss, **options):
        seen: list[dict[str, float]] = []
        stages.append(seen)

        def inner(rng):
            value, figures = loss(rng)
            seen.append(figures)
            return value, figures

        fit(model, inner, **options)

    monkeypatch.setattr(recipe, "fit", watched)
    monkeypatch.setattr(recipe._Answering, "BATCH", 8)
    return stages


class Killed(Exception):
    pass


def test_a_killed_stage_goes_on_to_the_same_connector(
    config, features, language_model, bank, tmp_path, monkeypatch
):
    monkeypatch.setattr(recipe._Alignment, "BATCH", 8)
    monkeypatch.setattr(recipe._Answering, "BATCH", 4)
    settings = {"label": "toy", "steps": (4, 4), "seed": 0}
    parts = (config, features, language_model, bank)
    whole = train_connector(*parts, tmp_path / "whole", **settings)

    fit = recipe.fit

    def dying(model, loss, **options):
        calls = iter(range(3))

        def inner(rng):
            if next(calls, None) is None:
                raise Killed
            return loss(rng)

        fit(model, inner, save_every=2, **options)

    monkeypatch.setattr(recipe, "fit", dying)
    for _ in range(2):  # once in each stage
        with pytest.raises(Killed):
            train_connector(*parts, tmp_path / "cut", **settings)
    monkeypatch.setattr(recipe, "fit", fit)
    resumed = train_connector(*parts, tmp_path / "cut", **settings)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == [
        "toy.stage1.pt",
        "toy.stage2.pt",
    ]


@pytest.fixture(scope="module")
def levels(table, frozen) -> LevelTable:
    return LevelTable(table, frozen[0])


def test_levels_and_motifs_of_a_batch_are_those_of_its_molecules(table, frozen, levels):
    rows = np.array([7, 0, 7, len(table) - 1])
    found, patches = levels.batch(rows)
    assert patches == {} and levels.num_levels == len(found.levels) == 2
    molecules = table.molecules(rows)
    motifs = MotifFeatures.pack(motif_features(molecules))
    assert all(map(torch.equal, found.motifs, motifs))
    live = frozen[0].with_levels(table.batch(rows))
    for stored, level in zip(found.levels, live.levels, strict=True):
        torch.testing.assert_close(stored, level, rtol=2e-3, atol=2e-3)
    with torch.no_grad():
        values = frozen[0](GraphBatch.pack(molecules)).values
    torch.testing.assert_close(found.values, values, rtol=2e-3, atol=2e-3)


def test_any_token_of_llamo_may_learn_to_write_any_fact(
    frozen, levels, language_model, bank, tmp_path, monkeypatch
):
    figures = watch(monkeypatch)
    config = level_config(frozen[0], levels.num_levels, 32)
    config |= {"level_queries": 16, "width": 32}
    parts = (config, levels, language_model, bank, tmp_path)
    train_connector(*parts, label="toy", steps=(60, 2), seed=0, lr=1e-2)
    nats, writers = ([step[name] for step in figures[0]] for name in ("nats", "writers"))
    assert np.mean(nats[-5:]) < 0.7 * np.mean(nats[:5])
    assert writers[-1] > 8, "facts find tokens of their own"
    assert set(figures[1][0]) == {"nats", "right"}


def test_facts_are_dealt_to_the_tokens_that_write_them(frozen, levels, language_model, bank):
    """Tokens that say every truth, in any order, have no loss but that of the sharpness."""
    rows = np.arange(4)
    same = np.repeat(levels.answers[:1], len(levels), 0)
    embedding = language_model.get_input_embeddings().weight
    facts = torch.arange(len(FACTS))
    said = fact_embeddings(embedding, bank, facts, torch.from_numpy(same[0].astype(np.int64)))

    class Writes(torch.nn.Module):
        def forward(self, features, patches):
            return MoleculeTokens(said[order].repeat(len(features.offsets) - 1, 1), None)

    order = torch.randperm(len(FACTS))
    levels.answers, answers = same, levels.answers
    try:
        align = recipe._FreeAlignment(Writes(), levels, embedding, bank)
        align.BATCH = len(rows)
        _, figures = align(np.random.default_rng(0))
    finally:
        levels.answers = answers
    assert figures["right"] == 1 and figures["writers"] == len(FACTS)
    assert figures["away"] == pytest.approx(0, abs=1e-5)
