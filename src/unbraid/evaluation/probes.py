"""Small probes: logistic regression on a few columns, judged on held-out rows.

The columns are the `k` with the largest difference of class means on the training rows, as in SAEBench. They are
divided by their root mean square first, so a probe does not depend on the units of the codes; loss and penalty are then
those of scikit-learn's default.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

PENALTY = 1.0


@dataclass(frozen=True)
class Probe:
    """A linear classifier of selected columns: positive where `(x[columns] / scale) . weights + bias > 0`."""

    columns: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: float

    def scores(self, x: np.ndarray) -> np.ndarray:
        """Log-odds `[rows]`."""
        return (x[:, self.columns] / self.scale) @ self.weights + self.bias


@dataclass(frozen=True)
class Score:
    """How well a probe does on rows it was not fitted to."""

    accuracy: float
    auc: float


def fit_probe(x: np.ndarray, y: np.ndarray, columns: np.ndarray | None = None, balanced: bool = False) -> Probe:
    """Logistic regression of `y` (0 or 1) on columns of `x`, minimising sum log(1 + exp(-y z)) + ||w||^2 / 2.

    Args:
        x: `[rows, columns]`.
        y: `[rows]`.
        columns: which columns; None takes all.
        balanced: whether both classes weigh the same, however many rows each has.
    """
    columns = np.arange(x.shape[1]) if columns is None else columns
    chosen = x[:, columns].astype(np.float64)
    scale = np.sqrt((chosen**2).mean(axis=0))
    scale[scale == 0] = 1.0
    chosen = chosen / scale
    mean = chosen.mean(axis=0)  # the bias is free, so this changes nothing but the number of steps
    chosen -= mean
    signs = 2.0 * y - 1
    share = np.where(y == 1, y.mean(), 1 - y.mean())
    importance = 0.5 / share if balanced else np.ones(len(y))

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        margins = signs * (chosen @ theta[:-1] + theta[-1])
        slope = -importance * signs * expit(-margins)
        gradient = np.append(chosen.T @ slope + PENALTY * theta[:-1], slope.sum())
        return float((importance * np.logaddexp(0, -margins)).sum() + PENALTY * (theta[:-1] ** 2).sum() / 2), gradient

    theta = minimize(loss, np.zeros(len(columns) + 1), jac=True, method="L-BFGS-B", options={"maxiter": 1000}).x
    return Probe(columns, scale, theta[:-1], float(theta[-1] - mean @ theta[:-1]))


def top_columns(x: np.ndarray, y: np.ndarray, k: int) -> np.ndarray:
    """The `k` columns whose class means differ most, in absolute value; ties go to the lower column."""
    difference = np.abs(x[y == 1].mean(axis=0, dtype=np.float64) - x[y == 0].mean(axis=0, dtype=np.float64))
    return np.argsort(-difference, kind="stable")[:k]


def score_probe(probe: Probe, x: np.ndarray, y: np.ndarray) -> Score:
    """Accuracy, and area under the ROC curve (ties count half)."""
    scores = probe.scores(x)
    return Score(float(((scores > 0) == (y == 1)).mean()), area_under_curve(scores, y))


def area_under_curve(scores: np.ndarray, y: np.ndarray) -> float:
    """Probability that a positive scores above a negative; NaN with one class only."""
    positive, negative = scores[y == 1], np.sort(scores[y == 0])
    if len(positive) == 0 or len(negative) == 0:
        return float("nan")
    below = np.searchsorted(negative, positive, side="left")
    up_to = np.searchsorted(negative, positive, side="right")
    return float((below + up_to).mean() / (2 * len(negative)))


def f1_score(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Harmonic mean of precision and recall of boolean predictions; 0 where undefined."""
    hits = (predicted & actual).sum()
    return float(2 * hits / max(1, predicted.sum() + actual.sum()))
