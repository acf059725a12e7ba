from __future__ import annotations

import doctest
import sys

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from edt_kernels import (
    from_nested,
    offsets_from_batch,
    offsets_from_lengths,
    pad,
    ragged_split,
    to_nested,
    unpad,
)

LENGTHS = (3, 0, 1, 5)


def batch(lengths=LENGTHS, shape=(2,), tail=2, dtype=torch.float64):
    values = torch.randn(
        sum(lengths) + tail, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype
    )
    return values, offsets_from_lengths(torch.tensor(lengths, dtype=torch.int64))


@pytest.fixture
def poisoned():
    """Fresh allocations hold NaN: what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_offsets_from_lengths(dtype):
    offsets = offsets_from_lengths(torch.tensor([2, 0, 3], dtype=dtype))
    assert offsets.dtype == dtype
    assert offsets.tolist() == [0, 2, 2, 5]
    assert offsets_from_lengths(torch.empty(0, dtype=dtype)).tolist() == [0]


def test_offsets_from_batch_counts_empty_molecules():
    batch = torch.tensor([1, 1, 3])
    assert offsets_from_batch(batch).tolist() == [0, 0, 2, 2, 3]
    assert offsets_from_batch(batch, 6).tolist() == [0, 0, 2, 2, 3, 3, 3]
    assert offsets_from_batch(batch, 2).tolist() == [0, 0, 2]  # the last atom is tail
    assert offsets_from_batch(batch[:0]).tolist() == [0]
    assert offsets_from_batch(batch[:0], 2).tolist() == [0, 0, 0]


def test_offsets_from_batch_names_a_bad_batch():
    with pytest.raises(ValueError, match="must not decrease, got a fall after atom 1"):
        offsets_from_batch(torch.tensor([0, 2, 1]))
    with pytest.raises(ValueError, match="molecules from 0 on, got -1"):
        offsets_from_batch(torch.tensor([-1, 2]))
    with pytest.raises(TypeError, match="batch must be int64"):
        offsets_from_batch(torch.tensor([0.0]))


@pytest.mark.parametrize("length", [None, 5, 8])
@pytest.mark.parametrize("shape", [(), (2,), (2, 3)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_pad_and_unpad(length, shape):
    values, offsets = batch(shape=shape)
    values[offsets[-1] :] = torch.nan
    padded, mask = pad(values, offsets, length=length, fill=-7.0)
    assert padded.shape == (4, length or 5, *shape)
    for m, molecule in enumerate(ragged_split(values, offsets)):
        assert torch.equal(padded[m, : LENGTHS[m]], molecule)
        assert padded[m, LENGTHS[m] :].eq(-7).all()
        assert mask[m].tolist() == [s < LENGTHS[m] for s in range(length or 5)]
    assert torch.equal(unpad(padded, offsets.int()), values[: offsets[-1]])
    capacity = unpad(padded, offsets, rows=len(values))
    assert torch.equal(capacity[: offsets[-1]], values[: offsets[-1]])
    assert capacity[offsets[-1] :].eq(0).all()


def test_gradients_of_pad_and_unpad():
    values, offsets = batch((2, 0, 1), tail=1)
    values.requires_grad_()
    padded = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    for function, x in (
        (lambda values: pad(values, offsets)[0].square(), values),
        (lambda padded: unpad(padded, offsets, rows=4).square(), padded),
    ):
        assert gradcheck(function, (x,), fast_mode=True)
        assert gradgradcheck(function, (x,), fast_mode=True)


def test_nan_in_tail_and_padding_reaches_no_gradient():
    values, offsets = batch()
    values[offsets[-1] :] = torch.nan
    values.requires_grad_()
    padded, mask = pad(values, offsets, fill=torch.nan)
    unpad(padded.square(), offsets, rows=len(values)).sum().backward()
    assert torch.equal(padded.isnan().all(-1), ~mask)
    assert torch.equal(values.grad[: offsets[-1]], 2 * values.detach()[: offsets[-1]])
    assert values.grad[offsets[-1] :].eq(0).all()


def test_pad_and_unpad_compile_for_all_sizes():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def double(values, offsets, length):
        padded, mask = pad(values, offsets, length=length)
        return unpad(2 * padded, offsets, rows=values.shape[0]), mask

    for lengths in (LENGTHS, (4, 2, 0, 1, 6)):
        values, offsets = batch(lengths)
        values.requires_grad_()
        out, _ = double(values, offsets, 7)
        out.sum().backward()
        assert torch.equal(out[: offsets[-1]], 2 * values[: offsets[-1]])
        assert torch.equal(values.grad[: offsets[-1]], torch.full_like(values, 2)[: offsets[-1]])


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (1,)], ids=str)
@pytest.mark.parametrize("tail", [0, 2])
def test_empty_batches(lengths, tail):
    values, offsets = batch(lengths, tail=tail)
    padded, mask = pad(values, offsets)
    assert padded.shape == (len(lengths), max(lengths, default=0), 2)
    assert mask.sum() == sum(lengths)
    assert torch.equal(unpad(padded, offsets), values[: sum(lengths)])
    assert unpad(padded, offsets, rows=sum(lengths) + 3).shape == (sum(lengths) + 3, 2)
    assert [len(molecule) for molecule in ragged_split(values, offsets)] == list(lengths)


def test_nested_there_and_back():
    values, offsets = batch()
    nested = to_nested(values, offsets)
    for molecule, expected in zip(nested.unbind(), ragged_split(values, offsets), strict=True):
        assert torch.equal(molecule, expected)
    back, back_offsets = from_nested(nested)
    assert torch.equal(back, values[: offsets[-1]])
    assert back.data_ptr() == values.data_ptr()
    assert torch.equal(back_offsets, offsets)


def test_gradients_pass_through_nested():
    values, offsets = batch()
    values.requires_grad_()
    back, _ = from_nested(to_nested(values, offsets) * 3)
    back.sum().backward()
    assert values.grad[: offsets[-1]].eq(3).all()
    assert values.grad[offsets[-1] :].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (2, 0)], ids=str)
def test_nested_with_empty_molecules(lengths, dtype):
    values, offsets = batch(lengths)
    nested = to_nested(values, offsets.to(dtype))
    assert nested.shape[0] == len(lengths)
    back, back_offsets = from_nested(nested)
    assert torch.equal(back, values[: sum(lengths)])
    assert torch.equal(back_offsets, offsets.to(dtype))


def test_gradients_reach_the_parts_of_a_nested_tensor():
    parts = [torch.randn(n, 2, requires_grad=True) for n in LENGTHS]
    values, offsets = from_nested(torch.nested.as_nested_tensor(parts, layout=torch.jagged))
    assert offsets.tolist() == [0, 3, 3, 4, 9]
    (values * torch.arange(9.0).unsqueeze(1)).sum().backward()
    grads = torch.cat([part.grad for part in parts])
    assert torch.equal(grads, torch.arange(9.0).unsqueeze(1).expand(9, 2))


def test_from_nested_names_what_it_cannot_take():
    with pytest.raises(TypeError, match=r"layout torch.jagged, got torch.strided"):
        from_nested(torch.ones(2))
    with pytest.raises(TypeError, match="got list"):
        from_nested([torch.ones(2)])
    values, offsets = batch()
    holes = torch.nested.nested_tensor_from_jagged(values, offsets, lengths=offsets.diff())
    with pytest.raises(ValueError, match="got one with lengths of its own"):
        from_nested(holes)
    with pytest.raises(ValueError, match="must be ragged in dimension 1, got 2"):
        from_nested(to_nested(values, offsets).transpose(1, 2))


def test_wrong_arguments_are_named():
    values, offsets = batch()
    padded, _ = pad(values, offsets)
    cases = [
        (lambda: pad(values, offsets, length=4), ValueError, "length must be at least 5"),
        (lambda: pad(values, offsets + 1), ValueError, r"offsets\[0\] must be 0"),
        (lambda: pad(values[:4], offsets), ValueError, "at most the number of rows 4"),
        (lambda: pad([1], offsets), TypeError, "values must be a tensor, got list"),
        (lambda: pad(values, offsets.float()), TypeError, "offsets must be int64 or int32"),
        (lambda: unpad(padded[:, :3], offsets), ValueError, "padded must have S >= 5"),
        (lambda: unpad(padded[:2], offsets), ValueError, "B = 2 rows of padded"),
        (lambda: unpad(padded[:, 0, 0], offsets), ValueError, r"padded must have shape \[B, S"),
        (lambda: unpad(padded, offsets, rows=3), ValueError, "at most the number of rows 3"),
        (lambda: to_nested(values[:4], offsets), ValueError, "at most the number of rows 4"),
        (lambda: ragged_split(values, offsets.flip(0)), ValueError, r"offsets\[0\] must be 0"),
        (lambda: offsets_from_lengths(torch.ones(2)), TypeError, "lengths must be int64 or int32"),
        (lambda: offsets_from_lengths(torch.tensor([2, -1])), ValueError, "at least 0, got -1"),
        (
            lambda: offsets_from_lengths(torch.tensor([2**31 - 1, 1], dtype=torch.int32)),
            ValueError,
            "lengths must be int64 for a sum of 2147483648, got int32",
        ),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


def test_the_examples_run():
    result = doctest.testmod(sys.modules["edt_kernels.borders"])
    assert result.attempted > 0
    assert result.failed == 0
