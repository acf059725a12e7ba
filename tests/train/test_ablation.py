"""The ablation of projectors, at a size that teaches nothing."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from edt_former import shipped
from edt_former.chem import read_molecules
from edt_former.connectors import make_connector
from edt_former.tasks.questions import FACTS
from edt_former.train.tiny import ablation
from edt_former.train.tiny.ablation import (
    PROJECTORS,
    PUBLISHED,
    Regressor,
    result_lines,
    run_ablation,
    told_answers,
)
from edt_former.train.tiny.connector import LEVELS, LevelTable, level_config
from edt_former.train.tiny.data import MoleculeTable

TABLE = ["smiles,value"]
TABLE += [f"{'C' * n}{end},{n}" for n in range(1, 30) for end in ("O", "c1ccccc1", "C1CCC1")]


@pytest.fixture
def out(as_shipped, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "STEPS", (2, 2))
    monkeypatch.setattr(ablation, "REAL_STEPS", 2)
    monkeypatch.setattr(ablation, "REAL_BATCH", 8)
    monkeypatch.setattr(ablation, "ASKED", 5)
    kept = (PUBLISHED, "levels, no motifs", "learned mean of levels")
    monkeypatch.setattr(ablation, "PROJECTORS", {name: PROJECTORS[name] for name in kept})
    (tmp_path / "table.csv").write_text("\n".join(TABLE))
    folder = tmp_path / "out"
    shutil.copytree(prepared, folder)
    return folder


def test_every_projector_is_scored_beside_the_published_one(out, corpora, tmp_path, monkeypatch):
    table = tmp_path / "table.csv"
    found = run_ablation(corpora, out, table, "value", seeds=2)
    assert list(found) == ["questions", "value"]
    for task, results in found.items():
        assert list(results) == [PUBLISHED, "levels, no motifs", "learned mean of levels"]
        same = results[PUBLISHED].difference
        assert (same.value, same.low, same.high) == (0, 0, 0)
        for result in results.values():
            assert len(result.by_seed) == 2
            assert result.score.low <= result.score.value <= result.score.high, task
            assert result.score.value == pytest.approx(np.mean(result.by_seed), abs=1e-4)
        assert results[PUBLISHED].parameters > results["levels, no motifs"].parameters
    saved = json.loads((out / "results.json").read_text())
    assert saved["results"]["value"][PUBLISHED]["by_seed"] == found["value"][PUBLISHED].by_seed
    assert len(result_lines(found["value"])) == 3

    monkeypatch.setattr(torch.optim.AdamW, "step", None)
    assert run_ablation(corpora, out, table, "value", seeds=2) == found
    with pytest.raises(ValueError, match="has a run with"):
        run_ablation(corpora, out, table, "value", seeds=3)


def test_all_but_one_write_as_many_tokens():
    counts = {
        name: make_connector({**LEVELS, "llm_width": 8, "encoder_width": 8, **options}).num_anchors
        for name, options in PROJECTORS.items()
    }
    assert counts.pop("levels, no motifs") == 24 and set(counts.values()) == {28}


@pytest.fixture
def small(as_shipped, prepared):
    encoder = shipped.load().graph_encoder
    table = MoleculeTable.load(prepared / "train").take(np.arange(40))
    return LevelTable(table, encoder)


def test_told_answers_are_those_of_the_model_that_is_given_the_key(small):
    model = shipped.load()
    config = level_config(model.graph_encoder, small.num_levels, 16)
    torch.manual_seed(0)
    connector = make_connector(config).eval()
    bank = ablation.QuestionBank.build(model.processor.tokenizer, FACTS)
    answered = told_answers(connector, small, model.language_model, bank)
    assert answered.shape == (40, len(FACTS))
    embedding = model.get_input_embeddings()
    for row, fact in ((3, 0), (20, 7), (39, 22)):
        with torch.no_grad():
            tokens = connector(*small.batch(np.array([row]))).values
            length = int(bank.lengths[fact, 0])
            asked = [*bank.questions[fact, 0, :length].tolist(), int(bank.keys[fact])]
            text = embedding(torch.tensor([bank.bos, *asked]))
            whole = torch.cat([text[:1], tokens, text[1:]])[None]
            said = int(model.language_model(inputs_embeds=whole).logits[0, -1].argmax())
        known = bank.answers[fact, : bank.num_answers[fact]].tolist()
        assert answered[row, fact] == (known.index(said) if said in known else -1)


def test_a_regressor_learns_sizes(small, monkeypatch):
    monkeypatch.setattr(ablation, "REAL_BATCH", 32)
    sizes = np.diff(small.table.offsets).astype(float)
    small.table = MoleculeTable(**{**vars(small.table), "targets": sizes[:, None]})
    torch.manual_seed(0)
    config = level_config(shipped.load().graph_encoder, small.num_levels, 16)
    model = Regressor(make_connector(config), sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng = np.random.default_rng(0)
    for _ in range(60):
        value, _ = model.loss(small, rng)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    error = np.sqrt(np.mean((model.eval().predict(small) - sizes) ** 2))
    assert error < 0.6 * sizes.std()


def test_scaffolds_are_on_one_side_only():
    pairs = read_molecules(["c1ccc2ccccc2c1", "Cc1ccc2ccccc2c1CCO", "C1CCC1", "CC1CCC1"])
    tested = [ablation._is_tested(m) for m in pairs]
    assert tested[0] == tested[1] and tested[2] == tested[3]
    rings = read_molecules([f"C1{'C' * n}C1" for n in range(1, 60)])
    assert 0.05 < np.mean([ablation._is_tested(m) for m in rings]) < 0.4
