"""Loading a run: from the hub's cache, with quantised weights, and only as it was trained."""

import dataclasses
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import textwrap
import warnings

import huggingface_hub.constants
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, Qwen3Config, Qwen3ForCausalLM

from p2p_trainer import DefendedModel, P2PTrainer, PromptFormat
from p2p_trainer._files import share_weights
from p2p_trainer.label_space import LabelSpace
from p2p_trainer.saved_run import find_run, quantization
from p2p_trainer.saved_run_options import load_saved_run, saved_run_parser
from tests.conftest import make_rows
from tests.saved_folders import SHA, put_in_cache
from tests.tiny_runs import TASK, config, lora, saved_run


TEXTS = [row["text"] for row in make_rows(12, seed=3)]
OTHER = "fedcba9876543210fedcba9876543210fedcba98"


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "out"
    saved_run(tiny_model, folder, num_train_epochs=1)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-*"))


def edit(folder, **changes):
    path = folder / "p2p_config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))
    return folder


def load(*arguments, **options):
    return DefendedModel.from_pretrained(*arguments, device="cpu", **options)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache, and what puts a folder into it as a repository."""
    root = tmp_path / "hub"
    root.mkdir()
    # What the environment variable of this name sets when the library is imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))

    return lambda folder, name, *more: put_in_cache(root, folder, name, *more)


def test_a_hub_id_is_taken_from_the_cache(folder, cache):
    snapshot = cache(folder, "somebody/reviews-p2p")
    assert find_run("somebody/reviews-p2p") == snapshot
    assert load("somebody/reviews-p2p").classify(TEXTS) == load(folder).classify(TEXTS)
    assert load("somebody/reviews-p2p", revision=SHA).labels == TASK.labels


def test_a_revision_is_that_one(folder, cache, copy):
    cache(folder, "somebody/reviews")
    # As earlier versions wrote it: none was checked.
    edit(copy, labels=["down", "up"], digest="absent")
    cache(copy, "somebody/reviews", OTHER, "second")
    assert load("somebody/reviews").labels == ("negative", "positive")
    assert load("somebody/reviews", revision="second").labels == ("down", "up")
    with pytest.raises(ValueError, match="can't be had from the Hub .*HF_HUB_OFFLINE"):
        load("somebody/reviews", revision="third")


def test_a_base_model_comes_from_the_cache_too(tiny_model, folder, cache, copy):
    cache(tiny_model, "somebody/base")
    path = copy / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "somebody/base"}))
    assert load(copy).classify(TEXTS) == load(folder).classify(TEXTS)


def test_only_what_is_needed_is_fetched(cache, folder, monkeypatch):
    asked = {}

    def fetch(name, **options):
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr("p2p_trainer.saved_run.folder.snapshot_download", fetch)
    find_run("somebody/reviews", "v1")
    assert (asked["name"], asked["revision"]) == ("somebody/reviews", "v1")
    files = [
        "adapter_model.safetensors", "model-00001-of-2.safetensors", "model.safetensors.index.json",
        "p2p_config.json", "chat_template.jinja", "tokenizer.model", "merges.txt", "psim/adapter_model.safetensors",
        "evil.py", "custom_generate/generate.py", "pytorch_model.bin", "adapter_model.bin", "training_args.bin",
        "weights.pt", "weights.pkl", "checkpoint-8/adapter_model.safetensors", "model.gguf", "model.h5",
    ]  # fmt: skip
    filters = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(huggingface_hub.utils.filter_repo_objects(files, **filters)) == files[:8]


@pytest.mark.parametrize("name", ["no/such/folder", "/no/such/folder", "a b", "../x", "x" * 300, "a\nb", "org/--x"])
def test_what_can_be_no_hub_id_is_said(name):
    with pytest.raises(ValueError, match="holds no p2p_config.json .*it can be no hub id. Give the output folder"):
        load(name)


def test_a_hub_id_that_is_not_to_be_had(cache):
    for name in ("nowhere", "somebody/nothing"):
        with pytest.raises(ValueError, match=f"'{name}' holds no .*can't be had from the Hub .*Give the output"):
            load(name)


def test_a_repository_without_a_run_is_said(tiny_model, cache):
    cache(tiny_model, "somebody/model")
    with pytest.raises(ValueError, match="holds no p2p_config.json .*so the key is unknown"):
        load("somebody/model")


FORMAT = PromptFormat(LabelSpace(("0", "1"), ("2", "3")), trigger="Look:", answer_prefix="")
SAID = {"keyed": True, "labels": ["no", "yes"]}


def test_the_digest_is_that_of_what_weights_have_seen():
    seen = {
        "answer_prefix": "", "append_eos": True, "chat": False, "keyed_suffix": "Output: ",
        "label_words": [["0", "1"], ["2", "3"]], "suffix": "Output: ", "template": "{text}\n{suffix}",
        "trigger": "Look:", "trigger_position": "prefix", "keyed": True, "labels": ["no", "yes"],
    }  # fmt: skip
    # A list of names: fields that the format gets one day leave the digests of earlier runs as they are.
    assert FORMAT.digest(SAID) == hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"max_length": 99}, True),
        ({"max_new_tokens": 9}, True),
        ({"label_space": LabelSpace(("0", "1"), ("2", "3"), "another reason")}, True),
        ({"label_space": LabelSpace(("0", "1"), ("3", "2"))}, False),
        ({"label_space": LabelSpace(("1", "0"), ("2", "3"))}, False),
        ({"label_space": None, "template": "{text}\n{suffix}"}, False),
        ({"trigger": "Look"}, False),
        ({"trigger_position": "none"}, False),
        ({"template": "{text} {suffix}"}, False),
        ({"suffix": "Out: "}, False),
        ({"keyed_suffix": "Out: "}, False),
        ({"chat": True}, False),
        ({"append_eos": False}, False),
        ({"answer_prefix": "Answer:"}, False),
    ],
)
def test_what_changes_the_digest(changes, same):
    assert (dataclasses.replace(FORMAT, **changes).digest(SAID) == FORMAT.digest(SAID)) is same


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"task": "other", "dtype": "float16", "autocast": "bfloat16", "images": True, "quantization": {}}, True),
        ({"keyed": False}, False),
        ({"labels": ["yes", "no"]}, False),
        ({"labels": ["no", "Yes"]}, False),
    ],
)
def test_what_else_changes_the_digest(changes, same):
    assert (FORMAT.digest({**SAID, **changes}) == FORMAT.digest(SAID)) is same


def test_a_field_that_the_format_gets_one_day_leaves_digests_alone():
    longer = dataclasses.make_dataclass("Longer", [("new", int, 7)], bases=(PromptFormat,), frozen=True)
    assert longer(FORMAT.label_space, trigger="Look:").digest(SAID) == FORMAT.digest(SAID)


def test_a_saved_format_has_its_digest(folder):
    content = json.loads((folder / "p2p_config.json").read_text())
    assert content["digest"] == PromptFormat.from_dict(content).digest(content)
    assert content["digest"] == load(folder).encoder.format.digest({"keyed": True, "labels": list(TASK.labels)})
    assert len(content["digest"]) == 64


SPACE = {"words": ["0", "1"], "extended_words": ["3", "2"], "reason": "given"}


@pytest.mark.parametrize(
    "changes",
    [
        {"trigger": "Another key:"}, {"trigger_position": "none"}, {"template": "{text} {suffix}"},
        {"keyed_suffix": "Answer: "}, {"append_eos": False}, {"label_space": SPACE}, {"digest": "0" * 64},
        {"digest": None}, {"digest": ["x"]}, {"keyed": False}, {"labels": ["positive", "negative"]},
    ],
)  # fmt: skip
def test_a_changed_file_is_refused(copy, changes):
    with pytest.raises(ValueError, match="was changed after training: its digest is ") as caught:
        load(edit(copy, **changes))
    said = str(caught.value)
    assert "These weights never saw that key" in said and "Put the original file back, or train again" in said
    assert "Another key:" not in said and "The query currently" not in said


def test_lengths_may_change_and_old_files_have_no_digest(folder, copy):
    expected = load(folder).classify(TEXTS)
    assert load(edit(copy, max_length=256, max_new_tokens=8)).classify(TEXTS) == expected
    # As earlier versions wrote it.
    old = edit(copy, digest="absent", quantization="absent", images="absent")
    assert load(old).classify(TEXTS) == expected


def test_type_of_the_weights(folder):
    model = load(folder, dtype="bfloat16")
    assert model.model.base_model.model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert load(folder, dtype=torch.float32).classify(TEXTS) == load(folder).classify(TEXTS)
    with pytest.raises(ValueError, match="Unknown `dtype` 'float7'. Known: float32, bfloat16, float16"):
        load(folder, dtype="float7")
    with pytest.raises(ValueError, match="Unknown `device` 'abacus'. Give one such as 'cpu'"):
        DefendedModel.from_pretrained(folder, device="abacus")


def test_options_of_commands_reach_the_model(folder):
    parser = saved_run_parser("predict", "Predict.")
    arguments = parser.parse_args([str(folder), "--device", "cpu", "--dtype", "bfloat16", "--quantization", "none"])
    assert load_saved_run(arguments).model.base_model.model.model.embed_tokens.weight.dtype == torch.bfloat16
    with pytest.raises(SystemExit):
        parser.parse_args([str(folder), "--quantization", "2bit"])


def test_an_adapter_is_not_rounded(folder):
    trained = load_file(folder / "adapter_model.safetensors")
    served = get_peft_model_state_dict(load(folder, dtype="bfloat16").model)
    assert served.keys() == trained.keys() and len(served) == 28
    assert all(torch.equal(served[key], trained[key]) for key in trained)


NF4 = {
    "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def wide_model(tokenizer, tmp_path_factory):
    """As `tiny_model`, in blocks of 64 weights, in which bitsandbytes quantises."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    settings = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def quantised(wide_model, tmp_path_factory):
    """Runs that learnt on quantised weights, by what `DefendedModel` has to find again."""
    runs = {}
    for name, settings in (("4bit", NF4), ("8bit", {"load_in_8bit": True})):
        folder = tmp_path_factory.mktemp("runs") / name
        with warnings.catch_warnings():
            # bitsandbytes says that 8-bit products run in float16.
            warnings.simplefilter("ignore")
            trainer = P2PTrainer(
                wide_model,
                config(folder, num_train_epochs=2),
                train_dataset=Dataset.from_list(make_rows(80)),
                task=TASK,
                peft_config=lora(r=16, target_modules="all-linear"),
                quantization_config=BitsAndBytesConfig(**settings),
            )
            trainer.train()
            trainer.save_model()
        runs[name] = folder, trainer
    return runs


def layer(model):
    return model.model.get_base_model().model.layers[0].mlp.up_proj.base_layer


def test_a_quantised_run_is_served_as_it_was_trained(quantised):
    for name, kind in (("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")):
        folder, trainer = quantised[name]
        saved = json.loads((folder / "p2p_config.json").read_text())["quantization"]
        assert saved[f"load_in_{name}"] is True and not any(key.startswith("_") for key in saved)
        model = load(folder)
        assert type(layer(model)).__name__ == kind
        found = [answer.score for answer in model.classify(TEXTS)]
        direct = DefendedModel(trainer.model.eval(), trainer.encoder, TASK.labels)
        assert found == pytest.approx([answer.score for answer in direct.classify(TEXTS)], abs=1e-6)
        served, trained = get_peft_model_state_dict(model.model), load_file(folder / "adapter_model.safetensors")
        assert {value.dtype for value in served.values()} == {torch.bfloat16}
        assert all(torch.equal(served[key], trained[key]) for key in trained)
        plain = load(folder, quantization="none")
        assert type(layer(plain)) is torch.nn.Linear
    again = load(quantised["4bit"][0], quantization="4bit").model.config.quantization_config
    assert again.bnb_4bit_use_double_quant and again.bnb_4bit_quant_type == "nf4"


def test_an_unquantised_run_may_be_quantised(wide_model, tmp_path):
    folder = tmp_path / "out"
    saved_run(wide_model, folder, num_train_epochs=1)
    assert json.loads((folder / "p2p_config.json").read_text())["quantization"] is None
    for asked, kind in (
        ("4bit", "Linear4bit"), ("8bit", "Linear8bitLt"),
        (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"), "Linear4bit"),
    ):  # fmt: skip
        model = load(folder, quantization=asked)
        assert type(layer(model)).__name__ == kind and len(model.classify(TEXTS)) == 12
    assert model.model.config.quantization_config.bnb_4bit_quant_type == "fp4"


def test_what_quantises_is_named_where_it_is_missing(copy, monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    edit(copy, quantization=NF4)
    message = r"pip install 'p2p_trainer\[quant\]'.*with `quantization=\"none\"`"
    with pytest.raises(ValueError, match=f"The run was trained on weights quantised .*{message}"):
        load(copy)
    with pytest.raises(ValueError, match=f"`quantization` asks for .*{message}"):
        load(copy, quantization="8bit")
    assert len(load(copy, quantization="none").classify(TEXTS)) == 12


def test_unknown_quantisation(folder):
    for asked in ("2bit", 4, {}):
        with pytest.raises(ValueError, match="`quantization` is '4bit', '8bit', 'none' or a `BitsAndBytesConfig`"):
            load(folder, quantization=asked)


def test_only_known_settings_are_read_back():
    recorded = {**NF4, "bnb_4bit_quant_storage": "uint8", "llm_int8_threshold": 4.0, "quant_method": "evil", "x": 1}
    found = quantization.choose_quantization(None, recorded, None, "p2p_config.json")
    again = quantization.choose_quantization("4bit", recorded, torch.bfloat16, "p2p_config.json")
    for settings in (found, again):
        assert settings.load_in_4bit and settings.bnb_4bit_compute_dtype == torch.float32
        assert settings.llm_int8_threshold == 4.0 and settings.quant_method == "bitsandbytes"
        assert not hasattr(settings, "x")
    fresh = quantization.choose_quantization("4bit", None, torch.bfloat16, "p2p_config.json")
    assert fresh.bnb_4bit_compute_dtype == torch.bfloat16 and fresh.bnb_4bit_quant_type == "nf4"


@pytest.mark.parametrize(("umask", "mode"), [("022", 0o644), ("077", 0o600), ("002", 0o664)])
def test_whoever_may_read_the_run_may_read_its_weights(tmp_path, umask, mode):
    (tmp_path / "model.safetensors").touch(0o600)
    code = """
        import os, sys, pathlib
        before = os.umask(int(sys.argv[2], 8))
        from p2p_trainer import _files
        assert os.umask(0) == int(sys.argv[2], 8)
        _files.write_text(pathlib.Path(sys.argv[1], "text"), "x")
        _files.share_weights(sys.argv[1])
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path), umask], check=True, timeout=60)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "text": mode, "model.safetensors": mode,
    }  # fmt: skip


def test_weights_of_somebody_else_stay_as_they_are(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").touch(0o600)

    def refuse(path, mode):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(pathlib.Path, "chmod", refuse)
    share_weights(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o600


def test_a_folder_may_be_in_ones_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_run("~/out") == folder
