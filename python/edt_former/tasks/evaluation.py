"""Ask a model every question about every molecule, and read its answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tqdm import trange

from edt_former.chem import Molecule
from edt_former.model import MoleculeLM
from edt_former.tasks.accuracy import Accuracy, Guesses, accuracies
from edt_former.tasks.questions import FACT_BY_KEY, FACTS, value_of

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

    >>> import edt_former
    >>> from edt_former.chem import read_molecules
    >>> molecules = read_molecules(["CCO", "c1ccccc1"])
    >>> answered = answer_questions(edt_former.load(), molecules, progress=False)
    >>> answered.shape == (2, len(FACTS))
    True
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
    texts = model.answer(
        [[] for _ in FACTS],
        [fact.phrasings[0] for fact in FACTS],
        batch_size=len(FACTS),
        max_new_tokens=LONGEST_ANSWER,
    )
    return np.array([read_answer(t, fact.key) for t, fact in zip(texts, FACTS, strict=True)])


def compare(
    model: MoleculeLM,
    molecules: Sequence[Molecule],
    truth: np.ndarray,
    guesses: Guesses,
    *,
    progress: bool = True,
) -> dict[str, dict[str, Accuracy]]:
    """Accuracies by type of question of "model" and of every baseline, in that order.

    Args:
        model: with its processor.
        molecules: M of them.
        truth: int64 [M, F], see `edt_former.tasks.questions.answer_ids`.
        guesses: of the training molecules.
        progress: show a bar.
    """
    sizes = np.array([molecule.num_atoms for molecule in molecules])
    tokens = np.array(model.processor.token_counts(molecules))
    answered = {
        "model": answer_questions(model, molecules, progress=progress),
        "language model without molecule": np.tile(without_molecule(model), (len(truth), 1)),
        **guesses.answers(sizes, tokens),
    }
    return {who: accuracies(given, truth) for who, given in answered.items()}


def read_answer(text: str, key: str) -> int:
    """Index of the answer that a text gives to the question for `key`; -1 where it gives none.

    >>> [read_answer(text, "rings") for text in ("rings: 3", "amide: yes", "?")]
    [3, -1, -1]
    """
    value = value_of(text, key)
    if value is None:
        return UNREADABLE
    return [answer.lower() for answer in FACT_BY_KEY[key].answers].index(value)
