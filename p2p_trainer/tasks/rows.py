"""Checks the rows of a classification task and gives their columns the names `text` and `label`."""

import functools
import logging
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset

from .columns import arrow_batches, column_as_numpy, with_column


logger = logging.getLogger(__name__)

TEXT = "text"
LABEL = "label"
# Generation tasks
PROMPT = "prompt"
COMPLETION = "completion"
# Turns of a conversation before its last question.
HISTORY = "history"
IMAGE = "image"


def prepare_rows(
    dataset: Dataset,
    labels: Sequence[str],
    text_columns: Sequence[str] = (TEXT,),
    label_column: str = LABEL,
    what: str = "input",
    require_all_classes: bool = False,
    drop_empty: bool = False,
    extended_labels: bool = False,
) -> Dataset:
    """
    Give a dataset the columns `text` (str) and `label` (int), and check every row.

    Nothing is dropped unasked: a row that does not fit is an error that names the column, the row index, what was
    found and the fix. Other columns stay. Storage is shared with `dataset` wherever its columns already fit.

    Args:
        dataset (`Dataset`):
            Rows as they came.
        labels (`Sequence[str]`):
            Class names; the index of a name is its label.
        text_columns (`Sequence[str]`, *optional*, defaults to `("text",)`):
            Columns that hold the text; several are joined with one space.
        label_column (`str`, *optional*, defaults to `"label"`):
            Column that holds the label, as an index or as a class name.
        what (`str`, *optional*, defaults to `"input"`):
            What the rows are, for the messages: `"train"`, say.
        require_all_classes (`bool`, *optional*, defaults to `False`):
            Whether a class without a row is an error.
        drop_empty (`bool`, *optional*, defaults to `False`):
            Whether rows with an empty text are left out, which is logged with their number, rather than an error.
        extended_labels (`bool`, *optional*, defaults to `False`):
            Whether labels n..2n-1 of the extended space are let through: only to measure an attacker who writes them.

    Returns:
        `Dataset`: the rows, with `text` and integer `label`.

    Raises:
        `ValueError`: a column is missing or misnamed, a text is empty or not UTF-8, a label is out of range, the
        dataset is empty, or a class has no row.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"The {what} rows must be a `datasets.Dataset`, got `{type(dataset).__name__}`. Build one with "
            f"`Dataset.from_list([...])` or `load_dataset(..., split=...)`."
        )
    if len(dataset) == 0:
        raise ValueError(f"The {what} dataset is empty: 0 rows were read. Check the path and the split.")
    dataset = _name_text_column(dataset, text_columns, what)
    dataset = _name_label_column(dataset, label_column, labels, what)
    if drop_empty:
        dataset = _drop_empty(dataset, what)
        if len(dataset) == 0:
            raise ValueError(f"The {what} dataset holds no text: all its rows are empty. Check `text_column`.")
    space = [*labels, *labels] if extended_labels else labels
    counts = np.zeros(len(space), dtype=np.int64)
    for start, batch in arrow_batches(dataset, [TEXT, LABEL]):
        _check_texts(batch[TEXT], start, what)
        counts += _count_labels(batch[LABEL], start, space, what)
    counts = counts.reshape(-1, len(labels)).sum(axis=0)
    missing = [name for name, count in zip(labels, counts, strict=True) if count == 0]
    if missing and require_all_classes:
        raise ValueError(
            f"The {what} dataset has no row of class {missing}: found "
            f"{dict(zip(labels, counts.tolist(), strict=True))}. Add rows of that class, or use a task with the "
            f"classes you have."
        )
    return dataset


def prepare_generation_rows(
    dataset: Dataset,
    prompt_columns: Sequence[str] = (PROMPT,),
    completion_column: str | None = COMPLETION,
    what: str = "input",
    drop_empty: bool = False,
) -> Dataset:
    """
    Give a dataset the columns `prompt` (str) and `completion` (str), and check every row.

    Args:
        dataset (`Dataset`):
            Rows as they came.
        prompt_columns (`Sequence[str]`, *optional*, defaults to `("prompt",)`):
            Columns that hold the prompt; several are joined with one space. `prompt` does as well.
        completion_column (`str` or `None`, *optional*, defaults to `"completion"`):
            Column that holds the answer. `completion` does as well. `None`: there are only prompts, and the answers
            are left empty.
        what (`str`, *optional*, defaults to `"input"`):
            What the rows are, for the messages.
        drop_empty (`bool`, *optional*, defaults to `False`):
            Whether rows with an empty prompt or answer are left out rather than an error.

    Returns:
        `Dataset`: the rows.

    Raises:
        `ValueError`: a column is missing, a prompt or an answer is empty or not UTF-8, or the dataset is empty.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"The {what} rows must be a `datasets.Dataset`, got `{type(dataset).__name__}`.")
    if len(dataset) == 0:
        raise ValueError(f"The {what} dataset is empty: 0 rows were read. Check the path and the split.")
    dataset = _name_text_column(dataset, prompt_columns, what, PROMPT)
    columns = [PROMPT]
    if completion_column is not None:
        dataset = _name_text_column(dataset, [completion_column], what, COMPLETION)
        columns.append(COMPLETION)
    elif COMPLETION not in dataset.column_names:
        dataset = dataset.add_column(COMPLETION, pa.array([""] * len(dataset)))
    for column in columns:
        if drop_empty:
            dataset = _drop_empty(dataset, what, column)
            if len(dataset) == 0:
                raise ValueError(f"The {what} dataset holds no row with a {column}: all are empty. Check the column.")
    for start, batch in arrow_batches(dataset, columns):
        for column in columns:
            _check_texts(batch[column], start, what, column)
    return dataset


def renamed(dataset: Dataset, aliases: Mapping[str, str]) -> Dataset:
    """
    Give columns the names that a task knows them by, where those are missing.

    Args:
        dataset (`Dataset`):
            Rows as they came.
        aliases (`Mapping[str, str]`):
            Found name -> name to give.

    Returns:
        `Dataset`: the rows.

    Raises:
        `ValueError`: two columns would get the same name.
    """
    names = set(dataset.column_names)
    found = {old: new for old, new in aliases.items() if old in names and new not in names}
    for new in found.values():
        if len(same := [old for old in found if found[old] == new]) > 1:
            raise ValueError(
                f"The columns {same} could each be {new!r} (the task's `column_aliases`). Rename yours to {new!r}."
            )
    return dataset.rename_columns(found)


def check_columns(dataset: Dataset, task_columns: Mapping[str, Sequence[str]], what: str) -> None:
    """
    Refuse rows that lack a column, even if another could stand in for it.

    Args:
        dataset (`Dataset`):
            Rows as they came.
        task_columns (`Mapping[str, Sequence[str]]`):
            Name in prepared rows -> the columns that it is made of.
        what (`str`):
            What the rows are, for the message.

    """
    for to, wanted in task_columns.items():
        if not set(wanted) <= set(dataset.column_names):
            raise _missing_column_error(what, to, wanted, dataset.column_names)


def _option(to: str) -> str:
    """Name the setting that says which column becomes this one."""
    return "label_column" if to in (LABEL, COMPLETION) else "text_column"


def _missing_column_error(what: str, to: str, wanted: Sequence[str], found: Sequence[str]) -> ValueError:
    return ValueError(
        f"The {what} dataset has no {to} column {list(wanted)}; its columns are {list(found)}. Rename the column to "
        f"'{to}', or name yours with `{_option(to)}` in the recipe (`--{_option(to)} NAME`) or in the task's YAML."
    )


def _name_text_column(dataset: Dataset, text_columns: Sequence[str], what: str, to: str = TEXT) -> Dataset:
    names = dataset.column_names
    if all(name in names for name in text_columns):
        for name in text_columns:
            _check_text_type(dataset, name, what, to)
        if len(text_columns) == 1:
            return _rename(dataset, text_columns[0], to)
        joined = [
            functools.reduce(_join, (pc.fill_null(batch[name], "") for name in text_columns))
            for _, batch in arrow_batches(dataset, list(text_columns))
        ]
        text = pa.chunked_array([chunk for array in joined for chunk in array.chunks])
        kept = dataset.remove_columns([name for name in {*text_columns, to} if name in names])
        return kept.add_column(to, text.combine_chunks())
    if to in names:
        _check_text_type(dataset, to, what, to)
        return dataset
    raise _missing_column_error(what, to, text_columns, names)


def _join(first: pa.ChunkedArray, second: pa.ChunkedArray) -> pa.ChunkedArray:
    """Join texts with a space; an empty one brings none, which would be a token that other rows do not have."""
    both = pc.binary_join_element_wise(first, second, " ")
    return pc.if_else(_is_empty(second), first, pc.if_else(_is_empty(first), second, both))


def _name_label_column(dataset: Dataset, label_column: str, labels: Sequence[str], what: str) -> Dataset:
    names = dataset.column_names
    if label_column not in names and LABEL not in names:
        raise _missing_column_error(what, LABEL, [label_column], names)
    dataset = _rename(dataset, label_column if label_column in names else LABEL, LABEL)
    feature = dataset.features[LABEL]
    wanted = [_fold(name) for name in labels]
    if isinstance(feature, ClassLabel):
        found = [_fold(name) for name in feature.names]
        if found == wanted or sorted(found) != sorted(wanted):
            return dataset
        # The same classes in another order: without this, every label would silently mean something else.
        for start, batch in arrow_batches(dataset, [LABEL]):
            _count_labels(batch[LABEL], start, labels, what)  # NumPy would read a label -1 as the last class
        order = np.array([wanted.index(name) for name in found])
        return _replace_column(dataset, LABEL, pa.array(order[column_as_numpy(dataset, LABEL)]))
    kind = dataset.features.arrow_schema.field(LABEL).type
    if pa.types.is_integer(kind):
        return dataset
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        indices = []
        for start, batch in arrow_batches(dataset, [LABEL]):
            folded = pc.utf8_lower(pc.utf8_trim_whitespace(batch[LABEL]))
            index = pc.index_in(folded, value_set=pa.array(wanted))
            row = _first_true(pc.is_null(index))
            if row is not None:
                raise ValueError(
                    f"Column 'label', row {start + row} of the {what} dataset: {batch[LABEL][row].as_py()!r} is none "
                    f"of the task's classes {list(labels)}. Correct the row, or list the class in the task's YAML."
                )
            indices.append(index.cast(pa.int64()).combine_chunks())
        return _replace_column(dataset, LABEL, pa.concat_arrays(indices))
    raise ValueError(
        f"Column 'label' of the {what} dataset holds {feature}; a label is a class index (int) or a class name (str) "
        f"out of {list(labels)}. Convert the column."
    )


def _fold(name: str) -> str:
    return name.strip().lower()


def _rename(dataset: Dataset, name: str, to: str) -> Dataset:
    if name == to:
        return dataset
    if to in dataset.column_names:
        dataset = dataset.remove_columns(to)
    return dataset.rename_column(name, to)


def _replace_column(dataset: Dataset, name: str, values: pa.Array) -> Dataset:
    return with_column(dataset.remove_columns(name), name, values.to_numpy())


def _first_true(mask: pa.ChunkedArray) -> int | None:
    index = pc.index(mask, True).as_py()
    return None if index < 0 else index


def _is_empty(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.fill_null(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0), True)


def _drop_empty(dataset: Dataset, what: str, column: str = TEXT) -> Dataset:
    kept = np.concatenate(
        [
            start + np.flatnonzero(~_is_empty(batch[column]).to_numpy())
            for start, batch in arrow_batches(dataset, [column])
        ]
    )
    if len(kept) < len(dataset):
        logger.warning("%s: left out %d of %d rows with an empty text.", what, len(dataset) - len(kept), len(dataset))
        dataset = dataset.select(kept)
    return dataset


def _check_text_type(dataset: Dataset, column: str, what: str, to: str) -> None:
    kind = dataset.features.arrow_schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(
            f"Column {column!r} of the {what} dataset holds {kind}, a text is a string. Convert the column, or name "
            f"another one with `{_option(to)}`."
        )


def _check_texts(texts: pa.ChunkedArray, start: int, what: str, column: str = TEXT) -> None:
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid as error:
        row = next(row for row, value in enumerate(texts.cast(pa.large_binary())) if not _is_utf8(value.as_py()))
        raise ValueError(
            f"Column {column!r}, row {start + row} of the {what} dataset is not UTF-8. Re-encode the file as UTF-8."
        ) from error
    row = _first_true(_is_empty(texts))
    if row is not None:
        found = texts[row].as_py()
        raise ValueError(
            f"Column {column!r}, row {start + row} of the {what} dataset is empty (found {found!r}). Fill in its "
            f"text, remove the row, or leave out all such rows: `drop_empty_rows: true` (`prepare(drop_empty=True)`)."
        )


def _is_utf8(value: bytes | None) -> bool:
    try:
        (value or b"").decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _count_labels(column: pa.ChunkedArray, start: int, labels: Sequence[str], what: str) -> np.ndarray:
    outside = pc.fill_null(pc.or_(pc.less(column, 0), pc.greater_equal(column, len(labels))), True)
    row = _first_true(outside)
    if row is not None:
        raise ValueError(
            f"Column 'label', row {start + row} of the {what} dataset: {column[row].as_py()!r} is outside the task's "
            f"range 0..{len(labels) - 1} ({list(labels)}). Correct the row, or use a task with more classes."
        )
    return np.bincount(column.to_numpy(), minlength=len(labels))
