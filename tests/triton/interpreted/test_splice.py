from __future__ import annotations

import pytest
import torch

from edt_kernels import offsets_from_lengths, reference, splice


def batch(counts=(3, 0, 31), length=40, width=5, dtype=torch.float64, packed=False, seed=0):
    """Arguments of `splice`: `counts` tokens in every row, NaN in the tail of the tokens."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randn(sum(counts) + 2, width, generator=g, dtype=torch.float64)
    tokens[sum(counts) :] = torch.nan
    new_rows = torch.randn(3, width, generator=g, dtype=torch.float64)
    embeds = torch.randn(len(counts), length, width, generator=g, dtype=torch.float64)
    slots = torch.zeros(len(counts), length, dtype=torch.bool)
    for row, count in enumerate(counts):
        slots[row, torch.randperm(length, generator=g)[:count]] = True
    new_ids = torch.randint(-1, 3, slots.shape, generator=g)
    offsets = offsets_from_lengths(torch.tensor(counts, dtype=torch.int64))
    if packed:
        embeds, slots, new_ids = embeds.flatten(0, 1), slots.flatten(), new_ids.flatten()
        offsets = offsets[[0, -1]]
    floats = (embeds.to(dtype), tokens.to(dtype), new_rows.to(dtype))
    return floats, offsets, slots, new_ids


def incoming(out):
    return torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)


def ours(floats, offsets, slots, new_ids):
    leaves = [x.detach().clone().requires_grad_() for x in floats]
    new = {"new_rows": leaves[2], "new_ids": new_ids} if new_ids is not None else {}
    out = splice(leaves[0], leaves[1], offsets, slots, **new)
    kept = leaves[: 3 if new else 2]
    return [out.detach(), *torch.autograd.grad(out, kept, incoming(out))]


def referred(floats, offsets, slots, new_ids):
    new = None if new_ids is None else floats[2]
    out = reference.splice(*floats[:2], offsets, slots, new, new_ids)
    sizes = len(floats[1]), 0 if new is None else 3
    wanted = [True, True, new is not None]
    found = [out, *reference.splice_bwd(incoming(out), offsets, slots, new_ids, *sizes, wanted)]
    return found if new is not None else found[:3]


def close(found, right):
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("added", [True, False], ids=["new", "plain"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("width", [1, 5, 700])
def test_values_and_gradients(width, packed, added):
    floats, offsets, slots, new_ids = batch(width=width, packed=packed)
    call = (floats, offsets, slots, new_ids if added else None)
    close(ours(*call), referred(*call))


@pytest.mark.parametrize("length", [31, 1024, 1025])
def test_rows_of_any_length(length):
    call = batch((31, 1, 0), length, width=2)
    close(ours(*call), referred(*call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_and_any_strides(dtype, within_budget):
    floats, offsets, slots, new_ids = batch(dtype=dtype)
    call = (offsets.int(), slots, new_ids)
    strided = [x.mT.contiguous().mT for x in floats]
    found = ours(strided, offsets.int().repeat_interleave(2)[::2], slots.T.contiguous().T, new_ids)
    peer, truth = referred(floats, *call), referred([x.double() for x in floats], *call)
    assert all(map(torch.equal, found[:3], peer[:3]))
    within_budget(found[3:], peer[3:], truth[3:])


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(((), 4), id="no rows"),
        pytest.param(((0, 0), 3), id="no slots"),
        pytest.param(((2,), 2), id="nothing but slots"),
        pytest.param(((0,), 0), id="no positions"),
    ],
)
def test_little_or_nothing(call):
    call = batch(*call)
    close(ours(*call), referred(*call))


@pytest.mark.parametrize("counts", [(5, 0, 0), (2, 1, 2)], ids=["too few slots", "too many"])
def test_what_does_not_agree_stays_in_bounds(counts, monkeypatch):
    monkeypatch.setitem(reference.splice.__globals__, "_check_contents", lambda *_: None)
    floats, _, slots, new_ids = batch((2, 1, 2))
    slots = slots | (torch.arange(40) < 2) if counts[1] else slots
    call = (floats, offsets_from_lengths(torch.tensor(counts)), slots, new_ids)
    close(ours(*call), referred(*call))
