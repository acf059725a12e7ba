from __future__ import annotations

import pytest
import torch

from edt_kernels import entropy, reference

UNITS = {"nats": 1.0, "bits": 1.4426950408889634}


def logits(rows, width, dtype=torch.float64, scale=3.0):
    g = torch.Generator().manual_seed(0)
    return (scale * torch.randn(rows, width, generator=g, dtype=torch.float64)).to(dtype)


def ours(x, unit="nats"):
    leaf = x.detach().clone().requires_grad_()
    h = entropy(leaf, unit=unit)
    return [h.detach(), *torch.autograd.grad(h, leaf, incoming(h))]


def referred(x, unit="nats"):
    h, *saved = reference.entropy(x, UNITS[unit])
    g = incoming(h.to(x.dtype)).to(h.dtype)
    return [h.to(x.dtype), reference.entropy_bwd(g, x, h, *saved, UNITS[unit], None)]


def incoming(h):
    return torch.linspace(-1, 2, h.numel(), dtype=torch.float64).view(h.shape).to(h.dtype)


@pytest.mark.parametrize(
    ("rows", "width"), [(1, 1), (33, 31), (31, 33), (5, 129), (3, 1000), (2, 4097), (1, 9000)]
)
@pytest.mark.parametrize("unit", UNITS)
def test_values_and_gradients(rows, width, unit):
    x = logits(rows, width)
    torch.testing.assert_close(ours(x, unit), referred(x, unit), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("width", [38, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_within_twice_that_of_torch(dtype, width, within_budget):
    x = logits(9, width, dtype)
    within_budget(ours(x), referred(x), referred(x.double()))


def test_large_logits_lose_no_digits():
    x = logits(4, 300, torch.float32) + 1e4
    torch.testing.assert_close(ours(x), referred(x.double().float()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [5, 9000])
def test_infinite_and_undefined_logits(width):
    x = logits(6, width, torch.float32)
    x[0, 1:] = x[1, :4] = x[2] = -torch.inf
    x[3, 2], x[4, -1] = torch.inf, torch.nan
    found, right = ours(x), referred(x)
    torch.testing.assert_close(found, right, equal_nan=True)
    assert found[0].isnan().tolist() == [False, False, True, True, True, False]


@pytest.mark.parametrize("width", [38, 9000])
@pytest.mark.parametrize("unit", UNITS)
def test_the_least_number_masks_as_well_as_infinity(width, unit):
    x = logits(3, width, torch.float32)
    x[:, : width // 2] = torch.finfo(torch.float32).min
    right = referred(x.masked_fill(x == torch.finfo(torch.float32).min, -torch.inf), unit)
    torch.testing.assert_close(ours(x, unit), right)


def test_a_row_has_the_same_bits_alone():
    x = logits(40, 38, torch.float32)
    h = entropy(x)
    assert all(torch.equal(entropy(x[i : i + 1]), h[i : i + 1]) for i in (0, 15, 16, 39))


def test_any_shape_and_strides():
    x = logits(12, 7, torch.float32)
    h, grad = ours(x)
    found = ours(x.view(3, 4, 7).transpose(0, 1).contiguous().transpose(0, 1))
    assert torch.equal(found[0].flatten(), h) and torch.equal(found[1].view(12, 7), grad)
    assert entropy(x[:0]).shape == (0,)
    assert entropy(x[0]).shape == ()
