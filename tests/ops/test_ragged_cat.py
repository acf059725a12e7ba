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

from edt_kernels import offsets_from_lengths, ragged_cat, reference, testing

pytestmark = pytest.mark.usefixtures("backend")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LENGTHS = ((3, 0, 1, 5), (0, 2, 0, 4))  # of two ragged parts


def batch(lengths=LENGTHS, shape=(4,), anchors=2, tail=2, dtype=torch.float64, seed=0):
    """Parts ragged, broadcast, ragged, and their offsets; the first part has a tail."""
    g = torch.Generator().manual_seed(seed)
    rows = (sum(lengths[0]) + tail, anchors, sum(lengths[1]))
    parts = [torch.randn(n, *shape, generator=g, dtype=torch.float64).to(dtype) for n in rows]
    first, last = (offsets_from_lengths(torch.tensor(x, dtype=torch.int64)) for x in lengths)
    return parts, [first, None, last]


def oracle(parts, offsets) -> tuple[Tensor, Tensor]:
    """Molecule by molecule, with the tail of zeros that the capacity asks for."""
    molecules = len(next(own for own in offsets if own is not None)) - 1
    pieces, lengths = [], []
    for m in range(molecules):
        of_molecule = [
            part if own is None else part[own[m] : own[m + 1]]
            for part, own in zip(parts, offsets, strict=True)
        ]
        pieces += of_molecule
        lengths.append(sum(len(piece) for piece in of_molecule))
    capacity = sum(
        len(part) * (molecules if own is None else 1)
        for part, own in zip(parts, offsets, strict=True)
    )
    tail = parts[0].new_zeros(capacity - sum(lengths), *parts[0].shape[1:])
    return torch.cat([*pieces, tail]), offsets_from_lengths(
        torch.tensor(lengths, dtype=torch.int64)
    )


def with_grads(function, parts, offsets) -> list[Tensor]:
    parts = [part.detach().clone().requires_grad_() for part in parts]
    out, joined = function(parts, offsets)
    g = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return [out.detach(), joined, *torch.autograd.grad(out, parts, g)]


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_matches_a_loop_over_molecules(shape):
    parts, offsets = batch(shape=shape)
    torch.testing.assert_close(
        with_grads(ragged_cat, parts, offsets),
        with_grads(oracle, parts, offsets),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_copies_are_exact_and_shared_gradients_within_twice_the_error_of_torch(dtype):
    lengths = ((500, 1) * 40, (0, 2) * 40)
    parts, offsets = batch(lengths, (3,), dtype=dtype)
    ours = with_grads(ragged_cat, parts, offsets)
    peer = with_grads(oracle, parts, offsets)
    exact = with_grads(oracle, [part.double() for part in parts], offsets)
    slack = torch.finfo(dtype).eps * exact[3].abs().max()
    assert ours[3].dtype == dtype
    assert (ours[3] - exact[3]).abs().max() <= 2 * (peer[3] - exact[3]).abs().max() + slack
    for k in (0, 2, 4):
        assert torch.equal(ours[k], peer[k])


def test_gradients_of_every_subset_of_parts():
    parts, offsets = batch()
    right = with_grads(oracle, parts, offsets)[2:]
    for wanted in ((0,), (1,), (2,), (0, 2)):
        leaves = [part.clone().requires_grad_(k in wanted) for k, part in enumerate(parts)]
        out, joined = ragged_cat(leaves, offsets)
        assert not joined.requires_grad
        g = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape)
        out.backward(g)
        for k, leaf in enumerate(leaves):
            if k in wanted:
                torch.testing.assert_close(leaf.grad, right[k], rtol=1e-12, atol=1e-12)
            else:
                assert leaf.grad is None


def test_gradients_and_second_gradients():
    parts, offsets = batch(((2, 0, 1), (0, 1, 1)), (2,), tail=1)
    parts = [part.requires_grad_() for part in parts]

    def joined(*parts):
        return ragged_cat(parts, offsets)[0].square()

    assert gradcheck(joined, parts, fast_mode=True)
    assert gradgradcheck(joined, parts, fast_mode=True)


def test_opcheck():
    parts, offsets = batch(dtype=torch.float32)
    permuted = [part.t().contiguous().t() for part in parts]
    for inputs in (parts, permuted):
        torch.library.opcheck(torch.ops.edt.ragged_cat.default, (inputs, offsets))
        rows = [len(part) for part in inputs]
        out = ragged_cat(inputs, offsets)[0]
        for grad in (out, out.t().contiguous().t()):
            for wanted in ([True] * 3, [False, True, False]):
                args = (grad, offsets, rows, wanted)
                torch.library.opcheck(torch.ops.edt.ragged_cat_bwd.default, args)


def test_compiles_once_for_all_sizes():
    def joined(first, anchors, last, *offsets):
        return ragged_cat([first, anchors, last], [offsets[0], None, offsets[1]])

    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(joined, fullgraph=True, dynamic=True, backend=backend)
    for lengths in (LENGTHS, ((2, 6, 3, 0, 1, 2), (1, 1, 0, 2, 2, 1))):
        parts, offsets = batch(lengths, anchors=3, dtype=torch.float32)

        def flat(parts, offsets):
            return compiled(*parts, offsets[0], offsets[2])

        torch.testing.assert_close(
            with_grads(flat, parts, offsets), with_grads(ragged_cat, parts, offsets)
        )
    assert backend.frame_count == 1


def test_a_molecule_has_the_same_bits_alone():
    parts, offsets = batch(((500, 1, 0, 7), (0, 2, 0, 4)), dtype=torch.float32)
    g = torch.randn(600, 4, generator=torch.Generator().manual_seed(1))

    def run(parts, offsets, g):
        parts = [part.clone().requires_grad_() for part in parts]
        out, joined = ragged_cat(parts, offsets)
        grads = torch.autograd.grad(out, parts, g[: len(out)])
        return out.detach(), joined, grads

    whole, joined, grads = run(parts, offsets, g)
    for m in range(4):
        first, last = (slice(*own[m : m + 2].tolist()) for own in (offsets[0], offsets[2]))
        place = slice(*joined[m : m + 2].tolist())
        alone, _, alone_grads = run(
            [parts[0][first], parts[1], parts[2][last]],
            [
                offsets_from_lengths(own.diff()[m : m + 1]) if own is not None else None
                for own in offsets
            ],
            g[place],
        )
        assert torch.equal(alone, whole[place])
        assert torch.equal(alone_grads[0], grads[0][first])
        assert torch.equal(alone_grads[2], grads[2][last])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(threads, dtype):
    parts, offsets = batch(((5, 1) * 300, (0, 2) * 300), (96,), anchors=16, dtype=dtype)
    threads(1)
    alone = with_grads(ragged_cat, parts, offsets)
    for count in (2, 3, 8):
        threads(count)
        for one, many in zip(alone, with_grads(ragged_cat, parts, offsets), strict=True):
            assert torch.equal(one, many)


@st.composite
def batches(draw):
    """Random parts and their offsets, at least one of which is not None."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.sampled_from([(), (1,), (3,), (0,), (16,), (5, 7), (300,)]))
    molecules = draw(st.integers(0, 5))
    kinds = draw(st.lists(st.booleans(), min_size=1, max_size=4).filter(any))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    parts, offsets = [], []
    for ragged in kinds:
        lengths = torch.randint(6, (molecules,), generator=g)
        rows = draw(st.integers(0, 4)) + (int(lengths.sum()) if ragged else 0)
        parts.append(torch.randn(rows, *shape, generator=g, dtype=torch.float64).to(dtype))
        own = offsets_from_lengths(lengths)
        offsets.append(
            own.to(draw(st.sampled_from([torch.int32, torch.int64]))) if ragged else None
        )
    return parts, offsets


@settings(max_examples=100, deadline=None)
@given(batches(), st.lists(st.booleans(), min_size=4, max_size=4))
def test_any_batch_has_the_bits_of_the_reference(batch, wanted):
    parts, offsets = batch
    right, ends = reference.ragged_cat(parts, offsets)
    g = torch.randn(right.shape, generator=torch.Generator().manual_seed(1)).to(right.dtype)
    bwd_args = (g, offsets, [len(part) for part in parts], wanted[: len(parts)])
    right_grads = reference.ragged_cat_bwd(*bwd_args)
    with testing.poisoned():
        out, joined = torch.ops.edt.ragged_cat(parts, offsets)
        assert torch.equal(out, right)
        assert joined.dtype == ends.dtype and torch.equal(joined, ends)
        for grad, true in zip(torch.ops.edt.ragged_cat_bwd(*bwd_args), right_grads, strict=True):
            assert grad.dtype == true.dtype and torch.equal(grad, true)


def test_the_tail_is_left_out_and_filled_with_zeros():
    parts, offsets = batch()
    parts[0][offsets[0][-1] :] = torch.nan
    parts = [part.requires_grad_() for part in parts]
    out, joined = ragged_cat(parts, offsets)
    assert out.shape == (11 + 4 * 2 + 6, 4)  # shapes alone decide
    assert not out.isnan().any()
    assert out[joined[-1] :].eq(0).all()
    g = torch.ones_like(out)
    g[joined[-1] :] = torch.nan
    grads = torch.autograd.grad(out, parts, g)
    assert not any(grad.isnan().any() for grad in grads)
    assert grads[0][offsets[0][-1] :].eq(0).all()


def test_int32_offsets_stay_int32():
    parts, offsets = batch()
    narrow = [own if own is None else own.int() for own in offsets]
    out, joined = ragged_cat(parts, narrow)
    assert joined.dtype == torch.int32
    assert torch.equal(out, ragged_cat(parts, offsets)[0])
    assert ragged_cat(parts, [narrow[0], None, offsets[2]])[1].dtype == torch.int32


@pytest.mark.parametrize(
    ("lengths", "anchors", "tail"),
    [
        pytest.param(((0, 0), (0, 0)), 0, 0, id="nothing"),
        pytest.param(((0, 0), (0, 0)), 3, 2, id="anchors-only"),
        pytest.param(((1,), (0,)), 0, 0, id="one-atom"),
    ],
)
def test_empty_molecules(lengths, anchors, tail):
    parts, offsets = batch(lengths, anchors=anchors, tail=tail)
    torch.testing.assert_close(
        with_grads(ragged_cat, parts, offsets), with_grads(oracle, parts, offsets)
    )


@pytest.mark.parametrize("tail", [0, 3])
def test_no_molecules(tail):
    parts, offsets = batch(((), ()), tail=tail)
    out, joined, *grads = with_grads(ragged_cat, parts, offsets)
    assert torch.equal(out, torch.zeros(tail, 4, dtype=torch.float64))
    assert joined.tolist() == [0]
    for grad, part in zip(grads, parts, strict=True):
        assert torch.equal(grad, torch.zeros_like(part))


def test_wrong_arguments_are_named():
    x, offsets = torch.ones(3, 2), torch.tensor([0, 3])
    cases = [
        ([x], [], ValueError, "one entry per part, got 0 for 1 parts"),
        ([x.long()], [offsets], TypeError, r"parts\[0\] must be .*got int64"),
        ([x[0, 0]], [offsets], ValueError, r"parts\[0\] must have shape \[N, ...\], got"),
        ([x], [[0, 3]], TypeError, r"offsets\[0\] must be a tensor, got list"),
        ([x], [offsets.float()], TypeError, r"offsets\[0\] must be int64 or int32"),
        ([x], [offsets[:0]], ValueError, r"offsets\[0\] must have shape \[B \+ 1\]"),
        ([x], [torch.tensor([0, 2, 1])], ValueError, r"offsets\[0\]\[2\] = 1 after 2"),
        ([x], [None], ValueError, "at least one entry that is not None"),
        ([], [], ValueError, "at least one entry that is not None"),
        ([x, x.double()], [offsets, None], TypeError, r"parts\[1\] must be torch.float32"),
        ([x, x[:, :1]], [offsets, None], ValueError, r"parts\[1\] must have rows of shape \(2,\)"),
        ([x, x], [offsets, torch.tensor([0, 1, 3])], ValueError, r"offsets\[1\] must have shape"),
        (
            [x, x],
            [offsets, torch.tensor([0, 4])],
            ValueError,
            r"offsets\[1\]\[-1\] must be at most",
        ),
        ([x, x], [offsets, torch.tensor([1, 2])], ValueError, r"offsets\[1\]\[0\] must be 0"),
        ([x, None], [offsets, None], TypeError, r"parts\[1\] must be a tensor, got NoneType"),
    ]
    for parts, own, error, message in cases:
        with pytest.raises(error, match=message):
            ragged_cat(parts, own)


def test_the_kernel_reads_nothing_out_of_bounds(backend):
    if backend == "reference":
        pytest.skip("a reference relies on the checks of torch")
    parts, offsets = batch()
    rows = [len(part) for part in parts]
    grad = torch.ones(sum(rows) + 6, 4)
    torch.ops.edt.ragged_cat_bwd(grad, offsets, rows, [True] * 3)
    bad = [
        (grad[:-1], offsets, rows, [True] * 3),
        (grad[0, 0], offsets, rows, [True] * 3),
        (grad, offsets[:2], rows, [True] * 3),
        (grad, offsets, rows[:2], [True] * 3),
        (grad[:9], offsets, [rows[0], -1, rows[2]], [True] * 3),
        (grad, offsets, [rows[0] - 3, rows[1], rows[2] + 3], [True] * 3),
        (grad, [None] * 3, rows, [True] * 3),
        (grad, offsets, rows, [True] * 2),
    ]
    for args in bad:
        with pytest.raises(RuntimeError):
            torch.ops.edt.ragged_cat_bwd(*args)


def test_int32_offsets_that_would_overflow_are_refused(backend):
    if backend == "reference":
        pytest.skip("the reference would allocate an index of every row")
    many = torch.empty(2**30, 0)
    offsets = torch.zeros(4, dtype=torch.int64)
    joined = ragged_cat([many, many[:0]], [None, offsets])[1]
    assert joined.tolist() == [0, 2**30, 2**31, 3 * 2**30]
    with pytest.raises(RuntimeError, match="int64 to count 3221225472 rows, got int32"):
        ragged_cat([many, many[:0]], [None, offsets.int()])


def test_the_examples_run():
    result = doctest.testmod(sys.modules["edt_kernels.ops.ragged_cat"])
    assert result.attempted > 0
    assert result.failed == 0
