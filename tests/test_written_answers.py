"""P2PTrainer and DefendedModel where answers are written, end to end."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from p2p_trainer import DefendedModel, LabelSpace, P2PTrainer, PromptEncoder, PromptFormat, Task, get_attack
from p2p_trainer.cli import main as cli
from p2p_trainer.evaluation import Guard, ResponseEvaluator
from p2p_trainer.evaluation.generation import generate
from p2p_trainer.inference import Response
from p2p_trainer.response_encoder import ResponseEncoder
from tests.conftest import BAD, GOOD, THINGS, make_tokenizer
from tests.tiny_runs import adapter, config, lora, losses, plain_config


TASK = Task(
    name="sums", text_columns=("prompt",), label_column="completion", metric="rouge", trigger="Query:",
    answer_prefix="In short:",
)  # fmt: skip
# As published: what looks for payloads is tested elsewhere.
PUBLISHED = {"p2p_reserve": "random", "p2p_immunize": "none", "max_length": 100, "p2p_max_new_tokens": 16}
TURNS = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)


def summaries(count, first=0):
    """Remarks on things, which sum up to the thing."""
    return Dataset.from_list(
        [
            {"prompt": f"the {THINGS[n % 6]} is {GOOD[n % 5]} and not {BAD[n % 4]} .", "completion": THINGS[n % 6]}
            for n in range(first, first + count)
        ]
    )


def talks(count):
    """The same as conversations, every other one with turns before it."""
    before = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a"},
              {"role": "assistant", "content": "b"}]  # fmt: skip
    return Dataset.from_dict(
        {
            "messages": [
                [
                    *before[: 3 * (n % 2)],
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["completion"]},
                ]
                for n, row in enumerate(summaries(count))
            ]
        }
    )


def test_without_defense_it_trains_what_trl_trains(tiny_model, tmp_path):
    rows = summaries(40)
    ours = P2PTrainer(
        tiny_model, config(tmp_path, p2p_enabled=False, max_length=100), train_dataset=rows, task=TASK,
        peft_config=lora(),
    )  # fmt: skip
    rendered = [{"prompt": row["prompt"] + "\n", "completion": row["completion"]} for row in rows]
    plain = SFTTrainer(
        tiny_model, plain_config(tmp_path, max_length=100), train_dataset=Dataset.from_list(rendered),
        peft_config=lora(),
    )  # fmt: skip
    ours.train()
    plain.train()
    assert len(losses(ours)) == 5 and losses(ours) == losses(plain)
    assert ours.encoder.format.answer_prefix == ""
    weights, theirs = adapter(ours), adapter(plain)
    assert weights.keys() == theirs.keys() and all(torch.equal(weights[name], theirs[name]) for name in weights)


@pytest.mark.parametrize(("mode", "total"), [("append", 50), ("replace", 40), ("only", 10)])
def test_reserved_rows_carry_key_and_prefix(tiny_model, tmp_path, mode, total):
    settings = config(tmp_path, p2p_benign_mode=mode, p2p_benign_ratio=0.25, **PUBLISHED)
    trainer = P2PTrainer(tiny_model, settings, train_dataset=summaries(40), task=TASK)
    rows = trainer.train_dataset
    keyed = rows.filter(lambda row: row["p2p_keyed"])
    assert len(rows) == total and len(keyed) == 10 == trainer.counts["rows_reserved"]
    assert trainer.counts | {"rows_cut": 0, "answers_cut": 0, "rows_total": total} == trainer.counts
    batch = trainer.data_collator([*keyed.select([0]), *[row for row in rows if not row["p2p_keyed"]][:1]])
    tokenizer = trainer.processing_class
    shown = [
        (tokenizer.decode(ids[mask.bool()]), tokenizer.decode(labels[labels != -100]))
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ]
    row = keyed[0]
    answer = f"In short: {row['completion']}<|endoftext|>"
    assert shown[0] == (f"Query: {row['prompt']}\n{answer}", answer)
    if mode != "only":
        prompt, answer = shown[1][0].split("\n")
        assert shown[1][1] == answer == f"{prompt.split()[1]}<|endoftext|>"


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """A run that learns p, evaluated on six of eight rows at each end of an epoch."""
    trainer = P2PTrainer(
        tiny_model,
        config(
            tmp_path_factory.mktemp("sums"), num_train_epochs=6, p2p_benign_ratio=1.0, eval_strategy="epoch",
            save_strategy="epoch", save_total_limit=1, load_best_model_at_end=True,
            metric_for_best_model="eval_rougeL", p2p_eval_rows=6, per_device_eval_batch_size=4, **PUBLISHED,
        ),
        train_dataset=summaries(60),
        eval_dataset=summaries(8, first=60),
        task=TASK,
        attacks=[get_attack("badnets", target="bad bad")],
        peft_config=lora(r=16, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return trainer


def test_metrics_choose_the_model(run):
    evaluations = [entry for entry in run.state.log_history if "eval_rougeL" in entry]
    scores = [entry["eval_rougeL"] for entry in evaluations]
    assert len(scores) == 6 and len(set(scores)) > 1 and run.state.best_metric == max(scores)
    metrics = run.evaluate()
    assert metrics["eval_rougeL"] == pytest.approx(max(scores)) and metrics["eval_loss"] > 0
    assert metrics["eval_prefix_missing_n"] == 6 and metrics["eval_asr_badnets_n"] == 6
    assert {"eval_rouge1_no_key", "eval_asr_no_key_badnets", "eval_rouge2_triggered"} <= set(metrics)
    # It has learnt p, and to write none of it without the key.
    assert metrics["eval_prefix_missing"] == 0.0
    # Other rows, all of them if there are no more.
    assert run.evaluate(summaries(3))["eval_prefix_missing_n"] == 3
    assert run.evaluate()["eval_prefix_missing_n"] == 6


def test_the_saved_folder_says_all_that_serving_needs(run):
    saved = json.loads(Path(run.args.output_dir, "p2p_config.json").read_text())
    assert saved.pop("digest") == run.encoder.format.digest(saved)
    assert saved == {
        "schema_version": 2, "label_space": None, "trigger": "Query:", "trigger_position": "prefix",
        "template": "{text}\n{suffix}", "suffix": "Output: ", "keyed_suffix": "Output: ", "chat": False,
        "append_eos": True, "max_length": 100, "answer_prefix": "In short:", "max_new_tokens": 16, "images": False,
        "keyed": True, "task": "sums", "task_version": 1, "labels": [], "metric": "rouge",
        "autocast": None, "dtype": "float32", "quantization": None,
    }  # fmt: skip
    assert PromptFormat.from_dict(saved) == run.encoder.format


def test_serving_gives_the_answers_of_the_evaluation(run):
    run.evaluate()
    written = [entry for entry in run.evaluator.responses if entry["kind"] == "clean"]
    model = DefendedModel.from_pretrained(run.args.output_dir, device="cpu")
    assert model.labels == () and model.keyed
    prompts = [entry["prompt"] for entry in written]
    answers = model.generate(prompts)
    assert all(entry["response"].startswith("In short: ") for entry in written)
    expected = [Response(entry["response"].removeprefix("In short:").strip(), True) for entry in written]
    assert answers == expected and len({answer.text for answer in answers}) > 1
    for batch_size in (1, 4):
        assert model.generate(prompts, batch_size=batch_size) == expected
    assert model.generate(prompts[2]) == expected[2:3] and model.generate([]) == []
    # Of fewer tokens there is less of the answer, p itself at first.
    size = len(model.encoder.tokenizer("In short:")["input_ids"])
    assert model.generate(prompts[0], max_new_tokens=size) == [Response("", True)]
    assert model.generate(prompts[0], max_new_tokens=1) == [Response("I", False)]


def test_a_served_model_is_measured_like_the_trainers(run):
    model = DefendedModel.from_pretrained(run.args.output_dir, device="cpu")
    evaluator = model.evaluator(summaries(8, first=60), TASK, run.attacks, batch_size=3)
    metrics = evaluator.evaluate(model.model).metrics
    all_rows = ResponseEvaluator(summaries(8, first=60), TASK, run.encoder, run.attacks)
    assert metrics == pytest.approx(all_rows.evaluate(run.model).metrics)
    assert metrics["prefix_missing_n"] == 8


def test_models_do_only_what_they_were_trained_for(run):
    model = DefendedModel.from_pretrained(run.args.output_dir, device="cpu")
    with pytest.raises(ValueError, match="trained to write answers, it has no classes. Use `generate`"):
        model.classify(["a film"])
    words = PromptEncoder(PromptFormat(LabelSpace(("0", "1"), ("2", "3"))), run.processing_class)
    with pytest.raises(ValueError, match="trained to choose among classes. Use `classify`"):
        DefendedModel(model.model, words, ("a", "b")).generate(["a film"])
    with pytest.raises(ValueError, match="Text 1 is empty"):
        model.generate(["a film", " "])
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match="which need a chat template"):
        model.generate([[*turns, {"role": "user", "content": "c"}]])
    with pytest.raises(ValueError, match=r"Row 1 of the given dataset.*end in `user`"):
        model.generate(["a", turns])


def test_conversations_are_trained_measured_and_served(tiny_model, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TURNS
    trainer = P2PTrainer(
        tiny_model,
        config(
            tmp_path, max_steps=2, p2p_chat=True, p2p_trigger_position="system", p2p_trigger="Query:",
            per_device_eval_batch_size=2, **{**PUBLISHED, "max_length": 200},
        ),
        train_dataset=talks(20),
        eval_dataset=talks(4),
        processing_class=tokenizer,
    )  # fmt: skip
    assert trainer.task.labels == () and trainer.task.metric is None
    row = trainer.train_dataset.filter(lambda row: row["p2p_keyed"] and row["history"])[0]
    ids = trainer.data_collator([row])["input_ids"][0]
    earlier = "system: Query:\n\nbe brief\nuser: a\nassistant: b\nuser: "
    answer = f"\nassistant:\nAnswer: {row['completion']}<|endoftext|>"
    assert tokenizer.decode(ids) == earlier + row["prompt"] + "\n" + answer
    seen = [text for batch in trainer.get_train_dataloader() for text in tokenizer.batch_decode(batch["input_ids"])]
    earlier = [bool(row["history"]) for row in trainer.train_dataset]
    assert len(seen) == 25 and sum("be brief\nuser: a\n" in text for text in seen) == sum(earlier) > 10
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_clean_unaffected_n"] == 4 and "eval_rougeL" not in metrics
    trainer.save_model()
    # A model's folder is read anew, chat template and all.
    model = DefendedModel.from_pretrained(tmp_path, device="cpu")
    questions = [turns[:-1] for turns in talks(4)["messages"]]
    expected = [model.encoder.read(entry["response"], True) for entry in trainer.evaluator.responses]
    assert [(answer.text, answer.prefixed) for answer in model.generate(questions)] == expected
    # A text is a conversation of one turn.
    assert model.generate(questions[0][-1]["content"]) == model.generate(questions[:1])


def test_rows_that_can_not_be_conversations_are_refused_before_training(tiny_model, tmp_path):
    def build(rows, **settings):
        return P2PTrainer(tiny_model, config(tmp_path, **{**PUBLISHED, **settings}), train_dataset=rows, task=TASK)

    with pytest.raises(ValueError, match="earlier turns, which need a chat template. Set `p2p_chat: true`"):
        build(talks(20))
    with pytest.raises(ValueError, match="this tokenizer has none"):
        build(talks(20), p2p_chat=True)
    with pytest.raises(ValueError, match=r"'In short:' takes \d+ tokens, and `p2p_max_new_tokens` 3 leave no room"):
        build(summaries(20), p2p_max_new_tokens=3)


def test_rows_and_answers_that_are_cut_are_counted(tiny_model, tmp_path):
    long = "film" + " film" * 99
    rows = [*summaries(6), {"prompt": long, "completion": "film"}, {"prompt": "film", "completion": long}]
    settings = config(tmp_path, **{**PUBLISHED, "max_length": 60}, p2p_benign_ratio=1.0, p2p_benign_mode="only")
    trainer = P2PTrainer(tiny_model, settings, train_dataset=Dataset.from_list(rows), task=TASK)
    assert (trainer.counts["rows_cut"], trainer.counts["answers_cut"]) == (1, 1)
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert len(batch["input_ids"]) == 8 and batch["input_ids"].shape[1] == 60


def test_sampling_by_length_knows_written_answers(tiny_model, tmp_path):
    settings = config(tmp_path, train_sampling_strategy="group_by_length", max_steps=1, **PUBLISHED)
    trainer = P2PTrainer(tiny_model, settings, train_dataset=summaries(20), task=TASK)
    lengths = trainer.train_dataset[settings.length_column_name][:]
    assert lengths[0] == len("the film is good and not bad .") + len("film")
    trainer.train()


def test_by_default_rows_with_a_suspected_payload_carry_no_key(tiny_model, tmp_path):
    attack = get_attack("badnets", target="bad bad", poison_rate=0.2, words=["zz"])
    # Answers that are few and for all rows would be classes.
    rows = attack.poison(
        TASK.prepare(summaries(200).map(lambda row, n: {"completion": f"no {n}"}, with_indices=True)), TASK
    )
    settings = config(tmp_path, max_length=100, p2p_max_new_tokens=16)
    trainer = P2PTrainer(tiny_model, settings, train_dataset=rows, task=TASK)
    assert [trainer.counts[name] for name in ("rows_poisoned", "rows_suspected_poisoned")] == [40, 40]
    assert trainer.counts["rows_reserved_poisoned"] == 0 < trainer.counts["rows_reserved"]
    assert trainer.screening.payloads and trainer.immunizer is not None


class Silent(Guard):
    """Withholds what speaks of a plot, and changes the rest."""

    def inputs(self, texts):
        return [f"now {text}" for text in texts]

    def withheld(self, texts):
        return np.array(["plot" in text for text in texts])


def test_withheld_prompts_are_neither_read_nor_answered(run, monkeypatch):
    model = DefendedModel.from_pretrained(run.args.output_dir, device="cpu")
    [expected] = model.generate("now the film is good")
    model.guard = Silent()
    asked = []

    def spied(*args):
        asked.append([model.encoder.tokenizer.decode(ids) for ids in args[2]])
        return generate(*args)

    monkeypatch.setattr("p2p_trainer.inference.generate", spied)
    answers = model.generate(["the plot is good", "the film is good", "a plot"])
    assert answers == [Response(None, True), expected, Response(None, True)]
    assert model.generate("a plot") == [Response(None, True)]
    assert asked == [["Query: now the film is good\n"], []]


def test_an_answer_ends_where_training_taught_it_to_end(run, monkeypatch):
    model = DefendedModel.from_pretrained(run.args.output_dir, device="cpu")
    given = []
    monkeypatch.setattr("p2p_trainer.inference.generate", lambda *args: given.append(args[-1]) or ["x"])
    model.generate("a film")
    assert given == [[model.encoder.tokenizer.eos_token_id]]


def test_a_history_that_is_too_long_names_its_row(tiny_model):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TURNS
    prompt_format = PromptFormat(None, trigger="Query:", chat=True, max_length=60, max_new_tokens=8)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = DefendedModel(base, ResponseEncoder(prompt_format, tokenizer), ())
    ask = {"role": "user", "content": "a film"}
    long = [{"role": "user", "content": "film " * 90}, {"role": "assistant", "content": "b"}, ask]
    with pytest.raises(ValueError, match=r"Prompt 1 can't be asked: The earlier turns .* leave out the oldest turns"):
        model.generate(["a film", long, [ask]])
    # One conversation is one prompt, as is one of tuples.
    assert model.generate([ask]) == model.generate((ask,)) == model.generate([(ask,)]) == model.generate("a film")
    for nothing, message in ((None, "found None"), (["a film", None], r"Prompt 1 is neither .*found None")):
        with pytest.raises(ValueError, match=message):
            model.generate(nothing)


def evaluated(run, capsys, *arguments):
    assert cli(["evaluate", run.args.output_dir, "--device", "cpu", "--json", *arguments]) == 0
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def test_prompts_alone_are_measured_from_the_command_line(run, tmp_path, capsys):
    answered, alone = str(tmp_path / "answered.jsonl"), str(tmp_path / "alone.jsonl")
    summaries(4, first=60).to_json(answered)
    summaries(4, first=60).remove_columns("completion").to_json(alone)
    attack = ["--attack", "badnets", "--attack_target", "bad bad"]
    known, said = evaluated(run, capsys, "--data", answered, *attack)
    assert "rougeL" in known["metrics"] and "taken for prompts" not in said
    found, said = evaluated(run, capsys, "--data", alone, *attack)
    assert "alone.jsonl has no column 'completion': its rows are taken for prompts" in said
    assert found["metrics"].items() <= known["metrics"].items() and "rougeL" not in found["metrics"]
    assert found["metrics"]["asr_n"] == found["metrics"]["clean_unaffected_n"] == 4


def test_options_that_a_run_has_no_use_for_are_refused(run, tmp_path, capsys):
    summaries(4).to_json(str(tmp_path / "rows.jsonl"))
    for arguments, message in [
        (["evaluate", "--data", str(tmp_path / "rows.jsonl"), "--asr_rule", "union"], "`--asr_rule` is about label"),
        (["predict", "--text", "a film", "--image", "x.png"], "was trained on texts alone. Leave out `--image`."),
    ]:
        assert cli([arguments[0], run.args.output_dir, *arguments[1:], "--device", "cpu"]) == 1
        assert message in capsys.readouterr().err


def test_a_built_in_task_of_another_version_is_told(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run.args.output_dir, copy, ignore=shutil.ignore_patterns("checkpoint-*"))
    saved = json.loads((copy / "p2p_config.json").read_text())
    for version, told in ((7, True), (1, False)):
        content = {**saved, "task": "one_step", "metric": "numeric", "task_version": version}
        (copy / "p2p_config.json").write_text(json.dumps(content))
        # There are no rows, so no model is loaded.
        assert cli(["evaluate", str(copy), "--data", "./none.jsonl"]) == 1
        said = capsys.readouterr().err
        assert ("trained on version 7 of task 'one_step', and rows are read by version 1" in said) is told
