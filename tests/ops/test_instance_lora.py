from __future__ import annotations

import doctest
import itertools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck

from edt_kernels import instance_lora, instance_lora_many, offsets_from_lengths
from edt_kernels.testing import assert_within_budget, ragged

pytestmark = pytest.mark.usefixtures("backend")

LENGTHS = (3, 0, 1, 7, 0)
# Blocks of rows: below, at and beyond their size.
MANY = (97, 1, 0, 96, *[2, 1, 0] * 20, 200)
TAIL = 2
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# d_in, d_out, r: one number; no whole vectors; whole ones; beyond a chunk of columns.
WIDTHS = [(1, 1, 1), (5, 7, 3), (32, 16, 16), (131, 300, 8), (40, 33, 64)]
EVERY = ("x", "a", "b", "base")


def batch(lengths=LENGTHS, widths=(5, 7, 3), tail=TAIL, dtype=torch.float64, seed=0):
    """x, a, b and base of molecules with `lengths` rows and a tail, and their offsets."""
    d_in, d_out, r = widths
    x, offsets = ragged(lengths, d_in, tail=tail, dtype=dtype, seed=seed)
    base, _ = ragged(lengths, d_out, tail=tail, dtype=dtype, seed=seed + 1)
    g = torch.Generator().manual_seed(seed + 2)
    shapes = ((len(lengths), d_in, r), (d_out, r))
    a, b = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)
    return [x, a / d_in**0.5, b, base], offsets


def two_products(x, a, b, base, offsets, scale=1.0):
    """base + scale (x A_m) B^T molecule by molecule, by autograd, in the dtype of `x`."""
    rows = []
    for m, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        rows.append(scale * ((x[begin:end] @ a[m]) @ b.T))
    rows.append(x.new_zeros(len(x) - int(offsets[-1]), len(b)))
    delta = torch.cat(rows)
    return delta if base is None else base + delta


def ours(x, a, b, base, offsets, scale=1.0):
    return instance_lora(x, a, b, offsets, scale=scale, base=base)


def upstream(out):
    g = torch.linspace(-1, 2, out.numel(), dtype=torch.float64)
    return g.sin().view(out.shape).to(out.dtype)


def magnitudes(inputs, offsets, scale):
    """What the terms of output and gradients add up to, each with its magnitude."""
    sizes = [None if x is None else x.detach().double().abs() for x in inputs]
    leaves = [None if x is None else x.requires_grad_() for x in sizes]
    out = two_products(*leaves, offsets, abs(scale))
    given = [x for x in leaves if x is not None]
    return [out, *torch.autograd.grad(out, given, torch.ones_like(out), materialize_grads=True)]


def with_grads(function, inputs, offsets, scale=0.5, dtype=None):
    """Output and gradients for a fixed incoming gradient; None for a base that is None."""
    leaves = [
        None if x is None else x.detach().clone().to(dtype or x.dtype).requires_grad_()
        for x in inputs
    ]
    out = function(*leaves, offsets, scale)
    given = [x for x in leaves if x is not None]
    return [out.detach(), *torch.autograd.grad(out, given, upstream(out), materialize_grads=True)]


@pytest.mark.parametrize("based", [True, False], ids=["base", "no-base"])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("lengths", [LENGTHS, MANY, (1,) * 20], ids=["few", "many", "decode"])
@pytest.mark.usefixtures("poisoned")
def test_matches_two_products(lengths, widths, based):
    inputs, offsets = batch(lengths, widths)
    inputs[3] = inputs[3] if based else None
    found = with_grads(ours, inputs, offsets)
    torch.testing.assert_close(
        found, with_grads(two_products, inputs, offsets), rtol=1e-11, atol=1e-11
    )


def assert_good(inputs, offsets, scale):
    """Within twice the error of torch in the same dtype."""
    found = with_grads(ours, inputs, offsets, scale)
    peer = with_grads(two_products, inputs, offsets, scale)
    truth = with_grads(two_products, inputs, offsets, scale, torch.float64)
    sizes = magnitudes(inputs, offsets, scale)
    for mine, theirs, exact, size in zip(found, peer, truth, sizes, strict=True):
        if mine.dtype == torch.float64 or mine.numel() == 0:
            torch.testing.assert_close(mine.double(), exact, rtol=1e-11, atol=1e-11)
        else:
            eps = torch.finfo(mine.dtype).eps * exact.abs().max()
            eps += torch.finfo(torch.float32).eps * size.max()
            assert_within_budget(mine, theirs, exact, eps=eps.item())


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_error_is_within_twice_that_of_torch(dtype, widths):
    inputs, offsets = batch(MANY, widths, dtype=dtype)
    assert_good(inputs, offsets, 2.0)


@st.composite
def ragged_batches(draw):
    """Arguments of `assert_good`."""
    lengths = draw(st.lists(st.integers(0, 9) | st.just(110), min_size=1, max_size=12))
    sizes = st.sampled_from([1, 2, 7, 8, 16, 33, 150])
    widths = draw(sizes), draw(sizes), draw(st.sampled_from([1, 2, 4, 16, 20]))
    dtype = draw(st.sampled_from(DTYPES))
    inputs, offsets = batch(
        lengths, widths, draw(st.integers(0, 3)), dtype, draw(st.integers(0, 9))
    )
    inputs[3] = inputs[3] if draw(st.booleans()) else None
    offsets = offsets.to(draw(st.sampled_from([torch.int32, torch.int64])))
    return inputs, offsets, draw(st.sampled_from([1.0, 0.25, -3.0]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(ragged_batches())
def test_any_batch(arguments):
    assert_good(*arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_text_without_a_molecule_keeps_its_base_to_the_bit(dtype):
    inputs, offsets = batch(MANY, (32, 300, 16), dtype=dtype)
    x, a, b, base = inputs
    base[::3] = -0.0
    base[1::3] *= torch.finfo(dtype).smallest_normal
    a[0], a[3] = 0, -0.0
    for scale in (1.0, 0.5, -2.0):
        out = instance_lora(x, a, b, offsets, scale=scale, base=base)
        for m in (0, 3):
            rows = slice(*offsets[m : m + 2].tolist())
            assert torch.equal(out[rows], base[rows])
            assert torch.equal(out[rows].signbit(), base[rows].signbit())
    plain = instance_lora(x, a, b, offsets)
    assert plain[: offsets[1]].eq(0).all()


@pytest.mark.usefixtures("poisoned")
def test_rows_beyond_the_last_molecule():
    inputs, offsets = batch(dtype=torch.float32)
    x, a, b, base = inputs
    x[-TAIL:] = torch.nan
    clean = [x[:-TAIL], a, b, base[:-TAIL]]
    out, dx, da, db, dbase = with_grads(ours, inputs, offsets)
    assert torch.equal(out[-TAIL:], base[-TAIL:])
    assert dx[-TAIL:].eq(0).all() and dbase[-TAIL:].ne(0).all()
    assert instance_lora(x, a, b, offsets)[-TAIL:].eq(0).all()
    # The gradients that come to the rows differ with their number: none comes to the tail here.
    leaves = [t.clone().requires_grad_() for t in clean]
    short = ours(*leaves, offsets, 0.5)
    g = upstream(out)[:-TAIL]
    expected = [short.detach(), *torch.autograd.grad(short, leaves, g)]
    for mine, right in zip((out[:-TAIL], dx[:-TAIL], da, db), expected, strict=False):
        assert torch.equal(mine, right)


def test_nan_of_a_base_stays_in_its_row():
    inputs, offsets = batch(dtype=torch.float32)
    inputs[3][4] = torch.nan
    out, *grads = with_grads(ours, inputs, offsets)
    assert out.isnan().any(1).nonzero().tolist() == [[4]]
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("widths", [(5, 7, 3), (48, 300, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_molecule_has_the_same_bits_in_every_batch(dtype, widths, backend):
    if backend == "reference":
        pytest.skip("a promise of the kernels")
    lengths = (100, 1, 0, 30, 7, *[2, 0, 5, 3] * 6)
    inputs, offsets = batch(lengths, widths, dtype=dtype)
    x, a, b, base = inputs
    g = torch.randn(len(x), widths[1], generator=torch.Generator().manual_seed(5)).to(dtype)

    def run(x, a, base, offsets, g):
        leaves = [t.clone().requires_grad_() for t in (x, a, base)]
        out = instance_lora(leaves[0], leaves[1], b, offsets, scale=0.5, base=leaves[2])
        return out.detach(), *torch.autograd.grad(out, leaves, g)

    out, dx, da, _ = run(x, a, base, offsets, g)
    bounds = offsets.unfold(0, 2, 1).tolist()
    for m, (begin, end) in enumerate(bounds):
        rows = slice(begin, end)
        alone = run(x[rows], a[m : m + 1], base[rows], torch.tensor([0, end - begin]), g[rows])
        for one, all_ in zip(alone, (out[rows], dx[rows], da[m : m + 1]), strict=False):
            assert torch.equal(one, all_)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist()
    rows = torch.cat([torch.arange(*bounds[m]) for m in order])
    moved = run(
        x[rows],
        a[order],
        base[rows],
        offsets_from_lengths(torch.tensor([lengths[m] for m in order])),
        g[rows],
    )
    for there, here in zip(moved, (out[rows], dx[rows], da[order]), strict=False):
        assert torch.equal(there, here)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [(700,), (3, 90) * 12, (1,) * 50], ids=["one", "many", "1"])
def test_the_number_of_threads_changes_no_bit(lengths, dtype, backend, threads):
    if backend == "reference":
        pytest.skip("a promise of the kernels")
    inputs, offsets = batch(lengths, (160, 300, 16), dtype=dtype)
    found = []
    for count in (1, 2, 5):
        threads(count)
        found.append(with_grads(ours, inputs, offsets))
        found[-1] += instance_lora_many([inputs[0]] * 2, [inputs[1]] * 2, [inputs[2]] * 2, offsets)
    assert all(map(torch.equal, found[0] * 2, found[1] + found[2]))


@pytest.mark.parametrize(
    "wanted", [w for w in itertools.product((True, False), repeat=4) if any(w)], ids=str
)
@pytest.mark.usefixtures("poisoned")
def test_only_the_gradients_that_are_wanted(wanted):
    inputs, offsets = batch()
    expected = with_grads(ours, inputs, offsets)[1:]
    leaves = [x.clone().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
    out = ours(*leaves, offsets, 0.5)
    out.backward(upstream(out))
    for x, want, grad in zip(leaves, wanted, expected, strict=True):
        assert torch.equal(x.grad, grad) if want else x.grad is None


def test_gradients_and_second_gradients():
    inputs, offsets = batch((2, 0, 1), (2, 3, 2), tail=1)
    leaves = [x.requires_grad_() for x in inputs]

    def function(*tensors):
        return ours(*tensors, offsets.int(), 0.7)

    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves, fast_mode=True)
    assert gradgradcheck(lambda *t: function(*t, None), leaves[:3], fast_mode=True)
    x, a, b, base = leaves
    assert gradgradcheck(lambda base: function(x.detach(), a.detach(), b.detach(), base), base)


def test_a_b_of_zeros_learns():
    """As LoRA starts: the output is the base, and B has a gradient, the first and the second."""
    (x, a, b, base), offsets = batch()
    b = torch.zeros_like(b).requires_grad_()
    out = instance_lora(x, a, b, offsets, base=base)
    assert torch.equal(out, base)
    (grad,) = torch.autograd.grad(out, b, upstream(out), create_graph=True)
    assert grad.any()
    x.requires_grad_()
    out = instance_lora(x, a, b, offsets, base=base)
    (dx,) = torch.autograd.grad(out, x, upstream(out), create_graph=True)
    assert dx.eq(0).all() and torch.autograd.grad(dx.sum(), b)[0].any()


def test_several_molecules_of_one_text():
    """Their A summed, and ranks side by side, are the sum of two adapters."""
    (x, a, b, base), offsets = batch()
    others, other_b = a.flip(0), b.flip(0)
    once = instance_lora(x, a, b, offsets, base=base)
    same = instance_lora(x, a + others, b, offsets, base=base)
    twice = instance_lora(x, others, b, offsets, base=once)
    torch.testing.assert_close(same, twice, rtol=1e-12, atol=1e-12)
    ranks = instance_lora(
        x, torch.cat([a, others], 2), torch.cat([b, other_b], 1), offsets, base=base
    )
    twice = instance_lora(x, others, other_b, offsets, base=once)
    torch.testing.assert_close(ranks, twice, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(dtype, backend):
    inputs, offsets = batch((3, 0, 20), (24, 40, 16), dtype=dtype)
    expected = with_grads(ours, inputs, offsets)

    def strided(x, a, b, base, offsets, scale):
        spread = offsets.repeat_interleave(2)[::2]
        turned = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (x, a, b, base)]
        return ours(*turned, spread, scale)

    tolerance = {} if backend == "reference" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(with_grads(strided, inputs, offsets), expected, **tolerance)
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = ours(*leaves, offsets, 0.5)
    expanded = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    dense = torch.autograd.grad(out, leaves, torch.ones_like(out))
    torch.testing.assert_close(expanded, dense, **tolerance)


def test_a_padded_batch_counts_its_rows():
    inputs, _ = batch((6, 6), tail=0)
    offsets = torch.tensor([0, 6, 12])
    flat = with_grads(ours, inputs, offsets)
    deep = [x.view(2, 6, -1) if k in (0, 3) else x for k, x in enumerate(inputs)]
    found = with_grads(ours, deep, offsets)
    assert found[0].shape == (2, 6, 7) and found[1].shape == (2, 6, 5)
    for a, b in zip(found, flat, strict=True):
        assert torch.equal(a.reshape(b.shape), b)
    one = instance_lora(inputs[0][0], inputs[1][:1], inputs[2], torch.tensor([0, 1]))
    assert torch.equal(one, instance_lora(inputs[0][:1], *inputs[1:3], offsets.clamp(max=1))[0])


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (1,)], ids=str)
@pytest.mark.parametrize("tail", [0, 2])
@pytest.mark.usefixtures("poisoned")
def test_empty_batches(lengths, tail):
    inputs, offsets = batch(lengths, tail=tail)
    out, dx, da, db, dbase = with_grads(ours, inputs, offsets)
    assert dx.shape == inputs[0].shape and da.shape == inputs[1].shape
    assert torch.equal(out[len(out) - tail :], inputs[3][len(out) - tail :])
    if sum(lengths) == 0:
        assert torch.equal(out, inputs[3])
        assert all(grad.eq(0).all() for grad in (dx, da, db))
    assert torch.equal(dbase, upstream(out))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_an_output_of_no_columns(dtype):
    inputs, offsets = batch((3, 0, 60), (33, 0, 5), dtype=dtype)
    out, *grads = with_grads(ours, inputs, offsets)
    assert out.shape == (len(inputs[0]), 0)
    assert all(grad.eq(0).all() for grad in grads)


@pytest.mark.parametrize("recorded", [False, True], ids=["plain", "recorded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_many_are_single_calls(dtype, recorded):
    lengths = (1, 1, 0, 1, 1)
    widths = [(48, 48, 16), (48, 16, 16), (48, 16, 4), (64, 48, 20)]
    layers = [batch(lengths, w, dtype=dtype, seed=k) for k, w in enumerate(widths)]
    offsets = layers[0][1]
    x, a, b, base = (list(column) for column in zip(*(inputs for inputs, _ in layers), strict=True))
    x[1] = x[2] = x[0].requires_grad_(recorded)
    base[2] = None
    for bases in (base, None):
        found = instance_lora_many(x, a, b, offsets, scale=0.5, base=bases)
        for k, out in enumerate(found):
            own = None if bases is None else bases[k]
            alone = instance_lora(x[k], a[k], b[k], offsets, scale=0.5, base=own)
            assert torch.equal(out, alone)
            assert out.requires_grad == alone.requires_grad


def test_many_of_one():
    (x, a, b, base), offsets = batch()
    (one,) = instance_lora_many([x], [a], [b], offsets, base=[base])
    assert torch.equal(one, instance_lora(x, a, b, offsets, base=base))


def test_opcheck():
    edt = torch.ops.edt
    (x, a, b, base), offsets = batch(dtype=torch.float32)
    for rows in (x, x.T.contiguous().T):
        for own in (base, None):
            arguments = (rows, a, b, offsets, 0.5, own)
            torch.library.opcheck(edt.instance_lora.default, arguments)
        shrunk = edt.instance_lora(*arguments)[1]
        for wanted in ((True, True, True), (False, False, True)):
            torch.library.opcheck(
                edt.instance_lora_bwd.default, (base, rows, a, b, shrunk, offsets, 0.5, *wanted)
            )
    layers = ([x, x], [a, a], [b, b[:2]], offsets, 0.5, [base, None])
    torch.library.opcheck(edt.instance_lora_many.default, layers)


def test_compiles_once_for_all_sizes():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")

    def halved(*tensors):
        return ours(*tensors, scale=0.5)

    compiled = torch.compile(halved, fullgraph=True, dynamic=True, backend=counter)
    for lengths in (LENGTHS, (4, 1, 9, 2)):
        inputs, offsets = batch(lengths, (11, 9, 8), dtype=torch.float32)
        found = with_grads(lambda *t: compiled(*t[:-1]), inputs, offsets)
        torch.testing.assert_close(found, with_grads(ours, inputs, offsets))
    assert counter.frame_count == 1


def test_many_compile():
    torch._dynamo.reset()
    compiled = torch.compile(instance_lora_many, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in (LENGTHS, (4, 1, 9, 2)):
        (x, a, b, base), offsets = batch(lengths, dtype=torch.float32)
        layers = ([x, x], [a, a], [b, b[:2]], offsets)
        found = compiled(*layers, base=[base, None])
        torch.testing.assert_close(found, instance_lora_many(*layers, base=[base, None]))


def call(**changes):
    (x, a, b, base), offsets = batch()
    given = {"x": x, "a": a, "b": b, "offsets": offsets, "base": base, **changes}
    return instance_lora(**given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": 3}, "x must be a tensor, got int"),
        ({"x": torch.zeros(13, 5).int()}, "x must be float32 or .*, got int32"),
        ({"a": torch.zeros(5, 5, 3)}, "a must be torch.float64, got torch.float32"),
        ({"b": torch.zeros(7, 3)}, "b must be torch.float64, got torch.float32"),
        ({"base": torch.zeros(13, 7)}, "base must be torch.float64, got torch.float32"),
        ({"offsets": torch.zeros(6)}, "offsets must be int64 or int32, got float32"),
        ({"scale": "1"}, "scale must be a number, got str"),
    ],
)
def test_wrong_types(changes, message):
    with pytest.raises(TypeError, match=message):
        call(**changes)


WIDE = torch.float64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(13, 4, dtype=WIDE)}, r"with d_in = 5 as in a \[B, d_in, r\], got .*4\)"),
        ({"x": torch.zeros((), dtype=WIDE)}, r"x must have shape \[..., d_in\]"),
        ({"a": torch.zeros(5, 5, dtype=WIDE)}, "a must have 3 dimensions"),
        ({"a": torch.zeros(5, 5, 0, dtype=WIDE)}, r"d_in, r >= 1, got \(5, 5, 0\)"),
        ({"a": torch.zeros(4, 5, 3, dtype=WIDE)}, "offsets must have shape .* B = 4 as in a"),
        (
            {"b": torch.zeros(7, 2, dtype=WIDE)},
            r"b must have .* r = 3 as in a .*got shape \(7, 2\)",
        ),
        ({"base": torch.zeros(7, dtype=WIDE)}, r"base must have shape \(13, 7\), got \(7,\)"),
        ({"offsets": torch.tensor([0, 3, 3, 4, 11, 14])}, "at most the number of rows 13, got 14"),
        ({"offsets": torch.tensor([0, 3, 2, 4, 11, 11])}, r"offsets\[2\] = 2 after 3"),
        ({"offsets": torch.tensor([1, 3, 3, 4, 11, 11])}, r"offsets\[0\] must be 0, got 1"),
    ],
)
def test_wrong_shapes_and_contents(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)
    (x, *_), _ = batch()
    leaf = changes.get("x", x).clone().requires_grad_()
    with pytest.raises(ValueError, match=message):
        call(**changes | {"x": leaf})


def test_wrong_layers():
    (x, a, b, base), offsets = batch()
    with pytest.raises(ValueError, match="x must have at least one layer, got none"):
        instance_lora_many([], [], [], offsets)
    for rows in (x, x.clone().requires_grad_()):
        with pytest.raises(ValueError, match="a must have one entry per layer, got 1 for 2 of x"):
            instance_lora_many([rows, rows], [a], [b, b], offsets)
        with pytest.raises(TypeError, match=r"b\[1\] must be torch.float64, got torch.float32"):
            instance_lora_many([rows, rows], [a, a], [b, b.float()], offsets)
    with pytest.raises(ValueError, match=r"b\[1\] must have .* r = 3"):
        instance_lora_many([x, x], [a, a], [b, b[:, :2]], offsets)
    with pytest.raises(ValueError, match=r"x\[1\] must have as many rows as x\[0\]"):
        instance_lora_many([x, x[:12]], [a, a], [b, b], offsets)
    with pytest.raises(TypeError, match=r"x\[1\] must be torch.float64, got torch.float32"):
        instance_lora_many([x, x.float()], [a, a.float()], [b, b.float()], offsets)
    with pytest.raises(ValueError, match="at most the number of rows 13, got 14"):
        instance_lora_many([x], [a], [b], offsets.clamp(min=0) + torch.tensor([0, 0, 0, 0, 3, 3]))
    with pytest.raises(ValueError, match="base must have one entry per layer, got 1 for 2 of x"):
        instance_lora_many([x, x], [a, a], [b, b], offsets, base=[base])


def test_the_kernels_read_nothing_out_of_bounds(backend):
    if backend == "reference":
        pytest.skip("a reference relies on the checks of torch")
    edt, ((x, a, b, base), offsets) = torch.ops.edt, batch()
    _, shrunk = edt.instance_lora(x, a, b, offsets, 1.0, base)
    forward = {"x": x, "a": a, "b": b, "offsets": offsets, "scale": 1.0, "base": base}
    for name, bad in (
        ("x", x[:-3]),
        ("x", x[:, :4]),
        ("x", x[0, 0]),
        ("a", a[:4]),
        ("a", a[0]),
        ("a", a.float()),
        ("b", b[:, :2]),
        ("b", b[0]),
        ("b", b.float()),
        ("offsets", offsets + 1),
        ("offsets", offsets[:-1]),
        ("offsets", offsets[:0]),
        ("base", base[:-1]),
        ("base", base[:, :-1]),
        ("base", base.float()),
    ):
        with pytest.raises(RuntimeError):
            edt.instance_lora(**forward | {name: bad})
        layers = {k: [v, v] if k in ("x", "a", "b", "base") else v for k, v in forward.items()}
        wrong = bad if name == "offsets" else [forward[name], bad]
        with pytest.raises(RuntimeError):
            edt.instance_lora_many(**layers | {name: wrong})
    for name in ("x", "a", "b", "base"):
        with pytest.raises(RuntimeError):
            edt.instance_lora_many(**layers | {name: layers[name][:1]})
    backward = {"grad": base, "x": x, "a": a, "b": b, "shrunk": shrunk, "offsets": offsets}
    backward |= {"scale": 1.0, "need_x": True, "need_a": True, "need_b": True}
    for name, bad in (
        ("grad", base[:-1]),
        ("grad", base[:, :-1]),
        ("grad", base.float()),
        ("shrunk", shrunk[:-1]),
        ("shrunk", shrunk[:, :-1]),
        ("shrunk", shrunk.float()),
        ("a", a[:4]),
        ("b", b[:-1]),
    ):
        with pytest.raises(RuntimeError):
            edt.instance_lora_bwd(**backward | {name: bad})


def test_the_example_runs():
    result = doctest.testmod(sys.modules["edt_kernels.ops.instance_lora"])
    assert result.attempted > 0
    assert result.failed == 0
