"""How often answers are right, by type of question, with intervals, and what guessing gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edt_former.tasks.questions import FACTS, QUESTION_TYPES

SIZE_BIN = 5
"""Heavy atoms per bin of the guess that knows a molecule's size."""

_COLUMN = {fact.key: i for i, fact in enumerate(FACTS)}


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers and its 95 % interval.

    >>> print(Accuracy(0.5, 0.4, 0.6))
    0.500 [0.400, 0.600]
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @classmethod
    def of(cls, samples: np.ndarray) -> Accuracy:
        """From a value and its resamples behind it.

        >>> print(Accuracy.of(np.array([0.5, 0.4, 0.6])))
        0.500 [0.405, 0.595]
        """
        low, high = np.percentile(samples[1:], [2.5, 97.5])
        return cls(float(samples[0]), float(low), float(high))


def accuracies(
    answered: np.ndarray, truth: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> dict[str, Accuracy]:
    """Accuracy of each type of question, and "macro", their mean.

    Functional groups count balanced: the mean of the shares right among the molecules that have
    the group and among those that have not, so that the constant answer gets one half. A type
    that asks several facts averages over them. Intervals are percentiles of a bootstrap over
    molecules, so answers about one molecule stay together.

    Args:
        answered: [M, F] index of the given answer into each `Fact.answers`, -1 where the answer
            could not be read (counted as wrong).
        truth: [M, F] index of the true one.

    Raises:
        ValueError: the shapes differ, or there is no molecule.

    >>> truth = np.zeros((4, len(FACTS)), dtype=int)
    >>> accuracies(truth, truth)["macro"].value
    1.0
    """
    samples = resampled_accuracies(answered, truth, resamples=resamples, seed=seed)
    return {name: Accuracy.of(values) for name, values in samples.items()}


def resampled_accuracies(
    answered: np.ndarray, truth: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> dict[str, np.ndarray]:
    """As `accuracies`, but for each type the value and its resamples, [1 + resamples].

    Resamples of one seed draw the same molecules, so differences between two models are paired.

    >>> truth = np.zeros((4, len(FACTS)), dtype=int)
    >>> resampled_accuracies(truth, truth, resamples=3)["macro"].tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    if answered.shape != truth.shape or truth.shape[1:] != (len(FACTS),) or len(truth) == 0:
        raise ValueError(
            f"answered and truth must have shape [M, {len(FACTS)}] with M >= 1, "
            f"got {answered.shape} and {truth.shape}"
        )
    right = answered == truth
    rng = np.random.default_rng(seed)
    molecules = len(truth)
    weights = rng.multinomial(molecules, np.full(molecules, 1 / molecules), size=resamples)
    weights = np.concatenate([np.ones((1, molecules)), weights])

    plain = weights @ right / weights.sum(1, keepdims=True)
    balanced = _balanced(weights, right, truth)
    by_type = {}
    for name, keys in QUESTION_TYPES.items():
        columns = [_COLUMN[key] for key in keys]
        share = balanced if FACTS[columns[0]].kind == "group" else plain
        by_type[name] = np.nanmean(share[:, columns], axis=1)
    by_type["macro"] = np.mean(list(by_type.values()), axis=0)
    return by_type


def _balanced(weights: np.ndarray, right: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """[samples, F] mean over the two truths of the share right; one alone where one is absent."""
    shares = []
    for value in (0, 1):
        members = truth == value
        count = weights @ members
        shares.append(
            np.where(count > 0, weights @ (right & members) / np.maximum(count, 1), np.nan)
        )
    one_alone = np.where(np.isnan(shares[0]), shares[1], shares[0])
    return np.where(np.isnan(shares[0] + shares[1]), one_alone, (shares[0] + shares[1]) / 2)


@dataclass(frozen=True)
class Guesses:
    """The best guesses that the training molecules teach: overall, by size, by token count.

    Attributes:
        constant: [F] answer ids.
        by_size: size bin (heavy atoms // SIZE_BIN) to answer ids [F].
        by_tokens: token count to answer ids [F].

    >>> truth = np.array([[0] * len(FACTS), [1] * len(FACTS)])
    >>> guesses = Guesses.count(truth, sizes=np.array([3, 12]), tokens=np.array([34, 37]))
    >>> answers = guesses.answers(sizes=np.array([4, 30]), tokens=np.array([34, 34]))
    >>> {name: ids[:, 0].tolist() for name, ids in answers.items()}
    {'constant answer': [0, 0], 'majority of the size bin': [0, 1], 'token count alone': [0, 0]}
    """

    constant: list[int]
    by_size: dict[int, list[int]]
    by_tokens: dict[int, list[int]]

    @classmethod
    def count(cls, truth: np.ndarray, sizes: np.ndarray, tokens: np.ndarray) -> Guesses:
        """Best guesses over molecules with answers `truth` [M, F].

        For a functional group, whose accuracy is balanced, the best guess in a bin is "yes" where
        the bin's share of yes exceeds the overall share.
        """
        overall = truth.mean(0)
        bins = sizes // SIZE_BIN
        return cls(
            _best(truth, overall),
            {int(b): _best(truth[bins == b], overall) for b in np.unique(bins)},
            {int(t): _best(truth[tokens == t], overall) for t in np.unique(tokens)},
        )

    def answers(self, sizes: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """What each guess answers for molecules of these sizes and token counts, [M, F] each."""
        return {
            "constant answer": np.tile(self.constant, (len(sizes), 1)),
            "majority of the size bin": _nearest(self.by_size, sizes // SIZE_BIN),
            "token count alone": _nearest(self.by_tokens, tokens),
        }

    def to_json(self) -> dict[str, object]:
        """Plain lists; JSON turns the keys into strings."""
        return {"constant": self.constant, "by_size": self.by_size, "by_tokens": self.by_tokens}

    @classmethod
    def from_json(cls, data: Mapping) -> Guesses:
        """What `to_json` gave."""
        tables = ({int(k): v for k, v in data[name].items()} for name in ("by_size", "by_tokens"))
        return cls(data["constant"], *tables)


def _best(truth: np.ndarray, overall: np.ndarray) -> list[int]:
    return [
        int(column.mean() > share) if fact.kind == "group" else int(np.bincount(column).argmax())
        for fact, column, share in zip(FACTS, truth.T, overall, strict=True)
    ]


def _nearest(table: dict[int, list[int]], keys: np.ndarray) -> np.ndarray:
    """The entry of each key, or of the key nearest to it that the table has."""
    known = np.array(sorted(table))
    nearest = known[np.abs(known[None, :] - keys[:, None]).argmin(1)]
    return np.array([table[int(key)] for key in nearest])
