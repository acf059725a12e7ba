from __future__ import annotations

import math

import pytest
import torch

from edt_kernels import find_patches, reference
from edt_kernels.ops.find_patches import options

RULES = [
    pytest.param({"rule": "local_max"}, id="local_max"),
    pytest.param({"rule": "published"}, id="published"),
    pytest.param({"rule": "rising_edge", "q": 0.4}, id="rising_edge-0.4"),
    pytest.param({"rule": "rising_edge", "q": 1.0}, id="rising_edge-1"),
    pytest.param({"rule": "threshold", "threshold": 1.0}, id="threshold"),
    pytest.param({"rule": "monotonic", "threshold": 0.3}, id="monotonic"),
]
LIMITS = [
    pytest.param({}, id="free"),
    pytest.param({"min_size": 3}, id="min3"),
    pytest.param({"max_size": 4}, id="max4"),
    pytest.param({"max_patches": 3}, id="patches3"),
    pytest.param({"min_size": 2, "max_size": 5, "max_patches": 4}, id="all"),
    pytest.param({"max_patches": 1}, id="patches1"),
]


def pack(lengths=(0, 7, 1, 0, 2, 31, 33, 129), dtype=torch.float32, levels=None, seed=0):
    """Entropies with NaN in the tail, and offsets; `levels` makes ties likely."""
    g = torch.Generator().manual_seed(seed)
    h = torch.rand(sum(lengths) + 4, generator=g, dtype=torch.float64) * 3
    if levels:
        h = (h / 3 * levels).floor()
    h[sum(lengths) :] = torch.nan
    return h.to(dtype), torch.tensor([0, *lengths]).cumsum(0)


def assert_as_reference(h, offsets, **given):
    found = find_patches(h, offsets, **given)
    defaults = {"q": 0.75, "threshold": None, "min_size": 1, "max_size": None}
    cut = options(**defaults | {"max_patches": None} | given)
    capacity = cut.capacity(len(h), len(offsets) - 1)
    right = reference.find_patches(h, offsets, *cut, capacity)
    *indices, threshold = (x for x in found if x is not None)
    assert all(x.dtype == torch.int64 for x in indices)
    assert all(map(torch.equal, indices, right))
    # The interpreter rounds between the two steps of a fused multiplication and addition.
    torch.testing.assert_close(threshold, right[4], equal_nan=True)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("levels", [None, 4], ids=["distinct", "ties"])
def test_rules_and_limits(rule, limits, levels):
    assert_as_reference(*pack(levels=levels), **rule, **limits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_every_dtype_offsets_and_strides(rule, dtype):
    h, offsets = pack((31, 0, 130), dtype)
    h = torch.stack([h, h], 1)[:, 0]
    assert_as_reference(h, offsets.int(), **rule, max_patches=5)


@pytest.mark.parametrize("limits", [LIMITS[0], LIMITS[4]])
@pytest.mark.parametrize("rule", RULES)
def test_nan_and_infinities(rule, limits):
    h, offsets = pack((30, 140, 9))
    h[[0, 5, 6, 29, 40, 169]] = torch.nan
    h[[3, 60, 61]], h[[8, 90]], h[175] = math.inf, -math.inf, -0.0
    assert_as_reference(h, offsets, **rule, **limits)


def test_a_plateau_across_blocks():
    h = torch.ones(300)
    h[0], h[299] = 0, 0.5
    h[140:] = 2
    assert_as_reference(torch.cat([h, h]), torch.tensor([0, 299, 600]))


@pytest.mark.parametrize("rule", [RULES[0], RULES[1]])
def test_a_molecule_is_cut_alike_alone(rule):
    h, offsets = pack((30, 0, 150, 17))
    ids = find_patches(h, offsets, **rule, max_patches=6).ids
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        alone = find_patches(h[begin:end], torch.tensor([0, end - begin]), **rule, max_patches=6)
        assert torch.equal(alone.ids, ids[begin:end])


def test_more_molecules_than_one_program_numbers():
    assert_as_reference(*pack(tuple(i % 3 for i in range(150))), max_size=1)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0), (1,)], ids=str)
@pytest.mark.parametrize("rule", [RULES[0], RULES[1]])
def test_nothing_to_cut(rule, lengths):
    h, offsets = pack(lengths)
    for x in (h, h[: offsets[-1]]):
        assert_as_reference(x, offsets, **rule, min_size=2, max_size=3, max_patches=2)
