"""WordPieces of texts."""

import os
from pathlib import Path

import pytest

from edt_former.train.words import SPECIAL, Words


def test_texts_become_ids_without_padding():
    words = Words([*SPECIAL, "ring", "##s", "two"])
    ids, offsets = words(["Two rings", "two", ""])
    assert ids.tolist() == [2, 7, 5, 6, 3, 2, 7, 3, 2, 3] and offsets.tolist() == [0, 5, 8, 10]
    ids, offsets = words(["two two two rings"], max_words=4)
    assert ids.tolist() == [2, 7, 7, 3], "[SEP] stays"


def test_learned_words_come_back(tmp_path):
    texts = ["a chain of carbon carbon oxygen"] * 3 + ["a ring of nitrogen"]
    words = Words.learn(texts, 60)
    words.save(tmp_path)
    again = Words.read(tmp_path / "vocab.txt")
    assert again.pieces == words.pieces and again.begin_id == len(words.pieces) == words.size - 1
    assert again(texts)[0].tolist() == words(texts)[0].tolist()
    assert Words.learn(texts, 60).pieces == words.pieces
    odd = Words([*SPECIAL, "a\u2028b", "c"])
    odd.save(tmp_path)
    assert Words.read(tmp_path / "vocab.txt").pieces == odd.pieces


def test_a_vocabulary_must_be_whole():
    with pytest.raises(ValueError, match=r"this one lacks \[MASK\]"):
        Words(SPECIAL[:-1])
    with pytest.raises(ValueError, match="has a piece twice"):
        Words([*SPECIAL, "a", "a"])


def test_the_published_vocabulary_has_the_published_ids():
    if "EDT_SHARED" not in os.environ:
        pytest.skip("EDT_SHARED (folder of public data) is not set")
    words = Words.read(Path(os.environ["EDT_SHARED"], "data/scibert_vocab/vocab.txt"))
    assert (words.begin_id, words.size) == (31_090, 31_091)
    assert words(["the"])[0].tolist() == [102, 111, 103]
