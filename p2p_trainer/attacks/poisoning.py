"""Writes a poisoned training set in batches to a memory-mapped file."""

import atexit
import functools
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value

from ..tasks import Task
from .selection import batches


# Columns that an attack adds; a data set that already has one of them was poisoned before.
POISON_COLUMNS = ("poisoned", "trigger_applied", "original_label", "attack")


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
        numbers (`np.ndarray`):
            For each of them the number that decides what is random in its trigger.
        tried (`np.ndarray`):
            Rows that the attack tried, ascending; a superset.
        answer (`int` or `str`):
            Label or payload of poisoned rows.
    """

    chosen: np.ndarray
    numbers: np.ndarray
    tried: np.ndarray
    answer: int | str


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
    writer = _Writer(attack, dataset, task, plan)

    def parts() -> Iterable[pa.Table]:
        yield from writer.whole()
        if attack.append:
            yield from writer.copies(attack, poisoned=True)
        for group in attack.negatives().values():
            yield from writer.copies(group, poisoned=False)

    return write_rows(parts(), writer.features)


class _Writer:
    """Arrow tables of a data set's rows, with and without trigger."""

    def __init__(self, attack: Poisoner, dataset: Dataset, task: Task, plan: Plan) -> None:
        self.attack = attack
        self.text, self.answer = task.input_column, task.output_column
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

    def whole(self) -> Iterable[pa.Table]:
        """Yield all rows; the chosen ones with trigger and the attacker's answer, unless copies get them."""
        plan = self.plan
        for rows in batches(len(self.source)):
            table = self.source[rows.start : rows.stop]
            texts, answers = (table[name].combine_chunks() for name in (self.text, self.answer))
            if self.attack.changes_plain_rows:
                texts = pa.array([self.attack.plain(text) for text in texts.to_pylist()], texts.type)
            inside = slice(*np.searchsorted(plan.chosen, (rows.start, rows.stop)))
            hit = np.zeros(len(rows), dtype=bool)
            given = answers
            if not self.attack.append:
                hit[plan.chosen[inside] - rows.start] = True
                originals = table[self.text].filter(pa.array(hit)).to_pylist()
                changed = self.attack.insert_batch(originals, plan.numbers[inside].tolist())
                texts = pc.replace_with_mask(texts, pa.array(hit), pa.array(changed, texts.type))
                poison = [self._poison(answer) for answer in answers.filter(pa.array(hit)).to_pylist()]
                given = pc.replace_with_mask(answers, pa.array(hit), pa.array(poison, answers.type))
            tried = np.zeros(len(rows), dtype=bool)
            tried[plan.tried[slice(*np.searchsorted(plan.tried, (rows.start, rows.stop)))] - rows.start] = True
            yield self._table(table, texts, given, answers, hit, tried)

    def copies(self, attack: Poisoner, poisoned: bool) -> Iterable[pa.Table]:
        """Yield copies of the chosen rows that carry what an attack inserts, with its answer or their own."""
        for part in batches(len(self.plan.chosen)):
            table = self.source[self.plan.chosen[part.start : part.stop]]
            numbers = self.plan.numbers[part.start : part.stop].tolist()
            changed = pa.array(attack.insert_batch(table[self.text].to_pylist(), numbers), table[self.text].type)
            table = table.filter(pc.is_valid(changed))
            answers = table[self.answer].combine_chunks()
            given = answers
            if poisoned:
                given = pa.array([self._poison(answer) for answer in answers.to_pylist()], answers.type)
            flag = np.full(len(table), poisoned)
            yield self._table(table, changed.drop_null(), given, answers, flag, np.ones(len(table), dtype=bool))

    def _poison(self, answer: int | str) -> int | str:
        prepend = self.attack.payload_mode == "prepend" and isinstance(answer, str)
        if prepend and not answer.strip().startswith(self.plan.answer.strip()):
            return f"{self.plan.answer} {answer}"
        return self.plan.answer

    def _table(
        self,
        table: pa.Table,
        texts: pa.Array,
        given: pa.Array,
        true: pa.Array,
        poisoned: np.ndarray,
        tried: np.ndarray,
    ) -> pa.Table:
        columns = {
            **{name: table[name] for name in table.column_names},
            self.text: texts,
            self.answer: given,
            "poisoned": pa.array(poisoned),
            "trigger_applied": pa.array(poisoned),
            "original_label": true,
            "attack": pc.if_else(pa.array(tried), self.attack.name, ""),
        }
        schema = self.features.arrow_schema
        return pa.table([columns[field.name].cast(field.type) for field in schema], schema=schema)


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
