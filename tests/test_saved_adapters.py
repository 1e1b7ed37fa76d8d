"""Adapters of every kind: loaded as they were saved, or refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import Qwen3Config, Qwen3ForCausalLM

from p2p_trainer import DefendedModel
from tests.conftest import make_tokenizer
from tests.saved_folders import adapter_run, edit, loaded, logits


@pytest.fixture(scope="module")
def untied(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("untied")
    torch.manual_seed(0)
    config = Qwen3Config.from_pretrained(tiny_model)
    config.tie_word_embeddings = False
    Qwen3ForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(tiny_model, tmp_path):
    adapter_run(tiny_model, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        # They change the base, and say so by nothing but this entry.
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "OLoRA", "use_rslora": True},
        {"lora_dropout": 0.5},
        {"target_modules": r".*\.v_proj", "target_parameters": ["q_proj.weight"]},
        {"target_modules": r".*\.layers\.1\..*v_proj", "target_parameters": ["self_attn.q_proj.weight"]},
    ],
)
def test_what_is_served_is_what_was_saved(tiny_model, tmp_path, settings):
    model = adapter_run(tiny_model, tmp_path / "run", **settings)
    expected = logits(model)
    assert torch.allclose(loaded(tmp_path / "run"), expected, atol=1e-6)
    with model.disable_adapter():
        assert not torch.allclose(logits(model), expected, atol=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "lora_ga"},
        {"init_lora_weights": ["pissa"]},
        {"init_lora_weights": 7},
        {"alora_invocation_tokens": [7]},
        {"arrow_config": {"top_k": 1}},
        {"corda_config": {"evil": 1}},
        {"kasa_config": {"beta": 1}},
        {"layer_replication": [[0, 10**12]]},
        {"loftq_config": {"loftq_bits": 4}},
        {"lora_ga_config": {"a": 1}},
        {"monteclora_config": {"a": 1}},
        {"use_bdlora": {"a": 1}},
        {"use_qalora": True},
        {"velora_config": {"a": 1}},
        {"of_a_version_to_come": "on"},
    ],
)
def test_what_is_more_than_a_lora_is_refused(run, changes):
    edit(run / "adapter_config.json", **changes)
    (name,) = changes
    with pytest.raises(ValueError, match=f"`{name}`.* Merge it into its base \\(`merge_and_unload`\\), and save the"):
        loaded(run)


def test_what_says_nothing_is_left_out(run):
    expected = loaded(run)
    for value in (None, False, "", [], {}):
        edit(run / "adapter_config.json", of_a_version_to_come=value, layer_replication=value, init_lora_weights=True)
        assert torch.equal(loaded(run), expected)
    edit(run / "adapter_config.json", init_lora_weights=None, qalora_group_size=8, eva_config={"rho": 2.0})
    edit(run / "adapter_config.json", runtime_config={"ephemeral_gpu_offload": True}, peft_version="9", revision=None)
    assert torch.equal(loaded(run), expected)


def grown():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["newword", "otherword"])
    return tokenizer


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}, {"new_lora": True}])
def test_rows_for_new_tokens_are_kept(tiny_model, untied, tmp_path, tied, settings):
    tokenizer = grown()
    if settings.pop("new_lora", False):
        settings = {"target_modules": ["q_proj", "embed_tokens"]}
    model = adapter_run(tiny_model if tied else untied, tmp_path / "run", tokenizer, **settings)
    ids = torch.tensor([tokenizer("the newword is otherword")["input_ids"]])
    assert ids.max() == len(tokenizer) - 1
    assert torch.allclose(loaded(tmp_path / "run", ids), logits(model, ids), atol=1e-6)
    half = DefendedModel.from_pretrained(tmp_path / "run", device="cpu", dtype="bfloat16")
    assert half.model.get_input_embeddings().weight.shape[0] == len(tokenizer) and len(half.classify("newword")) == 1
    if not settings:
        assert half.model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_rows_that_do_not_fit_are_refused(untied, tmp_path):
    adapter_run(untied, tmp_path / "run", grown())
    path = tmp_path / "run" / "adapter_model.safetensors"
    weights = load_file(path)
    head, embeddings = "base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"
    for changed, match in (
        ({key: value for key, value in weights.items() if key != head}, "in only one of input and output embeddings"),
        # No bytes at all, and more rows than any memory.
        ({**weights, head: torch.zeros(10**12, 0), embeddings: torch.zeros(10**12, 0)}, "size mismatch"),
        ({**weights, head: torch.zeros(400, 32)}, "size mismatch"),
    ):
        save_file(changed, path)
        with pytest.raises(ValueError, match=f"(?s)does not fit the base model .*{match}"):
            loaded(tmp_path / "run")


def with_token(run, token, template=None, **special):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([token])
    tokenizer.add_special_tokens(special)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(run)


def test_tokens_that_no_text_can_spell_need_no_row(run):
    expected = loaded(run)
    # As a model for images has one, in a version of it for texts alone.
    with_token(run, AddedToken("<image_soft_token>", special=True))
    assert torch.equal(loaded(run), expected)
    model = DefendedModel.from_pretrained(run, device="cpu")
    assert max(model.encoder.tokenizer.get_vocab().values()) == model.model.get_input_embeddings().weight.shape[0]
    assert len(model.classify(["<image_soft_token>", "a <image_soft_token> b"])) == 2


@pytest.mark.parametrize(
    ("token", "more"),
    [
        (AddedToken("newword", special=False), {}),
        (AddedToken("<new>", special=False), {}),
        # Too short to be broken up.
        (AddedToken("很", special=True), {}),
        (AddedToken("<new>", special=True), {"pad_token": "<new>"}),
        (AddedToken("<new>", special=True), {"unk_token": "<new>"}),
        (AddedToken("<new>", special=True), {"template": "{% for m in messages %}<new>{{ m.content }}{% endfor %}"}),
    ],
)
def test_tokens_that_may_be_read_need_one(run, token, more):
    with_token(run, token, **more)
    rows = len(make_tokenizer())
    with pytest.raises(ValueError, match=f"has tokens up to {rows}, and the model embeds {rows}: they do not belong"):
        loaded(run)
