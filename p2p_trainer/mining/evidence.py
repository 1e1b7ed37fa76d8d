"""What the words of a row say about its label."""

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from sklearn.linear_model import LogisticRegression


_FOLDS = 5
# A text speaks for a label that is likelier than this: with 0.5, chance alone made suspects in tiny vocabularies; with
# 0.6, BadNets at 0.5 % of SST-2 was no longer seen.
CLEAR = 0.55


@dataclass(frozen=True)
class Evidence:
    """
    A cross-fitted linear classifier: no row is judged by a model that saw its label.

    Parameters:
        scores (`np.ndarray` of shape `(rows, classes)`):
            Log-odds of each row.
        weights (`np.ndarray` of shape `(features, classes)`):
            What each feature adds, averaged over the folds that know the class.
        bias (`np.ndarray` of shape `(classes,)`):
            Log-odds of a row without features, averaged likewise.
    """

    scores: np.ndarray
    weights: np.ndarray
    bias: np.ndarray


def fit_evidence(
    features: sparse.csr_matrix, labels: np.ndarray, num_labels: int, use: np.ndarray, seed: int, penalty: float = 2.0
) -> Evidence:
    """
    Fit the classifier.

    Args:
        features (`sparse.csr_matrix` of shape `(rows, features)`):
            Features of each row, as ones.
        labels (`np.ndarray` of shape `(rows,)`):
            Labels 0..n-1.
        num_labels (`int`):
            n.
        use (`np.ndarray` of shape `(rows,)`, bool):
            Rows to learn from; the others are judged as well.
        seed (`int`):
            Seed of the folds.
        penalty (`float`, *optional*, defaults to `2.0`):
            Strength of the quadratic penalty: a feature of few rows can't explain them away.

    Returns:
        [`Evidence`]: what it says. Where there is too little to learn from, nothing.
    """
    features = features.astype(np.float64)
    fold = np.random.default_rng([seed, 5]).integers(0, _FOLDS, len(labels))
    scores = np.zeros((len(labels), num_labels))
    weights, bias = np.zeros((features.shape[1], num_labels)), np.zeros(num_labels)
    learnt = np.zeros(num_labels)
    for number in range(_FOLDS):
        learn, held_out = use & (fold != number), fold == number
        present = np.unique(labels[learn])
        if len(present) < 2:
            continue
        model = LogisticRegression(C=1 / penalty, max_iter=300).fit(features[learn], labels[learn])
        coefficients, intercept = model.coef_, model.intercept_
        if len(present) == 2:
            # scikit-learn keeps one row of numbers for two classes.
            coefficients, intercept = np.vstack([-coefficients, coefficients]) / 2, np.array([-0.5, 0.5]) * intercept
        # A class that the other folds lack is never the answer.
        absent = np.setdiff1d(np.arange(num_labels), present)
        scores[np.ix_(held_out, absent)] = -np.inf
        scores[np.ix_(held_out, present)] = features[held_out] @ coefficients.T + intercept
        weights[:, present] += coefficients.T
        bias[present] += intercept
        learnt[present] += 1
    known = learnt > 0
    weights[:, known] /= learnt[known]
    bias[known] /= learnt[known]
    # Where there is evidence at all, a class without any is never the answer.
    bias[~known & known.any()] = -np.inf
    return Evidence(scores, weights, bias)


def likely_label(scores: np.ndarray, share: float = CLEAR) -> np.ndarray:
    """
    Read log-odds.

    Args:
        scores (`np.ndarray` of shape `(rows, classes)`):
            Log-odds.
        share (`float`, *optional*, defaults to `0.55`):
            How likely a class must be, at least 0.5.

    Returns:
        `np.ndarray` of shape `(rows,)`: the class that is likelier than that, -1 where none is.
    """
    best = scores.argmax(axis=1)
    highest = 1 / np.exp(scores - scores.max(axis=1, keepdims=True)).sum(axis=1)
    return np.where(highest > share, best, -1)


def spoken_label(scores: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """
    Say what texts speak for, be the classes as frequent as they may.

    Args:
        scores (`np.ndarray` of shape `(rows, classes)`):
            Log-odds.
        bias (`np.ndarray` of shape `(classes,)`):
            Log-odds of a row without features.

    Returns:
        `np.ndarray` of shape `(rows,)`: the likely label, -1 where there is none, or another once `bias` is taken off.
    """
    with_bias = likely_label(scores)
    words_alone = likely_label(scores - np.where(np.isfinite(bias), bias, 0.0))
    return np.where(with_bias == words_alone, with_bias, -1)
