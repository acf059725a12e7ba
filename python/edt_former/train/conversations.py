"""Rows of prepared data as conversations that a language model learns from."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence

import numpy as np

from edt_former.chem import Conformer
from edt_former.data import PreparedData, Row
from edt_former.language.prompt import Message
from edt_former.processor import ModelInputs, MoleculeProcessor, TooLongError
from edt_former.train.config import QuestionConfig

logger = logging.getLogger(__name__)

SMILES = "{smiles}"
CHARACTERS_PER_TOKEN, ATOMS_PER_TOKEN = 4, 3
"""About; for the balance of processes only."""


def question_of(row: Row, config: QuestionConfig) -> str:
    """What is asked about the molecules of a row that has a text.

    >>> question_of(Row(number=1), QuestionConfig(questions=("What is it?", "Describe it.")))
    'Describe it.'
    """
    question = config.questions[row.number % len(config.questions)]
    return question.replace(SMILES, ".".join(m.molecule.smiles for m in row.molecules))


def messages_of(row: Row, config: QuestionConfig) -> list[Message]:
    """The conversation of a row: its own, or a question that its text answers.

    >>> row = Row(number=0, text="An alcohol.")
    >>> [message["role"] for message in messages_of(row, QuestionConfig(system="Be brief."))]
    ['system', 'user', 'assistant']
    """
    if row.turns is not None:
        return [{"role": role, "content": content} for role, content in row.turns]
    messages = [{"role": "system", "content": config.system}] if config.system else []
    messages.append({"role": "user", "content": question_of(row, config)})
    messages.append({"role": "assistant", "content": row.text})
    return messages


def row_costs(data: PreparedData) -> np.ndarray:
    """About how many tokens every row has."""
    return data.characters() // CHARACTERS_PER_TOKEN + data.atoms() // ATOMS_PER_TOKEN


class ConversationBatch:
    """Rows with a conversation or a text become a batch of a `MoleculeLM`.

    A row whose molecules leave no room for what is to be learned is left out, with a warning.

    Args:
        processor: of the model.
        prompt: how texts become conversations.
        stored: the rows hold the patches that the connector reads.
        max_length: tokens of a row, what is longer loses the end of its text; None for what the
            language model reads.
    """

    def __init__(
        self,
        processor: MoleculeProcessor,
        prompt: QuestionConfig,
        *,
        stored: bool,
        max_length: int | None = None,
    ) -> None:
        self.processor = copy.copy(processor)
        if max_length is not None:
            self.processor.max_length = max_length
        self.prompt, self.stored = prompt, stored

    def __call__(self, rows: Sequence[Row]) -> ModelInputs:
        """The arguments of `MoleculeLM.forward`, with labels for what the assistant says.

        Raises:
            TooLongError: no row has room.
        """
        self.remember(rows)
        try:
            return self._inputs(rows)
        except TooLongError:
            fitting = [row for row in rows if self._fits(row)]
            if not fitting:
                raise
            return self._inputs(fitting)

    def _fits(self, row: Row) -> bool:
        try:
            self._inputs([row])
        except TooLongError as error:
            logger.warning("row %d (%s) is left out: %s", row.number, row.id or "no id", error)
            return False
        return True

    def _inputs(self, rows: Sequence[Row]) -> ModelInputs:
        messages = [messages_of(row, self.prompt) for row in rows]
        molecules = [[m.molecule for m in row.molecules] for row in rows]
        return self.processor.conversations(messages, molecules, truncate=True)

    def remember(self, rows: Sequence[Row]) -> None:
        """Hands the processor what the rows know of their molecules."""
        prepared = [m for row in rows for m in row.molecules]
        if self.stored:
            self.processor.keep_patches(
                [m.molecule for m in prepared], [m.patches for m in prepared]
            )
        if self.processor.conformers is not None:
            placed = [m for m in prepared if m.coordinates is not None]
            self.processor.keep_conformers(
                [m.molecule for m in placed],
                [Conformer(m.coordinates, flat=m.flat) for m in placed],
            )
