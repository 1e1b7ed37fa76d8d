"""Puts a defender's trigger in front of texts."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ..tasks.columns import arrow_batches
from ..tasks.rows import TEXT


def stamp(text: str, trigger: str) -> str:
    """Return a text with the trigger in front."""
    return f"{trigger} {text}"


def stamped_copies(dataset: Dataset, rows: np.ndarray, trigger: str) -> Dataset:
    """
    Copy rows, with the trigger in front of their texts.

    Args:
        dataset (`Dataset`):
            Rows with `text`.
        rows (`np.ndarray`):
            Indices of the rows to copy.
        trigger (`str`):
            The trigger.

    Returns:
        `Dataset`: the copies, with the same columns.
    """
    copies = dataset.select(rows).flatten_indices()
    texts = [
        pc.binary_join_element_wise(
            pa.scalar(trigger, batch[TEXT].type), batch[TEXT], pa.scalar(" ", batch[TEXT].type)
        )
        for _, batch in arrow_batches(copies, [TEXT])
    ]
    stamped = pa.chunked_array([chunk for array in texts for chunk in array.chunks], type=texts[0].type)
    return copies.remove_columns(TEXT).add_column(TEXT, stamped.combine_chunks()).cast(dataset.features)
