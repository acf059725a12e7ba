"""Scores of predicted properties, by hand."""

import numpy as np
import pytest

from edt_former.tasks.properties import classification_scores, regression_scores

pytest.importorskip("sklearn", reason="scores of properties need scikit-learn")


def test_regression_by_hand():
    true = np.array([1.0, 2.0, np.nan, 4.0])
    found = regression_scores(true, np.array([1.0, 3.0, 9.0, 6.0]))
    assert found["mae"] == pytest.approx(1.0) and found["rows"] == 3
    assert found["rmse"] == pytest.approx((5 / 3) ** 0.5)
    assert found["spearman"] == pytest.approx(1.0)


def test_classification_by_hand():
    true = np.array([0.0, 0.0, 1.0, 1.0, np.nan])
    found = classification_scores(true, np.array([0.1, 0.6, 0.4, 0.9, 0.5]))
    assert found["auroc"] == pytest.approx(0.75) and found["rows"] == 4
    assert found["auprc"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert found["balanced_accuracy"] == pytest.approx(0.5)
    constant = classification_scores(np.zeros(3), np.array([0.1, 0.2, 0.3]))
    assert np.isnan(constant["auroc"]) and constant["rows"] == 3
