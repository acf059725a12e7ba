"""Review by people: a sample of conversations with a rubric, and what they scored."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edt_former.tasks.accuracy import Accuracy

RUBRIC: Mapping[str, str] = {
    "correct": "0 a statement is wrong, 1 imprecise or beyond what can be known, 2 all is right",
    "grounded": "0 could be said of any molecule, 1 partly of this one, 2 all of this one",
    "useful": "0 trivial or repeated questions, 1 some are worth asking, 2 all are",
    "fluent": "0 hard to read, 1 stilted, 2 as a chemist would say it",
}
"""Criteria, and what their scores mean."""
SCORES = ("0", "1", "2")
HIGHEST = 2
RESAMPLES = 1000


@dataclass(frozen=True)
class Reviewed:
    """Scores of a sample.

    Attributes:
        count: conversations with scores.
        unscored: without any.
        means: of each criterion, from 0 to 1, with 95 % intervals of a bootstrap over
            conversations.
        faultless: the share that has the highest score everywhere.
    """

    count: int
    unscored: int
    means: dict[str, Accuracy]
    faultless: Accuracy


def draw_sample(conversations: Path | str, out: Path | str, *, count: int, seed: int = 0) -> int:
    """Draws conversations into a table for people to score; how many there are.

    Args:
        conversations: a .jsonl file.
        out: a .csv file, with an empty column per criterion of `RUBRIC`, and one for comments.
        count: of conversations; all where there are fewer.
        seed: of the sample.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no conversations.
    """
    path = Path(conversations)
    with path.open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file if line.strip()]
    if not lines:
        raise ValueError(f"{path} must have conversations, there are none")
    drawn = random.Random(seed).sample(lines, min(count, len(lines)))
    with Path(out).open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["id", "smiles", "conversation", *RUBRIC, "comment"])
        for line in drawn:
            said = "\n".join(f"{m['role']}: {m['content']}" for m in line["messages"])
            table.writerow([line["id"], line["smiles"], said, *[""] * (len(RUBRIC) + 1)])
    return len(drawn)


def score_sample(table: Path | str, *, seed: int = 0) -> Reviewed:
    """What people scored in a table of `draw_sample`; rows without any score are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, a row is scored in part, or a score is none. It names the
            row, as `draw_sample` wrote them, from 1.
    """
    with Path(table).open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = [name for name in RUBRIC if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{table} has no column {missing[0]!r}")
        rows = [[(row[name] or "").strip() for name in RUBRIC] for row in reader]
    scored = []
    for number, row in enumerate(rows, start=1):
        if not any(row):
            continue
        for name, score in zip(RUBRIC, row, strict=True):
            if score not in SCORES:
                raise ValueError(
                    f"row {number}, {name} must be one of {', '.join(SCORES)}, got {score!r}"
                )
        scored.append([int(score) for score in row])
    if not scored:
        raise ValueError(f"{table} has no scores")
    values = np.array(scored) / HIGHEST
    columns = {name: _interval(values[:, i], seed) for i, name in enumerate(RUBRIC)}
    faultless = _interval((values == 1).all(1).astype(float), seed)
    return Reviewed(len(scored), len(rows) - len(scored), columns, faultless)


def _interval(values: np.ndarray, seed: int) -> Accuracy:
    drawn = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(1), [2.5, 97.5])
    return Accuracy(float(values.mean()), float(low), float(high))
