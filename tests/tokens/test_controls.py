"""Controls keep the number or the sizes of patches, and depend on seed and molecule alone."""

import numpy as np
import pytest

from edt_former.tokens import control_patches

IDS = np.array([0, 0, 1, 1, 1, 2, 3, 3, 3, 3])


def draw(control, seed=0, molecule=b"a", ids=IDS):
    return control_patches(ids, control, seed=seed, molecule=molecule)


def test_random_patches_are_as_many_runs():
    found = [draw("random", seed) for seed in range(200)]
    for ids in found:
        assert ids[0] == 0 and ids[-1] == 3 and set(np.diff(ids)) <= {0, 1}
    opened = np.stack([np.flatnonzero(np.diff(ids)) for ids in found]).ravel()
    share = np.bincount(opened, minlength=9) / 200
    assert np.abs(share - 3 / 9).max() < 0.12  # every place is as likely


def test_shuffled_patches_have_the_same_sizes():
    found = [draw("shuffled", seed) for seed in range(200)]
    assert all(np.bincount(ids).tolist() == [2, 3, 1, 4] for ids in found)
    share = np.mean([ids == 3 for ids in found], 0)
    assert np.abs(share - 0.4).max() < 0.12


@pytest.mark.parametrize("control", ["random", "shuffled"])
def test_chance_is_the_seed_and_the_molecule(control):
    assert np.array_equal(draw(control), draw(control))
    others = [draw(control, seed=1), draw(control, molecule=b"b")]
    assert not any(np.array_equal(draw(control), other) for other in others)


@pytest.mark.parametrize("control", ["random", "shuffled"])
@pytest.mark.parametrize("ids", [[], [0], [0, 1], [1, 0, 0]])
def test_small_molecules(control, ids):
    found = draw(control, ids=np.array(ids, dtype=np.int64))
    assert sorted(set(found)) == sorted(set(ids)) and len(found) == len(ids)
