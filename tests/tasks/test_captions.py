"""Scores of captions: the published outputs get their recorded values, and edges hold."""

import csv
import gzip
import math
import os
from pathlib import Path

import pytest

from edt_former.tasks import captions
from edt_former.tasks.captions import Pieces, caption_scores

for name in ("nltk", "rouge_score", "sacrebleu"):
    pytest.importorskip(name, reason="scores of captions need nltk, rouge-score and sacrebleu")

RECORDED = {
    "small": {"bleu2": 0.5315, "bleu4": 0.4449},
    "large": {"bleu2": 0.5877, "bleu4": 0.5023},
}
ROUGE = {"rouge1": 0.6210, "rouge2": 0.4699, "rougeL": 0.5639}
"""Of the small one."""


@pytest.fixture
def pieces(tmp_path) -> Pieces:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "an", "acid", "##s", "alcohol", "."]
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(words) + "\n")
    return Pieces(file)


@pytest.mark.parametrize("size", RECORDED)
def test_published_outputs_get_their_recorded_scores(size):
    if "EDT_SHARED" not in os.environ:
        pytest.skip("EDT_SHARED (folder of public data) is not set")
    data = Path(os.environ["EDT_SHARED"], "data")
    file = data / f"metric_fixtures/molt5-{size}-smiles2caption.txt.gz"
    with gzip.open(file, "rt") as lines:
        _, *rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    assert len(rows) == 3300
    pieces = Pieces(data / "scibert_vocab/vocab.txt")
    true, said = [row[1] for row in rows], [row[2] for row in rows]
    bleu = captions.need("nltk.translate.bleu_score", extra="eval", purpose="")
    cut = [[tokens] for tokens in pieces(true)], pieces(said)
    found = {
        "bleu2": bleu.corpus_bleu(*cut, weights=(0.5, 0.5)),
        "bleu4": bleu.corpus_bleu(*cut, weights=(0.25,) * 4),
    }
    for name, value in found.items():
        assert value == pytest.approx(RECORDED[size][name], abs=5e-5), name


def test_rouge_of_published_outputs():
    if "EDT_SHARED" not in os.environ:
        pytest.skip("EDT_SHARED (folder of public data) is not set")
    file = Path(os.environ["EDT_SHARED"], "data/metric_fixtures/molt5-small-smiles2caption.txt.gz")
    with gzip.open(file, "rt") as lines:
        _, *rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    found = captions._rouge([row[1] for row in rows], [row[2] for row in rows])
    for name, value in found.items():
        assert value == pytest.approx(ROUGE[name], abs=5e-5), name


def test_pieces_are_lower_case_cut_and_without_special_words(pieces):
    assert pieces(["An Acids", "ether", ""]) == [["an", "acid", "##s"], ["[UNK]"], []]
    assert len(pieces(["acid " * 600])[0]) == 510


def test_the_same_is_perfect_and_nothing_is_nothing(pieces):
    true = ["an alcohol . an acid .", "an acid . an alcohol ."]
    best = caption_scores(true, true, pieces)
    for name in ("bleu2", "bleu4", "rouge1", "rouge2", "rougeL"):
        assert best[name] == pytest.approx(1.0), name
    assert best["sacrebleu"] == pytest.approx(100.0)
    worst = caption_scores(true, ["", ""], pieces)
    for name in ("bleu2", "bleu4", "rouge1", "rougeL", "sacrebleu"):
        assert worst[name] == pytest.approx(0.0, abs=1e-6), name


def test_bleu_by_hand(pieces):
    """Unigrams 3/4 and bigrams 1/3 of four tokens, as long as the reference."""
    found = caption_scores(["an acid an alcohol"], ["an acid alcohol ."], pieces)
    assert found["bleu2"] == pytest.approx(math.sqrt(3 / 4 * 1 / 3))


def test_meteor_without_wordnet_is_nan(pieces, monkeypatch):
    meteor = pytest.importorskip("nltk.translate.meteor_score")

    def missing(*_):
        raise LookupError("wordnet")

    monkeypatch.setattr(meteor, "meteor_score", missing)
    assert math.isnan(caption_scores(["an acid"], ["an acid"], pieces)["meteor"])
    monkeypatch.setattr(meteor, "meteor_score", lambda true, said: 0.25 * len(said))
    found = caption_scores(["an acid", "an"], ["an acid", "an"], pieces)
    assert found["meteor"] == pytest.approx((0.5 + 0.25) / 2), "the mean over captions"


def test_errors(pieces, tmp_path):
    with pytest.raises(ValueError, match="one per reference, at least one; got 1 and 2"):
        caption_scores(["a", "b"], ["a"], pieces)
    with pytest.raises(ValueError, match="got 0 and 0"):
        caption_scores([], [], pieces)
    with pytest.raises(FileNotFoundError, match="no such file"):
        Pieces(tmp_path / "none.txt")
