from __future__ import annotations

import itertools

import pytest
import torch

from edt_kernels import ragged_attention
from edt_kernels.reference.ragged_attention import ragged_attention_general as attention_general
from edt_kernels.testing import assert_within_budget, ragged
from edt_kernels.triton import ragged_attention as launchers

# Queries and keys per molecule: a molecule that fits one tile of every size, none of either, one
# more and one less than whole blocks, and several blocks of both.
LENGTHS = ((3, 0, 2, 1, 31, 17, 33, 70), (5, 4, 0, 1, 33, 16, 31, 50))
SMALL = ((3, 0, 2, 33, 9), (5, 4, 0, 17, 35))
SEEDS = torch.tensor([-5, 2**62, 11, 3, 0, -(2**63), 7, 1])


def batch(lengths, heads, dtype, *, pairs=False, tail=2, index=torch.int64):
    """q, k, v and a bias if wanted; offsets; gradients of the outputs. NaN in every tail."""
    queries, keys = lengths
    h, h_kv, d = heads
    count = sum(i * j for i, j in zip(queries, keys, strict=True))
    shapes = [(queries, h, d), (keys, h_kv, d), (keys, h_kv, d), (queries, h, d), (queries, h)]
    shapes += [((count,), h), ((count,), h)] if pairs else []
    tensors = []
    for seed, (rows, *shape) in enumerate(shapes):
        x, offsets = ragged(rows, *shape, tail=tail, dtype=dtype, seed=seed)
        x[offsets[-1] :] = torch.nan
        tensors.append(x)
    q, k, v, grad, grad_lse, *rest = tensors
    offsets = [torch.tensor([0, *x]).cumsum(0).to(index) for x in lengths]
    grads = [grad, grad_lse if dtype == torch.float64 else grad_lse.float(), *rest[1:]]
    return [q, k, v, *rest[:1]], offsets, grads


def ours(tensors, offsets, **options):
    """Output and lse, and the scores where there is a bias."""
    q, k, v, *bias = tensors
    if bias:
        options |= {"bias": bias[0], "return_scores": True}
    return ragged_attention(q, k, v, *offsets, return_lse=True, **options)


def referred(tensors, offsets, causal=False, scale=None, dropout_p=0.0, seed=None):
    """The same, as the reference has it."""
    q, k, v, *bias = tensors
    options = (causal, scale, dropout_p, bool(bias))
    outputs = attention_general(q, k, v, bias[0] if bias else None, seed, *offsets, *options)
    return outputs if bias else outputs[:2]


def with_grads(function, tensors, offsets, grads, **options):
    """Outputs and gradients, for given gradients of the outputs."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    outputs = function(leaves, offsets, **options)
    dtypes = [x.dtype for x in outputs]
    grads = [g.to(dtype) for g, dtype in zip(grads, dtypes, strict=True)]
    return [
        *(x.detach() for x in outputs),
        *torch.autograd.grad(outputs, leaves, grads, materialize_grads=True),
    ]


def assert_matches(tensors, offsets, grads, **options):
    """At most twice the error of the reference, and 4 units in the last place of the largest."""

    def double(x):
        return [y.double() for y in x]

    found = with_grads(ours, tensors, offsets, grads, **options)
    truth = with_grads(referred, double(tensors), offsets, double(grads), **options)
    if tensors[0].dtype == torch.float64:
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
        return
    same_dtype = with_grads(referred, tensors, offsets, grads, **options)
    for mine, theirs, exact in zip(found, same_dtype, truth, strict=True):
        largest = max(1.0, exact.masked_fill(exact == -torch.inf, 0).abs().max().item())
        eps = 4 * torch.finfo(mine.dtype).eps * largest
        assert_within_budget(mine, theirs, exact, eps=eps)


# Query heads, key heads, width: fewer key heads, widths that are no power of two.
@pytest.mark.parametrize(
    ("heads", "causal"),
    [((2, 2, 64), False), ((3, 3, 5), True), ((2, 1, 20), False), ((2, 1, 20), True)],
    ids=["64", "5-causal", "20-grouped", "20-grouped-causal"],
)
def test_values_and_gradients(heads, causal):
    assert_matches(*batch(LENGTHS, heads, torch.float32), causal=causal)


@pytest.mark.parametrize(
    ("heads", "causal"), [((2, 2, 5), True), ((2, 1, 20), False)], ids=["causal", "grouped"]
)
def test_bias_and_scores(heads, causal):
    assert_matches(*batch(LENGTHS, heads, torch.float32, pairs=True), causal=causal)


@pytest.mark.parametrize(
    ("heads", "seed"), [((2, 2, 5), SEEDS), ((2, 1, 20), torch.tensor(7))], ids=["each", "one"]
)
def test_dropout_is_the_references(heads, seed):
    assert_matches(*batch(LENGTHS, heads, torch.float32), dropout_p=0.3, seed=seed)


def test_everything_at_once():
    operands = batch(SMALL, (4, 2, 5), torch.float32, pairs=True)
    # A share whose 32 bits are no positive int32.
    assert_matches(*operands, causal=True, scale=0.7, dropout_p=0.75, seed=SEEDS[:5])


@pytest.mark.parametrize("pairs", [False, True], ids=["plain", "pairs"])
def test_float64(pairs):
    lengths = ((3, 18, 2), (5, 19, 0))
    assert_matches(*batch(lengths, (2, 1, 5), torch.float64, pairs=pairs), causal=True)


@pytest.mark.parametrize("width", [33, 100, 200])
def test_wide_heads(width):
    assert_matches(*batch(((2, 18), (3, 33)), (1, 1, width), torch.float32))


def test_int32_offsets_and_scales():
    for scale in (0.0, 3.0):
        assert_matches(*batch(SMALL, (2, 1, 4), torch.float32, index=torch.int32), scale=scale)


def test_large_logits_stay_finite():
    tensors, offsets, grads = batch(SMALL, (1, 1, 8), torch.float32, tail=0)
    found = with_grads(ours, [100 * x for x in tensors], offsets, grads)
    assert all(x.isfinite()[:3].all() for x in found)


@pytest.mark.parametrize(
    "lengths", [((), ()), ((0, 0), (0, 0)), ((0, 0), (3, 1)), ((70, 1), (0, 0))], ids=str
)
def test_nothing_to_attend(lengths):
    tensors, offsets, grads = batch(lengths, (2, 2, 4), torch.float32, pairs=True)
    out, lse, scores, *gradients = with_grads(ours, tensors, offsets, grads)
    assert (lse == -torch.inf).all()
    assert all((x == 0).all() for x in (out, scores, *gradients))


def test_a_molecule_without_keys_has_no_gradient_whatever_it_holds():
    tensors, offsets, grads = batch(((2, 70, 3), (2, 0, 0)), (1, 1, 4), torch.float32)
    for x in (tensors[0], *grads):
        x[2:] = torch.nan
    out, _, *gradients = with_grads(ours, tensors, offsets, grads)
    assert all((x[2:] == 0).all() and x[:2].isfinite().all() for x in (out, *gradients))


def test_bias_that_hides_every_key():
    tensors, offsets, _ = batch(((3, 40), (2, 40)), (1, 1, 4), torch.float32)
    bias = torch.full((1606, 1), -torch.inf)
    out, lse = ragged_attention(*tensors, *offsets, bias=bias, return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_scores_without_a_bias():
    tensors, offsets, _ = batch(SMALL, (2, 1, 4), torch.float32)
    zero = torch.zeros(int((offsets[0].diff() * offsets[1].diff()).sum()), 2)
    _, scores = ragged_attention(*tensors, *offsets, return_scores=True)
    _, biased = ragged_attention(*tensors, *offsets, bias=zero, return_scores=True)
    assert torch.equal(scores, biased)


def test_views_are_read_in_place(monkeypatch):
    offsets = [torch.tensor([0, 3, 3, 40])] * 2
    packed, _ = ragged((40,), 2, 3, 16, dtype=torch.float32)
    grads = [ragged((40,), 2, *d, dtype=torch.float32, seed=1)[0] for d in ((16,), ())]
    views = [packed[:, :, i] for i in range(3)]  # heads of one projection
    copies = with_grads(ours, [x.contiguous() for x in views], offsets, grads)

    def through(tensors, offsets):
        return ours([tensors[0][:, :, i] for i in range(3)], offsets)

    def untouched(x):
        assert x.dim() < 3, "a view was copied"
        return dense(x)

    dense = launchers.dense
    monkeypatch.setattr(launchers, "dense", untouched)
    out, lse, grad = with_grads(through, [packed], offsets, grads)
    assert all(map(torch.equal, copies, [out, lse, *grad.unbind(2)]))
    # A head's queries behind one another, as padded attention has them.
    apart = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in views]
    assert all(map(torch.equal, copies, with_grads(ours, apart, offsets, grads)))


def test_any_strides():
    tensors, offsets, grads = batch(SMALL, (2, 2, 6), torch.float32, pairs=True, tail=0)
    expected = with_grads(ours, tensors, offsets, grads)
    leaves = [x.mT.contiguous().mT.requires_grad_() for x in tensors]
    outputs = ours(leaves, [x.repeat_interleave(2)[::2] for x in offsets])
    grads = torch.autograd.grad(outputs, leaves, [x.mT.contiguous().mT for x in grads])
    assert all(map(torch.equal, expected, [*outputs, *grads]))


@pytest.mark.parametrize("pairs", [False, True], ids=["plain", "pairs"])
def test_a_molecule_has_the_same_bits_in_every_batch(pairs):
    lengths = ((3, 70, 0, 9, 33), (5, 40, 4, 0, 35))
    heads = (1, 1, 8) if pairs else (2, 1, 8)
    tensors, offsets, grads = batch(lengths, heads, torch.float32, pairs=pairs, tail=0)
    dropout = {"dropout_p": 0.2, "seed": SEEDS[:5]} if pairs else {}
    whole = with_grads(ours, tensors, offsets, grads, causal=pairs, **dropout)
    counts = [i * j for i, j in zip(*lengths, strict=True)]
    bounds = [*offsets, torch.tensor([0, *counts]).cumsum(0)]
    # What the rows of inputs, of incoming gradients and of results are: queries, keys or pairs.
    rows = ([0, 1, 1], [0, 0], [0, 0, 0, 1, 1])
    if pairs:
        rows = ([0, 1, 1, 2], [0, 0, 2], [0, 0, 2, 0, 1, 1, 2])

    def molecules(tensors, kinds, order):
        parts = [
            x.split(bounds[kind].diff().tolist()) for x, kind in zip(tensors, kinds, strict=True)
        ]
        return [torch.cat([part[m] for m in order]) for part in parts]

    for order in ([0], [1], [3], [4, 1, 3, 2, 0]):
        own = [torch.tensor([0, *(x[m] for m in order)]).cumsum(0) for x in lengths]
        seeds = {"dropout_p": 0.2, "seed": SEEDS[order]} if pairs else {}
        inputs, incoming = molecules(tensors, rows[0], order), molecules(grads, rows[1], order)
        found = with_grads(ours, inputs, own, incoming, causal=pairs, **seeds)
        assert all(map(torch.equal, found, molecules(whole, rows[2], order)))


def test_nan_stays_in_its_molecule():
    tensors, offsets, grads = batch(((3, 70, 33), (5, 40, 35)), (1, 1, 8), torch.float32)
    clean = with_grads(ours, tensors, offsets, grads)
    spoilt = [x.clone() for x in tensors], [x.clone() for x in grads]
    of_q, of_k = (slice(*x[1:3]) for x in offsets)
    for x, rows in zip(itertools.chain(*spoilt), (of_q, of_k, of_k, of_q, of_q), strict=True):
        x[rows] = torch.nan
    found = with_grads(ours, spoilt[0], offsets, spoilt[1])
    for x, y, rows in zip(found, clean, (of_q, of_q, of_q, of_k, of_k), strict=True):
        assert x[rows].isnan().all()
        assert torch.equal(x[: rows.start], y[: rows.start])
        assert torch.equal(x[rows.stop :], y[rows.stop :])


def test_gradient_of_the_lse_alone():
    tensors, offsets, grads = batch(SMALL, (2, 2, 4), torch.float32)
    found = with_grads(lambda t, o: ours(t, o)[1:], tensors, offsets, grads[1:])
    truth = with_grads(lambda t, o: referred(t, o)[1:], tensors, offsets, grads[1:])
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)


def test_heads_that_are_too_wide():
    tensors, offsets, _ = batch(((1,), (1,)), (1, 1, 257), torch.float32)
    with pytest.raises(ValueError, match="D <= 256 on a GPU, got 257"):
        ours(tensors, offsets)
