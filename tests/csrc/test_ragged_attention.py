"""`ragged_attention` of CUDA C++: what the tests of the op do not ask."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from edt_kernels import ragged_attention
from edt_kernels.reference.ragged_attention import ragged_attention as reference
from edt_kernels.testing import ragged
from tests.csrc import emulation

# Beyond a tile of 64 queries or keys, and of 64 numbers.
LENGTHS = (3, 0, 70, 41, 9), (30, 2, 65, 0, 130)


def batch(heads=2, kv_heads=1, width=64, dtype=torch.float32, lengths=LENGTHS):
    q, q_offsets = ragged(lengths[0], heads, width, dtype=dtype, tail=2, seed=1)
    k, k_offsets = ragged(lengths[1], kv_heads, width, dtype=dtype, tail=3, seed=2)
    v, _ = ragged(lengths[1], kv_heads, width, dtype=dtype, tail=3, seed=3)
    for x, offsets in ((q, q_offsets), (k, k_offsets), (v, k_offsets)):
        x[offsets[-1] :] = torch.nan
    return [q, k, v], [q_offsets, k_offsets]


def outputs(tensors, offsets, **options):
    """Output, lse and the gradients of both."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = ragged_attention(*leaves, *offsets, return_lse=True, **options)
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    total = (out * weight).sum() + lse.masked_fill(lse == -torch.inf, 0).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(total, leaves)]


def assert_equal(found, wanted):
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


def test_the_tests_of_the_op(library):
    """Values and gradients in every dtype, causal and grouped, tails, empty molecules, views."""
    wanted = "parity or scale_and or large or nothing or in_every_batch or strided or nan or wanted"
    command = [sys.executable, "-m", "pytest", "-p", "tests.csrc.emulation", "-k", wanted]
    command += ["tests/ops/test_ragged_attention.py", "-v"]
    environment = {**os.environ, emulation.BUILT: str(library)}
    done = subprocess.run(
        command, cwd=emulation.ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" passed") == 1


@pytest.mark.parametrize("width", [64, 100], ids="D{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_any_order_of_threads_gives_the_same(order, dtype, width):
    tensors, offsets = batch(width=width, dtype=dtype)
    found = []
    for seed in range(3):
        order(seed)
        found.append(outputs(tensors, offsets, causal=seed < 0))
    assert_equal(found[0], found[1])
    assert_equal(found[0], found[2])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.usefixtures("order")
def test_a_molecule_has_the_same_bits_alone(causal):
    tensors, offsets = batch(dtype=torch.bfloat16)
    out, lse = ragged_attention(*tensors, *offsets, causal=causal, return_lse=True)
    for m in range(len(LENGTHS[0])):
        mine = [slice(o[m], o[m + 1]) for o in offsets]
        own = [tensors[0][mine[0]], tensors[1][mine[1]], tensors[2][mine[1]]]
        alone = [torch.tensor([0, x.stop - x.start]) for x in mine]
        own_out, own_lse = ragged_attention(*own, *alone, causal=causal, return_lse=True)
        assert_equal((own_out, own_lse), (out[mine[0]], lse[mine[0]]))


@pytest.mark.parametrize("width", [64, 128, 20], ids="D{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.usefixtures("order")
def test_layouts_of_the_operands(dtype, width):
    """Heads before rows, rows that are one row, memory that is not aligned: the same bits."""
    tensors, offsets = batch(heads=2, kv_heads=2, width=width, dtype=dtype)
    row = tensors[0][:1].expand(len(tensors[0]), -1, -1)
    clean = outputs([row.contiguous(), *tensors[1:]], offsets)
    assert_equal(outputs([row, *tensors[1:]], offsets), clean)
    moved = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors[1:]]
    assert_equal(outputs([row, *moved], offsets), clean)
    shifted = [torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in tensors[1:]]
    assert_equal(outputs([row, *shifted], offsets), clean)


@pytest.mark.usefixtures("order")
def test_float64_takes_the_general_op():
    tensors, offsets = batch(dtype=torch.float64)
    found = outputs(tensors, offsets)
    calls = torch.ops.edt.ragged_attention_general(
        *tensors, None, None, *offsets, False, None, 0.0, False
    )
    assert_equal(found[:2], calls[:2])
    out, lse = reference(*tensors, *offsets, False, None)
    torch.testing.assert_close(found[0], out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], lse, rtol=1e-12, atol=1e-12)


def test_a_gpu_with_less_shared_memory_takes_the_general_op(order, library):
    """The backward in float32 needs more than a block of sm_86 or sm_89 can have."""
    tensors, offsets = batch(width=32)
    native = outputs(tensors, offsets)
    emulated = ctypes.CDLL(str(library))
    emulated.edt_emulated_shared(99 << 10)
    try:
        found = outputs(tensors, offsets)
        assert_equal(found[:2], native[:2])
        assert not torch.equal(found[2], native[2])  # by other kernels
        for mine, other in zip(found[2:], native[2:], strict=True):
            torch.testing.assert_close(mine, other, equal_nan=True)
        half, _ = batch(width=32, dtype=torch.bfloat16)
        first = outputs(half, offsets)
    finally:
        emulated.edt_emulated_shared(163 << 10)
    assert_equal(outputs(half, offsets), first)


@pytest.mark.parametrize(
    "malformed", [[0, 3, 900], [5, 2, 7], [-4, 3, 5], [0, 90, 3]], ids="offsets {}".format
)
@pytest.mark.usefixtures("order")
def test_malformed_offsets_stay_within_bounds(malformed):
    """What comes out means nothing; memory beyond the tensors is not touched."""
    (q, k, v), _ = batch(lengths=((9, 1), (8, 4)))
    o = torch.tensor(malformed)
    out, lse = torch.ops.edt.ragged_attention(q, k, v, o, o, False, None)
    torch.ops.edt.ragged_attention_bwd(out, None, q, k, v, lse, o, o, False, None)
