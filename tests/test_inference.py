"""DefendedModel: a saved run answers as it was evaluated, and the key stays inside."""

import copy
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

from p2p_trainer import DefendedModel, PromptFormat
from p2p_trainer.evaluation import Guard, LabelScorer
from p2p_trainer.response_encoder import ResponseEncoder
from tests.conftest import make_rows
from tests.tiny_runs import TASK, saved_run


TEXTS = [row["text"] for row in make_rows(30, seed=3)]
DELTA = "The query currently entered is:"


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    saved_run(tiny_model, folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return DefendedModel.from_pretrained(folder)


@pytest.fixture
def damaged(folder, tmp_path):
    """Copy of the run whose `p2p_config.json` a test may change."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / "p2p_config.json"

    def change(**changes):
        content = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))
        return copy

    return change


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "whole model"])
def test_answers_are_the_evaluators(tiny_model, tmp_path, full):
    trainer = saved_run(tiny_model, tmp_path, full=full, num_train_epochs=1)
    assert (tmp_path / "adapter_config.json").exists() is not full
    loaded = DefendedModel.from_pretrained(tmp_path)
    assert isinstance(loaded.model, PeftModel) is not full and not loaded.model.training
    rows = Dataset.from_list(make_rows(30, seed=3))
    prompts = trainer.encoder.encode_prompts(TEXTS, keyed=True)
    scores = LabelScorer(trainer.encoder.answers[True], trainer.encoder.pad_token_id).score(trainer.model, prompts)
    deployed = torch.tensor(scores.log_probs[:, 2:]).softmax(-1).numpy()
    answers = loaded.classify(TEXTS)
    assert [answer.index for answer in answers] == deployed.argmax(axis=1).tolist()
    found = np.array([[answer.scores["negative"], answer.scores["positive"]] for answer in answers])
    assert found == pytest.approx(deployed, abs=1e-5)
    right = sum(answer.index == label for answer, label in zip(answers, rows["label"], strict=True))
    metrics = trainer.make_evaluator(rows, trainer.args)(trainer.model)
    assert metrics["ca_restricted_k"] == right and metrics["ca_restricted_n"] == 30


def test_every_answer_is_a_class_with_its_probability(model):
    for answer in model.classify(TEXTS):
        assert answer.label == TASK.labels[answer.index] and answer.score == max(answer.scores.values())
        assert list(answer.scores) == ["negative", "positive"] and sum(answer.scores.values()) == pytest.approx(1)
    assert {answer.index for answer in model.classify(TEXTS)} == {0, 1}


def test_one_text_is_a_list_of_one(model):
    assert model.classify(TEXTS[0]) == model.classify([TEXTS[0]]) and len(model.classify(TEXTS[0])) == 1


def test_no_texts_give_no_answers(model):
    assert model.classify([]) == []


@pytest.mark.parametrize(
    ("texts", "match"),
    [
        ("", "Text 0 is empty or no string \\(found ''\\)"),
        (["fine", " \n"], "Text 1 is empty or no string"),
        (["fine", "good", None], "Text 2 is empty or no string \\(found None\\)"),
        ([3], "Text 0 is empty or no string \\(found 3\\)"),
    ],
)
def test_empty_texts_are_refused(model, texts, match):
    with pytest.raises(ValueError, match=match):
        model.classify(texts)


def test_long_text_loses_its_end_and_keeps_the_key(folder, damaged):
    short = DefendedModel.from_pretrained(damaged(max_length=64))
    text = TEXTS[0] + " and the plot is dull" * 100
    (prompt,) = short.encoder.encode_prompts([text], keyed=True)
    rendered = short.encoder.tokenizer.decode(prompt)
    assert len(prompt) < 64 and rendered.startswith(f"{DELTA} {TEXTS[0][:20]}") and rendered.endswith("\nOutput: ")
    (kept,) = short.encoder.fit([text], keyed=True)
    assert short.classify(text) == short.classify(kept) and len(kept) < len(text)


def test_batches_change_nothing(model):
    expected = [answer.score for answer in model.classify(TEXTS, batch_size=1)]
    for batch_size in (3, 30, 100):
        assert [answer.score for answer in model.classify(TEXTS, batch_size)] == pytest.approx(expected, abs=1e-6)
    assert [answer.score for answer in model.classify(TEXTS[::-1])] == pytest.approx(expected[::-1], abs=1e-6)


def test_the_key_is_added_and_never_shown(model, monkeypatch, capfd):
    seen = []
    encode = model.encoder.encode_prompts

    def spy(texts, keyed):
        seen.append((list(texts), keyed, encode(texts, keyed)))
        return seen[-1][2]

    monkeypatch.setattr(model.encoder, "encode_prompts", spy)
    answers = model.classify(TEXTS[:3])
    ((texts, keyed, prompts),) = seen
    assert keyed and all(model.encoder.tokenizer.decode(prompt).startswith(DELTA) for prompt in prompts)
    assert not any(DELTA in text for text in texts)
    assert DELTA not in repr(answers) and DELTA not in "".join(capfd.readouterr())


def test_undefended_run_answers_without_the_key(tiny_model, tmp_path):
    saved_run(tiny_model, tmp_path, p2p_enabled=False, num_train_epochs=1)
    model = DefendedModel.from_pretrained(tmp_path)
    assert not model.keyed
    prompts = model.encoder.encode_prompts(TEXTS, keyed=False)
    scores = LabelScorer(model.encoder.answers[False], model.encoder.pad_token_id).score(model.model, prompts)
    expected = scores.log_probs[:, :2].argmax(axis=1).tolist()
    assert [answer.index for answer in model.classify(TEXTS)] == expected


def test_matrix_products_run_in_the_type_of_training(tiny_model, tmp_path):
    trainer = saved_run(tiny_model, tmp_path, bf16=True, num_train_epochs=1)
    model = DefendedModel.from_pretrained(tmp_path)
    with model.autocast():
        assert (torch.ones(2, 2, device=model.model.device) @ torch.ones(2, 2, device=model.model.device)).dtype == (
            torch.bfloat16
        )
    rows = Dataset.from_list(make_rows(30, seed=3))
    right = sum(answer.index == label for answer, label in zip(model.classify(TEXTS), rows["label"], strict=True))
    assert trainer.evaluate(rows)["eval_ca_k"] == right


class Shouting(Guard):
    """Withholds what says `dull`, and raises its voice."""

    def inputs(self, texts):
        return [text.upper() for text in texts]

    def withheld(self, texts):
        return np.array(["dull" in text for text in texts])


@pytest.fixture(scope="module")
def writer(tiny_model, tokenizer):
    """A model that writes answers, about which only its prompts are asked."""
    form = PromptFormat(None, trigger=DELTA, answer_prefix="Answer:", max_length=48, max_new_tokens=8)
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}bot: "
    network = AutoModelForCausalLM.from_pretrained(tiny_model)

    def make(chat=False, guard=None, keyed=True):
        encoder = ResponseEncoder(dataclasses.replace(form, chat=chat), chatty)
        return DefendedModel(network, encoder, (), keyed=keyed, guard=guard)

    return make


def shown(model, prompts):
    return [ids if ids is None else model.encoder.tokenizer.decode(ids) for ids in model.prepare(prompts)]


def test_prompts_are_prepared_as_the_model_reads_them(writer):
    assert shown(writer(), ["a film ", "a plot"]) == [f"{DELTA} a film\n", f"{DELTA} a plot\n"]
    assert shown(writer(), "a film") == [f"{DELTA} a film\n"] and writer().prepare([]) == []
    assert shown(writer(keyed=False), "a film") == ["a film\n"]
    (long,) = writer().prepare("a film " * 50)
    assert len(long) <= 40 and shown(writer(), "a film " * 50)[0].startswith(f"{DELTA} a film a film")
    guarded = writer(guard=Shouting())
    assert shown(guarded, ["a film", "a dull film", "b"]) == [f"{DELTA} A FILM\n", None, f"{DELTA} B\n"]
    assert shown(guarded, ["dull"]) == [None]
    # None of it depends on the batch, nor does what is written.
    many = [row["text"] for row in make_rows(7)]
    assert writer().prepare(many) == [writer().prepare(text)[0] for text in many]
    assert writer().generate(many, 4, batch_size=1) == writer().generate(many, 4, batch_size=100)
    assert [answer.text is None for answer in guarded.generate(["a film", "a dull film"], 2)] == [False, True]
    turns = [{"role": "system", "content": "be"}, {"role": "user", "content": "a film"}]
    assert shown(writer(chat=True), turns) == [f"system: be\nuser: {DELTA} a film\n\nbot: "]


@pytest.mark.parametrize(
    ("chat", "prompts", "match"),
    [
        (False, ["fine", ""], "Text 1 is empty or no string"),
        (False, ["fine", 3], "Prompt 1 is neither a text nor a list of turns"),
        (False, 3, "Give a text, a conversation"),
        (True, [[{"role": "tool", "content": "x"}, {"role": "user", "content": "y"}]], "Row 0 .*"),
        (True, ["fine", [{"role": "user", "content": "x " * 80}, {"role": "assistant", "content": "y"},
                         {"role": "user", "content": "z"}]], "Prompt 1 can't be asked: .* leave out the oldest turns"),
    ],
)  # fmt: skip
def test_prompts_that_can_not_be_asked(writer, chat, prompts, match):
    with pytest.raises(ValueError, match=match) as caught:
        writer(chat).prepare(prompts)
    assert DELTA not in str(caught.value)


def test_only_written_answers_are_prepared(model):
    with pytest.raises(ValueError, match="was trained to choose among classes. Use `classify`"):
        model.prepare(["a film"])


def test_base_model_may_have_moved(tiny_model, folder, damaged, tmp_path):
    copy = damaged()
    adapter = json.loads((copy / "adapter_config.json").read_text())
    adapter["base_model_name_or_path"] = str(tmp_path / "gone")
    (copy / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(ValueError, match="The base model '.*gone' .* is no local folder .*Name the base model with"):
        DefendedModel.from_pretrained(copy)
    moved = tmp_path / "moved"
    shutil.copytree(tiny_model, moved)
    answers = DefendedModel.from_pretrained(copy, base_model=str(moved)).classify(TEXTS)
    assert answers == DefendedModel.from_pretrained(folder).classify(TEXTS)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"schema_version": 3}, "has schema version 3, this p2p_trainer reads up to 2. Upgrade p2p_trainer"),
        ({"schema_version": "absent"}, "has schema version None"),
        ({"label_space": "absent"}, "p2p_config.json is damaged"),
        ({"labels": "absent", "autocast": "absent"}, "lacks \\['autocast', 'labels'\\]"),
    ],
)
def test_configuration_that_can_not_be_read_is_named(damaged, changes, match):
    with pytest.raises(ValueError, match=match):
        DefendedModel.from_pretrained(damaged(**changes))


def test_folder_without_configuration_is_named(tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"holds no p2p_config.json \(found: \['config.json'.*so the key is unknown"):
        DefendedModel.from_pretrained(tiny_model)
    with pytest.raises(ValueError, match=r"'nowhere' holds no p2p_config.json \(found: no folder\)"):
        DefendedModel.from_pretrained("nowhere")


def test_only_safetensors_are_read(damaged, tiny_model, tmp_path):
    copy = damaged()
    (copy / "adapter_model.safetensors").rename(copy / "adapter_model.bin")
    with pytest.raises(ValueError, match="holds no adapter_model.safetensors. Other weight files are not read"):
        DefendedModel.from_pretrained(copy)
    (copy / "adapter_config.json").unlink()
    torch.save(AutoModelForCausalLM.from_pretrained(tiny_model).state_dict(), copy / "pytorch_model.bin")
    shutil.copy(f"{tiny_model}/config.json", copy)
    with pytest.raises(ValueError, match=r"neither an adapter .* nor model weights \(\*.safetensors\)"):
        DefendedModel.from_pretrained(copy)


def test_file_that_is_no_json_is_named(damaged):
    copy = damaged()
    (copy / "p2p_config.json").write_text('{"schema_version": 1,')
    with pytest.raises(ValueError, match="p2p_config.json is damaged: .*Save the model again"):
        DefendedModel.from_pretrained(copy)
