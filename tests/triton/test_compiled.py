"""Every kernel as it ships, compiled ahead of time for GPUs that need not be there."""

from __future__ import annotations

import os

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

# Of a thread, by the target's first letters, and of a program: what any GPU of the kind has.
REGISTERS = {"sm": 255, "gfx": 512}
SHARED_BYTES = 99 << 10


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


def one_of_each(launches: list[tuple[str, Launch]]) -> list[tuple[str, Launch]]:
    return list({kernel_name(launch): (name, launch) for name, launch in launches}.values())


SINGLE, HALF, DOUBLE = map(shipped, (torch.float32, torch.bfloat16, torch.float64))
CASES = [
    pytest.param(launch, target, id=f"{name}-{dtype}-{target}")
    for dtype, target, launches in (
        ("float32", "sm_90", SINGLE),
        ("bfloat16", "sm_90", HALF),
        ("float64", "sm_90", one_of_each(DOUBLE)),
        ("bfloat16", "sm_80", one_of_each(HALF)),
        ("float32", "gfx942", one_of_each(SINGLE)),
    )
    for name, launch in launches
]


@pytest.mark.parametrize(("launch", "target"), CASES)
def test_fits_its_budget(launch, target):
    needed = resources(launch, target)
    assert needed.ignored == []
    assert needed.spills == 0
    assert needed.registers <= REGISTERS["gfx" if target.startswith("gfx") else "sm"]
    assert needed.shared <= SHARED_BYTES


@pytest.mark.parametrize("dtype", _check.FLOATS, ids=str)
def test_every_launcher_has_a_configuration(dtype):
    configured = {configuration.launcher for configuration in configurations("meta", dtype)}
    assert configured == {launcher() for launcher in _library.LAUNCHERS.values()}


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
    x = torch.zeros(1 << 14, device="meta")
    arguments = {"x_ptr": x, "out_ptr": x, "steps": 5, "BLOCK": 1 << 14}
    assert resources(Launch(_keeps_too_much, arguments, {"num_warps": 1}), "sm_90").spills > 0
