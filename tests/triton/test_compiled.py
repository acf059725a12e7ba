"""Every kernel as it ships, compiled ahead of time for GPUs that need not be there."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 compiles nothing", allow_module_level=True)

import triton
import triton.language as tl

from edt_kernels import _check, _library
from edt_kernels.triton import configurations
from edt_kernels.triton.launch import Launch, record
from tests.triton.compiling import resources, specialised

# Registers of a thread on sm_* and on gfx942, a fifth more than the most that a configuration took
# with Triton 3.6 or 3.9, and shared bytes of a program, what it took.
BUDGETS = {
    "entropy._entropy_bwd_kernel": (120, 24, 0),
    "entropy._entropy_kernel": (144, 48, 64),
    "entropy_patches._entropy_cut_kernel": (88, 56, 512),
    "find_patches._cut_kernel": (88, 64, 1024),
    "find_patches._number_kernel": (88, 64, 8192),
    "insert._insert_kernel": (112, 48, 32),
    "insert._offsets_kernel": (40, 24, 0),
    "insert._text_bwd_kernel": (72, 32, 32),
    "insert._tokens_bwd_kernel": (72, 32, 32),
    "instance_lora._expand_kernel": (255, 152, 24576),
    "instance_lora._outer_kernel": (152, 88, 65536),
    "instance_lora._shrink_kernel": (168, 112, 49152),
    "linear_entropy._hidden_bwd_kernel": (248, 104, 36864),
    "linear_entropy._linear_entropy_kernel": (255, 112, 98304),
    "linear_entropy._merge_kernel": (48, 40, 0),
    "linear_entropy._slopes_kernel": (255, 72, 98304),
    "linear_entropy._weight_bwd_kernel": (255, 120, 33792),
    "ragged_attention._backward_kernel": (255, 288, 86016),
    "ragged_attention._forward_kernel": (255, 288, 49152),
    "ragged_attention._pair_offsets_kernel": (96, 72, 128),
    "ragged_cat._gather_kernel": (64, 32, 0),
    "ragged_cat._ragged_cat_kernel": (64, 48, 0),
    "ragged_cat._sum_kernel": (64, 40, 4096),
    "segment_pool._extreme_bwd_kernel": (72, 40, 4096),
    "segment_pool._extreme_kernel": (136, 80, 8192),
    "segment_pool._sum_bwd_kernel": (40, 24, 1024),
    "segment_pool._sum_kernel": (48, 32, 4096),
    "segment_pool._weight_bwd_kernel": (64, 40, 1024),
    "segment_softmax._segment_softmax_bwd_kernel": (72, 56, 512),
    "segment_softmax._segment_softmax_kernel": (72, 64, 512),
    "sort_ids._count_kernel": (32, 24, 1024),
    "sort_ids._move_kernel": (208, 248, 2048),
    "sort_ids._offsets_kernel": (48, 32, 0),
    "splice._scan_kernel": (160, 96, 256),
    "splice._splice_kernel": (80, 56, 0),
    "splice._text_bwd_kernel": (56, 32, 0),
    "splice._tokens_bwd_kernel": (56, 32, 0),
}
SPILLS = {
    # 72 where Triton 3.6 compiles causal float32, 32 in float64 with a bias.
    "ragged_attention._backward_kernel": 80,
    "ragged_attention._forward_kernel": 8,
    "ragged_attention._pair_offsets_kernel": 8,
}
"""Bytes of a thread that may lie in memory; 0 of every other kernel, and of 16-bit numbers."""


def kernel_name(launch: Launch) -> str:
    return f"{launch.kernel.__module__.rsplit('.', 1)[-1]}.{launch.kernel.__name__}"


def shipped(dtype: torch.dtype) -> list[tuple[str, Launch]]:
    """The launches of all configurations that are compiled, each once, with a name."""
    found = {}
    for configuration in configurations("meta", dtype):
        for launch in record(configuration):
            compiled = str((kernel_name(launch), specialised(launch), launch.options))
            found.setdefault(compiled, (f"{kernel_name(launch)}-{configuration.name}", launch))
    return list(found.values())


def last_of_each(
    launches: list[tuple[str, Launch]], key: Callable[[Launch], object]
) -> list[tuple[str, Launch]]:
    return list({key(launch): (name, launch) for name, launch in launches}.values())


def options(launch: Launch) -> object:
    """A kernel, which tensors it is given, and its switches: all but its sizes."""
    given = [x is None for name, x in launch.arguments.items() if name.endswith("_ptr")]
    return kernel_name(launch), *given, *(x for x in launch.arguments.values() if type(x) is bool)


def options_of_attention(launch: Launch) -> object:
    """The same of attention, which takes seconds to compile; everything of other kernels."""
    of_attention = kernel_name(launch).startswith("ragged_attention.")
    return options(launch) if of_attention else id(launch)


EVERY = os.environ.get("EDT_FULL_SIZE") == "1"
SINGLE, HALF, DOUBLE = map(shipped, (torch.float32, torch.bfloat16, torch.float64))
CASES = [
    pytest.param(launch, target, id=f"{name}-{dtype}-{target}")
    for dtype, target, launches in (
        ("float32", "sm_90", SINGLE if EVERY else last_of_each(SINGLE, options)),
        ("bfloat16", "sm_90", HALF if EVERY else last_of_each(HALF, options_of_attention)),
        ("float64", "sm_90", last_of_each(DOUBLE, kernel_name)),
        ("bfloat16", "sm_80", HALF if EVERY else last_of_each(HALF, kernel_name)),
        ("float32", "gfx942", SINGLE if EVERY else last_of_each(SINGLE, kernel_name)),
    )
    for name, launch in launches
]


@pytest.mark.parametrize(("launch", "target"), CASES)
def test_fits_its_budget(launch, target):
    name = kernel_name(launch)
    nvidia, amd, shared = BUDGETS[name]
    needed = resources(launch, target)
    assert needed.ignored == []
    tensors = [x for x in launch.arguments.values() if isinstance(x, torch.Tensor)]
    wide = all(x.dtype.itemsize > 2 for x in tensors)
    assert needed.spills <= (SPILLS.get(name, 0) if wide else 0)
    assert needed.registers <= (amd if target.startswith("gfx") else nvidia)
    assert needed.shared <= shared


@pytest.mark.parametrize("dtype", _check.FLOATS, ids=str)
def test_every_launcher_has_a_configuration(dtype):
    configured = {configuration.launcher for configuration in configurations("meta", dtype)}
    assert configured == {launcher() for launcher in _library.LAUNCHERS.values()}


def test_every_budget_belongs_to_a_kernel():
    assert set(BUDGETS) == {kernel_name(launch) for _, launch in SINGLE}


@triton.jit
def _reads_one_of_two(read_ptr, ignored_ptr, out_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    x = tl.load(read_ptr + lane)
    if BLOCK > 16:
        x += tl.load(ignored_ptr + lane)
    tl.store(out_ptr + lane, x)


def test_a_tensor_that_is_not_read_is_found():
    x = torch.zeros(16, device="meta")
    launch = Launch(
        _reads_one_of_two,
        {"read_ptr": x, "ignored_ptr": x, "out_ptr": x, "BLOCK": 16},
        {"num_warps": 1},
    )
    needed = resources(launch, "sm_90")
    assert needed.ignored == ["ignored_ptr"] and needed.registers > 0


@triton.jit
def _keeps_too_much(x_ptr, out_ptr, steps, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lane)
    for _ in range(steps):
        x = tl.exp(x) + tl.sum(x, 0)
    tl.store(out_ptr + lane, x)


def test_spills_are_found():
    x = torch.zeros(1 << 13, device="meta")
    arguments = {"x_ptr": x, "out_ptr": x, "steps": 5, "BLOCK": 1 << 13}
    assert resources(Launch(_keeps_too_much, arguments, {"num_warps": 1}), "sm_90").spills > 0
