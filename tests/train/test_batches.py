"""Which rows a step has: all of them in turn, alike for any number of processes, balanced."""

from itertools import islice, pairwise

import numpy as np
import pytest

from edt_former.train.batches import Batches

COSTS = np.random.default_rng(0).integers(1, 100, 50)


def steps(count: int, **options) -> list[list[list[int]]]:
    """By step and pass, the rows."""
    batches = Batches(steps=count, **{"costs": COSTS, "rows": 50, **options})
    flat = iter(list(batches))
    return [list(islice(flat, batches.accumulation)) for _ in range(count)]


def test_an_epoch_has_every_row_once_and_the_next_another_order():
    first = [row for step in steps(5, batch_size=10) for row in step[0]]
    assert sorted(first) == list(range(50))
    both = [row for step in steps(10, batch_size=10) for row in step[0]]
    assert both[:50] == first and sorted(both[50:]) == list(range(50)) and both[50:] != first
    assert len(Batches(COSTS, 50, batch_size=8, steps=7, accumulation=2)) == 14


def test_processes_and_passes_share_the_rows_of_one_big_batch():
    whole = [sorted(step[0]) for step in steps(6, batch_size=12)]
    parts = [steps(6, batch_size=3, accumulation=2, ranks=2, rank=rank) for rank in (0, 1)]
    for step, expected in enumerate(whole):
        rows = [row for rank in parts for passed in rank[step] for row in passed]
        assert sorted(rows) == expected


def test_processes_have_about_as_many_tokens():
    def spread(costs):
        ranks = [
            list(Batches(costs, 50, batch_size=8, steps=6, ranks=3, rank=rank)) for rank in range(3)
        ]
        sums = np.array([[COSTS[rows].sum() for rows in rank] for rank in ranks])
        return (sums.max(0) - sums.min(0)).mean()

    assert spread(COSTS) < 0.3 * spread(None)


def test_passes_have_rows_of_similar_length():
    for step in steps(6, batch_size=4, accumulation=3):
        ranges = sorted((COSTS[rows].min(), COSTS[rows].max()) for rows in step)
        assert all(low[1] <= high[0] for low, high in pairwise(ranges))


def test_a_seed_is_an_order():
    assert steps(5, batch_size=10, seed=1) == steps(5, batch_size=10, seed=1)
    assert steps(5, batch_size=10, seed=1) != steps(5, batch_size=10, seed=2)


def test_a_step_must_fit():
    with pytest.raises(ValueError, match="must be at most the 50 rows there are, got 60"):
        Batches(None, 50, batch_size=30, steps=1, ranks=2)
