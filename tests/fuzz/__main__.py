"""A long run: `python -m tests.fuzz --batches 1000000`, shared out over this machine's levels."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from random import Random

from tqdm import tqdm

from edt_kernels import _native, build_info
from tests.fuzz import batches
from tests.fuzz.agreement import Disagreement, check, check_spoiled

REPORT_EVERY = 500


def fuzz(count: int, seed: int, first: int) -> dict[str, int]:
    """Check `count` batches on this process's level; how many of every op, and how many refused.

    A batch is decided by the seed and its number alone: `Random(f"{seed}-{number}")`.
    """
    found: dict[str, int] = dict.fromkeys(batches.OPS, 0) | {"refused": 0}
    for number in range(first, first + count):
        rng = Random(f"{seed}-{number}")
        call = batches.draw(rng)
        found[call.op] += 1
        try:
            if rng.random() < 0.25:
                found["refused"] += check_spoiled(batches.spoil(rng, call), rng)
            else:
                check(call, rng)
        except Disagreement as error:
            raise SystemExit(f"seed {seed}, batch {number}: {error}") from error
        except Exception as error:
            raise RuntimeError(f"seed {seed}, batch {number}, {call.op}") from error
        if (number + 1) % REPORT_EVERY == 0 or number + 1 == first + count:
            print(json.dumps(found), flush=True)
    return found


def main() -> None:
    """Start a process per level and show what they have done."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--batches", type=int, default=1_000_000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="batch, to go on with a run")
    parser.add_argument("--levels", nargs="+", help="of instruction sets; all unless given")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not _native.loaded:
        raise SystemExit("the native kernels are not built: nothing to compare")
    if options.worker:
        fuzz(options.batches, options.seed, options.first)
        return
    names = _native.ISA_NAMES
    levels = options.levels or names[: names.index(build_info()["cpu_isa"]) + 1]
    share = -(-options.batches // len(levels))
    began = time.monotonic()
    command = [sys.executable, "-m", "tests.fuzz", "--worker", "--batches", str(share)]
    command += ["--first", str(options.first)]
    running = {
        level: subprocess.Popen(
            [*command, "--seed", str(options.seed + i)],
            env=os.environ | {"EDT_CPU_ISA": level, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i, level in enumerate(levels)
    }
    failed = []
    for level, process in running.items():
        last: dict[str, int] = {}
        with tqdm(total=share, desc=level, unit="batch") as bar:
            for line in process.stdout:
                last = json.loads(line)
                bar.update(sum(last.values()) - last["refused"] - bar.n)
        if process.wait():
            failed.append(level)
        print(f"{level}: {json.dumps(last)}")
    print(f"{share * len(levels)} batches, {time.monotonic() - began:.0f} s")
    if failed:
        raise SystemExit(f"failed at {', '.join(failed)}")


if __name__ == "__main__":
    main()
