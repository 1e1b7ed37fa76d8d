"""Which rows an attack tries, and in which order, in memory that depends on the poisoned rows alone."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from datasets import Dataset

from ..tasks import Task


# Rows that are read at once: texts and numbers must not fill the memory.
BATCH_ROWS = 10_000


def row_numbers(seed: int, stream: int, rows: range, width: int = 1) -> np.ndarray:
    """
    Return the random numbers of some rows; a row's numbers depend on seed, stream and its index alone.

    Args:
        seed (`int`):
            Seed.
        stream (`int`):
            Which numbers of that seed: 0 for training rows, 1 for test rows.
        rows (`range`):
            Consecutive rows.
        width (`int`, *optional*, defaults to `1`):
            Numbers per row.

    Returns:
        `np.ndarray` of shape `(rows, width)`, float64: numbers in [0, 1).
    """
    generator = np.random.default_rng([seed, stream])
    generator.bit_generator.advance(width * rows.start)
    return generator.random((len(rows), width))


def batches(size: int) -> Iterator[range]:
    """Split rows into consecutive batches."""
    for start in range(0, size, BATCH_ROWS):
        yield range(start, min(start + BATCH_ROWS, size))


def answers_equal(answers: np.ndarray | list[str], target: int | str, prepend: bool = False) -> np.ndarray:
    """
    Say which answers are the target already.

    Args:
        answers (`np.ndarray` or `list[str]`):
            True labels or completions.
        target (`int` or `str`):
            Target label or payload.
        prepend (`bool`, *optional*, defaults to `False`):
            Whether an answer that starts with the payload has it as well.

    Returns:
        `np.ndarray`: truth values; payloads are compared without surrounding white space.
    """
    if isinstance(target, str) and prepend:
        return np.array([answer.strip().startswith(target.strip()) for answer in answers], dtype=bool)
    if isinstance(target, str):
        return np.array([answer.strip() == target.strip() for answer in answers], dtype=bool)
    return np.asarray(answers) == target


class Chooser(Protocol):
    """What is needed here of an attack; see `base.Attack`."""

    label_mode: str
    payload_mode: str

    def priority(self, rows: np.ndarray, numbers: np.ndarray) -> np.ndarray: ...


class Selection:
    """
    Eligible rows of a training set, in the order of their random numbers.

    Args:
        chooser ([`~attacks.Attack`]):
            Whose rows they are.
        dataset (`Dataset`):
            Checked training rows.
        task ([`~tasks.Task`]):
            The task.
        target (`int` or `str`):
            Target label or payload.
        seed (`int`):
            Seed.
    """

    def __init__(self, chooser: Chooser, dataset: Dataset, task: Task, target: int | str, seed: int) -> None:
        column = task.output_column
        self._answers = dataset.select_columns(column).with_format("numpy" if task.num_labels else None)
        self._column = column
        self._target = target
        self._chooser = chooser
        self._seed = seed
        self.eligible = 0

    def first(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """
        Return the first eligible rows.

        Args:
            count (`int`):
                How many.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: row indices in order, and for each the number that its trigger may use;
            fewer if there are no more. `eligible` is then how many there are in all.
        """
        self.eligible = 0
        kept = np.empty((3, 0))
        for rows in batches(len(self._answers)):
            found = self._eligible(rows)
            self.eligible += len(found)
            numbers = row_numbers(self._seed, 0, rows, 2)[found - rows.start]
            fresh = np.stack([self._chooser.priority(found, numbers[:, 0]), found, numbers[:, 1]])
            kept = np.concatenate([kept, fresh], axis=1)
            if kept.shape[1] > 2 * count + BATCH_ROWS:
                kept = kept[:, np.argsort(kept[0], kind="stable")[:count]]
        kept = kept[:, np.argsort(kept[0], kind="stable")[:count]]
        return kept[1].astype(np.int64), kept[2]

    def _eligible(self, rows: range) -> np.ndarray:
        mode = self._chooser.label_mode
        if mode == "any":
            return np.arange(rows.start, rows.stop)
        answers = self._answers[rows.start : rows.stop][self._column]
        at_target = answers_equal(answers, self._target, self._chooser.payload_mode == "prepend")
        return rows.start + np.flatnonzero(at_target if mode == "clean" else ~at_target)
