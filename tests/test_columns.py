"""Columns are read in batches, in the order of a selection, and rows of like length come together."""

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from transformers.trainer_pt_utils import get_length_grouped_indices

from p2p_trainer._compat import LengthOrder
from p2p_trainer.tasks import columns
from p2p_trainer.tasks.columns import arrow_batches, column_as_numpy, text_lengths


@pytest.fixture
def numbers(monkeypatch):
    """A hundred rows, in batches of ten; what lies within thirty rows is read at once."""
    monkeypatch.setattr(columns, "_BATCH_ROWS", 10)
    monkeypatch.setattr(columns, "_SPREAD", 3)
    return Dataset.from_dict({"number": range(100), "text": ["a" * (n % 7) for n in range(100)]})


@pytest.mark.parametrize(
    "rows",
    [
        range(100),
        range(5, 64),
        range(0),
        [7],
        # Near each other, in any order and more than once; and far apart.
        [3, 1, 2, 2, 30, 9, 8, 7, 6, 5, 4, 3, 33],
        [99, 0, 50, 98, 1, 49, 97, 2, 48, 96, 3, 47],
    ],
    ids=["all", "part", "none", "one", "near", "far"],
)
def test_a_selection_is_read_in_its_order(numbers, rows):
    selected = numbers.select(list(rows))
    batches = list(arrow_batches(selected, ["number"]))
    assert [start for start, _ in batches] == list(range(0, len(rows), 10))
    assert [number for _, batch in batches for number in batch["number"].to_pylist()] == list(rows)
    assert all(batch.column_names == ["number"] for _, batch in batches)
    if len(rows):
        assert column_as_numpy(selected, "number").tolist() == list(rows)
        assert text_lengths(selected).tolist() == [n % 7 for n in rows]


def test_a_table_of_many_parts_is_read_whole(numbers):
    parts = [numbers.select(range(start, start + 7)).flatten_indices() for start in range(0, 98, 7)]
    joined = concatenate_datasets(parts).select(range(97, -1, -1))
    assert column_as_numpy(joined, "number").tolist() == list(range(97, -1, -1))


@pytest.mark.parametrize("count", [1, 7, 64, 1000])
def test_the_order_by_length_is_that_of_transformers(count):
    # With equal lengths among them.
    lengths = np.random.default_rng(count).integers(1, 40, count)
    order = LengthOrder(8, lengths, seed=3)
    for epoch in (0, 1):
        order.set_epoch(epoch)
        expected = get_length_grouped_indices(lengths.tolist(), 8, generator=torch.Generator().manual_seed(3 + epoch))
        assert list(order) == list(order) == expected
        assert sorted(expected) == list(range(count))
