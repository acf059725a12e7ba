from __future__ import annotations

import doctest
import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from edt_kernels import entropy, linear_entropy


def batch(rows=7, d=6, v=11, dtype=torch.float64, seed=0):
    """hidden, weight and bias."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((rows, d), (v, d), (v,))
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def eager(hidden, weight, bias=None):
    return entropy(F.linear(hidden, weight, bias))


def with_grads(function, inputs, dtype=None):
    """Output and gradients for a fixed incoming gradient, in float64."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    grad = torch.linspace(0.5, 2, out.numel(), dtype=torch.float64).view(out.shape)
    return [x.double() for x in (out.detach(), *torch.autograd.grad(out, leaves, grad.to(out)))]


@pytest.mark.parametrize("v", [1, 2, 38, 300])
@pytest.mark.parametrize("biased", [True, False])
def test_float64_agrees_with_the_kept_logits(v, biased):
    inputs = batch(v=v)[: 2 + biased]
    for ours, true in zip(
        with_grads(linear_entropy, inputs), with_grads(eager, inputs), strict=True
    ):
        torch.testing.assert_close(ours, true, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("v", [2, 38, 300])
def test_error_is_within_twice_that_of_torch(v, dtype):
    inputs = batch(rows=9, d=32, v=v, dtype=dtype)
    truth = with_grads(eager, inputs, torch.float64)
    found = zip(with_grads(linear_entropy, inputs), with_grads(eager, inputs), truth, strict=True)
    for ours, torchs, true in found:
        slack = torch.finfo(dtype).eps * true.abs().max()
        assert (ours - true).abs().max() <= 2 * (torchs - true).abs().max() + slack


def test_chunks_change_nothing_but_memory(monkeypatch):
    inputs = batch(rows=200, v=38)
    whole = with_grads(linear_entropy, inputs)
    # a function of the same name hides the module
    monkeypatch.setattr(sys.modules["edt_kernels.reference.linear_entropy"], "CHUNK", 64 * 38)
    for ours, true in zip(with_grads(linear_entropy, inputs), whole, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-13)


def test_the_graph_keeps_inputs_only():
    inputs = [x.requires_grad_() for x in batch(rows=50, v=300)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        linear_entropy(*inputs)
    assert max(kept) <= max(x.numel() for x in inputs)


@pytest.mark.parametrize(
    "needed", [n for n in itertools.product((True, False), repeat=3) if any(n)]
)
def test_every_combination_of_gradients(needed):
    inputs = batch()
    every = with_grads(linear_entropy, inputs)
    leaves = [x.clone().requires_grad_(n) for x, n in zip(inputs, needed, strict=True)]
    out = linear_entropy(*leaves)
    out.backward(torch.linspace(0.5, 2, len(out), dtype=torch.float64))
    for leaf, grad, n in zip(leaves, every[1:], needed, strict=True):
        assert leaf.grad is None if not n else torch.equal(leaf.grad, grad)


def test_gradients():
    inputs = [x.requires_grad_() for x in batch(rows=3, d=3, v=4)]
    assert gradcheck(lambda *x: linear_entropy(*x, unit="bits"), inputs)
    assert gradgradcheck(linear_entropy, inputs, fast_mode=True)
    assert gradgradcheck(linear_entropy, inputs[:2], fast_mode=True)


def test_any_leading_shape():
    hidden, weight, bias = batch(rows=24)
    flat = with_grads(linear_entropy, (hidden, weight, bias))
    deep = with_grads(linear_entropy, (hidden.view(2, 3, 4, -1), weight, bias))
    for a, b in zip(deep, flat, strict=True):
        assert torch.equal(a.reshape(b.shape), b)
    assert linear_entropy(hidden[:0], weight).shape == (0,)


def test_opcheck():
    hidden, weight, bias = batch(dtype=torch.float32)
    for x, b in ((hidden, bias), (hidden.T.contiguous().T, None)):
        torch.library.opcheck(torch.ops.edt.linear_entropy.default, (x, weight, b, 1.5))
        needed = [True, False, b is not None]
        args = (torch.ones(len(x)), x, weight, b, 1.5, needed)
        torch.library.opcheck(torch.ops.edt.linear_entropy_bwd.default, args)


def test_compiles_forward_and_backward():
    compiled = torch.compile(linear_entropy, fullgraph=True, dynamic=True)
    for rows in (7, 12):
        inputs = batch(rows=rows)
        for a, b in zip(
            with_grads(compiled, inputs), with_grads(linear_entropy, inputs), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_errors_say_what_came():
    hidden, weight, bias = batch()
    with pytest.raises(ValueError, match=r"D = 6 as in weight \[V, D\], got shape \(7, 5\)"):
        linear_entropy(hidden[:, :5], weight)
    with pytest.raises(ValueError, match=r"bias must have shape \(11,\), got \(10,\)"):
        linear_entropy(hidden, weight, bias[:10])
    with pytest.raises(ValueError, match="V >= 1"):
        linear_entropy(hidden, weight[:0])
    with pytest.raises(TypeError, match=r"weight must be torch.float64, got torch.float32"):
        linear_entropy(hidden, weight.float())
    with pytest.raises(ValueError, match="unit must be one of"):
        linear_entropy(hidden, weight, unit="bit")


def test_the_example_runs():
    result = doctest.testmod(sys.modules["edt_kernels.ops.linear_entropy"])
    assert result.attempted > 0
    assert result.failed == 0
