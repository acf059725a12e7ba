"""A contest: contenders that compute the same thing are checked first, then timed side by side.

Rounds are interleaved (A, B, C, A, B, C, ...) and speeds are compared within a round, so that a
busy neighbour on the machine slows all contenders and changes their ratios least.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from bench.machine import Machine, Neighbours

OURS = "edt_kernels"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float64: 1e-10}
"""Largest error of an output or gradient, relative to its largest entry."""

SAMPLE = 2e-3  # seconds: a shorter call is repeated until a round has lasted that long
LEAST_ROUNDS, MOST_ROUNDS = 7, 25
DEAR = 0.15  # seconds: a contender whose rounds last longer takes part in as few as DEAR_ROUNDS
DEAR_ROUNDS = 3
BRIEF = 0.02  # seconds: shorter calls are preceded by one that is not timed
DRAWS = 2000  # of the bootstrap

Outputs = Tensor | tuple[Tensor, ...]


class WrongResultError(AssertionError):
    """A contender does not compute what the contest is about."""


@dataclass(frozen=True)
class Layout:
    """How a contender holds a packed tensor: `into` its form and `back`."""

    into: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


PACKED = Layout(lambda x: x, lambda x: x)


@dataclass(frozen=True)
class Contender:
    """One way to compute the task.

    Attributes:
        name: what the tables call it.
        run: returns the outputs; this is what is timed, with the gradients of `leaves`.
        truth: the outputs and then the gradients in float64, packed.
        leaves: tensors whose gradients are computed.
        upstream: gradients of the outputs, None for an output that has none; () for no backward.
        packed: brings outputs and gradients into the layout of `truth`.
        checked: compared with the truth in the place of `run`, where the result of `run` is random.
        optional: where it cannot run, or is wrong, it is left out, with the reason, and the contest
            goes on without it.
        aside: a cost shown beside the others; it has no ratio.
        caveat: why no goal is judged against it.
    """

    name: str
    run: Callable[[], Outputs]
    truth: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...] = ()
    upstream: tuple[Tensor | None, ...] = ()
    packed: Callable[[Sequence[Tensor]], Sequence[Tensor]] = tuple
    checked: Callable[[], Outputs] | None = None
    optional: bool = False
    aside: bool = False
    caveat: str = ""

    def step(self, run: Callable[[], Outputs] | None = None) -> tuple[Tensor, ...]:
        """Outputs and gradients, in this contender's layout."""
        outputs = (run or self.run)()
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        if not self.upstream:
            return outputs
        pairs = [(o, g) for o, g in zip(outputs, self.upstream, strict=True) if g is not None]
        ends, grads = zip(*pairs, strict=True)
        return *outputs, *torch.autograd.grad(ends, self.leaves, grads)


@dataclass(frozen=True)
class Task:
    """What the contenders of a contest compute: packed inputs and, in float64, the truth.

    Attributes:
        inputs: packed, in the dtype of the contest.
        upstream: gradients of the outputs, packed; () for the forward alone.
        truth: outputs, then gradients of the inputs.
        outputs: how many of `truth` are outputs.
    """

    inputs: tuple[Tensor, ...]
    upstream: tuple[Tensor | None, ...]
    truth: tuple[Tensor, ...]
    outputs: int

    @classmethod
    def of(
        cls, formula: Callable[..., Outputs], inputs: Sequence[Tensor], *, backward: bool
    ) -> Task:
        """The truth is `formula` of the inputs in float64, with gradients by autograd."""
        device = inputs[0].device
        generator = torch.Generator(device).manual_seed(7)
        wide = [x.detach().double().requires_grad_(backward) for x in inputs]
        outputs = formula(*wide)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        upstream, grads = [], ()
        if backward:
            upstream = [
                torch.randn(o.shape, generator=generator, device=device).to(inputs[0].dtype)
                if o.is_floating_point()
                else None
                for o in outputs
            ]
            pairs = [(o, g) for o, g in zip(outputs, upstream, strict=True) if g is not None]
            ends, ups = zip(*pairs, strict=True)
            grads = torch.autograd.grad(ends, wide, [g.double() for g in ups])
        truth = tuple(x.detach() for x in (*outputs, *grads))
        return cls(tuple(inputs), tuple(upstream), truth, len(outputs))

    def contender(
        self,
        name: str,
        run: Callable[..., Outputs],
        *,
        inputs: Sequence[Layout] | None = None,
        outputs: Sequence[Layout] | None = None,
        checked: Callable[..., Outputs] | None = None,
        **options: object,
    ) -> Contender:
        """`run(*inputs)` as a contender that is handed its own layouts for nothing."""
        inputs = inputs or [PACKED] * len(self.inputs)
        outputs = outputs or [PACKED] * self.outputs
        leaves = tuple(
            layout.into(x.detach()).detach().requires_grad_(bool(self.upstream))
            for layout, x in zip(inputs, self.inputs, strict=True)
        )
        upstream = tuple(
            None if g is None else layout.into(g)
            for layout, g in zip(outputs, self.upstream, strict=False)
        )
        layouts = [*outputs, *inputs] if self.upstream else outputs

        def packed(found: Sequence[Tensor]) -> list[Tensor]:
            return [layout.back(x.detach()) for layout, x in zip(layouts, found, strict=True)]

        return Contender(
            name,
            lambda: run(*leaves),
            self.truth,
            leaves,
            upstream,
            packed,
            None if checked is None else lambda: checked(*leaves),
            **options,
        )

    def work(self, *, flops: float = 0.0, reread: bool = True) -> Work:
        """Bytes of inputs, outputs and gradients, each once; the inputs again if the backward
        needs them (`reread`). Offsets and indices are not counted."""
        size = self.inputs[0].element_size()
        read = sum(x.nbytes for x in self.inputs)
        written = sum(
            x.numel() * (size if x.is_floating_point() else x.element_size())
            for x in self.truth[: self.outputs]
        )
        total = read + written
        if self.upstream:
            total += sum(g.nbytes for g in self.upstream if g is not None) + read * (1 + reread)
        return Work(total, flops)


@dataclass(frozen=True)
class Work:
    """What must be moved and multiplied at least."""

    bytes: float
    flops: float = 0.0


@dataclass(frozen=True)
class Ratio:
    """Median over rounds of a contender's seconds over ours, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Entry:
    """A contender's part in an outcome: seconds by round, [] where it was skipped."""

    name: str
    seconds: list[float]
    error: float | None = None
    ratio: Ratio | None = None
    aside: bool = False
    note: str = ""

    @property
    def median(self) -> float:
        """Seconds, median over rounds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Outcome:
    """What a contest found. `ceiling` is in seconds; `others` is the share of other processes."""

    op: str
    case: str
    dtype: str
    mode: str
    entries: Mapping[str, Entry]
    work: Work
    ceiling: float
    bound: str
    others: float | None
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Case, dtype and mode."""
        return f"{self.case}, {self.dtype}, {self.mode}"


def play(
    op: str,
    case: str,
    contenders: Sequence[Contender],
    *,
    dtype: str,
    mode: str,
    work: Work,
    machine: Machine,
    tolerance: float,
    budget: float = 0.6,
) -> Outcome:
    """Check every contender against the truth, then time all of them in interleaved rounds.

    The first contender is ours. The ceiling is the longer of two times: a copy that reads and
    writes as many bytes as the task, timed in the same rounds, and the task's floating point
    operations at the rate of this machine's matrix product.

    Args:
        budget: seconds of timed rounds, about.

    Raises:
        WrongResultError: ours, or a contender that is not optional, is wrong; nothing is timed.
    """
    errors, left_out = {}, {}
    for contender in contenders:
        try:
            errors[contender.name] = check(contender, tolerance)
        except WrongResultError as wrong:
            if not contender.optional:
                raise WrongResultError(f"{op}, {case}, {dtype}, {mode}: {wrong}") from None
            left_out[contender.name] = f"refused: {wrong}"
        except Exception as reason:
            if not contender.optional:
                raise
            left_out[contender.name] = f"skipped: {_first_line(reason)}"
    ready = [c for c in contenders if c.name not in left_out]
    source = torch.zeros(max(1, int(work.bytes) // 8))
    target = torch.zeros_like(source)

    neighbours = Neighbours()
    steps: dict[str, Callable[[], object]] = {c.name: c.step for c in ready}
    # All threads win where there is much to copy, one where it is over before the others wake.
    copies: dict[str, Callable[[], object]] = {
        "copy by all threads": lambda: target.copy_(source),
        "copy by one thread": lambda: np.copyto(target.numpy(), source.numpy()),
    }
    seconds = interleave({**steps, **copies}, budget=budget)
    others = neighbours.share()

    copy = min(statistics.median(seconds[name]) for name in copies)
    compute = work.flops / machine.products[dtype]
    entries = {
        c.name: Entry(
            c.name,
            seconds.get(c.name, []),
            errors.get(c.name),
            None
            if c is contenders[0] or c.aside or c.name in left_out
            else paired_ratio(seconds[c.name], seconds[contenders[0].name]),
            c.aside,
            left_out.get(c.name, c.caveat),
        )
        for c in contenders
    }
    bound = "bytes" if copy >= compute else "FLOP"
    return Outcome(op, case, dtype, mode, entries, work, max(copy, compute), bound, others)


def check(contender: Contender, tolerance: float) -> float:
    """The contender's largest relative error; WrongResultError where it exceeds `tolerance`."""
    found = contender.packed(contender.step(contender.checked))
    outputs = len(contender.truth) - (len(contender.leaves) if contender.upstream else 0)
    worst = 0.0
    for i, (x, truth) in enumerate(zip(found, contender.truth, strict=True)):
        which = f"output {i}" if i < outputs else f"gradient {i - outputs}"
        if x.shape != truth.shape:
            raise WrongResultError(
                f"{contender.name} has shape {tuple(x.shape)} in {which}, "
                f"the truth {tuple(truth.shape)}"
            )
        error = relative_error(x, truth)
        allowed = tolerance if truth.is_floating_point() else 0.0
        if not error <= allowed:
            raise WrongResultError(
                f"{contender.name} is off by {error:.3g} in {which}, allowed is {allowed:.3g}"
            )
        worst = max(worst, error)
    return worst


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Largest difference over the truth's largest entry; of integers, 1 where any differs."""
    if not truth.is_floating_point():
        return float(not torch.equal(found.long(), truth.long()))
    if truth.numel() == 0:
        return 0.0
    difference = float((found.to(truth.dtype) - truth).abs().max())
    largest = float(truth.abs().max())
    return difference / largest if largest else difference


def interleave(
    steps: Mapping[str, Callable[[], object]],
    *,
    budget: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds per call of every step, by round.

    A brief step is called once more before it is timed: all find the caches as they leave them
    themselves, not as the one before them did.

    The first round repeats a short call until `SAMPLE` seconds have passed and so decides how often
    the next ones call it. Every step gets an equal share of the budget: from `LEAST_ROUNDS` (or
    `DEAR_ROUNDS`) to `MOST_ROUNDS` rounds, the first ones, so that the n-th entry of all lists is
    of the same round.
    """
    calls, rounds = {}, {}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for name, step in steps.items():
            calls[name], once = _first_round(step, clock)
            seconds[name].append(once)
            round_ = calls[name] * once
            least = DEAR_ROUNDS if round_ > DEAR else LEAST_ROUNDS
            rounds[name] = min(max(int(budget / len(steps) / round_), least), MOST_ROUNDS)
        for n in range(1, max(rounds.values())):
            for name, step in steps.items():
                if n < rounds[name]:
                    if seconds[name][0] < BRIEF:
                        step()
                    start = clock()
                    for _ in range(calls[name]):
                        step()
                    seconds[name].append((clock() - start) / calls[name])
    finally:
        if collecting:
            gc.enable()
    return seconds


def paired_ratio(theirs: Sequence[float], ours: Sequence[float]) -> Ratio:
    """Of the rounds that both took part in."""
    rounds = min(len(theirs), len(ours))
    ratios = np.asarray(theirs[:rounds]) / np.asarray(ours[:rounds])
    draws = np.random.default_rng(0).choice(ratios, (DRAWS, rounds))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def compiled(
    formula: Callable[..., Outputs], *, backend: str = "inductor"
) -> Callable[..., Outputs]:
    """`formula` under torch.compile for the shapes it is called with."""
    torch._dynamo.reset()
    return torch.compile(formula, fullgraph=True, dynamic=False, backend=backend)


def _first_round(step: Callable[[], object], clock: Callable[[], float]) -> tuple[int, float]:
    """How many calls take `SAMPLE` seconds, and the seconds of one."""
    calls, start = 0, clock()
    while True:
        step()
        calls += 1
        elapsed = clock() - start
        if elapsed >= SAMPLE:
            return calls, elapsed / calls


def _first_line(reason: Exception) -> str:
    lines = str(reason).strip().splitlines()
    return f"{type(reason).__name__}: {lines[0] if lines else ''}".rstrip(": ")[:160]
