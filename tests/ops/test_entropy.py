from __future__ import annotations

import doctest
import math
import sys

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from edt_kernels import entropy, reference

# below, at and beyond every vector width, the vocabulary of atoms, and of language models
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 38, 300, 32000)
HALVES = (torch.bfloat16, torch.float16)


def eager(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)


def batch(rows, v, dtype=torch.float32, seed=0, spread=3.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, v, generator=g, dtype=torch.float64) * spread).to(dtype)


def with_grad(function, logits: Tensor, dtype=None) -> tuple[Tensor, Tensor]:
    """The output and the gradient for a fixed incoming gradient, in float64."""
    x = logits.detach().to(dtype or logits.dtype).requires_grad_()
    out = function(x)
    grad = torch.linspace(0.5, 2, out.numel(), dtype=torch.float64).view(out.shape)
    out.backward(grad.to(logits.dtype).to(out.dtype))
    return out.detach().double(), x.grad.double()


@pytest.mark.parametrize("v", SIZES)
def test_float64_agrees_with_log_softmax(v):
    logits = batch(5, v, torch.float64)
    for ours, truth in zip(with_grad(entropy, logits), with_grad(eager, logits), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("v", SIZES)
def test_error_is_within_twice_that_of_torch(v, dtype):
    logits = batch(5, v, dtype)
    truth = with_grad(eager, logits, torch.float64)
    eps = torch.finfo(dtype).eps
    slack = (eps * math.log(max(v, 2)), 2 * eps * truth[1].abs().max().item())
    for ours, torchs, true, extra in zip(
        with_grad(entropy, logits), with_grad(eager, logits), truth, slack, strict=True
    ):
        assert (ours - true).abs().max() <= 2 * (torchs - true).abs().max() + extra


@pytest.mark.parametrize("shift", [1e4, -1e4, 1e30])
def test_huge_logits_lose_no_digits(shift):
    steps = torch.arange(7.0) * (1 if abs(shift) < 1e5 else 1e25)
    h, grad = with_grad(entropy, (steps + shift)[None])
    true_h, true_grad = with_grad(eager, (steps + shift)[None], torch.float64)
    torch.testing.assert_close(h, true_h, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad, true_grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("v", [2, 16, 38, 300])
def test_a_token_of_probability_zero_contributes_nothing(v, dtype):
    kept = batch(4, v, dtype)
    padded = torch.full((4, 2 * v + 1), -torch.inf, dtype=dtype)
    padded[:, 1::2] = kept
    h, grad = with_grad(entropy, padded)
    true_h, true_grad = with_grad(entropy, kept)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(h, true_h, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad[:, 1::2], true_grad, rtol=tolerance, atol=tolerance)
    assert not grad[:, ::2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("v", [5, 2100])
def test_the_least_number_masks_as_well_as_infinity(v, dtype):
    kept = batch(4, v, dtype)
    masked = kept.clone()
    masked[:, : v // 2] = torch.finfo(dtype).min
    x = masked.masked_fill(masked == torch.finfo(dtype).min, -torch.inf)
    found, right = (with_grad(lambda y: entropy(y, unit="bits"), y) for y in (masked, x))
    torch.testing.assert_close(found, right)
    h, top, log_total = reference.entropy(masked, 1.5)
    grads = (
        reference.entropy_bwd(torch.ones_like(h), y, h, top, log_total, 1.5, None)
        for y in (masked, x)
    )
    torch.testing.assert_close(*grads)


def test_certainty_is_exactly_zero_and_ignorance_ln_v():
    certain = torch.full((1, 38), -torch.inf)
    certain[0, 37] = 3
    assert entropy(certain).item() == 0
    assert entropy(torch.tensor([[0.0, 200.0]])).item() == 0
    for v in SIZES:
        torch.testing.assert_close(entropy(torch.full((1, v), 7.0)).item(), math.log(v))


@pytest.mark.parametrize("v", [1, 16, 38])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_no_distribution_is_nan_and_stays_alone(v, bad):
    logits = batch(3, v)
    clean = entropy(logits)
    logits[1, v - 1] = bad
    h = entropy(logits)
    assert h[1].isnan()
    assert torch.equal(h[::2], clean[::2])
    assert entropy(torch.full((1, v), -torch.inf)).isnan()


def test_bits_are_nats_over_ln_2():
    logits = batch(9, 38, torch.float64)
    torch.testing.assert_close(entropy(logits, unit="bits"), entropy(logits) / math.log(2))
    x = logits[:2, :5].requires_grad_()
    assert gradcheck(lambda x: entropy(x, unit="bits"), x)


@pytest.mark.parametrize("v", [1, 5, 17])
def test_gradients(v):
    x = batch(3, v, torch.float64).requires_grad_()
    assert gradcheck(entropy, x)
    assert gradgradcheck(entropy, x, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("v", [3, 38, 300])
def test_a_row_has_the_same_bits_in_any_batch_and_with_any_threads(v, dtype):
    logits = batch(4000, v, dtype)
    h, grad = with_grad(entropy, logits)
    x = logits[1234:1235].clone().requires_grad_()
    alone = entropy(x)
    alone.backward(torch.linspace(0.5, 2, 4000, dtype=torch.float64)[1234:1235].to(dtype))
    assert torch.equal(alone.detach().double(), h[1234:1235])
    assert torch.equal(x.grad.double(), grad[1234:1235])

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for a, b in zip(with_grad(entropy, logits), (h, grad), strict=True):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


def test_any_leading_shape_and_stride():
    logits = batch(24, 38).reshape(2, 3, 4, 38)
    h, grad = with_grad(entropy, logits)
    assert h.shape == (2, 3, 4)
    strided = logits.transpose(0, 2).contiguous().transpose(0, 2)
    assert not strided.is_contiguous()
    for a, b in zip(with_grad(entropy, strided), (h, grad), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(entropy(logits[0, 0, 0]), h[0, 0, 0].float())
    assert entropy(logits[:0]).shape == (0, 3, 4)
    assert entropy(logits[:0].requires_grad_()).sum().backward() is None


def test_no_output_is_left_unwritten():
    logits = batch(5, 38)
    clean = with_grad(entropy, logits)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    try:
        for a, b in zip(with_grad(entropy, logits), clean, strict=True):
            assert torch.equal(a, b)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "deep"])
def test_opcheck(layout):
    logits = batch(6, 5)
    if layout == "permuted":
        logits = logits.T.contiguous().T
    elif layout == "deep":
        logits = batch(12, 5).view(2, 6, 5).transpose(0, 1)
    h, top, log_total = torch.ops.edt.entropy(logits, 1.5)
    torch.library.opcheck(torch.ops.edt.entropy.default, (logits, 1.5))
    for offsets in (None,) if layout == "deep" else (None, torch.tensor([0, 4])):
        args = (torch.ones(h.shape), logits, h, top, log_total, 1.5, offsets)
        torch.library.opcheck(torch.ops.edt.entropy_bwd.default, args)


def test_compiles_forward_and_backward():
    compiled = torch.compile(entropy, fullgraph=True, dynamic=True)
    for rows in (7, 12):
        logits = batch(rows, 38)
        for ours, plain in zip(
            with_grad(compiled, logits), with_grad(entropy, logits), strict=True
        ):
            assert torch.equal(ours, plain)


@pytest.mark.parametrize(
    ("logits", "unit", "error", "message"),
    [
        ([1.0], "nats", TypeError, "logits must be a tensor, got list"),
        (torch.ones(2, 3, dtype=torch.int64), "nats", TypeError, "logits must be .*got int64"),
        (torch.ones(2, 0), "nats", ValueError, r"\[..., V\] with V >= 1, got shape \(2, 0\)"),
        (torch.tensor(1.0), "nats", ValueError, r"got shape \(\)"),
        (torch.ones(2, 3), "nat", ValueError, "unit must be one of 'nats', 'bits', got 'nat'"),
    ],
)
def test_errors_say_what_came(logits, unit, error, message):
    with pytest.raises(error, match=message):
        entropy(logits, unit=unit)


def test_the_example_runs():
    result = doctest.testmod(sys.modules["edt_kernels.ops.entropy"])
    assert result.attempted > 0
    assert result.failed == 0
