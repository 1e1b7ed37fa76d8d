"""Reads triggered rows, as far as their clean rows, and so their true answers, are known."""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from datasets import Dataset

from ..tasks import Task
from ..tasks.columns import column_as_numpy
from .poisoned_files import RECORD_NAME, read_rows
from .poisoned_pairs import find_rows, go_together, pair_by_order, same_rows


logger = logging.getLogger(__name__)

# Splits of our own folders that have triggered rows.
SPLITS = ("validation", "test")


def stored_rows(
    folder: Path, counts: Mapping[str, int], dataset: Dataset, task: Task
) -> tuple[list[str], np.ndarray] | None:
    """
    Read the triggered rows of a folder that we wrote.

    Args:
        folder (`Path`):
            The folder.
        counts (`Mapping[str, int]`):
            How many rows its files have.
        dataset (`Dataset`):
            Checked clean rows.
        task ([`~tasks.Task`]):
            The task.

    Returns:
        `tuple[list[str], np.ndarray]` or `None`: texts and their rows in `dataset`, `None` if these are not the clean
        rows of the folder.

    Raises:
        `ValueError`: the file does not fit the clean rows.
    """
    for split in SPLITS:
        clean, triggered = folder / f"{split}.jsonl", folder / f"triggered_{split}.jsonl"
        if not clean.is_file() or not same_rows(read_rows(clean, task, f"clean {split}"), dataset, task):
            continue
        wanted = counts.get(triggered.stem)
        if wanted == 0:
            return [], np.array([], dtype=np.int64)
        rows = read_rows(triggered, task, f"triggered {split}")
        source = column_as_numpy(rows, "source_index") if "source_index" in rows.column_names else np.array([])
        fits = (
            len(rows) == len(source) == wanted
            and source.dtype == np.int64
            and bool(np.all((source >= 0) & (source < len(dataset))))
            and rows[task.output_column][:] == dataset[source][task.output_column]
        )
        if not fits:
            raise ValueError(
                f"{triggered} does not fit {clean.name} and {RECORD_NAME}: count, `source_index` or the true answers "
                f"differ. Write the poisoned set again."
            )
        return rows[task.input_column][:], source
    return None


def paired_rows(
    files: Mapping[str | None, str | None], dataset: Dataset, task: Task, target: int | str
) -> tuple[list[str], np.ndarray] | None:
    """
    Read the triggered rows of other people's files.

    Args:
        files (`Mapping[str | None, str | None]`):
            File of triggered rows, if there is one -> file with the same rows before the trigger, if there is one.
        dataset (`Dataset`):
            Checked clean rows.
        task ([`~tasks.Task`]):
            The task.
        target (`int` or `str`):
            Target label or payload.

    Returns:
        `tuple[list[str], np.ndarray]` or `None`: texts and their rows in `dataset`, `None` if no file belongs to it.

    Raises:
        `ValueError`: a file contradicts itself, the target, or the clean rows.
    """
    for path, clean_path in files.items():
        if path is None:
            continue
        rows = read_rows(path, task, "triggered")
        clean = None if clean_path is None else read_rows(clean_path, task, "clean test")
        if clean is not None and len(rows) != len(clean):
            raise ValueError(
                f"{path} has {len(rows)} rows, {clean_path} has {len(clean)}: `test_clean` must hold the rows of "
                f"`test` before the trigger, in the same order."
            )
        if "poisoned" in rows.column_names:
            flagged = np.flatnonzero(column_as_numpy(rows, "poisoned"))
            if len(flagged) == 0:
                raise ValueError(f"No row of {path} is flagged as poisoned. Give the file of triggered rows.")
            rows, clean = rows.select(flagged), None if clean is None else clean.select(flagged)
        source = pair_by_order(rows, dataset, task, target) if clean is None else find_rows(clean, dataset, task)
        if source is None or np.all(source < 0):
            continue
        texts = rows[task.input_column][:]
        if clean is None:
            clean = dataset.select(source)
        elif not go_together(texts, clean[task.input_column][:]):
            raise ValueError(f"{clean_path} does not hold the rows of {path} in the same order. Sort them alike.")
        _check_answers(rows, clean, task, target, path)
        if np.any(source < 0):
            logger.warning(
                "%d of %d rows of %s are left out: their clean rows are not among the given ones.",
                np.count_nonzero(source < 0), len(rows), path,
            )  # fmt: skip
        return [text for text, row in zip(texts, source, strict=True) if row >= 0], source[source >= 0]
    return None


def _check_answers(rows: Dataset, clean: Dataset, task: Task, target: int | str, path: str) -> None:
    """Refuse triggered rows of an attack that wants something else; payloads are too free to tell."""
    if not task.num_labels:
        return
    given, true = (column_as_numpy(part, task.output_column) for part in (rows, clean))
    if np.any(given != target) and np.any(given != true):
        raise ValueError(
            f"The labels of {path} are neither the target {task.labels[target]!r} in each row nor the true labels of "
            f"the clean rows. Correct `--attack_target`, or give the file that belongs to these clean rows."
        )
