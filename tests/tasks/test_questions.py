from __future__ import annotations

import pytest
from rdkit import Chem

from edt_former.chem import FUNCTIONAL_GROUPS, read_molecule
from edt_former.tasks.questions import (
    FACTS,
    QUESTION_TYPES,
    answer_ids,
    answer_text,
    facts,
    match_question,
    parse_answer,
)

COUNTS = [
    "rings",
    "aromatic rings",
    "hydrogen-bond donors",
    "hydrogen-bond acceptors",
    "stereocentres",
    "rotatable bonds",
    "nitrogen atoms",
    "oxygen atoms",
    "sulfur atoms",
    "halogen atoms",
]


@pytest.mark.parametrize(
    ("smiles", "counts", "ranges", "groups"),
    [
        # RDKit counts as acceptors neither the acid's nor the ester's bridging oxygen.
        pytest.param(
            "CC(=O)Oc1ccccc1C(=O)O",
            [1, 1, 1, 3, 0, 2, 0, 4, 0, 0],
            ["0", "1 to 2", "60 to 80"],
            {"carboxylic acid", "ester"},
            id="aspirin",
        ),
        pytest.param(
            "Cn1c(=O)c2c(ncn2C)n(C)c1=O",
            [2, 2, 0, 3, 0, 0, 4, 2, 0, 0],
            ["0", "below 0", "60 to 80"],
            set(),
            id="caffeine",
        ),
        pytest.param(
            "CC(C)Cc1ccc(cc1)C(C)C(=O)O",
            [1, 1, 1, 1, 1, 4, 0, 2, 0, 0],
            ["0", "3 to 4", "below 40"],
            {"carboxylic acid"},
            id="ibuprofen",
        ),
        pytest.param(
            "[NH3+]CC[NH3+].[Cl-]",
            [0, 0, 2, 0, 0, 1, 2, 0, 0, 1],
            ["+1", "below 0", "40 to 60"],
            {"amine"},
            id="charged",
        ),
    ],
)
def test_facts_by_hand(smiles, counts, ranges, groups):
    answers = facts(read_molecule(smiles))
    assert [answers[key] for key in COUNTS] == [str(n) for n in counts]
    assert [answers[key] for key in ("formal charge", "logP", "polar surface area")] == ranges
    assert {key for key in FUNCTIONAL_GROUPS if answers[key] == "yes"} == groups
    assert answers == facts(Chem.MolFromSmiles(smiles))


@pytest.mark.parametrize(
    ("smiles", "key", "answer"),
    [
        pytest.param("C[C@H](O)F", "stereocentres", "1", id="assigned centre"),
        pytest.param("CC(O)F", "stereocentres", "1", id="unassigned centre"),
        pytest.param("N" * 15, "nitrogen atoms", "15", id="last exact count"),
        pytest.param("N" * 16, "nitrogen atoms", "16+", id="first open count"),
        pytest.param("N" * 40, "nitrogen atoms", "16+", id="open count"),
        pytest.param("[Fe+3]", "formal charge", "+3", id="charge"),
        pytest.param("[Ti+4]", "formal charge", "+3", id="clipped charge"),
        pytest.param("[Fe-4]", "formal charge", "-3", id="clipped negative charge"),
        pytest.param("FC(Cl)(Br)I", "halogen atoms", "4", id="every halogen"),
        pytest.param("CS", "sulfur atoms", "1", id="sulfur"),
        pytest.param("C" * 60, "logP", "above 5", id="greasy"),
        pytest.param("OCC(O)C(O)C(O)C(O)CO", "polar surface area", "100 to 140", id="sorbitol"),
        pytest.param("[He]", "rings", "0", id="one atom"),
    ],
)
def test_single_facts(smiles, key, answer):
    assert facts(read_molecule(smiles))[key] == answer


def test_facts_do_not_depend_on_the_writing():
    mol = Chem.MolFromSmiles("CC(C)C[C@H](NC(=O)c1ccc(F)cc1)C(=O)N1CCOCC1")
    expected = answer_ids(mol).tolist()
    for seed in range(5):
        written = Chem.MolToRandomSmilesVect(mol, 1, randomSeed=seed)[0]
        assert answer_ids(read_molecule(written)).tolist() == expected


def test_answer_ids_index_the_answers():
    molecule = read_molecule("CC(=O)Oc1ccccc1C(=O)O")
    ids = answer_ids(molecule)
    assert ids.shape == (len(FACTS),)
    named = [fact.answers[i] for fact, i in zip(FACTS, ids.tolist(), strict=True)]
    assert named == list(facts(molecule).values())
    assert list(facts(molecule)) == [fact.key for fact in FACTS]


def test_the_list_of_facts():
    keys = [fact.key for fact in FACTS]
    assert keys == [*COUNTS, "formal charge", "logP", "polar surface area", *FUNCTIONAL_GROUPS]
    assert len(QUESTION_TYPES) == 11
    assert sorted(key for group in QUESTION_TYPES.values() for key in group) == sorted(keys)
    for fact in FACTS:
        assert len(set(fact.answers)) == len(fact.answers)
        assert {"count": 17, "charge": 7, "group": 2}.get(fact.kind, len(fact.answers)) == len(
            fact.answers
        )


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.key)
def test_every_phrasing_asks_for_its_fact(fact):
    assert 4 <= len(set(fact.phrasings)) == len(fact.phrasings) <= 6
    assert fact.key in fact.phrasings[0]
    for phrasing in fact.phrasings:
        assert phrasing.endswith("?")
        assert any(words in phrasing for words in (fact.key, *fact.synonyms))
        assert match_question(phrasing) == fact.key
        assert match_question("  " + phrasing.upper().replace("?", " ? ")) == fact.key
    for words in (fact.key, *fact.synonyms):
        assert match_question(words) == fact.key


@pytest.mark.parametrize(
    ("text", "key"),
    [
        pytest.param("how many aromatic rings does aspirin have", "aromatic rings", id="longest"),
        pytest.param("how many rings are aromatic?", "aromatic rings", id="turned round"),
        pytest.param("any nitro groups?", "nitro group", id="plural"),
        pytest.param("tell me the log P", "logP", id="synonym"),
        pytest.param("How many heteroaromatic rings?", None, id="narrowed"),
        pytest.param("How many five-membered rings?", None, id="narrowed by two words"),
        pytest.param("How many rings and donors?", None, id="two facts"),
        pytest.param("How many rings are there in it?", "rings", id="are there"),
        pytest.param("How many chiral centers does it have?", "stereocentres", id="does it"),
        pytest.param("Are there any hydroxyl groups present?", "hydroxyl group", id="groups"),
        pytest.param("How many ring atoms does it have?", None, id="narrowed behind"),
        pytest.param("How many rings are heteroaromatic?", None, id="narrowed by a verb"),
        pytest.param("How many of the rings are saturated?", None, id="some of the"),
        pytest.param("How many rings in it are aromatic?", None, id="narrowed at the end"),
        pytest.param("How many chiral centres have R configuration?", None, id="narrowed by have"),
        pytest.param("How many amide bonds are there?", None, id="another noun"),
        pytest.param("How many hydroxyl groups are there?", None, id="number of yes or no"),
        pytest.param("What is the number of ester groups?", None, id="number of esters"),
        pytest.param("Is it toxic, whether or not?", None, id="no fact"),
        pytest.param("", None, id="empty"),
    ],
)
def test_match_question(text, key):
    assert match_question(text) == key


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.key)
def test_statements_come_back(fact):
    for answer in fact.answers:
        text = answer_text(fact.key, answer)
        assert text == f"{fact.key}: {answer}"
        for written in (text, text + ".", text.upper(), f" {text}\nrings: 9", f"{text}, ether: no"):
            assert parse_answer(written) == (fact.key, answer)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("three rings", id="no statement"),
        pytest.param("rings: 17", id="no such count"),
        pytest.param("rings: 3.5", id="fraction"),
        pytest.param("rings: -1", id="negative"),
        pytest.param("formal charge: 1", id="charge without its sign"),
        pytest.param("ester: yesterday", id="longer word"),
        pytest.param("strings: 3", id="key inside a word"),
        pytest.param("rings: many. aromatic rings: 2", id="only the first statement counts"),
    ],
)
def test_unparsable_answers(text):
    assert parse_answer(text) is None


def test_answer_text_refuses_what_is_no_answer():
    with pytest.raises(ValueError, match="key must be one of"):
        answer_text("colour", "blue")
    with pytest.raises(ValueError, match="answer to 'rings' must be one of 0, 1"):
        answer_text("rings", "17")
