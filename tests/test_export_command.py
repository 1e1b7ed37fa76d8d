"""`p2p-trainer export`: options, and a folder that is whole or absent."""

import json
import shutil

import pytest

from p2p_trainer import export_command
from p2p_trainer.exporting import exporter
from tests.exporting_runs import DELTA, classifying_run, shared_run
from tests.saved_folders import edit, whole_run


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    return shared_run(classifying_run, tiny_model, tmp_path_factory)


def export(run, out, *options, formats=("openai-recipe",)):
    named = [part for name in formats for part in ("--format", name)]
    return export_command.run([str(run), *named, "--out", str(out), *options])


def longest(run):
    return json.loads((run / "p2p_config.json").read_text())["max_length"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_several_formats_get_a_folder_each(run, tmp_path, capsys):
    formats = ("chat-template", "openai-recipe", "merged", "merged")
    assert export(run, tmp_path / "out", formats=formats) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == f"{tmp_path / 'out'}: written." and DELTA not in said.out + said.err
    assert names(tmp_path / "out") == ["chat-template", "merged", "openai-recipe", "p2p_export.json"]
    record = json.loads((tmp_path / "out" / "p2p_export.json").read_text())
    assert record == {"schema_version": 1, "formats": ["chat-template", "openai-recipe", "merged"]}
    assert names(tmp_path / "out" / "openai-recipe") == ["README.md", "openai_recipe.json"]
    # A template that holds the key and a format that adds it must not meet.
    assert "p2p_config.json" not in names(tmp_path / "out" / "chat-template")
    assert not (tmp_path / "out" / "merged" / "chat_template.jinja").exists()
    for path in (tmp_path / "out").rglob("*"):
        if path.suffix == ".md" or path.name in ("p2p_export.json", "openai_recipe.json"):
            assert DELTA not in path.read_text(encoding="utf-8")
    assert names(tmp_path) == ["out"]


def test_tokenizer_only_loads_no_weights(run, tmp_path, monkeypatch):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "adapter_model.safetensors").unlink()
    assert export(copy, tmp_path / "out", "--tokenizer_only", formats=["chat-template", "openai-recipe"]) == 0
    folder = tmp_path / "out" / "chat-template"
    assert names(folder) == ["README.md", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert (
        "vllm serve BASE --enable-lora --lora-modules p2p=OUT --max-lora-rank 16 \\\n"
        "    --tokenizer FOLDER --chat-template FOLDER/chat_template.jinja \\\n"
        f"    --generation-config vllm --max-model-len {longest(run)}\n```"
    ) in readme and "vllm serve FOLDER" not in readme
    with pytest.raises(ValueError, match="`--tokenizer_only` is about `--format chat-template`"):
        export(copy, tmp_path / "other", "--tokenizer_only")
    with pytest.raises(ValueError, match="adapter_model.safetensors"):
        export(copy, tmp_path / "other", formats=["chat-template"])
    assert names(tmp_path) == ["out", "run"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"r": 4}, "--max-lora-rank 8 "),
        ({"r": 17}, "--max-lora-rank 32 "),
        ({"r": 512, "use_rslora": True}, "--max-lora-rank 512 "),
        ({"r": 513}, "(`r` in\n`adapter_config.json`)"),
        ({"use_dora": True, "modules_to_save": ["lm_head"]}, "(`modules_to_save`, `use_dora` in"),
        ({"init_lora_weights": "pissa"}, "(`init_lora_weights` in"),
        ({"rank_pattern": {"q_proj": 4}, "bias": "all"}, "(`bias`, `rank_pattern` in"),
    ],
)
def test_what_vllm_makes_of_an_adapter_is_said(run, tmp_path, changes, expected):
    copy = shutil.copytree(run, tmp_path / "run")
    edit(copy / "adapter_config.json", **changes)
    assert export(copy, tmp_path / "out", "--tokenizer_only", formats=["chat-template"]) == 0
    readme = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert expected in readme
    assert ("vllm serve" in readme) is expected.startswith("--")
    assert ("Not with vLLM" in readme and "without `--tokenizer_only`" in readme) is expected.startswith("(")


def test_servers_are_launched_within_the_lengths_of_training(run, tmp_path, tiny_model):
    export(run, tmp_path / "out", formats=["chat-template"])
    readme = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    # A label word takes one token.
    most = longest(run)
    assert f"--model-id FOLDER --max-input-tokens {most - 1} --max-total-tokens {most}\n" in readme
    whole_run(tiny_model, tmp_path / "whole")
    export(tmp_path / "whole", tmp_path / "other", "--tokenizer_only", formats=["chat-template"])
    readme = (tmp_path / "other" / "README.md").read_text(encoding="utf-8")
    assert "vllm serve OUT --tokenizer FOLDER --chat-template FOLDER/chat_template.jinja" in readme
    assert "--lora" not in readme and "--generation-config vllm --max-model-len 512" in readme


def test_options_reach_the_weights(run, tmp_path, capsys):
    assert export(run, tmp_path / "out", "--dtype", "float16", formats=["merged"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    with pytest.raises(ValueError, match="Unknown `dtype` 'float7'"):
        export(run, tmp_path / "other", "--dtype", "float7", formats=["merged"])
    # They say how a model is asked, and nothing is asked here.
    for option in (["--quantization", "4bit"], ["--batch_size", "8"]):
        with pytest.raises(SystemExit):
            export(run, tmp_path / "other", *option)
        assert "unrecognized arguments" in capsys.readouterr().err
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"trigger": "Another key:"}, "was changed after training"),
        ({"keyed": False}, "was changed after training"),
        ({"labels": ["positive", "negative"]}, "was changed after training"),
        ({"labels": ["a"]}, "it has the classes"),
        ({"keyed": 0}, "`keyed` is '0'"),
        ({"keyed": "absent"}, r"lacks \['keyed'\]"),
    ],
)
@pytest.mark.parametrize(
    ("name", "options"), [("openai-recipe", []), ("chat-template", ["--tokenizer_only"]), ("merged", [])]
)
def test_a_changed_run_is_not_exported(run, tmp_path, name, options, changes, match):
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    edit(copy / "p2p_config.json", **changes)
    with pytest.raises(ValueError, match=match) as caught:
        export(copy, tmp_path / "out", *options, formats=[name])
    assert "Another key:" not in str(caught.value) and names(tmp_path) == ["run"]


def test_a_base_that_moved_is_named(run, tmp_path, tiny_model):
    copy = shutil.copytree(run, tmp_path / "run")
    path = copy / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ValueError, match="--base_model"):
        export(copy, tmp_path / "out", formats=["merged"])
    assert export(copy, tmp_path / "out", "--base_model", tiny_model, formats=["merged"]) == 0


def test_only_an_earlier_export_is_replaced(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    for options in ([], ["--overwrite"]):
        with pytest.raises(ValueError, match="not empty and holds no p2p_export.json, so it is no export of ours"):
            export(run, out, *options)
    (out / "p2p_export.json").write_text("[]")
    with pytest.raises(ValueError, match="no export of ours"):
        export(run, out, "--overwrite")
    shutil.rmtree(out)
    out.mkdir()
    assert export(run, out) == 0
    (out / "old.txt").write_text("old")
    with pytest.raises(ValueError, match="holds an export. Give another `--out`, or replace it: `--overwrite`"):
        export(run, out)
    assert export(run, out, "--overwrite") == 0 and "old.txt" not in names(out)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ValueError, match="no export of ours"):
        export(run, file, "--overwrite")
    assert file.read_text() == "x" and names(tmp_path) == ["file", "out"]


def test_the_run_stays_as_it_is(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "some" / "run")
    (tmp_path / "link").symlink_to(copy)
    for out in (copy, copy / "inside", tmp_path / "some", tmp_path / "link", tmp_path / "some" / "x" / ".." / "run"):
        (tmp_path / "some" / "x").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match="one of them lies in the other: the run stays as it is"):
            export(copy, out, "--overwrite")
    assert names(copy) == names(run)


def test_what_fails_leaves_nothing_and_keeps_what_was_there(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert export(run, out) == 0
    before = (out / "openai_recipe.json").read_text()

    def fail(*arguments):
        raise ValueError("The template differs.")

    monkeypatch.setattr(exporter, "check_template", fail)
    with pytest.raises(ValueError, match="The template differs"):
        export(run, out, "--overwrite", "--tokenizer_only", formats=["openai-recipe", "chat-template"])
    assert names(tmp_path) == ["out"] and (out / "openai_recipe.json").read_text() == before


def test_wrong_arguments_are_told_apart(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        export(run, tmp_path / "out", formats=["gguf"])
    assert "invalid choice: 'gguf'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="Formats are merged, chat-template, openai-recipe; got 'gguf'"):
        exporter.export_run(run, tmp_path / "out", ["gguf"])
    with pytest.raises(ValueError, match="p2p_config.json"):
        export(tmp_path, tmp_path.parent / "somewhere")
    images = shutil.copytree(run, tmp_path / "run")
    path = images / "p2p_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "images": True}))
    with pytest.raises(ValueError, match="reads images, and `--format chat-template` is for texts alone"):
        export(images, tmp_path / "out", formats=["chat-template"])
