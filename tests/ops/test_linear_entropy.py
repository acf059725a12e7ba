from __future__ import annotations

import doctest
import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from edt_kernels import build_info, entropy, linear_entropy, reference

NATIVE = pytest.mark.skipif(
    build_info()["ops"]["linear_entropy"] != "native", reason="a promise of the kernels"
)


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


# Tiles of 96 rows and 8 to 64 tokens, widths of whole vectors and not: below, at and beyond.
@pytest.mark.parametrize("v", [1, 2, 38, 64, 65, 300])
@pytest.mark.parametrize("shape", [(7, 6), (97, 16), (200, 33)], ids=str)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no-bias"])
@pytest.mark.usefixtures("poisoned")
def test_float64_agrees_with_the_kept_logits(v, shape, biased):
    inputs = batch(*shape, v)[: 2 + biased]
    for ours, true in zip(
        with_grads(linear_entropy, inputs), with_grads(eager, inputs), strict=True
    ):
        torch.testing.assert_close(ours, true, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("v", [2, 38, 300])
@pytest.mark.usefixtures("poisoned")
def test_error_is_within_twice_that_of_torch(v, dtype):
    """The largest errors of eight batches: of one alone, that of two biases is a matter of luck."""
    errors, slacks = [], []
    for seed in range(8):
        inputs = batch(rows=99, d=32, v=v, dtype=dtype, seed=seed)
        truth = with_grads(eager, inputs, torch.float64)
        found = with_grads(linear_entropy, inputs), with_grads(eager, inputs)
        errors.append(
            [[(x - t).abs().max() for x, t in zip(xs, truth, strict=True)] for xs in found]
        )
        slacks.append([torch.finfo(dtype).eps * t.abs().max() for t in truth])
    ours, torchs = torch.tensor(errors).amax(0)
    assert (ours <= 2 * torchs + torch.tensor(slacks).amax(0)).all()


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "forget"])
def test_the_reference_works_by_chunks(monkeypatch, keep):
    hidden, weight, bias = batch(rows=200, v=38)
    whole = reference.linear_entropy(hidden, weight, bias, 1.0, keep)
    grads = reference.linear_entropy_bwd(whole[0], hidden, weight, bias, *whole, 1.0, True, True)
    # a function of the same name hides the module
    monkeypatch.setattr(sys.modules["edt_kernels.reference.linear_entropy"], "CHUNK", 64 * 38)
    parts = reference.linear_entropy(hidden, weight, bias, 1.0, keep)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-13)
    again = reference.linear_entropy_bwd(whole[0], hidden, weight, bias, *whole, 1.0, True, True)
    torch.testing.assert_close(again, grads, rtol=1e-12, atol=1e-12)


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_in_every_batch(dtype):
    hidden, weight, bias = batch(rows=230, d=33, v=70, dtype=dtype)
    h, grad, *_ = with_grads(linear_entropy, (hidden, weight, bias))
    order = torch.randperm(230)
    moved, moved_grad = linear_entropy_and_grad(hidden[order], weight, bias, order)
    assert torch.equal(moved, h[order].to(dtype)) and torch.equal(moved_grad, grad[order].to(dtype))
    for i in (0, 95, 96, 229):
        alone, alone_grad = linear_entropy_and_grad(hidden[i : i + 1], weight, bias, [i])
        assert alone == h[i].to(dtype) and torch.equal(alone_grad[0], grad[i].to(dtype))


def linear_entropy_and_grad(hidden, weight, bias, rows):
    """With the incoming gradients that `with_grads` gives `rows` of 230."""
    leaf = hidden.clone().requires_grad_()
    out = linear_entropy(leaf, weight, bias)
    grad = torch.linspace(0.5, 2, 230, dtype=torch.float64)[rows].to(out)
    return out.detach(), torch.autograd.grad(out, leaf, grad)[0]


@NATIVE
@pytest.mark.parametrize("v", [38, 300])
def test_same_bits_for_any_number_of_threads(v, threads):
    inputs = batch(rows=5000, d=16, v=v, dtype=torch.float32)
    threads(1)
    single = with_grads(linear_entropy, inputs)
    threads(2)
    assert all(map(torch.equal, single, with_grads(linear_entropy, inputs)))


@pytest.mark.usefixtures("poisoned")
def test_a_hidden_token_is_as_if_it_were_not():
    hidden, weight, bias = batch(rows=50, d=8, v=70)
    keep = torch.arange(70) != 66
    bias[66] = -torch.inf
    found = with_grads(linear_entropy, (hidden, weight, bias))
    expected = with_grads(linear_entropy, (hidden, weight[keep], bias[keep]))
    for ours, true in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-13)
    assert (found[2][66] == 0).all() and found[3][66] == 0


def test_nan_stays_in_its_row():
    hidden, weight, bias = batch(rows=50, d=8, v=70, dtype=torch.float32)
    clean = linear_entropy(hidden, weight, bias)
    hidden[3] = torch.nan
    found = linear_entropy(hidden, weight, bias)
    assert found.isnan().nonzero().tolist() == [[3]]
    assert torch.equal(found[4:], clean[4:])


@pytest.mark.parametrize("size", [1e3, 1e18, 1e-30])
def test_large_and_small_logits(size):
    hidden, weight, _ = batch(rows=20, d=8, v=70, dtype=torch.float32)
    found = with_grads(linear_entropy, (hidden * size, weight))
    truth = with_grads(eager, (hidden * size, weight), torch.float64)
    torch.testing.assert_close(found[0], truth[0], rtol=1e-3, atol=1e-5)
    assert all(x.isfinite().all() for x in found)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "v"), [(7, 11), (200, 64), (1100, 70), (97, 1)])
@pytest.mark.usefixtures("poisoned")
def test_kept_logits_give_the_gradients_of_forgotten_ones(rows, v, dtype):
    hidden, weight, bias = batch(rows, 20, v, dtype)
    ops = torch.ops.edt
    grads = []
    for keep in (True, False):
        h, *saved = ops.linear_entropy(hidden, weight, bias, 1.0, keep)
        kept = saved[-1]
        assert kept.dtype == h.dtype and kept.shape == (rows * keep, -(-v // 16) * 16)
        call = (h, hidden, weight, bias, h, *saved, 1.0, True, True)
        grads.append(ops.linear_entropy_bwd(*call))
        if keep:
            logits = F.linear(*(x.to(h.dtype) for x in (hidden, weight, bias)))
            torch.testing.assert_close(kept[:, :v], logits)
            assert (kept[:, v:] == -torch.inf).all()
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("v", "dtype", "kept"),
    [
        (30, torch.float32, True),
        (31, torch.float32, False),
        (15, torch.bfloat16, True),
        (16, torch.bfloat16, False),
        (30, torch.float64, True),
    ],
    ids=str,
)
def test_logits_are_kept_where_they_are_smaller_than_hidden(v, dtype, kept):
    inputs = [x.requires_grad_() for x in batch(rows=50, d=30, v=v, dtype=dtype)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape), lambda x: x):
        linear_entropy(*inputs)
    assert ((50, -(-v // 16) * 16) in saved) == kept


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
        for keep in (True, False):
            call = (x, weight, b, 1.5, keep)
            torch.library.opcheck(torch.ops.edt.linear_entropy.default, call)
            h, *saved = torch.ops.edt.linear_entropy(*call)
            args = (torch.ones(len(x)), x, weight, b, h, *saved, 1.5, True, b is not None)
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
