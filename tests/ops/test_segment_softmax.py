from __future__ import annotations

import doctest
import itertools
import sys

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck

from edt_kernels import offsets_from_lengths, segment_softmax

LENGTHS = (3, 0, 1, 7, 2)


def batch(lengths=LENGTHS, shape=(4,), tail=2, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    values = 4 * torch.randn(sum(lengths) + tail, *shape, generator=g, dtype=torch.float64)
    return values.to(dtype), offsets_from_lengths(torch.tensor(lengths, dtype=torch.int64))


def oracle(values: Tensor, offsets: Tensor) -> Tensor:
    """torch's softmax, segment by segment, and a tail of zeros."""
    bounds = offsets.tolist()
    parts = [values[b:e].softmax(0) for b, e in itertools.pairwise(bounds)]
    return torch.cat([*parts, torch.zeros_like(values[bounds[-1] :])])


def with_grad(function, values: Tensor, offsets: Tensor) -> list[Tensor]:
    values = values.detach().clone().requires_grad_()
    out = function(values, offsets)
    g = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, values, g)]


@pytest.fixture
def poisoned():
    """Fresh allocations hold NaN: what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_matches_a_loop_over_segments(shape):
    values, offsets = batch(shape=shape)
    torch.testing.assert_close(
        with_grad(segment_softmax, values, offsets.int()),
        with_grad(oracle, values, offsets),
        rtol=1e-12,
        atol=1e-14,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_within_twice_that_of_torch(dtype):
    values, offsets = batch((500, 1, 30), (12,), dtype=dtype)
    exact = with_grad(oracle, values.double(), offsets)
    peer = with_grad(oracle, values, offsets)
    ours = with_grad(segment_softmax, values, offsets)
    for mine, theirs, truth in zip(ours, peer, exact, strict=True):
        slack = torch.finfo(dtype).eps * truth.abs().max()
        assert mine.dtype == dtype
        assert (mine - truth).abs().max() <= 2 * (theirs - truth).abs().max() + slack


def test_large_values_lose_nothing():
    values, offsets = batch(dtype=torch.float32)
    shift = 1000.0 * torch.arange(len(LENGTHS)).repeat_interleave(offsets.diff())
    whole = values[: offsets[-1]].round()
    far = segment_softmax(whole + shift.unsqueeze(1), offsets)
    torch.testing.assert_close(far, segment_softmax(whole, offsets))


def test_minus_infinity_has_probability_zero():
    inf = torch.inf
    values = torch.tensor([0.0, -inf, 0.0, -inf, -inf], requires_grad=True)
    out = segment_softmax(values, torch.tensor([0, 3, 5]))
    assert out.tolist() == [0.5, 0, 0.5, 0, 0]
    (grad,) = torch.autograd.grad(out, values, torch.arange(5.0))
    assert grad.tolist() == [-0.5, 0, 0.5, 0, 0]


def test_gradients_and_second_gradients():
    values, offsets = batch((2, 0, 1), (2,), tail=1)
    values.requires_grad_()
    assert gradcheck(segment_softmax, (values, offsets), fast_mode=True)
    assert gradgradcheck(segment_softmax, (values, offsets), fast_mode=True)


def test_opcheck():
    values, offsets = batch(dtype=torch.float32)
    for x in (values, values.t().contiguous().t()):
        torch.library.opcheck(torch.ops.edt.segment_softmax.default, (x, offsets))
        assert segment_softmax(x, offsets).is_contiguous()
        args = (x, segment_softmax(x, offsets), offsets)
        torch.library.opcheck(torch.ops.edt.segment_softmax_bwd.default, args)


def test_compiles_once_for_all_sizes():
    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(segment_softmax, fullgraph=True, dynamic=True, backend=backend)
    for lengths in (LENGTHS, (4, 1, 9, 2)):
        values, offsets = batch(lengths, dtype=torch.float32)
        torch.testing.assert_close(
            with_grad(compiled, values, offsets), with_grad(segment_softmax, values, offsets)
        )
    assert backend.frame_count == 1


def test_a_segment_has_the_same_bits_alone():
    values, offsets = batch((500, 1, 0, 30, 7), (12,), tail=0, dtype=torch.float32)
    g = torch.randn(values.shape, generator=torch.Generator().manual_seed(1))

    def run(values, offsets, g):
        values = values.clone().requires_grad_()
        out = segment_softmax(values, offsets)
        return out.detach(), *torch.autograd.grad(out, values, g)

    whole = run(values, offsets, g)
    for begin, end in offsets.unfold(0, 2, 1).tolist():
        alone = run(values[begin:end], torch.tensor([0, end - begin]), g[begin:end])
        for single, packed in zip(alone, whole, strict=True):
            assert torch.equal(single, packed[begin:end])


def test_nan_in_the_tail_does_not_spread():
    values, offsets = batch()
    values[offsets[-1] :] = torch.nan
    leaf = values.requires_grad_()
    out = segment_softmax(leaf, offsets)
    g = torch.ones_like(out)
    g[offsets[-1] :] = torch.nan
    (grad,) = torch.autograd.grad(out, leaf, g)
    assert torch.equal(out[offsets[-1] :], torch.zeros(2, 4, dtype=torch.float64))
    assert not out.isnan().any()
    assert not grad.isnan().any()
    assert grad[offsets[-1] :].eq(0).all()


@pytest.mark.parametrize(("lengths", "tail"), [((), 0), ((), 2), ((0, 0), 0), ((0,), 1), ((1,), 0)])
def test_empty_batches(lengths, tail):
    values, offsets = batch(lengths, tail=tail)
    out, grad = with_grad(segment_softmax, values, offsets)
    assert out.shape == grad.shape == values.shape
    assert out[: sum(lengths)].eq(1).all()
    assert out[sum(lengths) :].eq(0).all()


def test_wrong_arguments_are_named():
    values = torch.ones(4, requires_grad=True)
    with pytest.raises(
        ValueError, match=r"offsets must not decrease, got offsets\[2\] = 2 after 3"
    ):
        segment_softmax(values, torch.tensor([0, 3, 2]))
    with pytest.raises(ValueError, match=r"at most the number of rows 4, got 5"):
        segment_softmax(values, torch.tensor([0, 5]))
    with pytest.raises(TypeError, match="values must be float32"):
        segment_softmax(torch.arange(4), torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"values must have shape \[N, ...\]"):
        segment_softmax(torch.tensor(1.0), torch.tensor([0, 4]))


def test_the_examples_run():
    result = doctest.testmod(sys.modules["edt_kernels.ops.segment_softmax"])
    assert result.attempted > 0
    assert result.failed == 0
