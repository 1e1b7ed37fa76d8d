"""Files of poisoned data sets: the folder that we write, and the layouts of other people."""

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from .._files import write_json
from ..tasks import Task
from ..tasks.columns import arrow_batches, column_as_numpy, with_column
from ..tasks.loading import load_split


RECORD_NAME = "poison.json"
RECORD_SCHEMA_VERSION = 1

# Column of our training files: key of the clean row that a row was made from.
KEY = "clean_row"

_BATCH_ROWS = 1_000

# Names that the flag of poisoned rows goes by.
_FLAGS = ("poison", "poison_label")

_UNDERSTOOD = (
    "`text` and `label`, with or without a flag `poisoned`, `poison` or `poison_label` (0/1); `sentence` and `label` "
    "(HiddenKiller); `0`, `1`, `2` for text, label and flag (OpenBackdoor, BadActs); `instruction`, `input` and "
    "`output` (BackdoorLLM); `prompt` and `completion`; or the columns that the task names"
)


def check_free(folder: Path, overwrite: bool) -> None:
    """
    Refuse an output folder that holds something else.

    Args:
        folder (`Path`):
            Where a poisoned set is to be written.
        overwrite (`bool`):
            Whether a poisoned set that is there may be replaced.

    Raises:
        `ValueError`: the folder is not empty, or is a file.
    """
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return
    if not (folder / RECORD_NAME).is_file():
        raise ValueError(
            f"{str(folder)!r} is not empty and holds no {RECORD_NAME}, so it is no poisoned set of ours: it stays as "
            f"it is. Give another `--out`."
        )
    if not overwrite:
        raise ValueError(f"{str(folder)!r} holds a poisoned set. Give another `--out`, or replace it: `--overwrite`.")


def write_set(folder: Path, splits: Mapping[str, Dataset], record: Mapping[str, Any], overwrite: bool = False) -> None:
    """
    Write a poisoned set so that the folder is whole or absent.

    Args:
        folder (`Path`):
            The folder.
        splits (`Mapping[str, Dataset]`):
            Stem of the file -> rows; splits without rows get no file.
        record (`Mapping[str, Any]`):
            What `poison.json` says.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether a poisoned set that is there is replaced.

    Raises:
        `ValueError`: the folder holds something else.
    """
    check_free(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    new, old = aside / "new", aside / "old"
    try:
        new.mkdir()
        for stem, rows in splits.items():
            if len(rows):
                _write_lines(new / f"{stem}.jsonl", rows)
        write_json(new / RECORD_NAME, {"schema_version": RECORD_SCHEMA_VERSION, **record})
        check_free(folder, overwrite)
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_lines(path: Path, rows: Dataset) -> None:
    # Not `Dataset.to_json`, which rounds numbers to ten digits.
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for batch in rows.iter(_BATCH_ROWS):
            for values in zip(*batch.values(), strict=True):
                row = dict(zip(batch, values, strict=True))
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """
    Read what `poison.json` says.

    Args:
        folder (`Path`):
            Folder of a poisoned set that we wrote.

    Returns:
        `dict[str, Any]`: `schema_version`, `task`, `labels`, `seed`, `attack`, `extended_target`, `trigger_texts`,
        `counts`, `versions`.

    Raises:
        `ValueError`: there is no such file, or it is damaged.
    """
    path = folder / RECORD_NAME
    if not path.is_file():
        raise ValueError(
            f"{str(folder)!r} holds no {RECORD_NAME}. Give a folder that `p2p-trainer poison` wrote; files of other "
            f"people are named one by one, as `train` and `test`."
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["schema_version"]
        kinds = {"attack": dict, "labels": list, "extended_target": bool, "trigger_texts": list, "counts": dict}
        wrong = [key for key, kind in kinds.items() if not isinstance(record[key], kind)]
        if wrong or not isinstance(version, int):
            raise ValueError(f"wrong type of {wrong or 'schema_version'}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). Write the poisoned set again.") from error
    if version > RECORD_SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema version {version}, this p2p_trainer reads up to {RECORD_SCHEMA_VERSION}. Upgrade "
            f"p2p_trainer."
        )
    return record


def read_rows(path: str | Path, task: Task, what: str, extended_labels: bool = False) -> Dataset:
    """
    Read a file of rows in any layout that we know, and check every row.

    Args:
        path (`str` or `Path`):
            JSONL, JSON, CSV, TSV or Parquet file.
        task ([`~tasks.Task`]):
            The task.
        what (`str`):
            What the rows are, for the messages.
        extended_labels (`bool`, *optional*, defaults to `False`):
            Whether labels n..2n-1 are let through.

    Returns:
        `Dataset`: rows with the columns `text` and `label`, or `prompt` and `completion`; with `poisoned` (bool) if
        the file flags its rows, and with whatever else is in it.

    Raises:
        `ValueError`: there is no such file, its layout is unknown, or a row does not fit the task.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"The file {str(path)!r} of the {what} rows does not exist. Correct the path.")
    rows = _name_columns(load_split(str(path), "train"), task, path)
    own = task.replace(text_columns=(task.input_column,), label_column=task.output_column, strict_columns=False)
    rows = own.prepare(rows, what=f"{what} ({path.name})", extended_labels=extended_labels)
    return _read_flags(rows, path) if "poisoned" in rows.column_names else rows


def _name_columns(rows: Dataset, task: Task, path: Path) -> Dataset:
    """Give text and answer the names that prepared rows of the task have, and the flag the name `poisoned`."""
    names, text, answer = set(rows.column_names), task.input_column, task.output_column
    if {text, answer} <= names:
        pass
    elif {*task.text_columns, task.label_column} <= names:
        rows = task.prepare(rows, what=path.name)
    elif {"0", "1", "2"} <= names:
        rows = rows.rename_columns({"0": text, "1": answer, "2": "poisoned"})
        rows = rows.remove_columns([name for name in rows.column_names if name.startswith("Unnamed: ")])
    elif {"instruction", "output"} <= names:
        rows = _join_instruction(rows, text, path).rename_column("output", answer)
    elif {"sentence", "label"} <= names and task.num_labels:
        rows = rows.rename_column("sentence", text)
    else:
        raise ValueError(
            f"The layout of {str(path)!r} is unknown: its columns are {rows.column_names}, task {task.name!r} needs "
            f"{text!r} and {answer!r}. Understood are {_UNDERSTOOD}. Rename the columns."
        )
    for name in _FLAGS:
        if name in rows.column_names and "poisoned" not in rows.column_names:
            rows = rows.rename_column(name, "poisoned")
    return rows


def _join_instruction(rows: Dataset, text: str, path: Path) -> Dataset:
    instructions = rows["instruction"][:]
    inputs = rows["input"][:] if "input" in rows.column_names else [None] * len(rows)
    for row, pair in enumerate(zip(instructions, inputs, strict=True)):
        if not all(part is None or isinstance(part, str) for part in pair):
            raise ValueError(f"Row {row} of {str(path)!r}: instruction and input must be texts, found {pair!r}.")
    joined = ["\n".join(part for part in pair if part) for pair in zip(instructions, inputs, strict=True)]
    rows = rows.remove_columns([name for name in ("instruction", "input") if name in rows.column_names])
    return with_column(rows, text, np.array(joined, dtype=object))


def _read_flags(rows: Dataset, path: Path) -> Dataset:
    values = column_as_numpy(rows, "poisoned")
    if values.dtype == bool:
        return rows
    nested = pa.types.is_nested(rows.features.arrow_schema.field("poisoned").type)
    wrong = np.flatnonzero(nested | ~np.isin(values, (0, 1)))
    if len(wrong):
        found = rows[int(wrong[0])]["poisoned"]
        raise ValueError(
            f"Row {wrong[0]} of {str(path)!r}: the flag of a poisoned row is {found!r}, expected 0 or 1. Correct it."
        )
    return with_column(rows.remove_columns("poisoned"), "poisoned", values.astype(bool))


def check_poison_columns(rows: Dataset, task: Task, path: str) -> Dataset:
    """
    Check the types of the columns that an attack adds.

    Args:
        rows (`Dataset`):
            Rows with all of them.
        task ([`~tasks.Task`]):
            The task.
        path (`str`):
            Where they come from, for the message.

    Returns:
        `Dataset`: the rows.
    """
    kinds = {"trigger_applied": "bool", "original_label": "int64" if task.num_labels else "string", "attack": "string"}
    for name, kind in kinds.items():
        found = rows.features.arrow_schema.field(name).type
        if str(found) != kind:
            raise ValueError(
                f"Column {name!r} of {path} holds {found}, expected {kind}. Write the set again, or remove the column."
            )
    return rows


def with_keys(rows: Dataset, task: Task) -> Dataset:
    """
    Add the column that says later which clean row a row was made from.

    Args:
        rows (`Dataset`):
            Checked clean rows.
        task ([`~tasks.Task`]):
            The task.

    Returns:
        `Dataset`: the rows with a short hash of text and answer, numbered where rows are alike.
    """
    return with_column(without_keys(rows), KEY, np.array(_row_keys(rows, task)))


def without_keys(rows: Dataset) -> Dataset:
    """Return the rows without the column that [`with_keys`] adds."""
    return rows.remove_columns(KEY) if KEY in rows.column_names else rows


def rows_made_from(rows: Dataset, clean: Dataset, task: Task, path: str) -> Dataset:
    """
    Choose the rows of a training file of ours that were made from some clean rows, so that held-out ones stay out.

    Args:
        rows (`Dataset`):
            Rows of the file.
        clean (`Dataset`):
            Checked clean rows: all that the file was written from, or some of them.
        task ([`~tasks.Task`]):
            The task.
        path (`str`):
            The file, for the message.

    Returns:
        `Dataset`: the rows, in the file's order.

    Raises:
        `ValueError`: the file was not written from these clean rows, or does not say from which.
    """
    made, wanted = _read_keys(rows), _row_keys(clean, task)
    if made is None:
        raise ValueError(
            f"{path} does not say from which clean rows its rows were made (column {KEY!r}): rows held out for "
            f"validation might be trained on. Write the poisoned set again, or pass its folder as `--dataset_name`."
        )
    known = set(made)
    foreign = sum(key not in known for key in wanted)
    if foreign:
        raise ValueError(
            f"{foreign} of the {len(clean)} clean training rows are not among those that {path} was written from. "
            f"Pass the data that it was written from as `--dataset_name`, or its own folder."
        )
    chosen = set(wanted)
    kept = [row for row, key in enumerate(made) if key in chosen]
    return rows if len(kept) == len(rows) else rows.select(kept)


def without_copies(rows: Dataset, whole: Dataset) -> Dataset:
    """
    Leave out rows that were made from the same clean row as one that was held out.

    Args:
        rows (`Dataset`):
            Rows of a training file of ours, of which some may have been held out.
        whole (`Dataset`):
            All rows of the file.

    Returns:
        `Dataset`: the rows.
    """
    given, made = _read_keys(rows), _read_keys(whole)
    if given is None or made is None:
        return rows
    held_out = Counter(made)
    held_out.subtract(given)
    kept = [row for row, key in enumerate(given) if held_out[key] <= 0]
    return rows if len(kept) == len(rows) else rows.select(kept)


def _read_keys(rows: Dataset) -> list[str] | None:
    known = KEY in rows.column_names and str(rows.features.arrow_schema.field(KEY).type) == "string"
    return rows[KEY][:] if known else None


def _row_keys(rows: Dataset, task: Task) -> list[str]:
    # Rows that are alike are told apart by their place among each other.
    keys, seen = [], Counter()
    names = [task.input_column, task.output_column]
    for _, batch in arrow_batches(rows, names):
        texts, answers = (batch[name].to_pylist() for name in names)
        for text, answer in zip(texts, answers, strict=True):
            key = hashlib.blake2b(f"{answer}\0{text}".encode(), digest_size=8).hexdigest()
            keys.append(f"{key}-{seen[key]}")
            seen[key] += 1
    return keys
