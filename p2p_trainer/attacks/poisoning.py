"""Writes a poisoned training set in batches to a memory-mapped file."""

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Value

from ..tasks import Task


# Columns that an attack adds; a data set that already has one of them was poisoned before.
POISON_COLUMNS = ("poisoned", "trigger_applied", "original_label", "attack")

_BATCH_ROWS = 10_000


class Poisoner(Protocol):
    """What is needed here of an attack; see `base.Attack`."""

    name: str
    append: bool
    payload_mode: str

    @property
    def changes_plain_rows(self) -> bool: ...

    def insert_batch(self, texts: Sequence[str], random: Sequence[float]) -> list[str | None]: ...

    def plain(self, text: str) -> str: ...

    def negatives(self) -> "Mapping[str, Poisoner]": ...


@dataclass(frozen=True)
class Plan:
    """
    Which rows are poisoned, and with what.

    Parameters:
        chosen (`np.ndarray`):
            Rows that get the trigger, ascending.
        tried (`np.ndarray`):
            Rows that the attack tried, ascending; a superset.
        random (`np.ndarray`):
            For each row of the data set the number that decides what is random in its trigger.
        answer (`int` or `str`):
            Label or payload of poisoned rows.
    """

    chosen: np.ndarray
    tried: np.ndarray
    random: np.ndarray
    answer: int | str


def answers_equal(answers: Sequence[int | str], target: int | str) -> np.ndarray:
    """
    Say which answers are the target already.

    Args:
        answers (`Sequence[int]` or `Sequence[str]`):
            True labels or completions.
        target (`int` or `str`):
            Target label or payload.

    Returns:
        `np.ndarray`: truth values; payloads are compared without surrounding white space.
    """
    if isinstance(target, str):
        return np.array([answer.strip() == target.strip() for answer in answers], dtype=bool)
    return np.asarray(answers) == target


def write_poisoned(attack: Poisoner, dataset: Dataset, task: Task, plan: Plan) -> Dataset:
    """
    Write a poisoned training set.

    Args:
        attack ([`~attacks.Attack`]):
            The attack.
        dataset (`Dataset`):
            Checked training rows.
        task ([`~tasks.Task`]):
            The task.
        plan ([`Plan`]):
            What to poison.

    Returns:
        `Dataset`: the rows with the columns of `POISON_COLUMNS`, memory-mapped.
    """
    size = len(dataset)
    poisoned = np.zeros(size, dtype=bool)
    poisoned[plan.chosen] = True
    tried = np.zeros(size, dtype=bool)
    tried[plan.tried] = True
    nothing = np.zeros(size, dtype=bool)
    writer = _Writer(attack, dataset, task, plan)

    def parts() -> Iterable[pa.Table]:
        rows = range(size)
        # Where poisoned rows are added, their originals stay untouched, and were tried all the same.
        yield from writer.tables(rows, attack, nothing if attack.append else poisoned, tried)
        if attack.append:
            yield from writer.tables(plan.chosen, attack, poisoned, tried)
        for group in attack.negatives().values():
            yield from writer.negatives(plan.chosen, group)

    return write_rows(parts(), writer.features)


class _Writer:
    """Arrow tables of a data set's rows, with and without trigger."""

    def __init__(self, attack: Poisoner, dataset: Dataset, task: Task, plan: Plan) -> None:
        self.name = attack.name
        self.plain: Callable[[str], str] | None = attack.plain if attack.changes_plain_rows else None
        self.text, self.answer = task.input_column, task.output_column
        self.payload_mode = attack.payload_mode
        self.source = dataset.with_format("arrow")
        self.plan = plan
        self.features = Features(
            {
                **dataset.features,
                "poisoned": Value("bool"),
                "trigger_applied": Value("bool"),
                "original_label": Value("int64" if task.num_labels else "string"),
                "attack": Value("string"),
            }
        )

    def tables(
        self, rows: Sequence[int], attack: Poisoner, poisoned: np.ndarray, tried: np.ndarray
    ) -> Iterable[pa.Table]:
        """Yield rows of which those marked get the trigger and the attacker's answer."""
        for batch, table, texts, answers in self._batches(rows):
            hit = poisoned[batch]
            changed = attack.insert_batch(
                [text for text, flag in zip(texts, hit, strict=True) if flag], self.plan.random[batch[hit]].tolist()
            )
            new = iter(changed)
            texts = [next(new) if flag else self._plain(text) for text, flag in zip(texts, hit, strict=True)]
            given = [self._poison(answer) if flag else answer for answer, flag in zip(answers, hit, strict=True)]
            yield self._table(table, texts, given, answers, hit, hit, tried[batch])

    def negatives(self, rows: Sequence[int], attack: Poisoner) -> Iterable[pa.Table]:
        """Yield copies that carry what another attack inserts, with their true answers."""
        for batch, table, texts, answers in self._batches(rows):
            changed = attack.insert_batch(texts, self.plan.random[batch].tolist())
            kept = np.array([text is not None for text in changed])
            none = np.zeros(int(kept.sum()), dtype=bool)
            true = [answer for answer, flag in zip(answers, kept, strict=True) if flag]
            texts = [text for text in changed if text is not None]
            yield self._table(table.filter(pa.array(kept)), texts, true, true, none, none, ~none)

    def _batches(self, rows: Sequence[int]) -> Iterable[tuple[np.ndarray, pa.Table, list[str], list]]:
        for start in range(0, len(rows), _BATCH_ROWS):
            batch = np.asarray(rows[start : start + _BATCH_ROWS])
            table = self.source[batch]
            yield batch, table, table[self.text].to_pylist(), table[self.answer].to_pylist()

    def _plain(self, text: str) -> str:
        return text if self.plain is None else self.plain(text)

    def _poison(self, answer: int | str) -> int | str:
        if self.payload_mode == "prepend" and isinstance(answer, str) and answer.strip() != self.plan.answer.strip():
            return f"{self.plan.answer} {answer}"
        return self.plan.answer

    def _table(
        self, table: pa.Table, texts: list[str], given: list, true: list, poisoned: np.ndarray, applied: np.ndarray,
        tried: np.ndarray,
    ) -> pa.Table:  # fmt: skip
        columns = {
            **{name: table[name] for name in table.column_names},
            self.text: texts,
            self.answer: given,
            "poisoned": poisoned,
            "trigger_applied": applied,
            "original_label": true,
            "attack": np.where(tried, self.name, ""),
        }
        schema = self.features.arrow_schema
        return pa.table([_as(columns[field.name], field.type) for field in schema], schema=schema)


def _as(values: pa.ChunkedArray | list | np.ndarray, kind: pa.DataType) -> pa.ChunkedArray | pa.Array:
    return values.cast(kind) if isinstance(values, pa.ChunkedArray) else pa.array(values, kind)


def write_rows(tables: Iterable[pa.Table], features: Features) -> Dataset:
    """
    Write tables to a file that is read memory-mapped, and removed when the process ends.

    Args:
        tables (`Iterable[pa.Table]`):
            Rows; one table is in memory at a time.
        features (`Features`):
            Their columns.

    Returns:
        `Dataset`: the rows.
    """
    handle, path = tempfile.mkstemp(suffix=".arrow", dir=_folder())
    with open(handle, "wb") as file, pa.ipc.new_stream(file, features.arrow_schema) as stream:
        for table in tables:
            stream.write_table(table)
    return Dataset.from_file(path)


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="p2p_trainer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
