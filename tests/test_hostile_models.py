"""Whole models that somebody else has made, as runs and as bases: what their files may say before they are loaded."""

import json
import os
import pickle
import shutil

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file

from p2p_trainer.saved_run.folder import find_model
from tests.saved_folders import adapter_run, edit, loaded, put_in_cache, whole_run


@pytest.fixture
def whole(tiny_model, tmp_path):
    return whole_run(tiny_model, tmp_path / "whole")


@pytest.fixture
def base(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "base")


@pytest.fixture
def run(base, tmp_path):
    """An adapter on `base`."""
    adapter_run(str(base), tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub, and what puts a folder into it."""
    root = tmp_path / "hub"
    root.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    return lambda folder, name, *more: put_in_cache(root, folder, name, *more)


def split(folder, target="model-1.safetensors", index="model.safetensors.index.json"):
    """Replace a model's one file by an index that names another; return where its weights went."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    content = {"metadata": {}, "weight_map": dict.fromkeys(weights, target)}
    (folder / index).write_text(json.dumps(content))
    return folder / "model-1.safetensors"


class Bomb:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (os.mkdir, (self.mark,))


def test_shards_are_read(whole, run, base):
    expected = loaded(whole), loaded(run)
    split(whole)
    split(base)
    assert torch.equal(loaded(whole), expected[0]) and torch.equal(loaded(run), expected[1])


@pytest.mark.parametrize(
    "target",
    ["w.bin", "../outside.safetensors", "/outside.safetensors", "sub/w.safetensors", "a\\w.safetensors", "", 7, None],
)
@pytest.mark.parametrize("kind", ["whole", "base"])
def test_an_index_names_safetensors_beside_it_alone(whole, run, base, kind, target, tmp_path):
    folder = {"whole": whole, "base": base}[kind]
    weights = load_file(split(folder, target))
    # Where they are named, they are there, and could be loaded.
    torch.save(weights, folder / "w.bin")
    shutil.copy(folder / "model-1.safetensors", folder.parent / "outside.safetensors")
    with pytest.raises(ValueError, match="index.json names the weight file '.*'; only \\*.safetensors beside it are"):
        loaded({"whole": whole, "base": run}[kind])


@pytest.mark.parametrize("weight_map", [None, [], "w.bin", 3])
def test_an_index_without_files_is_refused(whole, weight_map):
    split(whole)
    edit(whole / "model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(ValueError, match="names the weight file"):
        loaded(whole)


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "sub/x.safetensors.index.json", "../whole/model.safetensors", "x", 3, None]
)
def test_a_configuration_names_safetensors_beside_it_alone(whole, name):
    mark = whole / "MARK"
    (whole / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    edit(whole / "config.json", transformers_weights=name)
    with pytest.raises(ValueError, match="config.json names the weight file .*`transformers_weights`.*; only"):
        loaded(whole)
    assert not mark.exists()
    edit(whole / "config.json", transformers_weights="model.safetensors")
    assert loaded(whole).shape[-1] > 300


METHODS = ["fp8", "hqq", "quanto", "torchao", "gptq", "bitsandbytes", None]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("nested", [False, True])
def test_a_run_is_not_quantised(whole, method, nested):
    settings = {"quantization_config": {"quant_method": method, "load_in_4bit": method == "bitsandbytes"}}
    edit(whole / "config.json", **({"text_config": settings} if nested else settings))
    with pytest.raises(ValueError, match=f"says that the weights are quantised .*'{method}'.* unquantised. Remove"):
        loaded(whole)


def test_no_quantisation_may_be_said(whole):
    expected = loaded(whole)
    edit(whole / "config.json", quantization_config=None)
    assert torch.equal(loaded(whole), expected)


@pytest.mark.parametrize("settings", [*({"quant_method": method} for method in METHODS[:5]), {}, [], "4bit"])
def test_a_base_is_quantised_by_bitsandbytes_or_not_at_all(run, base, settings):
    edit(base / "config.json", quantization_config=settings)
    with pytest.raises(
        ValueError, match="says that the base is quantised by .*only bitsandbytes .*Use the unquantised"
    ):
        loaded(run)


def test_a_base_of_bitsandbytes_is_loaded(base, run):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_8bit=True)
    AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, device_map="cpu").save_pretrained(base)
    assert json.loads((base / "config.json").read_text())["quantization_config"]["load_in_8bit"] is True
    assert loaded(run).isfinite().all()


def on_the_hub(run, name, **changes):
    edit(run / "adapter_config.json", base_model_name_or_path=name, **changes)
    return run


def test_a_base_from_the_hub_is_checked_as_a_folder_is(run, base, hub):
    expected = loaded(run)
    on_the_hub(run, "somebody/base")
    hub(base, "somebody/base")
    assert torch.equal(loaded(run), expected)
    for name, changes, match in (
        ("evil/kernels", {"attn_implementation": "evil/attention"}, "asks for the kernel 'evil/attention'"),
        ("evil/fp8", {"quantization_config": {"quant_method": "fp8"}}, "the base is quantised by 'fp8'"),
    ):
        edit(hub(base, name) / "config.json", **changes)
        with pytest.raises(ValueError, match=match):
            loaded(on_the_hub(run, name))
    split(hub(base, "evil/index"), "../x.safetensors")
    with pytest.raises(ValueError, match="names the weight file '../x.safetensors'"):
        loaded(on_the_hub(run, "evil/index"))


def test_a_base_from_the_hub_is_no_adapter(run, hub):
    # Its own base is there; transformers would load both.
    hub(run, "somebody/adapter")
    with pytest.raises(
        ValueError, match="The base model 'somebody/adapter' of the .* is an adapter itself. Merge that"
    ):
        loaded(on_the_hub(run, "somebody/adapter"))


def test_a_revision_of_the_base_is_that_one(run, base, hub):
    expected = loaded(run)
    hub(base, "somebody/base", "f" * 40, "first")
    edit(hub(base, "somebody/base") / "config.json", attn_implementation="evil/attention")
    on_the_hub(run, "somebody/base", revision="first")
    assert torch.equal(loaded(run), expected)
    with pytest.raises(ValueError, match="asks for the kernel"):
        loaded(on_the_hub(run, "somebody/base", revision=None))


def test_a_base_that_is_not_to_be_had_is_said(run, hub):
    remedy = r"Name the base model with `base_model` \(`--base_model MODEL`\)"
    with pytest.raises(ValueError, match=f"'some/where' .* is no local folder and can't be had from the .*{remedy}"):
        loaded(on_the_hub(run, "some/where"))
    with pytest.raises(ValueError, match=f"'a b' .* is no local folder and can be no hub id. {remedy}"):
        loaded(on_the_hub(run, "a b"))


def test_of_a_base_only_the_model_is_fetched(monkeypatch, tmp_path):
    asked = {}

    def fetch(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr("p2p_trainer.saved_run.folder.snapshot_download", fetch)
    assert find_model("somebody/base", "v1") == tmp_path
    assert (asked["name"], asked["revision"]) == ("somebody/base", "v1")
    files = [
        "config.json", "model-00001-of-2.safetensors", "model.safetensors.index.json", "generation_config.json",
        "modeling_evil.py", "pytorch_model.bin", "original/consolidated.00.pth", "original/model.safetensors",
        "consolidated.safetensors", "consolidated-00001.safetensors", "onnx/config.json", "model.gguf",
    ]  # fmt: skip
    filters = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(huggingface_hub.utils.filter_repo_objects(files, **filters)) == files[:4]


def test_code_of_a_base_is_fetched_where_it_is_asked_for(run, base, hub, monkeypatch):
    expected = loaded(run)
    hub(base, "somebody/base")
    on_the_hub(run, "somebody/base")
    # Files of code are not among those that are fetched as a whole.
    monkeypatch.setattr("p2p_trainer.saved_run.folder.snapshot_download", lambda *a, **k: pytest.fail("fetched"))
    assert torch.equal(loaded(run, trust_remote_code=True), expected)
