from __future__ import annotations

import itertools

import pytest
import torch

from edt_kernels import pool_by_id, reference


@pytest.mark.parametrize(
    ("rows", "segments"),
    [*itertools.product([0, 1, 127, 129, 400], [0, 1, 40, 255, 256]), (129, 66_000)],
)
def test_stable_order_and_offsets(rows, segments):
    g = torch.Generator().manual_seed(rows)
    ids = torch.randint(-2, segments + 3, (rows,), generator=g)
    found, right = torch.ops.edt.sort_ids(ids, segments), reference.sort_ids(ids, segments)
    assert all(map(torch.equal, found, right))


def test_ids_of_any_size_and_stride():
    ids = torch.tensor([1 << 40, 3, -(1 << 40), 3, 0, 2**62]).repeat_interleave(2)[::2]
    order, offsets = torch.ops.edt.sort_ids(ids, 4)
    assert order.tolist() == [4, 1, 3, 0, 2, 5]
    assert offsets.tolist() == [0, 1, 1, 1, 3]


@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_pool_by_id(reduce):
    values = torch.arange(300.0).reshape(150, 2)
    ids = torch.arange(150) * 7 % 11 - 1
    pooled = pool_by_id(values, ids, 9, reduce=reduce)
    for p in range(9):
        rows = values[ids == p]
        assert torch.equal(pooled[p], rows.sum(0) if reduce == "sum" else rows.amax(0))
