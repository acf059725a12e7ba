from __future__ import annotations

import itertools

import pytest
import torch

from edt_kernels import instance_lora, instance_lora_many, offsets_from_lengths, reference
from edt_kernels.testing import ragged
from edt_kernels.triton import instance_lora as kernels

LENGTHS = (3, 0, 1, 35, 16, 0)


def batch(lengths=LENGTHS, widths=(17, 33, 5), tail=2, dtype=torch.float64):
    """x, a, b and base, and their offsets; the tail of x is NaN."""
    d_in, d_out, rank = widths
    x, offsets = ragged(lengths, d_in, tail=tail, dtype=dtype)
    base, _ = ragged(lengths, d_out, tail=tail, dtype=dtype, seed=1)
    a, _ = ragged((), d_in, rank, tail=len(lengths), dtype=dtype, seed=2)
    b, _ = ragged((), rank, tail=d_out, dtype=dtype, seed=3)
    x[len(x) - tail :] = torch.nan
    return [x, a, b, base], offsets


def incoming(out):
    return torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)


def ours(inputs, offsets, scale=0.5):
    leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
    x, a, b, base = leaves
    out = instance_lora(x, a, b, offsets, scale=scale, base=base)
    return [out.detach(), *torch.autograd.grad(out, leaves[:3], incoming(out))]


def referred(inputs, offsets, scale=0.5):
    x, a, b, base = inputs
    out, shrunk = reference.instance_lora(x, a, b, offsets, scale, base)
    call = (incoming(out), x, a, b, shrunk, offsets, scale, True, True, True)
    return [out, *reference.instance_lora_bwd(*call)]


@pytest.mark.parametrize("widths", [(1, 1, 1), (17, 33, 5), (70, 40, 70)], ids=str)
@pytest.mark.parametrize(
    ("based", "index"), [(True, torch.int64), (False, torch.int32)], ids=["base", "no-base-int32"]
)
def test_values_and_gradients(widths, based, index):
    inputs, offsets = batch(widths=widths)
    inputs[3] = inputs[3] if based else None
    found = ours(inputs, offsets.to(index))
    torch.testing.assert_close(found, referred(inputs, offsets), rtol=1e-10, atol=1e-11)


def test_spans_of_the_width_and_parts_of_the_rows(monkeypatch):
    monkeypatch.setattr(kernels, "SPAN", 32)
    monkeypatch.setattr(kernels, "_parts", lambda rows, *_: (3, 32))
    inputs, offsets = batch(widths=(70, 40, 5))
    torch.testing.assert_close(
        ours(inputs, offsets), referred(inputs, offsets), rtol=1e-10, atol=1e-11
    )


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (1,), (1,) * 17, (48, 16, 32)], ids=str)
@pytest.mark.parametrize("tail", [0, 20])
def test_few_molecules_and_steps_of_decoding(lengths, tail):
    inputs, offsets = batch(lengths, tail=tail)
    torch.testing.assert_close(
        ours(inputs, offsets), referred(inputs, offsets), rtol=1e-10, atol=1e-11
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_error_is_within_twice_that_of_torch(dtype, within_budget):
    inputs, offsets = batch(widths=(40, 70, 16), dtype=dtype)
    peer = [x.to(dtype) for x in referred(inputs, offsets)]
    within_budget(ours(inputs, offsets), peer, referred([x.double() for x in inputs], offsets))


def test_a_text_without_a_molecule_keeps_its_base_to_the_bit():
    (x, a, b, base), offsets = batch(dtype=torch.float32)
    base[::3] = -0.0
    a[3] = 0
    out = instance_lora(x, a, b, offsets, base=base)
    rows = slice(*offsets[3:5].tolist())
    assert torch.equal(out[rows], base[rows])
    assert torch.equal(out[rows].signbit(), base[rows].signbit())
    assert torch.equal(out[offsets[-1] :], base[offsets[-1] :])


def test_a_molecule_has_the_same_bits_alone_and_in_another_order():
    inputs, offsets = batch(tail=0, dtype=torch.float32)
    x, a, b, base = inputs
    bounds = list(itertools.pairwise(offsets.tolist()))
    g = torch.randn(base.shape, generator=torch.Generator().manual_seed(4))

    def run(chosen):
        rows = torch.cat([torch.arange(*bounds[m]) for m in chosen])
        own = offsets_from_lengths(torch.tensor([LENGTHS[m] for m in chosen]))
        leaves = [t.clone().requires_grad_() for t in (x[rows], a[chosen])]
        out = instance_lora(*leaves, b, own, base=base[rows])
        found = (out.detach(), *torch.autograd.grad(out, leaves, g[rows]))
        return [*(t.split([LENGTHS[m] for m in chosen]) for t in found[:2]), found[2].split(1)]

    whole = run(list(range(len(LENGTHS))))
    for chosen in ([3], [4], [4, 1, 3, 2, 0]):
        for part, all_ in zip(run(chosen), whole, strict=True):
            assert all(torch.equal(part[k], all_[m]) for k, m in enumerate(chosen))


def test_many_layers_of_different_widths_and_ranks():
    widths = [(24, 40, 5), (24, 8, 20), (40, 8, 3)]
    layers = [batch((1, 0, 1, 1), w)[0] for w in widths]
    offsets = torch.tensor([0, 1, 1, 2, 3])
    layers[1][0] = layers[0][0]
    layers[1][3] = None
    x, a, b, base = (list(column) for column in zip(*layers, strict=True))
    found = instance_lora_many(x, a, b, offsets, scale=0.5, base=base)
    right = reference.instance_lora_many(x, a, b, offsets, 0.5, base)
    torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-11)
    singles = [instance_lora(*layer[:3], offsets, scale=0.5, base=layer[3]) for layer in layers]
    assert all(map(torch.equal, found, singles))


@pytest.mark.parametrize("wanted", list(itertools.product((True, False), repeat=3)), ids=str)
def test_only_the_gradients_that_are_wanted(wanted):
    inputs, offsets = batch()
    every = ours(inputs, offsets)[1:]
    leaves = [x.clone().requires_grad_(want) for x, want in zip(inputs, wanted, strict=False)]
    base = inputs[3].clone().requires_grad_()
    out = instance_lora(*leaves, offsets, scale=0.5, base=base)
    out.backward(incoming(out))
    assert torch.equal(base.grad, incoming(out))
    for leaf, want, grad in zip(leaves, wanted, every, strict=True):
        assert torch.equal(leaf.grad, grad) if want else leaf.grad is None
