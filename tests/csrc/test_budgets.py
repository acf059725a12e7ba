"""What is made of ptxas's report: kernels that spill, use too much or are missing fail."""

from __future__ import annotations

import importlib.util

import pytest

from tests.csrc.emulation import ROOT


@pytest.fixture(scope="module")
def budgets():
    spec = importlib.util.spec_from_file_location("budgets", ROOT / ".ci" / "budgets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report(budgets, *, registers=32, spilled=0, left_out=""):
    """As ptxas writes it, of all kernels but one."""
    return "".join(
        f"ptxas info    : Compiling entry function '_ZN3edt{kernel}IfEEv' for '{arch}'\n"
        f"ptxas info    : Function properties for _ZN3edt{kernel}\n"
        f"    0 bytes stack frame, {spilled} bytes spill stores, {spilled} bytes spill loads\n"
        f"ptxas info    : Used {registers} registers, used 1 barriers, 648 bytes cmem[0]\n"
        for kernel in budgets.REGISTERS
        for arch in budgets.ARCHITECTURES
        if kernel != left_out
    )


def test_within_the_budgets(budgets, capsys):
    budgets.check(report(budgets))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(budgets.REGISTERS) * len(budgets.ARCHITECTURES)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"registers": 256}, "256 registers, allowed 64"),
        ({"spilled": 8}, "16 bytes spilled, allowed none"),
        ({"left_out": "cut_molecules"}, "cut_molecules was not compiled for sm_80"),
    ],
)
def test_beyond_them(budgets, changed, message):
    with pytest.raises(SystemExit, match=message):
        budgets.check(report(budgets, **changed))


def test_every_kernel_has_a_budget(budgets):
    for file in (ROOT / "csrc/cuda").glob("*.cuh"):
        for part in file.read_text().split("__global__ void")[1:]:
            name = part.split("(const __grid_constant__")[0].split()[-1]
            assert name in budgets.REGISTERS
