from __future__ import annotations

import doctest
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck

from edt_kernels import _native, build_info, ragged_attention
from edt_kernels.reference import ragged_attention as ragged_attention_reference
from edt_kernels.testing import assert_within_budget, ragged

NATIVE = build_info()["ops"]["ragged_attention"] == "native"
SLOWER_LEVELS = _native.ISA_NAMES[: _native.ISA_NAMES.index(build_info()["cpu_isa"] or "scalar")]

# Queries and keys per molecule.
LENGTHS = {
    # No keys, no queries, more queries than keys, whole and broken tiles of 6 rows and vectors.
    "small": ((3, 2, 0, 17, 1, 36), (5, 0, 4, 16, 1, 33)),
    "one-atom": ((1,), (1,)),
    # Beyond a block of 48 queries; 500 atoms.
    "long": ((100, 49, 7), (30, 500, 500)),
}
# Query heads, key heads and width: whole vectors of every instruction set, and not.
HEADS = [
    pytest.param((2, 2, 64), id="H2-D64"),
    pytest.param((3, 3, 5), id="H3-D5"),
    pytest.param((4, 2, 20), id="H4-Hkv2-D20"),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
NAMES = {d: str(d).removeprefix("torch.") for d in (*DTYPES, torch.float16)}


def batch(lengths="small", heads=(2, 2, 8), tail=2, dtype=torch.float64):
    """q, k, v and both offsets; rows of tail beyond the last molecule."""
    of_q, of_k = LENGTHS[lengths] if isinstance(lengths, str) else lengths
    h, h_kv, d = heads
    q, q_offsets = ragged(of_q, h, d, tail=tail, dtype=dtype, seed=1)
    k, k_offsets = ragged(of_k, h_kv, d, tail=2 * tail, dtype=dtype, seed=2)
    v, _ = ragged(of_k, h_kv, d, tail=2 * tail, dtype=dtype, seed=3)
    return [q, k, v], [q_offsets, k_offsets]


def pairs(offsets) -> int:
    q_lengths, k_lengths = (x.diff() for x in offsets)
    return int((q_lengths * k_lengths).sum())


def oracle(q, k, v, q_offsets, k_offsets, causal=False, scale=None, bias=None):
    """torch molecule by molecule, half types in float32: output, lse and scores."""
    dtype = q.dtype
    q, k, v, bias = (
        x if x is None or dtype == torch.float64 else x.float() for x in (q, k, v, bias)
    )
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    repeats = q.shape[1] // k.shape[1]
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf)
    scores, pair = [], 0
    bounds = zip(itertools.pairwise(q_offsets), itertools.pairwise(k_offsets), strict=True)
    for (q0, q1), (k0, k1) in bounds:
        lq, lk = int(q1 - q0), int(k1 - k0)
        keys, values = (x[k0:k1].repeat_interleave(repeats, 1) for x in (k, v))
        x = torch.einsum("ihd,jhd->hij", q[q0:q1], keys) * scale
        if bias is not None:
            x = x + bias[pair : pair + lq * lk].view(lq, lk, q.shape[1]).permute(2, 0, 1)
        blind = 0 if lk else lq  # the first queries, which see no key
        if causal:
            x = x.masked_fill(~torch.ones(lq, lk).tril(lk - lq).bool(), -torch.inf)
            blind = max(0, lq - lk)
        pair += lq * lk
        scores.append(x.permute(1, 2, 0).reshape(-1, q.shape[1]))
        x = x[:, blind:]
        out = out.index_copy(
            0,
            torch.arange(q0 + blind, q1),
            torch.einsum("hij,jhd->ihd", x.softmax(-1), values),
        )
        lse = lse.index_copy(0, torch.arange(q0 + blind, q1), x.logsumexp(-1).T)
    scores.append(q.new_zeros(0 if bias is None else len(bias) - pair, q.shape[1]))
    return out.to(dtype), lse, torch.cat(scores).to(dtype)


def finite(x):
    """-inf has no gradient."""
    return x.masked_fill(x == -torch.inf, 0)


def with_grads(function, tensors, *args, **options):
    """Outputs, and gradients of a weighted sum of their finite entries."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    outputs = function(tensors, *args, **options)
    total = 0
    for i, out in enumerate(outputs):
        weight = torch.linspace(-1, 2 + i, out.numel(), dtype=torch.float64).view(out.shape)
        weight = weight.to(out.dtype)
        total = total + (finite(out) * weight).to(torch.float64).sum()
    return [
        *(x.detach() for x in outputs),
        *torch.autograd.grad(total, tensors, materialize_grads=True),
    ]


def ours(tensors, offsets, **options):
    """Output and lse, and the scores of a bias, as `theirs`."""
    q, k, v, *bias = tensors
    if bias:
        options |= {"bias": bias[0], "return_scores": True}
    return ragged_attention(q, k, v, *offsets, return_lse=True, **options)


def theirs(tensors, offsets, **options):
    q, k, v, *bias = tensors
    out, lse, scores = oracle(q, k, v, *offsets, bias=bias[0] if bias else None, **options)
    return (out, lse, scores) if bias else (out, lse)


def assert_matches(tensors, offsets, slack=1, **options):
    """Within twice torch's error, and `slack` units in the last place of the largest number."""
    truth = with_grads(theirs, [x.double() for x in tensors], offsets, **options)
    same_dtype = with_grads(theirs, tensors, offsets, **options)
    found = with_grads(ours, tensors, offsets, **options)
    for mine, torchs, exact in zip(found, same_dtype, truth, strict=True):
        if mine.dtype == torch.float64:
            torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-12)
        else:
            eps = slack * torch.finfo(mine.dtype).eps * max(1.0, finite(exact).abs().max().item())
            assert_within_budget(mine, torchs, exact, eps=eps if exact.numel() else None)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", ["small", "one-atom", "long"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.usefixtures("poisoned")
def test_parity(dtype, lengths, heads, causal):
    assert_matches(*batch(lengths, heads, dtype=dtype), causal=causal)


# Heads of a task fill a cache line of pairs, or not, or there are several tasks.
@pytest.mark.parametrize(
    "heads", [(4, 2, 8), (20, 20, 3), (32, 2, 8)], ids=["H4-Hkv2", "H20-Hkv20", "H32-Hkv2"]
)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=NAMES.get)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.usefixtures("poisoned")
def test_bias_and_scores(dtype, causal, heads):
    tensors, offsets = batch(heads=heads, dtype=dtype)
    shape = pairs(offsets) + 3, heads[0]
    bias = torch.linspace(-2, 2, shape[0] * shape[1], dtype=torch.float64).view(shape)
    slack = heads[0] // heads[1]  # gradients of a key are one sum over the heads that read it
    assert_matches([*tensors, bias.to(dtype)], offsets, slack, causal=causal, scale=0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
@pytest.mark.usefixtures("poisoned")
def test_bias_and_scores_of_long_molecules(dtype):
    tensors, offsets = batch(((100, 49), (30, 70)), (3, 3, 8), dtype=dtype)
    bias, _ = ragged((pairs(offsets),), 3, dtype=dtype)
    assert_matches([*tensors, bias], offsets)


@pytest.mark.usefixtures("poisoned")
def test_parity_float16():
    assert_matches(*batch(dtype=torch.float16))


def test_scale_and_int32_offsets():
    tensors, offsets = batch(dtype=torch.float32)
    assert_matches(tensors, [x.int() for x in offsets], scale=0.0)
    assert_matches(tensors, [x.int() for x in offsets], scale=3.0)


def test_large_logits_stay_finite():
    tensors, offsets = batch(dtype=torch.float32)
    found = with_grads(ours, [100 * x for x in tensors], offsets)
    assert all(finite(x).isfinite().all() for x in found)


def test_bias_that_hides_every_key():
    (q, k, v), offsets = batch()
    bias = q.new_full((pairs(offsets), 2), -torch.inf)
    out, lse = ragged_attention(q, k, v, *offsets, bias=bias, return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize(
    "lengths", [((), ()), ((0, 0), (0, 0)), ((0, 0), (3, 1)), ((3, 1), (0, 0))]
)
@pytest.mark.usefixtures("poisoned")
def test_nothing_to_attend(lengths):
    tensors, offsets = batch(lengths, dtype=torch.float32)
    out, lse, *grads = with_grads(ours, tensors, offsets)
    assert (lse == -torch.inf).all()
    assert all((x == 0).all() for x in (out, *grads))


def test_strided_views_are_read_in_place():
    offsets = torch.tensor([0, 3, 3, 10])
    packed, _ = ragged((10,), 2, 3, 16, dtype=torch.float32)
    q, k, v = (packed[:, :, i] for i in range(3))  # heads of one projection
    expected = with_grads(ours, [x.contiguous() for x in (q, k, v)], [offsets, offsets])

    def through_views(tensors, offsets):
        q, k, v = tensors[0].unbind(2)
        return ragged_attention(q, k, v, *offsets, return_lse=True)

    out, lse, grad = with_grads(through_views, [packed], [offsets, offsets])
    transposed = with_grads(
        lambda tensors, offsets: ours([x.mT for x in tensors], offsets),
        [x.mT.contiguous() for x in (q, k, v)],
        [offsets, offsets],
    )
    for found in ([out, lse, *grad.unbind(2)], [*transposed[:2], *(x.mT for x in transposed[2:])]):
        # torch's own products round by layout; the kernels do not.
        close = {"rtol": 0, "atol": 0} if NATIVE else {}
        torch.testing.assert_close(list(found), list(expected), **close)


def molecule(tensors, offsets, m):
    """Molecule m as a batch of its own."""
    q_rows, k_rows = (slice(int(x[m]), int(x[m + 1])) for x in offsets)
    alone = [tensors[0][q_rows], *(x[k_rows] for x in tensors[1:])]
    return (
        alone,
        [torch.tensor([0, len(alone[0])]), torch.tensor([0, len(alone[1])])],
        q_rows,
        k_rows,
    )


def weighted(tensors, offsets, grads, **options):
    """Output, lse and the gradients for given output gradients."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    outputs = ours(tensors, offsets, **options)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, tensors, grads)]


def output_grads(tensors):
    q = tensors[0]
    g, _ = ragged((len(q),), *q.shape[1:], dtype=q.dtype, seed=4)
    lse_dtype = q.dtype if q.dtype == torch.float64 else torch.float32
    return [g, ragged((len(q),), q.shape[1], dtype=lse_dtype, seed=5)[0]]


@pytest.mark.skipif(not NATIVE, reason="a promise of the kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_pairs_and_dropout_have_the_same_bits_in_every_batch(dtype, threads):
    threads(2)
    tensors, offsets = batch("small", (20, 20, 8), tail=0, dtype=dtype)
    bias, _ = ragged((pairs(offsets),), 20, dtype=dtype, seed=6)
    seeds = torch.tensor([3, 1, 4, 1, 5, 9])
    lengths = offsets[0].diff() * offsets[1].diff()
    grads = [*output_grads(tensors), ragged((pairs(offsets),), 20, dtype=dtype, seed=7)[0]]

    whole = weighted([*tensors, bias], offsets, grads, dropout_p=0.2, seed=seeds)
    for m, start in enumerate([0, *lengths.cumsum(0).tolist()[:-1]]):
        alone, own, q_rows, k_rows = molecule(tensors, offsets, m)
        own_pairs = slice(start, start + int(lengths[m]))
        own_grads = [grads[0][q_rows], grads[1][q_rows], grads[2][own_pairs]]
        inputs = [*alone, bias[own_pairs]]
        single = weighted(inputs, own, own_grads, dropout_p=0.2, seed=seeds[m])
        rows = (q_rows, q_rows, own_pairs, q_rows, k_rows, k_rows, own_pairs)
        assert all(torch.equal(x[at], y) for x, y, at in zip(whole, single, rows, strict=True))


@pytest.mark.skipif(not NATIVE, reason="a promise of the kernels")
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("heads", HEADS)
def test_a_molecule_has_the_same_bits_in_every_batch(dtype, causal, heads):
    tensors, offsets = batch("small", heads, tail=0, dtype=dtype)
    grads = output_grads(tensors)
    whole = weighted(tensors, offsets, grads, causal=causal)

    order = [4, 0, 5, 3, 1, 2]
    split = [molecule(tensors, offsets, m) for m in order]
    shuffled = [torch.cat([alone[i] for alone, *_ in split]) for i in range(3)]
    lengths = [[len(alone[i]) for alone, *_ in split] for i in (0, 1)]
    shuffled_grads = [torch.cat([g[rows] for *_, rows, _ in split]) for g in grads]
    new_offsets = [torch.tensor([0, *x]).cumsum(0) for x in lengths]
    moved = weighted(shuffled, new_offsets, shuffled_grads, causal=causal)
    for place, (alone, own_offsets, q_rows, k_rows) in enumerate(split):
        single = weighted(alone, own_offsets, [g[q_rows] for g in grads], causal=causal)
        _, _, *new_rows = molecule(shuffled, new_offsets, place)
        rows = (q_rows, q_rows, q_rows, k_rows, k_rows)
        moved_rows = [new_rows[0]] * 3 + [new_rows[1]] * 2
        for x, y, z, at, to in zip(whole, single, moved, rows, moved_rows, strict=True):
            assert torch.equal(x[at], y) and torch.equal(x[at], z[to])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_same_bits_for_any_number_of_threads(dtype, threads):
    tensors, offsets = batch("long", (2, 2, 64), dtype=dtype)
    grads = output_grads(tensors)
    threads(1)
    single = weighted(tensors, offsets, grads)
    threads(2)
    assert all(map(torch.equal, single, weighted(tensors, offsets, grads)))


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_nan_stays_in_its_molecule(dtype):
    tensors, offsets = batch(heads=(2, 2, 64), dtype=dtype)
    grads = output_grads(tensors)
    clean = weighted(tensors, offsets, grads)
    spoilt = [x.clone() for x in (*tensors, *grads)]
    for x, bounds in zip(spoilt, [offsets[i] for i in (0, 1, 1, 0, 0)], strict=True):
        x[bounds[3] : bounds[4]] = torch.nan
        x[bounds[-1] :] = torch.nan
    found = weighted(spoilt[:3], offsets, spoilt[3:])
    for x, y, bounds in zip(found, clean, [offsets[i] for i in (0, 0, 0, 1, 1)], strict=True):
        spoilt_rows = slice(int(bounds[3]), int(bounds[4]))
        assert x[spoilt_rows].isnan().all()
        keep = torch.ones(len(x), dtype=torch.bool)
        keep[spoilt_rows] = False
        assert torch.equal(x[keep], y[keep])


@pytest.mark.parametrize("option", ["plain", "causal", "grouped", "bias"])
def test_gradients_of_first_and_second_order(option):
    tensors, offsets = batch(((2, 3, 0, 1), (3, 2, 1, 0)), (2, 2, 3), tail=1)
    if option == "grouped":
        tensors[1:] = [x[:, :1].contiguous() for x in tensors[1:]]
    if option == "bias":
        tensors.append(torch.randn(pairs(offsets) + 1, 2, dtype=torch.float64))
    tensors = [x.requires_grad_() for x in tensors]

    def function(*tensors):
        outputs = ours(tensors, offsets, causal=option in ("causal", "bias"))
        return tuple(finite(x) for x in outputs)

    assert gradcheck(function, tensors, fast_mode=True)
    assert gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(
    "wanted",
    [w for inputs in (3, 4) for w in itertools.product([False, True], repeat=inputs)],
    ids=lambda wanted: (
        "".join(name for name, want in zip(["q", "k", "v", "bias"], wanted, strict=False) if want)
        + ("-biased" if len(wanted) == 4 else "")
    ),
)
def test_only_the_gradients_that_are_wanted(wanted, dtype):
    """The same bits as all of them, which the tests of parity hold against fp64."""
    tensors, offsets = batch(dtype=dtype)
    if len(wanted) == 4:
        bias, _ = ragged((pairs(offsets),), len(tensors[0][0]), dtype=dtype, seed=6)
        tensors = [*tensors, bias]

    def attend(tensors):
        q, k, v, *bias = tensors
        return (ragged_attention(q, k, v, *offsets, bias=bias[0] if bias else None),)

    reference = with_grads(attend, tensors)[1:]
    for x, want in zip(tensors, wanted, strict=True):
        x.requires_grad_(want)
    (out,) = attend(tensors)
    assert out.requires_grad == any(wanted)
    if not any(wanted):
        return
    weight = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape)
    out.backward(weight.to(dtype))
    for x, want, expected in zip(tensors, wanted, reference, strict=True):
        assert torch.equal(x.grad, expected) if want else x.grad is None


def test_gradient_of_the_lse_alone():
    tensors, offsets = batch()
    found = with_grads(lambda t, o: ours(t, o)[1:], tensors, offsets)
    expected = with_grads(lambda t, o: theirs(t, o)[1:], tensors, offsets)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_scores_without_a_bias():
    (q, k, v), offsets = batch()
    out, scores = ragged_attention(q, k, v, *offsets, return_scores=True)
    torch.testing.assert_close(scores, oracle(q, k, v, *offsets)[2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out, ragged_attention(q, k, v, *offsets))


def test_dropout_depends_on_the_seed_and_the_molecule_only():
    (q, k, v), offsets = batch("long", (2, 2, 4))

    def dropped(seed, tensors=(q, k, v), offsets=offsets):
        seed = torch.tensor(seed)
        return ragged_attention(*tensors, *offsets, dropout_p=0.25, seed=seed)

    assert torch.equal(dropped(3), dropped([3]))
    assert not torch.equal(dropped(3), dropped(4))
    assert not torch.equal(dropped(3), dropped(3 + 2**32))
    alone, own, q_rows, _ = molecule((q, k, v), offsets, 1)
    torch.testing.assert_close(dropped(3)[q_rows], dropped(3, alone, own), rtol=1e-12, atol=1e-12)


def test_dropout_keeps_the_mean():
    q, k = torch.zeros(100, 2, 1), torch.zeros(200, 2, 1)
    offsets = torch.tensor([0, 100]), torch.tensor([0, 200])
    out = ragged_attention(q, k, torch.ones_like(k), *offsets, dropout_p=0.3, seed=torch.tensor(7))
    # Of 40000 weights: 4 standard deviations of the mean, and of one row's.
    assert abs(out.mean() - 1) < 4 * math.sqrt(0.3 / 0.7 / 40000)
    assert abs(out.std() - math.sqrt(0.3 / 0.7 / 200)) < 0.01


def test_a_seed_for_every_molecule():
    (q, k, v), offsets = batch(((4, 4), (40, 40)), (1, 1, 4), tail=0)
    q, k, v = (x[: len(x) // 2].repeat(2, 1, 1) for x in (q, k, v))  # twice the same molecule

    def dropped(*seeds):
        seed = torch.tensor(seeds)
        return ragged_attention(q, k, v, *offsets, dropout_p=0.5, seed=seed).chunk(2)

    assert torch.equal(*dropped(7)) and torch.equal(*dropped(7, 7))
    assert not torch.equal(*dropped(7, 8))
    assert torch.equal(dropped(7, 8)[1], dropped(8)[1])

    def twice(seed):
        leaf = q.clone().requires_grad_()
        out = ragged_attention(leaf, k, v, *offsets, dropout_p=0.5, seed=seed)
        return out.detach(), *torch.autograd.grad(out.square().sum(), leaf)

    dense = twice(torch.tensor([7, 8]))
    assert all(map(torch.equal, twice(torch.tensor([7, 0, 8, 0])[::2]), dense))
    same = twice(torch.tensor(7).expand(2))
    assert all(map(torch.equal, same, twice(torch.tensor([7, 7]))))


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.usefixtures("poisoned")
def test_dropout_is_the_references(dtype):
    tensors, offsets = batch("long", (4, 2, 5), dtype=dtype)
    tensors.append(ragged((pairs(offsets) + 2,), 4, dtype=dtype, seed=6)[0])
    seed = torch.tensor([-5, 2**62, 11])

    def reference(tensors, offsets):
        q, k, v, bias = tensors
        return ragged_attention_reference.ragged_attention_general(
            q, k, v, bias, seed, *offsets, True, None, 0.3, True
        )

    found = with_grads(ours, tensors, offsets, causal=True, dropout_p=0.3, seed=seed)
    same_dtype = with_grads(reference, tensors, offsets)
    truth = with_grads(reference, [x.double() for x in tensors], offsets)
    for mine, theirs, exact in zip(found, same_dtype, truth, strict=True):
        eps = torch.finfo(mine.dtype).eps * max(1.0, finite(exact).abs().max().item())
        assert_within_budget(mine, theirs, exact.double(), eps=16 * eps)


def test_dropout_gradients():
    tensors, offsets = batch(((2, 3), (3, 2)), (2, 1, 3), tail=1)
    tensors = [x.requires_grad_() for x in tensors]

    def function(*tensors):
        seed = torch.tensor(5)
        return ragged_attention(*tensors, *offsets, dropout_p=0.4, seed=seed)

    assert gradcheck(function, tensors, fast_mode=True)
    assert gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
def test_ops_are_well_registered(permuted):
    (q, k, v), offsets = batch(((3, 2), (2, 4)), (2, 2, 4), dtype=torch.float32)
    bias = torch.randn(pairs(offsets), 2)
    if permuted:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        bias = bias.T.contiguous().T
    edt, options = torch.ops.edt, (*offsets, False, 0.5)
    out, lse = edt.ragged_attention(q, k, v, *options)
    seed = torch.tensor(1)
    calls = [
        (edt.ragged_attention, (q, k, v, *options)),
        (edt.ragged_attention_bwd, (out, lse, q, k, v, lse, *options)),
        (edt.ragged_attention_bwd, (out, None, q, k, v, lse, *options)),
        (edt.ragged_attention_general, (q, k, v, bias, seed, *options, 0.1, True)),
        (edt.ragged_attention_general, (q, k, v, None, None, *options, 0.0, False)),
        (
            edt.ragged_attention_general_bwd,
            (out, lse, bias, q, k, v, bias, seed, lse, *options, 0.1),
        ),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_compiles_once_for_changing_sizes(with_bias):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=counter)
    frames = []  # a float option makes dynamo trace the first call twice
    for lengths in ("small", "long"):
        tensors, offsets = batch(lengths, (2, 2, 8), dtype=torch.float32)
        if with_bias:
            tensors.append(torch.zeros(pairs(offsets) + 1, 2))
        found = with_grads(compiled, tensors, offsets)
        expected = with_grads(ours, tensors, offsets)
        assert all(map(torch.equal, found, expected))
        frames.append(counter.frame_count)
    assert frames[0] == frames[1]


def test_compiled_dropout_has_the_same_gradients():
    tensors, offsets = batch(dtype=torch.float32)

    def dropped(tensors, offsets):
        seed = torch.tensor([5])
        return (ragged_attention(*tensors, *offsets, dropout_p=0.3, seed=seed),)

    compiled = torch.compile(dropped, fullgraph=True, dynamic=True, backend="aot_eager")
    found = with_grads(compiled, tensors, offsets)
    assert all(map(torch.equal, found, with_grads(dropped, tensors, offsets)))


def change(**replaced):
    """A call with good arguments but those replaced."""
    (q, k, v), (q_offsets, k_offsets) = batch(((2, 1), (1, 3)), (2, 2, 4), dtype=torch.float32)
    arguments = {"q": q, "k": k, "v": v, "q_offsets": q_offsets, "k_offsets": k_offsets}
    arguments |= {name: f(arguments) for name, f in replaced.items()}
    return ragged_attention(**arguments)


@pytest.mark.parametrize(
    ("replaced", "error", "message"),
    [
        ({"q": lambda a: a["q"].tolist()}, TypeError, "q must be a tensor, got list"),
        ({"q": lambda a: a["q"].int()}, TypeError, "q must be float32 or .*, got int32"),
        ({"k": lambda a: a["k"].double()}, TypeError, "k must be torch.float32, got torch.float64"),
        ({"q": lambda a: a["q"][0]}, ValueError, r"q must have 3 dimensions, got shape \(2, 4\)"),
        ({"q": lambda a: a["q"][:, :, :0]}, ValueError, r"H, D >= 1, got \(5, 2, 0\)"),
        ({"q": lambda a: a["q"][:, :0]}, ValueError, r"H, D >= 1, got \(5, 0, 4\)"),
        ({"k": lambda a: a["k"][:, :, :3]}, ValueError, r"k must have shape \[Tk, Hkv, 4\]"),
        ({"k": lambda a: a["k"].repeat(1, 2, 1)}, ValueError, "Hkv a divisor of 2"),
        ({"v": lambda a: a["v"][1:]}, ValueError, r"v must have the shape of k \(8, 2, 4\)"),
        ({"q_offsets": lambda a: a["q_offsets"].float()}, TypeError, "must be int64 or int32"),
        (
            {"k_offsets": lambda a: a["k_offsets"][1:]},
            ValueError,
            "as many entries as q_offsets, 3",
        ),
        (
            {"q_offsets": lambda a: torch.tensor([0, 4, 3])},
            ValueError,
            r"q_offsets must not decrease, got q_offsets\[2\] = 3 after 4",
        ),
        (
            {"k_offsets": lambda a: torch.tensor([1, 2, 3])},
            ValueError,
            r"k_offsets\[0\] must be 0, got 1",
        ),
        (
            {"k_offsets": lambda a: torch.tensor([0, 2, 9])},
            ValueError,
            r"k_offsets\[-1\] must be at most the number of rows 8, got 9",
        ),
        ({"scale": lambda a: "1"}, TypeError, "scale must be a number, got str"),
        ({"dropout_p": lambda a: 1.0}, ValueError, "dropout_p must be .* less than 1, got 1.0"),
        ({"dropout_p": lambda a: 0.5}, TypeError, "seed must be a tensor, got NoneType"),
        (
            {"dropout_p": lambda a: 0.5, "seed": lambda a: torch.tensor([1, 2, 3])},
            ValueError,
            "seed must have one element, or one for each of 2 molecules, got shape .3,",
        ),
        ({"bias": lambda a: torch.zeros(5, 3)}, ValueError, r"bias must have shape .*, 2\]"),
        ({"bias": lambda a: torch.zeros(4, 2)}, ValueError, "bias must .* at least 5, got 4"),
    ],
)
def test_errors_say_what_to_change(replaced, error, message):
    with pytest.raises(error, match=message):
        change(**replaced)


@pytest.mark.skipif(not NATIVE, reason="no kernels, no instruction sets")
@pytest.mark.parametrize("level", SLOWER_LEVELS)
def test_every_instruction_set(level):
    chosen = "test_parity or test_a_molecule or test_nan or test_nothing or test_strided"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__, "-k", chosen],
        env=os.environ | {"EDT_CPU_ISA": level},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_the_example_runs():
    module = sys.modules["edt_kernels.ops.ragged_attention"]
    assert doctest.testmod(module).failed == 0
    assert doctest.testmod(sys.modules["edt_kernels.testing"]).failed == 0
