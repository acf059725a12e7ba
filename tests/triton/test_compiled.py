"""Every kernel as it ships, compiled ahead of time for GPUs that need not be there."""

from __future__ import annotations

import importlib
import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 compiles nothing", allow_module_level=True)

import triton
import triton.language as tl

from edt_kernels import _library
from edt_kernels.triton import MODULES
from edt_kernels.triton.launch import Launch, record
from tests.triton.compiling import resources, specialised

BUDGETS = {}


def kernel_name(launch: Launch) -> str:
    return f"{launch.kernel.__module__.rsplit('.', 1)[-1]}.{launch.kernel.__name__}"


def shipped(dtype: torch.dtype) -> list[tuple[str, Launch]]:
    """The launches of all configurations that are compiled, each once, with a name."""
    found = {}
    for name in MODULES:
        module = importlib.import_module(f"edt_kernels.triton.{name}")
        for configuration in module.configurations(torch.device("meta"), dtype):
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
    nvidia, amd, shared = BUDGETS.get(kernel_name(launch), (999, 999, 999999))
    needed = resources(launch, target)
    print(f"##,{kernel_name(launch)},{target},{needed.registers},{needed.shared}")
    assert needed.ignored == []
    assert needed.spills == 0
    assert needed.registers <= (amd if target.startswith("gfx") else nvidia)
    assert needed.shared <= shared
