from __future__ import annotations

import re

import torch

import edt_kernels
from edt_former.chem import read_molecule
from edt_former.report.answers import AnsweredRow
from edt_former.report.patches import PatchedMolecule, PatchedRow
from edt_former.report.sections import (
    accuracy_section,
    answers_section,
    circumstances_section,
    connectors_section,
    patches_section,
    speed_card,
    speed_section,
)
from edt_former.report.speed import Speed
from edt_former.tasks.accuracy import Accuracy
from edt_former.tasks.questions import QUESTION_TYPES


def test_answers_stand_beside_the_truth_or_the_reason():
    rows = [
        AnsweredRow(
            *("a", "CC(=O)N", "", 4, 38, 6),
            answers={"rings": "1", "amide": "yes"},
            truth={"rings": "0", "amide": "Yes"},
        ),
        AnsweredRow("b" * 40, "C1CC", "r" * 70),
    ]
    section = answers_section(rows, ("rings", "amide"), "text")
    ((header, lines),) = section.tables
    assert header == ["molecule", "atoms", "patches", "tokens (not 96)", "rings", "amide"]
    assert lines[0] == ["a", 4, 6, 38, "1 ✗ 0", "yes ✓"]
    assert lines[1] == ["b" * 30, "-", "-", "-", "r" * 60, ""]


def test_the_best_baseline_is_none_of_the_model():
    def by_kind(value):
        return {kind: Accuracy(value, 0, 1) for kind in (*QUESTION_TYPES, "macro")}

    results = {"model": by_kind(0.9), "a": by_kind(0.2), "b": by_kind(0.3)}
    section = accuracy_section(results, count=3, listed=9)
    assert section.text.startswith("Right answers on 3 of 9 held-out drugs, 23 questions each")
    (_, who), (_, kinds) = section.tables
    assert [(name, str(value)[:5]) for name, value in who] == [
        *(("model", "0.900"), ("a", "0.200"), ("b", "0.300"))
    ]
    assert [kind for kind, _, _ in kinds] == list(QUESTION_TYPES)
    assert {(value.value, best) for _, value, best in kinds} == {(0.9, "0.300")}


def test_speeds():
    speeds = [Speed("ours", 0.5, 24.0, 900.4, 1.0), Speed("padded", 1.0, 12.0, 450.0, 2.1)]
    ((_, lines),) = speed_section(speeds, molecules=12).tables
    assert lines == [
        ("ours", "24.0", "900", "500", "1.00"),
        ("padded", "12.0", "450", "1000", "2.10"),
    ]
    (picture,) = speed_card(speeds).pictures
    assert picture.alt == "ours: 24.0 molecules per second; padded: 12.0 molecules per second"


def test_pictures_are_told_in_words_and_rows_without_one_are_left_out():
    molecule = read_molecule("CCO")
    patched = PatchedMolecule(molecule, [0, 0, 1], [0.5, 1.0, 1.5], [None, 2], None, "bits", False)
    rows = [PatchedRow("ethanol", "OCC", patched=patched), PatchedRow("x", "C1", "unclosed ring")]
    (card,) = patches_section(rows).cards
    assert (card.title, card.text) == ("ethanol", "CCO")
    assert [picture.alt for picture in card.pictures] == [
        "ethanol, 2 patches: 0: C2, 2 atoms; 1: O, 1 atom",
        "Entropies of its atoms in bits: 0.50, 1.00, 1.50",
    ]
    assert all("</svg>" in picture.svg for picture in card.pictures)


def test_circumstances(monkeypatch):
    ((_, lines),) = circumstances_section([("seed", 3)]).tables
    facts = dict(lines)
    assert facts["seed"] == 3 and facts["threads"] == torch.get_num_threads()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", facts["date"])
    assert facts["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    info = edt_kernels.build_info()
    assert facts["kernels"] == (f"native, {info['cpu_isa']}" if info["native"] else info["reason"])


def test_connectors_are_ranked_with_what_they_read():
    def by_kind(value):
        return {kind: Accuracy(value, value - 0.1, 1) for kind in (*QUESTION_TYPES, "macro")}

    results = {"llamo": by_kind(0.5), "edt_former": by_kind(0.75), "qformer_32": by_kind(0.25)}
    reads = {"llamo": "2d", "edt_former": "3d", "qformer_32": "2d"}
    section = connectors_section(results, reads, asked="3 drugs")
    ((header, lines),) = section.tables
    assert "right answers on 3 drugs" in section.text and header[2] == "right"
    assert [line[0] for line in lines] == ["edt_former", "llamo", "qformer_32"]
    assert lines[0][1] == "3d" and str(lines[0][2]) == "0.750 [0.650, 1.000]"
