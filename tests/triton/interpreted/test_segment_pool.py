from __future__ import annotations

import itertools

import pytest
import torch

from edt_kernels import reference, segment_pool
from edt_kernels.testing import ragged

LENGTHS = (0, 1, 31, 0, 33, 129, 2)
REDUCTIONS = ("mean", "sum", "max", "min")
VARIANTS = [
    pytest.param(reduce, ordered, weighted, id=f"{reduce}{'-order' * ordered}{'-w' * weighted}")
    for reduce in REDUCTIONS
    for ordered in (False, True)
    for weighted in ((False, True) if reduce in ("mean", "sum") else (False,))
]


def batch(shape=(5,), dtype=torch.float64, lengths=LENGTHS, ordered=False, weighted=False):
    """Arguments of `segment_pool`; what lies in no segment is NaN or out of range."""
    values, offsets = ragged(lengths, *shape, tail=3, dtype=dtype)
    weight, _ = ragged(lengths, tail=3, dtype=dtype, seed=1)
    weight = weight.abs() + 0.5
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    rest = order[offsets[-1] :] if ordered else torch.arange(offsets[-1], len(values))
    values[rest] = weight[rest] = torch.nan
    order[offsets[-1] :] = 1 << 40
    return values, offsets, order if ordered else None, weight if weighted else None


def incoming(out):
    return torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)


def ours(values, offsets, order, weight, reduce):
    """Output and gradients of the public function."""
    leaves = [x.detach().clone().requires_grad_() for x in (values, weight) if x is not None]
    weight = leaves[1] if weight is not None else None
    out = segment_pool(leaves[0], offsets, order=order, weight=weight, reduce=reduce)
    return [out.detach(), *torch.autograd.grad(out, leaves, incoming(out))]


def referred(values, offsets, order, weight, reduce):
    """The same of the reference, which is not handed what lies beyond the last offset."""
    if order is not None:
        unused = torch.ones(len(order), dtype=torch.bool)
        unused[order[: offsets[-1]]] = False
        order = torch.cat([order[: offsets[-1]], unused.nonzero()[:, 0]])
    if reduce in ("max", "min"):
        out, source = reference.segment_extreme(values, offsets, order, reduce == "max")
        grad = reference.segment_extreme_bwd(incoming(out), source, offsets, order, len(values))
        return [out, grad]
    mean = reduce == "mean"
    out = reference.segment_pool(values, offsets, order, weight, mean)
    g = incoming(out)
    found = [out, reference.segment_pool_bwd(g, offsets, order, weight, len(values), mean)]
    if weight is not None:
        call = (g, values, offsets, order, weight, mean)
        found.append(reference.segment_pool_weight_bwd(*call))
    return found


@pytest.mark.parametrize(("reduce", "ordered", "weighted"), VARIANTS)
@pytest.mark.parametrize(
    ("shape", "lengths"), [((), LENGTHS), ((5,), LENGTHS), ((2, 129), (2, 0, 5))], ids=str
)
def test_values_and_gradients(shape, lengths, reduce, ordered, weighted):
    arguments = batch(shape, lengths=lengths, ordered=ordered, weighted=weighted)
    found, right = ours(*arguments, reduce), referred(*arguments, reduce)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("reduce", "ordered", "weighted"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_within_twice_that_of_torch(dtype, reduce, ordered, weighted, within_budget):
    values, offsets, order, weight = batch((12,), dtype, ordered=ordered, weighted=weighted)
    wide = values.double(), offsets, order, None if weight is None else weight.double()
    found = ours(values, offsets, order, weight, reduce)
    within_budget(found, referred(values, offsets, order, weight, reduce), referred(*wide, reduce))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_int32_offsets_and_any_strides(reduce):
    values, offsets, order, _ = batch((2, 3), torch.float32, ordered=True)
    permuted = values.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    found = ours(permuted, offsets.int(), order.repeat_interleave(2)[::2], None, reduce)
    right = ours(values, offsets, order, None, reduce)
    assert all(map(torch.equal, found, right))


@pytest.mark.parametrize(("reduce", "ordered", "weighted"), VARIANTS)
def test_a_segment_has_the_same_bits_alone(reduce, ordered, weighted):
    values, offsets, order, weight = batch((5,), torch.float32, ordered=ordered, weighted=weighted)
    out, *grads = ours(values, offsets, order, weight, reduce)
    g = incoming(out)
    for p, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        rows = torch.arange(begin, end) if order is None else order[begin:end]
        mine = values[rows].requires_grad_()
        own = None if weight is None else weight[rows].requires_grad_()
        alone = segment_pool(mine, torch.tensor([0, end - begin]), weight=own, reduce=reduce)
        assert torch.equal(alone[0], out[p])
        leaves = [mine] if own is None else [mine, own]
        for leaf, grad in zip(torch.autograd.grad(alone, leaves, g[p : p + 1]), grads, strict=True):
            assert torch.equal(leaf, grad[rows])


@pytest.mark.parametrize("ordered", [False, True], ids=["runs", "order"])
@pytest.mark.parametrize("largest", [True, False], ids=["max", "min"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ties_nan_and_infinities(dtype, largest, ordered):
    inf, nan = torch.inf, torch.nan
    columns = [[1, 1, 0, 2, 2], [nan, 3, nan, nan, -inf], [-inf, -inf, -inf, inf, inf]]
    values = torch.tensor([*columns, [-0.0, 0.0, 0.0, 0.0, -0.0]], dtype=dtype).T.contiguous()
    offsets, order = torch.tensor([0, 3, 3, 5]), torch.tensor([4, 0, 3, 1, 2]) if ordered else None
    call = (values, offsets, order, largest)
    found, right = torch.ops.edt.segment_extreme(*call), reference.segment_extreme(*call)
    for mine, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found[0].signbit(), right[0].signbit())


@pytest.mark.parametrize("ordered", [False, True], ids=["runs", "order"])
def test_a_mass_of_0_gives_0(ordered):
    values, offsets, order, weight = batch(lengths=(2, 3), ordered=ordered, weighted=True)
    weight[slice(2) if order is None else order[:2]] = torch.tensor([1.0, -1.0]).double()
    out, of_values, of_weight = ours(values, offsets, order, weight, "mean")
    assert not out[0].any() and out[1].all()
    right = referred(values, offsets, order, weight, "mean")
    torch.testing.assert_close([out, of_values, of_weight], right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("reduce", "ordered", "weighted"), VARIANTS)
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)], ids=str)
def test_nothing_but_a_tail(lengths, reduce, ordered, weighted):
    found = ours(*batch(lengths=lengths, ordered=ordered, weighted=weighted), reduce)
    assert found[0].shape == (len(lengths), 5)
    assert not any(x.any() for x in found)
    values, offsets, order, weight = batch(lengths=lengths, ordered=ordered, weighted=weighted)
    order, weight = (None if x is None else x[:0] for x in (order, weight))
    assert not any(x.any() for x in ours(values[:0], offsets, order, weight, reduce))
