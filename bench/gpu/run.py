"""A run: sections with budgets of their own, which write what they find as they find it."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.book import Goal
from bench.contest import Outcome
from bench.gpu.clock import Clock


class CheckError(AssertionError):
    """Something is computed wrongly."""


@dataclass
class Section:
    """One part of a run.

    Attributes:
        name: of the file that it writes.
        deadline: when its time is over, by `time.monotonic`.
        entries: what was found, in order: dictionaries for JSON, with `what` and, where it went
            wrong or was left out, `failed` or `skipped` with the reason.
    """

    name: str
    folder: Path
    head: dict[str, object]
    deadline: float
    entries: list[dict[str, object]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def add(self, what: str, **found: object) -> None:
        """Keep an entry, and write the file anew."""
        self.entries.append({"what": what, **found})
        self.write(complete=False)
        shown = {k: v for k, v in found.items() if isinstance(v, str | int | float | bool)}
        said = ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()
        )
        sys.stdout.write(f"  {what}: {said}\n")
        sys.stdout.flush()

    def write(self, *, complete: bool) -> None:
        """The file, whole at any time."""
        content = {
            "section": self.name,
            **self.head,
            "seconds": round(time.monotonic() - self.started, 2),
            "complete": complete,
            "entries": self.entries,
        }
        part = self.folder / f"{self.name}.json.part"
        part.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(part, self.folder / f"{self.name}.json")

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """What fails inside is an entry, and the section goes on."""
        try:
            yield
        except Exception as error:
            self.add(what, failed=told(error), traceback=traceback.format_exc())

    def each(self, items: dict[str, Callable[[], dict[str, object]]]) -> None:
        """An entry of what every item finds, as far as there is time."""
        for what, find in items.items():
            if self.left <= 0:
                self.add(what, skipped="the section's time is over")
                continue
            with self.attempt(what):
                self.add(what, **find())


@dataclass
class Run:
    """Everything that sections share.

    Attributes:
        tiny: everything small and once, to try the script out.
        ceilings: bytes and floating point operations per second, measured on this device: "copy"
            and the names of dtypes.
    """

    device: torch.device
    folder: Path
    clock: Clock
    tiny: bool
    deadline: float
    head: dict[str, object] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        """Whether figures are of a GPU."""
        return self.device.type == "cuda"

    def section(self, name: str, work: Callable[[Run, Section], None], seconds: float) -> None:
        """Do `work` for `seconds` at most, as far as it looks at its time."""
        deadline = min(time.monotonic() + seconds, self.deadline)
        section = Section(name, self.folder, self.head, deadline)
        self.sections.append(section)
        sys.stdout.write(f"\n== {name}, {max(0.0, section.left):.0f} s\n")
        section.write(complete=False)
        with section.attempt(name):
            work(self, section)
        section.write(complete=True)

    def goal(self, name: str, ratio: float | None, least: float, note: str = "") -> None:
        """Hold a ratio against what it should be at least; nothing is judged on a CPU."""
        if not self.on_gpu:
            ratio, note = None, "this is no GPU"
        self.goals.append(Goal("bench.gpu", name, ratio, least, note))

    def failures(self) -> list[str]:
        """What went wrong, a line each."""
        return [
            f"{section.name}: {entry['what']}: {entry['failed']}"
            for section in self.sections
            for entry in section.entries
            if "failed" in entry
        ]


def told(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")[:300]
