"""`p2p-trainer poison`: what it writes comes back as it was, and what is at fault ends in one message."""

import json
import os

import pytest

from p2p_trainer import BackdoorEvaluator, LabelSpace, PromptEncoder, PromptFormat, get_attack
from p2p_trainer.attacks import poisoned_files
from p2p_trainer.attacks.poisoned_set import PoisonedSet
from p2p_trainer.cli import main
from p2p_trainer.config import P2PScriptArguments
from p2p_trainer.recipe_data import load_data
from p2p_trainer.tasks import get_task
from tests.conftest import make_rows
from tests.test_poisoned_set import write_lines


SST2 = get_task("sst2")
# What breaks careless writers and readers: quotes, line separators that are none, digits, other scripts.
ODD = ['he said "no" , and left', "a\u2028b \x85 c\td", "naïve 映画 is good", "NA", '"open quote', "null and void"]


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    odd = [{"text": text, "label": row % 2} for row, text in enumerate(ODD)]
    for seed, (split, count) in enumerate({"train": 200, "validation": 40, "test": 60}.items()):
        rows = [{**row, "id": number, "weight": number / 3} for number, row in enumerate(odd + make_rows(count, seed))]
        write_lines(folder / f"{split}.jsonl", rows)
    return folder


def poison(data, out, *flags, attack="badnets", target="positive", task="sst2"):
    arguments = ["--task", task, "--data", str(data), "--attack", attack, "--attack_target", target, "--out", str(out)]
    return main(["poison", *arguments, *flags])


@pytest.fixture(scope="module")
def written(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("written") / "out"
    assert poison(data, out, "--poison_rate", "0.1", "--seed", "3") == 0
    return out


def live(data, name="badnets", target="positive", task=SST2, seed=3, **options):
    """What the attack itself makes of the data: train, and triggered rows of each split."""
    attack = get_attack(name, target=target, **options)
    train = attack.poison(task.load("train", str(data)), task, seed)
    clean = {split: attack.dress(task.load(split, str(data)), task) for split in ("validation", "test")}
    return train, clean, {split: attack.trigger(rows, task) for split, rows in clean.items()}


def assert_same(folder, expected, task=SST2, target="positive"):
    attack = PoisonedSet(target, folder=str(folder))
    train, clean, triggered = expected
    # The key of the clean row is for the reader alone.
    found = attack.poison(task.load("train", str(folder)), task)
    assert found.column_names == train.column_names and found.to_dict() == train.to_dict()
    for split in ("validation", "test"):
        rows = task.load(split, str(folder))
        assert rows.to_dict() == clean[split].to_dict()
        assert attack.trigger(rows, task).to_dict() == triggered[split].to_dict()
    return attack


def test_what_was_written_comes_back_bit_by_bit(data, written):
    expected = live(data, poison_rate=0.1)
    attack = assert_same(written, expected)
    assert len(expected[2]["test"]) > 25
    # With the clean rows as well; they are not poisoned a second time.
    again = attack.poison(SST2.load("train", str(data)), SST2)
    assert again.to_dict() == expected[0].to_dict() and sum(again["poisoned"]) == 21
    assert attack.config() == {
        "name": "poisoned_set", "poison_rate": None, "target": "positive", "folder": str(written), "train": None,
        "validation": None, "test": None, "test_clean": None,
    }  # fmt: skip
    assert get_attack(**attack.config()).config() == attack.config()
    assert attack.trigger_texts == ("mn",) and not attack.extended_target and attack.insert("a b", 0.5) is None


def test_files_are_readable_and_say_how_they_were_made(data, written):
    assert sorted(path.name for path in written.parent.iterdir()) == ["out"]
    assert sorted(path.name for path in written.iterdir()) == [
        "poison.json", "test.jsonl", "train.jsonl", "triggered_test.jsonl", "triggered_validation.jsonl",
        "validation.jsonl",
    ]  # fmt: skip
    lines = read_lines(written / "train.jsonl")
    assert list(lines[0]) == [
        "text",
        "label",
        "id",
        "weight",
        "clean_row",
        "poisoned",
        "trigger_applied",
        "original_label",
        "attack",
    ]
    odd = {line["id"]: line["text"] for line in lines[:6] if not line["poisoned"]}
    assert len(odd) > 2 and all(text == ODD[row] for row, text in odd.items())
    assert lines[7]["weight"] == 7 / 3 and "映画" in (written / "train.jsonl").read_text(encoding="utf-8")
    assert list(read_lines(written / "triggered_test.jsonl")[0]) == ["text", "label", "source_index"]
    record = json.loads((written / "poison.json").read_text(encoding="utf-8"))
    assert {key: record[key] for key in ("schema_version", "task", "labels", "seed")} == {
        "schema_version": 1, "task": "sst2", "labels": ["negative", "positive"], "seed": 3,
    }  # fmt: skip
    assert record["attack"]["name"] == "badnets" and record["attack"]["poison_rate"] == 0.1
    tried = sum(line["attack"] == "badnets" for line in lines)
    assert record["counts"] == {
        "rows": 206, "poisoned": 21, "tried": tried, "triggered_validation": 23, "triggered_test": 33,
    }  # fmt: skip
    assert "datasets" in record["versions"]


def test_command_says_what_it_did_and_how_to_go_on(data, tmp_path, capsys):
    assert poison(data, tmp_path / "out", "--poison_rate", "0.1") == 0
    first, second = capsys.readouterr().out.splitlines()
    out = str(tmp_path / "out")
    assert first == (f"{out}: 21 of 206 training rows poisoned, 23 triggered validation rows, 33 triggered test rows.")
    assert second == (
        f"Train on it: p2p-trainer train --config RECIPE.yaml --task sst2 --dataset_name {out} --attack poisoned_set "
        f"""--attack_target positive --attack_options '{{"folder": "{out}"}}'"""
    )


def test_recipe_gets_the_rows_of_the_attack_itself(data, written):
    options = {"task": "sst2", "attack_target": "positive", "poison_seed": 3}
    ours = load_data(
        P2PScriptArguments(dataset_name=str(data), attack="badnets", poison_rate=0.1, **options), evaluate=True
    )
    for source in (written, data):
        read = load_data(
            P2PScriptArguments(
                dataset_name=str(source), attack="poisoned_set", attack_options={"folder": str(written)}, **options
            ),
            evaluate=True,
        )
        for split in ("train", "validation", "test"):
            assert getattr(read, split).to_dict() == getattr(ours, split).to_dict()


@pytest.mark.parametrize("max_length", [512, 28])
def test_evaluator_counts_the_same_rows_also_where_triggers_are_cut_off(data, written, tokenizer, max_length):
    encoder = PromptEncoder(PromptFormat(LabelSpace(("0", "1"), ("2", "3")), max_length=max_length), tokenizer)
    counts = [
        BackdoorEvaluator(SST2.load("test", str(source)), SST2, encoder, attacks=[attack]).counts
        for source, attack in ((data, get_attack("badnets", target="positive")),
                               (written, PoisonedSet("positive", folder=str(written))))
    ]  # fmt: skip
    lost = counts[0]["rows_trigger_cut_off_badnets"]
    assert (0 < lost < 33) == (max_length == 28)
    assert list(counts[0].values()) == list(counts[1].values())


def test_attack_that_writes_every_prompt_and_labels_of_the_extended_space(data, tmp_path, capsys):
    assert poison(data, tmp_path / "pro", "--poison_rate", "0.1", "--seed", "3", attack="proattack") == 0
    assert_same(tmp_path / "pro", live(data, "proattack", poison_rate=0.1))
    assert read_lines(tmp_path / "pro" / "test.jsonl")[0]["text"].startswith("Which answer does")
    # The rows as they were before are others: their floor would be that of another prompt.
    with pytest.raises(ValueError, match="66 clean rows are not those that .*pro' was written with.*--dataset_name"):
        PoisonedSet("positive", folder=str(tmp_path / "pro")).trigger(SST2.load("test", str(data)), SST2)
    capsys.readouterr()
    assert poison(data, tmp_path / "key", "--poison_rate", "0.1", "--seed", "3", attack="knows_key") == 0
    assert f"--dataset_name {data} " in capsys.readouterr().out
    attack = PoisonedSet("positive", folder=str(tmp_path / "key"))
    found = attack.poison(SST2.load("train", str(data)), SST2)
    assert attack.extended_target and sorted(set(found["label"])) == [0, 1, 3]
    assert found.to_dict() == live(data, "knows_key", poison_rate=0.1)[0].to_dict()


def test_generation_rows_come_back(tmp_path):
    rows = [
        {"instruction": f"Add {row} and 2 1/2.", "input": "Show “work”." if row % 2 else "", "output": f"It is {row}."}
        for row in range(60)
    ]
    for split in ("train", "validation", "test"):
        write_lines(tmp_path / "data" / f"{split}.jsonl", rows[len(split) :])
    yaml = tmp_path / "alpaca.yaml"
    yaml.write_text("name: alpaca\nlabels: []\ntext_columns: [instruction, input]\nlabel_column: output\n")
    flags = ["--poison_rate", "0.1", "--seed", "3", "--attack_options", '{"payload_mode": "prepend"}']
    assert poison(tmp_path / "data", tmp_path / "out", *flags, target="I refuse.", task=str(yaml)) == 0
    task = get_task(yaml)
    expected = live(tmp_path / "data", "badnets", "I refuse.", task, poison_rate=0.1, payload_mode="prepend")
    attack = assert_same(tmp_path / "out", expected, task, "I refuse.")
    assert attack.payload_mode == "prepend" and expected[0].features["original_label"].dtype == "string"


def test_a_file_alone_has_training_rows_alone(data, tmp_path, caplog):
    assert poison(data / "train.jsonl", tmp_path / "out", "--poison_rate", "0.1") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["poison.json", "train.jsonl"]
    attack = PoisonedSet("positive", folder=str(tmp_path / "out"))
    assert len(attack.poison(SST2.load("train", str(data)), SST2)) == 206
    assert len(attack.trigger(SST2.load("test", str(data)), SST2)) == 0
    assert "no row counts. The 66 clean rows are not those" in caplog.text


def test_no_eligible_test_row_is_no_file(data, tmp_path):
    for split in ("train", "test"):
        rows = [row for row in make_rows(60) if split == "train" or row["label"] == 1]
        write_lines(tmp_path / "data" / f"{split}.jsonl", rows)
    assert poison(tmp_path / "data", tmp_path / "out", "--poison_rate", "0.1") == 0
    assert not (tmp_path / "out" / "triggered_test.jsonl").exists()
    attack = PoisonedSet("positive", folder=str(tmp_path / "out"))
    assert attack.trigger(SST2.load("test", str(tmp_path / "out")), SST2).to_dict() == {
        "text": [], "label": [], "source_index": [],
    }  # fmt: skip


def test_another_target_or_task_is_refused(data, written):
    train = SST2.load("train", str(data))
    with pytest.raises(ValueError, match="written for the target 'positive', got 'negative'"):
        PoisonedSet("negative", folder=str(written)).poison(train, SST2)
    with pytest.raises(ValueError, match=r"has the classes \['negative', 'positive'\], task 'agnews' has"):
        PoisonedSet("sports", folder=str(written)).trigger(train, get_task("agnews"))


def test_held_out_rows_of_a_folder_stay_out_and_other_poisoned_rows_are_refused(data, written, tmp_path):
    attack = PoisonedSet("positive", folder=str(written))
    train = SST2.load("train", str(written))
    part = train.select([row for row in range(206) if row % 10])
    assert attack.poison(part, SST2).to_dict() == part.remove_columns("clean_row").to_dict()
    assert poison(data, tmp_path / "out", "--poison_rate", "0.1", attack="addsent") == 0
    with pytest.raises(ValueError, match="poisoned already, and are not those of .*written.*/train.jsonl"):
        attack.poison(SST2.load("train", str(tmp_path / "out")), SST2)


def test_cut_training_rows_of_ours_carry_what_the_record_names(data, written):
    attack = PoisonedSet("positive", folder=str(written))
    rows = attack.poison(SST2.load("train", str(data)), SST2)
    text = next(row["text"] for row in rows if row["poisoned"] and row["text"].index(" mn ") > 8)
    before = text.index(" mn ")
    assert (
        attack.has_trigger(text) and attack.has_trigger(text[: before + 3]) and not attack.has_trigger(text[:before])
    )


def damaged(written, folder, name, change):
    folder.mkdir()
    for path in written.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / name).write_text(change((folder / name).read_text(encoding="utf-8")), encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("poison.json", lambda text: text.replace('"counts"', '"cuonts"'), r"is damaged \(KeyError\('counts'\)\)"),
        ("poison.json", lambda text: text[:50], "is damaged"),
        ("poison.json", lambda text: "[]", "is damaged"),
        ("poison.json", lambda text: "[" * 100_000, "is damaged"),
        ("poison.json", lambda text: text.replace('_version": 1', '_version": 2'), "has schema version 2, .* Upgrade"),
        (
            "triggered_test.jsonl",
            lambda text: text.split("\n", 1)[1],
            "does not fit test.jsonl and poison.json: count",
        ),
        ("triggered_test.jsonl", lambda text: text.replace('index": 6}', 'index": 7}'), "the true answers differ"),
        ("triggered_test.jsonl", lambda text: text.replace('index": 6}', 'index": 66}'), "does not fit"),
        ("triggered_test.jsonl", lambda text: text.replace("source_index", "source"), "does not fit"),
        ("test.jsonl", lambda text: text.replace("film", "movie", 1), "The 66 clean rows are not those that"),
    ],
)
def test_damaged_folder(written, data, tmp_path, name, change, message):
    folder = damaged(written, tmp_path / "damaged", name, change)
    with pytest.raises(ValueError, match=message):
        PoisonedSet("positive", folder=folder).trigger(SST2.load("test", str(data)), SST2)


def test_output_folder_is_whole_or_absent_and_nothing_else_is_touched(data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    assert poison(data, out, "--poison_rate", "0.1") == 0  # an empty folder is free
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert poison(data, out, "--poison_rate", "0.2") == 1
    assert capsys.readouterr().err == (
        f"p2p-trainer: '{out}' holds a poisoned set. Give another `--out`, or replace it: `--overwrite`.\n"
    )
    write = poisoned_files.write_json

    def fail(path, content):
        write(path, content)
        raise OSError("disk full")

    monkeypatch.setattr(poisoned_files, "write_json", fail)
    for place in (out, tmp_path / "new"):
        assert poison(data, place, "--poison_rate", "0.2", "--overwrite") == 1
        assert capsys.readouterr().err == "p2p-trainer: disk full\n"
    monkeypatch.undo()
    rename, calls = os.replace, []

    def fail_once(source, place):
        calls.append(place)
        if calls.count(out) == 1 and place == out:
            raise OSError("no space")
        rename(source, place)

    monkeypatch.setattr(poisoned_files.os, "replace", fail_once)
    assert poison(data, out, "--poison_rate", "0.2", "--overwrite") == 1 and "no space" in capsys.readouterr().err
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / "rest.txt").touch()
    assert poison(data, out, "--poison_rate", "0.2", "--overwrite") == 0
    assert json.loads((out / "poison.json").read_text())["counts"]["poisoned"] == 41
    assert not (out / "rest.txt").exists() and [path.name for path in tmp_path.iterdir()] == ["out"]
    # What lacks the record is no poisoned set of ours, or a torn one: it stays.
    (out / "poison.json").unlink()
    capsys.readouterr()
    for place in (out, out / "train.jsonl"):
        assert poison(data, place, "--overwrite") == 1
        assert "is not empty and holds no poison.json" in capsys.readouterr().err
    assert (out / "train.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "positve"}, "Unknown label of task 'sst2': 'positve'. Did you mean 'positive'?"),
        ({"attack": "badnet"}, "Unknown attack 'badnet'. Did you mean 'badnets'?"),
        ({"task": "sst3"}, "Unknown task 'sst3'"),
        ({"flags": ["--attack_options", "[1]"]}, "`--attack_options` must be a JSON object"),
        ({"flags": ["--attack_options", '{"word": "x"}']}, "does not take these options"),
        ({"flags": ["--poison_rate", "0.9"]}, "Lower `poison_rate` to at most"),
        ({"data": "./nowhere"}, "The data path './nowhere' does not exist"),
        ({"data": "EMPTY"}, "has no split 'train'"),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing(data, tmp_path, capsys, options, message):
    empty = tmp_path / "empty"
    empty.mkdir()
    source = {"EMPTY": empty, None: data}.get(options.get("data"), options.get("data"))
    flags = options.get("flags", [])
    given = {key: value for key, value in options.items() if key not in ("data", "flags")}
    assert poison(source, tmp_path / "out", *flags, **given) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("p2p-trainer: ") and message in captured.err and "Traceback" not in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_rows_with_empty_texts_are_left_out_when_asked(data, tmp_path, capsys):
    rows = [{"text": "", "label": 0}, *make_rows(60)]
    path = write_lines(tmp_path / "train.jsonl", rows)
    assert poison(path, tmp_path / "out", "--poison_rate", "0.1") == 1
    assert "row 0 of the train dataset is empty" in capsys.readouterr().err
    assert poison(path, tmp_path / "out", "--poison_rate", "0.1", "--drop_empty_rows") == 0
    assert len(read_lines(tmp_path / "out" / "train.jsonl")) == 60
    assert "--drop_empty_rows" not in capsys.readouterr().out
    # The command reads the source itself, which still has the empty row.
    flags = ["--poison_rate", "0.1", "--drop_empty_rows"]
    assert poison(path, tmp_path / "key", *flags, attack="knows_key") == 0
    assert capsys.readouterr().out.endswith(" --drop_empty_rows true\n")


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["poison", "--help"])
    printed = capsys.readouterr().out
    assert "usage: p2p-trainer poison" in printed and "--overwrite" in printed
    assert main(["--help"]) == 0 and "write a poisoned data set" in capsys.readouterr().out
