"""Asking a model every question, and reading what it says."""

from __future__ import annotations

import numpy as np
import pytest

from edt_former import shipped
from edt_former.chem import read_molecules
from edt_former.tasks.accuracy import accuracies
from edt_former.tasks.evaluation import answer_questions, read_answer, without_molecule
from edt_former.tasks.questions import FACTS, answer_ids, answer_text, facts, match_question

MOLECULES = read_molecules(["CCO", "c1ccccc1", "CC(=O)N", "[Na+]"])


class Scripted:
    """Answers like a model of whom it is known what it says."""

    def __init__(self, say) -> None:
        self.say, self.asked = say, []

    def answer(self, molecules, questions, **_):
        pairs = list(zip(molecules, questions, strict=True))
        self.asked += pairs
        return [self.say(molecule, match_question(question)) for molecule, question in pairs]


def truthful(molecule, key: str) -> str:
    return answer_text(key, facts(molecule)[key])


def test_the_truth_is_read_back_from_any_batch():
    truth = np.stack([answer_ids(molecule) for molecule in MOLECULES])
    for batch_size in (1, 7, 256):
        model = Scripted(truthful)
        found = answer_questions(model, MOLECULES, batch_size=batch_size, progress=False)
        assert np.array_equal(found, truth)
        assert found.dtype == np.int64
        assert model.asked == [(m, fact.phrasings[0]) for m in MOLECULES for fact in FACTS]
    assert accuracies(found, truth)["macro"].value == 1.0


def test_what_is_no_answer_counts_as_wrong():
    model = Scripted(lambda molecule, key: "amide: yes" if key != "rings" else "I do not know")
    found = answer_questions(model, MOLECULES[:1], progress=False)[0]
    amide = next(i for i, fact in enumerate(FACTS) if fact.key == "amide")
    assert found[amide] == 1
    assert (np.delete(found, amide) == -1).all()


def test_no_molecules_give_no_answers():
    assert answer_questions(Scripted(truthful), [], progress=False).shape == (0, len(FACTS))


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.key)
def test_every_answer_is_read_back(fact):
    for i, answer in enumerate(fact.answers):
        assert read_answer(answer_text(fact.key, answer).lower(), fact.key) == i


@pytest.mark.parametrize("text", ["", "rings", "rings: many", "aromatic rings: 2", "rings: 3.5"])
def test_other_texts_are_no_answer(text):
    assert read_answer(text, "rings") == -1


def test_the_baseline_without_molecule_sees_none():
    model = Scripted(lambda molecules, key: f"{key}: 0" if molecules == [] else f"{key}: 1")
    found = without_molecule(model)
    zero = [fact.answers.index("0") if "0" in fact.answers else -1 for fact in FACTS]
    assert found.tolist() == zero


def test_a_model_of_random_weights_is_asked_and_answers_something(as_shipped):
    model = shipped.load()
    assert answer_questions(model, MOLECULES[:2], progress=False).shape == (2, len(FACTS))
    assert without_molecule(model).shape == (len(FACTS),)
