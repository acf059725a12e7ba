"""The GPU that the figures belong to, and its ceilings, measured in the same run."""

from __future__ import annotations

import datetime
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import edt_kernels
from bench.gpu.contests import NAMES
from bench.gpu.run import Run, Section
from edt_former.machine import first_line, gpu

PACKAGES = ("torch", "triton", "numpy", "torch-scatter", "edt-kernels")
CLOCKS = "clocks.sm,clocks.mem,temperature.gpu,power.draw"


def head(device: torch.device) -> dict[str, object]:
    """What stands at the top of every file: date, device, driver, versions, backends."""
    info = edt_kernels.build_info()
    on_gpu = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": gpu() if on_gpu else "the CPU: no figure here is of a GPU",
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
        "cuda": torch.version.cuda,
        "nvcc": _nvcc(),
        "ops": info["cuda_ops"] if on_gpu else info["ops"],
    }


def run(run: Run, section: Section) -> None:
    """Copy bandwidth and product rates, the ceilings of all other sections."""
    side = 256 if run.tiny else 8192
    numbers = 1 << (16 if run.tiny else 30)
    section.add("copy", **{"per second": _copy(run, numbers), "unit": "bytes"})
    for dtype, name in NAMES.items():
        a, b = torch.randn(2, side, side, device=run.device, dtype=dtype)
        seconds = run.clock.launched(lambda a=a, b=b: a @ b)
        section.add(name, **{"per second": 2 * side**3 / seconds, "unit": "FLOP"}, side=side)
    if run.on_gpu:
        clocks = first_line("nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader")
        section.add("clocks", **{CLOCKS: clocks})


def ceilings(folder: Path) -> dict[str, float]:
    """What the section has measured."""
    entries = json.loads((folder / "machine.json").read_text())["entries"]
    return {e["what"]: e["per second"] for e in entries if "per second" in e}


def _copy(run: Run, numbers: int) -> float:
    """Bytes per second, read and written counted."""
    source = torch.ones(numbers, device=run.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / run.clock.launched(lambda: target.copy_(source))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _nvcc() -> str | None:
    return first_line("sh", "-c", "nvcc --version | grep release")
