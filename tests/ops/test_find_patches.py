from __future__ import annotations

import doctest
import itertools
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edt_kernels import find_patches

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
RULES = [
    pytest.param({"rule": "local_max"}, id="local_max"),
    pytest.param({"rule": "published"}, id="published"),
    pytest.param({"rule": "rising_edge", "q": 0.4}, id="rising_edge-0.4"),
    pytest.param({"rule": "rising_edge", "q": 0.0}, id="rising_edge-0"),
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
LENGTHS = (0, 7, 1, 0, 2, 3, 40, 500, 0)


# The rules as they are written, one molecule at a time on lists.


def boundaries(h: list[float], rule="local_max", q=0.75, threshold=None) -> dict[int, float]:
    """Atoms that open a patch, without the first, and the entropy that decided each."""
    n, found = len(h), {}
    if rule == "local_max":
        for i in range(1, n):
            end = i
            while end < n and h[end] == h[i]:
                end += 1
            if h[i] > h[i - 1] and (end == n or h[end] < h[i]):
                found[i] = h[i]
    elif rule in ("rising_edge", "published"):
        level = torch.quantile(torch.tensor(h), q).item() if n else math.nan
        high = [x > level for x in h]
        for i in range(n - 1):
            if high[i] and not (i and high[i - 1]):
                found[i + 1] = h[i]
    elif rule == "threshold":
        found = {i: h[i] for i in range(1, n) if h[i] > threshold}
    else:
        found = {i: h[i] for i in range(1, n) if h[i] - h[i - 1] > threshold}
    return found


def cut(h: list[float], min_size=1, max_size=None, max_patches=None, **rule) -> list[int]:
    """The ids of one molecule."""
    found = boundaries(h, **rule)
    shift = 1 if rule.get("rule") in ("rising_edge", "published") else 0
    kept, last = [], 0
    for i in sorted(found):
        if i - last >= min_size:
            kept.append(i)
            last = i
    if max_size:
        edges = [0, *kept, len(h)]
        kept = sorted(
            set(kept)
            | {i for a, b in itertools.pairwise(edges) for i in range(a, b, max_size)} - {0}
        )
    if max_patches:

        def surprise(i):
            value = h[i - shift]
            return (math.inf if math.isnan(value) else -value, i)

        kept = sorted(sorted(kept, key=surprise)[: max_patches - 1])
    ids, patch = [], 0
    for i in range(len(h)):
        patch += i in kept
        ids.append(patch)
    return ids


def pack(lengths=LENGTHS, tail=4, dtype=torch.float32, seed=0, levels=None):
    """Entropies with NaN in the tail, and offsets; `levels` makes ties likely."""
    g = torch.Generator().manual_seed(seed)
    h = torch.rand(sum(lengths) + tail, generator=g, dtype=torch.float64) * 3
    if levels:
        h = (h / 3 * levels).floor()
    h[sum(lengths) :] = torch.nan
    return h.to(dtype), torch.tensor([0, *lengths]).cumsum(0)


def molecules(values: Tensor, offsets: Tensor) -> list[list]:
    bounds = offsets.tolist()
    return [values[a:b].tolist() for a, b in itertools.pairwise(bounds)]


def check_shape(patches, h: Tensor, offsets: Tensor) -> None:
    """Every output follows from the ids and the offsets."""
    ids, end = patches.ids, offsets[-1].item()
    assert ids.shape == h.shape and ids.dtype == torch.int64
    assert not ids[end:].any()
    starts, counts = [], [0]
    for m, mine in enumerate(molecules(ids, offsets)):
        starts += [offsets[m].item() + i for i, x in enumerate(mine) if not i or x != mine[i - 1]]
        assert mine == sorted(mine) and set(mine) == set(range(max(mine, default=-1) + 1))
        counts.append(len(starts))
    assert patches.patch_offsets.tolist() == counts
    assert patches.count.shape == () and patches.count.item() == counts[-1]
    capacity = patches.atom_offsets.shape[0] - 1
    assert capacity >= counts[-1]
    assert patches.atom_offsets.tolist() == starts + [end] * (capacity + 1 - len(starts))
    assert patches.trim().atom_offsets.tolist() == [*starts, end]
    assert patches.order is None
    assert patches.threshold.shape == (offsets.shape[0] - 1,)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("levels", [None, 4], ids=["distinct", "ties"])
def test_ids_follow_the_rules(rule, limits, levels):
    h, offsets = pack(levels=levels)
    patches = find_patches(h, offsets, **rule, **limits)
    check_shape(patches, h, offsets)
    for values, ids in zip(molecules(h, offsets), molecules(patches.ids, offsets), strict=True):
        assert ids == cut(values, **rule, **limits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_every_dtype_and_offsets_dtype(rule, dtype):
    h, offsets = pack(dtype=dtype)
    wide = h if dtype == torch.float64 else h.float()
    patches = find_patches(h, offsets.int(), **rule)
    strided = find_patches(torch.stack([h, h], 1)[:, 0], offsets, **rule)
    for a, b, c in zip(patches, strided, find_patches(wide, offsets, **rule), strict=True):
        assert a is b is c is None or (a.equal(c) and b.equal(c)) or a.isnan().equal(c.isnan())
    check_shape(patches, h, offsets)


@pytest.mark.parametrize("q", [0.0, 0.1, 0.5, 0.75, 0.9, 1 / 3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_quantile_is_that_of_torch(q, dtype):
    """Up to the rounding of the interpolation, which differs between versions of torch."""
    h, offsets = pack(lengths=(0, *range(1, 60), 500), dtype=dtype)
    found = find_patches(h, offsets, rule="rising_edge", q=q).threshold
    assert found[0].isnan()
    bounds = offsets.tolist()
    true = [torch.quantile(h[a:b], q) for a, b in itertools.pairwise(bounds[1:])]
    torch.testing.assert_close(
        found[1:], torch.stack(true), rtol=8 * torch.finfo(dtype).eps, atol=0
    )


def test_what_threshold_holds():
    h, offsets = pack(lengths=(3, 0))
    assert find_patches(h, offsets).threshold.isnan().all()
    found = find_patches(h, offsets, rule="threshold", threshold=1.5).threshold
    assert found.tolist() == [1.5, 1.5]


@pytest.mark.parametrize(
    ("h", "ids"),
    [
        ([2.0], [0]),
        ([3.0, 2.0], [0, 1]),
        ([2.0, 3.0], [0, 0]),
        ([1, 1, 1, 1], [0, 0, 0, 0]),
        ([5, 4, 3, 2, 1], [0, 1, 1, 1, 1]),
        ([0.0, 0.0, 5.0, 0.0, 0.0, 6.0, 0.0, 0.0], [0, 0, 0, 1, 1, 1, 2, 2]),
        ([3.0, 0.0, 0.0, 0.0], [0, 1, 1, 1]),
        ([2.767, 4.978, 3.963, 3.111, 4.945, 1.077], [0, 0, 1, 1, 1, 2]),
        ([3.146, 2.571, 2.484, 1.238, 0.059, 0.962, 3.46, 1.003], [0, 1, 1, 1, 1, 1, 1, 2]),
        (
            [1.848, 0.019, 4.15, 0.772, 1.338, 4.402, 2.549, 4.236, 3.199],
            [0, 0, 0, 0, 0, 0, 1, 1, 2],
        ),
    ],
)
def test_published_patches(h, ids):
    found = find_patches(
        torch.tensor(h, dtype=torch.float32), torch.tensor([0, len(h)]), rule="published"
    )
    assert found.ids.tolist() == ids


@pytest.mark.skipif("EDT_SHARED" not in os.environ, reason="EDT_SHARED names no recorded numbers")
def test_published_patches_of_the_record_edt_entropy():
    record = json.loads(Path(os.environ["EDT_SHARED"], "oracles/edt_entropy.json").read_text())
    for group in record["synthetic_grouping"]:
        cases = [torch.tensor(c["entropies"], dtype=torch.float32) for c in group["cases"]]
        offsets = torch.tensor([0, *map(len, cases)]).cumsum(0)
        patches = find_patches(torch.cat(cases), offsets, rule="rising_edge", q=group["q"])
        assert molecules(patches.ids, offsets) == [c["gids"] for c in group["cases"]]
        levels = [math.nan if c["threshold"] is None else c["threshold"] for c in group["cases"]]
        torch.testing.assert_close(
            patches.threshold, torch.tensor(levels), rtol=0, atol=0, equal_nan=True
        )
    for molecule in record["molecules"]:
        for q, true in (molecule.get("q") or {}).items():
            h = torch.tensor(molecule["entropies_bits_all"])[-molecule["num_entropies_used"] :]
            found = find_patches(h, torch.tensor([0, len(h)]), rule="rising_edge", q=float(q))
            assert found.ids.tolist() == true["gids"]


@pytest.mark.parametrize(
    ("h", "ids"),
    [
        ([1, 3, 2], [0, 1, 1]),
        ([3, 1, 2], [0, 0, 1]),  # the first atom is no peak, the last one may be
        ([1, 3, 3, 2], [0, 1, 1, 1]),
        ([1, 3, 3, 4, 0], [0, 0, 0, 1, 1]),  # a plateau that rises on is no peak
        ([1, 3, 3], [0, 1, 1]),
        ([2, 2, 1], [0, 0, 0]),
        ([1, 3, math.nan, 3, 1], [0, 0, 0, 0, 0]),
        ([math.nan, 3, 1, 2, 1], [0, 0, 0, 1, 1]),
    ],
)
def test_peaks(h, ids):
    h = torch.tensor(h, dtype=torch.float32)
    assert find_patches(h, torch.tensor([0, len(h)])).ids.tolist() == ids


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("rule", RULES)
def test_nan_opens_no_patch(rule, limits):
    h, offsets = pack(lengths=(30, 30))
    h[[0, 5, 6, 29]] = torch.nan
    patches = find_patches(h, offsets, **rule, **limits)
    check_shape(patches, h, offsets)
    for values, ids in zip(molecules(h, offsets), molecules(patches.ids, offsets), strict=True):
        assert ids == cut(values, **rule, **limits)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("rule", RULES)
def test_a_molecule_is_cut_alike_alone_and_with_any_threads(rule, limits):
    h, offsets = pack(lengths=(30, 0, 17, 500) * 40)
    patches = find_patches(h, offsets, **rule, **limits)
    for m in (0, 2, 3, 159):
        mine = h[offsets[m] : offsets[m + 1]]
        alone = find_patches(mine, torch.tensor([0, len(mine)]), **rule, **limits)
        assert torch.equal(alone.ids, patches.ids[offsets[m] : offsets[m + 1]])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for a, b in zip(find_patches(h, offsets, **rule, **limits), patches, strict=True):
            assert a is b is None or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=150, deadline=None)
@given(
    h=st.lists(st.lists(st.integers(0, 5) | st.just(math.nan), max_size=12), max_size=5),
    rule=st.sampled_from([param.values[0] for param in RULES]),
    limits=st.sampled_from([param.values[0] for param in LIMITS]),
)
def test_any_batch_stays_within_its_capacity(h, rule, limits):
    offsets = torch.tensor([0, *map(len, h)]).cumsum(0)
    packed = torch.tensor([x for m in h for x in m], dtype=torch.float64)
    patches = find_patches(packed, offsets, **rule, **limits)
    check_shape(patches, packed, offsets)
    assert molecules(patches.ids, offsets) == [
        cut([float(x) for x in m], **rule, **limits) for m in h
    ]


@pytest.mark.parametrize("q", [0.0, 0.3, 0.5, 0.75, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 9, 41, 500])
def test_the_densest_edges_fit_the_capacity(length, q):
    h = (torch.arange(length) % 2).float() + torch.linspace(0, 0.1, length)
    patches = find_patches(h.repeat(5), torch.arange(6) * length, rule="rising_edge", q=q)
    assert patches.count <= patches.atom_offsets.shape[0] - 1 <= 5 + 5 * length // 2


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)])
@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize("rule", RULES)
def test_nothing_to_cut(rule, lengths, tail):
    h, offsets = pack(lengths=lengths, tail=tail)
    check_shape(find_patches(h, offsets, **rule, min_size=2, max_size=3, max_patches=2), h, offsets)


def test_no_output_is_left_unwritten():
    h, offsets = pack()
    clean = find_patches(h, offsets, rule="published", max_size=7)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is the largest number
    try:
        poisoned = find_patches(h, offsets, rule="published", max_size=7)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(poisoned, clean, strict=True):
        assert a is b is None or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def test_no_gradient_flows():
    h, offsets = pack(lengths=(5,), tail=0)
    assert not any(
        x.requires_grad for x in find_patches(h.requires_grad_(), offsets) if x is not None
    )


@pytest.mark.parametrize("rule", range(1, 4))  # rule 0 has thresholds of NaN, equal to nothing
def test_opcheck(rule):
    h, offsets = pack(lengths=(5, 2, 9))
    h = h.nan_to_num(0)
    for x, size in ((h, None), (torch.stack([h, h], 1)[:, 0], 4)):
        args = (x, offsets, rule, 0.5, 2, size, size, 18)
        torch.library.opcheck(torch.ops.edt.find_patches.default, args)


def test_compiles_with_changing_sizes():
    def step(h, offsets):
        return find_patches(h * 2, offsets, rule="published", max_size=9)

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for lengths in ((7, 3, 20), (5, 0, 9, 30, 2)):
        h, offsets = pack(lengths)
        for a, b in zip(compiled(h, offsets), step(h, offsets), strict=True):
            assert a is b is None or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 4], r"offsets\[0\] must be 0, got 1"),
        ([0, 3, 2], r"offsets must not decrease, got offsets\[2\] = 2 after 3"),
        ([0, 5], r"offsets\[-1\] must be at most the number of rows 4, got 5"),
        ([0, -1, 4], r"offsets must not decrease, got offsets\[1\] = -1 after 0"),
        ([], r"offsets must have shape \[B \+ 1\]"),
    ],
)
def test_malformed_offsets_are_refused(offsets, message):
    with pytest.raises(ValueError, match=message):
        find_patches(torch.rand(4), torch.tensor(offsets, dtype=torch.int64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "peaks"}, "rule must be one of 'local_max'.*got 'peaks'"),
        ({"q": 0.5}, "q belongs to rule 'rising_edge', got q=0.5 with rule 'local_max'"),
        ({"rule": "published", "q": 0.5}, "q belongs to rule 'rising_edge'"),
        ({"rule": "rising_edge", "q": 1.5}, r"q must lie in \[0, 1\], got 1.5"),
        ({"rule": "rising_edge", "q": math.nan}, r"q must lie in \[0, 1\], got nan"),
        ({"rule": "threshold"}, "rule 'threshold' requires a threshold, got None"),
        ({"rule": "monotonic", "threshold": math.nan}, "threshold must be a number, got nan"),
        ({"threshold": 1.0}, "threshold belongs to the rules 'threshold' and 'monotonic'"),
        ({"min_size": 0}, "min_size must be at least 1, got 0"),
        ({"min_size": 3, "max_size": 2}, "max_size must be at least min_size = 3, got 2"),
        ({"max_patches": 0}, "max_patches must be at least 1, got 0"),
    ],
)
def test_errors_say_what_came(options, message):
    with pytest.raises(ValueError, match=message):
        find_patches(torch.rand(4), torch.tensor([0, 4]), **options)


def test_wrong_types_are_refused():
    offsets = torch.tensor([0, 4])
    with pytest.raises(TypeError, match=r"entropy must be .*got int64"):
        find_patches(torch.arange(4), offsets)
    with pytest.raises(ValueError, match="entropy must have 1 dimensions"):
        find_patches(torch.rand(4, 1), offsets)
    with pytest.raises(TypeError, match="offsets must be int64 or int32, got float32"):
        find_patches(torch.rand(4), offsets.float())
    for name in ("q", "threshold", "min_size", "max_size", "max_patches"):
        with pytest.raises(TypeError, match=f"{name} must be a.*, got str"):
            find_patches(torch.rand(4), offsets, **{name: "2"})


def test_the_quantile_of_more_atoms_than_a_float_counts():
    h = torch.zeros(2**24 + 4)
    h[-1] = 5
    found = find_patches(h, torch.tensor([0, len(h)]), rule="rising_edge", q=1.0)
    assert found.threshold.tolist() == [5.0]


def test_the_example_runs():
    result = doctest.testmod(sys.modules["edt_kernels.ops.find_patches"])
    assert result.attempted > 0
    assert result.failed == 0
