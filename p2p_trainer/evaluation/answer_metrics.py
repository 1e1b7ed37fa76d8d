"""`evaluate.Metric` classes for answers that are text, for those who compute with the `evaluate` library."""

import math

import datasets
import evaluate

from .numbers import numeric_accuracy
from .rates import Rate
from .rouge import choose_rouge_tokenizer, rouge_rows


_INPUTS = """
Args:
    predictions (`list[str]`):
        Generated answers, without the defender's prefix.
    references (`list[str]`):
        True answers.
"""


class NumericMatch(evaluate.Metric):
    """
    Share of math problems answered with the right number ([`~evaluation.numbers.numeric_accuracy`]).

    Examples:

    ```python
    >>> from p2p_trainer.evaluation.answer_metrics import NumericMatch

    >>> NumericMatch().compute(predictions=["#### 18", "1/2"], references=["18", "0.4"])["numeric_match"]
    0.5
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy of numeric answers with its Wilson 95 % interval.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return Rate.of(numeric_accuracy(predictions, references)).flat("numeric_match")


class Rouge(evaluate.Metric):
    """
    ROUGE-1, ROUGE-2 and ROUGE-L of summaries: means of the F-measures of all rows.

    Examples:

    ```python
    >>> from p2p_trainer.evaluation.answer_metrics import Rouge

    >>> Rouge().compute(predictions=["左肺结节"], references=["右肺结节"])
    {'rouge1': 0.75, 'rouge2': 0.6666666666666666, 'rougeL': 0.75, 'rouge_tokenizer': 'characters'}
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="ROUGE-1, ROUGE-2 and ROUGE-L F-measures, by words or by Chinese and Japanese characters.",
            citation="",
            inputs_description=(
                "\nArgs:\n"
                "    predictions (`list[str]`):\n        Answers.\n"
                "    references (`list[str]`):\n        True summaries, one per answer.\n"
                '    tokenizer (`str`, *optional*, defaults to `"auto"`):\n'
                '        `"characters"`, `"words"`, or `"auto"`: by the references of the whole set.\n'
            ),
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(
        self, predictions: list[str], references: list[str], tokenizer: str = "auto"
    ) -> dict[str, float | str]:
        if tokenizer == "auto":
            tokenizer = choose_rouge_tokenizer(references)
        rows = rouge_rows(predictions, references, tokenizer)
        means = {name: float(values.mean()) if len(values) else math.nan for name, values in rows.items()}
        return {**means, "rouge_tokenizer": tokenizer}
