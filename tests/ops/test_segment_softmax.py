from __future__ import annotations

import doctest
import itertools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck

from edt_kernels import _native, build_info, offsets_from_lengths, segment_softmax
from edt_kernels.testing import assert_within_budget

NATIVE = build_info()["ops"]["segment_softmax"] == "native"
SLOWER_LEVELS = _native.ISA_NAMES[: _native.ISA_NAMES.index(build_info()["cpu_isa"] or "scalar")]

LENGTHS = (3, 0, 1, 7, 2)
# Enough segments to fill every vector of segments, and a few that no vector should wait for.
MANY = (*[i * 5 % 7 for i in range(40)], 200, 1, 0, 65, *[3] * 20)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def batch(lengths=LENGTHS, shape=(4,), tail=2, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    values = 4 * torch.randn(sum(lengths) + tail, *shape, generator=g, dtype=torch.float64)
    return values.to(dtype), offsets_from_lengths(torch.tensor(lengths, dtype=torch.int64))


def oracle(values: Tensor, offsets: Tensor) -> Tensor:
    """torch's softmax, segment by segment, and a tail of zeros."""
    bounds = offsets.tolist()
    parts = [values[b:e].softmax(0) for b, e in itertools.pairwise(bounds)]
    return torch.cat([*parts, 0 * values[bounds[-1] :]])


def with_grad(function, values: Tensor, offsets: Tensor) -> list[Tensor]:
    values = values.detach().clone().requires_grad_()
    out = function(values, offsets)
    g = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, values, g)]


# One column; less than a vector; blocks of vectors, single vectors and a rest.
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (150,)], ids=str)
@pytest.mark.parametrize("lengths", [LENGTHS, MANY], ids=["few", "many"])
@pytest.mark.usefixtures("poisoned")
def test_matches_a_loop_over_segments(lengths, shape):
    values, offsets = batch(lengths, shape)
    torch.testing.assert_close(
        with_grad(segment_softmax, values, offsets.int()),
        with_grad(oracle, values, offsets),
        rtol=1e-12,
        atol=1e-14,
    )


def assert_good(values, offsets):
    """Within twice the error of torch in the same dtype."""
    exact = with_grad(oracle, values.double(), offsets)
    peer = with_grad(oracle, values, offsets)
    ours = with_grad(segment_softmax, values, offsets)
    # y and y (|g| + sum y |g|), |g| at most 2: rounded to the dtype, and in float32 before.
    for mine, theirs, truth, size in zip(ours, peer, exact, (1, 4), strict=True):
        if mine.dtype == torch.float64:
            torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-12)
        else:
            eps = torch.finfo(mine.dtype).eps + 4 * torch.finfo(torch.float32).eps
            assert_within_budget(mine, theirs, truth, eps=eps * size)


@pytest.mark.parametrize("shape", [(), (12,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_error_is_within_twice_that_of_torch(dtype, shape):
    assert_good(*batch((500, 1, 30, *MANY), shape, dtype=dtype))


@st.composite
def ragged_batches(draw):
    lengths = draw(st.lists(st.integers(0, 9) | st.just(80), max_size=40))
    shape = draw(st.sampled_from([(), (1,), (3,), (17,), (2, 40)]))
    dtype = draw(st.sampled_from(DTYPES))
    return batch(lengths, shape, draw(st.integers(0, 3)), dtype, draw(st.integers(0, 99)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(ragged_batches())
def test_any_segmentation(arguments):
    assert_good(*arguments)


def test_large_values_lose_nothing():
    values, offsets = batch(dtype=torch.float32)
    shift = 1000.0 * torch.arange(len(LENGTHS)).repeat_interleave(offsets.diff())
    whole = values[: offsets[-1]].round()
    far = segment_softmax(whole + shift.unsqueeze(1), offsets)
    torch.testing.assert_close(far, segment_softmax(whole, offsets))


@pytest.mark.parametrize("copies", [1, 30])  # alone, and in the lanes of a vector
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity_has_probability_zero(dtype, copies):
    inf = torch.inf
    values = torch.tensor([0.0, -inf, 0.0, -inf, -inf] * copies, dtype=dtype, requires_grad=True)
    out = segment_softmax(values, offsets_from_lengths(torch.tensor([3, 2] * copies)))
    assert out.tolist() == [0.5, 0, 0.5, 0, 0] * copies
    (grad,) = torch.autograd.grad(out, values, torch.arange(5.0).to(dtype).repeat(copies))
    assert grad.tolist() == [-0.5, 0, 0.5, 0, 0] * copies


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("shape", [(), (20,)], ids=str)
def test_a_segment_that_has_no_softmax_stays_alone(shape, bad):
    values, offsets = batch(MANY, shape, tail=0)
    clean = with_grad(segment_softmax, values, offsets)
    spoilt = slice(int(offsets[3]), int(offsets[4]))
    values[spoilt.start] = bad
    for found, right in zip(with_grad(segment_softmax, values, offsets), clean, strict=True):
        assert found[spoilt].isnan().all()
        found[spoilt] = right[spoilt]
        assert torch.equal(found, right)


def test_any_strides():
    values, offsets = batch(shape=(2, 3), dtype=torch.float32)
    expected = with_grad(segment_softmax, values, offsets)
    permuted = values.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    strided = offsets.repeat_interleave(2)[::2]
    assert all(map(torch.equal, with_grad(segment_softmax, permuted, strided), expected))
    leaf = values.requires_grad_()
    out = segment_softmax(leaf, offsets)
    expanded = torch.autograd.grad(out.sum(), leaf, retain_graph=True)
    assert all(map(torch.equal, expanded, torch.autograd.grad(out, leaf, torch.ones_like(out))))


def test_gradients_and_second_gradients():
    values, offsets = batch((2, 0, 1), (2,), tail=1)
    values.requires_grad_()
    assert gradcheck(segment_softmax, (values, offsets), fast_mode=True)
    assert gradgradcheck(segment_softmax, (values, offsets), fast_mode=True)


def test_opcheck():
    values, offsets = batch(dtype=torch.float32)
    for x in (values, values.t().contiguous().t()):
        torch.library.opcheck(torch.ops.edt.segment_softmax.default, (x, offsets))
        assert segment_softmax(x, offsets).is_contiguous()
        args = (x, segment_softmax(x, offsets), offsets)
        torch.library.opcheck(torch.ops.edt.segment_softmax_bwd.default, args)


def test_compiles_once_for_all_sizes():
    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(segment_softmax, fullgraph=True, dynamic=True, backend=backend)
    for lengths in (LENGTHS, (4, 1, 9, 2)):
        values, offsets = batch(lengths, dtype=torch.float32)
        torch.testing.assert_close(
            with_grad(compiled, values, offsets), with_grad(segment_softmax, values, offsets)
        )
    assert backend.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (12,), (150,)], ids=str)
def test_a_segment_has_the_same_bits_alone(shape, dtype):
    values, offsets = batch((500, 1, 0, 30, 7, *MANY), shape, tail=0, dtype=dtype)
    g = torch.randn(values.shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def run(values, offsets, g):
        values = values.clone().requires_grad_()
        out = segment_softmax(values, offsets)
        return out.detach(), *torch.autograd.grad(out, values, g)

    whole = run(values, offsets, g)
    for begin, end in offsets.unfold(0, 2, 1).tolist():
        alone = run(values[begin:end], torch.tensor([0, end - begin]), g[begin:end])
        for single, packed in zip(alone, whole, strict=True):
            assert torch.equal(single, packed[begin:end])


@pytest.mark.parametrize(
    ("lengths", "shape"),
    [((30, 1, 0, 77) * 60, (256,)), ((3, 4) * 20_000, ()), ((4000, 3, 9000), (100,))],
    ids=["many", "column", "long"],
)
def test_the_number_of_threads_changes_no_bit(lengths, shape, threads):
    values, offsets = batch(lengths, shape, dtype=torch.float32)
    found = []
    for count in (1, 2, 5):
        threads(count)
        found.append(with_grad(segment_softmax, values, offsets))
    assert all(map(torch.equal, found[0] * 2, found[1] + found[2]))


def test_nan_in_the_tail_does_not_spread():
    values, offsets = batch()
    values[offsets[-1] :] = torch.nan
    leaf = values.requires_grad_()
    out = segment_softmax(leaf, offsets)
    g = torch.ones_like(out)
    g[offsets[-1] :] = torch.nan
    (grad,) = torch.autograd.grad(out, leaf, g)
    assert torch.equal(out[offsets[-1] :], torch.zeros(2, 4, dtype=torch.float64))
    assert not out.isnan().any()
    assert not grad.isnan().any()
    assert grad[offsets[-1] :].eq(0).all()


@pytest.mark.parametrize(("lengths", "tail"), [((), 0), ((), 2), ((0, 0), 0), ((0,), 1), ((1,), 0)])
def test_empty_batches(lengths, tail):
    values, offsets = batch(lengths, tail=tail)
    out, grad = with_grad(segment_softmax, values, offsets)
    assert out.shape == grad.shape == values.shape
    assert out[: sum(lengths)].eq(1).all()
    assert out[sum(lengths) :].eq(0).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": [1.0]}, TypeError, "values must be a tensor, got list"),
        ({"values": torch.arange(4)}, TypeError, "values must be float32 .*, got int64"),
        ({"values": torch.tensor(1.0)}, ValueError, r"values must have shape \[N, ...\]"),
        ({"offsets": torch.tensor([0.0, 3])}, TypeError, "offsets must be int64 or int32"),
        ({"offsets": torch.tensor([[0, 3]])}, ValueError, "offsets must have 1 dimensions"),
        ({"offsets": torch.zeros(0).long()}, ValueError, r"\[B \+ 1\] with B >= 0"),
        ({"offsets": torch.tensor([1, 3])}, ValueError, r"offsets\[0\] must be 0, got 1"),
        ({"offsets": torch.tensor([0, 3, 2])}, ValueError, r"offsets\[2\] = 2 after 3"),
        ({"offsets": torch.tensor([0, 5])}, ValueError, "at most the number of rows 4, got 5"),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_wrong_arguments_are_named(change, error, message, grad):
    arguments = {"values": torch.ones(4, requires_grad=grad), "offsets": torch.tensor([0, 4])}
    with pytest.raises(error, match=message):
        segment_softmax(**arguments | change)


@pytest.mark.skipif(not NATIVE, reason="a promise of the kernels")
def test_kernels_refuse_what_would_reach_beyond_memory():
    x, offsets, bwd = torch.ones(3, 2), torch.tensor([0, 3]), torch.ops.edt.segment_softmax_bwd
    for arguments in ((x[:2], x, offsets), (x.double(), x, offsets), (x, x, offsets + 1)):
        with pytest.raises(RuntimeError):
            bwd(*arguments)


@pytest.mark.skipif(not NATIVE, reason="this is the reference path")
@pytest.mark.parametrize(
    "backend",
    [*({"EDT_CPU_ISA": level} for level in SLOWER_LEVELS), {"EDT_NATIVE": "0"}],
    ids=lambda backend: "-".join(backend.values()),
)
def test_every_backend(backend):
    chosen = "matches or any_segmentation or alone or nan or infinity or empty or wrong"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__, "-k", chosen],
        env=os.environ | backend,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_the_examples_run():
    result = doctest.testmod(sys.modules["edt_kernels.ops.segment_softmax"])
    assert result.attempted > 0
    assert result.failed == 0
