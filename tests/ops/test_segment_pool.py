from __future__ import annotations

import doctest
import itertools
import sys

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck

from edt_kernels import offsets_from_lengths, pool_by_id, reference, segment_pool

LENGTHS = (3, 0, 1, 7, 2, 0)
TAIL = 2
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
    weight = torch.rand(rows, generator=g, dtype=torch.float64).to(dtype)
    order = torch.randperm(rows, generator=g)
    return values, offsets_from_lengths(torch.tensor(lengths, dtype=torch.int64)), order, weight


def oracle(values, offsets, order=None, weight=None, reduce="mean") -> Tensor:
    """Segment by segment, in the dtype of `values`."""
    pooled = []
    bounds = offsets.tolist()
    for begin, end in itertools.pairwise(bounds):
        index = torch.arange(begin, end) if order is None else order[begin:end]
        x = values[index]
        if len(index) == 0:
            pooled.append(values.new_zeros(values.shape[1:]))
        elif reduce in ("max", "min"):
            pooled.append(getattr(x, f"a{reduce}")(0))
        else:
            w = values.new_ones(len(index)) if weight is None else weight[index]
            total = torch.tensordot(w, x, 1)
            pooled.append(total / w.sum() if reduce == "mean" else total)
    return torch.stack(pooled)


def with_grads(function, values, weight, *args, **options):
    """The output and the gradients of values and weight for a fixed incoming gradient."""
    leaves = [x.detach().clone().requires_grad_() for x in (values, weight) if x is not None]
    weight = leaves[1] if weight is not None else None
    out = function(leaves[0], *args, weight=weight, **options)
    g = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, g)]


@pytest.fixture
def poisoned():
    """Fresh allocations hold NaN: what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("reduce", "ordered", "weighted"), VARIANTS)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_matches_a_loop_over_segments(reduce, ordered, weighted, shape):
    values, offsets, order, weight = batch(shape=shape)
    order, weight = order if ordered else None, weight if weighted else None
    ours = with_grads(segment_pool, values, weight, offsets, order=order, reduce=reduce)
    right = with_grads(oracle, values, weight, offsets, order=order, reduce=reduce)
    torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_error_is_within_twice_that_of_torch(dtype, reduce):
    values, offsets, order, weight = batch((500, 1, 30), (33,), dtype=dtype)
    exact = with_grads(
        oracle, values.double(), weight.double(), offsets, order=order, reduce=reduce
    )
    peer = with_grads(oracle, values, weight, offsets, order=order, reduce=reduce)
    ours = with_grads(segment_pool, values, weight, offsets, order=order, reduce=reduce)
    for mine, theirs, truth in zip(ours, peer, exact, strict=True):
        slack = torch.finfo(dtype).eps * truth.abs().max()
        assert mine.dtype == dtype
        assert (mine - truth).abs().max() <= 2 * (theirs - truth).abs().max() + slack


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


@pytest.mark.parametrize(("reduce", "ordered", "weighted"), VARIANTS)
def test_opcheck(reduce, ordered, weighted):
    values, offsets, order, weight = batch(dtype=torch.float32)
    order, weight = order if ordered else None, weight if weighted else None
    for x in (values, values.t().contiguous().t()):
        args = (x, offsets, order, weight, reduce)
        torch.library.opcheck(torch.ops.edt.segment_pool.default, args)
        out, source = reference.segment_pool(*args)
        kept = x if weighted else None
        args = (out, kept, offsets, order, weight, source, len(x), reduce)
        torch.library.opcheck(torch.ops.edt.segment_pool_bwd.default, args)


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
def test_a_segment_has_the_same_bits_alone(reduce, ordered, weighted):
    lengths = (500, 1, 0, 30, 7)
    values, offsets, order, weight = batch(lengths, (48,), dtype=torch.float32)
    if not weighted:
        weight = None
    order = order if ordered else torch.arange(len(values))
    g = torch.randn(len(lengths), 48, generator=torch.Generator().manual_seed(1))

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


def test_the_number_of_threads_changes_no_bit():
    values, offsets, order, weight = batch((30, 1, 0, 77) * 60, (256,), dtype=torch.float32)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(with_grads(segment_pool, values, weight, offsets, order=order))
    torch.set_num_threads(threads)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_one_wide_row_has_the_same_bits_alone_on_any_number_of_threads():
    values, offsets, _, weight = batch((1, 3), (40_000,), tail=0, dtype=torch.float32)
    g = torch.randn(2, 40_000, generator=torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        for size in (1, 2):
            rows = offsets[size]
            leaf = weight[:rows].clone().requires_grad_()
            out = segment_pool(values[:rows], offsets[: size + 1], weight=leaf)
            found.append(torch.autograd.grad(out, leaf, g[:size])[0][:1])
    torch.set_num_threads(threads)
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
def test_the_gradient_of_a_tie_goes_to_the_first_row(reduce):
    values = torch.tensor([2.0, 1.0, 2.0, 1.0], requires_grad=True)
    segment_pool(values, torch.tensor([0, 4]), reduce=reduce).sum().backward()
    assert values.grad.tolist() == ([1, 0, 0, 0] if reduce == "max" else [0, 1, 0, 0])
    values.grad = None
    order = torch.tensor([3, 2, 1, 0])  # first in the order of the segment
    segment_pool(values, torch.tensor([0, 4]), order=order, reduce=reduce).sum().backward()
    assert values.grad.tolist() == ([0, 0, 1, 0] if reduce == "max" else [0, 0, 0, 1])


@pytest.mark.parametrize("reduce", ["max", "min"])
def test_extremes_of_infinities_and_nan(reduce):
    sign = 1 if reduce == "max" else -1
    values = sign * torch.tensor([-torch.inf, -torch.inf, 1.0, torch.nan, torch.inf])
    values.requires_grad_()
    out = segment_pool(values, torch.tensor([0, 2, 5]), reduce=reduce)
    out.sum().backward()
    assert out[0] == -sign * torch.inf
    assert out[1].isnan()
    assert values.grad.tolist() == [1, 0, 0, 1, 0]


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


def test_pool_by_id_names_wrong_arguments():
    with pytest.raises(ValueError, match="num_segments must be at least 0, got -1"):
        pool_by_id(torch.ones(2), torch.zeros(2, dtype=torch.int64), -1)
    with pytest.raises(TypeError, match="ids must be int64"):
        pool_by_id(torch.ones(2), torch.zeros(2), 1)


def test_the_examples_run():
    result = doctest.testmod(sys.modules["edt_kernels.ops.segment_pool"])
    assert result.attempted > 0
    assert result.failed == 0
