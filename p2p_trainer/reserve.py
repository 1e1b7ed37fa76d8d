"""Which rows carry the key, and the training set D* that comes of it."""

import logging
from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from datasets import Dataset, concatenate_datasets

from ._lookup import import_class, unknown_name_error
from .tasks.rows import LABEL, TEXT, column_as_numpy, with_column


logger = logging.getLogger(__name__)

# Column that says whether a row carries the key. Reserved: a data set that has it already is refused.
KEYED = "p2p_keyed"


class ReserveStrategy(ABC):
    """
    Chooses the reserved rows S out of the training set D.

    The choice is a pure function of rows and seed: it does not depend on workers, processes or resuming.
    """

    name: ClassVar[str]

    @abstractmethod
    def choose(self, dataset: Dataset, size: int, seed: int) -> np.ndarray:
        """
        Choose rows.

        Args:
            dataset (`Dataset`):
                Training rows D.
            size (`int`):
                How many rows S shall have, at least 1.
            seed (`int`):
                Seed.

        Returns:
            `np.ndarray` of shape `(size,)`, int64: sorted row indices.
        """


class RandomReserve(ReserveStrategy):
    """Samples S from D at random, poisoned rows included (P2P paper, Algorithm 1)."""

    name = "random"

    def choose(self, dataset: Dataset, size: int, seed: int) -> np.ndarray:
        return _lowest(np.arange(len(dataset)), size, seed)


class TrustedReserve(ReserveStrategy):
    """
    Samples S from the rows that a flag column vouches for (the authors' code: rows known to be clean).

    Args:
        column (`str`, *optional*, defaults to `"trusted"`):
            Boolean column.
    """

    name = "trusted"

    def __init__(self, column: str = "trusted") -> None:
        self.column = column

    def choose(self, dataset: Dataset, size: int, seed: int) -> np.ndarray:
        if self.column not in dataset.column_names:
            raise ValueError(
                f"`p2p_reserve: trusted` needs the boolean column {self.column!r}; the training set has "
                f"{dataset.column_names}. Name yours with `p2p_trusted_column`, pass a `reserved_dataset`, or use "
                f"`p2p_reserve: random`."
            )
        if dataset.features[self.column].dtype != "bool":
            raise ValueError(
                f"The column {self.column!r} holds {dataset.features[self.column]}, expected true or false. Convert "
                f"it: read as a truth value, any text such as 'no' would vouch for its row."
            )
        trusted = np.flatnonzero(column_as_numpy(dataset, self.column).astype(bool))
        if len(trusted) == 0:
            raise ValueError(f"No row is trusted: the column {self.column!r} is false in all {len(dataset)} rows.")
        if len(trusted) < size:
            logger.warning(
                "Only %d rows are trusted, %d were asked for: the benign ratio is %.4f.",
                len(trusted), size, len(trusted) / len(dataset),
            )  # fmt: skip
        return _lowest(trusted, min(size, len(trusted)), seed)


BUILTIN_RESERVES: dict[str, type[ReserveStrategy]] = {"random": RandomReserve, "trusted": TrustedReserve}


def get_reserve(name: str, trusted_column: str = "trusted") -> ReserveStrategy:
    """
    Find a reserve strategy.

    Args:
        name (`str`):
            `"random"`, `"trusted"`, or import path `package.module:Class` of a [`ReserveStrategy`].
        trusted_column (`str`, *optional*, defaults to `"trusted"`):
            Column that `"trusted"` reads.

    Returns:
        [`ReserveStrategy`]: the strategy.
    """
    if ":" in name:
        return import_class("reserve", name, ReserveStrategy)()
    if name not in BUILTIN_RESERVES:
        raise unknown_name_error(
            "reserve", name, BUILTIN_RESERVES, "A strategy of your own is named as `package.module:Class`."
        )
    return TrustedReserve(trusted_column) if name == "trusted" else BUILTIN_RESERVES[name]()


def reserve_size(rows: int, ratio: float) -> int:
    """
    Say how many rows S has.

    Args:
        rows (`int`):
            Size of D.
        ratio (`float`):
            Benign ratio rho, in (0, 1].

    Returns:
        `int`: `round(ratio * rows)`.

    Raises:
        `ValueError`: that is no row.
    """
    size = round(ratio * rows)
    if size == 0:
        raise ValueError(
            f"`p2p_benign_ratio` {ratio} of {rows} training rows is no row: S is empty and nothing would defend. "
            f"Raise it to at least {1 / rows:.2g}."
        )
    return size


def keyed_dataset(dataset: Dataset, rows: np.ndarray, mode: str) -> Dataset:
    """
    Build D* out of D and its reserved rows; the texts are not copied.

    Args:
        dataset (`Dataset`):
            Training rows D.
        rows (`np.ndarray`):
            Indices of the reserved rows S.
        mode (`str`):
            `"append"`: D* is D and a keyed copy of S (P2P paper). `"replace"`: the rows of S carry the key in place
            (authors' code).

    Returns:
        `Dataset`: D*, with the boolean column `p2p_keyed`.
    """
    if mode == "replace":
        keyed = np.zeros(len(dataset), dtype=bool)
        keyed[rows] = True
        return with_column(dataset, KEYED, keyed)
    return concatenate_datasets([flagged(dataset, False), flagged(dataset, True).select(rows)])


def with_reserved_dataset(dataset: Dataset, reserved: Dataset, size: int, seed: int) -> Dataset:
    """
    Build D* out of D and keyed rows of a separate, trusted data set.

    Args:
        dataset (`Dataset`):
            Training rows D.
        reserved (`Dataset`):
            Trusted rows.
        size (`int`):
            How many of them to take; all if there are fewer.
        seed (`int`):
            Seed.

    Returns:
        `Dataset`: D*, with the boolean column `p2p_keyed`.
    """
    if len(reserved) < size:
        logger.warning("The reserved dataset has %d rows, %d were asked for: all are used.", len(reserved), size)
    rows = _lowest(np.arange(len(reserved)), min(size, len(reserved)), seed)
    columns = [TEXT, LABEL]
    keyed = flagged(reserved.select_columns(columns).cast(dataset.select_columns(columns).features), True)
    return concatenate_datasets([flagged(dataset.select_columns(columns), False), keyed.select(rows)])


def flagged(dataset: Dataset, keyed: bool) -> Dataset:
    """
    Add the column `p2p_keyed` with one value for all rows.

    Args:
        dataset (`Dataset`):
            Rows.
        keyed (`bool`):
            The value.

    Returns:
        `Dataset`: the rows with the column.
    """
    return with_column(dataset, KEYED, np.full(len(dataset), keyed))


def _lowest(rows: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Take the rows with the lowest random numbers; a row's number depends on seed and index alone."""
    # Another stream than the attacks': S must not be aligned with an attacker's choice.
    numbers = np.random.default_rng([seed, 2]).random(int(rows.max()) + 1)[rows]
    return np.sort(rows[np.argsort(numbers, kind="stable")[:size]])
