from __future__ import annotations

import itertools

import pytest
import torch

from edt_kernels import insert, offsets_from_lengths, reference

# Per row of text: its length, and (place in the row, tokens) of every molecule.
ROWS = (
    (4, [(2, 3)]),
    (3, []),  # text only
    (0, [(0, 2), (0, 1)]),  # molecules only
    (33, [(0, 1), (3, 0), (3, 31), (33, 2)]),  # at both ends, an empty group, two at one place
    (0, []),
    (1, [(1, 5)]),
)


def integers(values):
    return torch.tensor(list(values), dtype=torch.int64)


def batch(rows=ROWS, width=5, dtype=torch.float64):
    """Embeddings and tokens with NaN in their tails, and what `insert` takes besides."""
    g = torch.Generator().manual_seed(0)
    offsets = integers(itertools.accumulate((length for length, _ in rows), initial=0))
    groups = [(b, place, count) for b, (_, own) in enumerate(rows) for place, count in own]
    token_offsets = offsets_from_lengths(integers(count for _, _, count in groups))
    at = integers(int(offsets[b]) + place for b, place, _ in groups)
    floats = []
    for end, tail in ((offsets[-1], 2), (token_offsets[-1], 3)):
        x = torch.randn(int(end) + tail, width, generator=g, dtype=torch.float64)
        x[end:] = torch.nan
        floats.append(x.to(dtype))
    labels = torch.randint(100, (len(floats[0]),), generator=g)
    return floats, offsets, token_offsets, at, integers(b for b, _, _ in groups), labels


def ours(floats, offsets, token_offsets, at, rows, labels):
    leaves = [x.detach().clone().requires_grad_() for x in floats]
    out = insert(leaves[0], offsets, leaves[1], token_offsets, at, rows=rows, labels=labels)
    g = incoming(out.embeds, out.offsets)
    return [out[0].detach(), *out[1:], *torch.autograd.grad(out.embeds, leaves, g)]


def referred(floats, offsets, token_offsets, at, rows, labels):
    out = reference.insert(floats[0], offsets, floats[1], token_offsets, at, rows, labels)
    sizes = [len(x) for x in floats]
    g = incoming(out[0], out[1])
    grads = reference.insert_bwd(g, offsets, token_offsets, at, *sizes, [True, True])
    return [*out[:3], None if labels is None else out[3], *grads]


def incoming(out, offsets):
    g = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    g[offsets[-1] :] = torch.nan
    return g


def same(found, right):
    return all(
        (x is y is None) or (x.dtype == y.dtype and torch.equal(x, y))
        for x, y in zip(found, right, strict=True)
    )


@pytest.mark.parametrize("named", [True, False], ids=["rows", "no-rows"])
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no-labels"])
@pytest.mark.parametrize("width", [1, 5, 700])
def test_values_and_gradients(width, labelled, named):
    *call, rows, labels = batch(width=width)
    call += [rows if named else None, labels if labelled else None]
    assert same(ours(*call), referred(*call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_and_any_strides(dtype):
    floats, offsets, token_offsets, at, rows, labels = batch(dtype=dtype)
    call = (offsets.int(), token_offsets.int(), at, rows, labels)
    strided = (
        [x.T.contiguous().T for x in floats],
        *(x.repeat_interleave(2)[::2] for x in call),
    )
    assert same(ours(*strided), referred(floats, *call))


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param((), id="no rows"),
        pytest.param(((0, []),), id="an empty row"),
        pytest.param(((3, []),), id="no groups"),
        pytest.param(((0, [(0, 0), (0, 2)]), (0, [])), id="no text"),
    ],
)
def test_little_or_nothing(rows):
    call = batch(rows)
    assert same(ours(*call), referred(*call))


def test_only_the_gradients_that_are_wanted():
    floats, *call = batch()
    right = ours(floats, *call)
    offsets, token_offsets, at, rows, labels = call
    for i in range(2):
        leaves = [x.requires_grad_(k == i) for k, x in enumerate(x.clone() for x in floats)]
        out = insert(leaves[0], offsets, leaves[1], token_offsets, at, rows=rows, labels=labels)
        (grad,) = torch.autograd.grad(out[0], leaves[i], incoming(out[0], out[1]))
        assert torch.equal(grad, right[4 + i])
