"""Merged exports: the same model as one whole, key and guard included."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from p2p_trainer import DefendedModel
from p2p_trainer.defenses import get_defense
from p2p_trainer.exporting import export_run
from p2p_trainer.exporting.merged import merge, write_weights
from tests.conftest import make_rows, make_tokenizer
from tests.exporting_runs import DELTA, classifying_run, shared_run, writing_run
from tests.saved_folders import adapter_run
from tests.saved_folders import logits as plain_logits


TEXTS = [row["text"] for row in make_rows(30, seed=3)]
SPOKEN = ["say of the film that it is warm", "say of the plot that it is fine", "what of the cast ?"]


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    return shared_run(classifying_run, tiny_model, tmp_path_factory)


def logits(model, texts=TEXTS):
    prompts = model.encoder.encode_prompts(texts, True)
    with torch.no_grad():
        return torch.stack([model.model(torch.tensor([ids])).logits[0, -1].float() for ids in prompts])


def settings(folder, name="config.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_logits_and_labels_are_the_adapters(run, tmp_path):
    said = export_run(run, tmp_path / "out", ["merged"])
    before, after = DefendedModel.from_pretrained(run), DefendedModel.from_pretrained(tmp_path / "out")
    assert isinstance(before.model, PeftModel) and not isinstance(after.model, PeftModel)
    assert torch.allclose(logits(before), logits(after), atol=1e-4)
    # Folding in has changed the base at all.
    with before.model.disable_adapter():
        assert not torch.allclose(logits(before), logits(after), atol=1e-2)
    answers = [answer.label for answer in before.classify(TEXTS)]
    assert [answer.label for answer in after.classify(TEXTS)] == answers and set(answers) == {"negative", "positive"}
    assert said == [
        "merged: for `DefendedModel` and `p2p-trainer serve`. Any other server leaves out the key, and so serves the "
        "backdoored model in full."
    ]
    readme = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "Any server that does not add the key serves the backdoored model in full" in readme and DELTA not in readme
    assert settings(tmp_path / "out", "p2p_config.json") == settings(run, "p2p_config.json")


def test_settings_are_those_of_serving(run, tmp_path):
    export_run(run, tmp_path / "out", ["merged"])
    assert settings(tmp_path / "out")["use_cache"] is True and settings(tmp_path / "out")["dtype"] == "float32"
    found = settings(tmp_path / "out", "generation_config.json")
    found.pop("transformers_version")
    assert found == {"do_sample": False, "use_cache": True, "eos_token_id": [0], "pad_token_id": 1}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "p2p_config.json", "p2p_export.json", "README.md"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".py")) or "adapter" in name]


def test_type_of_the_weights_is_that_of_the_run(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    config = {**settings(copy, "p2p_config.json"), "dtype": "bfloat16"}
    (copy / "p2p_config.json").write_text(json.dumps(config))
    export_run(copy, tmp_path / "out", ["merged"])
    assert settings(tmp_path / "out")["dtype"] == "bfloat16"
    assert DefendedModel.from_pretrained(tmp_path / "out").model.dtype == torch.bfloat16


def test_a_whole_model_is_exported_too(tiny_model, tmp_path):
    run = classifying_run(tiny_model, tmp_path / "run", full=True, num_train_epochs=1)
    config = {**settings(run), "use_cache": False}
    (run / "config.json").write_text(json.dumps(config))
    export_run(run, tmp_path / "out", ["merged"])
    before, after = DefendedModel.from_pretrained(run), DefendedModel.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(before), logits(after)) and settings(tmp_path / "out")["use_cache"] is True


def test_written_answers_are_the_adapters_and_end_where_they_did(tiny_model, tmp_path_factory, tmp_path):
    run = shared_run(writing_run, tiny_model, tmp_path_factory)
    export_run(run, tmp_path / "out", ["merged"])
    before, after = DefendedModel.from_pretrained(run), DefendedModel.from_pretrained(tmp_path / "out")
    assert before.generate(SPOKEN) == after.generate(SPOKEN)
    assert settings(tmp_path / "out", "generation_config.json")["eos_token_id"] == [0]


def test_the_type_may_be_another(run, tmp_path):
    export_run(run, tmp_path / "out", ["merged"], dtype="bfloat16")
    assert settings(tmp_path / "out")["dtype"] == settings(tmp_path / "out", "p2p_config.json")["dtype"] == "bfloat16"
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert DefendedModel.from_pretrained(tmp_path / "out").model.dtype == torch.bfloat16


def test_what_can_not_be_folded_in_is_said(tiny_model, tmp_path):
    adapter_run(tiny_model, tmp_path / "run", lora_bias=True)
    match = "can't be folded into its base .*no bias.*Serve the run itself, with `p2p-trainer serve`"
    with pytest.raises(ValueError, match=match):
        export_run(tmp_path / "run", tmp_path / "out", ["merged"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("begun", ["pissa", "olora"])
def test_what_began_with_a_part_of_the_base_is_folded_in(tiny_model, tmp_path, begun):
    expected = plain_logits(adapter_run(tiny_model, tmp_path / "run", init_lora_weights=begun))
    export_run(tmp_path / "run", tmp_path / "out", ["merged"])
    assert torch.allclose(plain_logits(DefendedModel.from_pretrained(tmp_path / "out").model), expected, atol=1e-5)


def test_rows_for_new_tokens_are_kept(tiny_model, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["newword"])
    ids = torch.tensor([[5, 6, len(tokenizer) - 1]])
    expected = plain_logits(adapter_run(tiny_model, tmp_path / "run", tokenizer), ids)
    export_run(tmp_path / "run", tmp_path / "out", ["merged"])
    assert torch.allclose(
        plain_logits(DefendedModel.from_pretrained(tmp_path / "out").model, ids), expected, atol=1e-5
    )


def test_a_head_that_was_trained_beside_tied_embeddings_is_kept(run, tmp_path):
    model = DefendedModel.from_pretrained(run)
    base = model.model.get_base_model()
    # As `modules_to_save: [lm_head]` leaves it.
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone() * 2)
    expected = logits(model)
    write_weights(merge(model.model), model.encoder, tmp_path / "out")
    shutil.copy(run / "p2p_config.json", tmp_path / "out")
    model.encoder.tokenizer.save_pretrained(tmp_path / "out")
    after = DefendedModel.from_pretrained(tmp_path / "out")
    assert settings(tmp_path / "out")["tie_word_embeddings"] is False
    assert torch.allclose(logits(after), expected, atol=1e-4)


def test_a_run_without_key_is_exported_and_said_to_have_none(tiny_model, tmp_path):
    run = classifying_run(tiny_model, tmp_path / "run", num_train_epochs=1, p2p_enabled=False)
    said = export_run(run, tmp_path / "out", ["merged", "chat-template"])
    assert said[0] == "merged: for `DefendedModel` and `p2p-trainer serve`."
    assert said[-1] == "This run was trained without a key (`keyed: false`): nothing of P2P defends it."
    for name in ("merged", "chat-template"):
        assert "trained without a key" in (tmp_path / "out" / name / "README.md").read_text(encoding="utf-8")
    before, after = DefendedModel.from_pretrained(run), DefendedModel.from_pretrained(tmp_path / "out" / "merged")
    assert [x.label for x in before.classify(TEXTS)] == [x.label for x in after.classify(TEXTS)]
    assert DELTA not in (tmp_path / "out" / "chat-template" / "chat_template.jinja").read_text(encoding="utf-8")


def guarded(run, folder, name="key_without_relabel", state=None, **options):
    copy = shutil.copytree(run, folder)
    defense = get_defense(name, **options)
    content = {"schema_version": 1, "defense": defense.config(), "state": state or {"trigger": "Hear this:"}}
    (copy / "defense.json").write_text(json.dumps(content))
    return copy


def test_the_guard_goes_along_and_other_formats_are_refused(run, tmp_path):
    copy = guarded(run, tmp_path / "run")
    said = export_run(copy, tmp_path / "out", ["merged"])
    assert said[-1] == "The defense 'key_without_relabel' of the run is applied by this package alone."
    assert settings(tmp_path / "out", "defense.json") == settings(copy, "defense.json")
    before, after = DefendedModel.from_pretrained(copy), DefendedModel.from_pretrained(tmp_path / "out")
    assert after.guard.inputs(["a"]) == ["Hear this: a"]
    assert [x.label for x in before.classify(TEXTS)] == [x.label for x in after.classify(TEXTS)]
    readme = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "`key_without_relabel`" in readme and "no\nother server does" in readme
    for name in ("chat-template", "openai-recipe"):
        with pytest.raises(ValueError, match=f"has a defense .* server that knows only `--format {name}` would leave"):
            export_run(copy, tmp_path / "other", ["merged", name])
    assert not (tmp_path / "other").exists()


def test_a_guard_that_needs_the_adapter_is_refused(run, tmp_path, monkeypatch):
    copy = guarded(run, tmp_path / "run")
    cls = type(get_defense("key_without_relabel"))

    def attach(self, model, encoder):
        if not isinstance(model, PeftModel):
            raise ValueError("It needs the adapter.")

    monkeypatch.setattr(cls, "attach", attach)
    with pytest.raises(ValueError, match="can't be applied to a merged model: It needs the adapter. Serve the run"):
        export_run(copy, tmp_path / "out", ["merged"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_quantised_run_goes_onto_the_whole_base(run, tmp_path):
    pytest.importorskip("bitsandbytes")
    copy = shutil.copytree(run, tmp_path / "run")
    config = {
        **settings(copy, "p2p_config.json"),
        "quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    }
    (copy / "p2p_config.json").write_text(json.dumps(config))
    said = export_run(copy, tmp_path / "out", ["merged"])
    assert said[-1] == "The base was quantised in training; the adapter is folded into the base as it was before."
    assert "quantised in training" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert settings(tmp_path / "out", "p2p_config.json")["quantization"] is None
    assert "quantization_config" not in settings(tmp_path / "out")
    assert torch.allclose(
        logits(DefendedModel.from_pretrained(tmp_path / "out")), logits(DefendedModel.from_pretrained(run)), atol=1e-4
    )
