"""Packing patch ids, and the options of patches."""

import pytest
import torch

from edt_former.tokens import PatchOptions, pack_patches, unpack_patches
from edt_kernels import find_patches, segment_pool


def test_groups_keep_the_order_of_their_ids():
    patches = pack_patches([[5, -1, 5, 9], [], [2, 2]])
    assert patches.patch_offsets.tolist() == [0, 3, 3, 4]
    assert patches.atom_offsets.tolist() == [0, 1, 3, 4, 6]
    assert patches.order.tolist() == [1, 0, 2, 3, 4, 5]
    assert patches.ids.tolist() == [1, 0, 1, 2, 0, 0]
    assert patches.count.item() == 4


def test_pooling_averages_each_group():
    values = torch.arange(6.0).unsqueeze(1)
    patches = pack_patches([[1, 0, 1, 0], [3], [8]])
    pooled = segment_pool(values, patches.atom_offsets, order=patches.order)
    assert pooled.squeeze(1).tolist() == [2.0, 1.0, 4.0, 5.0]


def test_contiguous_groups_need_no_order():
    assert pack_patches([[0, 0, 1], [4, 4]]).order is None
    assert pack_patches([[1, 0]]).order.tolist() == [1, 0]


@pytest.mark.parametrize("ids", [[], [[]], [[], [0]]], ids=["none", "empty", "empty-first"])
def test_empty_molecules(ids):
    patches = pack_patches(ids)
    assert patches.patch_offsets.tolist() == [0, *(len(x) for x in ids)]
    assert patches.count.item() == sum(map(len, ids))
    assert patches.threshold.shape == (len(ids),)


def test_equals_the_patches_that_the_op_finds():
    torch.manual_seed(0)
    offsets = torch.tensor([0, 7, 7, 8, 20])
    found = find_patches(torch.rand(20), offsets).trim()
    packed = pack_patches(unpack_patches(found, offsets))
    for name in ("ids", "atom_offsets", "patch_offsets", "count", "order"):
        a, b = getattr(packed, name), getattr(found, name)
        assert a is b or torch.equal(a, b), name


def test_tensors_and_lists_are_alike():
    a, b = pack_patches([torch.tensor([1, 0, 1])]), pack_patches([[1, 0, 1]])
    assert torch.equal(a.order, b.order)


def test_unpacking_gives_ids_from_zero():
    offsets = torch.tensor([0, 3, 3, 5])
    assert unpack_patches(pack_patches([[4, 2, 4], [], [9, 8]]), offsets) == [[1, 0, 1], [], [1, 0]]


def test_sources_are_kept_in_the_order_of_the_queries():
    assert PatchOptions(sources=["entropy", "brics"]).sources == ("brics", "entropy")
    assert PatchOptions(sources=()).sources == ()


@pytest.mark.parametrize("sources", [("recap",), "entropy"], ids=["unknown", "string"])
def test_unknown_sources(sources):
    with pytest.raises(ValueError, match="subset of 'brics', 'entropy'"):
        PatchOptions(sources=sources)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rule": "peaks"}, "rule"),
        ({"rule": "threshold"}, "threshold"),
        ({"min_size": 0}, "min_size"),
    ],
)
def test_options_that_the_op_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        PatchOptions(**options)


def test_cutting_options_fit_the_op():
    cut = PatchOptions(rule="rising_edge", q=0.5, max_patches=2).cutting()
    patches = find_patches(torch.tensor([0.0, 5, 0, 5, 0, 5, 0]), torch.tensor([0, 7]), **cut)
    assert patches.count.item() == 2
