from __future__ import annotations

import doctest
import sys

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck

from edt_kernels import offsets_from_lengths, splice

LENGTHS = (3, 0, 2, 5)  # tokens of every prompt; the second is text only


def batch(lengths=LENGTHS, length=9, width=4, tail=2, added=3, dtype=torch.float64, seed=0):
    """embeds, tokens, new_rows and token_offsets, slots, new_ids of a batch of prompts."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    slots = torch.zeros(len(lengths), length, dtype=torch.bool)
    for row, count in enumerate(lengths):
        slots[row, torch.randperm(length, generator=g)[:count]] = True
    new_ids = torch.randint(-2, added, slots.shape, generator=g)  # in a slot the slot wins
    floats = [random(*slots.shape, width), random(sum(lengths) + tail, width), random(added, width)]
    return floats, (offsets_from_lengths(torch.tensor(lengths)), slots, new_ids)


def ours(floats, indices) -> Tensor:
    embeds, tokens, new_rows = floats
    offsets, slots, new_ids = indices
    return splice(embeds, tokens, offsets, slots, new_rows=new_rows, new_ids=new_ids)


def oracle(floats, indices) -> Tensor:
    """Position by position."""
    embeds, tokens, new_rows = floats
    offsets, slots, new_ids = indices
    rows = []
    for b in range(len(slots)):
        slot = int(offsets[b])
        row = []
        for s in range(slots.shape[1]):
            if slots[b, s]:
                row.append(tokens[slot])
                slot += 1
            elif new_ids[b, s] >= 0:
                row.append(new_rows[new_ids[b, s]])
            else:
                row.append(embeds[b, s])
        rows.append(torch.stack(row))
    return torch.stack(rows)


def with_grads(function, floats, indices) -> list[Tensor]:
    floats = [x.detach().clone().requires_grad_() for x in floats]
    out = function(floats, indices)
    g = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, floats, g)]


@pytest.fixture
def poisoned():
    """Fresh allocations hold NaN: what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned")
def test_matches_a_loop_over_positions():
    floats, indices = batch()
    before = [x.clone() for x in floats]
    torch.testing.assert_close(
        with_grads(ours, floats, indices),
        with_grads(oracle, floats, indices),
        rtol=1e-12,
        atol=1e-12,
    )
    assert all(torch.equal(x, y) for x, y in zip(floats, before, strict=True))


def test_without_new_rows():
    (embeds, tokens, _), (offsets, slots, _) = batch()
    out = splice(embeds, tokens, offsets.int(), slots)
    assert torch.equal(out[slots], tokens[: offsets[-1]])
    assert torch.equal(out[~slots], embeds[~slots])


def test_packed_embeddings_are_one_row():
    (embeds, tokens, new_rows), (offsets, slots, new_ids) = batch()
    packed = splice(
        embeds.flatten(0, 1),
        tokens,
        offsets[[0, -1]],
        slots.flatten(),
        new_rows=new_rows,
        new_ids=new_ids.flatten(),
    )
    padded = ours((embeds, tokens, new_rows), (offsets, slots, new_ids))
    assert torch.equal(packed, padded.flatten(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_copies_are_exact_and_shared_gradients_within_twice_the_error_of_torch(dtype):
    floats, indices = batch((40, 0, 500), 600, dtype=dtype)
    found = with_grads(ours, floats, indices)
    peer = with_grads(oracle, floats, indices)
    exact = with_grads(oracle, [x.double() for x in floats], indices)
    for mine, theirs in zip(found[:3], peer[:3], strict=True):
        assert torch.equal(mine, theirs)
    slack = torch.finfo(dtype).eps * exact[3].abs().max()
    assert found[3].dtype == dtype
    assert (found[3] - exact[3]).abs().max() <= 2 * (peer[3] - exact[3]).abs().max() + slack


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 2), (0, 1)], ids=str)
def test_gradients_of_every_subset_of_inputs(wanted):
    floats, indices = batch()
    right = with_grads(oracle, floats, indices)[1:]
    leaves = [x.clone().requires_grad_(k in wanted) for k, x in enumerate(floats)]
    out = ours(leaves, indices)
    out.backward(torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape))
    for k, leaf in enumerate(leaves):
        if k in wanted:
            torch.testing.assert_close(leaf.grad, right[k], rtol=1e-12, atol=1e-12)
        else:
            assert leaf.grad is None


def test_gradients_and_second_gradients():
    floats, indices = batch((1, 0), 3, 2, tail=1, added=2)
    floats = [x.requires_grad_() for x in floats]

    def square(*floats):
        return ours(floats, indices).square()

    assert gradcheck(square, floats, fast_mode=True)
    assert gradgradcheck(square, floats, fast_mode=True)


def test_opcheck():
    (embeds, tokens, new_rows), (offsets, slots, new_ids) = batch(dtype=torch.float32)
    permuted = embeds.transpose(0, 1).contiguous().transpose(0, 1)
    for x in (embeds, permuted):
        args = (x, tokens, offsets, slots, new_rows, new_ids)
        torch.library.opcheck(torch.ops.edt.splice.default, args)
        assert splice(*args[:4]).is_contiguous()
        torch.library.opcheck(torch.ops.edt.splice.default, (*args[:4], None, None))
        for wanted in ([True, True, True], [False, True, False]):
            args = (x, offsets, slots, new_ids, len(tokens), len(new_rows), wanted)
            torch.library.opcheck(torch.ops.edt.splice_bwd.default, args)


def test_compiles_once_for_all_sizes():
    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=backend)
    for lengths, length in ((LENGTHS, 9), ((4, 1, 0, 2, 3, 6), 11)):
        floats, indices = batch(lengths, length, width=7, dtype=torch.float32)
        torch.testing.assert_close(
            with_grads(compiled, floats, indices), with_grads(ours, floats, indices)
        )
    assert backend.frame_count == 1


def test_a_row_has_the_same_bits_alone():
    floats, (offsets, slots, new_ids) = batch((40, 1, 0, 500), 600, 24, dtype=torch.float32)
    embeds, tokens, new_rows = floats
    g = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(1))

    def run(embeds, tokens, offsets, slots, new_ids, g):
        leaves = [embeds.clone().requires_grad_(), tokens.clone().requires_grad_()]
        out = ours((*leaves, new_rows), (offsets, slots, new_ids))
        return out.detach(), *torch.autograd.grad(out, leaves, g)

    whole = run(embeds, tokens, offsets, slots, new_ids, g)
    for b, (begin, end) in enumerate(offsets.unfold(0, 2, 1).tolist()):
        row = slice(b, b + 1)
        alone = run(
            embeds[row],
            tokens[begin:end],
            torch.tensor([0, end - begin]),
            slots[row],
            new_ids[row],
            g[row],
        )
        for single, packed in zip(
            alone, (whole[0][row], whole[1][row], whole[2][begin:end]), strict=True
        ):
            assert torch.equal(single, packed)


def test_the_number_of_threads_changes_no_bit():
    floats, indices = batch((40, 0, 500), 600, 64, dtype=torch.float32)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(with_grads(ours, floats, indices))
    torch.set_num_threads(threads)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_nan_where_nothing_is_read_does_not_spread():
    (embeds, tokens, new_rows), (offsets, slots, new_ids) = batch()
    embeds[slots] = torch.nan
    tokens[offsets[-1] :] = torch.nan
    out, *grads = with_grads(ours, (embeds, tokens, new_rows), (offsets, slots, new_ids))
    assert not out.isnan().any()
    assert not any(grad.isnan().any() for grad in grads)
    assert grads[1][offsets[-1] :].eq(0).all()


@pytest.mark.parametrize(
    ("lengths", "length", "tail"), [((0, 0), 3, 0), ((0,), 0, 0), ((0,), 2, 2), ((1,), 1, 0)]
)
def test_batches_without_molecules(lengths, length, tail):
    floats, indices = batch(lengths, length, tail=tail)
    indices = (*indices[:2], torch.full_like(indices[2], -1))
    out, *grads = with_grads(ours, floats, indices)
    assert torch.equal(out, floats[1].unsqueeze(0) if sum(lengths) else floats[0])
    assert [grad.shape for grad in grads] == [x.shape for x in floats]


def test_no_rows_at_all():
    none = torch.zeros(1, dtype=torch.int64)
    out = splice(torch.ones(0, 3, 2), torch.ones(0, 2), none, torch.ones(0, 3, dtype=torch.bool))
    assert out.shape == (0, 3, 2)


def test_a_count_mismatch_names_the_row_and_both_numbers():
    (embeds, tokens, _), (offsets, slots, _) = batch()
    slots[2] = torch.arange(9) < 4
    message = "row has tokens, got 4 slots and 2 tokens in row 2"
    for x in (embeds, embeds.clone().requires_grad_()):
        with pytest.raises(ValueError, match=message):
            splice(x, tokens, offsets, slots)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"embeds": torch.ones(4)}, ValueError, r"embeds must have shape \[B, S, E\] or \[T, E\]"),
        ({"tokens": torch.ones(2, 3).double()}, TypeError, "tokens must be torch.float32"),
        ({"tokens": torch.ones(2, 5)}, ValueError, "tokens must have rows of width E = 3"),
        ({"token_offsets": torch.tensor([0, 1, 2])}, ValueError, "B = 1 rows of embeds"),
        ({"token_offsets": torch.tensor([0, 3])}, ValueError, "at most the number of rows 2"),
        ({"token_offsets": torch.tensor([1, 2])}, ValueError, r"token_offsets\[0\] must be 0"),
        ({"slots": torch.ones(1, 4)}, TypeError, "slots must be bool, got float32"),
        ({"slots": torch.ones(4, dtype=torch.bool)}, ValueError, r"slots must have shape \(1, 4\)"),
        ({"new_ids": None}, ValueError, "must come together, got new_ids=None"),
        ({"new_rows": None}, ValueError, "must come together, got new_rows=None"),
        ({"new_rows": torch.ones(0, 3)}, ValueError, "new_rows must have at least one row"),
        ({"new_ids": torch.zeros(1, 4).int()}, TypeError, "new_ids must be int64"),
        (
            {"new_ids": torch.tensor([[0, -1, 2, 0]])},
            ValueError,
            r"new_ids must be below 2, the number of new_rows, got 2 at \(0, 2\)",
        ),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {
        "embeds": torch.ones(1, 4, 3),
        "tokens": torch.ones(2, 3),
        "token_offsets": torch.tensor([0, 2]),
        "slots": torch.tensor([[True, True, False, False]]),
        "new_rows": torch.ones(2, 3),
        "new_ids": torch.tensor([[-1, -1, 0, 1]]),
    }
    with pytest.raises(error, match=message):
        splice(**(arguments | change))


def test_the_examples_run():
    result = doctest.testmod(sys.modules["edt_kernels.ops.splice"])
    assert result.attempted > 0
    assert result.failed == 0
