"""Shares by largest remainder, and patches that are cut on until there are enough."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edt_former.tokens import finer_patches
from edt_former.tokens.finer import allot


@pytest.mark.parametrize(
    ("weights", "most", "total", "shares"),
    [
        pytest.param([1, 1, 2], [9, 9, 9], 7, [2, 2, 3], id="proportion"),
        pytest.param([1, 1], [9, 9], 3, [2, 1], id="ties-by-order"),
        pytest.param([0, 0, 0], [9, 9, 9], 5, [2, 2, 1], id="no-weight"),
        pytest.param([100, 1], [3, 9], 8, [3, 5], id="full-patches-pass-on"),
        pytest.param([5, 5], [1, 1], 9, [1, 1], id="nothing-left-to-cut"),
        pytest.param([1, 2, 3], [9, 9, 9], 2, [1, 1, 1], id="fewer-than-patches"),
        pytest.param([0, 1], [1, 4], 5, [1, 4], id="weight-without-room"),
    ],
)
def test_shares(weights, most, total, shares):
    assert allot(np.array(weights, dtype=float), np.array(most), total).tolist() == shares


@given(
    st.lists(st.tuples(st.floats(0, 10, width=32), st.booleans()), min_size=1, max_size=40),
    st.integers(1, 50),
)
def test_patches(atoms, total):
    entropies = np.array([h for h, _ in atoms])
    ids = np.array([opens for _, opens in atoms]).astype(int)
    ids[0] = 0
    ids = ids.cumsum()
    found = finer_patches(ids, entropies, total)
    count = found[-1] + 1
    assert count == max(ids[-1] + 1, min(total, len(ids)))
    assert found[0] == 0 and set(np.diff(found)) <= {0, 1}
    opened = np.flatnonzero(np.diff(found, prepend=0))
    assert all(i in opened for i in np.flatnonzero(np.diff(ids, prepend=0)))


def test_a_patch_is_cut_where_its_entropy_is_highest():
    ids, entropies = np.array([0, 0, 0, 0, 1, 1]), np.array([9.0, 1.0, 3.0, 2.0, 0.0, 0.0])
    assert finer_patches(ids, entropies, 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert finer_patches(ids, entropies, 4).tolist() == [0, 0, 1, 2, 3, 3]
    assert finer_patches(ids[:0], entropies[:0], 4).tolist() == []
