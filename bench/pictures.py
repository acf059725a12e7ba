"""A picture per op: bars of the contenders' times, what they are to ours, and the ceiling.

Contests over the size of molecules are drawn as curves of speed, below the roof of the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from math import floor, log10
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.book import CALL_GOALS, Call
from bench.contest import Outcome

# Of the palette of Okabe and Ito, which colour-blind readers can tell apart.
OURS, THEIRS, CEILING, RECORDED = "#0072B2", "#BBBBBB", "#D55E00", "#E69F00"
PEERS = ("#E69F00", "#009E73", "#CC79A7", "#56B4E9")
MARKS = "s^vD"
SIZE = "atoms per molecule"
MEMORY = "MB of a training step, "
"""Before the name of a contender, in what an outcome has beside its times."""
COLUMNS = 4
CUT = 12
"""A bar more than this many times ours is cut, and says so."""


def contests(op: str, outcomes: Sequence[Outcome], file: Path, *, foot: str = "") -> None:
    """A panel per contest: a row per case; or, of one kind only, as many cases as fit in a row.

    `foot` stands below them.
    """
    cases = list(dict.fromkeys(o.case for o in outcomes))
    kinds = sorted({(o.dtype != "fp32", o.dtype, o.mode) for o in outcomes})
    places = {(o.case, o.dtype, o.mode): o for o in outcomes}
    grid = [[places.get((case, dtype, mode)) for _, dtype, mode in kinds] for case in cases]
    if len(kinds) == 1:
        grid = [list(outcomes[n : n + COLUMNS]) for n in range(0, len(outcomes), COLUMNS)]
    columns = max(map(len, grid))
    bars = [max(_drawn(outcome) for outcome in row if outcome) for row in grid]
    figure = Figure(
        figsize=(4.6 * columns + 0.2, sum(0.27 * n + 0.85 for n in bars) + 0.9),
        layout="constrained",
    )
    axes = figure.subplots(len(grid), columns, squeeze=False, height_ratios=bars)
    for panels, row in zip(axes, grid, strict=True):
        for ax, outcome in zip_longest(panels, row):
            if outcome is None:
                ax.axis("off")
            else:
                _panel(ax, outcome)
    figure.suptitle(
        f"{op}\nin brackets: times the time of edt_kernels; line: ceiling of this machine",
        fontsize=11,
    )
    figure.supxlabel(foot, fontsize=8)
    figure.savefig(file, dpi=110)


def over_size(op: str, outcomes: Sequence[Outcome], file: Path) -> None:
    """A panel per dtype and mode: GFLOP/s of every contender over the outcomes' `SIZE`."""
    kinds = list(dict.fromkeys((o.dtype, o.mode) for o in outcomes))
    figure = Figure(figsize=(4.8 * len(kinds) + 0.4, 4.2), layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for ax, kind in zip(panels, kinds, strict=True):
        rows = sorted(
            (o for o in outcomes if (o.dtype, o.mode) == kind), key=lambda o: o.extra[SIZE]
        )
        _curves(ax, rows)
        ax.set_title(", ".join(kind), fontsize=10, loc="left")
    panels[0].set_ylabel("GFLOP/s over pairs that exist")
    panels[-1].legend(fontsize=8, frameon=False, loc="lower right")
    figure.suptitle(f"{op} of molecules", fontsize=11)
    figure.savefig(file, dpi=110)


def costs_over_size(op: str, outcomes: Sequence[Outcome], file: Path) -> None:
    """Time of every contender, and where it is known its memory, over the outcomes' `SIZE`."""
    rows = sorted(outcomes, key=lambda o: o.extra[SIZE])
    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    time, memory = figure.subplots(1, 2)
    styles = [(OURS, "o"), *zip(PEERS, MARKS, strict=True)]
    for name, (colour, mark) in zip(rows[0].entries, styles, strict=False):
        ran = [o for o in rows if o.entries[name].seconds]
        milliseconds = [1e3 * o.entries[name].median for o in ran]
        time.plot([o.extra[SIZE] for o in ran], milliseconds, f"-{mark}", color=colour, label=name)
        known = [o for o in rows if MEMORY + name in o.extra]
        megabytes = [o.extra[MEMORY + name] for o in known]
        memory.plot([o.extra[SIZE] for o in known], megabytes, f"-{mark}", color=colour)
    time.set_ylabel("ms, forward")
    memory.set_ylabel("MB, forward and backward")
    time.legend(fontsize=8, frameon=False)
    for ax in (time, memory):
        ax.set_xscale("log", base=2)
        ax.set_ylim(bottom=0)
        sizes = [o.extra[SIZE] for o in rows]
        ax.set_xticks(sizes, [f"{size:.0f}" for size in sizes], fontsize=8)
        ax.minorticks_off()
        ax.set_xlabel(SIZE)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{op} of molecules, as many atoms in all", fontsize=11)
    figure.savefig(file, dpi=110)


def _curves(ax: Axes, outcomes: Sequence[Outcome]) -> None:
    sizes = [o.extra[SIZE] for o in outcomes]
    roof = [1e-9 * o.work.flops / o.ceiling for o in outcomes]
    ax.plot(sizes, roof, "--", color=CEILING, label="roof: bytes or FLOP", linewidth=1.6)
    styles = [(OURS, "o", 2.2), *((c, m, 1.3) for c, m in zip(PEERS, MARKS, strict=True))]
    for name, (colour, mark, width) in zip(outcomes[0].entries, styles, strict=False):
        ran = [o for o in outcomes if o.entries[name].seconds]
        speeds = [1e-9 * o.work.flops / o.entries[name].median for o in ran]
        at = [o.extra[SIZE] for o in ran]
        ax.plot(at, speeds, f"-{mark}", color=colour, label=name, linewidth=width)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(sizes, [f"{size:.0f}" for size in sizes], fontsize=8)
    ax.minorticks_off()
    ax.set_xlabel(SIZE)
    ax.grid(True, color="#EEEEEE")
    ax.spines[["top", "right"]].set_visible(False)


def calls(calls: Sequence[Call], file: Path) -> None:
    """Microseconds per call, without and with gradients recorded."""
    figure = Figure(figsize=(7, 0.42 * len(calls) + 1.2), layout="constrained")
    ax = figure.subplots()
    for y, call in enumerate(calls):
        for value, shift, colour in ((call.plain, -0.2, OURS), (call.recorded, 0.2, RECORDED)):
            if value is not None:
                ax.barh(y + shift, value, 0.36, color=colour)
                _label(ax, f"{value:.1f}", value, y + shift)
    ax.barh(0, 0, color=OURS, label="without gradient")
    ax.barh(0, 0, color=RECORDED, label="with gradient recorded")
    for name, colour in (("plain", OURS), ("recorded", RECORDED)):
        ax.axvline(CALL_GOALS[name], color=colour, linewidth=1.2, linestyle="--", zorder=0)
    ax.set_yticks(range(len(calls)), [call.name for call in calls], fontsize=9)
    ax.invert_yaxis()
    ax.margins(x=0.1)
    ax.set_xlabel("microseconds per call on a tiny input; dashed: the goals")
    ax.legend(fontsize=8, frameon=False, loc="lower right")
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)


def _drawn(outcome: Outcome) -> int:
    return sum(bool(e.seconds) for e in outcome.entries.values())


def _panel(ax: Axes, outcome: Outcome) -> None:
    entries = [e for e in outcome.entries.values() if e.seconds]
    ours = entries[0].median
    slowest = max(e.median for e in entries)
    unit, scale = ("ms", 1e3) if slowest >= 1e-3 else ("us", 1e6)
    limit = min(slowest, CUT * ours)
    for y, entry in enumerate(entries):
        width = min(entry.median, limit)
        hatch = "///" if entry.aside else None
        colour = OURS if y == 0 else THEIRS
        ax.barh(y, scale * width, 0.72, color=colour, hatch=hatch, edgecolor="white")
        label = _figure(scale * entry.median)
        if entry.ratio is not None:
            label += f" ({_figure(entry.ratio.value)}x)" + ("*" if entry.note else "")
        _label(ax, f"≫ {label}" if entry.median > limit else label, scale * width, y)
    ax.axvline(scale * outcome.ceiling, color=CEILING, linewidth=1.6)
    ax.set_yticks(range(len(entries)), [e.name for e in entries], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(0, scale * max(1.42 * limit, 1.05 * outcome.ceiling))
    ax.tick_params(axis="x", labelsize=8)
    ax.set_xlabel(unit, fontsize=8, labelpad=1)
    ax.set_title(outcome.title, fontsize=9, loc="left")
    ax.spines[["top", "right"]].set_visible(False)


def _label(ax: Axes, text: str, x: float, y: float) -> None:
    """Behind the end of a bar, on white, so that no line runs through it."""
    white = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    place = {"xytext": (3, 0), "textcoords": "offset points"}
    ax.annotate(text, (x, y), va="center", fontsize=8, bbox=white, **place)


def _figure(value: float) -> str:
    """Three digits, no exponent."""
    return f"{value:.{max(0, 2 - floor(log10(value)))}f}" if value < 100 else f"{value:.0f}"
