from __future__ import annotations

import pytest
import torch

from edt_kernels import linear_entropy, reference
from edt_kernels.triton import linear_entropy as kernels

UNITS = {"nats": 1.0, "bits": 1.4426950408889634}


def batch(rows, tokens, depth, dtype=torch.float64):
    """hidden, weight and bias."""
    g = torch.Generator().manual_seed(0)
    shapes = (rows, depth), (tokens, depth), (tokens,)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def incoming(h):
    return torch.linspace(-1, 2, h.numel(), dtype=torch.float64).view(h.shape).to(h.dtype)


def ours(hidden, weight, bias, unit="nats"):
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    h = linear_entropy(*leaves, unit=unit)
    return [h.detach(), *torch.autograd.grad(h, leaves, incoming(h))]


def referred(hidden, weight, bias, unit="nats"):
    h, *saved = reference.linear_entropy(hidden, weight, bias, UNITS[unit], False)
    call = (incoming(h), hidden, weight, bias, h, *saved, UNITS[unit], True, True)
    grads = reference.linear_entropy_bwd(*call)
    return [h, *grads[: 2 if bias is None else 3]]


def close(found, right):
    torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("rows", "tokens", "depth"), [(1, 1, 1), (31, 33, 17), (33, 31, 129), (65, 38, 32)]
)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no-bias"])
def test_values_and_gradients(rows, tokens, depth, unit, biased):
    hidden, weight, bias = batch(rows, tokens, depth)
    call = (hidden, weight, bias if biased else None, unit)
    close(ours(*call), referred(*call))


def test_many_spans_blocks_and_parts(monkeypatch):
    monkeypatch.setattr(kernels, "SPAN", 64)
    monkeypatch.setattr(kernels, "SLOPES", 64 * 128)
    call = batch(300, 150, 20)
    close(ours(*call), referred(*call))
    monkeypatch.setattr(kernels, "SLOPES", 64 * 1024)
    call = batch(600, 40, 20)
    assert kernels._parts(600, 40, 20)[0] > 1
    close(ours(*call), referred(*call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_error_is_within_twice_that_of_torch(dtype, within_budget):
    call = batch(40, 70, 33, dtype)
    peer = [x.to(dtype) for x in referred(*call)]
    within_budget(ours(*call), peer, referred(*(x.double() for x in call)))


def test_small_slopes_of_float16_do_not_vanish():
    hidden, weight, bias = batch(40, 300, 33, torch.float16)
    leaf = weight.clone().requires_grad_()
    h = linear_entropy(hidden / 8, leaf, bias)
    (grad,) = torch.autograd.grad(h, leaf, torch.full_like(h, 1e-3))
    wide = (hidden.double() / 8, weight.double(), bias.double())
    h, *saved = reference.linear_entropy(*wide, 1.0, False)
    call = (torch.full_like(h, 1e-3), *wide, h)
    right = reference.linear_entropy_bwd(*call, *saved, 1.0, False, True)[1]
    torch.testing.assert_close(grad.double(), right, rtol=1e-2, atol=1e-7)


def test_a_row_has_the_same_bits_alone():
    hidden, weight, bias = batch(70, 38, 20, torch.float32)
    h, grad, *_ = ours(hidden, weight, bias)
    for i in (0, 64):  # first rows of a tile: numpy sums the rows of a product differently
        leaf = hidden[i : i + 1].clone().requires_grad_()
        alone = linear_entropy(leaf, weight, bias)
        (own,) = torch.autograd.grad(alone, leaf, incoming(h)[i : i + 1])
        assert torch.equal(alone, h[i : i + 1]) and torch.equal(own, grad[i : i + 1])


def test_infinite_logits():
    hidden, weight, bias = batch(4, 9, 5)
    bias[:6] = -torch.inf
    close(ours(hidden, weight, bias), referred(hidden, weight, bias))
    assert linear_entropy(hidden, weight, bias - torch.inf).isnan().all()


def test_the_least_number_masks_as_well_as_infinity(monkeypatch):
    monkeypatch.setattr(kernels, "SPAN", 64)
    hidden, weight, bias = batch(4, 150, 5)
    found, right = [], []
    for fill, to in ((torch.finfo(torch.float64).min, found), (-torch.inf, right)):
        masked = bias.clone()
        masked[:100] = fill
        to += ours(hidden, weight, masked, "bits")
    close(found, right)


def test_any_shape_and_strides():
    hidden, weight, bias = batch(12, 9, 8)
    right = ours(hidden, weight, bias)
    strided = hidden.view(3, 4, 8).transpose(0, 1).contiguous().transpose(0, 1)
    found = ours(strided, weight.T.contiguous().T, bias.repeat_interleave(2)[::2])
    assert all(torch.equal(x.view(y.shape), y) for x, y in zip(found, right, strict=True))


def test_only_the_gradients_that_are_wanted():
    tensors = batch(5, 9, 8)
    right = ours(*tensors)
    for i in range(3):
        leaves = [x.clone().requires_grad_(k == i) for k, x in enumerate(tensors)]
        h = linear_entropy(*leaves)
        assert torch.equal(torch.autograd.grad(h, leaves[i], incoming(h))[0], right[1 + i])


def test_no_rows():
    hidden, weight, bias = batch(0, 9, 8)
    h, of_hidden, of_weight, of_bias = ours(hidden, weight, bias)
    assert h.shape == (0,) and of_hidden.shape == (0, 8)
    assert not of_weight.any() and not of_bias.any()
