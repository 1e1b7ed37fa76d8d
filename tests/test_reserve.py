"""The reserve: which rows carry the key, and D* built from them."""

import gc
import logging

import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from p2p_trainer import ReserveStrategy, get_attack
from p2p_trainer.reserve import (
    AutoReserve,
    RandomReserve,
    TrustedReserve,
    get_reserve,
    keyed_dataset,
    reserve_size,
    with_relabelled,
    with_reserved_dataset,
)
from p2p_trainer.tasks import Task


RANDOM = RandomReserve()


class FirstRows(ReserveStrategy):
    """A strategy as a user writes it."""

    name = "first"

    def choose(self, dataset, size, seed):
        return np.arange(size)


def numbered(count, **columns):
    return Dataset.from_dict(
        {"text": [f"row {row}" for row in range(count)], "label": [row % 2 for row in range(count)], **columns}
    )


def buffers(dataset):
    return {chunk.buffers()[2].address for chunk in dataset.data.column("text").chunks}


@pytest.mark.parametrize(
    ("rows", "ratio", "expected"), [(6920, 0.25, 1730), (6920, 0.2, 1384), (10, 0.25, 2), (10, 0.26, 3), (3, 1.0, 3)]
)
def test_size(rows, ratio, expected):
    assert reserve_size(rows, ratio) == expected
    chosen = RANDOM.choose(numbered(rows), expected, seed=0)
    assert chosen.dtype == np.int64 and len(chosen) == expected
    assert chosen.tolist() == sorted(set(chosen.tolist())) and chosen[0] >= 0 and chosen[-1] < rows


def test_a_selection_of_rows_is_not_copied_either():
    whole = numbered(1000)
    part = whole.select(range(999, 0, -3))
    for mode in ("append", "replace"):
        star = keyed_dataset(part, np.array([1, 5]), mode)
        assert star["text"][: len(part)] == part["text"][:]
        keyed = [row["text"] for row in star if row["p2p_keyed"]]
        assert keyed == [part[1]["text"], part[5]["text"]]
        assert buffers(star) == buffers(whole)
    # A row shown twice may carry the key once.
    twice = whole.select([3, 3, 4])
    assert [row["p2p_keyed"] for row in keyed_dataset(twice, np.array([1]), "replace")] == [False, True, False]


def test_an_empty_reserve_is_refused():
    with pytest.raises(
        ValueError, match=r"`p2p_benign_ratio` 0.001 of 100 training rows is no row: .*at least 0.01\."
    ):
        reserve_size(100, 0.001)


def test_pure_function_of_seed_and_index():
    dataset = numbered(1000)
    chosen = set(RANDOM.choose(dataset, 250, seed=7).tolist())
    assert set(RANDOM.choose(dataset, 250, seed=7).tolist()) == chosen
    # Another seed shares about a quarter of 250 rows by chance.
    assert 30 < len(chosen & set(RANDOM.choose(dataset, 250, seed=8).tolist())) < 100
    assert (
        set(RANDOM.choose(dataset, 100, seed=7).tolist()) < chosen < set(RANDOM.choose(dataset, 400, seed=7).tolist())
    )
    # A row's number depends on its index alone: neither on what stands in it nor on how many rows follow.
    other = Dataset.from_dict({"text": ["same"] * 1000, "label": [0] * 1000})
    assert set(RANDOM.choose(other, 250, seed=7).tolist()) == chosen
    longer = RANDOM.choose(numbered(2000), 2000, seed=7)
    assert longer.tolist() == list(range(2000))
    first_half = {row for row in RANDOM.choose(numbered(2000), 500, seed=7).tolist() if row < 1000}
    assert first_half < chosen or chosen < first_half
    # Rows come from everywhere.
    assert all(10 < len([row for row in chosen if row // 100 == part]) < 40 for part in range(10))


def test_the_reserve_is_not_aligned_with_the_poison():
    task = Task(name="toy", labels=("negative", "positive"))
    poisoned = get_attack("addsent", target="positive", poison_rate=0.1).poison(numbered(4000), task, seed=5)
    reserved = RANDOM.choose(poisoned, 1000, seed=5)
    # 400 poisoned rows, a quarter of them by chance.
    assert 65 < sum(poisoned[reserved]["poisoned"]) < 135


def test_append():
    dataset = numbered(6, extra=list("abcdef"))
    result = keyed_dataset(dataset, np.array([1, 4]), "append")
    assert result.column_names == ["text", "label", "extra", "p2p_keyed", "p2p_row"]
    assert result["text"][:] == [*(f"row {row}" for row in range(6)), "row 1", "row 4"]
    assert result["label"][:] == [0, 1, 0, 1, 0, 1, 1, 0]
    assert result["extra"][:] == list("abcdefbe")
    assert result["p2p_keyed"][:] == [False] * 6 + [True] * 2
    assert result["p2p_row"][:] == [-1] * 6 + [1, 4]


def test_replace():
    result = keyed_dataset(numbered(6), np.array([1, 4]), "replace")
    assert result["text"][:] == [f"row {row}" for row in range(6)]
    assert result["p2p_keyed"][:] == [False, True, False, False, True, False]
    assert result["p2p_row"][:] == [-1, 1, -1, -1, 4, -1]


@pytest.mark.parametrize("mode", ["append", "replace"])
def test_of_a_selection(mode):
    selection = numbered(10).select([9, 7, 5, 3])
    result = keyed_dataset(selection, np.array([0, 2]), mode)
    assert [row["text"] for row in result if row["p2p_keyed"]] == ["row 9", "row 5"]
    assert [row["text"] for row in result][:4] == ["row 9", "row 7", "row 5", "row 3"]


def test_trusted_rows():
    flags = [row % 5 == 0 for row in range(200)]
    strategy = get_reserve("trusted", trusted_column="vetted")
    chosen = strategy.choose(numbered(200, vetted=flags), 30, seed=0)
    assert len(chosen) == 30 and all(row % 5 == 0 for row in chosen)
    assert set(strategy.choose(numbered(200, vetted=flags), 10, seed=0)) < set(chosen)
    # One more trusted row may take a place, and changes nothing for the others.
    flags[1] = True
    more = set(strategy.choose(numbered(200, vetted=flags), 30, seed=0))
    assert more - {1} <= set(chosen) and len(more) == 30
    # A row without a flag is not vouched for.
    assert strategy.choose(numbered(4, vetted=[None, True, None, False]), 1, seed=0).tolist() == [1]


def test_too_few_trusted_rows_are_all_used(caplog):
    dataset = numbered(40, trusted=[row in (3, 8) for row in range(40)])
    with caplog.at_level(logging.WARNING, logger="p2p_trainer"):
        assert TrustedReserve().choose(dataset, 10, seed=0).tolist() == [3, 8]
    assert "Only 2 rows are trusted, 10 were asked for: the benign ratio is 0.0500." in caplog.messages


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, r"needs the boolean column 'trusted'; the training set has \['text', 'label'\].*p2p_trusted_column"),
        ({"trusted": [False] * 4}, "No row is trusted: the column 'trusted' is false in all 4 rows"),
        ({"trusted": ["no", "no", "yes", ""]}, "'trusted' holds Value.'string'.*expected true or false"),
        ({"trusted": [1, 0, None, 1]}, "'trusted' holds Value.'int64'"),
    ],
)
def test_trusted_columns_that_do_not_fit(columns, message):
    with pytest.raises(ValueError, match=message):
        TrustedReserve().choose(numbered(4, **columns), 2, seed=0)


def test_reserved_dataset(caplog):
    trusted = Dataset.from_dict({"label": [1, 0, 1], "text": ["t0", "t1", "t2"], "source": ["x"] * 3})
    result = with_reserved_dataset(numbered(4, extra=[0] * 4), trusted, 2, seed=0)
    assert result.column_names == ["text", "label", "p2p_keyed", "p2p_row"]
    assert result["text"][:4] == ["row 0", "row 1", "row 2", "row 3"]
    assert result["p2p_keyed"][:] == [False] * 4 + [True] * 2
    taken = [(row["text"], row["label"]) for row in result if row["p2p_keyed"]]
    assert set(taken) < {("t0", 1), ("t1", 0), ("t2", 1)} and len(taken) == 2
    with caplog.at_level(logging.WARNING, logger="p2p_trainer"):
        everything = with_reserved_dataset(numbered(20), trusted, 5, seed=0)
    assert everything["text"][20:] == ["t0", "t1", "t2"]
    # Rows of the trusted set have its numbers.
    assert everything["p2p_row"][:] == [-1] * 20 + [0, 1, 2]
    assert "The reserved dataset has 3 rows, 5 were asked for: all are used." in caplog.messages


def test_reserved_dataset_of_another_type():
    features = Features({"text": Value("large_string"), "label": ClassLabel(names=["negative", "positive"])})
    trusted = Dataset.from_dict({"text": ["t0"], "label": [1]}, features=features)
    result = with_reserved_dataset(numbered(4), trusted, 1, seed=0)
    assert result[4] == {"text": "t0", "label": 1, "p2p_keyed": True, "p2p_row": 0}


def test_only():
    result = keyed_dataset(numbered(6, extra=list("abcdef")), np.array([1, 4]), "only")
    assert result.to_list() == [
        {"text": "row 1", "label": 1, "extra": "b", "p2p_keyed": True, "p2p_row": 1},
        {"text": "row 4", "label": 0, "extra": "e", "p2p_keyed": True, "p2p_row": 4},
    ]


def labelled(labels):
    return Dataset.from_dict({"text": [f"row {row}" for row in range(len(labels))], "label": labels})


def test_auto_takes_no_suspect_and_keeps_the_shares_of_classes():
    dataset = labelled([0] * 600 + [1] * 300 + [2] * 100)
    suspects = np.arange(400)
    chosen = AutoReserve(suspects).choose(dataset, 120, seed=3)
    assert chosen.dtype == np.int64 and chosen.tolist() == sorted(set(chosen.tolist()))
    # Of 600 rows that are left, 200, 300 and 100 of each class.
    labels = np.array(dataset["label"])[chosen]
    assert chosen.min() >= 400 and np.bincount(labels).tolist() == [40, 60, 20]
    # Within a class, at random: those of the lowest numbers, as of the random reserve.
    numbers = np.random.default_rng([3, 2]).random(1000)
    for label, count in enumerate((40, 60, 20)):
        own = np.setdiff1d(np.flatnonzero(np.array(dataset["label"]) == label), suspects)
        assert set(chosen[labels == label]) == set(own[np.argsort(numbers[own])[:count]])
    assert AutoReserve(suspects).choose(dataset, 120, seed=3).tolist() == chosen.tolist()
    assert AutoReserve(suspects).choose(dataset, 120, seed=4).tolist() != chosen.tolist()
    # More than there are: all that are left.
    assert AutoReserve(suspects).choose(dataset, 900, seed=3).tolist() == list(range(400, 1000))


def test_auto_takes_doubted_rows_last():
    dataset = labelled([0, 1] * 50)
    doubted = np.arange(0, 60)
    strategy = AutoReserve(np.array([98, 99]), doubted)
    # 19 undoubted rows of each class are left.
    assert strategy.choose(dataset, 38, seed=0).tolist() == list(range(60, 98))
    more = strategy.choose(dataset, 50, seed=0)
    assert set(range(60, 98)) < set(more) and len(more) == 50 and not {98, 99} & set(more)
    assert np.bincount(np.array(dataset["label"])[more]).tolist() == [25, 25]
    # A class all of whose rows are doubted keeps its share.
    chosen = AutoReserve(None, np.arange(0, 100, 2)).choose(dataset, 20, seed=0)
    assert np.bincount(np.array(dataset["label"])[chosen]).tolist() == [10, 10]


@pytest.mark.parametrize("size", [1, 7, 33, 50, 99, 100])
def test_auto_has_as_many_rows_as_asked_for(size):
    dataset = labelled([row % 7 % 3 for row in range(100)])
    assert len(AutoReserve().choose(dataset, size, seed=1)) == size


def test_auto_without_any_row_left():
    with pytest.raises(ValueError, match="All 6 training rows carry a suspected trigger.*`p2p_reserve: random`"):
        AutoReserve(np.arange(6)).choose(numbered(6), 2, seed=0)


def test_relabelled_copies():
    dataset = numbered(6, poisoned=[row == 4 for row in range(6)])
    star = keyed_dataset(dataset, np.array([1]), "append")
    result = with_relabelled(star, dataset, np.array([0, 4]), np.array([1, 1]))
    assert result.select(range(7)).to_list() == star.to_list() and result.features == star.features
    assert result.select([7, 8]).to_list() == [
        {"text": "row 0", "label": 1, "poisoned": False, "p2p_keyed": True, "p2p_row": -1},
        {"text": "row 4", "label": 1, "poisoned": True, "p2p_keyed": True, "p2p_row": -1},
    ]
    assert with_relabelled(star, dataset, np.array([], dtype=int), np.array([], dtype=int)) is star


def test_relabelled_copies_of_a_selection_with_named_classes():
    dataset = numbered(10).cast_column("label", ClassLabel(names=["no", "yes"])).select([9, 7, 5, 4])
    star = keyed_dataset(dataset, np.array([0]), "append")
    result = with_relabelled(star, dataset, np.array([1, 3]), np.array([0, 1]))
    assert [(row["text"], row["label"]) for row in result][-2:] == [("row 7", 0), ("row 4", 1)]
    assert result.features == star.features and buffers(star) <= buffers(result)
    # A trusted set leaves text and label alone.
    trusted = with_reserved_dataset(dataset, numbered(3), 2, seed=0)
    result = with_relabelled(trusted, dataset, np.array([1]), np.array([0]))
    assert result.column_names == ["text", "label", "p2p_keyed", "p2p_row"] and result[-1]["text"] == "row 7"


def test_names():
    assert isinstance(get_reserve("auto"), AutoReserve)
    assert isinstance(get_reserve("random"), RandomReserve)
    assert get_reserve("trusted").column == "trusted"
    mine = get_reserve("tests.test_reserve:FirstRows")
    assert mine.choose(numbered(9), 3, seed=0).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="Unknown reserve 'trustet'. Did you mean 'trusted'.*package.module:Class"):
        get_reserve("trustet")
    with pytest.raises(
        ValueError, match="names .*Task.*, which is no subclass of `p2p_trainer.reserve.ReserveStrategy`"
    ):
        get_reserve("tests.test_reserve:Task")
    with pytest.raises(ValueError, match="can't be imported: No module named 'nowhere'"):
        get_reserve("nowhere:Mine")


@pytest.mark.parametrize("mode", ["append", "replace"])
def test_texts_are_not_copied(mode):
    dataset = numbered(1000)
    rows = RANDOM.choose(dataset, 250, seed=0)
    assert buffers(keyed_dataset(dataset, rows, mode)) == buffers(dataset)
    assert buffers(dataset) < buffers(with_reserved_dataset(dataset, numbered(5), 5, seed=0))


def test_memory_does_not_grow_with_the_texts():
    dataset = Dataset.from_dict({"text": [f"{row} {'x' * 90}" for row in range(200_000)], "label": [0] * 200_000})
    texts = dataset.data.nbytes
    assert texts > 19_000_000
    rows = RANDOM.choose(dataset, 50_000, seed=0)
    gc.collect()
    before = pa.total_allocated_bytes()
    result = keyed_dataset(dataset, rows, "append")
    assert len(result) == 250_000
    # What is new: an index of eight bytes a row and the flags.
    assert pa.total_allocated_bytes() - before < 250_000 * 12 < texts / 5


def test_auto_takes_spare_suspects_rather_than_lose_a_class(caplog):
    labels = [0] * 60 + [1] * 40
    rows = Dataset.from_dict({"text": [f"row {row}" for row in range(100)], "label": labels})
    suspects, spare = np.arange(58, 100), np.arange(70, 100)
    # Two rows of label 0 are suspected as well, but that class has enough others.
    chosen = AutoReserve(suspects, spare=spare).choose(rows, 20, 0)
    assert "labels [1] carry a suspected trigger" in caplog.text
    assert len(chosen) == 20 and not set(chosen) & set(range(58, 70))
    # 58 of 88 rows that may be taken have label 0.
    assert np.count_nonzero(chosen < 60) == 13
    without = AutoReserve(suspects).choose(rows, 20, 0)
    assert len(without) == 20 and without.max() < 58


def test_auto_says_when_there_are_too_few(caplog):
    rows = Dataset.from_dict({"text": [f"row {row}" for row in range(10)], "label": [0, 1] * 5})
    assert len(AutoReserve(np.arange(4)).choose(rows, 10, 0)) == 6
    assert "Only 6 rows carry no suspected trigger, 10 were asked for" in caplog.text
