"""Folders that somebody else has made: nothing in them runs, and what is wrong with them is said."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from p2p_trainer import DefendedModel
from p2p_trainer.saved_run import loading
from tests.conftest import make_rows
from tests.tiny_runs import saved_run


TEXTS = [row["text"] for row in make_rows(4, seed=3)]
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
CODE = """\
from pathlib import Path
Path(__file__).with_name("MARK").touch()
Path("{mark}").touch()
class Evil:
    pass
def generate(*args, **kwargs):
    Path("{mark}").touch()
"""


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (Path.touch, (Path(self.mark),))


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "adapter"
    saved_run(tiny_model, folder, num_train_epochs=1)
    return folder


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    saved_run(tiny_model, folder, full=True, num_train_epochs=1)
    return folder


@pytest.fixture
def copy(adapter, tmp_path):
    return shutil.copytree(adapter, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-*"))


@pytest.fixture
def whole_copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-*"))


@pytest.fixture
def mark(tmp_path):
    """A file that code from the folder would make."""
    return tmp_path / "MARK"


def edit(path, **changes):
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **changes}))


def load(folder):
    return DefendedModel.from_pretrained(folder, device="cpu")


def nothing_ran(mark, folder):
    return not mark.exists() and not list(Path(folder).rglob("MARK"))


def test_the_bomb_would_go_off(mark):
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()


@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_code_beside_the_weights_does_not_run(kind, mark, request):
    folder = request.getfixturevalue({"adapter": "copy", "whole": "whole_copy"}[kind])
    expected = load(folder).classify(TEXTS)
    code = CODE.format(mark=mark)
    (folder / "evil.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor")
    edit(folder / "config.json", **({} if kind == "adapter" else {"auto_map": dict.fromkeys(names, "evil.Evil")}))
    if kind == "adapter":
        (folder / "config.json").unlink()
    assert load(folder).classify(TEXTS) == expected and nothing_ran(mark, folder)


def test_code_of_a_tokenizer_does_not_run(copy, mark):
    (copy / "evil.py").write_text(CODE.format(mark=mark))
    for changes in (
        {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "EvilTokenizer"},
        {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}},
    ):
        edit(copy / "tokenizer_config.json", **changes)
        try:
            load(copy)
        except ValueError as error:
            assert "Tokenizer, chat template or prompt format in" in str(error)
        assert nothing_ran(mark, copy)


def test_architecture_that_only_code_explains_is_refused(whole_copy, mark):
    (whole_copy / "evil.py").write_text(CODE.format(mark=mark))
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    edit(whole_copy / "config.json", model_type="evil", auto_map=auto_map)
    with pytest.raises(ValueError, match="can't be loaded|can't be used"):
        load(whole_copy)
    assert nothing_ran(mark, whole_copy)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_from_the_hub_are_refused(whole_copy, key):
    edit(whole_copy / "config.json", **{"text_config": {key: {"": "somebody/attention"}}})
    with pytest.raises(ValueError, match=f"asks for the kernel .*somebody/attention.* \\(`{key}`\\)"):
        load(whole_copy)


@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_pickles_are_left_alone(kind, mark, request):
    folder = request.getfixturevalue({"adapter": "copy", "whole": "whole_copy"}[kind])
    expected = load(folder).classify(TEXTS)
    for name in ("adapter_model.bin", "pytorch_model-00001-of-00001.bin", "pytorch_model.bin", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Bomb(mark)))
    assert load(folder).classify(TEXTS) == expected
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ValueError, match=r"holds no adapter_model.safetensors. Other|nor model weights \(\*.safet"):
        load(folder)
    assert nothing_ran(mark, folder)


def test_pickles_of_the_base_are_left_alone(copy, tiny_model, mark, tmp_path):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(ValueError, match="The base model '.*base' .* can't be loaded: .*Name the base model with"):
        DefendedModel.from_pretrained(copy, device="cpu", base_model=str(base))
    assert not mark.exists()


def test_modules_that_an_adapter_names_are_not_imported(copy, mark, monkeypatch):
    expected = load(copy).classify(TEXTS)
    (copy / "evil.py").write_text(CODE.format(mark=mark))
    monkeypatch.syspath_prepend(copy)
    edit(
        copy / "adapter_config.json",
        auto_mapping={"base_model_class": "Evil", "parent_library": "evil"},
        megatron_core="evil", megatron_config={"evil": 1},
    )  # fmt: skip
    assert load(copy).classify(TEXTS) == expected and nothing_ran(mark, copy)


@pytest.mark.parametrize(
    "base",
    ["/no/such/place", "../..", "a b c", "org/name/more", "https://x.org/x", "x" * 500, "a\0b", "", 7, ["x"]],
)
def test_nonsense_for_a_base_is_named(copy, base):
    edit(copy / "adapter_config.json", base_model_name_or_path=base)
    with pytest.raises(ValueError, match="(?s)base model.*with `base_model` \\(`--base_model MODEL`\\)"):
        load(copy)


def test_an_adapter_is_no_base(copy):
    edit(copy / "adapter_config.json", base_model_name_or_path=str(copy))
    with pytest.raises(ValueError, match="is an adapter itself. Merge that one"):
        load(copy)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "XLORA"}, "of type 'XLORA'; only LoRA is loaded"),
        ({"peft_type": None}, "of type 'None'"),
        ({"peft_type": {"a": 1}}, "only LoRA is loaded"),
        ({"r": "many"}, "damaged|does not fit"),
        ({"r": 10**13}, "damaged: a rank is larger than any weight"),
        ({"rank_pattern": {"q_proj": 65}}, "damaged: a rank is larger than any weight"),
        ({"r": 8}, "does not fit the base model .*16"),
        ({"target_modules": 3}, "damaged|does not fit"),
        ({"target_modules": ["nothing"]}, "does not fit the base model .*nothing"),
        ({"rank_pattern": {"(a+)+$": 4}}, "the pattern '\\(a\\+\\)\\+\\$' is no name of a module"),
        ({"alpha_pattern": {".*.*.*.*x": 4}}, "is no name of a module"),
        ({"rank_pattern": 5}, "damaged"),
        ({"modules_to_save": ["lm_head"]}, "does not fit the base model"),
        ({"use_dora": True}, "does not fit the base model .*lora_magnitude_vector"),
    ],
)
def test_adapter_configurations_that_do_not_fit(copy, changes, match):
    edit(copy / "adapter_config.json", **changes)
    with pytest.raises(ValueError, match=f"(?s){match}"):
        load(copy)


def test_a_pattern_that_takes_for_ever_is_not_tried(copy):
    expected = load(copy).classify(TEXTS)
    edit(copy / "adapter_config.json", target_modules="(([a-z0-9_.]+)+)+!", exclude_modules="((.+)+)+!")
    assert load(copy).classify(TEXTS) == expected


@pytest.mark.parametrize("content", ["[]", "3", "{", '{"peft_type": ' + "[" * 100_000, "\udcff"])
def test_adapter_configurations_that_are_none(copy, content):
    (copy / "adapter_config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="adapter_config.json is damaged"):
        load(copy)


def weights_of(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda old: {key: old[key] for key in list(old)[1:]}, "1 of its weights are missing: base_model"),
        (lambda old: {**old, "base_model.model.more": torch.zeros(1)}, "1 of its weights are without a place: .*more"),
        (lambda old: {key: torch.zeros(16, 3) for key in old}, "size mismatch"),
        (lambda old: {key.removeprefix("base_model.model."): old[key] for key in old}, "of its weights are missing"),
    ],
)
def test_adapter_weights_that_do_not_fit(copy, change, match):
    save_file(change(weights_of(copy)), copy / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"(?s)does not fit the base model.*{match}.*Name the base model"):
        load(copy)


def test_an_adapter_without_weights(copy):
    save_file({}, copy / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="damaged: a rank is larger than any weight"):
        load(copy)


def test_files_that_are_no_safetensors(copy):
    for content in (b"", b"x" * 100, b"\xff" * 8 + b"{}"):
        (copy / "adapter_model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="adapter_model.safetensors is damaged: "):
            load(copy)


def base_of(folder, tiny_model, **changes):
    config = Qwen3Config.from_pretrained(tiny_model)
    for key, value in changes.items():
        setattr(config, key, value)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return str(folder)


def test_an_adapter_of_another_model(copy, tiny_model, tmp_path):
    wide = base_of(tmp_path / "wide", tiny_model, hidden_size=64)
    deep = base_of(tmp_path / "deep", tiny_model, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    flat = base_of(tmp_path / "flat", tiny_model, num_hidden_layers=1, layer_types=["full_attention"])
    # Names of modules in any layer, as adapters have them that were not made with "all-linear".
    edit(copy / "adapter_config.json", target_modules=MODULES)
    few = base_of(tmp_path / "few", tiny_model, vocab_size=100, pad_token_id=0, eos_token_id=0)
    for base, match in (
        (wide, "does not fit the base model .*size mismatch"),
        (deep, "does not fit the base model .*missing: .*layers.2"),
        (flat, "does not fit the base model .*without a place: .*layers.1"),
        (few, "the model embeds 100: they do not belong together"),
    ):
        with pytest.raises(ValueError, match=f"(?s){match}"):
            DefendedModel.from_pretrained(copy, device="cpu", base_model=base)


def test_whole_models_with_missing_weights(whole_copy):
    weights = load_file(whole_copy / "model.safetensors")
    name = next(key for key in weights if "q_proj" in key)
    save_file({key: value for key, value in weights.items() if key != name}, whole_copy / "model.safetensors")
    with pytest.raises(ValueError, match=f"can't be loaded: 1 weights are missing, such as '{name}'"):
        load(whole_copy)
    save_file({**weights, name: torch.zeros(2, 2)}, whole_copy / "model.safetensors")
    with pytest.raises(ValueError, match="can't be loaded: .*Save the model again"):
        load(whole_copy)


CONFIG_DAMAGE = [
    ({"keyed": "no"}, "`keyed` is 'no'"),
    ({"keyed": None}, "`keyed` is 'None'"),
    ({"labels": "ab"}, "`labels` is 'ab'"),
    ({"labels": [1, 2]}, "`labels` is"),
    ({"labels": ["a", "b", "c"]}, "it has the classes .*and the label words"),
    ({"autocast": ["x"]}, "`autocast` is"),
    ({"dtype": "int8"}, "`dtype` is 'int8'"),
    ({"dtype": {}}, "`dtype` is"),
    ({"images": 1}, "`images` is '1'"),
    ({"chat": "yes"}, "damaged"),
    ({"suffix": 3}, "damaged"),
    ({"trigger": None}, "damaged"),
    ({"trigger": ["a"]}, "damaged"),
    ({"max_length": 1e9}, "damaged"),
    ({"label_space": {"words": 3, "extended_words": 4, "reason": ""}}, "damaged"),
    ({"label_space": {"words": [["a"], ["b"]], "extended_words": ["c", "d"], "reason": ""}}, "damaged"),
    ({"schema_version": True}, "digest|damaged|schema version"),
    ({"quantization": "4bit"}, "its `quantization` has 4bit"),
    ({"quantization": {}}, "its `quantization` has {}"),
    ({"quantization": {"load_in_4bit": 1}}, "its `quantization` has {'load_in_4bit': 1}"),
    ({"quantization": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "nn"}}, "'bnb_4bit_compute_dtype': 'nn'"),
    ({"quantization": {"load_in_8bit": True, "llm_int8_skip_modules": ["(a+)+$"]}}, "'llm_int8_skip_modules'"),
    ({"quantization": {"load_in_8bit": True, "llm_int8_threshold": 1e400}}, "'llm_int8_threshold'"),
]


@pytest.mark.parametrize(("changes", "match"), CONFIG_DAMAGE)
def test_configurations_of_wrong_types(copy, changes, match):
    edit(copy / "p2p_config.json", **changes)
    if changes == {"schema_version": True}:
        return
    with pytest.raises(ValueError, match=match):
        load(copy)


@pytest.mark.parametrize("content", ["[]", "null", '"x"', "[" * 200_000, '{"a":' * 200_000, "1" * 10_000])
def test_configurations_that_are_none(copy, content):
    (copy / "p2p_config.json").write_text(content)
    with pytest.raises(ValueError, match="p2p_config.json is damaged"):
        load(copy)


def test_huge_files_are_not_read(copy):
    for name in ("p2p_config.json", "adapter_config.json"):
        path = copy / name
        text = path.read_text()
        with path.open("w") as file:
            file.truncate(2**34)
        with pytest.raises(ValueError, match=f"{name} (is damaged: it )?has 17179869184 bytes"):
            load(copy)
        path.write_text(text)
    assert load(copy).classify(TEXTS)


TEMPLATES = [
    ("{% for i in range(10 ** 12) %}{% endfor %}", "OverflowError"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    ("{{ cycler.__init__.__globals__.os.system('touch MARK') }}", "Error"),
    ("{{ messages.append(1) }}", "SecurityError"),
    ("{% include '/etc/passwd' %}", "Error"),
    ("{{ undefined_thing() }}", "UndefinedError"),
    ("{% if", "TemplateSyntaxError"),
    ("nothing of it", "does not show the user turn"),
]


def chatty(folder, template, tiny_model):
    edit(folder / "p2p_config.json", chat=True, digest=None)
    content = json.loads((folder / "p2p_config.json").read_text())
    del content["digest"]
    (folder / "p2p_config.json").write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text(template)


@pytest.mark.parametrize(("template", "match"), TEMPLATES)
def test_chat_templates_stay_in_their_cage(copy, tiny_model, template, match):
    chatty(copy, template, tiny_model)
    with pytest.raises(ValueError, match=f"(?s)chat template or prompt format in .*{match}"):
        load(copy)
    assert not list(copy.rglob("MARK"))


def test_a_chat_template_that_does_not_end(copy, tiny_model, monkeypatch):
    monkeypatch.setattr(loading, "_PATIENCE", 0.5)
    chatty(copy, "{% for i in range(9000) %}{% for j in range(9000) %}{% endfor %}{% endfor %}", tiny_model)
    with pytest.raises(ValueError, match="were not ready after 0 s. Look at the chat template: it may loop"):
        load(copy)
