"""`entropy_patches` of CUDA C++ against the definitions."""

from __future__ import annotations

import pytest
import torch

from edt_kernels import entropy_patches, reference
from edt_kernels.ops.find_patches import options
from edt_kernels.testing import assert_within_budget, ragged

pytestmark = pytest.mark.usefixtures("order")

# Few: one block. Many: a launch per molecule and one to number the patches.
FEW = (0, 7, 1, 30, 0, 64, 33)
MANY = (*FEW, 500, 2) * 3
RULES = {
    "local_max": {},
    "published": {"rule": "published"},
    "rising_edge": {"rule": "rising_edge", "q": 0.3, "max_patches": 3},
    "threshold": {"rule": "threshold", "threshold": 1.2},
    "monotonic": {"rule": "monotonic", "threshold": 0.05, "max_size": 4},
    "sizes": {"min_size": 3, "max_size": 5},
    "patches": {"min_size": 2, "max_size": 40, "max_patches": 5},
}


DEFAULTS = {
    **{"rule": "local_max", "q": 0.75, "threshold": None},
    **{"min_size": 1, "max_size": None, "max_patches": None},
}


def found_and_wanted(logits, offsets, scale=1.0, **rule):
    """All outputs of the kernel; and the cut that the reference makes of its entropies."""
    cut = options(**{**DEFAULTS, **rule})
    capacity = cut.capacity(len(logits), len(offsets) - 1)
    found = torch.ops.edt.entropy_patches(logits, offsets, scale, *cut, capacity)
    return found, reference.find_patches(found[0], offsets, *cut, capacity)


def assert_same(found, wanted):
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("lengths", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("rule", RULES)
def test_cuts_where_the_rule_says(rule, lengths):
    logits, offsets = ragged(lengths, 7, tail=5)
    logits[sum(lengths) :] = torch.nan
    found, wanted = found_and_wanted(3 * logits, offsets, **RULES[rule])
    assert int(found[6]) > len(lengths) - lengths.count(0)
    assert_same(found[3:], wanted)


@pytest.mark.parametrize("rule", RULES)
def test_equal_neighbours_and_nan(rule):
    """Plateaus, at the ends too, and entropies that are no number."""
    draws = torch.Generator().manual_seed(0)
    kinds = torch.tensor([[0.0, 0, 0], [2.0, 0, 0], [9.0, 0, 0], [torch.nan, 0, 0]])
    chosen = torch.randint(4, (400,), generator=draws)
    chosen[:200] = chosen[:200].clamp(max=2)  # a NaN makes a molecule's quantile NaN
    offsets = torch.arange(0, 401, 10)
    found, wanted = found_and_wanted(kinds[chosen], offsets.int(), **RULES[rule])
    assert_same(found[3:], wanted)


@pytest.mark.parametrize("v", [1, 2, 38, 128, 129, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_entropies(dtype, v):
    logits, offsets = ragged((20, 0, 3), v, tail=2, dtype=dtype)
    logits[:, ::3] *= 4
    logits[3, : v // 2] = -torch.inf
    logits[-2:] = torch.nan
    wide = logits.to(torch.promote_types(dtype, torch.float32))
    found, _ = found_and_wanted(logits, offsets, scale=0.7)
    same_dtype = reference.entropy(wide[:23], 0.7)
    truth = reference.entropy(logits[:23].double(), 0.7)
    eps = 4 * torch.finfo(wide.dtype).eps
    for mine, torchs, exact in zip(found[:3], same_dtype, truth, strict=True):
        assert_within_budget(mine[:23], torchs, exact, eps=eps * max(1, exact.abs().max()))
        assert not mine[23:].any()


def test_rows_without_a_distribution_are_nan():
    logits, offsets = ragged((4,), 5)
    logits[0], logits[1, 2], logits[2, 3] = -torch.inf, torch.nan, torch.inf
    assert found_and_wanted(logits, offsets)[0][0].isnan().tolist() == [True, True, True, False]


def test_a_molecule_has_the_same_bits_in_one_launch_and_in_two():
    logits, offsets = ragged(MANY, 38)
    h, patches = entropy_patches(logits, offsets, rule="published")
    for m in (1, 3, 5, 6):
        mine = slice(offsets[m], offsets[m + 1])
        own_h, own = entropy_patches(
            logits[mine], torch.tensor([0, offsets[m + 1] - offsets[m]]), rule="published"
        )
        assert torch.equal(own_h, h[mine]) and torch.equal(own.ids, patches.ids[mine])


@pytest.mark.parametrize("lengths", [FEW, MANY], ids=["few", "many"])
def test_any_order_of_threads_gives_the_same(order, lengths):
    logits, offsets = ragged(lengths, 38, tail=1)
    found = []
    for seed in range(3):
        order(seed)
        found.append(found_and_wanted(logits, offsets, **RULES["patches"])[0])
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


def test_a_batch_of_many_blocks():
    """More molecules than are numbered by one block, and than a block has threads."""
    lengths = [1 + i % 4 for i in range(300)]
    logits, offsets = ragged(lengths, 3, tail=4)
    found, wanted = found_and_wanted(logits, offsets)
    assert_same(found[3:], wanted)


@pytest.mark.parametrize(
    "offsets", [[3, 1, 9], [0, 40, 3], [0, 20, 5], [-7, 5, 3], [0, 5, 5]], ids=str
)
@pytest.mark.parametrize("tail", [0, 600])
def test_malformed_offsets_stay_within_bounds(offsets, tail):
    """What comes out means nothing; memory beyond the tensors is not touched."""
    logits, _ = ragged((9,), 3, tail=tail)
    cut = torch.tensor(offsets), 1.0, 0, 0.75, 1, None, None, 3
    assert torch.ops.edt.entropy_patches(logits, *cut)[3].shape == logits.shape[:1]
