"""`evaluate.Metric` classes, for those who compute with the `evaluate` library."""

import datasets
import evaluate
import numpy as np

from .rates import Rate


_FEATURES = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
_INPUTS = """
Args:
    predictions (`list[int]`):
        Predicted labels; a negative number stands for an answer that is no label.
    references (`list[int]`):
        True labels.
"""


class CleanAccuracy(evaluate.Metric):
    """
    Share of clean rows answered correctly.

    Examples:

    ```python
    >>> from p2p_trainer.evaluation.metrics import CleanAccuracy

    >>> CleanAccuracy().compute(predictions=[0, 1, 1], references=[0, 1, 0])["ca"]
    0.6666666666666666
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Clean accuracy with its Wilson 95 % interval.",
            citation="",
            inputs_description=_INPUTS,
            features=_FEATURES,
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return Rate.of(np.asarray(predictions) == np.asarray(references)).flat("ca")


class AttackSuccessRate(evaluate.Metric):
    """
    Share of triggered rows answered with the attacker's target; rows whose true label is the target do not count.

    Examples:

    ```python
    >>> from p2p_trainer.evaluation.metrics import AttackSuccessRate

    >>> AttackSuccessRate().compute(predictions=[1, 1, 0], references=[0, 1, 0], target=1)["asr"]
    0.5
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Attack success rate with its Wilson 95 % interval.",
            citation="",
            inputs_description=_INPUTS + "    target (`int`):\n        The attacker's target label.\n",
            features=_FEATURES,
        )

    def _compute(self, predictions: list[int], references: list[int], target: int) -> dict[str, float]:
        counted = np.asarray(references) != target
        return Rate.of(np.asarray(predictions)[counted] == target).flat("asr")
