"""When a feature overrides the rest of a text more often than an honest one does."""

import numpy as np
from scipy.special import rel_entr
from scipy.stats import binom


# The strongest honest words of clean SST-2, CR, AG News and Yahoo override the rest of a text in three to four of five
# rows, but most phrases in half of them. What is suspected does so in more than the first share, and in so many rows
# that it would be as unlikely as the third number at the second share.
_SUSPECT_RATE = 0.85
_HONEST_RATE = 0.6
_SIGNIFICANCE = 1e-4


def log_chance(overridden: np.ndarray, opposed: np.ndarray) -> np.ndarray:
    """
    Say how unlikely honest features are to override as often.

    Args:
        overridden (`np.ndarray`):
            In how many rows of the label the rest of the text speaks for another.
        opposed (`np.ndarray`):
            In how many rows of any label it does.

    Returns:
        `np.ndarray`: log-probability; 0 where the rate is too low to suspect anything.
    """
    suspicious = (opposed > 0) & (overridden >= _SUSPECT_RATE * opposed)
    tail = binom.logsf(overridden - 1, opposed, _HONEST_RATE)
    # The tail is zero, as a floating-point number, for triggers of many rows: those must not all be alike.
    lost = suspicious & np.isneginf(tail)
    bound = chernoff(np.where(lost, overridden, 1), np.where(lost, opposed, 1), _HONEST_RATE)
    return np.where(suspicious, np.where(lost, bound, tail), 0.0)


def chernoff(hits: np.ndarray, total: np.ndarray, rate: float) -> np.ndarray:
    """
    Bound the log-probability of so many hits or more (Chernoff 1952).

    Args:
        hits (`np.ndarray`):
            Hits; their share must not be below `rate`.
        total (`np.ndarray`):
            Out of how many.
        rate (`float`):
            Probability of a hit.

    Returns:
        `np.ndarray`: upper bound of the log-probability.
    """
    share = hits / np.maximum(total, 1)
    return -total * (rel_entr(share, rate) + rel_entr(1 - share, 1 - rate))


def is_significant(chance: float) -> bool:
    """Say whether a log-probability of [`log_chance`] is too low for chance."""
    return bool(chance < np.log(_SIGNIFICANCE))
