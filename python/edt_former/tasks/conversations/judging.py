"""What is wrong with a conversation about a molecule, as far as a program can tell."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from edt_former.tasks.conversations.context import Context
from edt_former.tasks.questions import FACT_BY_KEY, match_question

LONGEST_QUESTION, LONGEST_ANSWER = 400, 1600
"""Characters."""
MOST_TURNS = 10
SHORTEST_SMILES = 5
"""Characters; shorter ones are words and symbols as well."""

_SOURCES = re.compile(
    r"\b(according to|(based on|in|from)) the (given |provided )?(caption|description|context|"
    r"smiles|facts|information|text)\b|\bas an ai\b|\bi (cannot|can't) see\b",
    re.IGNORECASE,
)
_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen"),
)
_NUMBER = re.compile(rf"(?<![\w.,-])(\d+|{'|'.join(_WORDS)})(?![\w-]|[.,]\d)", re.IGNORECASE)
_NONE = re.compile(r"\b(no|none|not|any|without|lacks?)\b", re.IGNORECASE)
_YES, _NO = re.compile(r"^\W*yes\b", re.IGNORECASE), re.compile(r"^\W*no\b", re.IGNORECASE)


class Turn(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


def objection(context: Context, turns: Sequence[Turn]) -> str:
    """Why a conversation is dropped, "" where nothing is found against it.

    Refused are: none or too many turns; empty or overly long ones; a question asked twice; the
    molecule's SMILES in a question or an answer, for it is to be read from the molecule itself;
    words about where the writer has it from; and answers to questions for a count or a group that
    contradict RDKit.

    >>> ethanol = Context("0:0", smiles="CCO", facts={"rings": "0"})
    >>> objection(ethanol, [Turn("How many rings does it have?", "It has two rings.")])
    'contradicts RDKit: rings: 0, said: It has two rings.'
    """
    if not 1 <= len(turns) <= MOST_TURNS:
        return f"{len(turns)} turns, 1 to {MOST_TURNS} are taken"
    for number, turn in enumerate(turns, start=1):
        for what, text, most in (
            ("question", turn.question, LONGEST_QUESTION),
            ("answer", turn.answer, LONGEST_ANSWER),
        ):
            if not text.strip():
                return f"{what} {number} is empty"
            if len(text) > most:
                return f"{what} {number} is longer than {most} characters"
            if len(context.smiles) >= SHORTEST_SMILES and context.smiles in text:
                return f"{what} {number} has the SMILES"
            if found := _SOURCES.search(text):
                return f"{what} {number} speaks of its source: {found[0]}"
        if contradiction := _contradiction(context, turn):
            return contradiction
    asked = [" ".join(turn.question.lower().split()) for turn in turns]
    if len(set(asked)) < len(asked):
        return "a question is asked twice"
    return ""


def _contradiction(context: Context, turn: Turn) -> str:
    key = match_question(turn.question)
    truth = context.facts.get(key) if key else None
    if truth is None:
        return ""
    kind = FACT_BY_KEY[key].kind
    if kind == "count":
        wrong = _wrong_count(turn.answer, truth)
    elif kind == "group":
        wrong = bool((_NO if truth == "yes" else _YES).search(turn.answer))
    else:
        wrong = False
    return f"contradicts RDKit: {key}: {truth}, said: {turn.answer[:80]}" if wrong else ""


def _wrong_count(answer: str, truth: str) -> bool:
    """An answer names numbers, and the truth is not among them."""
    said = {_value(found) for found in _NUMBER.findall(answer)}
    if not said:
        return False
    if truth.endswith("+"):
        return max(said) < int(truth[:-1])
    return int(truth) not in said and not (truth == "0" and bool(_NONE.search(answer)))


def _value(word: str) -> int:
    return int(word) if word.isdigit() else _WORDS.index(word.lower())
