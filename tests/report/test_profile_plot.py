"""The picture says what was measured, and no text covers another."""

from __future__ import annotations

from itertools import combinations

import pytest

from edt_former.report.peak import Peak
from edt_former.report.pipeline import STAGES
from edt_former.report.profile import Measured, Profile
from edt_former.report.profile_plot import STAGE_COLOURS, profile_figure
from edt_former.report.workload import Workload

pytest.importorskip("matplotlib")
NAMES = (
    "EDT-Former, ragged",
    "static Q-Former, 32 queries",
    "static Q-Former, 39 queries",
    "EDT-Former, padded to longest",
    "EDT-Former, padded to 96",
)


def measured(i: int, peak: Peak | None) -> Measured:
    seconds = {stage: [0.1 * (i + 1), 0.2 * (i + 1)] for stage in STAGES}
    return Measured(NAMES[i], 39.0, 71.0, 80.0 + 10 * i, seconds, peak)


def a_profile(peaks: list[Peak | None], size: str = "published") -> Profile:
    contenders = [measured(i, peak) for i, peak in enumerate(peaks)]
    machine = {"threads": {"torch": 64}}
    return Profile(Workload(size=size), 12, 20.0, 2, contenders, [], machine, {"cpu_isa": None})


PEAKS = [Peak(10**9 * (i + 1), 10**8 * (i + 1), "VmHWM") for i in range(5)]


def texts(axes):
    return [text.get_text().strip() for text in axes.texts]


def test_every_figure_is_told():
    stages, speed, prompts, memory = profile_figure(a_profile(PEAKS)).axes
    assert [t.get_text() for t in stages.get_yticklabels()] == list(NAMES)
    assert texts(stages) == ["1.00x", *[f"{i}.00x [{i}.00, {i}.00]" for i in range(2, 6)]]
    assert [t.get_text() for t in stages.get_legend().get_texts()] == list(STAGES)
    # 12 molecules of 39 tokens in 4 stages of 0.15 s.
    assert texts(speed)[0] == "780" and texts(prompts) == ["71"] * 5
    assert texts(memory) == ["100", "200", "300", "400", "500"]


def test_memory_that_was_not_measured():
    assert len(profile_figure(a_profile([None] * 5)).axes) == 3
    memory = profile_figure(a_profile([PEAKS[0], None])).axes[3]
    assert texts(memory) == ["100", "not measured"]


def test_stages_have_colours_of_their_own():
    assert len({*STAGE_COLOURS}) == len(STAGES)


@pytest.mark.parametrize("size", ["published", "tiny"])
@pytest.mark.parametrize("peaks", [PEAKS, [None] * 5], ids=["memory", "no memory"])
def test_no_text_covers_another_or_leaves_the_picture(peaks, size):
    figure = profile_figure(a_profile(peaks, size))
    figure.draw_without_rendering()
    shown = []
    for axes in figure.axes:
        shown += [*axes.texts, axes.xaxis.label, axes.title, axes._left_title]
        ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        shown += [label for place, label in ticks if place <= axes.get_xlim()[1]]
        shown += axes.get_yticklabels()
        if axes.get_legend():
            shown += axes.get_legend().get_texts()
    boxes = [(t.get_text(), t.get_window_extent()) for t in shown if t.get_text()]
    for (one, box), (other, beside) in combinations(boxes, 2):
        assert not box.overlaps(beside), (one, other)
    for text, box in boxes:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text
