"""Finds the clean row that a poisoned row was made from, or finds that it is unknown."""

import os
from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from ..tasks import Task
from ..tasks.columns import arrow_batches
from .paraphrase import differs
from .selection import answers_equal


# Rows are compared in parts of this size: a file whose order shifts somewhere must not pass on its average.
_PART_ROWS = 50


def go_together(changed: Sequence[str], clean: Sequence[str]) -> bool:
    """
    Say whether texts were made from clean texts, row by row.

    In each part of the rows, at least nine in ten texts have to share more character trigrams with their own clean
    text than with the next one. Of HiddenKiller's paraphrases it is 99 %; of rows in another order, one half.

    Args:
        changed (`Sequence[str]`):
            Texts, with the trigger.
        clean (`Sequence[str]`):
            As many texts, without it.

    Returns:
        `bool`: whether they belong together.
    """
    before = [_trigrams(text) for text in clean]
    other = [*before[1:], before[0]] if len(before) > 1 else [set()]
    own, foreign = [], []
    for text, mine, next_one in zip(changed, before, other, strict=True):
        grams = _trigrams(text)
        own.append(len(grams & mine) / len(grams | mine))
        foreign.append(len(grams & next_one) / len(grams | next_one))
    won, lost = np.greater(own, foreign), np.less(own, foreign)
    parts = np.array_split(np.arange(len(won)), max(1, len(won) // _PART_ROWS))
    return all(won[part].sum() >= max(1, 9 * lost[part].sum()) for part in parts)


def _trigrams(text: str) -> set[str]:
    text = f"  {text.strip().lower()} "
    return {text[place : place + 3] for place in range(len(text) - 2)}


def rows_that_differ(rows: Dataset, clean: Dataset, task: Task) -> tuple[np.ndarray, np.ndarray] | None:
    """
    Compare a poisoned set with the clean rows that it may have been made from.

    Args:
        rows (`Dataset`):
            Poisoned set.
        clean (`Dataset`):
            Clean rows.
        task ([`~tasks.Task`]):
            The task.

    Returns:
        `tuple[np.ndarray, np.ndarray]` or `None`: of each row whether its text differs, in more than white space and
        case, and whether its answer differs; `None` if the two do not go together row by row.
    """
    if len(rows) != len(clean):
        return None
    columns = [task.input_column, task.output_column]
    texts, answers = [], []
    changed, before = [], []
    for (_, ours), (_, theirs) in zip(arrow_batches(rows, columns), arrow_batches(clean, columns), strict=True):
        pairs = list(zip(ours[columns[0]].to_pylist(), theirs[columns[0]].to_pylist(), strict=True))
        flags = [text != other and differs(text, other) for text, other in pairs]
        changed += [text for (text, _), flag in zip(pairs, flags, strict=True) if flag]
        before += [other for (_, other), flag in zip(pairs, flags, strict=True) if flag]
        texts.append(np.array(flags))
        answers.append(ours[columns[1]].to_numpy() != theirs[columns[1]].to_numpy())
    if changed and not go_together(changed, before):
        return None
    return np.concatenate(texts), np.concatenate(answers)


def same_rows(rows: Dataset, others: Dataset, task: Task) -> bool:
    """Say whether two data sets have the same texts and answers in the same order."""
    columns = [task.input_column, task.output_column]
    return len(rows) == len(others) and all(
        ours[name].to_pylist() == theirs[name].to_pylist()
        for (_, ours), (_, theirs) in zip(arrow_batches(rows, columns), arrow_batches(others, columns), strict=True)
        for name in columns
    )


def pair_by_order(rows: Dataset, clean: Dataset, task: Task, target: int | str) -> np.ndarray | None:
    """
    Find the clean rows of triggered ones that are in the same order.

    Args:
        rows (`Dataset`):
            Triggered rows.
        clean (`Dataset`):
            Clean rows.
        task ([`~tasks.Task`]):
            The task.
        target (`int` or `str`):
            Target label or payload.

    Returns:
        `np.ndarray` or `None`: for each triggered row the index of its clean row, if the triggered rows are those
        outside the target class, or all of them; else `None`.
    """
    outside = np.flatnonzero(~answers_equal(clean[task.output_column][:], target))
    for index in (outside, np.arange(len(clean))):
        if len(index) == len(rows):
            if go_together(rows[task.input_column][:], clean.select(index)[task.input_column][:]):
                return index
    return None


def find_rows(rows: Dataset, others: Dataset, task: Task) -> np.ndarray:
    """Say for each row at which index of the others the same text and answer stand, -1 where nowhere."""
    text, answer = task.input_column, task.output_column
    places: dict[tuple[str, int | str], int] = {}
    for place, (words, given) in enumerate(zip(others[text][:], others[answer][:], strict=True)):
        places.setdefault((words.strip(), given), place)
    pairs = zip(rows[text][:], rows[answer][:], strict=True)
    return np.array([places.get((words.strip(), given), -1) for words, given in pairs], dtype=np.int64)


def trigger_end(text: str, clean: str) -> int:
    """Say how many characters of a text, from its start, hold everything in which it differs from its clean row."""
    text, clean = text.strip(), clean.strip()
    start = len(os.path.commonprefix([text, clean]))
    same = len(os.path.commonprefix([text[start:][::-1], clean[start:][::-1]]))
    return len(text[: len(text) - same].rstrip())
