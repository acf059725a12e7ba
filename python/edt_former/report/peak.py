"""Peak memory of a contender, in a fresh process that holds nothing but what it needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from edt_former.report.contenders import line_up
from edt_former.report.pipeline import Pipeline
from edt_former.report.workload import Workload

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PEAK_OF_MEMORY = "5"  # what Linux resets for this number
FREE_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "131072"}
"""For glibc: a freed tensor leaves the process, so the peak is what was in use together."""


@dataclass(frozen=True)
class Peak:
    """Bytes.

    Attributes:
        total: the most there were at once, with models and (on the CPU) Python and libraries.
        working: of these, what came on top of the models for the molecules.
        source: how it was measured: "VmHWM" or "torch.cuda.max_memory_allocated".
    """

    total: int
    working: int
    source: str


def peak_memory(
    workload: Workload,
    smiles: Sequence[str],
    name: str,
    *,
    mean: float,
    longest: int,
    threads: int,
) -> Peak:
    """Run the contender `name` of `line_up` over all molecules in a process of its own.

    Args:
        workload: models and prompts.
        smiles: the molecules.
        name: of the contender.
        mean: of `line_up`, as `longest`.
        threads: of torch there.

    Raises:
        RuntimeError: the process failed; the message is its last line. Or this system does not
            tell a process its peak memory.
    """
    request = {
        "workload": asdict(workload),
        "smiles": list(smiles),
        "name": name,
        "mean": mean,
        "longest": longest,
        "threads": threads,
    }
    result = subprocess.run(
        [sys.executable, "-m", "edt_former.report.peak"],
        input=json.dumps(request),
        env={**os.environ, **FREE_AT_ONCE, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise RuntimeError(f"peak memory of {name!r} was not measured: {lines[-1]}")
    return Peak(**json.loads(result.stdout.splitlines()[-1]))


@torch.inference_mode()
def _measure(request: dict) -> Peak:
    torch.set_num_threads(request["threads"])
    workload = Workload(**request["workload"])
    pipeline = Pipeline(workload)
    field = line_up(pipeline.parts.connector, mean=request["mean"], longest=request["longest"])
    contender = next(c for c in field if c.name == request["name"])

    def run(smiles: list[str]) -> None:
        batch, _ = pipeline.read(smiles, patches=contender.reads_patches)
        pipeline.run(contender, batch)

    smiles, size = request["smiles"], workload.batch
    run(smiles[:1])  # loads what libraries load on first use
    before = _restart(workload.device)
    for start in range(0, len(smiles), size):
        run(smiles[start : start + size])
    total, source = _peak(workload.device)
    return Peak(total, total - before, source)


def _restart(device: str) -> int:
    """Bytes in use now; the peak starts from there."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if not STATUS.exists():
        raise RuntimeError(f"{STATUS} is needed to measure a process, this system has none")
    CLEAR.write_text(PEAK_OF_MEMORY)
    return _status("VmRSS")


def _peak(device: str) -> tuple[int, str]:
    if device == "cuda":
        return torch.cuda.max_memory_allocated(), "torch.cuda.max_memory_allocated"
    return _status("VmHWM"), "VmHWM"


def _status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    print(json.dumps(asdict(_measure(json.load(sys.stdin)))))  # noqa: T201 (read by peak_memory)
