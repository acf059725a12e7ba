"""Agreement of partitions against counts by hand, and scikit-learn where it is installed."""

import numpy as np
import pytest

from edt_former.report.agreement import adjusted_rand, mutual_information


def by_pairs(a, b):
    """Adjusted Rand index from the definition, over all pairs."""
    pairs = [(i, j) for i in range(len(a)) for j in range(i)]
    same_a = np.array([a[i] == a[j] for i, j in pairs])
    same_b = np.array([b[i] == b[j] for i, j in pairs])
    expected = same_a.sum() * same_b.sum() / len(pairs)
    return ((same_a & same_b).sum() - expected) / ((same_a.sum() + same_b.sum()) / 2 - expected)


def test_adjusted_rand_counts_pairs():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(4, size=(2, 12))
        assert adjusted_rand(a, b) == pytest.approx(by_pairs(a, b))


@pytest.mark.parametrize("measure", [adjusted_rand, mutual_information])
def test_equal_partitions_agree(measure):
    a = np.array([3, 3, 1, 1, 7])
    assert measure(a, a) == pytest.approx(1)
    assert measure(a, -a) == pytest.approx(1)
    assert measure(np.zeros(4, int), np.zeros(4, int)) == 1
    assert measure(np.zeros(0, int), np.zeros(0, int)) == 1


def test_independent_partitions_share_nothing():
    a, b = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    assert mutual_information(a, b) == pytest.approx(0)
    assert adjusted_rand(a, b) == pytest.approx(-0.5)
    assert adjusted_rand(np.arange(4), np.zeros(4, int)) == 0


def test_as_in_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    for _ in range(20):
        a, b = rng.integers(5, size=(2, 30))
        assert adjusted_rand(a, b) == pytest.approx(metrics.adjusted_rand_score(a, b))
        expected = metrics.normalized_mutual_info_score(a, b)
        assert mutual_information(a, b) == pytest.approx(expected)
