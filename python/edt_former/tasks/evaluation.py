"""Ask a model every question about every molecule, and read its answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tqdm import trange

from edt_former.chem import Molecule
from edt_former.model import MoleculeLM
from edt_former.tasks.questions import FACTS, parse_answer

UNREADABLE = -1
LONGEST_ANSWER = 8
"""Tokens; an answer is a key, a value and the end."""


def answer_questions(
    model: MoleculeLM,
    molecules: Sequence[Molecule],
    *,
    batch_size: int = 256,
    progress: bool = True,
) -> np.ndarray:
    """What `model` answers to every fact's canonical question about every molecule.

    Returns:
        int64 [M, F], index into `Fact.answers`; -1 where the text is no answer to the question.
    """
    pairs = [(molecule, fact) for molecule in molecules for fact in FACTS]
    texts: list[str] = []
    for start in trange(
        0, len(pairs), batch_size, desc="asking", unit="batch", disable=not progress
    ):
        asked = pairs[start : start + batch_size]
        texts += model.answer(
            [molecule for molecule, _ in asked],
            [fact.phrasings[0] for _, fact in asked],
            batch_size=batch_size,
            max_new_tokens=LONGEST_ANSWER,
        )
    ids = [read_answer(text, fact.key) for text, (_, fact) in zip(texts, pairs, strict=True)]
    return np.array(ids, dtype=np.int64).reshape(len(molecules), len(FACTS))


def without_molecule(model: MoleculeLM) -> np.ndarray:
    """What the language model answers when it is given no molecule, int64 [F]."""
    processor = model.processor
    prompts = [processor.prompt(fact.phrasings[0], molecules=0) for fact in FACTS]
    generated = model.generate(**processor(prompts), do_sample=False, max_new_tokens=LONGEST_ANSWER)
    texts = processor.decode(generated)
    return np.array([read_answer(t, fact.key) for t, fact in zip(texts, FACTS, strict=True)])


def read_answer(text: str, key: str) -> int:
    """Index of the answer that a text gives to the question for `key`; -1 where it gives none.

    >>> read_answer("rings: 3", "rings"), read_answer("rings: 3", "amide"), read_answer("?", "rings")
    (3, -1, -1)
    """
    said = parse_answer(text)
    if said is None or said[0] != key:
        return UNREADABLE
    fact = next(fact for fact in FACTS if fact.key == key)
    lowered = [answer.lower() for answer in fact.answers]
    return lowered.index(said[1]) if said[1] in lowered else UNREADABLE
