"""Rows of a file with answers: every row comes back, in order, with its reason if it has none."""

from __future__ import annotations

import numpy as np
import pytest

from edt_former import shipped
from edt_former.chem import Conformer, ConformerPool, read_molecule
from edt_former.model import MoleculeLM
from edt_former.report.answers import AnsweredRow, answer_rows
from edt_former.tasks.questions import FACT_BY_KEY

KEYS = ("rings", "amide")
NO_CONFORMER = "F[C@]12C[C@@](F)(C1)C2"
"""Its two chiral centres contradict one another."""
LONG = "C" * 1000
"""Its tokens are more than the miniature's language model reads, if half of its atoms peak."""


@pytest.fixture(scope="module")
def model(miniature) -> MoleculeLM:
    return MoleculeLM.from_pretrained(miniature / "edt_former")


def ask(model, smiles, **options) -> list[AnsweredRow]:
    return list(answer_rows(model, [("", text) for text in smiles], KEYS, **options))


def test_rows_that_cannot_be_read_stay_in_their_place(model):
    rows = [
        ("ethanol", "CCO"),
        ("broken", "C1CC"),
        ("", "CC(=O)N"),
        ("nothing", ""),
        ("pentavalent", "CC(C)(C)(C)C"),
        ("benzene", "c1ccccc1"),
    ]
    found = list(answer_rows(model, rows, KEYS, chunk=2))
    assert [row.smiles for row in found] == [smiles for _, smiles in rows]
    assert [row.name for row in found] == [name or smiles for name, smiles in rows]
    assert [bool(row.reason) for row in found] == [False, True, False, True, True, False]
    assert found[1].reason == "unclosed ring" and found[3].reason == "empty SMILES"
    for row in (found[1], found[3], found[4]):
        assert row.answers is None and row.truth is None and row.atoms == 0
    assert [row.atoms for row in found if not row.reason] == [3, 4, 6]
    assert found[2].truth == {"rings": "0", "amide": "yes"}
    assert found[5].truth == {"rings": "1", "amide": "no"}


def test_answers_do_not_depend_on_the_neighbours(model):
    smiles = ["CCO", "c1ccccc1", "bad", "CC(=O)N", "CCN"]
    together = ask(model, smiles)
    assert ask(model, smiles, chunk=1) == together
    assert [ask(model, [text])[0] for text in smiles] == together
    assert all(set(row.answers) == set(KEYS) for row in together if not row.reason)


def test_tokens_are_anchors_and_patches(model):
    for row in ask(model, ["C", "CCO", "CC(=O)Oc1ccccc1C(=O)O"]):
        assert row.tokens == 4 + row.patches == model.processor.token_counts([row.smiles])[0]
        assert 1 <= row.patches <= row.atoms


def test_a_static_connector_has_no_patches(miniature):
    model = MoleculeLM.from_pretrained(miniature / "qformer_32")
    (row,) = ask(model, ["CCO"])
    assert (row.tokens, row.patches) == (4, 0)


def test_a_large_molecule_is_answered_among_small_ones(model):
    found = ask(model, ["CCO", LONG, "CCN"])
    assert [row.atoms for row in found] == [3, 1000, 3] and not any(row.reason for row in found)


def test_a_molecule_without_room_in_the_prompt_has_a_reason(model, monkeypatch):
    monkeypatch.setattr(type(model), "max_positions", 70)
    found = ask(model, ["C", "CCOCCNCCOCCNCCOCC", "O"])
    assert [bool(row.reason) for row in found] == [False, True, False]
    assert found[1].reason.startswith("takes ") and found[1].reason.endswith("reads 70")


@pytest.fixture(scope="module")
def spatial(miniature) -> MoleculeLM:
    return MoleculeLM.from_pretrained(miniature / "edt_former_3d")


def test_a_molecule_without_a_conformer_has_a_reason_where_one_is_read(model, spatial):
    smiles = ["CCO", NO_CONFORMER, "bad", "CCN"]
    assert [bool(row.reason) for row in ask(model, smiles)] == [False, False, True, False]
    for options in ({}, {"chunk": 1}, {"workers": 2}):
        found = ask(spatial, smiles, **options)
        assert [bool(row.reason) for row in found] == [False, True, True, False]
        assert "embed" in found[1].reason and found[1].smiles == NO_CONFORMER


def test_conformers_that_the_processor_has_are_not_made_again(spatial, monkeypatch):
    molecule = read_molecule("CCCF")
    spatial.processor.keep_conformers([molecule], [Conformer(np.eye(4, 3, dtype=np.float32))])
    made = []
    monkeypatch.setattr(ConformerPool, "make", lambda _, items: made.extend(items) or [])
    (row,) = ask(spatial, ["CCCF"])
    assert row.answers is not None and made == []


def test_an_answer_is_the_value_where_the_model_keeps_to_the_form(model, monkeypatch):
    said = {FACT_BY_KEY["rings"].phrasings[0]: "rings: 2", FACT_BY_KEY["amide"].phrasings[0]: "??"}
    monkeypatch.setattr(model, "answer", lambda _, questions, **__: [said[q] for q in questions])
    (row,) = ask(model, ["CCO"])
    assert row.answers == {"rings": "2", "amide": "??"}


def test_a_file_is_read_as_it_is_asked(model):
    """Rows are taken chunk by chunk, so a file of any length fits."""
    taken = []

    def rows():
        for i in range(10):
            taken.append(i)
            yield "", "C"

    answered = answer_rows(model, rows(), KEYS, chunk=4)
    next(answered)
    assert len(taken) == 4
    assert len(list(answered)) == 9


def test_no_rows_give_nothing(model):
    assert ask(model, []) == [] and ask(model, ["bad", ""])[1].reason


def test_the_shipped_model_knows_aspirin():
    if not shipped.connectors():
        pytest.skip("the trained models are not in this checkout")
    (row,) = answer_rows(shipped.load(), [("Aspirin", "CC(=O)Oc1ccccc1C(=O)O")], ("rings", "ester"))
    assert row.answers == row.truth
