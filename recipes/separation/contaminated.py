"""
Reserves with a known share of poisoned rows: `--p2p_reserve recipes.separation.contaminated:Share05`.

They read which rows are poisoned. That is an oracle: they measure what poison in S does, and defend nothing.
"""

import logging
from typing import ClassVar

import numpy as np
from datasets import Dataset

from p2p_trainer.reserve import ReserveStrategy
from p2p_trainer.tasks.columns import column_as_numpy


logger = logging.getLogger(__name__)

# Column that every attack writes.
POISONED = "poisoned"


class ContaminatedReserve(ReserveStrategy):
    """
    Samples S from D at random, but with exactly `round(share * size)` poisoned rows.

    Rows are taken by the random numbers that `p2p_reserve: random` takes them by. With the same seed, the reserves of
    all shares hold nearly the same clean rows as the random one, and a smaller share holds some of the poisoned rows
    of a larger one.

    Subclasses set `share`, in [0, 1].
    """

    share: ClassVar[float]

    def choose(self, dataset: Dataset, size: int, seed: int) -> np.ndarray:
        if POISONED not in dataset.column_names or dataset.features[POISONED].dtype != "bool":
            found = dataset.features.get(POISONED, "no such column")
            raise ValueError(
                f"`p2p_reserve: {type(self).__name__}` needs the boolean column {POISONED!r} that an attack writes, "
                f"to know the poisoned rows; found {found}, columns {dataset.column_names}. Name an attack with "
                f"`--attack`, or use `p2p_reserve: random`."
            )
        poisoned = column_as_numpy(dataset, POISONED).astype(bool)
        # The stream of `RandomReserve`; see above.
        order = np.argsort(np.random.default_rng([seed, 2]).random(len(dataset)), kind="stable")
        dirty, clean = order[poisoned[order]], order[~poisoned[order]]
        wanted = round(self.share * size)
        if len(dirty) < wanted:
            logger.warning(
                "Only %d rows are poisoned, %d were asked for (%g %% of %d reserved rows): all are taken, which is "
                "%.2f %%.",
                len(dirty), wanted, 100 * self.share, size, 100 * len(dirty) / size,
            )  # fmt: skip
            wanted = len(dirty)
        if len(clean) < size - wanted:
            raise ValueError(
                f"A reserve of {size} rows, {wanted} of them poisoned, needs {size - wanted} clean rows; the training "
                f"set has {len(clean)}. Lower `p2p_benign_ratio`."
            )
        return np.sort(np.concatenate([dirty[:wanted], clean[: size - wanted]]))


class Share0(ContaminatedReserve):
    """No poisoned row."""

    name = "share0"
    share = 0.0


class Share05(ContaminatedReserve):
    """0.5 % poisoned rows."""

    name = "share05"
    share = 0.005


class Share1(ContaminatedReserve):
    """1 % poisoned rows."""

    name = "share1"
    share = 0.01


class Share2(ContaminatedReserve):
    """2 % poisoned rows."""

    name = "share2"
    share = 0.02


class Share5(ContaminatedReserve):
    """5 % poisoned rows."""

    name = "share5"
    share = 0.05
