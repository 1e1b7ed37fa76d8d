"""Which rows carry the key, and the training set D* that comes of it."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from datasets import Dataset, concatenate_datasets

from ._lookup import import_class, unknown_name_error
from .tasks.columns import column_as_numpy, with_column
from .tasks.rows import LABEL, TEXT


logger = logging.getLogger(__name__)

# Share of a class's rows in S below which rows that are suspected are better than none.
_STARVED = 0.5

# Column that says whether a row carries the key. Reserved: a data set that has it already is refused.
KEYED = "p2p_keyed"
# Column with the number of the row that a keyed copy comes from, -1 where nothing is ever written into the text.
# Reserved as well.
ROW = "p2p_row"


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


class AutoReserve(ReserveStrategy):
    """
    Samples S from the rows of D that nothing speaks against (see [`~mining.screen`]), each class in its share of D.

    Rows whose label their own text contradicts are taken only where a class has no others left, and `spare` ones only
    where it has hardly any others at all: S must not lose a class.

    Args:
        suspects (`np.ndarray`, *optional*):
            Rows that carry a suspected trigger.
        doubted (`np.ndarray`, *optional*):
            Rows whose label is doubted.
        spare (`np.ndarray`, *optional*):
            Suspects whose label seems to be right.
        classes (`bool`, *optional*, defaults to `True`):
            Whether rows have labels; written answers have no classes to keep in their shares.
    """

    name = "auto"

    def __init__(
        self,
        suspects: np.ndarray | None = None,
        doubted: np.ndarray | None = None,
        spare: np.ndarray | None = None,
        classes: bool = True,
    ) -> None:
        none = np.array([], dtype=np.int64)
        self.suspects = none if suspects is None else suspects
        self.doubted = none if doubted is None else doubted
        self.spare = none if spare is None else spare
        self.classes = classes

    def choose(self, dataset: Dataset, size: int, seed: int) -> np.ndarray:
        labels = column_as_numpy(dataset, LABEL) if self.classes else np.zeros(len(dataset), dtype=np.int64)
        rows = self._with_spare(np.setdiff1d(np.arange(len(dataset)), self.suspects), labels, size)
        if len(rows) == 0:
            raise ValueError(
                f"All {len(dataset)} training rows carry a suspected trigger: none is left for `p2p_reserve: auto`. "
                f"Give rows that you trust as `reserved_dataset`, or use `p2p_reserve: random`."
            )
        if len(rows) < size:
            logger.warning(
                "Only %d rows carry no suspected trigger, %d were asked for: the benign ratio is %.4f.",
                len(rows), size, len(rows) / len(dataset),
            )  # fmt: skip
        labels = labels[rows]
        order = np.lexsort((_numbers(rows, seed), np.isin(rows, self.doubted)))
        chosen, asked, seen = [], 0, 0
        for label in np.unique(labels):
            own = rows[order][labels[order] == label]
            seen += len(own)
            # Rounded so that the shares of all classes sum up to the whole.
            share = round(min(size, len(rows)) * seen / len(rows)) - asked
            asked += share
            chosen.append(own[:share])
        return np.sort(np.concatenate(chosen))

    def _with_spare(self, rows: np.ndarray, labels: np.ndarray, size: int) -> np.ndarray:
        left = np.bincount(labels[rows], minlength=labels.max() + 1)
        share = size * np.bincount(labels) / len(labels)
        starved = [int(label) for label in np.unique(labels[self.spare]) if left[label] < _STARVED * share[label]]
        if not starved:
            return rows
        logger.warning(
            "Nearly all rows of the labels %s carry a suspected trigger, and their texts agree with them: the reserve "
            "takes such rows too, or it would lose the class.",
            starved,
        )
        return np.union1d(rows, self.spare[np.isin(labels[self.spare], starved)])


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


BUILTIN_RESERVES: dict[str, type[ReserveStrategy]] = {
    "auto": AutoReserve,
    "random": RandomReserve,
    "trusted": TrustedReserve,
}


def get_reserve(name: str, trusted_column: str = "trusted") -> ReserveStrategy:
    """
    Find a reserve strategy.

    Args:
        name (`str`):
            `"auto"`, `"random"`, `"trusted"`, or import path `package.module:Class` of a [`ReserveStrategy`].
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
            (authors' code). `"only"`: D* is the keyed rows alone, the control that says what they would do by
            themselves.

    Returns:
        `Dataset`: D*, with the columns `p2p_keyed` and `p2p_row`.
    """
    if mode == "replace":
        keyed, numbers = np.zeros(len(dataset), dtype=bool), np.full(len(dataset), -1)
        keyed[rows], numbers[rows] = True, rows
        return with_column(with_column(dataset, KEYED, keyed), ROW, numbers)
    keyed = with_column(with_column(dataset, KEYED, np.full(len(dataset), True)), ROW, np.arange(len(dataset)))
    keyed = keyed.select(rows)
    return keyed if mode == "only" else concatenate_datasets([flagged(dataset, False), keyed])


def with_reserved_dataset(
    dataset: Dataset, reserved: Dataset, size: int, seed: int, columns: Sequence[str] = (TEXT, LABEL)
) -> Dataset:
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
        columns (`Sequence[str]`, *optional*, defaults to `("text", "label")`):
            Columns to keep.

    Returns:
        `Dataset`: D*, with the columns `p2p_keyed` and `p2p_row`.
    """
    if len(reserved) < size:
        logger.warning("The reserved dataset has %d rows, %d were asked for: all are used.", len(reserved), size)
    rows = _lowest(np.arange(len(reserved)), min(size, len(reserved)), seed)
    columns = list(columns)
    reserved = reserved.select_columns(columns).cast(dataset.select_columns(columns).features)
    keyed = keyed_dataset(reserved, rows, "only")
    return concatenate_datasets([flagged(dataset.select_columns(columns), False), keyed])


def with_relabelled(training_set: Dataset, dataset: Dataset, rows: np.ndarray, labels: np.ndarray) -> Dataset:
    """
    Add keyed copies of some rows, with other labels than they have.

    Args:
        training_set (`Dataset`):
            D*.
        dataset (`Dataset`):
            Training rows D.
        rows (`np.ndarray`):
            Which rows of D.
        labels (`np.ndarray`):
            Their new labels, 0..n-1.

    Returns:
        `Dataset`: D* with those rows behind it.
    """
    if len(rows) == 0:
        return training_set
    copies = flagged(dataset.select(rows), True)
    copies = with_column(copies.remove_columns(LABEL), LABEL, labels.astype(np.int64))
    columns = training_set.column_names
    return concatenate_datasets([training_set, copies.select_columns(columns).cast(training_set.features)])


def flagged(dataset: Dataset, keyed: bool) -> Dataset:
    """
    Add the columns `p2p_keyed`, with one value for all rows, and `p2p_row`, with -1.

    Args:
        dataset (`Dataset`):
            Rows.
        keyed (`bool`):
            The value.

    Returns:
        `Dataset`: the rows with both columns.
    """
    return with_column(with_column(dataset, KEYED, np.full(len(dataset), keyed)), ROW, np.full(len(dataset), -1))


def _lowest(rows: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Take the rows with the lowest random numbers."""
    return np.sort(rows[np.argsort(_numbers(rows, seed), kind="stable")[:size]])


def _numbers(rows: np.ndarray, seed: int) -> np.ndarray:
    """Draw a random number in [0, 1) for each row, which depends on seed and index alone."""
    # Another stream than the attacks': S must not be aligned with an attacker's choice.
    return np.random.default_rng([seed, 2]).random(int(rows.max()) + 1)[rows]
