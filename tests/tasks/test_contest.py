"""The contest on measured properties, at a size that teaches nothing."""

from __future__ import annotations

import csv
import gzip
import math
import os
from pathlib import Path

import numpy as np
import pytest

from edt_former.language.frozen import read_json
from edt_former.tasks import contest
from edt_former.tasks.contest import CONTENDERS, PROPERTIES, auroc, interval, read_split

RINGS = ["C1CC1", "c1ccccc1", "C1CCNC1", "c1ccncc1", "C1CCCCC1", "C1OC1"]
CHAINS = ["C" * n + end for n in range(1, 9) for end in ("C", "N", "O")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """ESOL and BBBP of 60 molecules, one of them none."""
    folder = tmp_path_factory.mktemp("moleculenet")
    molecules = [*CHAINS, *(ring + "C" * n for n in range(6) for ring in RINGS), "C1CC"]
    for of in PROPERTIES.values():
        with gzip.open(folder / of.file, "wt", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["smiles", of.column])
            writer.writerows((m, len(m) % 2 if not of.numeric else -len(m) / 3) for m in molecules)
    return folder


def test_the_split_keeps_scaffolds_together(data):
    from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles

    split = read_split(data, PROPERTIES["ESOL"])
    assert split.left_out == 1
    sizes = {name: len(molecules) for name, molecules in split.molecules.items()}
    assert sum(sizes.values()) == 60 and sizes["train"] <= 48 and sizes["test"] >= 6
    scaffolds = [
        {MurckoScaffoldSmiles(molecule.smiles) for molecule in molecules}
        for molecules in split.molecules.values()
    ]
    assert not (scaffolds[0] & scaffolds[1] or scaffolds[0] & scaffolds[2])
    for name, molecules in split.molecules.items():
        assert len(molecules) == len(split.values[name])


def test_of_scaffolds_as_frequent_the_last_comes_first(tmp_path):
    of = PROPERTIES["ESOL"]
    molecules = [
        "C1CC1",
        "C1CCC1",
        "c1ccccc1",
        "C1CCCC1",
        *["C1CCCCC1" + "C" * n for n in range(6)],
    ]
    with gzip.open(tmp_path / of.file, "wt", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["smiles", of.column])
        writer.writerows((m, 0.0) for m in molecules)
    split = read_split(tmp_path, of)
    train, valid, test = ([m.smiles for m in part] for part in split.molecules.values())
    assert train[-2:] == ["C1CCCC1", "c1ccccc1"] and len(train) == 8
    assert (valid, test) == (["C1CCC1"], ["C1CC1"])


def test_both_classes_are_tested():
    if "EDT_SHARED" not in os.environ:
        pytest.skip("EDT_SHARED (folder of the MoleculeNet files) is not set")
    split = read_split(Path(os.environ["EDT_SHARED"], "data", "moleculenet"), PROPERTIES["BBBP"])
    assert split.values["test"].mean() == pytest.approx(107 / 204)


def test_one_class_has_no_interval():
    with pytest.raises(ValueError, match=r"true must have both classes, got 4 of \[1\.\]"):
        interval(PROPERTIES["BBBP"], np.zeros((1, 4)), np.ones(4))


def test_auroc_agrees_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="the eval extra has it")
    rng = np.random.default_rng(0)
    true, scores = rng.integers(2, size=50), rng.integers(6, size=50).astype(float)
    assert math.isclose(auroc(scores, true), metrics.roc_auc_score(true, scores))
    assert math.isnan(auroc(scores, np.ones(50)))


def test_intervals_hold_the_value_and_shrink():
    rng = np.random.default_rng(0)
    told = PROPERTIES["ESOL"]
    widths = []
    for count in (30, 3000):
        true = rng.normal(size=count)
        said = true + rng.normal(size=(2, count))
        value, low, high = interval(told, said, true)
        assert low < value < high and abs(value - 0.8) < 0.3
        widths.append(high - low)
    assert widths[1] < widths[0] / 5


def test_every_contender_trains_answers_and_resumes(data, tmp_path, monkeypatch):
    pytest.importorskip("peft", reason="ordinary LoRA needs peft")
    monkeypatch.setattr(contest, "FORM_STEPS", 2)
    monkeypatch.setattr(contest, "BATCH", 4)
    monkeypatch.setattr(contest, "PLAIN", 3)
    told = []
    options = {"seeds": [0], "steps": 2, "progress": told.append}
    found = contest.run_contest(data, tmp_path, **options)
    assert read_json(tmp_path / "contest.json") == found
    assert told[0] == "ESOL, MoRA, seed 0" and len(told) == 8
    for name, one in found["properties"].items():
        assert list(one["contenders"]) == [contest.CONSTANT, *CONTENDERS]
        for who, row in one["contenders"].items():
            assert row["low"] <= row["value"] <= row["high"]
            if who == contest.CONSTANT:
                continue
            (run,) = row["runs"]
            assert row["trained"] > 0
            assert run["forgetting"]["equal"] is (who != contest.LORA), (name, who)
    values = {n: one["contenders"][contest.MORA]["value"] for n, one in found["properties"].items()}
    again = contest.run_contest(data, tmp_path, **options)
    for name, value in values.items():
        assert again["properties"][name]["contenders"][contest.MORA]["value"] == value
