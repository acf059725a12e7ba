from __future__ import annotations

import itertools

import pytest
import torch

from edt_kernels import reference, segment_softmax
from edt_kernels.testing import ragged

LENGTHS = (0, 1, 31, 0, 33, 129, 2)


def batch(shape, dtype, lengths=LENGTHS):
    """Values with NaN in the tail, and offsets."""
    values, offsets = ragged(lengths, *shape, tail=3, dtype=dtype)
    values[offsets[-1] :] = torch.nan
    return values, offsets


def with_grad(values, offsets):
    """Output and gradient for a fixed incoming gradient, NaN in the tail."""
    leaf = values.detach().clone().requires_grad_()
    out = segment_softmax(leaf, offsets)
    g = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)
    g[offsets[-1] :] = torch.nan
    return [out.detach(), *torch.autograd.grad(out, leaf, g)]


def referred(values, offsets):
    out = reference.segment_softmax(values, offsets)
    g = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)
    return [out, reference.segment_softmax_bwd(g, out, offsets)]


@pytest.mark.parametrize(
    ("shape", "index"), [((), torch.int32), ((2, 6), torch.int64), ((65,), torch.int64)], ids=str
)
def test_values_and_gradients(shape, index):
    values, offsets = batch(shape, torch.float64)
    found = with_grad(values, offsets.to(index))
    torch.testing.assert_close(found, referred(values, offsets), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_within_twice_that_of_torch(dtype, within_budget):
    values, offsets = batch((12,), dtype)
    truth = referred(values.double(), offsets)
    within_budget(with_grad(values, offsets), referred(values, offsets), truth)


def test_a_segment_has_the_same_bits_alone():
    values, offsets = batch((33,), torch.float32)
    out = segment_softmax(values, offsets)
    for begin, end in itertools.pairwise(offsets.tolist()):
        alone = segment_softmax(values[begin:end], torch.tensor([0, end - begin]))
        assert torch.equal(alone, out[begin:end])


def test_any_strides():
    values, offsets = batch((2, 6), torch.float32)
    permuted = values.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    apart = offsets.repeat_interleave(2)[::2]
    assert torch.equal(segment_softmax(permuted, apart), segment_softmax(values, offsets))
    leaf = values.clone().requires_grad_()
    out = segment_softmax(leaf, offsets)
    g = torch.linspace(-1, 2, out.numel()).reshape(out.shape)
    (strided,) = torch.autograd.grad(out, leaf, g.mT.contiguous().mT, retain_graph=True)
    (dense,) = torch.autograd.grad(out, leaf, g)
    assert torch.equal(strided, dense)


def test_infinite_and_undefined_values():
    inf, nan = torch.inf, torch.nan
    columns = [[-inf, -inf, 1.0], [-inf, 2.0, 2.0], [nan, 1.0, 2.0], [inf, 0.0, 1.0]]
    values = torch.tensor(columns, dtype=torch.float64).T.contiguous()
    for offsets in (torch.tensor([0, 2, 3]), torch.tensor([0, 3])):
        right = reference.segment_softmax(values, offsets)
        torch.testing.assert_close(segment_softmax(values, offsets), right, equal_nan=True)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)], ids=str)
def test_nothing_but_a_tail(lengths):
    values, offsets = batch((4,), torch.float32, lengths)
    out, grad = with_grad(values, offsets)
    assert not out.any() and not grad.any()
    assert segment_softmax(values[:0], offsets).shape == (0, 4)
