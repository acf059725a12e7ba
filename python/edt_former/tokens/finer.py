"""Patches with much entropy are cut finer: more queries where there is more to say."""

from __future__ import annotations

import numpy as np


def allot(weights: np.ndarray, most: np.ndarray, total: int) -> np.ndarray:
    """Whole shares [P] of `total`, in proportion to `weights`: one each at least, `most` at most.

    Largest remainders first; where they are equal, the first in order. Where `total` is less than
    P, one each all the same.

    Args:
        weights: [P], not negative.
        most: int64 [P], 1 or more.
        total: to be shared out.

    Example:
        >>> allot(np.array([1.0, 3.0, 0.0]), np.array([9, 9, 9]), 7).tolist()
        [2, 4, 1]
    """
    shares = np.ones(len(weights), dtype=np.int64)
    left = min(total, int(most.sum())) - len(weights)
    while left > 0:
        open_ = shares < most
        weight = np.where(open_, weights, 0.0)
        weight = np.where(open_, 1.0, 0.0) if weight.sum() == 0 else weight
        wanted = left * weight / weight.sum()
        whole = np.minimum(np.floor(wanted).astype(np.int64), most - shares)
        if whole.sum() == 0:
            rest = np.where(open_, wanted, -1.0)
            whole[np.argsort(-rest, kind="stable")[:left]] = 1
            whole = np.minimum(whole, most - shares)
        shares += whole
        left -= int(whole.sum())
    return shares


def finer_patches(ids: np.ndarray, entropies: np.ndarray, total: int) -> np.ndarray:
    """Patch ids [n] of a molecule whose patches are cut on until there are `total`.

    A patch gets pieces in proportion to the sum of its entropies (see `allot`), one at least and
    as many as it has atoms at most; it is cut before its atoms of highest entropy but the first.

    Args:
        ids: int64 [n], not decreasing from 0.
        entropies: [n], not negative.
        total: patches wanted; a molecule that has as many or more stays as it is.

    Example:
        >>> ids, entropies = np.array([0, 0, 0, 1, 1]), np.array([0.1, 2.0, 0.2, 0.3, 0.4])
        >>> finer_patches(ids, entropies, 3).tolist()
        [0, 1, 1, 2, 2]
    """
    if len(ids) == 0:
        return ids
    sizes = np.bincount(ids)
    pieces = allot(np.bincount(ids, weights=entropies), sizes, total)
    opens = np.diff(ids, prepend=ids[0])
    first = np.concatenate([[0], sizes.cumsum()])
    for patch in np.flatnonzero(pieces > 1):
        inner = entropies[first[patch] + 1 : first[patch + 1]]
        highest = np.argsort(-inner, kind="stable")[: pieces[patch] - 1]
        opens[first[patch] + 1 + highest] = 1
    return opens.cumsum()
