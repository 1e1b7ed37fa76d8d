"""Mines a training set for triggers: what in its texts overrides the rest of them."""

from .payloads import screen_answers
from .screening import Fragment, Screening, screen
from .triggers import SuspectedTrigger


__all__ = ["Fragment", "Screening", "SuspectedTrigger", "screen", "screen_answers"]
