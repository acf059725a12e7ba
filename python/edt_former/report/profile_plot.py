"""The picture of a profile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edt_former.report.pipeline import STAGES
from edt_former.report.timing import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from edt_former.report.profile import Profile

STAGE_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#0072B2", "#D55E00")
"""Of Okabe and Ito, distinct to every kind of colour vision."""
OURS, THEIRS = "#0072B2", "#BBBBBB"


def profile_figure(profile: Profile) -> Figure:
    """Time by stage, query tokens per second, prompt length and memory of every contender.

    Returns:
        A figure that belongs to no window: `figure.savefig(path)`.
    """
    from matplotlib.figure import Figure

    panels = [_throughput, _prompts]
    if any(m.peak is not None for m in profile.measured):
        panels.append(_memory)
    figure = Figure(figsize=(11, 6.6), layout="constrained")
    grid = figure.add_gridspec(2, len(panels), height_ratios=(1.25, 1))
    _stages(figure.add_subplot(grid[0, :]), profile)
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(grid[1, i])
        panel(axes, profile)
        if i > 0:
            axes.set_yticklabels([])
    return figure


def _stages(axes: Axes, profile: Profile) -> None:
    per_molecule = 1000 / profile.molecules
    left = [0.0] * len(profile.measured)
    for stage, colour in zip(STAGES, STAGE_COLOURS, strict=True):
        widths = [per_molecule * Spread.of(m.seconds[stage]).median for m in profile.measured]
        axes.barh(
            range(len(left)),
            widths,
            left=left,
            color=colour,
            label=stage,
            edgecolor="white",
            lw=0.5,
        )
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, measured in enumerate(profile.measured):
        ratio = profile.ratio(measured)
        text = f" {ratio.median:.2f}x" + (f" [{ratio.low:.2f}, {ratio.high:.2f}]" if i else "")
        axes.text(left[i], i, text, va="center")
    _name(axes, profile)
    axes.set_xlim(0, 1.25 * max(left))
    axes.set_xlabel("ms per molecule; time over EDT-Former's in the same round [lowest, highest]")
    axes.set_title(_title(profile), loc="left", fontsize=10, pad=32)
    axes.legend(
        ncols=len(STAGES),
        loc="lower left",
        bbox_to_anchor=(0, 1),
        frameon=False,
        fontsize=9,
        borderaxespad=0.3,
        columnspacing=1.2,
        handlelength=1.2,
    )


def _throughput(axes: Axes, profile: Profile) -> None:
    values = [profile.query_tokens_per_second(m) for m in profile.measured]
    _bars(axes, profile, values, "query tokens/s, SMILES to tokens")


def _prompts(axes: Axes, profile: Profile) -> None:
    values = [m.prompt_tokens for m in profile.measured]
    computed = [m.computed_tokens for m in profile.measured]
    padding = [a - b for a, b in zip(computed, values, strict=True)]
    axes.barh(
        range(len(values)), padding, left=values, color="white", edgecolor="gray", hatch="///"
    )
    _bars(axes, profile, values, "prompt tokens (hatched: batch padding)", ends=computed)


def _memory(axes: Axes, profile: Profile) -> None:
    values = [None if m.peak is None else m.peak.working / 1e6 for m in profile.measured]
    _bars(axes, profile, values, "working memory, MB")


def _bars(
    axes: Axes,
    profile: Profile,
    values: list[float | None],
    label: str,
    *,
    ends: list[float] | None = None,
) -> None:
    """A bar per contender, its value at its end, or at `ends`."""
    known = [value or 0.0 for value in values]
    ends = ends or known
    colours = [OURS, *[THEIRS] * (len(values) - 1)]
    axes.barh(range(len(values)), known, color=colours)
    for i, value in enumerate(values):
        axes.text(ends[i], i, " not measured" if value is None else f" {value:,.0f}", va="center")
    axes.set_xlim(0, 1.25 * max(ends))
    axes.set_xlabel(label)
    _name(axes, profile)


def _name(axes: Axes, profile: Profile) -> None:
    axes.set_yticks(range(len(profile.measured)), [m.name for m in profile.measured])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def _title(profile: Profile) -> str:
    of = profile.workload
    published = f"12 layers x 768, language model {Path(of.llm).name}"
    models = "shipped models" if of.size == "tiny" else published
    return (
        f"From SMILES to an answer of {of.new_tokens} tokens: {models}, {of.dtype}, {of.device}, "
        f"torch threads: {profile.machine['threads']['torch']}"
    )
