"""Contests on a GPU: contenders are checked, then timed in interleaved rounds, as on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch

from bench.contest import (
    TOLERANCE,
    Contender,
    Entry,
    Outcome,
    Work,
    WrongResultError,
    check,
    paired_ratio,
)
from bench.gpu.clock import Step
from bench.gpu.run import Run, Section, told

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
FORWARD, BACKWARD, GRAPH = "forward", "backward", "forward in a graph"
ROUNDS = 5


def play(
    run: Run,
    section: Section,
    op: str,
    case: str,
    contenders: Sequence[Contender],
    *,
    dtype: torch.dtype,
    modes: dict[str, Work],
) -> dict[str, Outcome]:
    """Times of every mode; a peer that cannot run or is wrong is left out, with the reason.

    Args:
        run: with its ceilings.
        section: keeps the outcomes.
        op: what is computed.
        case: on which workload.
        contenders: ours first.
        dtype: of the contest.
        modes: of `FORWARD`, `BACKWARD` (of a forward that is done) and `GRAPH`, what must be moved
            and computed. In a graph ours alone is timed: a capture that fails could spoil what
            comes after it.

    Raises:
        WrongResultError: ours is wrong; nothing is timed.
    """
    errors, left_out = {}, {}
    for contender in contenders:
        try:
            errors[contender.name] = check(contender, TOLERANCE[dtype])
        except Exception as reason:
            if contender is contenders[0]:
                raise
            kind = "refused" if isinstance(reason, WrongResultError) else "skipped"
            left_out[contender.name] = f"{kind}: {told(reason)}"
    ready = [c for c in contenders if c.name not in left_out]
    found = {}
    for mode, work in modes.items():
        title = f"{op}, {case}, {NAMES[dtype]}, {mode}"
        if section.left <= 0:
            section.add(title, skipped="the section's time is over")
            continue
        reasons = dict(left_out)
        seconds = _rounds(run, ready[:1] if mode == GRAPH else ready, mode, reasons)
        entries = _entries(contenders, seconds, errors, reasons)
        outcome = _outcome(run, (op, case, NAMES[dtype], mode), work, entries)
        found[mode] = outcome
        section.add(title, **_said(outcome), outcome=asdict(outcome))
    return found


def _rounds(
    run: Run, contenders: Sequence[Contender], mode: str, left_out: dict[str, str]
) -> dict[str, list[float]]:
    """Seconds of every contender by round; a peer that cannot be timed so joins `left_out`."""
    timer = run.clock.replayed if mode == GRAPH else run.clock.launched
    seconds: dict[str, list[float]] = {c.name: [] for c in contenders}
    steps: dict[str, Step] = {}
    for n in range(1 if run.tiny else ROUNDS):
        for contender in contenders:
            name = contender.name
            if name in left_out:
                continue
            try:
                if n == 0:
                    steps[name] = _step(contender, mode)
                seconds[name].append(timer(steps[name]))
            except Exception as reason:
                if contender is contenders[0]:
                    raise
                left_out[name] = f"skipped: {told(reason)}"
    return seconds


def _step(contender: Contender, mode: str) -> Step:
    """What is timed."""
    if mode == BACKWARD:
        outputs = contender.run()
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        pairs = [(o, g) for o, g in zip(outputs, contender.upstream, strict=True) if g is not None]
        ends, grads = zip(*pairs, strict=True)
        return lambda: torch.autograd.grad(ends, contender.leaves, grads, retain_graph=True)

    def forward() -> object:
        with torch.no_grad():
            return contender.run()

    return forward


def _entries(
    contenders: Sequence[Contender],
    seconds: dict[str, list[float]],
    errors: dict[str, float],
    left_out: dict[str, str],
) -> dict[str, Entry]:
    ours = contenders[0].name
    entries = {}
    for contender in contenders:
        name = contender.name
        own = [] if name in left_out else seconds.get(name, [])
        ratio = paired_ratio(own, seconds[ours]) if own and name != ours else None
        note = left_out.get(name, contender.caveat)
        entries[name] = Entry(name, own, errors.get(name), ratio, contender.aside, note)
    return entries


def _outcome(
    run: Run, names: tuple[str, str, str, str], work: Work, entries: dict[str, Entry]
) -> Outcome:
    copy = work.bytes / run.ceilings["copy"]
    compute = work.flops / run.ceilings[names[2]]
    bound, ceiling = ("bytes", copy) if copy >= compute else ("FLOP", compute)
    return Outcome(*names, entries, work, ceiling, bound, others=None)


def _ours(outcome: Outcome) -> float:
    """Seconds."""
    return next(iter(outcome.entries.values())).median


def _said(outcome: Outcome) -> dict[str, object]:
    """For the line in the terminal."""
    said: dict[str, object] = {
        "microseconds": 1e6 * _ours(outcome),
        "of the ceiling": outcome.ceiling / _ours(outcome),
    }
    for peer in list(outcome.entries.values())[1:]:
        if peer.ratio or peer.note:
            said[peer.name] = f"{peer.ratio.value:.2f}x" if peer.ratio else peer.note
    return said


def goal_of_time(section: Section, outcome: Outcome | None, microseconds: float) -> None:
    """Ours is to take so long at most."""
    if outcome is not None:
        name = f"{outcome.op}, {outcome.title}: at most {microseconds:g} us"
        section.goal(name, microseconds / (1e6 * _ours(outcome)), 1.0)


def goal_of_ratio(section: Section, outcome: Outcome | None, peer: str, least: float) -> None:
    """Ours is to be so many times as fast as a peer."""
    if outcome is not None:
        name = f"{outcome.op}, {outcome.title}: times as fast as {peer}"
        entry = outcome.entries[peer]
        section.goal(name, entry.ratio.value if entry.ratio else None, least, entry.note)


def goal_of_ceiling(section: Section, outcome: Outcome | None, least: float) -> None:
    """Ours is to reach that share of the copy bandwidth, or of the product's rate."""
    if outcome is not None:
        name = f"{outcome.op}, {outcome.title}: share of the ceiling ({outcome.bound})"
        section.goal(name, outcome.ceiling / _ours(outcome), least)
