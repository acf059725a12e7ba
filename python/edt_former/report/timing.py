"""Fair times: contenders run in turns, and are compared round by round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from tqdm import tqdm

T = TypeVar("T")


class Spread(NamedTuple):
    """A median over rounds, with the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value.

        >>> Spread.of([3.0, 1.0, 2.0])
        Spread(median=2.0, low=1.0, high=3.0)
        """
        return cls(statistics.median(values), min(values), max(values))


def paired(theirs: Sequence[float], ours: Sequence[float]) -> Spread:
    """Their time over ours, of the same round each.

    >>> paired([2.0, 6.0], [1.0, 2.0])
    Spread(median=2.5, low=2.0, high=3.0)
    """
    return Spread.of([a / b for a, b in zip(theirs, ours, strict=True)])


class Stopwatch:
    """Seconds since the last lap; on a GPU, of work that is done and not only queued.

    >>> watch = Stopwatch("cpu")
    >>> watch.lap() >= 0
    True
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._last = self._now()

    def lap(self) -> float:
        """Seconds since the last call, or since the watch was made."""
        before, self._last = self._last, self._now()
        return self._last - before

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def interleaved(
    runs: Mapping[str, Callable[[], T]], rounds: int, *, progress: bool = False
) -> dict[str, list[T]]:
    """What every run returns in each of `rounds` rounds, one after the other in each.

    Every round starts with another run, so that none always follows the same neighbour's caches.
    `progress` shows a bar.

    >>> order = []
    >>> interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    {'a': [None, None], 'b': [None, None]}
    >>> order
    ['a', 'b', 'b', 'a']
    """
    names = list(runs)
    results: dict[str, list[T]] = {name: [] for name in names}
    with tqdm(total=rounds * len(names), desc="timing", disable=not progress) as bar:
        for round_ in range(rounds):
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                results[name].append(runs[name]())
                bar.update()
    return results
