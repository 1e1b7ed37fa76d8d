"""The transformers pipelines of saved runs answer what DefendedModel answers."""

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from p2p_trainer import DefendedModel, LabelSpace, P2PTrainer, PromptEncoder, PromptFormat
from p2p_trainer.evaluation import Guard
from p2p_trainer.pipelines import P2PTextClassificationPipeline, P2PTextGenerationPipeline
from p2p_trainer.vision_encoder import VisionPromptEncoder
from tests.conftest import BAD, GOOD, THINGS, make_rows, make_tokenizer
from tests.tiny_runs import config, lora, saved_run
from tests.tiny_vlm import make_model, make_processor


WORDS, WRITTEN = "p2p-text-classification", "p2p-text-generation"
# Of different lengths, so that batches are padded.
TEXTS = [row["text"] for row in make_rows(20, seed=3)] + ["fine", "dull " * 30]
DELTA = "The query currently entered is:"
TURNS = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    saved_run(tiny_model, folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return DefendedModel.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def classify(folder):
    return pipeline(WORDS, model=str(folder), device="cpu")


def question(number):
    return f"the {THINGS[number % 6]} is {GOOD[number % 5]} and not {BAD[number % 4]} ."


PROMPTS = [
    question(0),
    [{"role": "user", "content": question(1) * 3}],
    [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": question(2)},
        {"role": "assistant", "content": "scene"},
        {"role": "user", "content": question(3)},
    ],
    *map(question, range(4, 9)),
]


@pytest.fixture(scope="module")
def writing(tiny_model, tmp_path_factory):
    """A run that has learnt to write p and the thing that is spoken of."""
    folder = tmp_path_factory.mktemp("writing")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TURNS
    rows = [
        {"messages": [{"role": "user", "content": question(n)}, {"role": "assistant", "content": THINGS[n % 6]}]}
        for n in range(60)
    ]
    settings = {
        "num_train_epochs": 6, "p2p_benign_ratio": 1.0, "p2p_reserve": "random", "p2p_immunize": "none",
        "p2p_chat": True, "p2p_trigger_position": "system", "p2p_trigger": "Query:", "p2p_answer_prefix": "In short:",
        "max_length": 200, "p2p_max_new_tokens": 16,
    }  # fmt: skip
    trainer = P2PTrainer(
        tiny_model, config(folder, **settings), train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=lora(r=16, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture(scope="module")
def answer(writing):
    return pipeline(WRITTEN, model=str(writing), device="cpu")


@pytest.fixture
def changed(folder, tmp_path):
    """Copy of the adapter's folder with another entry in one of its files."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)

    def change(name, **changes):
        content = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps({**content, **changes}))
        return copy

    return change


class Silent(Guard):
    """Withholds what speaks of a plot, and changes the rest."""

    def inputs(self, texts):
        return [f"dull dull {text}" for text in texts]

    def withheld(self, texts):
        return np.array(["plot" in text for text in texts])


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_classes_are_those_of_the_defended_model(classify, model, batch_size):
    assert isinstance(classify, P2PTextClassificationPipeline) and classify.tokenizer.padding_side == "right"
    expected = model.classify(TEXTS)
    found = classify(TEXTS, batch_size=batch_size)
    assert [entry["label"] for entry in found] == [one.label for one in expected]
    assert [entry["score"] for entry in found] == pytest.approx([one.score for one in expected], abs=1e-6)
    assert len({entry["label"] for entry in found}) == 2
    ranked = classify(TEXTS, batch_size=batch_size, top_k=None)
    assert [{entry["label"]: entry["score"] for entry in entries} for entries in ranked] == [
        pytest.approx(one.scores, abs=1e-6) for one in expected
    ]


def test_whole_models_are_loaded_as_adapters_are(tiny_model, tmp_path):
    saved_run(tiny_model, tmp_path, full=True, num_train_epochs=1)
    found = pipeline(WORDS, model=tmp_path, device=-1, batch_size=8)(TEXTS)
    expected = DefendedModel.from_pretrained(tmp_path, device="cpu").classify(TEXTS)
    assert [entry["score"] for entry in found] == pytest.approx([one.score for one in expected], abs=1e-6)


def test_results_have_the_shape_of_text_classification(classify, model):
    [one] = model.classify("a fine film")
    likeliest = {"label": one.label, "score": one.score}
    other = next(label for label in one.scores if label != one.label)
    both = [likeliest, {"label": other, "score": one.scores[other]}]
    assert classify("a fine film") == [likeliest]
    assert classify(["a fine film"]) == classify(("a fine film",)) == [likeliest]
    assert classify("a fine film", top_k=1) == [likeliest] and classify("a fine film", top_k=5) == both
    assert classify(["a fine film"], top_k=2) == [both] and classify(["a fine film"], top_k=None) == [both]
    # As there, also where `top_k` was given before.
    before = pipeline(WORDS, model=model, top_k=None)
    assert before("a fine film") == [both] and before(["a fine film"], top_k=1) == [[likeliest]]


def test_inputs_may_come_one_by_one(classify):
    expected = classify(TEXTS, batch_size=4)
    rows = Dataset.from_dict({"text": TEXTS})
    for inputs in ((text for text in TEXTS), iter(TEXTS), rows["text"], KeyDataset(rows, "text")):
        assert list(classify(inputs, batch_size=4)) == expected
    read = []
    answers = iter(classify((read.append(text) or text for text in TEXTS), batch_size=4))
    assert next(answers) == expected[0] and len(read) == 4
    assert list(answers) == expected[1:] and len(read) == len(TEXTS)
    assert classify([]) == classify(()) == classify(rows.select([])["text"]) == []


def test_the_key_is_asked_with_and_never_shown(classify, monkeypatch, capfd):
    asked = []
    encode = classify.defended.encoder.encode_prompts
    monkeypatch.setattr(
        classify.defended.encoder, "encode_prompts", lambda *args: asked.append(encode(*args)) or asked[-1]
    )
    found = classify(TEXTS[:3], batch_size=3, top_k=None)
    (prompts,) = asked
    assert all(classify.tokenizer.decode(ids).startswith(DELTA) for ids in prompts) and len(prompts) == 3
    assert DELTA not in repr((found, classify)) and DELTA not in "".join(capfd.readouterr())


@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_is_withheld_has_no_label(model, batch_size):
    guarded = DefendedModel(model.model, model.encoder, model.labels, guard=Silent())
    pipe = pipeline(WORDS, model=guarded)
    texts = ["the film is good .", "the plot is good .", "the cast is good and the plot is dull ."]
    expected = guarded.classify(texts)
    assert expected[0] != model.classify(texts)[0]
    found = pipe(texts, batch_size=batch_size)
    assert [entry["label"] for entry in found] == [expected[0].label, None, None]
    assert [entry["score"] for entry in found] == pytest.approx([one.score for one in expected])
    ranked = pipe(texts, batch_size=batch_size, top_k=None)
    assert [[entry["label"] for entry in entries] for entries in ranked][1:] == [[None], [None]]
    assert len(ranked[0]) == 2


def test_the_guard_of_a_run_is_loaded_with_it(folder, tmp_path, model):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    guard = {"schema_version": 1, "defense": {"name": "key_without_relabel"}, "state": {"trigger": "dull dull"}}
    (tmp_path / "defense.json").write_text(json.dumps(guard))
    found = pipeline(WORDS, model=str(tmp_path), device="cpu")(TEXTS, batch_size=8)
    expected = model.classify([f"dull dull {text}" for text in TEXTS])
    assert [entry["score"] for entry in found] == pytest.approx([one.score for one in expected], abs=1e-6)
    assert expected != model.classify(TEXTS)
    # One that is not this package's is refused, unless it is named.
    guard["defense"]["name"] = "someone:Else"
    (tmp_path / "defense.json").write_text(json.dumps(guard))
    with pytest.raises(ValueError, match="names the defense 'someone:Else', which is none of this package"):
        pipeline(WORDS, model=str(tmp_path))


def test_the_type_of_training_counts_unless_another_is_given(classify, folder):
    assert classify.defended.model.dtype == torch.float32
    given = pipeline(WORDS, model=str(folder), device="cpu", dtype="bfloat16")
    assert given.defended.model.dtype == torch.bfloat16 == given.dtype
    assert given.device == torch.device("cpu")
    assert pipeline(WORDS, model=str(folder), model_kwargs={"dtype": torch.float16}).dtype == torch.float16


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_answers_are_those_of_the_defended_model(answer, writing, batch_size):
    assert isinstance(answer, P2PTextGenerationPipeline)
    model = DefendedModel.from_pretrained(writing, device="cpu")
    expected = [[{"generated_text": one.text, "prefixed": one.prefixed}] for one in model.generate(PROMPTS)]
    assert answer(PROMPTS, batch_size=batch_size) == expected
    assert len({one["generated_text"] for [one] in expected}) > 2
    assert {one["prefixed"] for [one] in expected} == {True, False}


def test_quantized_weights_stay_where_they_are(folder):
    model = DefendedModel.from_pretrained(folder, device="cpu", quantization="8bit")
    expected = [one.score for one in model.classify(TEXTS)]
    pipe = pipeline(WORDS, model=str(folder), device="cpu", model_kwargs={"quantization": "8bit"})
    for found in (pipe, pipeline(WORDS, model=model)):
        assert found.device == torch.device("cpu")
        assert [entry["score"] for entry in found(TEXTS, batch_size=8)] == pytest.approx(expected, abs=1e-5)


def test_a_conversation_is_one_prompt(answer):
    [text, short, long, *_] = answer(PROMPTS)
    assert answer(PROMPTS[0]) == text and answer(PROMPTS[1]) == short and answer(PROMPTS[2]) == long
    assert answer([PROMPTS[1], PROMPTS[2]], batch_size=2) == [short, long]
    assert list(answer(prompt for prompt in PROMPTS[1:3])) == [short, long]
    assert answer([]) == []
    rows = Dataset.from_dict({"messages": [PROMPTS[1], PROMPTS[2]]})
    assert list(answer(KeyDataset(rows, "messages"), batch_size=2)) == [short, long]


def test_answers_are_as_long_as_is_asked(answer, writing):
    model = DefendedModel.from_pretrained(writing, device="cpu")
    prefix = len(model.encoder.tokenizer("In short:")["input_ids"])
    assert model.generate(question(0), max_new_tokens=prefix)[0].text == ""
    assert answer(question(0))[0]["generated_text"] in THINGS
    nothing = [{"generated_text": "", "prefixed": True}]
    assert answer(question(0), max_new_tokens=prefix) == nothing
    assert pipeline(WRITTEN, model=model, max_new_tokens=prefix)(question(0)) == nothing


def test_withheld_prompts_have_no_text(writing):
    model = DefendedModel.from_pretrained(writing, device="cpu")
    model.guard = Silent()
    [kept] = model.generate("the film is good .")
    found = pipeline(WRITTEN, model=model)(["the plot is good .", "the film is good ."], batch_size=2)
    assert found == [
        [{"generated_text": None, "prefixed": True}],
        [{"generated_text": kept.text, "prefixed": kept.prefixed}],
    ]


def test_tokenizers_without_a_pad_token_form_batches_too(model):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    padless = DefendedModel(model.model, PromptEncoder(model.encoder.format, tokenizer), model.labels)
    pipe = pipeline(WORDS, model=padless)
    assert [entry["label"] for entry in pipe(TEXTS, batch_size=8)] == [one.label for one in model.classify(TEXTS)]
    # Control tokens are broken up in texts, and so it may not become one.
    assert tokenizer.pad_token is None


@pytest.mark.parametrize("text", ["", " \n", None, 3, {"text": "fine"}, b"fine"])
def test_empty_texts_are_refused(classify, answer, text):
    with pytest.raises(ValueError, match="A text is empty or no string"):
        classify(text)
    with pytest.raises(ValueError, match="A text is empty or no string"):
        classify(["fine", text], batch_size=2)
    with pytest.raises(ValueError, match="A prompt is (empty|neither a text nor a list of turns)"):
        answer(text)


def test_conversations_that_are_none_are_refused(classify, answer):
    turn = {"role": "user", "content": "fine"}
    with pytest.raises(ValueError, match="A text is empty or no string"):
        classify([turn])
    with pytest.raises(ValueError, match="end in `user`"):
        answer([turn, {"role": "assistant", "content": "x"}])
    with pytest.raises(ValueError, match="A prompt is empty"):
        answer([{"role": "user", "content": " "}])
    with pytest.raises(ValueError, match="earlier turns, which need a chat template"):
        plain = DefendedModel(answer.defended.model, type(answer.defended.encoder)(
            PromptFormat(None, max_length=100, max_new_tokens=16), make_tokenizer()), ())  # fmt: skip
        pipeline(WRITTEN, model=plain)([turn, {"role": "assistant", "content": "x"}, turn])


def test_unknown_options_are_refused(classify, answer, folder):
    with pytest.raises(
        ValueError, match=r"'p2p-text-classification' knows no \['topk'\]. Known are \['top_k', 'batch"
    ):
        classify("fine", topk=2)
    with pytest.raises(ValueError, match=r"knows no \['temperature'\]. Known are \['max_new_tokens', 'batch_size'"):
        answer([], temperature=1.0)
    with pytest.raises(ValueError, match=r"knows no \['function_to_apply'\]"):
        pipeline(WORDS, model=str(folder), function_to_apply="softmax")
    for wrong in (0, True, "all"):
        with pytest.raises(ValueError, match="`top_k` is a number of classes, at least 1, or `None` for all; got"):
            classify("fine", top_k=wrong)
    with pytest.raises(ValueError, match="`max_new_tokens` is a number of at least 1, got 0"):
        answer("fine", max_new_tokens=0)


def test_each_task_has_its_pipeline(folder, writing):
    with pytest.raises(ValueError, match="trained to write answers, it has no classes. Use 'p2p-text-generation'"):
        pipeline(WORDS, model=str(writing))
    with pytest.raises(ValueError, match="trained to choose among classes. Use 'p2p-text-classification'"):
        pipeline(WRITTEN, model=str(folder))


def test_runs_with_images_are_refused():
    processor = make_processor()
    space = LabelSpace(("0", "1"), ("2", "3"))
    encoder = VisionPromptEncoder(PromptFormat(space, chat=True, max_length=200), processor)
    with pytest.raises(ValueError, match="was trained with images, which the pipeline does not take"):
        pipeline(WORDS, model=DefendedModel(make_model(processor), encoder, ("a", "b")))


def test_folders_without_a_key_are_refused(tiny_model, changed):
    for task in (WORDS, WRITTEN):
        with pytest.raises(ValueError, match="holds no p2p_config.json .*so the key is unknown"):
            pipeline(task, model=tiny_model)
    with pytest.raises(ValueError, match="A `Qwen3ForCausalLM` comes without its key. Give the folder of a run"):
        pipeline(WORDS, model=AutoModelForCausalLM.from_pretrained(tiny_model))
    with pytest.raises(ValueError, match="p2p_config.json is damaged"):
        pipeline(WORDS, model=str(changed("p2p_config.json", label_space=None)))


def test_what_can_not_be_loaded_is_named(folder, changed, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"can't be loaded with \['device_map'\]. Known are `device`"):
        pipeline(WORDS, model=str(folder), device_map="cpu")
    with pytest.raises(ValueError, match="runs no code that a model brings. Leave out `trust_remote_code`"):
        pipeline(WORDS, model=str(folder), trust_remote_code=True)
    with pytest.raises(ValueError, match="has a tokenizer of its own"):
        pipeline(WORDS, model=str(folder), tokenizer=make_tokenizer())
    gone = changed("adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(OSError, match="gone"):
        pipeline(WORDS, model=str(gone))
    moved = DefendedModel.from_pretrained(gone, base_model=tiny_model, device="cpu")
    expected = pipeline(WORDS, model=str(folder), device="cpu")(TEXTS[:3])
    assert pipeline(WORDS, model=moved)(TEXTS[:3]) == expected
    # Or to `pipeline`, twice.
    twice = {"config": tiny_model, "model_kwargs": {"base_model": tiny_model}}
    assert pipeline(WORDS, model=str(gone), device="cpu", **twice)(TEXTS[:3]) == expected


def test_code_of_a_folder_never_runs(tiny_model, tmp_path, folder):
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    shutil.copy(folder / "p2p_config.json", tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["custom_pipelines"] = {WORDS: {"impl": "evil.Evil", "pt": ["AutoModelForCausalLM"]}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="trust_remote_code"):
        pipeline(WORDS, model=str(tmp_path))


def test_a_pipeline_saves_no_folder_without_a_key(classify, tmp_path):
    with pytest.raises(ValueError, match="weights and tokenizer alone do not know the key. Copy the run's folder"):
        classify.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
