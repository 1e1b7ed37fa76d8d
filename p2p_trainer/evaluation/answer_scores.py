"""Scores written answers against true ones, by the metric that the task names."""

from collections.abc import Sequence

import numpy as np

from .numbers import numeric_accuracy, parse_number
from .rouge import choose_rouge_tokenizer, rouge_rows


def score_answers(
    metric: str, answers: Sequence[str], references: Sequence[str], source: np.ndarray
) -> dict[str, np.ndarray]:
    """
    Score answers.

    Args:
        metric (`str`):
            `"numeric"` or `"rouge"`, as in [`~tasks.Task`].
        answers (`Sequence[str]`):
            Answers, without p.
        references (`Sequence[str]`):
            True answers of the clean rows.
        source (`np.ndarray` of shape `(answers,)`, int64):
            Clean row that each answer belongs to, -1 if none.

    Returns:
        `dict[str, np.ndarray]`: metric -> one score per answer, truth values for rates, NaN or `False` where there is
        no true answer.
    """
    known = np.flatnonzero(source >= 0)
    found, true = [answers[row] for row in known], [references[source[row]] for row in known]
    if metric == "numeric":
        right = np.zeros(len(answers), dtype=bool)
        right[known] = numeric_accuracy(found, true)
        return {"ca": right}
    scores = {}
    for name, values in rouge_rows(found, true, choose_rouge_tokenizer(references)).items():
        scores[name] = np.full(len(answers), np.nan)
        scores[name][known] = values
    return scores


def metric_name(metric: str | None, references: Sequence[str]) -> str | None:
    """
    Name a metric with what decides its numbers, for results.

    Args:
        metric (`str` or `None`):
            Metric of the task.
        references (`Sequence[str]`):
            True answers.

    Returns:
        `str` or `None`: such as `"rouge (characters)"`.
    """
    return f"rouge ({choose_rouge_tokenizer(references)})" if metric == "rouge" else metric


def numeric_payload(payload: str) -> bool:
    """Say whether an attacker's payload is a number."""
    return parse_number(payload) is not None
