from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from edt_kernels import find_patches, reference
from edt_kernels.ops.find_patches import options

RULES = {
    "local_max": {"rule": "local_max"},
    "published": {"rule": "published"},
    "rising_edge-0.4": {"rule": "rising_edge", "q": 0.4},
    "rising_edge-1": {"rule": "rising_edge", "q": 1.0},
    "threshold": {"rule": "threshold", "threshold": 1.0},
    "monotonic": {"rule": "monotonic", "threshold": 0.3},
}
LIMITS = {
    "free": {},
    "min3": {"min_size": 3},
    "max4": {"max_size": 4},
    "patches3": {"max_patches": 3},
    "all": {"min_size": 2, "max_size": 5, "max_patches": 4},
    "patches1": {"max_patches": 1},
}


def pack(lengths=(0, 31, 1, 33, 0, 2, 129), dtype=torch.float32):
    """Entropies with NaN in the tail, and offsets; there are ties in every second row of 32."""
    g = torch.Generator().manual_seed(0)
    h = torch.rand(sum(lengths) + 4, generator=g, dtype=torch.float64) * 3
    h = torch.where(torch.arange(len(h)) // 32 % 2 == 0, h, h.floor())
    h[sum(lengths) :] = torch.nan
    return h.to(dtype), torch.tensor([0, *lengths]).cumsum(0)


def assert_as_reference(h, offsets, **given):
    found = find_patches(h, offsets, **given)
    defaults = {"rule": "local_max", "q": 0.75, "threshold": None, "min_size": 1}
    cut = options(**defaults | {"max_size": None, "max_patches": None} | given)
    capacity = cut.capacity(len(h), len(offsets) - 1)
    right = reference.find_patches(h, offsets, *cut, capacity)
    *indices, threshold = (x for x in found if x is not None)
    assert all(x.dtype == torch.int64 for x in indices)
    assert all(map(torch.equal, indices, right))
    # The interpreter rounds between the two steps of a fused multiplication and addition.
    torch.testing.assert_close(threshold, right[4], equal_nan=True)


@pytest.mark.parametrize(
    ("rule", "limits"),
    # The two kinds of deciding atom with every limit, the other rules without and with all.
    [*product(["local_max", "published"], LIMITS), *product([*RULES][2:], ["free", "all"])],
)
def test_rules_and_limits(rule, limits):
    assert_as_reference(*pack(), **RULES[rule], **LIMITS[limits])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", ["local_max", "published"])
def test_every_dtype_offsets_and_strides(rule, dtype):
    h, offsets = pack((31, 0, 130), dtype)
    h = torch.stack([h, h], 1)[:, 0]
    assert_as_reference(h, offsets.int(), **RULES[rule], max_patches=5)


@pytest.mark.parametrize("limits", ["free", "all"])
@pytest.mark.parametrize("rule", RULES)
def test_nan_and_infinities(rule, limits):
    h, offsets = pack((20, 9, 9))
    h[[0, 5, 6, 19]] = torch.nan
    h[[3, 22, 23]], h[[8, 24]], h[[32, 33]] = math.inf, -math.inf, -0.0
    assert_as_reference(h, offsets, **RULES[rule], **LIMITS[limits])


def test_a_plateau_across_blocks():
    h = torch.ones(300)
    h[0], h[299] = 0, 0.5
    h[140:] = 2
    assert_as_reference(torch.cat([h, h]), torch.tensor([0, 299, 600]))


@pytest.mark.parametrize("rule", ["local_max", "published"])
def test_a_molecule_is_cut_alike_alone(rule):
    h, offsets = pack((30, 0, 150, 17))
    given = RULES[rule] | {"max_patches": 6}
    ids = find_patches(h, offsets, **given).ids
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        alone = find_patches(h[begin:end], torch.tensor([0, end - begin]), **given)
        assert torch.equal(alone.ids, ids[begin:end])


def test_more_molecules_than_one_program_numbers():
    assert_as_reference(*pack(tuple(i % 3 for i in range(150))), max_size=1)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0), (1,)], ids=str)
@pytest.mark.parametrize("rule", ["local_max", "published"])
def test_nothing_to_cut(rule, lengths):
    h, offsets = pack(lengths)
    for x in (h, h[: offsets[-1]]):
        assert_as_reference(x, offsets, **RULES[rule], min_size=2, max_size=3, max_patches=2)
