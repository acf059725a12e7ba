from __future__ import annotations

import itertools

import pytest
import torch

from edt_kernels import find_patches, segment_pool
from edt_kernels.nn import SegmentPool
from edt_kernels.testing import ragged


def batch(tail=2, dtype=torch.float64):
    return ragged((3, 0, 1, 5), 4, tail=tail, dtype=dtype)


@pytest.mark.parametrize("reduce", ["mean", "sum", "max", "min"])
def test_a_plain_reduction_is_the_op_and_has_no_parameters(reduce):
    values, offsets = batch()
    pool = SegmentPool(reduce)
    assert pool.state_dict() == {} and repr(pool) == f"SegmentPool({reduce!r})"
    assert torch.equal(pool(values, offsets), segment_pool(values, offsets, reduce=reduce))
    order = torch.randperm(len(values))
    assert torch.equal(
        pool(values, offsets, order=order),
        segment_pool(values, offsets, order=order, reduce=reduce),
    )


def weighted(pool, values, offsets):
    """Segment by segment: softmax of the gate, then the weighted sum."""
    rows = []
    for begin, end in itertools.pairwise(offsets):
        x = values[begin:end]
        rows.append((pool.gate(x).softmax(0) * x).sum(0))
    return torch.stack(rows)


def test_attention_and_its_gradients():
    values, offsets = batch(tail=0)
    pool = SegmentPool("attention", width=4, dtype=torch.float64)
    found = []
    for run in (lambda x: pool(x, offsets), lambda x: weighted(pool, x, offsets)):
        x = values.clone().requires_grad_()
        out = run(x)
        weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
        found.append([out, *torch.autograd.grad((out * weight).sum(), [x, *pool.parameters()])])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    assert (found[0][0][1] == 0).all()


def test_attention_in_another_order():
    values, offsets = batch()
    pool = SegmentPool("attention", width=4, dtype=torch.float64)
    order = torch.randperm(9)
    garbage = torch.tensor([10**9, -5])  # beyond offsets[-1], never read
    found = pool(values, offsets, order=torch.cat([order, garbage]))
    expected = pool(values[order], offsets)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert pool(values[:0], torch.zeros(3, dtype=torch.int64), order=order[:0]).eq(0).all()


@pytest.mark.parametrize("reduce", ["max", "attention"])
def test_compiles_behind_patches_at_capacity(reduce):
    pool = SegmentPool(reduce, width=4 if reduce == "attention" else None)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(values, surprise, offsets):
        return pool(values, find_patches(surprise, offsets).atom_offsets)

    for tail in (0, 3):
        values, offsets = batch(tail, torch.float32)
        values.requires_grad_()
        surprise = values.detach()[:, 0]
        out = compiled(values, surprise, offsets)
        out.sum().backward()
        patches = find_patches(surprise, offsets).trim()
        expected = pool(values, patches.atom_offsets)
        torch.testing.assert_close(out[: len(expected)], expected)
        assert (out[len(expected) :] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types(dtype):
    values, offsets = batch(dtype=dtype)
    pool = SegmentPool("attention", width=4, dtype=dtype)
    found = pool(values, offsets)
    assert found.dtype == dtype
    expected = pool.double()(values.double(), offsets)
    torch.testing.assert_close(found.double(), expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reduce": "median"}, "reduce must be one of .*, 'attention', got 'median'"),
        ({"reduce": "attention"}, "width must be given for reduce='attention', got None"),
        ({"reduce": "mean", "width": 4}, "width must be None for reduce='mean', got 4"),
    ],
)
def test_wrong_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        SegmentPool(**arguments)
