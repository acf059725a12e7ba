"""Measured speeds as bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edt_former.report.patch_colours import PALETTE
from edt_former.report.speed import Speed

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def speed_plot(speeds: Sequence[Speed]) -> Figure:
    """A bar per contender: molecules per second, and its time over that of the first.

    Raises:
        ValueError: there is no contender.

    Example:
        >>> ours = Speed("ragged", seconds=0.5, molecules=24.0, queries=900.0, ratio=1.0)
        >>> padded = Speed("padded", seconds=1.0, molecules=12.0, queries=450.0, ratio=2.1)
        >>> [text.get_text() for text in speed_plot([ours, padded]).axes[0].texts]
        ['24.0', '12.0  (2.10)']
    """
    from matplotlib.figure import Figure

    if not speeds:
        raise ValueError("speeds must hold at least one, got none")
    first, *others = speeds
    labels = [f"{first.molecules:.1f}"]
    labels += [f"{s.molecules:.1f}  ({s.ratio:.2f})" for s in others]
    figure = Figure(figsize=(7.5, 0.8 + 0.45 * len(speeds)), layout="constrained")
    axes = figure.add_subplot()
    colours = [PALETTE[0], *["#CCCCCC"] * len(others)]
    bars = axes.barh(
        [s.name for s in speeds], [s.molecules for s in speeds], color=colours, edgecolor="black"
    )
    axes.bar_label(bars, labels, padding=4)
    axes.invert_yaxis()
    # Labels stand beside the bars.
    axes.set_xlim(0, 1.4 * max(s.molecules for s in speeds))
    axes.set_xlabel(f"molecules per second  (in brackets: time over {first.name})")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
