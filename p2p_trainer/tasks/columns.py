"""Reads and adds whole columns: no per-row Python, and memory that does not grow with the data."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from .._compat import row_index


_BATCH_ROWS = 65_536
# Up to so many batches' worth of rows are read for one batch of a selection.
_SPREAD = 8


def arrow_batches(dataset: Dataset, columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
    """Read columns in Arrow batches, each with the index of its first row."""
    view = dataset.select_columns(columns).with_format("arrow")
    rows = row_index(dataset)
    for start in range(0, len(dataset), _BATCH_ROWS):
        part = slice(start, min(start + _BATCH_ROWS, len(dataset)))
        if rows is None or np.ptp(rows[part]) > _SPREAD * _BATCH_ROWS:
            yield start, view[part]
        else:
            # `datasets` gathers a selection row by row: sixty times as long, where the rows stand near each other.
            first = rows[part].min()
            yield start, view.data.fast_slice(first, np.ptp(rows[part]) + 1).take(rows[part] - first)


def column_as_numpy(dataset: Dataset, column: str) -> np.ndarray:
    """Read one column as a NumPy array without going through Python objects."""
    batches = [batch[column].to_numpy() for _, batch in arrow_batches(dataset, [column])]
    return np.concatenate(batches) if batches else np.array([])


def text_lengths(dataset: Dataset, columns: Sequence[str] = ("text",)) -> np.ndarray:
    """Say how many bytes the texts of each row have."""
    batches = arrow_batches(dataset, list(columns))
    return np.concatenate([sum(pc.binary_length(batch[name]).to_numpy() for name in columns) for _, batch in batches])


def with_column(dataset: Dataset, name: str, values: np.ndarray) -> Dataset:
    """
    Add a column; other columns are not copied, even where the data set is a selection of rows.

    Args:
        dataset (`Dataset`):
            Rows.
        name (`str`):
            Name of the column.
        values (`np.ndarray`):
            One value per row.

    Returns:
        `Dataset`: the rows with the column.
    """
    rows = row_index(dataset)
    if rows is None:
        return dataset.add_column(name, values)
    if len(np.unique(rows)) < len(rows):
        # A row that is shown twice may have two values.
        return dataset.flatten_indices().add_column(name, values)
    table = Dataset(dataset.data, info=dataset.info.copy())
    spread = np.zeros(len(table), dtype=values.dtype)
    spread[rows] = values
    return table.add_column(name, spread).select(rows)
