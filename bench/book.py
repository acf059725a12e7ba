"""What a run of the benches recorded: outcomes of contests, goals, costs of calls."""

from __future__ import annotations

from dataclasses import dataclass, field

from bench.contest import Outcome
from bench.machine import Machine

CALL_GOALS = {"plain": 6.0, "recorded": 12.0}
"""Microseconds of a call on a tiny input, without and with gradients recorded."""


@dataclass(frozen=True)
class Goal:
    """A ratio and the least it should be; None where it could not be judged, `note` says why."""

    test: str
    name: str
    ratio: float | None
    least: float
    note: str = ""

    @property
    def met(self) -> bool:
        """False for a miss; a goal that was not judged is none."""
        return self.ratio is None or self.ratio >= self.least

    def __str__(self) -> str:
        return f"{self.name} is {self.ratio:.2f}, the goal is {self.least:g}"


@dataclass(frozen=True)
class Call:
    """Microseconds of one call on a tiny input, without and with gradients recorded."""

    name: str
    plain: float
    recorded: float | None


@dataclass
class Book:
    """Everything that a run recorded."""

    machine: Machine | None = None
    outcomes: list[Outcome] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def ops(self) -> dict[str, list[Outcome]]:
        """Outcomes by op."""
        found: dict[str, list[Outcome]] = {}
        for outcome in self.outcomes:
            found.setdefault(outcome.op, []).append(outcome)
        return found
