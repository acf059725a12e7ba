"""What the files of a run say together: goals, failures, pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench import pictures
from bench.contest import Entry, Outcome, Ratio, Work


def read(folder: Path, names: Sequence[str]) -> list[dict]:
    """The sections that have written something, in that order."""
    files = [folder / f"{name}.json" for name in names]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def goals(sections: Sequence[Mapping]) -> list[dict]:
    """Of all sections."""
    return [goal for section in sections for goal in section["goals"]]


def failures(sections: Sequence[Mapping]) -> list[str]:
    """What went wrong, a line each."""
    return [
        f"{section['section']}: {entry['what']}: {entry['failed']}"
        for section in sections
        for entry in section["entries"]
        if "failed" in entry
    ]


def lines(sections: Sequence[Mapping], folder: Path) -> Iterator[str]:
    """For the terminal."""
    yield "\n== goals"
    judged = goals(sections)
    for goal in judged:
        verdict = "met" if goal["met"] else "MISSED"
        ratio = goal["ratio"]
        figure = "" if ratio is None else f"{ratio:.2f} of {goal['least']:.3g}"
        verdict = "not judged" if ratio is None else verdict
        yield f"  {verdict}: {goal['name']}: {figure}{goal['note']}"
    wrong = failures(sections)
    missed = sum(not goal["met"] for goal in judged)
    yield f"\n{len(wrong)} failures, {missed} missed goals, files and pictures in {folder}"
    yield from (f"  {line}" for line in wrong)


def draw(sections: Sequence[Mapping], folder: Path) -> None:
    """A picture per op that was timed against others."""
    by_op: dict[str, list[Outcome]] = {}
    for section in sections:
        for entry in section["entries"]:
            if "outcome" in entry:
                outcome = _outcome(entry["outcome"])
                by_op.setdefault(outcome.op, []).append(outcome)
    for op, outcomes in by_op.items():
        pictures.contests(op, outcomes, folder / f"{op}.png", foot=foot(sections[0]))


def foot(head: Mapping) -> str:
    """Date, device, driver and versions of a file, in a line."""
    device = head["device"]
    if isinstance(device, Mapping):
        device = f"{device['name']}, driver {device['driver']}, CUDA {head['cuda']}"
    versions = (f"{name} {number}" for name, number in head["versions"].items() if number)
    return f"{head['date']}, {device}; {', '.join(versions)}"


def _outcome(kept: Mapping) -> Outcome:
    entries = {
        name: Entry(**{**entry, "ratio": entry["ratio"] and Ratio(**entry["ratio"])})
        for name, entry in kept["entries"].items()
    }
    return Outcome(**{**kept, "entries": entries, "work": Work(**kept["work"])})
