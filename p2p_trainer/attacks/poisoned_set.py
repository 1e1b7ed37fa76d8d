"""Poisoned sets from files: those that `p2p-trainer poison` wrote, and those of other people."""

import bisect
import logging
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ..tasks import Task
from ..tasks.columns import column_as_numpy, with_column
from .base import Attack
from .paraphrase import differs
from .poisoned_files import (
    KEY,
    check_poison_columns,
    read_record,
    read_rows,
    rows_made_from,
    without_copies,
    without_keys,
)
from .poisoned_pairs import rows_that_differ, trigger_end
from .poisoned_triggers import SPLITS, paired_rows, stored_rows
from .poisoning import POISON_COLUMNS
from .selection import answers_equal
from .text import contains_words


logger = logging.getLogger(__name__)


class PoisonedSet(Attack):
    """
    Rows that were poisoned before: a folder of `p2p-trainer poison`, or files of other people.

    No row is poisoned here, so that there is no rate. Triggered test rows count only if their clean row, and with it
    their true label, is known among the rows that are evaluated: our own folders say it; other files hold as many
    rows as the clean rows outside the target class, or as all clean rows, in the same order and with more in common
    with their own clean row than with the next one; or `test_clean` holds the rows before the trigger. Triggered
    rows of other people that equal their clean row but for white space and case are left out, as the paraphraser of
    HiddenKiller returns what it can't parse.
    Variants of an attack are not part of a poisoned set.

    Layouts that are understood: `text` and `label` with or without a flag `poisoned`, `poison` or `poison_label`;
    `sentence` and `label` (HiddenKiller); `0`, `1`, `2` for text, label, flag (OpenBackdoor, BadActs); `instruction`,
    `input`, `output` (BackdoorLLM; on a classification task the output names a class); `prompt` and `completion`.

    Args:
        target (`str` or `int`):
            What the attacker wants: a label, or a payload.
        poison_rate (`float`, *optional*):
            Taken, since recipes name one, and not used: the rows are what they are.
        folder (`str`, *optional*):
            What `p2p-trainer poison` wrote. With it, give no file.
        train (`str`, *optional*):
            File of poisoned training rows.
        validation (`str`, *optional*):
            File of triggered validation rows.
        test (`str`, *optional*):
            File of triggered test rows.
        test_clean (`str`, *optional*):
            File with the rows of `test`, in their order, before the trigger, with true labels.

    Raises:
        `ValueError`: a folder and files are given, or none of them; the folder is no poisoned set.
    """

    name = "poisoned_set"

    def __init__(
        self,
        target: str | int,
        poison_rate: float | None = None,
        folder: str | None = None,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        test_clean: str | None = None,
    ) -> None:
        files = {"train": train, "validation": validation, "test": test, "test_clean": test_clean}
        given = [name for name, path in files.items() if path is not None]
        if (folder is None) == (not given):
            raise ValueError(
                f"The attack {self.name!r} takes either `folder`, which `p2p-trainer poison` wrote, or files of other "
                f"people (`train`, `validation`, `test`, `test_clean`); got {['folder', *given] if folder else given}."
            )
        if test_clean is not None and test is None:
            raise ValueError("`test_clean` holds the rows of `test` before the trigger. Give `test` too.")
        self.folder = _absolute(folder)
        self.train, self.validation = _absolute(train), _absolute(validation)
        self.test, self.test_clean = _absolute(test), _absolute(test_clean)
        self._record: dict[str, Any] | None = None if folder is None else read_record(Path(self.folder))
        config = {} if self._record is None else self._record["attack"]
        super().__init__(
            target,
            label_mode=config.get("label_mode", "dirty"),
            payload_mode=config.get("payload_mode", "replace"),
        )
        # In results, no rate is better than one that was not applied.
        self.poison_rate = None
        # Texts that carry the trigger -> how many characters hold all of it; training texts of which that is unknown.
        self._ends: dict[str, int] = {}
        self._unknown_ends: set[str] = set()
        self._sorted: list[str] = []
        self._rows_unknown = 0

    @property
    def extended_target(self) -> bool:
        return self._record is not None and self._record["extended_target"]

    @property
    def trigger_texts(self) -> tuple[str, ...]:
        return () if self._record is None else tuple(map(str, self._record["trigger_texts"]))

    @property
    def rows_unknown(self) -> int:
        """`int`: training rows of which it is unknown whether they are poisoned; known once [`poison`] has run."""
        return self._rows_unknown

    def insert(self, text: str, random: float) -> str | None:
        # Which rule the rows were made by is not known.
        return None

    def has_trigger(self, text: str) -> bool:
        """
        Say whether a text is one of the poisoned rows, or long enough a part of one.

        A text that was cut counts as long as it reaches the last place where it differs from its clean row. Where
        that is unknown, a triggered test row needs its whole text; a training row counts unless a trigger that
        `poison.json` names was cut off.

        Args:
            text (`str`):
                A text, possibly without its end.

        Returns:
            `bool`: whether the trigger is in it.
        """
        text = text.strip()
        if len(self._sorted) < len(self._ends) + len(self._unknown_ends):
            self._sorted = sorted([*self._ends, *self._unknown_ends])
        found = []
        for whole in self._sorted[bisect.bisect_left(self._sorted, text) :]:
            if not whole.startswith(text):
                break
            found.append(whole)
        known = [self._ends[whole] for whole in found if whole in self._ends]
        if known:
            return len(text) >= max(known)
        lost = (
            contains_words(whole, [trigger]) and not contains_words(text, [trigger])
            for whole in found
            for trigger in self.trigger_texts
        )
        return bool(text and found) and not any(lost)

    def poison(self, dataset: Dataset, task: Task, seed: int = 0) -> Dataset:
        """
        Return the poisoned training rows of the file.

        Args:
            dataset (`Dataset`):
                Clean training rows. A folder of ours gives the rows that were made from them, so that rows held out
                for validation stay out. If they are as many as the rows of other people's file and in the same order,
                they tell which of its rows are poisoned where it flags none, and the original labels. Or the rows of
                `train.jsonl` in a folder of ours, of which some may have been held out; then those are returned.
            task ([`~tasks.Task`]):
                The task.
            seed (`int`, *optional*, defaults to `0`):
                Not used.

        Returns:
            `Dataset`: the file's rows with the columns that [`Attack.poison`] describes. Where the original label of
            a row is unknown it is -1, on a generation task the empty text.

        Raises:
            `ValueError`: there is no file of training rows, it does not fit the task, or `dataset` holds poisoned
            rows of another file, or clean rows that our own file was not written from.
        """
        self._wanted(task)
        path = self.train if self.folder is None else str(Path(self.folder) / "train.jsonl")
        if path is None:
            raise ValueError(f"The attack {self.name!r} has no training rows: give `train`, or leave out the attack.")
        # What is wrong with the other files should come out before hours of training.
        for other in (self.validation, self.test, self.test_clean):
            if other is not None:
                read_rows(other, task, "triggered")
        rows = read_rows(path, task, "poisoned train", extended_labels=self.extended_target)
        if all(name in dataset.column_names for name in POISON_COLUMNS):
            known = set(map(hash, rows[task.input_column][:]))
            dataset = task.prepare(dataset, what="train", extended_labels=self.extended_target)
            if not known.issuperset(map(hash, dataset[task.input_column][:])):
                raise ValueError(
                    f"The training rows are poisoned already, and are not those of {path}. Give the clean rows, or "
                    f"those of the same folder, as `--dataset_name`."
                )
            rows = without_copies(dataset, rows)
        else:
            dataset = task.prepare(dataset, what="clean train")
            if self.folder is not None or KEY in rows.column_names:
                rows = rows_made_from(rows, dataset, task, path)
            elif len(rows) != len(dataset):
                logger.warning(
                    "%s: all %d rows of %s are trained on, in place of the %d given ones; rows that were held out "
                    "for validation may be among them.", self.name, len(rows), path, len(dataset),
                )  # fmt: skip
            rows = self._with_poison_columns(rows, dataset, task, path)
        rows = without_keys(rows)
        flags = column_as_numpy(rows, "poisoned")
        texts = rows.select(np.flatnonzero(flags))[task.input_column][:]
        self._unknown_ends |= {text.strip() for text in texts} - set(self._ends)
        return rows

    def trigger(self, dataset: Dataset, task: Task, seed: int = 0) -> Dataset:
        """
        Return the triggered rows that were made from these clean rows.

        Args:
            dataset (`Dataset`):
                Clean rows.
            task ([`~tasks.Task`]):
                The task.
            seed (`int`, *optional*, defaults to `0`):
                Not used.

        Returns:
            `Dataset`: text and true answer in the columns that the task names so, and `source_index`. No rows, and a
            warning, if none belong to `dataset` and one of validation and test has no file.

        Raises:
            `ValueError`: both validation and test have files, and none of them belongs to `dataset`; or a file
            contradicts itself, the target or the clean rows.
        """
        target = self._wanted(task)
        dataset = task.prepare(dataset, what="test")
        if self.folder is not None:
            found = stored_rows(Path(self.folder), self._record["counts"], dataset, task)
        else:
            found = paired_rows({self.validation: None, self.test: self.test_clean}, dataset, task, target)
        if found is None:
            self._say_none_belongs(len(dataset))
            found = ([], np.array([], dtype=np.int64))
        texts, source = found
        clean = dataset[source]
        kept: dict[str, list] = {task.input_column: [], task.output_column: [], "source_index": []}
        at_target = answers_equal(clean[task.output_column], target)
        for text, before, answer, row, wanted in zip(
            texts, clean[task.input_column], clean[task.output_column], source.tolist(), at_target, strict=True
        ):
            if wanted or not self._changed(text, before):
                continue
            self._remember(text, before)
            kept[task.input_column].append(text)
            kept[task.output_column].append(answer)
            kept["source_index"].append(row)
        return Dataset.from_dict(kept)

    def _changed(self, text: str, clean: str) -> bool:
        # Paraphrasers of other people give back in lower case what they can't parse; an attack of ours has decided.
        return differs(text, clean) if self.folder is None else text.strip() != clean.strip()

    def _wanted(self, task: Task) -> int | str:
        """Return the target, which the folder must have been written for."""
        target = task.label_index(self.target) if task.num_labels else self.target
        if not task.num_labels and not (isinstance(target, str) and target.strip()):
            raise ValueError(f"The attack {self.name!r} needs a payload, a text, as its `target`; got {target!r}.")
        if self._record is None:
            return target
        if self._record["labels"] != list(task.labels):
            raise ValueError(
                f"The poisoned set {self.folder!r} has the classes {self._record['labels']}, task {task.name!r} has "
                f"{list(task.labels)}. Give the task that it was written with."
            )
        recorded = self._record["attack"].get("target", self.target)
        if (task.label_index(recorded) if task.num_labels else recorded) != target:
            raise ValueError(
                f"The poisoned set {self.folder!r} was written for the target {recorded!r}, got {self.target!r}. Give "
                f"`--attack_target {recorded}`."
            )
        return target

    def _with_poison_columns(self, rows: Dataset, clean: Dataset, task: Task, path: str) -> Dataset:
        if all(name in rows.column_names for name in POISON_COLUMNS):
            return check_poison_columns(rows, task, path)
        answers = column_as_numpy(rows, task.output_column)
        changed = rows_that_differ(rows, clean, task)
        unknown = np.zeros(len(rows), dtype=bool)
        if "poisoned" in rows.column_names:
            poisoned = column_as_numpy(rows, "poisoned")
            unknown |= poisoned
        elif changed is not None:
            poisoned = changed[0] | changed[1]
        else:
            poisoned = unknown.copy()
            unknown[:] = True
            self._rows_unknown = len(rows)
            logger.warning(
                "%s: which of the %d rows of %s are poisoned is unknown: it flags none, and they are not the given "
                "clean rows in the same order.", self.name, len(rows), path,
            )  # fmt: skip
        if changed is not None:
            applied, original = changed[0] & poisoned, column_as_numpy(clean, task.output_column)
        else:
            applied, original = poisoned, np.where(unknown, -1 if task.num_labels else "", answers)
        columns = {
            "poisoned": poisoned,
            "trigger_applied": applied,
            "original_label": original.astype(np.int64) if task.num_labels else original,
            "attack": np.where(poisoned, self.name, ""),
        }
        rows = rows.remove_columns([name for name in POISON_COLUMNS if name in rows.column_names])
        for name, values in columns.items():
            rows = with_column(rows, name, values)
        for row in np.flatnonzero(applied & (changed is not None)).tolist():
            self._remember(rows[row][task.input_column], clean[row][task.input_column])
        return rows

    def _remember(self, text: str, clean: str) -> None:
        text, end = text.strip(), trigger_end(text, clean)
        self._ends[text] = max(end, self._ends.get(text, 0))

    def _say_none_belongs(self, size: int) -> None:
        if self.folder is not None:
            whole = all((Path(self.folder) / f"{split}.jsonl").is_file() for split in SPLITS)
            message = (
                f"The {size} clean rows are not those that {self.folder!r} was written with, so its triggered rows do "
                f"not belong to them. Evaluate on its own: `--dataset_name {self.folder}`."
            )
        else:
            whole = self.validation is not None and self.test is not None
            message = (
                f"No triggered rows belong to the {size} clean rows: `validation` and `test` must hold as many rows "
                f"as there are clean rows outside the target class, or as all of them, in the same order; else the "
                f"true labels are unknown. Give `test_clean`, the rows of `test` before the trigger."
            )
        if whole:
            raise ValueError(message)
        # They may be rows held out for validation, which nobody has made triggered rows of.
        logger.warning("%s: no row counts. %s", self.name, message)


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().resolve())
