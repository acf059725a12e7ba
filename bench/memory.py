"""Peak memory of a connector's training step, measured in a process of its own.

`python -m bench.memory ragged fp32 16` prints by how many bytes the resident memory of a forward
and backward over 16 molecules rises above what holds weights and gradients.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
FREE_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "131072"}
"""For glibc: a freed tensor leaves the process, so the peak is what was in use together."""


def peak(layout: str, dtype: str, molecules: int) -> int | None:
    """Bytes; None where the system does not tell."""
    return measured("bench.memory", layout, dtype, str(molecules))


def measured(module: str, *arguments: str) -> int | None:
    """What `python -m module` prints; None where the system does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, **FREE_AT_ONCE}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return int(done.stdout)


def _measure(layout: str, dtype: str, molecules: int) -> int:
    import torch

    from bench.connectors import Batch, build, padded, ragged
    from bench.workloads import SLOTS, SMALL

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    connector, _ = build(kind)
    for parameter in connector.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step(count: int) -> None:
        batch = Batch.of(SMALL.first(count), kind)
        read = ragged(connector, batch) if layout == "ragged" else padded(connector, batch, SLOTS)
        read.backward(torch.ones_like(read))

    return rise(lambda: step(1), lambda: step(molecules))


def rise(first: Callable[[], None], step: Callable[[], None]) -> int:
    """Bytes by which resident memory rises in `step`, after `first` has had libraries allocate."""
    first()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    """Bytes of a field of this process's status."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", status, flags=re.MULTILINE)[1])


if __name__ == "__main__":
    sys.stdout.write(str(_measure(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
