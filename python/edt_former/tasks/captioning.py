"""A model of the second stage describes molecules, and is asked how likely true texts are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tqdm import trange

from edt_former.data import PreparedData, Row
from edt_former.model import MoleculeLM
from edt_former.train.config import QuestionConfig
from edt_former.train.conversations import ConversationBatch, question_of


def describe_rows(
    model: MoleculeLM,
    rows: Sequence[Row],
    prompt: QuestionConfig,
    *,
    stored: bool,
    batch_size: int = 32,
    progress: bool = True,
    **generation: Any,
) -> list[str]:
    """What `model` says of the molecules of rows, asked as it was in training.

    Args:
        model: with its processor.
        rows: each with its molecules.
        prompt: the questions.
        stored: the rows hold the patches that the connector reads.
        batch_size: rows that are asked at a time.
        progress: shows a bar.
        generation: of `MoleculeLM.answer`, such as `max_new_tokens` and `num_beams`.
    """
    batch = ConversationBatch(model.processor, prompt, stored=stored)
    texts: list[str] = []
    for start in trange(
        0, len(rows), batch_size, desc="asking", unit="batch", disable=not progress
    ):
        asked = rows[start : start + batch_size]
        batch.remember(asked)
        texts += model.answer(
            [[m.molecule for m in row.molecules] for row in asked],
            [question_of(row, prompt) for row in asked],
            batch_size=batch_size,
            **generation,
        )
    return texts


@torch.no_grad()
def perplexities(
    model: MoleculeLM,
    data: PreparedData,
    prompt: QuestionConfig,
    *,
    stored: bool,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, float]:
    """exp of the mean -log p of a token that the assistant says.

    Args:
        model: with its processor.
        data: rows with conversations or texts.
        prompt: how texts become conversations.
        stored: the rows hold the patches that the connector reads.
        batch_size: rows of a pass.
        seed: of the molecules that are mixed up.
        progress: shows a bar.

    Returns:
        "own molecule"; and "another's molecule", where rows have got each other's: what the
        molecule tells beyond the text. Rows with other than one molecule keep theirs.
    """
    batch = ConversationBatch(model.processor, prompt, stored=stored)
    # Everyone's neighbour in a random ring: nobody keeps a molecule of their own.
    ring = np.random.default_rng(seed).permutation(len(data))
    other = np.empty_like(ring)
    other[ring] = np.roll(ring, 1)
    result = {}
    for setting in ("own molecule", "another's molecule"):
        total, count = 0.0, 0
        for start in trange(
            0, len(data), batch_size, desc=f"perplexity, {setting}", disable=not progress
        ):
            rows = [data[i] for i in range(start, min(start + batch_size, len(data)))]
            if setting != "own molecule":
                rows = [swapped(row, data[int(other[start + i])]) for i, row in enumerate(rows)]
            inputs = batch(rows).to(model.device)
            tokens = int((inputs["labels"] >= 0).sum())
            total += float(model(**inputs).loss) * tokens
            count += tokens
        result[setting] = math.exp(total / count)
    return result


def swapped(row: Row, other: Row) -> Row:
    """`row` with the molecule of `other`, where both have one.

    >>> swapped(Row(0, text="a"), Row(1, text="b")).text
    'a'
    """
    if len(row.molecules) != 1 or len(other.molecules) != 1:
        return row
    return replace(row, molecules=other.molecules)
