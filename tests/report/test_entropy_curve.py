from __future__ import annotations

from itertools import pairwise

import pytest
from matplotlib.colors import to_hex

from edt_former.report.entropy_curve import WIDEST, entropy_curve
from edt_former.report.patch_colours import PALETTE

ENTROPIES = [1.0, 0.5, 0.2, 1.5, 0.1]
IDS = [0, 0, 1, 2, 2]


def curve(smiles="CCOCN", entropies=ENTROPIES, ids=IDS, **options):
    figure = entropy_curve(smiles, entropies, ids, **options)
    figure.draw_without_rendering()
    return figure


def test_values_stand_over_the_symbols_of_their_atoms():
    (axes,) = curve().axes
    assert axes.lines[-1].get_xydata().tolist() == [[i, h] for i, h in enumerate(ENTROPIES)]
    assert [label.get_text() for label in axes.get_xticklabels()] == list("CCOCN")
    assert axes.get_xticks().tolist() == [0, 1, 2, 3, 4]


def test_borders_areas_and_numbers_are_those_of_the_patches():
    (axes,) = curve().axes
    borders = [line.get_xdata()[0] for line in axes.lines[:-1]]
    assert borders == [1.5, 2.5]
    areas = [
        (area.get_x(), area.get_width(), to_hex(area.get_facecolor())) for area in axes.patches
    ]
    colours = [colour.lower() for colour in PALETTE[:3]]
    assert areas == list(zip([-0.5, 1.5, 2.5], [2, 1, 2], colours, strict=True))
    assert [text.get_text() for text in axes.texts] == ["0", "1", "2"]
    assert [text.xy[0] for text in axes.texts] == [0.5, 2, 3.5]


def test_a_patch_in_two_runs_has_two_areas_of_one_colour():
    (axes,) = curve("CCCC", [1.0] * 4, [0, 1, 0, 0]).axes
    first, other, again = axes.patches
    assert first.get_facecolor() == again.get_facecolor() != other.get_facecolor()


def test_peaks_are_marked():
    (axes,) = curve(peaks=[3]).axes
    assert axes.lines[-1].get_xydata().tolist() == [[3, 1.5]]
    assert axes.lines[-1].get_label() == "opens a patch"
    assert [text.get_text() for text in curve(peaks=[3]).legends[0].texts] == ["opens a patch"]
    assert curve().legends == []


def test_the_threshold_is_drawn():
    figure = curve(threshold=1.8)
    level = figure.axes[0].lines[-1]
    assert set(level.get_ydata()) == {1.8} and level.get_linestyle() == "--"
    assert figure.axes[0].get_ylim()[1] > 1.8


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({}, "entropy (nats)"),
        ({"unit": "bits"}, "entropy (bits)"),
        ({"after": True}, "entropy after (nats)"),
    ],
)
def test_the_unit_is_named(options, label):
    assert curve(**options).axes[0].get_ylabel() == label


def test_one_atom_and_entropies_of_zero():
    (axes,) = curve("[Na+]", [0.0], [0]).axes
    assert axes.get_xlim() == (-0.5, 0.5) and axes.get_ylim() == (0, 1)


def test_the_picture_grows_with_the_molecule_up_to_a_limit():
    widths = [curve("C" * n, [1.0] * n, [0] * n).get_size_inches()[0] for n in (1, 5, 40, 80, 1000)]
    assert widths[0] == widths[1] < widths[2] < widths[3] < widths[4] == WIDEST


def test_atoms_that_are_too_many_for_symbols_are_counted():
    (axes,) = curve("C" * 1000, [1.0] * 1000, [0] * 1000).axes
    assert all(label.get_text() != "C" for label in axes.get_xticklabels())


@pytest.mark.parametrize("count", [5, 33, 80], ids=lambda n: f"{n} atoms")
def test_no_labels_overlap(count):
    figure = curve("C" * count, [1.0] * count, list(range(count)), peaks=[1], threshold=0.5)
    (axes,) = figure.axes
    for texts in (axes.get_xticklabels(), axes.texts):
        boxes = [text.get_window_extent() for text in texts]
        assert all(a.x1 <= b.x0 for a, b in pairwise(boxes))
        assert all(figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1 for box in boxes)
    assert axes.yaxis.label.get_window_extent().y1 <= figure.bbox.y1


def test_it_can_be_written_without_a_window(tmp_path):
    for name in ("curve.svg", "curve.png"):
        curve().savefig(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000


def test_what_is_wrong_is_told():
    with pytest.raises(ValueError, match="entropies must be one per atom, 5, got 2"):
        curve(entropies=[1.0, 2.0])
    with pytest.raises(ValueError, match="ids must be one per atom, 5, got 1"):
        curve(ids=[0])
    with pytest.raises(ValueError, match="cannot be read: unclosed ring"):
        curve("C1CC")
