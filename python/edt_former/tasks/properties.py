"""How well numbers and classes are predicted, beside what a constant prediction gives."""

from __future__ import annotations

import numpy as np

from edt_former.extras import need

PURPOSE = "scores of properties"


def regression_scores(true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """MAE, RMSE and Spearman's correlation of one target; rows without a value are left out.

    The correlation is NaN where one value is predicted for all.

    Raises:
        ImportError: scikit-learn, which brings scipy, is not installed.

    >>> regression_scores(np.array([1.0, 2.0, np.nan]), np.array([1.5, 2.5, 0.0]))["mae"]
    0.5
    """
    stats = need("scipy.stats", extra="eval", purpose=PURPOSE)
    known = ~np.isnan(true)
    true, predicted = true[known], predicted[known]
    error, constant = predicted - true, len(np.unique(predicted)) < 2
    return {
        "mae": float(np.abs(error).mean()),
        "rmse": float(np.sqrt((error**2).mean())),
        "spearman": np.nan if constant else float(stats.spearmanr(true, predicted).statistic),
        "rows": len(true),
    }


def classification_scores(true: np.ndarray, probability: np.ndarray) -> dict[str, float]:
    """AUROC, AUPRC and balanced accuracy (at one half) of one target of 0 and 1.

    NaN where the rows have one class only. Rows without a value are left out.

    Raises:
        ImportError: scikit-learn is not installed.

    >>> classification_scores(np.array([0.0, 1.0, 1.0]), np.array([0.1, 0.8, 0.4]))["auroc"]
    1.0
    """
    metrics = need("sklearn.metrics", extra="eval", purpose=PURPOSE)
    known = ~np.isnan(true)
    true, probability = true[known].astype(int), probability[known]
    if len(np.unique(true)) < 2:
        return {"auroc": np.nan, "auprc": np.nan, "balanced_accuracy": np.nan, "rows": len(true)}
    return {
        "auroc": float(metrics.roc_auc_score(true, probability)),
        "auprc": float(metrics.average_precision_score(true, probability)),
        "balanced_accuracy": float(metrics.balanced_accuracy_score(true, probability > 0.5)),
        "rows": len(true),
    }
