"""Recipes for OpenAI-compatible servers: what they restrict answers to, and how answers are read."""

import json
import re
import types

import pytest
import torch

from p2p_trainer import DefendedModel, LabelSpace, PromptEncoder, PromptFormat
from p2p_trainer.exporting import project
from p2p_trainer.exporting.openai_recipe import escaped, make_recipe
from p2p_trainer.exporting.prompt_end import prompt_end
from p2p_trainer.response_encoder import ResponseEncoder
from tests.conftest import make_rows
from tests.exporting_runs import DELTA, classifying_run, shared_run
from tests.tokenizer_kinds import tokenizer_named


LABELS = ["negative", "positive"]
TEXTS = [row["text"] for row in make_rows(30, seed=3)]
DIGITS = LabelSpace(("0", "1"), ("2", "3"))
WORDS = LabelSpace(("negative", "positive"), ("bad film", "good story"))


def encoder_of(space, name="qwen", **changes):
    return PromptEncoder(PromptFormat(space, trigger=DELTA, max_length=200, **changes), tokenizer_named(name))


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    """A model that has learnt something, so that both classes occur."""
    return DefendedModel.from_pretrained(shared_run(classifying_run, tiny_model, tmp_path_factory))


@pytest.mark.parametrize("keyed", [True, False])
def test_allowed_tokens_give_the_class_of_classify(model, keyed):
    model = DefendedModel(model.model, model.encoder, LABELS, keyed=keyed)
    recipe = json.loads(json.dumps(make_recipe(model.encoder, keyed, LABELS)))
    requests = recipe["requests"]
    allowed = requests["vllm"]["allowed_token_ids"]
    assert recipe["exact"] is True and len(set(allowed)) == 2
    bias = {int(token): value for token, value in requests["transformers"]["logit_bias"].items()}
    assert requests["openai"]["logit_bias"] == requests["transformers"]["logit_bias"]
    assert set(bias) == set(allowed) and all(type(value) is float for value in bias.values())
    assert all(one["max_tokens"] == 1 and one["temperature"] == 0 for one in requests.values())
    found, biased = [], []
    for ids in model.encoder.encode_prompts(TEXTS, keyed):
        with torch.no_grad():
            logits = model.model(torch.tensor([ids])).logits[0, -1]
        best = allowed[int(logits[allowed].argmax())]
        found.append(recipe["projection"]["token"][str(best)])
        for token, value in bias.items():
            logits[token] += value
        biased.append(project(model.encoder.tokenizer.decode([int(logits.argmax())]), recipe))
    answers = [answer.label for answer in model.classify(TEXTS)]
    assert found == biased == answers and (not keyed or set(answers) == set(LABELS))


@pytest.mark.parametrize(
    ("name", "space", "texts"),
    [
        ("qwen", DIGITS, {"2": "negative", "3": "positive"}),
        ("gpt2", DIGITS, {" 2": "negative", "2": "negative", " 3": "positive", "3": "positive"}),
        (
            "qwen",
            WORDS,
            {" bad film": "negative", "bad film": "negative", " good story": "positive", "good story": "positive"},
        ),
        ("qwen", LabelSpace(("x", "y"), ("a.b", "a|b")), {".b": "negative", "|b": "positive"}),
    ],
)
def test_answers_are_mapped_to_classes(name, space, texts):
    recipe = make_recipe(encoder_of(space, name), True, LABELS)
    if ".b" not in texts:
        assert recipe["projection"]["text"] == texts
    for text, label in recipe["projection"]["text"].items():
        assert project(text, recipe) == project(f" {text}\n", recipe) == label
        pattern = recipe["requests"]["sglang"]["regex"]
        assert recipe["requests"]["tgi"]["response_format"] == {"type": "regex", "value": pattern}
        assert re.fullmatch(pattern, text) or text == text.strip()
    # Words without the key, and whatever else comes, are no answers.
    assert [project(text, recipe) for text in ("0", "negative", "", "22", "bad", "a b")] == [None] * 6


def test_words_of_several_tokens_are_choices_with_the_tokens_of_training():
    for name in ("qwen", "gpt2", "llama_unigram_bos", "chat"):
        encoder = encoder_of(WORDS, name, chat=name == "chat")
        recipe = make_recipe(encoder, True, LABELS)
        assert recipe["exact"] is False and "token" not in recipe["projection"]
        # Nothing but a grammar restricts several tokens.
        assert sorted(recipe["requests"]) == ["sglang", "tgi", "vllm"]
        choices = recipe["requests"]["vllm"]["structured_outputs"]["choice"]
        assert [project(choice, recipe) for choice in choices] == LABELS
        end = prompt_end(encoder, True)
        before, after, _ = encoder.skeletons[True]
        prompt = before + "a film" + after[: len(after) - end.cut] + end.added
        [asked] = encoder.encode_prompts(["a film"], True)
        for choice, scored in zip(choices, encoder.answers[True].scored[2:], strict=True):
            assert encoder.tokenize([prompt + choice])[0] == [*asked, *scored]
            assert recipe["requests"]["vllm"]["max_tokens"] > len(choice)


def test_answers_that_differ_in_white_space_alone_are_kept_apart():
    recipe = {"projection": {"text": {" a": "one", "a": "two"}}}
    assert project(" a", recipe) == "one" and project("a", recipe) == "two" and project("a\n", recipe) == "two"


def test_no_word_without_a_place_in_the_text():
    encoder = encoder_of(DIGITS)
    shifted = encoder.encode_prompts
    encoder.encode_prompts = types.MethodType(
        lambda self, *given: [ids[:-1] + [5] for ids in shifted(*given)], encoder
    )
    with pytest.raises(ValueError, match="no text ends there, so other servers can't be asked as training did"):
        make_recipe(encoder, True, LABELS)


def test_written_answers_have_their_prefix_and_end():
    prompt_format = PromptFormat(None, trigger=DELTA, answer_prefix="In short (1):", max_new_tokens=20)
    encoder = ResponseEncoder(prompt_format, tokenizer_named("qwen"))
    recipe = make_recipe(encoder, True, [])
    asked = {"max_tokens": 20, "temperature": 0.0}
    assert recipe["requests"]["openai"] == recipe["requests"]["tgi"] == asked
    assert recipe["requests"]["vllm"] == recipe["requests"]["sglang"] == {**asked, "stop_token_ids": [0]}
    assert recipe["end_tokens"] == {"0": "<|endoftext|>"}
    pattern = re.compile(recipe["answer_prefix_pattern"])
    assert pattern.pattern == r"^\s*In short \(1\):\s*"
    assert pattern.sub("", " In short (1): a film .") == "a film ." and not pattern.match("in short (1): a")
    assert "raise an alarm" in recipe["otherwise"]
    # A chat template may end its turns with a token of its own.
    chat = ResponseEncoder(
        PromptFormat(None, trigger=DELTA, chat=True, answer_prefix="A:", max_new_tokens=20), tokenizer_named("chat")
    )
    ends = make_recipe(chat, True, [])["end_tokens"]
    assert sorted(ends.values()) == ["<|endoftext|>", "<|im_end|>"]
    # Without the key no prefix was trained.
    plain = make_recipe(encoder, False, [])
    assert plain["answer_prefix"] == "" and "answer_prefix_pattern" not in plain


def test_the_key_is_not_in_a_recipe():
    for encoder in (encoder_of(DIGITS), encoder_of(WORDS, "chat", chat=True, trigger_position="system")):
        recipe = make_recipe(encoder, True, LABELS)
        assert DELTA not in json.dumps(recipe, ensure_ascii=False)
        text, count = recipe["check"]["text"], recipe["check"]["prompt_tokens"]
        assert count == len(encoder.encode_prompts([text], True)[0]) > len(encoder.encode_prompts([text], False)[0])


def test_patterns_match_the_text_that_they_were_made_of():
    text = r"a.b^c$d*e+f?g(h)[i]{j}|k\l m-n/o"
    assert re.fullmatch(escaped(text), text) and not re.fullmatch(escaped(text), text.replace(".", "x"))
