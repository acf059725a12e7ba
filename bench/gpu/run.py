"""A run: sections with budgets of their own, which write what they find as they find it.

A GPU that a kernel has crashed serves a process no more. So every item is written down before it
begins and after it is done, and a process that comes after a crash goes on behind that item.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from bench.book import Goal
from bench.gpu.clock import Clock

CRASHED = 3
"""Exit status of a process whose GPU gives nothing but errors any more."""


class CheckError(AssertionError):
    """Something is computed wrongly."""


@dataclass
class Run:
    """Everything that sections share.

    Attributes:
        tiny: everything small and once, to try the script out.
        deadline: of all sections, by `time.time`.
        head: what stands at the top of every file.
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
    sections: list[Section] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        """Whether figures are of a GPU."""
        return self.device.type == "cuda"

    @property
    def backend(self) -> str:
        """Of torch.compile: one that writes no code where everything is small."""
        return "aot_eager" if self.tiny else "inductor"

    def section(self, name: str, work: Callable[[Run, Section], None], seconds: float) -> None:
        """Do `work` for `seconds` at most, as far as it looks at its time."""
        section = Section(self, name, min(time.time() + seconds, self.deadline))
        if section.complete:
            return
        self.sections.append(section)
        sys.stdout.write(f"\n== {name}, {max(0.0, section.left):.0f} s\n")
        with section.attempt(name):
            work(self, section)
        section.complete = True
        section.write()


class Section:
    """One part of a run, and the file that it writes.

    Attributes:
        deadline: when its time is over, by `time.time`.
        entries: what was found, in order: dictionaries for JSON, with `what` and, where it went
            wrong or was left out, `failed` or `skipped` with the reason.
        goals: what was held against a goal.
        done: items that need not be done again.
    """

    def __init__(self, run: Run, name: str, deadline: float) -> None:
        self.run, self.name, self.deadline = run, name, deadline
        self.entries: list[dict[str, object]] = []
        self.goals: list[dict[str, object]] = []
        self.done: list[str] = []
        self.running: str | None = None
        self.seconds, self.complete = 0.0, False
        self._resume()
        self._started = time.time() - self.seconds

    @property
    def file(self) -> Path:
        """Whole at any time."""
        return self.run.folder / f"{self.name}.json"

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.time()

    def add(self, what: str, **found: object) -> None:
        """Keep an entry."""
        self.entries.append({"what": what, **found})
        self.write()
        said = (
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in found.items()
            if isinstance(value, str | int | float) and name != "traceback"
        )
        sys.stdout.write(f"  {what}: {', '.join(said)}\n")
        sys.stdout.flush()

    def goal(self, name: str, ratio: float | None, least: float, note: str = "") -> None:
        """Hold a ratio against what it should be at least; nothing is judged on a CPU."""
        if not self.run.on_gpu:
            ratio, note = None, "this is no GPU"
        goal = Goal(self.name, name, ratio, least, note)
        self.goals.append({**asdict(goal), "met": goal.met})
        self.write()

    def each(self, items: dict[str, Callable[[], dict[str, object]]]) -> None:
        """An entry of what every item finds."""
        self.all({what: lambda w=what, f=find: self.add(w, **f()) for what, find in items.items()})

    def all(self, items: dict[str, Callable[[], None]]) -> None:
        """Do every item, as far as there is time; one that fails is an entry."""
        for what, do in items.items():
            if what in self.done:
                continue
            if self.left <= 0:
                self.add(what, skipped="the section's time is over")
                continue
            self.running = what
            self.write()
            with self.attempt(what):
                do()
            self.running = None
            self.done.append(what)
            if self.run.on_gpu:
                torch.cuda.empty_cache()

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """What fails inside is an entry; SystemExit where the GPU fails for good."""
        try:
            yield
        except Exception as error:
            self.add(what, failed=told(error), traceback=traceback.format_exc())
            if self.run.on_gpu and not _gpu_lives():
                sys.stdout.write("  the GPU serves this process no more\n")
                sys.stdout.flush()
                os._exit(CRASHED)  # what else is there to free would only fail

    def write(self) -> None:
        """The file."""
        self.seconds = time.time() - self._started
        content = {
            "section": self.name,
            **self.run.head,
            "seconds": round(self.seconds, 2),
            "complete": self.complete,
            "running": self.running,
            "done": self.done,
            "goals": self.goals,
            "entries": self.entries,
        }
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(part, self.file)

    def _resume(self) -> None:
        """What a process before this one has found."""
        if not self.file.exists():
            return
        before = json.loads(self.file.read_text())
        self.entries, self.goals, self.done = before["entries"], before["goals"], before["done"]
        self.seconds, self.complete = before["seconds"], before["complete"]
        if before["running"] is not None:
            crashed = before["running"]
            self.done.append(crashed)
            if not any(e["what"] == crashed and "failed" in e for e in self.entries):
                self.entries.append({"what": crashed, "failed": "the process ended here"})


def _gpu_lives() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def told(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")[:300]
