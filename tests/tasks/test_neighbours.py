"""Captions without a model."""

import pytest

from edt_former.chem import read_molecules
from edt_former.tasks.neighbours import baselines, nearest


def test_a_molecule_is_nearest_to_itself_and_its_like():
    known = read_molecules(["c1ccccc1", "CCCCO", "CC(=O)O", "CCCCCO"])
    found = nearest(read_molecules(["CCCCO", "CC(=O)OC", "Cc1ccccc1", "OCCCCC"]), known)
    assert found.tolist() == [1, 2, 0, 3]


def test_baselines_give_captions_of_known_molecules():
    known = read_molecules(["c1ccccc1", "CCCCO"])
    molecules = read_molecules(["CCCO"] * 40)
    found = baselines(molecules, known, ["a ring", "a chain"])
    assert found["nearest neighbour"] == ["a chain"] * 40
    assert set(found["any caption"]) == {"a ring", "a chain"}
    assert found == baselines(molecules, known, ["a ring", "a chain"])
    assert found != baselines(molecules, known, ["a ring", "a chain"], seed=1)
    with pytest.raises(ValueError, match="known must hold at least one molecule"):
        nearest(molecules, [])
