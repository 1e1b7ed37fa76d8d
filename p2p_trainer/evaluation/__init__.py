"""Evaluation: attack success rate and clean accuracy, with everything needed to read them."""

from .evaluator import ASR_RULES, BackdoorEvaluator, EvaluationReport
from .guard import Guard
from .rates import Rate, wilson_interval
from .scorer import LabelScorer, Scores


__all__ = [
    "ASR_RULES",
    "BackdoorEvaluator",
    "EvaluationReport",
    "Guard",
    "LabelScorer",
    "Rate",
    "Scores",
    "wilson_interval",
]
