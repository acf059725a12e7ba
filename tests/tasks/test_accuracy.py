"""Accuracy by type of question against numbers computed by hand."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from edt_former.tasks.accuracy import SIZE_BIN, Accuracy, Guesses, accuracies
from edt_former.tasks.questions import FACT_BY_KEY, FACTS, QUESTION_TYPES

COLUMN = {fact.key: i for i, fact in enumerate(FACTS)}
GROUPS = [i for i, fact in enumerate(FACTS) if fact.kind == "group"]


def zeros(molecules: int) -> np.ndarray:
    return np.zeros((molecules, len(FACTS)), dtype=np.int64)


def test_types_cover_every_fact_once():
    asked = [key for keys in QUESTION_TYPES.values() for key in keys]
    assert sorted(asked) == sorted(FACT_BY_KEY)


def test_plain_types_are_shares_of_right_answers():
    truth, answered = zeros(4), zeros(4)
    answered[0, COLUMN["rings"]] = 3
    answered[:2, COLUMN["nitrogen atoms"]] = -1
    answered[:, COLUMN["halogen atoms"]] = 1
    found = accuracies(answered, truth)
    assert found["ring count"].value == 0.75
    assert found["hetero atoms"].value == pytest.approx((0.5 + 1 + 1 + 0) / 4)
    assert found["logP"] == Accuracy(1.0, 1.0, 1.0)


def test_functional_groups_are_balanced():
    """One of two molecules with the group right, two of three without: (1/2 + 2/3) / 2."""
    truth, answered = zeros(5), zeros(5)
    amide = COLUMN["amide"]
    truth[:, amide] = [1, 1, 0, 0, 0]
    answered[:, amide] = [1, 0, 0, 0, 1]
    found = accuracies(answered, truth)["functional groups"].value
    assert found == pytest.approx((9 * 1.0 + (1 / 2 + 2 / 3) / 2) / 10)


@pytest.mark.parametrize("constant", [0, 1])
def test_a_constant_answer_gets_half_of_the_groups(constant):
    truth = np.random.default_rng(0).integers(0, 2, size=(50, len(FACTS)))
    truth[:2] = [[0], [1]]
    answered = np.full_like(truth, constant)
    assert accuracies(answered, truth)["functional groups"].value == pytest.approx(0.5)


def test_a_group_that_no_molecule_has_counts_the_others():
    truth, answered = zeros(3), zeros(3)
    answered[0, GROUPS] = 1
    found = accuracies(answered, truth)["functional groups"]
    assert found.value == pytest.approx(2 / 3)
    assert np.isfinite([found.low, found.high]).all()


def test_macro_is_the_mean_over_types():
    rng = np.random.default_rng(1)
    truth, answered = rng.integers(0, 2, size=(2, 30, len(FACTS)))
    found = accuracies(answered, truth)
    macro = found.pop("macro")
    assert list(found) == list(QUESTION_TYPES)
    assert macro.value == pytest.approx(np.mean([a.value for a in found.values()]))


def test_interval_agrees_with_the_binomial_and_repeats_with_the_seed():
    truth, answered = zeros(400), zeros(400)
    answered[:100, COLUMN["rings"]] = 1
    found = accuracies(answered, truth)["ring count"]
    half = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    assert found.low == pytest.approx(0.75 - half, abs=0.01)
    assert found.high == pytest.approx(0.75 + half, abs=0.01)
    assert accuracies(answered, truth)["ring count"] == found
    assert accuracies(answered, truth, seed=1)["ring count"] != found


def test_interval_resamples_molecules_not_answers():
    """Facts of one molecule stand or fall together, so more of them do not narrow the interval."""
    truth, answered = zeros(40), zeros(40)
    hetero = [COLUMN[key] for key in QUESTION_TYPES["hetero atoms"]]
    answered[:20, hetero] = 1
    answered[:20, COLUMN["rings"]] = 1
    found = accuracies(answered, truth)
    assert found["hetero atoms"] == found["ring count"]


def test_one_molecule_has_an_interval_of_no_width():
    found = accuracies(zeros(1), zeros(1))
    assert set(found.values()) == {Accuracy(1.0, 1.0, 1.0)}


def test_accuracy_reads_as_share_and_interval():
    assert str(Accuracy(0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"


@pytest.mark.parametrize(
    ("answered", "truth"),
    [
        pytest.param(zeros(0), zeros(0), id="no molecule"),
        pytest.param(zeros(2), zeros(3), id="other molecules"),
        pytest.param(zeros(2)[:, :5], zeros(2)[:, :5], id="other facts"),
    ],
)
def test_shapes_are_checked(answered, truth):
    got = re.escape(f"got {answered.shape} and {truth.shape}")
    with pytest.raises(ValueError, match=rf"answered and truth must have shape \[M, 23\].*{got}"):
        accuracies(answered, truth)


@pytest.fixture
def guesses() -> Guesses:
    """Small molecules have 1 ring and no amide, large ones 4 rings and half of them an amide."""
    truth = zeros(6)
    truth[:, COLUMN["rings"]] = [1, 1, 1, 1, 4, 4]
    truth[:, COLUMN["amide"]] = [0, 0, 0, 0, 0, 1]
    sizes = np.array([5, 6, 7, 9, 30, 32])
    return Guesses.count(truth, sizes, np.array([33, 33, 34, 34, 40, 40]))


def test_guesses_are_the_likeliest_answers(guesses):
    assert SIZE_BIN == 5
    assert guesses.constant[COLUMN["rings"]] == 1
    assert {b: ids[COLUMN["rings"]] for b, ids in guesses.by_size.items()} == {1: 1, 6: 4}
    assert {t: ids[COLUMN["rings"]] for t, ids in guesses.by_tokens.items()} == {
        33: 1,
        34: 1,
        40: 4,
    }


def test_guess_of_a_group_is_yes_where_it_is_commoner_than_overall(guesses):
    amide = COLUMN["amide"]
    assert guesses.constant[amide] == 0
    assert guesses.by_size[1][amide] == 0 and guesses.by_size[6][amide] == 1


def test_an_unknown_size_takes_the_nearest_known(guesses):
    found = guesses.answers(np.array([1, 16, 25, 500]), np.array([1, 36, 38, 99]))
    assert found["constant answer"][:, COLUMN["rings"]].tolist() == [1, 1, 1, 1]
    assert found["majority of the size bin"][:, COLUMN["rings"]].tolist() == [1, 1, 4, 4]
    assert found["token count alone"][:, COLUMN["rings"]].tolist() == [1, 1, 4, 4]
    assert all(answers.shape == (4, len(FACTS)) for answers in found.values())


def test_guesses_survive_json(guesses):
    assert Guesses.from_json(json.loads(json.dumps(guesses.to_json()))) == guesses
