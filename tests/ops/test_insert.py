from __future__ import annotations

import doctest
import itertools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck

from edt_kernels import insert, offsets_from_lengths, reference, splice, testing

pytestmark = pytest.mark.usefixtures("backend")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Per row of text: its length, and (place in the row, tokens) of every molecule.
ROWS = (
    (4, [(2, 3)]),
    (3, []),  # text only
    (0, [(0, 2), (0, 1)]),  # molecules only
    (5, [(0, 1), (3, 0), (3, 4), (5, 2)]),  # at both ends, an empty group, two at one place
    (0, []),
    (2, [(2, 5)]),
)


def batch(rows=ROWS, width=4, tail=(2, 3), dtype=torch.float64, seed=0):
    """embeds, tokens and embed_offsets, token_offsets, at, rows, labels of a batch."""
    g = torch.Generator().manual_seed(seed)
    offsets = integers(itertools.accumulate((length for length, _ in rows), initial=0))
    groups = [(b, place, count) for b, (_, own) in enumerate(rows) for place, count in own]
    token_offsets = offsets_from_lengths(integers(count for _, _, count in groups))
    at = integers(int(offsets[b]) + place for b, place, _ in groups)
    text = int(offsets[-1]) + tail[0]
    floats = [
        torch.randn(count, width, generator=g, dtype=torch.float64).to(dtype)
        for count in (text, int(token_offsets[-1]) + tail[1])
    ]
    labels = torch.randint(100, (text,), generator=g)
    return floats, (offsets, token_offsets, at, integers(b for b, _, _ in groups), labels)


def integers(values) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)


def ours(floats, indices):
    (embeds, tokens), (offsets, token_offsets, at, rows, labels) = floats, indices
    return insert(embeds, offsets, tokens, token_offsets, at, rows=rows, labels=labels)


def oracle(floats, indices):
    """Row by row, with the tail that the capacity asks for."""
    (embeds, tokens), (offsets, token_offsets, at, rows, labels) = floats, indices
    pieces, targets, positions, lengths = [embeds[:0]], [], [], []
    for b, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        length = 0
        for t in range(begin, end + 1):
            for g in range(len(at)):
                if rows[g] == b and at[g] == t:
                    group = tokens[token_offsets[g] : token_offsets[g + 1]]
                    pieces.append(group)
                    targets += [-100] * len(group)
                    length += len(group)
            if t < end:
                pieces.append(embeds[t : t + 1])
                targets.append(int(labels[t]))
                length += 1
        positions += range(length)
        lengths.append(length)
    tail = len(embeds) + len(tokens) - sum(lengths)
    return (
        torch.cat([*pieces, embeds.new_zeros(tail, embeds.shape[1])]),
        offsets_from_lengths(integers(lengths)),
        integers(positions + [0] * tail),
        integers(targets + [-100] * tail),
    )


def with_grads(function, floats, indices) -> list[Tensor]:
    floats = [x.detach().clone().requires_grad_() for x in floats]
    out, *others = function(floats, indices)
    g = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return [out.detach(), *others, *torch.autograd.grad(out, floats, g)]


def same(one, other) -> bool:
    return all(
        x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y)
        for x, y in zip(one, other, strict=True)
    )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tail", [(0, 0), (2, 3)], ids=["exact", "tail"])
def test_matches_a_loop_over_rows(dtype, tail):
    floats, indices = batch(dtype=dtype, tail=tail)
    before = [x.clone() for x in (*floats, *indices)]
    found = with_grads(ours, floats, indices)
    assert same(found, with_grads(oracle, floats, indices))
    assert not any(x.requires_grad for x in found)
    assert same((*floats, *indices), before)


def test_what_is_not_asked_for_is_not_there():
    floats, indices = batch()
    longer = ours(floats, (*indices[:4], None))
    assert longer.labels is None
    assert same(longer[:3], ours(floats, indices)[:3])
    assert longer._fields == ("embeds", "offsets", "positions", "labels")


def test_int32_offsets_stay_int32():
    floats, (offsets, token_offsets, *others) = batch()
    narrow = ours(floats, (offsets.int(), token_offsets.int(), *others))
    wide = ours(floats, (offsets, token_offsets, *others))
    assert narrow.offsets.dtype == torch.int32
    assert torch.equal(narrow.offsets.long(), wide.offsets)
    assert same((narrow.embeds, *narrow[2:]), (wide.embeds, *wide[2:]))


@pytest.mark.parametrize(
    ("offsets", "at", "rows"),
    [
        pytest.param([0, 3, 5], [0, 1, 3, 4, 5], [0, 0, 1, 1, 1], id="the row that begins there"),
        pytest.param([0, 3, 3, 5], [2, 3], [0, 2], id="an empty row gets none before others"),
        pytest.param([0, 3, 3], [2, 3, 3], [0, 1, 1], id="an empty last row gets them"),
        pytest.param([0, 0, 2], [0, 2], [1, 1], id="an empty first row gets none"),
        pytest.param([0, 0], [0, 0], [0, 0], id="no text"),
        pytest.param([0, 3], [], [], id="no groups"),
        pytest.param([0], [], [], id="no rows"),
    ],
)
def test_rows_that_are_not_given(offsets, at, rows):
    token_offsets = integers(range(len(at) + 1))
    floats = [torch.randn(offsets[-1], 2), torch.randn(len(at), 2)]
    indices = [integers(offsets), token_offsets, integers(at)]
    labels = torch.arange(offsets[-1])
    found = ours(floats, (*indices, None, labels))
    assert same(found, ours(floats, (*indices, integers(rows), labels)))
    assert same(found, oracle(floats, (*indices, integers(rows), labels)))


def test_rows_move_borders_and_nothing_else():
    floats = [torch.randn(4, 2), torch.randn(3, 2)]
    found = [
        ours(floats, (integers([0, 2, 4]), integers([0, 3]), integers([2]), integers([row]), None))
        for row in (0, 1)
    ]
    assert torch.equal(found[0].embeds, found[1].embeds)
    assert [x.offsets.tolist() for x in found] == [[0, 5, 7], [0, 2, 7]]
    assert found[0].positions.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert found[1].positions.tolist() == [0, 1, 0, 1, 2, 3, 4]


def test_agrees_with_splice_of_expanded_placeholders():
    floats, (offsets, token_offsets, at, rows, labels) = batch(tail=(0, 0))
    longer = ours(floats, (offsets, token_offsets, at, rows, labels))
    slots = longer.labels == -100
    text = torch.zeros(len(slots), floats[0].shape[1], dtype=floats[0].dtype)
    text[~slots] = floats[0]
    ends = token_offsets[[0, -1]]
    assert torch.equal(splice(text, floats[1], ends, slots), longer.embeds)


@pytest.mark.parametrize("wanted", [(0,), (1,)], ids=["embeds", "tokens"])
def test_gradients_of_every_subset_of_inputs(wanted):
    floats, indices = batch()
    right = with_grads(oracle, floats, indices)[4:]
    leaves = [x.clone().requires_grad_(k in wanted) for k, x in enumerate(floats)]
    out = ours(leaves, indices).embeds
    out.backward(torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape))
    for k, leaf in enumerate(leaves):
        assert torch.equal(leaf.grad, right[k]) if k in wanted else leaf.grad is None


def test_gradients_and_second_gradients():
    floats, indices = batch(((2, [(1, 2)]), (0, [(0, 1)])), 2, tail=(1, 1))
    floats = [x.requires_grad_() for x in floats]

    def square(*floats):
        return ours(floats, indices).embeds.square()

    assert gradcheck(square, floats, fast_mode=True)
    assert gradgradcheck(square, floats, fast_mode=True)


def test_opcheck():
    floats, (offsets, token_offsets, at, rows, labels) = batch(dtype=torch.float32)
    permuted = [x.t().contiguous().t() for x in floats]
    for embeds, tokens in (floats, permuted):
        for optional in ((rows, labels), (None, None)):
            args = (embeds, offsets, tokens, token_offsets, at, *optional)
            torch.library.opcheck(torch.ops.edt.insert.default, args)
        grad = torch.cat([embeds, tokens])
        for wanted in ([True, True], [False, True]):
            args = (grad, offsets, token_offsets, at, len(embeds), len(tokens), wanted)
            torch.library.opcheck(torch.ops.edt.insert_bwd.default, args)


def test_compiles_once_for_all_sizes():
    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=backend)
    for rows, tail in ((ROWS, (2, 3)), ((*ROWS[:4], (7, [(1, 9), (4, 2)])), (4, 5))):
        floats, indices = batch(rows, 11, tail=tail, dtype=torch.float32)
        assert same(with_grads(compiled, floats, indices), with_grads(ours, floats, indices))
    assert backend.frame_count == 1


def test_a_row_has_the_same_bits_alone():
    floats, (offsets, token_offsets, at, rows, labels) = batch(dtype=torch.float32)
    whole = ours(floats, (offsets, token_offsets, at, rows, labels))
    for b, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        mine = (rows == b).nonzero().flatten().tolist()
        first, last = (mine[0], mine[-1] + 1) if mine else (0, 0)
        alone = insert(
            floats[0][begin:end],
            integers([0, end - begin]),
            floats[1][token_offsets[first] : token_offsets[last]],
            token_offsets[first : last + 1] - token_offsets[first],
            at[first:last] - begin,
            labels=labels[begin:end],
        )
        place = slice(*whole.offsets[b : b + 2].tolist())
        for single, packed in zip(alone[::2], whole[::2], strict=True):
            assert torch.equal(single, packed[place])
        assert torch.equal(alone.labels, whole.labels[place])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(threads, dtype):
    floats, indices = batch(ROWS * 60, 300, dtype=dtype)
    threads(1)
    alone = with_grads(ours, floats, indices)
    for count in (2, 3, 8):
        threads(count)
        assert same(with_grads(ours, floats, indices), alone)


def test_nan_in_tails_does_not_spread():
    floats, indices = batch()
    floats[0][indices[0][-1] :] = torch.nan
    floats[1][indices[1][-1] :] = torch.nan
    leaves = [x.requires_grad_() for x in floats]
    longer = ours(leaves, indices)
    end = longer.offsets[-1]
    assert not longer.embeds.isnan().any()
    assert longer.embeds[end:].eq(0).all()
    g = torch.ones_like(longer.embeds)
    g[end:] = torch.nan
    grads = torch.autograd.grad(longer.embeds, leaves, g)
    for grad, offsets in zip(grads, indices[:2], strict=True):
        assert grad[: offsets[-1]].eq(1).all()
        assert grad[offsets[-1] :].eq(0).all()


def test_strided_arguments():
    floats, indices = batch()
    right = ours(floats, indices)
    wide = [torch.stack([x, torch.zeros_like(x)], -1)[..., 0] for x in (*floats, *indices)]
    assert not any(x.is_contiguous() for x in wide)
    assert same(ours(wide[:2], wide[2:]), right)


@st.composite
def batches(draw):
    """(floats, indices) of random rows."""
    rows = []
    for _ in range(draw(st.integers(0, 4))):
        length = draw(st.integers(0, 4))
        places = sorted(draw(st.lists(st.integers(0, length), max_size=3)))
        rows.append((length, [(place, draw(st.integers(0, 4))) for place in places]))
    return batch(
        rows,
        draw(st.sampled_from([0, 1, 3, 16, 300])),
        (draw(st.integers(0, 2)), draw(st.integers(0, 2))),
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(0, 10_000)),
    )


@settings(max_examples=100, deadline=None)
@given(batches(), st.lists(st.booleans(), min_size=6, max_size=6))
def test_any_batch_has_the_bits_of_the_reference(batch, flags):
    with_rows, with_labels, *wanted, narrow, narrow_tokens = flags
    (embeds, tokens), (offsets, token_offsets, at, rows, labels) = batch
    offsets = offsets.int() if narrow else offsets
    token_offsets = token_offsets.int() if narrow_tokens else token_offsets
    args = (embeds, offsets, tokens, token_offsets, at)
    args = (*args, rows if with_rows else None, labels if with_labels else None)
    right = reference.insert(*args)
    g = torch.randn(right[0].shape, generator=torch.Generator().manual_seed(1)).to(right[0].dtype)
    bwd_args = (g, offsets, token_offsets, at, len(embeds), len(tokens), wanted)
    with testing.poisoned():
        assert same(torch.ops.edt.insert(*args), right)
        assert same(torch.ops.edt.insert_bwd(*bwd_args), reference.insert_bwd(*bwd_args))
    if with_rows and with_labels and not narrow:
        assert same(right, oracle(*batch))


OFFSETS = torch.tensor([0, 2, 2, 5])
ARGUMENTS = {
    "embeds": torch.ones(6, 3),
    "embed_offsets": OFFSETS,
    "tokens": torch.ones(4, 3),
    "token_offsets": torch.tensor([0, 1, 3]),
    "at": torch.tensor([2, 4]),
    "rows": torch.tensor([1, 2]),
    "labels": torch.zeros(6, dtype=torch.int64),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"embeds": [1.0]}, TypeError, "embeds must be a tensor, got list"),
        ({"embeds": torch.ones(6, 3).int()}, TypeError, "embeds must be .*got int32"),
        ({"embeds": torch.ones(6, 3, 1)}, ValueError, "embeds must have 2 dimensions"),
        ({"embed_offsets": OFFSETS.float()}, TypeError, "embed_offsets must be int64 or int32"),
        ({"embed_offsets": OFFSETS[:0]}, ValueError, r"embed_offsets must have shape \[B \+ 1\]"),
        ({"embed_offsets": OFFSETS + 1}, ValueError, r"embed_offsets\[0\] must be 0, got 1"),
        (
            {"embed_offsets": torch.tensor([0, 2, 2, 7])},
            ValueError,
            r"embed_offsets\[-1\] must be at most the number of rows 6, got 7",
        ),
        ({"tokens": None}, TypeError, "tokens must be a tensor, got NoneType"),
        ({"tokens": torch.ones(4, 3).half()}, TypeError, "tokens must be torch.float32, got"),
        ({"tokens": torch.ones(4, 2)}, ValueError, r"width E = 3, got \(4, 2\)"),
        (
            {"token_offsets": torch.tensor([0, 3, 1])},
            ValueError,
            r"token_offsets must not decrease, got token_offsets\[2\] = 1 after 3",
        ),
        ({"at": [2, 4]}, TypeError, "at must be a tensor, got list"),
        ({"at": torch.tensor([2, 4]).int()}, TypeError, "at must be int64, got int32"),
        ({"at": torch.tensor([2])}, ValueError, r"at must have shape \(2,\), one place per group"),
        (
            {"at": torch.tensor([2, 6])},
            ValueError,
            r"at must lie between 0 and embed_offsets\[-1\] = 5, got at\[1\] = 6",
        ),
        ({"at": torch.tensor([-1, 4])}, ValueError, r"got at\[0\] = -1"),
        (
            {"at": torch.tensor([4, 2])},
            ValueError,
            r"at must not decrease, got at\[1\] = 2 after 4",
        ),
        ({"rows": torch.tensor([1, 2]).int()}, TypeError, "rows must be int64, got int32"),
        (
            {"rows": torch.tensor([1])},
            ValueError,
            r"rows must have shape \(2,\), one row per group",
        ),
        (
            {"rows": torch.tensor([1, 3])},
            ValueError,
            r"rows must lie between 0 and 2, .*got rows\[1\] = 3",
        ),
        ({"rows": torch.tensor([-1, 2])}, ValueError, r"got rows\[0\] = -1"),
        (
            {"rows": torch.tensor([2, 1]), "at": torch.tensor([2, 2])},
            ValueError,
            r"rows must not decrease, got rows\[1\] = 1 after 2",
        ),
        (
            {"rows": torch.tensor([0, 1])},
            ValueError,
            r"the row of its group, between 2 and 2 in row 1, got at\[1\] = 4",
        ),
        ({"rows": torch.tensor([2, 2]), "at": torch.tensor([1, 4])}, ValueError, "between 2 and 5"),
        (
            {"embed_offsets": torch.tensor([0]), "at": torch.tensor([0, 0]), "rows": None},
            ValueError,
            "at must be empty where embed_offsets has no rows, got 2 groups",
        ),
        ({"labels": torch.zeros(6)}, TypeError, "labels must be int64, got float32"),
        ({"labels": torch.zeros(5).long()}, ValueError, r"labels must have shape \(6,\)"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    insert(**ARGUMENTS)
    for grad in (False, True):
        arguments = ARGUMENTS | {"embeds": torch.ones(6, 3, requires_grad=grad)} | change
        with pytest.raises(error, match=message):
            insert(**arguments)


def test_the_kernel_reads_nothing_out_of_bounds(backend):
    if backend == "reference":
        pytest.skip("a reference relies on the checks of torch")
    floats, (offsets, token_offsets, at, *_) = batch(dtype=torch.float32)
    sizes = [len(x) for x in floats]
    good = (torch.cat(floats), offsets, token_offsets, at, *sizes, [True, True])
    torch.ops.edt.insert_bwd(*good)
    bad = {
        0: (good[0][:-1], good[0].flatten()),
        1: (offsets + 1, offsets * 2),
        2: (token_offsets[:-1], token_offsets * 2),
        3: (at[:-1], at + 9, at - 9, at.flip(0), at.int()),
        4: (sizes[0] + 1, -1),
        5: (sizes[1] - 4, -1),
        6: ([True],),
    }
    for i, values in bad.items():
        for value in values:
            with pytest.raises(RuntimeError):
                torch.ops.edt.insert_bwd(*good[:i], value, *good[i + 1 :])


def test_the_examples_run():
    result = doctest.testmod(sys.modules["edt_kernels.ops.insert"])
    assert result.attempted > 0
    assert result.failed == 0
