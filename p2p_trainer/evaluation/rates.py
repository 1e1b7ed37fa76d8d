"""Rates that never travel without their counts."""

import math
from typing import NamedTuple

import numpy as np


# Two-sided 95 % quantile of the normal distribution.
_Z95 = 1.959963984540054


class Rate(NamedTuple):
    """
    A share k/n.

    Parameters:
        k (`int`):
            How many rows did it.
        n (`int`):
            Out of how many.
    """

    k: int
    n: int

    @classmethod
    def of(cls, hits: np.ndarray) -> "Rate":
        """Count a boolean array."""
        return cls(int(np.count_nonzero(hits)), int(hits.size))

    @property
    def value(self) -> float:
        """`float`: k/n in [0, 1], NaN if n is 0."""
        return self.k / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """`tuple[float, float]`: Wilson 95 % interval."""
        return wilson_interval(self.k, self.n)

    def flat(self, name: str) -> dict[str, float]:
        """
        Return the entries that a rate has in results.

        Args:
            name (`str`):
                Name of the rate.

        Returns:
            `dict[str, float]`: `name`, `name_k`, `name_n`, `name_ci_low`, `name_ci_high`.
        """
        low, high = self.interval
        return {
            name: self.value,
            f"{name}_k": self.k,
            f"{name}_n": self.n,
            f"{name}_ci_low": low,
            f"{name}_ci_high": high,
        }


def wilson_interval(k: int, n: int) -> tuple[float, float]:
    """
    Wilson 95 % score interval of a rate (Wilson 1927).

    Args:
        k (`int`):
            Successes.
        n (`int`):
            Trials.

    Returns:
        `tuple[float, float]`: lower and upper end in [0, 1]; NaN if n is 0.
    """
    if n == 0:
        return math.nan, math.nan
    share = k / n
    scale = 1 + _Z95**2 / n
    center = (share + _Z95**2 / (2 * n)) / scale
    half = _Z95 / scale * math.sqrt(share * (1 - share) / n + _Z95**2 / (4 * n**2))
    # At the ends the formula gives 0 and 1 but for rounding.
    return 0.0 if k == 0 else center - half, 1.0 if k == n else center + half
