"""`python -m bench.gpu`: checks of every op on a GPU, then every figure, in nine minutes.

Needs torch 2.11 with CUDA and Triton 3.6, or later; torch-scatter is a peer where it is installed,
and EDT_CUDA_NATIVE=1 adds the CUDA C++ kernels where they are built. Every section writes its JSON
file as it goes, and a crash costs the item that crashed. Exits with 1 where a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch._functorch import config as functorch_config

from bench.gpu import (
    attention,
    bulk,
    checks,
    compiling,
    connector,
    few,
    graphs,
    kernels,
    machine,
    memory_bound,
    summary,
)
from bench.gpu.clock import clock_of
from bench.gpu.run import CRASHED, Run

SECTIONS = {
    "machine": (machine.run, 15),
    "kernels": (kernels.run, 75),
    "checks": (checks.run, 100),
    "graphs": (graphs.run, 40),
    "attention": (attention.run, 90),
    "memory_bound": (memory_bound.run, 65),
    "connector": (connector.run, 45),
    "few": (few.run, 30),
    "bulk": (bulk.run, 20),
    "compiling": (compiling.run, 60),
}
"""With seconds for each, which a section looks at between two items."""

MOST_CRASHES = 5
STALLED = 120  # seconds without a word after which a process is ended: a kernel that never ends


def main(arguments: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu"), help="folder")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script out")
    parser.add_argument("--tiny", action="store_true", help="everything small, once")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all sections together")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--assert-goals", action="store_true", help="a missed goal is a failure")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # of the working process
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("torch finds no GPU; --device cpu --tiny tries the script out\n")
        return 2
    if options.until is not None:
        work(options)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    for name in SECTIONS:
        (options.out / f"{name}.json").unlink(missing_ok=True)
    until = time.time() + 60 * options.minutes
    given = sys.argv[1:] if arguments is None else arguments
    crashes = work_in_processes([*given, "--until", str(until)], options.out)
    return conclude(options.out, crashes, assert_goals=options.assert_goals)


def work_in_processes(arguments: list[str], folder: Path) -> int:
    """Works in one process, and after a crash in another; how often that happened."""
    for crashes in range(MOST_CRASHES):
        status = one_process([sys.executable, "-m", "bench.gpu", *arguments], folder)
        if status == 0:
            return crashes
        sys.stdout.write(f"\n-- the process ended with status {status}\n")
        if status != CRASHED and status > 0:  # Python's own: the next one would end alike
            return crashes + 1
    return MOST_CRASHES


def one_process(command: list[str], folder: Path, stalled: int = STALLED) -> int:
    """Its exit status; it is ended when it has not written to `folder` for so many seconds."""
    process, quiet, last = subprocess.Popen(command), 0, 0.0
    while quiet < stalled:
        try:
            return process.wait(1)
        except subprocess.TimeoutExpired:
            newest = max((f.stat().st_mtime for f in folder.glob("*.json")), default=0.0)
            quiet, last = (0 if newest != last else quiet + 1), newest
    process.kill()
    return process.wait()


def work(options: argparse.Namespace) -> None:
    """All sections, as far as no process before has done them."""
    cache = (options.out / "compiled").resolve()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    functorch_config.donated_buffer = False  # peers' backwards are timed again and again
    device = torch.device(options.device)
    clock = clock_of(device, tiny=options.tiny)
    run = Run(device, options.out, clock, options.tiny, options.until, machine.head(device))
    for name, (do, seconds) in SECTIONS.items():
        if name in options.only or name == "machine":
            run.section(name, do, seconds)
        if name == "machine":
            run.ceilings |= machine.ceilings(options.out)


def conclude(folder: Path, crashes: int, *, assert_goals: bool) -> int:
    """Pictures and the last lines; the exit status."""
    sections = summary.read(folder, list(SECTIONS))
    summary.draw(sections, folder)
    judged = summary.goals(sections)
    (folder / "goals.json").write_text(json.dumps(judged, indent=1) + "\n")
    sys.stdout.writelines(f"{line}\n" for line in summary.lines(sections, folder))
    missed = not all(goal["met"] for goal in judged)
    return 1 if crashes or summary.failures(sections) or (assert_goals and missed) else 0


if __name__ == "__main__":
    raise SystemExit(main())
