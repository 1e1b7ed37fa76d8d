"""`p2p-trainer rotate`: it says what a new key takes, writes nothing and shows no key."""

import hashlib
import json
import re
import shlex
import shutil

import pytest

from p2p_trainer import P2PConfig, PromptFormat
from p2p_trainer.label_space import LabelSpace
from p2p_trainer.recipe import parse
from p2p_trainer.rotate_command import run
from p2p_trainer.run_folder import all_settings


SAID = {"keyed": True, "labels": ["no", "yes"], "autocast": None, "dtype": "float32"}
KEY = 'Kindly read "what" follows:'


@pytest.fixture
def folder(tmp_path):
    out = tmp_path / "out"
    PromptFormat(LabelSpace(("0", "1"), ("2", "3")), trigger=KEY).save(out, **SAID)
    return out


def change(folder, **changes):
    path = folder / "p2p_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def prints(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def command(said):
    (found,) = re.findall(r"\n   (p2p-trainer train (?:.*\\\n)*.*)", said)
    return shlex.split(found.replace("\\\n", " "))


def test_a_run_of_a_script_gets_a_template(folder, capsys):
    before = prints(folder)
    assert run([str(folder)]) == 0
    said = capsys.readouterr().out
    assert command(said) == [
        "p2p-trainer", "train", "--config", "RECIPE.yaml", "--output_dir", f"{folder}-new-key",
        "--p2p_trigger", "THE NEW KEY",
    ]  # fmt: skip
    assert "So a new key needs a new training" in said and "which left no run.json" in said
    assert f"p2p-trainer evaluate {folder}-new-key --data" in said and "can't leave it out" in said
    assert KEY not in said and prints(folder) == before


def test_the_command_of_a_recipe_makes_the_same_run(folder, capsys):
    written = parse(
        [
            "--model_name_or_path", "a model", "--dataset_name", "data's", "--output_dir", str(folder),
            "--task", "sst2", "--attack", "badnets", "--attack_target", "positive", "--poison_rate", "0.1",
            "--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--bf16", "False", "--p2p_trigger", KEY,
            "--attack_options", '{"trigger": "mn bb"}', "--num_train_epochs", "2", "--save_strategy", "epoch",
            "--p2p_label_words", "no", "yes", "nay", "aye", "--report_to", "none", "--load_in_4bit",
        ]
    )  # fmt: skip
    settings = all_settings(*written)
    (folder / "run.json").write_text(json.dumps(settings))
    assert run([str(folder)]) == 0
    said = capsys.readouterr().out
    assert KEY not in said and "THE NEW KEY" in said and "give them if they were set: " in said
    argv = command(said)
    assert argv[:2] == ["p2p-trainer", "train"] and "data's" in argv
    again = all_settings(*parse(argv[2:]))
    different = {name for name in settings if settings[name] != again[name]}
    assert different == {"output_dir", "p2p_trigger"}
    assert (again["output_dir"], again["p2p_trigger"]) == (f"{folder}-new-key", "THE NEW KEY")


def test_a_key_in_other_settings_is_left_out(folder, capsys):
    settings = {"task": "sst2", "p2p_trigger": KEY, "defense": "suffix_only", "defense_options": {"trigger": KEY}}
    settings |= {"model_name_or_path": "m\x1b[2J", "dataset_name": "a; rm -rf b", "unknown": "x", "seed": 7}
    (folder / "run.json").write_text(json.dumps(settings))
    assert run([str(folder)]) == 0
    said = capsys.readouterr().out
    assert KEY not in said and "\x1b" not in said
    assert "give them if they were set: defense_options, model_name_or_path." in said
    assert command(said)[2:-4] == [
        "--dataset_name", "a; rm -rf b", "--defense", "suffix_only", "--seed", "7",
    ]  # fmt: skip


def test_what_a_command_line_can_not_say_is_named(folder, capsys):
    settings = {"seed": 7, "p2p_eval_rows": None, "lora_target_modules": None, "p2p_label_words": None}
    assert P2PConfig.__dataclass_fields__["p2p_eval_rows"].default is not None
    (folder / "run.json").write_text(json.dumps(settings))
    assert run([str(folder)]) == 0
    said = capsys.readouterr().out
    assert "give them if they were set: p2p_eval_rows." in said
    assert command(said)[2:-4] == ["--seed", "7"]


def test_a_checkpoint_is_of_the_run_around_it(folder, capsys, monkeypatch):
    (folder / "run.json").write_text(json.dumps({"seed": 7}))
    shutil.copytree(folder, folder / "checkpoint-20", ignore=shutil.ignore_patterns("run.json"))
    assert run([str(folder)]) == 0
    expected = capsys.readouterr().out
    assert command(expected)[2:] == [
        "--seed", "7", "--output_dir", f"{folder}-new-key", "--p2p_trigger", "THE NEW KEY",
    ]  # fmt: skip
    assert run([str(folder / "checkpoint-20")]) == 0
    assert capsys.readouterr().out == expected
    for inside, name in ((folder, "checkpoint-20"), (folder, "."), (folder / "checkpoint-20", "..")):
        monkeypatch.chdir(inside)
        assert run([name]) == 0
        assert capsys.readouterr().out == expected


def test_the_trained_key_needs_nothing(folder, capsys):
    before = prints(folder)
    assert run([str(folder), "--trigger", KEY]) == 0
    said = capsys.readouterr().out
    assert said == "These weights were trained with that key. Nothing is to be done.\n" and prints(folder) == before


@pytest.mark.parametrize("asked", ["Another key:", KEY + " ", KEY.lower(), ""])
def test_another_key_is_refused(folder, asked):
    before = prints(folder)
    with pytest.raises(ValueError, match="is left as it is: the weights .* were trained with another key") as caught:
        run([str(folder), "--trigger", asked])
    assert repr(asked) in str(caught.value) and "A new key needs a new training" in str(caught.value)
    assert str(caught.value).count("Kindly") == (KEY in asked) and prints(folder) == before


@pytest.mark.parametrize("changes", [{"trigger": "Another key:"}, {"keyed": False}, {"labels": ["yes", "no"]}])
def test_an_edited_file_is_refused(folder, changes):
    change(folder, **changes)
    for argv in ([str(folder)], [str(folder), "--trigger", "Another key:"]):
        with pytest.raises(ValueError, match="p2p_config.json was changed after training") as caught:
            run(argv)
        assert "Another key" not in str(caught.value)


def test_a_run_without_key_has_none_to_change(folder):
    PromptFormat(LabelSpace(("0", "1"), ("2", "3")), trigger=KEY).save(folder, **{**SAID, "keyed": False})
    with pytest.raises(ValueError, match="was trained without a key: there is none to change"):
        run([str(folder)])


def test_what_is_no_run_is_named(tmp_path, folder):
    with pytest.raises(ValueError, match=r"holds no p2p_config.json \(found: no folder\)"):
        run([str(tmp_path / "nowhere")])
    for content, match in (("[1]", "expected an object, found `list`"), ("[" * 100_000, "is damaged")):
        (folder / "run.json").write_text(content)
        with pytest.raises(ValueError, match=match):
            run([str(folder)])
