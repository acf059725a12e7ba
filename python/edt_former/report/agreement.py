"""How far two ways to cut the same atoms agree."""

from __future__ import annotations

import numpy as np


def adjusted_rand(first: np.ndarray, second: np.ndarray) -> float:
    """Adjusted Rand index (doi:10.1007/BF01908075): 1 for the same partition, about 0 by chance.

    1 where both are a single patch, or both are single atoms.

    Args:
        first: int64 [n], ids of any values.
        second: int64 [n].

    Example:
        >>> round(adjusted_rand(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2])), 3)
        0.571
    """
    table = _contingency(first, second)
    pairs, rows, columns = (_pairs(x) for x in (table, table.sum(1), table.sum(0)))
    every = _pairs(np.array([table.sum()]))
    expected = rows * columns / every if every else 0.0
    most = (rows + columns) / 2
    return 1.0 if most == expected else (pairs - expected) / (most - expected)


def mutual_information(first: np.ndarray, second: np.ndarray) -> float:
    """Normalised mutual information 2 I(a; b) / (H(a) + H(b)), 1 for the same partition.

    1 where both are a single patch.

    Example:
        >>> mutual_information(np.array([0, 0, 1, 1]), np.array([1, 1, 0, 0]))
        1.0
    """
    table = _contingency(first, second)
    joint = table / max(table.sum(), 1)
    entropies = [_entropy(p) for p in (joint.sum(1), joint.sum(0), joint.ravel())]
    total = entropies[0] + entropies[1]
    return 1.0 if total == 0 else float(2 * (total - entropies[2]) / total)


def _contingency(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How many atoms [P, Q] patch p of the one shares with patch q of the other."""
    rows, columns = (np.unique(ids, return_inverse=True) for ids in (first, second))
    table = np.zeros((len(rows[0]), len(columns[0])), dtype=np.int64)
    np.add.at(table, (rows[1], columns[1]), 1)
    return table


def _pairs(counts: np.ndarray) -> float:
    return float((counts * (counts - 1) // 2).sum())


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())
