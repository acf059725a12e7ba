"""Kernels compiled by several processes at once, into the cache that the others read.

A kernel takes Triton a second or more, on one core. `python -m bench.gpu.kernels PART PARTS` makes
every call of the checks whose turn it is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import torch

from bench.gpu.cases import Call, cases
from bench.gpu.checks import DTYPES
from bench.gpu.run import Run, Section

MOST_PROCESSES = 8


def run(run: Run, section: Section) -> None:
    """What a process says of errors is nothing: the checks will say it."""
    if not run.on_gpu:
        section.add("kernels", skipped="Triton compiles for no CPU")
        return
    parts = min(MOST_PROCESSES, os.cpu_count() or 1)
    start = time.time()
    command = [sys.executable, "-m", "bench.gpu.kernels"]
    started = [subprocess.Popen([*command, str(part), str(parts)]) for part in range(parts)]
    for process in started:
        try:
            process.wait(max(section.left, 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
    section.add("kernels", seconds=time.time() - start, processes=parts)


def compile_part(part: int, parts: int, device: torch.device) -> int:
    """Every call whose turn it is; how many of them worked."""
    turns = [(case, dtype) for dtype in DTYPES.values() for case in cases()]
    worked = 0
    for case, dtype in turns[part::parts]:
        try:
            Call(case, device, dtype)()
            worked += 1
        except Exception as error:
            sys.stderr.write(f"{case.name}: {error}\n")
    return worked


if __name__ == "__main__":
    compile_part(int(sys.argv[1]), int(sys.argv[2]), torch.device("cuda"))
