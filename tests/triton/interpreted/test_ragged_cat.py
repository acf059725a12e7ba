from __future__ import annotations

import pytest
import torch

from edt_kernels import offsets_from_lengths, ragged_cat, reference
from edt_kernels.triton import ragged_cat as kernels

A, B = (0, 1, 31, 0, 33), (2, 0, 0, 0, 5)


def part(lengths, shape, seed, tail=2, dtype=torch.float64):
    """Rows with NaN in the tail, and offsets; rows alone for a number."""
    g = torch.Generator().manual_seed(seed)
    if isinstance(lengths, int):
        return torch.randn(lengths, *shape, generator=g, dtype=dtype), None
    values = torch.randn(sum(lengths) + tail, *shape, generator=g, dtype=dtype)
    values[sum(lengths) :] = torch.nan
    return values, offsets_from_lengths(torch.tensor(lengths, dtype=torch.int64))


LAYOUTS = [
    pytest.param((A,), id="ragged"),
    pytest.param((3, A), id="anchors-ragged"),
    pytest.param((A, 1, B), id="ragged-one-ragged"),
    pytest.param((A, B, 4, A, 2), id="five"),
    pytest.param((0, A), id="no-anchors"),
    pytest.param((2, (0, 0)), id="anchors-alone"),
    pytest.param((2, ()), id="no-molecules"),
]


def call(layout, shape, dtype=torch.float64):
    parts = [part(lengths, shape, seed, dtype=dtype) for seed, lengths in enumerate(layout)]
    return [values for values, _ in parts], [offsets for _, offsets in parts]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(), (5,), (2, 129)], ids=str)
def test_values_and_gradients(shape, layout):
    parts, offsets = call(layout, shape)
    leaves = [x.clone().requires_grad_() for x in parts]
    out, joined = ragged_cat(leaves, offsets)
    right, right_joined = reference.ragged_cat(parts, offsets)
    assert torch.equal(out, right) and torch.equal(joined, right_joined)
    g = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape)
    g[joined[-1] :] = torch.nan
    found = torch.autograd.grad(out, leaves, g)
    rows = [len(x) for x in parts]
    wanted = reference.ragged_cat_bwd(g, offsets, rows, [True] * len(rows))
    torch.testing.assert_close(found, tuple(wanted), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_every_dtype_and_any_strides(dtype, index, within_budget):
    parts, offsets = call((A, 3), (4,), dtype)
    offsets = [offsets[0].to(index).repeat_interleave(2)[::2], None]
    strided = [parts[0].T.contiguous().T, parts[1][:1].expand(3, 4)]
    leaves = [x.requires_grad_() for x in strided]
    out, joined = ragged_cat(leaves, offsets)
    right, right_joined = reference.ragged_cat(strided, offsets)
    assert out.dtype == dtype and torch.equal(out, right)
    assert joined.dtype == index and torch.equal(joined, right_joined)
    g = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape).to(dtype)
    found = torch.autograd.grad(out, leaves, g.T.contiguous().T)
    rows = [len(x) for x in parts]
    peer, truth = (
        reference.ragged_cat_bwd(g.to(kind), offsets, rows, [True, True])
        for kind in (dtype, torch.float64)
    )
    within_budget(found, peer, truth)


def test_the_gradient_of_anchors_is_summed_by_groups(monkeypatch):
    monkeypatch.setattr(kernels, "GROUP", 64)
    lengths = tuple(i % 3 for i in range(150))
    parts, offsets = call((2, lengths), (3,))
    out, _ = reference.ragged_cat(parts, offsets)
    arguments = (out, offsets, [2, len(parts[1])], [True, False])
    found, right = torch.ops.edt.ragged_cat_bwd(*arguments), reference.ragged_cat_bwd(*arguments)
    torch.testing.assert_close(found[0], right[0], rtol=1e-12, atol=1e-12)
    assert found[1].shape == (0,)


def test_rows_of_no_columns():
    parts, offsets = call((2, A), (0,))
    out, joined = ragged_cat(parts, offsets)
    assert out.shape == (5 * 2 + sum(A) + 2, 0)
    assert joined.tolist() == [0, 2, 5, 38, 40, 75]
