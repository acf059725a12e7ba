from __future__ import annotations

import doctest
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck

from edt_kernels import offsets_from_lengths, reference, splice, testing

pytestmark = pytest.mark.usefixtures("backend")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
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
    offsets = offsets_from_lengths(torch.tensor(lengths, dtype=torch.int64))
    return floats, (offsets, slots, new_ids)


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


def test_the_kernel_takes_any_byte_but_0_for_a_slot(backend):
    if backend == "reference":
        pytest.skip("torch promises nothing for such booleans")
    (embeds, tokens, _), (offsets, slots, _) = batch()
    bytes_ = slots.to(torch.uint8) * 2
    right = splice(embeds, tokens, offsets, slots)
    assert torch.equal(splice(embeds, tokens, offsets, bytes_.view(torch.bool)), right)


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


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(threads, dtype):
    floats, indices = batch((40, 0, 500), 600, 300, dtype=dtype)
    threads(1)
    alone = with_grads(ours, floats, indices)
    for count in (2, 3, 8):
        threads(count)
        for one, many in zip(alone, with_grads(ours, floats, indices), strict=True):
            assert torch.equal(one, many)


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


def test_rows_of_longer_prompts_are_read_in_place():
    (embeds, tokens, new_rows), (offsets, slots, new_ids) = batch(width=7)
    wider = torch.full((4, 12, 9), torch.nan, dtype=embeds.dtype)
    views = {
        "rows and columns": wider[:, 2:11, 1:8],
        "columns first": wider.transpose(1, 2)[:, 1:8, 2:11].transpose(1, 2),
        "transposed": torch.empty(7, 9, 4, dtype=embeds.dtype).permute(2, 1, 0),
        "batch second": torch.empty(9, 4, 7, dtype=embeds.dtype).transpose(0, 1),
    }
    slots, new_ids = slots.t().contiguous().t(), new_ids.t().contiguous().t()
    floats, indices = (embeds, tokens, new_rows), (offsets, slots, new_ids)
    g = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(2)).double()
    right = ours(floats, indices)
    leaves = [x.clone().requires_grad_() for x in floats]
    grads = torch.autograd.grad(ours(leaves, indices), leaves, g)
    for view in views.values():
        with torch.no_grad():
            view.copy_(embeds)
        assert torch.equal(ours((view, tokens, new_rows), indices), right)
        with torch.no_grad():
            view.copy_(g)
        again = torch.autograd.grad(ours(leaves, indices), leaves, view)
        assert all(torch.equal(x, y) for x, y in zip(again, grads, strict=True))
    ones = torch.autograd.grad(ours(leaves, indices).sum(), leaves)  # a gradient of stride 0
    right = torch.autograd.grad(oracle(leaves, indices).sum(), leaves)
    torch.testing.assert_close(ones, right, rtol=1e-12, atol=1e-12)


@st.composite
def prompts(draw):
    """A random batch: (floats, indices), packed or padded."""
    lengths = draw(st.lists(st.integers(0, 6), max_size=4))
    length = draw(st.integers(max(lengths, default=0), 9))
    floats, indices = batch(
        lengths,
        length,
        draw(st.sampled_from([0, 1, 3, 16, 17, 40, 1100])),
        draw(st.integers(0, 2)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(0, 10_000)),
    )
    if draw(st.booleans()):
        embeds, *others = floats
        offsets, *marks = indices
        return [embeds.flatten(0, 1), *others], (
            offsets[[0, -1]],
            *(mark.flatten() for mark in marks),
        )
    return floats, indices


@settings(max_examples=100, deadline=None)
@given(prompts(), st.lists(st.booleans(), min_size=3, max_size=3), st.booleans())
def test_any_batch_has_the_bits_of_the_reference(batch, wanted, plain):
    (embeds, tokens, new_rows), (offsets, slots, new_ids) = batch
    new = (None, None) if plain else (new_rows, new_ids)
    args = (embeds, tokens, offsets, slots, *new)
    right = reference.splice(*args)
    g = torch.randn(right.shape, generator=torch.Generator().manual_seed(1)).to(right.dtype)
    bwd_args = (g, offsets, slots, new[1], len(tokens), 0 if plain else len(new_rows), wanted)
    right_grads = reference.splice_bwd(*bwd_args)
    with testing.poisoned():
        assert torch.equal(torch.ops.edt.splice(*args), right)
        for grad, true in zip(torch.ops.edt.splice_bwd(*bwd_args), right_grads, strict=True):
            assert grad.dtype == true.dtype and torch.equal(grad, true)


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
        ({"embeds": [1.0]}, TypeError, "embeds must be a tensor, got list"),
        ({"embeds": torch.ones(1, 4, 3).long()}, TypeError, "embeds must be .*got int64"),
        ({"tokens": None}, TypeError, "tokens must be a tensor, got NoneType"),
        ({"tokens": torch.ones(2, 3, 1)}, ValueError, "tokens must have 2 dimensions"),
        ({"embeds": torch.ones(4)}, ValueError, r"embeds must have shape \[B, S, E\] or \[T, E\]"),
        ({"tokens": torch.ones(2, 3).double()}, TypeError, "tokens must be torch.float32"),
        ({"tokens": torch.ones(2, 5)}, ValueError, "tokens must have rows of width E = 3"),
        ({"token_offsets": torch.tensor([0, 1, 2])}, ValueError, "B = 1 rows of embeds"),
        ({"token_offsets": torch.tensor([0, 3])}, ValueError, "at most the number of rows 2"),
        ({"token_offsets": torch.tensor([1, 2])}, ValueError, r"token_offsets\[0\] must be 0"),
        ({"token_offsets": torch.tensor([0.0, 2.0])}, TypeError, "token_offsets must be int64 or"),
        (
            {"token_offsets": torch.tensor([0, 1])},
            ValueError,
            "got 2 slots and 1 tokens in row 0",
        ),
        ({"slots": torch.ones(1, 4)}, TypeError, "slots must be bool, got float32"),
        ({"slots": torch.ones(4, dtype=torch.bool)}, ValueError, r"slots must have shape \(1, 4\)"),
        ({"new_ids": None}, ValueError, "must come together, got new_ids=None"),
        ({"new_rows": None}, ValueError, "must come together, got new_rows=None"),
        ({"new_rows": torch.ones(0, 3)}, ValueError, "new_rows must have at least one row"),
        ({"new_rows": torch.ones(2, 3).double()}, TypeError, "new_rows must be torch.float32"),
        ({"new_rows": torch.ones(2, 4)}, ValueError, "new_rows must have rows of width E = 3"),
        ({"new_ids": torch.zeros(4).long()}, ValueError, r"new_ids must have shape \(1, 4\)"),
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


def test_the_backend_that_is_asked_for_serves(backend):
    (embeds, tokens, _), (offsets, slots, _) = batch()
    message = "slots: count" if backend == "native" else "slots must hold as many"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.edt.splice(embeds, tokens, offsets, ~slots, None, None)


def test_the_kernel_reads_nothing_out_of_bounds(backend):
    if backend == "reference":
        pytest.skip("a reference relies on the checks of torch")
    (_, tokens, new_rows), (offsets, slots, new_ids) = batch(dtype=torch.float32)
    good = (torch.ones(4, 9, 4), offsets, slots, new_ids, len(tokens), len(new_rows), [True] * 3)
    torch.ops.edt.splice_bwd(*good)
    bad = {
        0: (torch.ones(4, 8, 4), torch.ones(3, 9, 4), torch.ones(36, 4), torch.ones(4)),
        1: (offsets[:-1], offsets + 1),
        2: (slots[:, :-1], slots.flatten(), ~slots, slots.int()),
        3: (new_ids + 2, new_ids.flatten(), new_ids.int()),
        4: (len(tokens) - 3, -1),
        5: (2, -1),
        6: ([True],),
    }
    for i, values in bad.items():
        for value in values:
            with pytest.raises(RuntimeError):
                torch.ops.edt.splice_bwd(*good[:i], value, *good[i + 1 :])


def test_the_examples_run():
    result = doctest.testmod(sys.modules["edt_kernels.ops.splice"])
    assert result.attempted > 0
    assert result.failed == 0
