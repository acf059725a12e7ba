"""Measures of patches over a few molecules, counted by hand."""

import pytest
import torch

from edt_former.report.patch_stats import patch_stats
from edt_former.tokens import NextAtomPredictor, PatchOptions

NODE = {"node": PatchOptions(entropy_source="node")}


@pytest.fixture
def predictor():
    torch.manual_seed(0)
    return NextAtomPredictor({"layers": 1, "width": 8}).eval()


def test_measures(predictor):
    cuts = NODE | {"brics": PatchOptions(sources=("brics",))}
    rows = [("", "OCCO"), ("", "C1CC"), ("", "CC"), ("", "C1CC")]
    stats = patch_stats(rows, predictor, cuts, chunk=2)
    assert stats.molecules == 2 and stats.atoms == 6
    assert stats.reasons == {"unclosed ring": 2}
    # OCCO is cut into O, CCO; CC stays whole; neither has a bond that BRICS cuts.
    measures = stats.cuts["node"].measures()
    assert measures["patches"] == 1.5 and measures["median"] == 1.5 and measures["most"] == 2
    assert measures["atoms per patch"] == 2 and measures["of one atom"] == pytest.approx(1 / 3)
    assert measures["connected"] == 1
    assert measures["ARI with brics"] == 0.5 and measures["NMI with brics"] == 0.5
    assert stats.cuts["brics"].measures()["ARI with brics"] == 1
    assert stats.to_json()["not read"] == {"unclosed ring": 2}


def test_pieces_are_counted(predictor):
    apart = {"shuffled": PatchOptions(rule="threshold", threshold=9.0, control="shuffled")}
    stats = patch_stats([("", "[Na+].[Cl-]"), ("", "CCO")], predictor, apart)
    assert stats.cuts["shuffled"].measures()["connected"] == 0.5


def test_thresholds_are_in_their_unit(predictor):
    """ln 2 nats, the entropy of an atom of OCCO's middle, are 1 bit."""
    cuts = {"node": PatchOptions(entropy_source="node", rule="threshold", threshold=0.95)}
    counts = [
        patch_stats([("", "OCCO")], predictor, cuts, unit=unit).cuts["node"].counts
        for unit in ("nats", "bits")
    ]
    assert counts == [[1], [3]]


def test_no_molecule(predictor):
    with pytest.raises(ValueError, match="no valid molecule in 1 rows: unclosed ring"):
        patch_stats([("", "C1CC")], predictor)
    with pytest.raises(ValueError, match="there is no row"):
        patch_stats([], predictor)
