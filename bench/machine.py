"""The machine that the times belong to: what it is, its measured ceilings, who else uses it."""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import edt_kernels

BUSY = 0.1
"""Share of the cores in use by other processes from which on times are not to be trusted."""

_COPIED = 1 << 28  # bytes read and bytes written, far beyond any cache level that a core owns
PRODUCT_SIDE = 2048  # of the matrix product, as in the record that `published.py` compares with


@dataclass(frozen=True)
class Machine:
    """What ran the benches.

    Attributes:
        copy: bytes per second, read and written counted, of a large copy.
        products: floating point operations per second of a matrix product of side 2048, by dtype.
        load: load average over a minute, before anything was timed.
        keeps_memory: freed memory stays in the process.
    """

    cpu: str
    cores: int
    threads: int
    isa: str
    torch: str
    copy: float
    products: dict[str, float]
    load: float | None
    keeps_memory: bool

    def line(self) -> str:
        """For the head of a report."""
        rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in self.products.items())
        load = "unknown" if self.load is None else f"{self.load:.2f}"
        return (
            f"{self.cpu}, {self.cores} cores, {self.threads} threads, {self.isa}, "
            f"torch {self.torch}; copy {self.copy / 1e9:.1f} GB/s, matrix product GFLOP/s: "
            f"{rates}; load before {load}; freed memory "
            + ("stays in the process" if self.keeps_memory else "may return to the system")
        )


def measure(*, keeps_memory: bool = False) -> Machine:
    """This machine, from now on with `keep_memory` if asked to. Takes about two seconds."""
    load = load_average()
    if keeps_memory:
        keep_memory()
    source = torch.zeros(_COPIED // 4)
    target = torch.zeros_like(source)
    copy = 2 * _COPIED / _median(lambda: target.copy_(source))
    products = {
        name: _product_rate(dtype)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    return Machine(
        _cpu(),
        os.cpu_count() or 1,
        torch.get_num_threads(),
        str(edt_kernels.build_info()["cpu_isa"] or "no native kernels"),
        torch.__version__,
        copy,
        products,
        load,
        keeps_memory,
    )


def _product_rate(dtype: torch.dtype) -> float:
    """Operations a second of a product of squares: `PRODUCT_SIDE` rows or, where torch has no fast
    product of that type and one would take minutes, as many as a tenth of a second allows."""
    side = PRODUCT_SIDE // 16
    while True:
        a, b = torch.randn(2, side, side, dtype=dtype)
        seconds = _median(lambda a=a, b=b: a @ b, rounds=5)
        if side == PRODUCT_SIDE or seconds > 0.1:
            return 2 * side**3 / seconds
        side *= 2


def _median(step: Callable[[], object], rounds: int = 9) -> float:
    """Median time of a call, after one that is not timed."""
    step()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def load_average() -> float | None:
    """Over the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def keep_memory() -> None:
    """Have what is freed stay in this process.

    Memory that returns to the system comes back page by page, which may cost more than to compute
    what is written there. All contenders are spared that alike.

    Raises:
        RuntimeError: the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    trim_threshold, mmap_max = -1, -4  # as malloc.h numbers them
    if not (mallopt and mallopt(trim_threshold, -1) and mallopt(mmap_max, 0)):
        raise RuntimeError("--keep-memory needs glibc, whose malloc can be told to")


class Neighbours:
    """Watches, from its making on, what other processes take of the cores."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), _all_seconds(), _own_seconds()

    def share(self) -> float | None:
        """Of all cores, 0 to 1; None where the system does not tell."""
        wall, everyone, own = self._start
        now = _all_seconds()
        if everyone is None or now is None:
            return None
        foreign = (now - everyone) - (_own_seconds() - own)
        available = (time.perf_counter() - wall) * (os.cpu_count() or 1)
        return min(max(foreign / available, 0.0), 1.0)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _all_seconds() -> float | None:
    """CPU time of all processes since the system started."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, stat.read_text().split(None, 9)[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    return sum(os.times()[:4])
