"""What ptxas says of the CUDA kernels, held against their budgets: `budgets.py OUTPUT_OF_NVCC`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

# Registers of a thread. 65536 of a multiprocessor are 4 blocks of 128 threads with 128 each, 3 with
# 168, 2 with 255; a block of 1024 threads must do with 64.
REGISTERS = {
    "ragged_attention_forward": 168,
    "ragged_attention_backward": 255,
    "cut_molecules": 64,
    "number_patches_of_batch": 64,
    "entropy_patches_of_few": 64,
}
ARCHITECTURES = ("sm_80", "sm_90")
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'\n.*\n"
    r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\n.*Used (?P<registers>\d+) registers"
)


def check(output: str) -> None:
    """Prints a line per kernel; SystemExit where a budget is exceeded or a kernel is missing."""
    missing = {(kernel, arch) for kernel in REGISTERS for arch in ARCHITECTURES}
    problems = []
    for found in KERNEL.finditer(output):
        known = [kernel for kernel in REGISTERS if kernel in found["name"]]
        if not known:
            problems.append(f"{found['name']} has no budget")
            continue
        used = int(found["registers"])
        spilled = int(found["stores"]) + int(found["loads"])
        print(f"{found['arch']} {used:4} registers, {spilled} bytes spilled: {found['name']}")
        missing.discard((known[0], found["arch"]))
        if used > REGISTERS[known[0]]:
            problems.append(f"{found['name']}: {used} registers, allowed {REGISTERS[known[0]]}")
        if spilled:
            problems.append(f"{found['name']}: {spilled} bytes spilled, allowed none")
    problems += [f"{kernel} was not compiled for {arch}" for kernel, arch in sorted(missing)]
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    check(Path(sys.argv[1]).read_text())
