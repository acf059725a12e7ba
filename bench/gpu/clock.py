"""Seconds of a step: by CUDA events on a GPU, by the clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

Step = Callable[[], object]


class Clock(Protocol):
    """Three ways to time a step."""

    def launched(self, step: Step) -> float:
        """Median seconds of the device, caches cold, launches hidden where they are shorter."""

    def replayed(self, step: Step) -> float:
        """Median seconds in a CUDA graph: no launches, caches as the step leaves them."""

    def called(self, step: Step) -> float:
        """Seconds of one of many calls in a row, whichever of host and device is slower."""


class EventClock:
    """Of a GPU, by Triton's `do_bench`. `milliseconds` is how long one measurement lasts, about."""

    def __init__(self, milliseconds: float = 25) -> None:
        from triton.testing import do_bench, do_bench_cudagraph

        self._rep = milliseconds
        self._do_bench, self._do_bench_graph = do_bench, do_bench_cudagraph

    def launched(self, step: Step) -> float:
        """As of `Clock`."""
        return 1e-3 * self._do_bench(step, warmup=5, rep=self._rep, return_mode="median")

    def replayed(self, step: Step) -> float:
        """As of `Clock`."""
        return 1e-3 * self._do_bench_graph(step, rep=self._rep, return_mode="median")

    def called(self, step: Step, calls: int = 100) -> float:
        """As of `Clock`."""
        for _ in range(10):
            step()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            step()
        end.record()
        torch.cuda.synchronize()
        return 1e-3 * start.elapsed_time(end) / calls


class HostClock:
    """Of a CPU, to try the script out: the three ways are one, and a step is timed once."""

    def launched(self, step: Step) -> float:
        """As of `Clock`."""
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    replayed = called = launched


def clock_of(device: torch.device, *, tiny: bool) -> Clock:
    """The clock of a device."""
    return EventClock(5 if tiny else 25) if device.type == "cuda" else HostClock()
