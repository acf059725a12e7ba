"""The rows of every batch of a run: known beforehand, alike on all processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class Batches(Sampler[list[int]]):
    """The batches of one process over all steps of a run, one pass through this sampler.

    Every epoch visits the rows in an order of its own, drawn from (seed, epoch), and leaves out
    what does not fill a step. Nothing else is drawn, so a run that resumes at a step skips to it.

    The rows of a step are dealt by their costs. With accumulation they are sorted first, so that a
    pass has rows of similar length; within a pass the largest row goes to the first process, the
    next ones to the others, and back again, so that all have as many rows and about as many tokens.

    Args:
        costs: of every row, its tokens or a number like it; None deals rows as they come.
        rows: how many there are.
        batch_size: rows of a process and a pass.
        accumulation: passes of a step.
        steps: of the run.
        seed: of the order.
        rank: which process this is.
        ranks: how many there are.

    Raises:
        ValueError: a step has more rows than there are.

    Example:
        >>> costs, options = [9, 1, 1, 9], {"batch_size": 2, "steps": 1, "ranks": 2}
        >>> both = [Batches(costs, 4, rank=rank, **options) for rank in (0, 1)]
        >>> [sum(costs[row] for row in next(iter(batches))) for batches in both]
        [10, 10]
    """

    def __init__(
        self,
        costs: Sequence[int] | np.ndarray | None,
        rows: int,
        *,
        batch_size: int,
        steps: int,
        accumulation: int = 1,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.per_step = batch_size * accumulation * ranks
        if self.per_step > rows:
            raise ValueError(
                f"batch_size * accumulation * processes must be at most the {rows} rows there "
                f"are, got {self.per_step}"
            )
        self.costs = None if costs is None else np.asarray(costs)
        self.rows, self.batch_size, self.accumulation = rows, batch_size, accumulation
        self.steps, self.seed, self.rank, self.ranks = steps, seed, rank, ranks

    @property
    def steps_per_epoch(self) -> int:
        """Steps that visit every row once, but for those that do not fill a step."""
        return self.rows // self.per_step

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        order = np.zeros(0, dtype=np.int64)
        for step in range(self.steps):
            epoch, within = divmod(step, self.steps_per_epoch)
            if within == 0:
                order = np.random.default_rng((self.seed, epoch)).permutation(self.rows)
            chosen = order[within * self.per_step : (within + 1) * self.per_step]
            for passed in self._passes(chosen, step):
                yield self._dealt(passed)[self.rank].tolist()

    def _passes(self, chosen: np.ndarray, step: int) -> np.ndarray:
        """The rows of every pass [accumulation, batch_size * ranks], in an order that is drawn."""
        if self.costs is None or self.accumulation == 1:
            return chosen.reshape(self.accumulation, -1)
        passes = self._descending(chosen).reshape(self.accumulation, -1)
        return passes[np.random.default_rng((self.seed, step, 1)).permutation(self.accumulation)]

    def _dealt(self, passed: np.ndarray) -> np.ndarray:
        """The rows of every process [ranks, batch_size]."""
        if self.costs is None:
            return passed.reshape(self.ranks, -1)
        rounds = self._descending(passed).reshape(self.batch_size, self.ranks)
        rounds[1::2] = rounds[1::2, ::-1].copy()
        return rounds.T

    def _descending(self, rows: np.ndarray) -> np.ndarray:
        return rows[np.argsort(-self.costs[rows], kind="stable")]
