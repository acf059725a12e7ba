"""What a run of the benches says: the summary in the terminal, and its JSON files and pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import edt_kernels
from bench import pictures
from bench.book import Book, Call, Goal
from bench.contest import OURS, Entry, Outcome, Ratio
from bench.machine import BUSY, Machine, load_average


def extra_info(outcome: Outcome, machine: Machine) -> dict[str, object]:
    """What pytest-benchmark keeps beside our time."""
    ratios = {e.name: asdict(e.ratio) for e in outcome.entries.values() if e.ratio}
    return {
        "times our time": ratios,
        "bytes": outcome.work.bytes,
        "flops": outcome.work.flops,
        "ceiling_seconds": outcome.ceiling,
        "ceiling": outcome.bound,
        "others": outcome.others,
        "load": load_average(),
        "threads": machine.threads,
        "isa": machine.isa,
    }


def lines(book: Book) -> Iterator[tuple[str, str]]:
    """The summary, line by line, each with a colour or ""."""
    yield "", ""
    if book.machine is not None:
        yield book.machine.line(), ""
    yield from _busy(book)
    for op, outcomes in book.ops().items():
        yield "", ""
        yield from ((line, "") for line in _table(op, outcomes))
    if book.calls:
        yield "", ""
        yield from ((line, "") for line in _calls(book.calls))
    if book.goals:
        yield "", ""
        yield from _goals(book.goals)


def save(book: Book, folder: Path) -> str:
    """Write `<op>.json` and `<op>.png`, `calls` and `goals`; the line that says so."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = None if book.machine is None else asdict(book.machine)
    for op, outcomes in book.ops().items():
        _write(folder / f"{op}.json", {"machine": machine, "contests": list(map(asdict, outcomes))})
    if book.calls:
        calls = {"machine": machine, "calls": list(map(asdict, book.calls))}
        _write(folder / "calls.json", calls)
    if book.goals:
        _write(folder / "goals.json", {"machine": machine, "goals": list(map(asdict, book.goals))})
    for op, outcomes in book.ops().items():
        sizes = all(pictures.SIZE in outcome.extra for outcome in outcomes)
        memory = any(key.startswith(pictures.MEMORY) for o in outcomes for key in o.extra)
        curves = pictures.costs_over_size if memory else pictures.over_size
        draw = curves if sizes else pictures.contests
        draw(op, outcomes, folder / f"{op}.png")
    if book.calls:
        pictures.calls(book.calls, folder / "calls.png")
    return f"figures and pictures: {folder}"


def _write(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n")


def _busy(book: Book) -> Iterator[tuple[str, str]]:
    shares = [o.others for o in book.outcomes if o.others is not None]
    disturbed = [share for share in shares if share > BUSY]
    if disturbed:
        yield (
            f"WARNING: the machine was busy. Other processes took up to {max(shares):.0%} of its "
            f"cores, and more than {BUSY:.0%} in {len(disturbed)} of {len(shares)} contests, which "
            "are marked !: ratios shrink then, and times mean little. OMP_WAIT_POLICY=PASSIVE "
            "softens it.",
            "red",
        )
    elif shares:
        yield f"Other processes took at most {max(shares):.0%} of the cores.", ""


def _table(op: str, outcomes: Sequence[Outcome]) -> Iterator[str]:
    peers: dict[str, bool] = {}
    for outcome in outcomes:
        for entry in list(outcome.entries.values())[1:]:
            peers[entry.name] = entry.aside
    backend = edt_kernels.build_info()["ops"].get(op, "")
    served = f" ({backend})" if backend else ""
    yield f"{op}{served}: ms of {OURS}, and how many times that of the others"
    heads = [f"{name}, ms" if aside else name for name, aside in peers.items()]
    widths = [max(len(head), 10) for head in heads]
    first = max(len(o.title) for o in outcomes) + 2
    head = "  ".join(h.rjust(w) for h, w in zip(heads, widths, strict=True))
    yield f"{'':{first}}  {'ms':>9}  of ceiling    error  {head}"
    notes: dict[tuple[str, str], list[str]] = {}
    for outcome in outcomes:
        entries = list(outcome.entries.values())
        ours, named = entries[0], {e.name: e for e in entries[1:]}
        cells = []
        for name, width in zip(peers, widths, strict=True):
            cells.append(_cell(named.get(name)).rjust(width))
            if name in named and named[name].note:
                kind = named[name].note.split(":")[0]
                notes.setdefault((name, kind), []).append(named[name].note)
        mark = "!" if (outcome.others or 0) > BUSY else " "
        line = (
            f"{outcome.title:{first}}{mark} {1e3 * ours.median:9.3f}  "
            f"{outcome.ceiling / ours.median:6.0%} {outcome.bound:<5}{ours.error:8.0e}  "
            f"{'  '.join(cells)}"
        )
        yield line.rstrip()
        for name, value in outcome.extra.items():
            yield f"    {name}: {value:,.0f}"
    for (name, _), said in notes.items():
        yield f"* {name}: {said[0]}" + (f" (so in {len(said)} contests)" if said[1:] else "")


def _cell(entry: Entry | None) -> str:
    if entry is None:
        return ""
    if not entry.seconds:
        return "-*"
    if entry.aside:
        return f"{1e3 * entry.median:.3f}"
    return _ratio(entry.ratio) + ("*" if entry.note else "")


def _ratio(ratio: Ratio) -> str:
    digits = 2 if ratio.value < 10 else 1 if ratio.value < 100 else 0
    return f"{ratio.value:.{digits}f}±{ratio.half:.{digits}f}"


def _calls(calls: Sequence[Call]) -> Iterator[str]:
    yield "microseconds per call on a tiny input, without and with gradients recorded"
    first = max(len(call.name) for call in calls) + 2
    for call in calls:
        recorded = "" if call.recorded is None else f"{call.recorded:8.1f}"
        yield f"{call.name:{first}}{call.plain:8.1f}{recorded}"


def _goals(goals: Sequence[Goal]) -> Iterator[tuple[str, str]]:
    judged = [goal for goal in goals if goal.ratio is not None]
    met = sum(goal.met for goal in judged)
    yield f"goals: {met} of {len(judged)} met, {len(goals) - len(judged)} not judged", ""
    names = [goal.name for goal in goals]
    labels = [g.name if names.count(g.name) == 1 else f"{g.name}, {g.test}" for g in goals]
    first = max(map(len, labels)) + 2
    for label, goal in zip(labels, goals, strict=True):
        if goal.ratio is None:
            yield f"  {label:{first}} not judged, {goal.note}", "yellow"
        else:
            verdict, colour = ("met", "green") if goal.met else ("MISSED", "red")
            figures = f"{goal.ratio:8.2f} of {goal.least:<6g}{verdict:<7}{goal.note}"
            yield f"  {label:{first}}{figures}", colour
