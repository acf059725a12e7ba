from __future__ import annotations

import pytest

from edt_former.report.speed import Speed
from edt_former.report.speed_plot import speed_plot

SPEEDS = [
    Speed("ours", seconds=0.5, molecules=24.0, queries=900.0, ratio=1.0),
    Speed("static Q-Former, 32 queries", seconds=0.4, molecules=30.0, queries=960.0, ratio=0.8),
    Speed("padded", seconds=1.0, molecules=12.0, queries=450.0, ratio=2.1),
]


def test_bars_are_as_long_as_the_speeds_in_their_order_from_the_top():
    (axes,) = speed_plot(SPEEDS).axes
    assert [bar.get_width() for bar in axes.patches] == [24.0, 30.0, 12.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [s.name for s in SPEEDS]
    assert axes.yaxis_inverted()
    assert [text.get_text() for text in axes.texts] == ["24.0", "30.0  (0.80)", "12.0  (2.10)"]


def test_no_label_is_cut_off():
    figure = speed_plot(SPEEDS)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    for text in [*axes.texts, *axes.get_yticklabels(), axes.xaxis.label]:
        box = text.get_window_extent()
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1


def test_no_speeds_no_plot():
    with pytest.raises(ValueError, match="speeds must hold at least one"):
        speed_plot([])
