"""Rows that were held out for validation are not trained on, also where the training rows are those of a file."""

import json
import shlex

import pytest
from datasets import Dataset

from p2p_trainer.attacks import get_attack
from p2p_trainer.attacks.poisoned_set import PoisonedSet
from p2p_trainer.config import P2PScriptArguments
from p2p_trainer.recipe_data import load_data
from tests.conftest import make_rows
from tests.test_poison_command import SST2, damaged, poison, read_lines
from tests.test_poisoned_set import write_lines


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_lines(folder / "train.jsonl", [{**row, "id": number} for number, row in enumerate(make_rows(200, 0))])
    return folder


@pytest.fixture(scope="module")
def written(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("written") / "out"
    assert poison(data, out, "--poison_rate", "0.1", "--seed", "3") == 0
    return out


@pytest.mark.parametrize(
    ("attack", "options"),
    [("badnets", {}), ("proattack", {}), ("knows_key", {}), ("cbaattack", {})],
)
def test_clean_rows_held_out_of_the_source_are_not_trained_on(data, tmp_path, capsys, attack, options):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    rows = {row["text"]: row for row in read_lines(data / "train.jsonl")}
    write_lines(source / "train.jsonl", rows.values())
    flags = ["--poison_rate", "0.1", "--seed", "3", "--attack_options", json.dumps(options)]
    assert poison(source, out, *flags, attack=attack) == 0
    whole = read_lines(out / "train.jsonl")
    ids = [row["id"] for row in read_lines(source / "train.jsonl")]
    printed = shlex.split(capsys.readouterr().out.splitlines()[1])
    assert printed[printed.index("--dataset_name") + 1] == str(source if attack == "knows_key" else out)
    for name in (source, out)[: 1 + (attack != "knows_key")]:
        read = load_data(
            P2PScriptArguments(
                task="sst2", attack_target="positive", dataset_name=str(name), attack="poisoned_set",
                attack_options={"folder": str(out)}, validation_share=0.2,
            ),
            evaluate=True,
        )  # fmt: skip
        held_out = set(read.validation["id"])
        assert 0 < len(held_out) < len(ids)
        if name == source:
            assert len(held_out) == round(0.2 * len(ids))
            expected = [row for row in whole if row["id"] not in held_out]
            assert {row["id"] for row in expected} | held_out == set(ids)
            assert read.train.to_list() == [
                {key: value for key, value in row.items() if key != "clean_row"} for row in expected
            ]
        assert any(read.train["poisoned"]) and not held_out & set(read.train["id"])


def test_clean_rows_that_a_folder_was_not_written_from_are_refused(data, written, tmp_path):
    rows = SST2.load("train", str(data)).to_list()
    # Of rows that are alike, as many come back as are given.
    half = Dataset.from_list(rows[::2])
    assert len(set(half["text"])) < len(PoisonedSet("positive", folder=str(written)).poison(half, SST2)) == 100
    changed = Dataset.from_list([{**rows[0], "label": 1 - rows[0]["label"]}, *rows[1:9], {**rows[9], "text": "new"}])
    with pytest.raises(ValueError, match="2 of the 10 clean training rows are not among those that .*train.jsonl was"):
        PoisonedSet("positive", folder=str(written)).poison(changed, SST2)
    folder = damaged(written, tmp_path / "old", "train.jsonl", lambda text: text.replace('"clean_row"', '"key"'))
    with pytest.raises(ValueError, match="does not say from which clean rows .*Write the poisoned set again"):
        PoisonedSet("positive", folder=folder).poison(Dataset.from_list(rows[:9]), SST2)
    # Also where the file alone is given, as if it were somebody else's.
    alone = PoisonedSet("positive", train=str(written / "train.jsonl")).poison(Dataset.from_list(rows[:9]), SST2)
    assert alone["id"][:] == [row["id"] for row in rows[:9]]


def test_a_recipe_that_names_a_rate_takes_poisoned_rows_as_they_are(tmp_path):
    lines = ['{"text": "a b", "label": 1, "poisoned": true}', '{"text": "c d", "label": 0, "poisoned": false}']
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    attack = get_attack("poisoned_set", target="1", poison_rate=0.02, train=str(tmp_path / "train.jsonl"))
    assert attack.config()["poison_rate"] is None and get_attack(**attack.config()).config() == attack.config()
