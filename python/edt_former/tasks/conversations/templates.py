"""Conversations from built-in templates: captions, names and facts, no model."""

from __future__ import annotations

import numpy as np

from edt_former.tasks.conversations.context import Context
from edt_former.tasks.conversations.judging import Turn
from edt_former.tasks.questions import FACTS, Fact

CAPTION_QUESTIONS = (
    "Describe the molecule.",
    "What can you tell me about this molecule?",
    "What is this compound?",
    "Give me a short description of the molecule.",
    "What is known about this compound?",
)
NAME_QUESTIONS = (
    "What is its IUPAC name?",
    "Name the molecule by the rules of IUPAC.",
    "What is the systematic name of this compound?",
)
NAME_ANSWERS = ("Its IUPAC name is {}.", "It is {}.", "The systematic name is {}.")


def template_turns(context: Context, *, turns: int = 4, seed: int = 0) -> list[Turn]:
    """A conversation of at most `turns` questions: the caption and the name first, then facts.

    Which facts, and how they are asked for, is drawn from the seed and the context's key.

    >>> ethanol = Context("0:0", smiles="CCO", facts={"rings": "0", "hydroxyl group": "yes"})
    >>> for turn in template_turns(ethanol, turns=2):
    ...     print(turn.question, "/", turn.answer)
    Count the rings of this molecule, how many are there? / The molecule has no rings.
    Does this compound contain a hydroxyl group? / Yes, it has a hydroxyl group.
    """
    rng = np.random.default_rng((seed, *map(int, context.key.split(":"))))
    found = []
    if context.caption:
        found.append(Turn(str(rng.choice(CAPTION_QUESTIONS)), context.caption))
    if context.iupac:
        question, answer = rng.choice(NAME_QUESTIONS), rng.choice(NAME_ANSWERS)
        found.append(Turn(str(question), str(answer).format(context.iupac)))
    known = [fact for fact in FACTS if fact.key in context.facts]
    for index in rng.permutation(len(known))[: max(0, turns - len(found))]:
        fact = known[index]
        found.append(Turn(str(rng.choice(fact.phrasings)), fact_sentence(fact, context.facts)))
    return found[:turns]


def fact_sentence(fact: Fact, values: dict[str, str]) -> str:
    """The true answer about a fact as a sentence.

    >>> from edt_former.tasks.questions import FACT_BY_KEY
    >>> [fact_sentence(FACT_BY_KEY["rings"], {"rings": n}) for n in ("0", "1", "16+")]
    ['The molecule has no rings.', 'The molecule has 1 ring.', 'The molecule has 16 or more rings.']
    >>> fact_sentence(FACT_BY_KEY["logP"], {"logP": "1 to 2"})
    'The logP is between 1 and 2.'
    """
    value = values[fact.key]
    if fact.kind == "count":
        what = fact.key.removesuffix("s") if value == "1" else fact.key
        number = {"0": "no"}.get(value, value.replace("+", " or more"))
        return f"The molecule has {number} {what}."
    if fact.kind == "charge":
        return f"Its formal charge is {value}."
    if fact.kind == "range":
        low, between, high = value.partition(" to ")
        return f"The {fact.key} is {f'between {low} and {high}' if between else value}."
    article = "an" if fact.key[0] in "aeiou" else "a"
    if value == "yes":
        return f"Yes, it has {article} {fact.key}."
    return f"No, there is no {fact.key} in the molecule."
