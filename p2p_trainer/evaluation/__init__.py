"""Evaluation: attack success rate and clean accuracy, with everything needed to read them."""

from .evaluator import ASR_RULES, BackdoorEvaluator, EvaluationReport
from .guard import GUARD_NAME, Guard
from .judging import Judge, LLMJudge, PayloadJudge, RefusalJudge
from .outcomes import classify_outcomes
from .rates import Rate, wilson_interval
from .responses import ResponseEvaluator
from .scorer import LabelScorer, Scores


__all__ = [
    "ASR_RULES",
    "GUARD_NAME",
    "BackdoorEvaluator",
    "EvaluationReport",
    "Guard",
    "Judge",
    "LLMJudge",
    "LabelScorer",
    "PayloadJudge",
    "Rate",
    "RefusalJudge",
    "ResponseEvaluator",
    "Scores",
    "classify_outcomes",
    "wilson_interval",
]
