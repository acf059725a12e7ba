from __future__ import annotations

import doctest
import itertools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck

from edt_kernels import (
    _native,
    build_info,
    offsets_from_lengths,
    pool_by_id,
    reference,
    segment_pool,
)
from edt_kernels.testing import assert_within_budget

NATIVE = build_info()["ops"]["segment_pool"] == "native"
SLOWER_LEVELS = _native.ISA_NAMES[: _native.ISA_NAMES.index(build_info()["cpu_isa"] or "scalar")]

LENGTHS = (3, 0, 1, 7, 2, 0)
# Enough segments to fill every vector of segments, and a few that no vector should wait for.
MANY = (*[i * 5 % 7 for i in range(40)], 200, 1, 0, 65, *[3] * 20)
TAIL = 2
# One column; less than a vector; blocks of vectors, single vectors and a rest.
SHAPES = [(), (5,), (2, 3), (150,)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ("mean", "sum", "max", "min")
# every combination that the function accepts
VARIANTS = [
    pytest.param(reduce, ordered, weighted, id=f"{reduce}{'-order' * ordered}{'-w' * weighted}")
    for reduce in REDUCTIONS
    for ordered in (False, True)
    for weighted in ((False, True) if reduce in ("mean", "sum") else (False,))
]


def batch(lengths=LENGTHS, shape=(5,), tail=TAIL, dtype=torch.float64, seed=0):
    """values, offsets, order and weight of segments with `lengths` rows and a tail."""
    g = torch.Generator().manual_seed(seed)
    rows = sum(lengths) + tail
    values = torch.randn(rows, *shape, generator=g, dtype=torch.float64).to(dtype)
    weight = 0.5 + torch.rand(rows, generator=g, dtype=torch.float64).to(dtype)
    order = torch.randperm(rows, generator=g)
    return values, offsets_from_lengths(torch.tensor(lengths, dtype=torch.int64)), order, weight


def oracle(values, offsets, order=None, weight=None, reduce="mean") -> Tensor:
    """Segment by segment, in the dtype of `values`."""
    pooled = []
    bounds = offsets.tolist()
    for begin, end in itertools.pairwise(bounds):
        index = torch.arange(begin, end) if order is None else order[begin:end]
        x = values[index]
        if reduce in ("max", "min") and len(index) > 0:
            pooled.append(getattr(x, f"a{reduce}")(0))
        else:
            w = values.new_ones(len(index)) if weight is None else weight[index]
            total = torch.tensordot(w, x, 1)
            pooled.append(total / w.sum() if reduce == "mean" and len(index) > 0 else total)
    return torch.stack(pooled)


def with_grads(function, values, weight, *args, **options):
    """The output and the gradients of values and weight for a fixed incoming gradient."""
    leaves = [x.detach().clone().requires_grad_() for x in (values, weight) if x is not None]
    weight = leaves[1] if weight is not None else None
    out = function(leaves[0], *args, weight=weight, **options)
    g = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, g)]


@pytest.mark.parametrize(("reduce", "ordered", "weighted"), VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lengths", [LENGTHS, MANY], ids=["few", "many"])
@pytest.mark.usefixtures("poisoned")
def test_matches_a_loop_over_segments(lengths, shape, reduce, ordered, weighted):
    values, offsets, order, weight = batch(lengths, shape)
    order, weight = order if ordered else None, weight if weighted else None
    ours = with_grads(segment_pool, values, weight, offsets, order=order, reduce=reduce)
    right = with_grads(oracle, values, weight, offsets, order=order, reduce=reduce)
    torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-12)


def assert_good(values, offsets, order, weight, reduce):
    """Within twice the error of torch in the same dtype; extremes exact."""
    ours = with_grads(segment_pool, values, weight, offsets, order=order, reduce=reduce)
    wide = values.double(), None if weight is None else weight.double()
    exact = with_grads(oracle, *wide, offsets, order=order, reduce=reduce)
    if reduce in ("max", "min"):
        assert torch.equal(ours[0].double(), exact[0])
        return  # torch shares the gradient of a tie out
    peer = with_grads(oracle, values, weight, offsets, order=order, reduce=reduce)
    # Rounded to the dtype, and in float32 before: there the sums of magnitudes count.
    sizes = [oracle(wide[0].abs(), offsets, order, wide[1], reduce), exact[1]]
    if weight is not None:
        # sum |g x| / mass, with |g| at most 2 and a mass of at least 0.5
        sizes.append(4 * wide[0].abs().reshape(len(values), values[:1].numel()).sum(1))
    for mine, theirs, truth, size in zip(ours, peer, exact, sizes, strict=True):
        if mine.dtype == torch.float64 or mine.numel() == 0:
            torch.testing.assert_close(mine, truth.to(mine.dtype), rtol=1e-12, atol=1e-12)
        else:
            eps = torch.finfo(mine.dtype).eps * truth.abs().max()
            eps += torch.finfo(torch.float32).eps * size.abs().max()
            assert_within_budget(mine, theirs, truth, eps=eps.item())


@pytest.mark.parametrize(("reduce", "ordered", "weighted"), VARIANTS)
@pytest.mark.parametrize("shape", [(), (33,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_error_is_within_twice_that_of_torch(dtype, shape, reduce, ordered, weighted):
    values, offsets, order, weight = batch((500, 1, 30, *MANY), shape, dtype=dtype)
    assert_good(values, offsets, order if ordered else None, weight if weighted else None, reduce)


@st.composite
def ragged_batches(draw):
    """Arguments of `assert_good`."""
    lengths = draw(st.lists(st.integers(0, 9) | st.just(80), min_size=1, max_size=40))
    shape = draw(st.sampled_from([(), (1,), (3,), (17,), (2, 40)]))
    dtype = draw(st.sampled_from(DTYPES))
    tail, seed = draw(st.integers(0, 3)), draw(st.integers(0, 99))
    values, offsets, order, weight = batch(lengths, shape, tail, dtype, seed)
    reduce = draw(st.sampled_from(REDUCTIONS))
    weighted = reduce in ("mean", "sum") and draw(st.booleans())
    offsets = offsets.to(draw(st.sampled_from([torch.int32, torch.int64])))
    order = order if draw(st.booleans()) else None
    return values, offsets, order, weight if weighted else None, reduce


@settings(max_examples=60, deadline=None, derandomize=True)
@given(ragged_batches())
def test_any_segmentation(arguments):
    assert_good(*arguments)


@pytest.mark.parametrize(("reduce", "ordered", "weighted"), VARIANTS)
@pytest.mark.parametrize("shape", [(), (5,), (150,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_short_segments_have_the_bits_of_the_reference(dtype, shape, reduce, ordered, weighted):
    lengths = [length for length in MANY if length <= 64]
    values, offsets, order, weight = batch(lengths, shape, dtype=dtype)
    order, weight = order if ordered else None, weight if weighted else None
    ours, *grads = with_grads(segment_pool, values, weight, offsets, order=order, reduce=reduce)
    g = torch.linspace(-1, 2, ours.numel(), dtype=torch.float64).view(ours.shape).to(dtype)
    if reduce in ("max", "min"):
        right, source = reference.segment_extreme(values, offsets, order, reduce == "max")
        grad = reference.segment_extreme_bwd(g, source, offsets, order, len(values))
    else:
        options = order, weight
        right = reference.segment_pool(values, offsets, *options, reduce == "mean")
        grad = reference.segment_pool_bwd(g, offsets, *options, len(values), reduce == "mean")
    assert torch.equal(ours, right)
    assert torch.equal(grads[0], grad)


def test_a_long_column_loses_no_digits():
    values = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    pooled = segment_pool(values, torch.tensor([0, 200_000]))
    assert abs(pooled.item() / values.double().mean().item() - 1) < 2e-6


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_only_the_gradients_that_are_wanted(reduce, wanted):
    values, offsets, order, weight = batch()
    expected = with_grads(segment_pool, values, weight, offsets, order=order, reduce=reduce)
    inputs = [x.requires_grad_(want) for x, want in zip((values, weight), wanted, strict=True)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = segment_pool(values, offsets, order=order, weight=weight, reduce=reduce)
    # Only the gradient of the weight needs the values.
    assert any(x is values for x in kept) == wanted[1]
    out.backward(torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape))
    for x, want, grad in zip(inputs, wanted, expected[1:], strict=True):
        assert torch.equal(x.grad, grad) if want else x.grad is None


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_any_strides(reduce):
    values, offsets, order, weight = batch(shape=(2, 3), dtype=torch.float32)
    weight = weight if reduce in ("mean", "sum") else None
    expected = with_grads(segment_pool, values, weight, offsets, order=order, reduce=reduce)

    def every_second(x):
        return None if x is None else x.repeat_interleave(2, 0)[::2]

    permuted = values.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    options = {"order": every_second(order), "reduce": reduce}
    found = with_grads(
        segment_pool, permuted, every_second(weight), every_second(offsets), **options
    )
    assert all(map(torch.equal, found, expected))
    leaf = values.clone().requires_grad_()
    out = segment_pool(leaf, offsets, order=order, weight=weight, reduce=reduce)
    (expanded,) = torch.autograd.grad(out.sum(), leaf, retain_graph=True)
    (dense,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    assert torch.equal(expanded, dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_max_is_exact(dtype):
    values, offsets, order, _ = batch((500, 1, 30), (33,), dtype=dtype)
    ours = with_grads(segment_pool, values, None, offsets, order=order, reduce="max")
    right = with_grads(oracle, values.double(), None, offsets, order=order, reduce="max")
    assert torch.equal(ours[0].double(), right[0])
    # bfloat16 has ties, which torch's amax shares out: compare what each segment receives
    for bounds in offsets.unfold(0, 2, 1).tolist():
        rows = order[slice(*bounds)]
        torch.testing.assert_close(
            ours[1][rows].double().sum(0), right[1][rows].sum(0), rtol=1e-2, atol=1e-2
        )


@pytest.mark.parametrize(("reduce", "ordered", "weighted"), VARIANTS)
def test_gradients_and_second_gradients(reduce, ordered, weighted):
    values, offsets, order, weight = batch((2, 0, 1), (2,), tail=1)
    order = order if ordered else None

    def pool(values, weight=None):
        return segment_pool(values, offsets.int(), order=order, weight=weight, reduce=reduce)

    inputs = (values, weight) if weighted else (values,)
    inputs = tuple(x.requires_grad_() for x in inputs)
    assert gradcheck(pool, inputs, fast_mode=True)
    assert gradgradcheck(pool, inputs, fast_mode=True)


@pytest.mark.parametrize("ordered", [False, True], ids=["runs", "order"])
@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
def test_opcheck(permuted, ordered):
    values, offsets, order, weight = batch(dtype=torch.float32)
    values = values.t().contiguous().t() if permuted else values
    order, edt, rows = order if ordered else None, torch.ops.edt, len(values)
    calls = [(edt.sort_ids, (offsets.new_tensor([2, 0, 9, 2, -1]), 4))]
    for w in (None, weight):
        out = edt.segment_pool(values, offsets, order, w, True)
        calls.append((edt.segment_pool, (values, offsets, order, w, True)))
        calls.append((edt.segment_pool_bwd, (out, offsets, order, w, rows, False)))
    calls.append((edt.segment_pool_weight_bwd, (out, values, offsets, order, weight, True)))
    out, source = edt.segment_extreme(values, offsets, order, True)
    calls.append((edt.segment_extreme, (values, offsets, order, False)))
    calls.append((edt.segment_extreme_bwd, (out, source, offsets, order, rows)))
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments)


def test_compiles_once_for_all_sizes():
    def step(values, offsets, order, weight, ids):
        mean = segment_pool(values, offsets, order=order, weight=weight)
        most = segment_pool(values, offsets, reduce="max")
        named = pool_by_id(values, ids, offsets.shape[0] + 2, reduce="sum")
        return (mean.square() * most).sum() + named.square().sum()

    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for lengths in (LENGTHS, (4, 1, 9, 2)):
        values, offsets, order, weight = batch(lengths, dtype=torch.float32)
        found = []
        for function in (step, compiled):
            leaves = [values.clone().requires_grad_(), weight.clone().requires_grad_()]
            function(leaves[0], offsets, order, leaves[1], order % 4).backward()
            found.append([leaf.grad for leaf in leaves])
        torch.testing.assert_close(*found)
    assert backend.frame_count == 1


@pytest.mark.parametrize(("reduce", "ordered", "weighted"), VARIANTS)
@pytest.mark.parametrize("shape", [(), (48,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_segment_has_the_same_bits_alone(dtype, shape, reduce, ordered, weighted):
    lengths = (500, 1, 0, 30, 7, *[2, 0, 5, 3] * 10)
    values, offsets, order, weight = batch(lengths, shape, dtype=dtype)
    if not weighted:
        weight = None
    order = order if ordered else torch.arange(len(values))
    g = torch.randn(len(lengths), *shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def run(values, weight, offsets, order, g):
        leaves = [x.clone().requires_grad_() for x in (values, weight) if x is not None]
        w = leaves[1] if weight is not None else None
        out = segment_pool(
            leaves[0], offsets, order=order if ordered else None, weight=w, reduce=reduce
        )
        return out.detach(), *torch.autograd.grad(out, leaves, g)

    whole, *grads = run(values, weight, offsets, order, g)
    for p, (begin, end) in enumerate(offsets.unfold(0, 2, 1).tolist()):
        rows = order[begin:end]
        rank = torch.arange(len(rows))
        alone, *alone_grads = run(
            values[rows],
            weight[rows] if weighted else None,
            torch.tensor([0, len(rows)]),
            rank,
            g[p : p + 1],
        )
        assert torch.equal(alone[0], whole[p])
        for single, packed in zip(alone_grads, grads, strict=True):
            assert torch.equal(single, packed[rows])


@pytest.mark.parametrize(("reduce", "ordered", "weighted"), VARIANTS)
@pytest.mark.parametrize(
    ("lengths", "shape"),
    [((30, 1, 0, 77) * 60, (256,)), ((3, 4) * 20_000, ()), ((4000, 3, 9000), (100,))],
    ids=["many", "column", "long"],
)
def test_the_number_of_threads_changes_no_bit(lengths, shape, reduce, ordered, weighted, threads):
    values, offsets, order, weight = batch(lengths, shape, dtype=torch.float32)
    order, weight = order if ordered else None, weight if weighted else None
    found = []
    for count in (1, 2, 5):
        threads(count)
        found.append(with_grads(segment_pool, values, weight, offsets, order=order, reduce=reduce))
    assert all(map(torch.equal, found[0] * 2, found[1] + found[2]))


def test_one_wide_row_has_the_same_bits_alone_on_any_number_of_threads(threads):
    values, offsets, _, weight = batch((1, 3), (40_000,), tail=0, dtype=torch.float32)
    g = torch.randn(2, 40_000, generator=torch.Generator().manual_seed(1))
    found = []
    for count in (1, 2):
        threads(count)
        for size in (1, 2):
            rows = offsets[size]
            leaf = weight[:rows].clone().requires_grad_()
            out = segment_pool(values[:rows], offsets[: size + 1], weight=leaf)
            found.append(torch.autograd.grad(out, leaf, g[:size])[0][:1])
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize(("reduce", "ordered", "weighted"), VARIANTS)
def test_nan_in_the_tail_does_not_spread(reduce, ordered, weighted):
    values, offsets, order, weight = batch()
    order = order if ordered else torch.arange(len(values))
    tail = order[offsets[-1] :].clone()
    clean = values.clone(), weight.clone()
    values[tail] = torch.nan
    weight[tail] = torch.nan
    order[offsets[-1] :] = 10**9
    options = {"order": order if ordered else None, "reduce": reduce}
    dirty = with_grads(segment_pool, values, weight if weighted else None, offsets, **options)
    options["order"] = torch.cat([order[: offsets[-1]], tail]) if ordered else None
    right = with_grads(segment_pool, clean[0], clean[1] if weighted else None, offsets, **options)
    for mine, expected in zip(dirty, right, strict=True):
        assert torch.equal(mine, expected)
    for grad in dirty[1:]:
        assert grad[tail].eq(0).all()


@pytest.mark.parametrize("reduce", ["max", "min"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_a_tie_goes_to_the_first_row(dtype, reduce):
    values = torch.tensor([2.0, 1.0, 2.0, 1.0], dtype=dtype, requires_grad=True)
    segment_pool(values, torch.tensor([0, 4]), reduce=reduce).sum().backward()
    assert values.grad.tolist() == ([1, 0, 0, 0] if reduce == "max" else [0, 1, 0, 0])
    values.grad = None
    order = torch.tensor([3, 2, 1, 0])  # first in the order of the segment
    segment_pool(values, torch.tensor([0, 4]), order=order, reduce=reduce).sum().backward()
    assert values.grad.tolist() == ([0, 0, 1, 0] if reduce == "max" else [0, 0, 0, 1])


@pytest.mark.parametrize("reduce", ["max", "min"])
@pytest.mark.parametrize("copies", [1, 30])  # alone, and in the lanes of a vector
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes_of_infinities_and_nan(dtype, copies, reduce):
    sign = 1 if reduce == "max" else -1
    inf, nan = torch.inf, torch.nan
    values = sign * torch.tensor([-inf, -inf, 1.0, nan, inf, nan] * copies).to(dtype)
    values.requires_grad_()
    offsets = offsets_from_lengths(torch.tensor([2, 4] * copies))
    out = segment_pool(values, offsets, reduce=reduce)
    out.sum().backward()
    assert (out[::2] == -sign * inf).all()
    assert out[1::2].isnan().all()
    assert values.grad.tolist() == [1, 0, 0, 1, 0, 0] * copies


@pytest.mark.usefixtures("poisoned")
def test_rows_of_no_columns_give_weights_no_gradient():
    values, offsets, _, weight = batch(shape=(0,))
    out, dvalues, dweight = with_grads(segment_pool, values, weight, offsets)
    assert out.shape == (len(offsets) - 1, 0) and dvalues.shape == values.shape
    assert dweight.eq(0).all()


def test_weights_that_sum_to_zero_give_zero():
    values, weight = torch.ones(2, 3, requires_grad=True), torch.zeros(2, requires_grad=True)
    out = segment_pool(values, torch.tensor([0, 2]), weight=weight)
    out.sum().backward()
    assert out.eq(0).all()
    assert values.grad.eq(0).all()
    assert weight.grad.eq(0).all()


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (1,)], ids=str)
@pytest.mark.parametrize("tail", [0, 2])
def test_empty_batches(reduce, lengths, tail):
    values, offsets, order, weight = batch(lengths, (3,), tail)
    weight = weight if reduce in ("mean", "sum") else None
    out, *grads = with_grads(segment_pool, values, weight, offsets, order=order, reduce=reduce)
    assert out.shape == (len(lengths), 3)
    assert not out.isnan().any()
    assert grads[0].shape == values.shape
    if sum(lengths) == 0:
        assert out.eq(0).all()
        assert all(grad.eq(0).all() for grad in grads)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_pool_by_id_takes_ids_in_any_order(reduce):
    values = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ids = torch.tensor([2, 0, 9, 2, -1, 0, 2])
    out = pool_by_id(values, ids, 4, reduce=reduce)
    order, offsets = torch.tensor([1, 5, 0, 3, 6, 2, 4]), torch.tensor([0, 2, 2, 5, 5])
    torch.testing.assert_close(out, oracle(values, offsets, order, reduce=reduce))
    out.sum().backward()
    assert values.grad[[2, 4]].eq(0).all()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(-2, 12), max_size=30), st.integers(0, 9), st.booleans())
def test_ids_are_sorted_as_by_the_reference(ids, segments, ascending):
    ids = torch.tensor(sorted(ids) if ascending else ids, dtype=torch.int64)
    expected = reference.sort_ids(ids, segments)
    assert all(map(torch.equal, torch.ops.edt.sort_ids(ids, segments), expected))
    strided = ids.repeat_interleave(3)[::3]
    assert all(map(torch.equal, torch.ops.edt.sort_ids(strided, segments), expected))


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("ascending", [True, False], ids=["ascending", "shuffled"])
def test_pool_by_id_has_the_bits_of_segment_pool(ascending, reduce):
    values, offsets, order, weight = batch(MANY, (20,), tail=0, dtype=torch.float32)
    weight = weight if reduce in ("mean", "sum") else None
    ids = torch.arange(len(MANY)).repeat_interleave(offsets.diff())
    ids = ids if ascending else ids[order]
    by_id = with_grads(pool_by_id, values, weight, ids, len(MANY), reduce=reduce)
    order = ids.argsort(stable=True)
    pooled = with_grads(segment_pool, values, weight, offsets, order=order, reduce=reduce)
    assert all(map(torch.equal, by_id, pooled))


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 3], r"offsets\[0\] must be 0, got 1"),
        ([0, 3, 2], r"offsets must not decrease, got offsets\[2\] = 2 after 3"),
        ([0, 5], r"offsets\[-1\] must be at most the number of rows 4, got 5"),
    ],
)
def test_malformed_offsets_are_named(offsets, message):
    for values in (torch.ones(4), torch.ones(4, requires_grad=True)):
        with pytest.raises(ValueError, match=message):
            segment_pool(values, torch.tensor(offsets))


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 1, 4], r"order must hold rows from 0 to 2, got order\[2\] = 4"),
        ([-1, 1, 2], r"order must hold rows from 0 to 2, got order\[0\] = -1"),
        ([1, 0, 1], "order must hold every row at most once, got 1 at 0 and at 2"),
    ],
)
def test_malformed_order_is_named(order, message):
    with pytest.raises(ValueError, match=message):
        segment_pool(torch.ones(3), torch.tensor([0, 3]), order=torch.tensor(order))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": [1.0]}, TypeError, "values must be a tensor, got list"),
        ({"values": torch.ones(3, dtype=torch.int64)}, TypeError, "values must be float32"),
        ({"values": torch.tensor(1.0)}, ValueError, r"values must have shape \[N, ...\]"),
        ({"offsets": torch.tensor([0.0, 3])}, TypeError, "offsets must be int64 or int32"),
        ({"offsets": torch.tensor([], dtype=torch.int64)}, ValueError, r"\[B \+ 1\]"),
        ({"order": torch.arange(2)}, ValueError, r"order must have shape \[N\] with N = 3"),
        ({"order": torch.arange(3).int()}, TypeError, "order must be int64"),
        ({"weight": torch.ones(2)}, ValueError, r"weight must have shape \[N\] with N = 3"),
        ({"weight": torch.ones(3).double()}, TypeError, "weight must be torch.float32"),
        ({"weight": torch.ones(3), "reduce": "max"}, ValueError, "weight must be None"),
        ({"reduce": "median"}, ValueError, "reduce must be one of 'mean', 'sum', 'max', 'min'"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {"values": torch.ones(3, 2), "offsets": torch.tensor([0, 3])} | change
    with pytest.raises(error, match=message):
        segment_pool(arguments.pop("values"), arguments.pop("offsets"), **arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_segments": -1}, ValueError, "num_segments must be at least 0, got -1"),
        ({"num_segments": 1.5}, TypeError, "num_segments must be an int, got float"),
        ({"ids": torch.zeros(2)}, TypeError, "ids must be int64, got float32"),
        ({"ids": torch.zeros(3).long()}, ValueError, r"ids must have shape \[N\] with N = 2"),
        ({"ids": torch.zeros(2, 1).long()}, ValueError, "ids must have 1 dimensions"),
        ({"ids": [0, 0]}, TypeError, "ids must be a tensor, got list"),
        ({"values": [1.0]}, TypeError, "values must be a tensor, got list"),
        ({"weight": torch.ones(3)}, ValueError, r"weight must have shape \[N\] with N = 2"),
        ({"reduce": "median"}, ValueError, "reduce must be one of"),
    ],
)
def test_pool_by_id_names_wrong_arguments(change, error, message):
    arguments = {"values": torch.ones(2), "ids": torch.zeros(2).long(), "num_segments": 1}
    with pytest.raises(error, match=message):
        pool_by_id(**arguments | change)


@pytest.mark.skipif(not NATIVE, reason="a promise of the kernels")
def test_kernels_refuse_what_would_reach_beyond_memory():
    edt, offsets, order = torch.ops.edt, torch.tensor([0, 3]), torch.tensor([0, 1, 9])
    x, w, g, source = torch.ones(3, 2), torch.ones(3), torch.ones(1, 2), torch.ones(1, 2).int()
    for op, arguments in (
        (edt.segment_pool, (x, offsets, order, None, True)),
        (edt.segment_pool, (x, offsets + 1, None, None, True)),
        (edt.segment_pool, (x, offsets, order[:2], None, True)),
        (edt.segment_pool, (x, offsets, None, w[:2], True)),
        (edt.segment_pool, (x, offsets, None, w.double(), True)),
        (edt.segment_pool_bwd, (g, offsets, order, None, 3, True)),
        (edt.segment_pool_bwd, (g, offsets, None, None, 2, True)),
        (edt.segment_pool_bwd, (x, offsets, None, None, 3, True)),
        (edt.segment_pool_bwd, (g, offsets, None, None, -1, True)),
        (edt.segment_pool_weight_bwd, (g[:, :1], x, offsets, None, w, True)),
        (edt.segment_pool_weight_bwd, (g.double(), x, offsets, None, w, True)),
        (edt.segment_extreme_bwd, (g, source[:, :1], offsets, None, 3)),
        (edt.segment_extreme_bwd, (g, source.long(), offsets, None, 3)),
        (edt.segment_extreme_bwd, (g, source, offsets, order, 3)),
    ):
        with pytest.raises(RuntimeError):
            op(*arguments)


@pytest.mark.skipif(not NATIVE, reason="this is the reference path")
@pytest.mark.parametrize(
    "backend",
    [*({"EDT_CPU_ISA": level} for level in SLOWER_LEVELS), {"EDT_NATIVE": "0"}],
    ids=lambda backend: "-".join(backend.values()),
)
def test_every_backend(backend):
    chosen = "matches or any_segmentation or alone or nan or tie or by_id or malformed"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__, "-k", chosen],
        env=os.environ | backend,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_the_examples_run():
    result = doctest.testmod(sys.modules["edt_kernels.ops.segment_pool"])
    assert result.attempted > 0
    assert result.failed == 0
