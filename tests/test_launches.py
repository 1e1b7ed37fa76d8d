"""Processes that fail end the run, with their own message; and what is trained on does not depend on their number."""

import collections
import json

import pytest

from p2p_trainer import launch
from tests.launching import forked, job, make_model


FAILURES = {"training": 1, "evaluation": 1, "saving": 0}
SHORT = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
BY_LENGTH = {"num_train_epochs": 2, "train_sampling_strategy": "group_by_length"}


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("launches")
    make_model(folder / "model", tokenizer)
    return folder


@pytest.fixture(scope="module")
def ended(folder):
    """How the processes of each run ended."""
    model, runs = str(folder / "model"), {}
    for where, rank in FAILURES.items():
        path = job(model, folder / where, 8, fail={"rank": rank, "where": where}, **SHORT)
        runs[where] = [["--config", path]] * 2
    path = job(model, folder / "reading", 8)
    # A machine that does not see the data.
    runs["reading"] = [["--config", path], ["--config", path, "--dataset_name", folder / "nowhere"]]
    # Processes that draw different numbers of random numbers, and workers that are started once.
    changes = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "lora_dropout": 0.2}
    path = job(model, folder / "by_length", 8, **BY_LENGTH, **changes)
    runs["by_length"] = [["--config", path]] * 2
    return forked(runs, folder)


@pytest.mark.parametrize(("where", "rank"), FAILURES.items())
def test_a_process_that_fails_ends_the_run(ended, folder, where, rank):
    failed, other = ended[where][rank], ended[where][1 - rank]
    assert failed[0] == 1 and failed[2].rstrip().endswith(f"MemoryError: no room for {where}")
    # At once, not when a collective has waited for half an hour.
    assert other[0] == 1 and other[1] - failed[1] < 30 and "Connection closed by peer" in other[2]
    assert not (folder / where / "out" / "results.json").exists()


def test_a_process_that_can_not_read_ends_the_run(ended, folder):
    other, failed = ended["reading"]
    assert (failed[0], other[0]) == (1, 1) and other[1] - failed[1] < 30
    assert not (folder / "reading" / "out" / "results.json").exists()


def test_a_process_that_can_not_read_says_so(ended, folder):
    assert f"The data path '{folder / 'nowhere'}' does not exist" in ended["reading"][1][2]


def seen(folder):
    """How often each row was collated, as written in each epoch."""
    lines = [line for path in folder.glob("seen-*.jsonl") for line in path.read_text().splitlines()]
    return collections.Counter(lines)


def test_rows_do_not_depend_on_processes_or_workers(ended, folder):
    assert [process[0] for process in ended["by_length"]] == [0, 0], ended["by_length"][0][2][-3000:]
    launch.main(["--config", str(job(str(folder / "model"), folder / "alone", 16, **BY_LENGTH))])
    found, alone = seen(folder / "by_length"), seen(folder / "alone")
    # Each of the 416 rows once in each epoch.
    assert found == alone and set(alone.values()) == {1} and len(alone) == 2 * 416
    epochs = [[json.loads(line) for line in alone if line.startswith(f"[{epoch},")] for epoch in (0, 1)]
    # The reserved rows, which alone may be written into, and the contradicted ones.
    reserved = [{row: text for _, row, keyed, _, text in rows if keyed and row >= 0} for rows in epochs]
    assert [len(rows) for rows in reserved] == [71, 71] and reserved[0].keys() == reserved[1].keys()
    assert [sum(keyed for _, _, keyed, _, _ in rows) for rows in epochs] == [71 + 45, 71 + 45]
    # What is written into them is another in each epoch.
    assert reserved[0] != reserved[1] and any("mn" in text.split() for text in reserved[0].values())
