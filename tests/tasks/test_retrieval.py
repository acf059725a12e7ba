"""Recall, batches and ranking again, against what a loop over pairs says."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from edt_former.connectors.qformer import Rows
from edt_former.data import PreparedData
from edt_former.tasks.retrieval import (
    batches,
    embed,
    matching_scores,
    recall,
    rerank,
    retrieval_scores,
    similarities,
)
from edt_former.tokens import NextAtomPredictor
from edt_former.train.molecules import MoleculeBatch
from edt_former.train.objectives import take_rows
from edt_former.train.stage1 import Stage1Batch, Stage1Model, train_stage1
from tests.train import runs

pytest.importorskip("accelerate", reason="the model comes from training, which needs accelerate")


def test_recall_by_hand():
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert recall(scores, at=(1, 2, 3)) == {
        "recall@1": pytest.approx(1 / 3),
        "recall@2": pytest.approx(2 / 3),
        "recall@3": 1.0,
    }
    assert recall(torch.zeros(4, 4), at=(1, 4)) == {"recall@1": 0.0, "recall@4": 1.0}, "ties lose"
    assert recall(torch.full((4, 4), torch.nan), at=(1, 4)) == {"recall@1": 0.0, "recall@4": 1.0}


def test_batches_have_every_row_once():
    drawn = list(batches(130, 64, seed=3))
    assert [len(batch) for batch in drawn] == [64, 64]
    assert len(torch.cat(drawn).unique()) == 128
    again = list(batches(130, 64, seed=3))
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
    assert not torch.equal(drawn[0], next(iter(batches(130, 64, seed=4))))


@pytest.fixture(scope="module")
def trained(prepared_data, tmp_path_factory, miniature):
    """A model that has seen its rows often, and what it says of them."""
    out = tmp_path_factory.mktemp("trained") / "run"
    training = {"steps": 60, "learning_rate": 1e-2, "save_every": 60, "batch_size": 16}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edt_former.shipped.folder", lambda: miniature)
        folder = train_stage1(
            runs.stage1(out, prepared_data, training=training, connector={"dropout": 0.0})
        )
    model = Stage1Model.from_pretrained(folder)
    data = PreparedData(prepared_data, wants=("text", "molecule"))
    predictor = NextAtomPredictor({"layers": 1, "heads": 2, "width": 16, "positions": 64})
    molecules = MoleculeBatch(model.graph_encoder, model.objective.connector, predictor.eval())
    collate = Stage1Batch(molecules, model.words, max_words=12)
    return model, data, collate, embed(model, data, collate, batch_size=20, progress=False)


def test_similarities_are_those_of_the_objective(trained):
    model, data, collate, found = trained
    batch = collate([data[i] for i in range(7)])
    features = model.graph_encoder(batch["graph"])
    task = model.objective
    hidden = task.connector.read(features, dict(batch["patches"]))
    text = Rows(batch["text_ids"], batch["text_offsets"])
    with torch.no_grad():
        expected = task.similarities(task.graph_features(hidden), task.text_features(text))
    every = similarities(found)
    assert every.shape == (49, 49)
    torch.testing.assert_close(every[:7, :7] / task.temperature, expected, rtol=1e-4, atol=1e-4)


def test_matching_ranks_the_best_candidates_again(trained):
    model, _, _, found = trained
    rows = torch.tensor([4, 9, 2, 30, 17, 8])
    scores = similarities(found)[rows][:, rows]
    queries, keys, words = found.read
    for of_texts in (False, True):
        given = scores.T if of_texts else scores
        ranked = rerank(model, found, rows, given, 3, of_texts=of_texts)
        for i in range(len(rows)):
            best = given[i].topk(3).indices.tolist()
            for j in range(len(rows)):
                graph, text = (rows[j], rows[i]) if of_texts else (rows[i], rows[j])
                if j in best:
                    pair = (take_rows(queries, graph[None]), take_rows(keys, graph[None]))
                    with torch.no_grad():
                        logits = model.objective.matching_logits(
                            *pair, take_rows(words, text[None])
                        )
                    assert ranked[i, j] == pytest.approx(
                        float(given[i, j] + logits[0, 1]), abs=1e-4
                    )
                else:
                    assert (ranked[i, j] < ranked[i, best]).all()
    pairs = matching_scores(model, found, rows, rows.flip(0))
    assert pairs.shape == (6,)


def test_a_trained_model_finds_more_than_chance(trained):
    model, _, _, found = trained
    scores = retrieval_scores(model, found, batch_size=16, candidates=4, progress=False)
    assert set(scores) == {
        *(f"{where}, {way}" for where in ("batches of 16", "all 49") for way in WAYS),
        *(f"batches of 16, {way}, best 4 matched" for way in WAYS),
        "chance in a batch",
    }
    assert scores["chance in a batch"] == {"recall@1": 1 / 16, "recall@5": 5 / 16, "recall@20": 1.0}
    for way in WAYS:
        inside = scores[f"batches of 16, {way}"]
        assert inside["recall@5"] > 1.3 * 5 / 16
        assert inside["recall@1"] <= inside["recall@5"] <= inside["recall@20"] == 1.0
        assert scores[f"all 49, {way}"]["recall@1"] <= inside["recall@1"]
    with pytest.raises(ValueError, match="batch_size must be at most the 49 rows, got 64"):
        retrieval_scores(model, found, progress=False)


WAYS = ("graph to text", "text to graph")


def test_a_perfect_model_finds_everything(trained):
    model, _, _, found = trained
    texts = F.normalize(torch.randn(49, 8), dim=-1)
    signs = torch.tensor([1.0, -1.0]).repeat(49)[:, None]
    queries = Rows(texts.repeat_interleave(2, 0) * signs, 2 * torch.arange(50))
    perfect = replace(found, queries=queries, texts=texts)
    scores = retrieval_scores(model, perfect, batch_size=16, progress=False)
    assert scores["all 49, graph to text"]["recall@1"] == 1.0
    assert scores["all 49, text to graph"]["recall@1"] == 1.0
