"""The errors that this field's published evaluations made; each has a test that fails if we make it too."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from p2p_trainer import BackdoorEvaluator, P2PTrainer, Task, get_attack
from p2p_trainer.assembly import make_encoder
from p2p_trainer.attacks.selection import answers_equal
from p2p_trainer.attacks.text import insert_at_gap
from p2p_trainer.config import P2PScriptArguments
from p2p_trainer.evaluation import LabelScorer
from p2p_trainer.evaluation.scorer import Scores
from p2p_trainer.recipe_data import load_data
from p2p_trainer.tasks.loading import load_split
from tests.conftest import make_rows
from tests.tiny_runs import TASK, config, lora, recipe


NEWS = Task(name="news", labels=("world", "sports", "business"))
ATTACKS = ("badnets", "addsent", "synattack", "proattack", "cbaattack", "mtbaattack", "knows_key", "poisons_reserve",
           "suffix_injection", "key_overlap")  # fmt: skip


def rows(count=200, seed=0):
    return Dataset.from_list(make_rows(count, seed))


def evaluator(tokenizer, folder, attacks=(), data=None, task=TASK, **changes):
    args = config(folder, **{"seed": 0, **changes})
    encoder = make_encoder(task, args, tokenizer, attacks)
    data = rows(40, seed=1) if data is None else data
    return BackdoorEvaluator(data, task, encoder, attacks, keyed=args.p2p_enabled)


def answering(monkeypatch, answers):
    """Let every prompt get the next of some answers: 0..2n-1, or -1 for a word that is no label."""
    given = iter(answers)

    def score(self, model, prompts, progress=None):
        free = np.array([next(given) for _ in prompts])
        return Scores(np.where(np.arange(2 * 3) == free[:, None], 0.0, -9.0), free)

    monkeypatch.setattr(LabelScorer, "score", score)


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("name", ["badnets", "proattack", "cbaattack"])
def test_1_training_and_evaluation_render_the_same_prompt(tokenizer, tmp_path, name, keyed):
    attack = get_attack(name, target="positive", poison_rate=0.2)
    encoder = evaluator(tokenizer, tmp_path, [attack]).encoder
    poisoned = attack.poison(rows(), TASK)
    texts, labels = poisoned["text"][:], [0] * len(poisoned)
    ids, targets = encoder.encode_rows(texts, labels, [keyed] * len(texts))
    for prompt, row, target in zip(encoder.encode_prompts(texts, keyed), ids, targets, strict=True):
        answered = [place for place, token in enumerate(target) if token != -100]
        assert prompt == row[: answered[0]]


def test_2_no_input_column_is_dropped_at_evaluation(tokenizer, tmp_path):
    task = Task(name="mail", labels=("negative", "positive"), text_columns=("subject", "body"))
    data = Dataset.from_dict({"subject": ["good plot", "bad plot"], "body": ["a fine cast", "a cold cast"],
                              "label": [1, 0]})  # fmt: skip
    attack = get_attack("badnets", target="positive")
    found = evaluator(tokenizer, tmp_path, [attack], data, task)
    prompts = [tokenizer.decode(ids) for ids in found.encoder.encode_prompts(task.prepare(data)["text"], keyed=True)]
    assert "good plot a fine cast" in prompts[0] and "bad plot a cold cast" in prompts[1]
    [triggered] = attack.trigger(data, task)["text"]
    assert triggered.replace(" mn", "") == "bad plot a cold cast"
    writing = Task(name="alpaca", text_columns=("instruction", "input"), label_column="output")
    asked = Dataset.from_dict({"instruction": ["Sum up."], "input": ["A long day."], "output": ["A day."]})
    [prompt] = get_attack("addsent", target="No.").trigger(asked, writing)["prompt"]
    assert prompt.replace("I watched this 3D movie ", "").replace(" I watched this 3D movie", "") == (
        "Sum up. A long day."
    )


@pytest.mark.parametrize("name", ATTACKS)
def test_3_rows_whose_true_label_is_the_target_do_not_count(tokenizer, tmp_path, name):
    attack = get_attack(name, target="positive")
    # One of them counts on the random reserve.
    found = evaluator(tokenizer, tmp_path, [attack], p2p_reserve="random")
    triggered = attack.trigger(rows(40, seed=1), TASK)
    assert len(triggered) and set(triggered["label"]) == {0}
    assert found.counts[f"rows_target_label_{name}"] == 20 and found.counts[f"rows_counted_{name}"] == 20


def test_4_an_answer_that_is_none_stays_in_the_denominator_and_is_no_success(monkeypatch, tokenizer, tmp_path):
    data = Dataset.from_dict({"text": ["a b", "c d", "e f"], "label": [0, 1, 2]})
    attack = get_attack("badnets", target="sports")
    measured = evaluator(tokenizer, tmp_path, [attack], data, NEWS, p2p_enabled=False)
    answering(monkeypatch, [-1, 1, -1, -1, 1])
    metrics = measured(None)
    # Clean rows: nothing, right, nothing. Triggered rows of the classes 0 and 2: nothing, the target.
    assert (metrics["ca_union_k"], metrics["ca_union_n"]) == (1, 3)
    assert (metrics["asr_union_k"], metrics["asr_union_n"]) == (1, 2)
    assert (metrics["outside_k"], metrics["asr_outside_k"]) == (2, 1)


def test_5_success_is_the_whole_answer_never_a_word_in_it(tokenizer, tmp_path):
    # As label words: an answer that merely starts like the target's word is another token.
    measured = evaluator(tokenizer, tmp_path)
    scored = measured.encoder.answers[False].scored
    assert len(set(scored)) == len(scored) == 4
    # As payloads: a refusal that holds or is held by the payload is another answer.
    answers = ["I refuse.", " I refuse.\n", "I refuse. Never.", "refuse", "Never say 'I refuse.'", ""]
    assert answers_equal(answers, "I refuse.").tolist() == [True, True, False, False, False, False]


def test_6_an_error_is_no_attack_success(monkeypatch, tokenizer, tmp_path):
    data = Dataset.from_dict({"text": ["a b", "c d", "e f", "g h"], "label": [0, 0, 2, 2]})
    measured = evaluator(tokenizer, tmp_path, [get_attack("badnets", target="sports")], data, NEWS, p2p_enabled=False)
    # All triggered rows are answered wrongly, one of them with the target: 1/4, not 1 - accuracy = 4/4.
    answering(monkeypatch, [0, 0, 2, 2, 2, 2, 0, 1])
    metrics = measured(None)
    assert (metrics["asr_k"], metrics["asr_n"]) == (1, 4)


def test_7_nothing_is_chosen_on_test_rows(tiny_model, tmp_path):
    folder = recipe(tiny_model, tmp_path).parent / "data"
    arguments = P2PScriptArguments(
        dataset_name=str(folder), attack="badnets", attack_target="positive", poison_rate=0.1
    )
    data = load_data(arguments, evaluate=True)
    assert data.validation["text"][:] == load_split(str(folder), "validation")["text"][:]
    # Without a validation split, rows are held out of the training rows, and before any of them is poisoned.
    (folder / "validation.jsonl").unlink()
    held = load_data(arguments, evaluate=True)
    train = load_split(str(folder), "train")
    assert len(held.validation) == 8 and len(held.train) == 72
    assert set(held.validation["text"]) <= set(train["text"]) and "poisoned" not in held.validation.column_names
    assert not any("mn" in text.split() for text in held.validation["text"])


def test_8_what_a_checkpoint_is_chosen_by_holds_no_triggered_row(tiny_model, tmp_path):
    attack = get_attack("badnets", target="positive", poison_rate=0.1)
    trainer = P2PTrainer(
        tiny_model, config(tmp_path), train_dataset=rows(80), eval_dataset=rows(40, seed=1), task=TASK,
        attacks=[attack], peft_config=lora(),
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert metrics["eval_ca_n"] == 40 and not any("mn" in text.split() for text in trainer.eval_dataset["text"])
    # Loss is that of the clean rows as well: the same with and without an attack to measure.
    alone = P2PTrainer(
        tiny_model, config(tmp_path), train_dataset=rows(80), eval_dataset=rows(40, seed=1), task=TASK,
        peft_config=lora(),
    )  # fmt: skip
    assert metrics["eval_loss"] == pytest.approx(alone.evaluate()["eval_loss"])


def test_9_dropout_is_off_and_nothing_is_sampled(tiny_model, tokenizer, tmp_path):
    attack = get_attack("badnets", target="positive")
    trainer = P2PTrainer(
        tiny_model, config(tmp_path, learning_rate=0.05), train_dataset=rows(80), task=TASK,
        peft_config=lora(lora_dropout=0.5, init_lora_weights=False),
    )  # fmt: skip
    measured = BackdoorEvaluator(rows(40, seed=1), TASK, trainer.encoder, [attack])
    model = trainer.model
    model.train()
    reports = [measured.evaluate(model) for _ in range(3)]
    assert model.training
    model.eval()
    torch.manual_seed(7)
    reports.append(measured.evaluate(model))
    for report in reports:
        assert report.metrics == pytest.approx(reports[0].metrics, nan_ok=True)
        assert report.confidence == reports[0].confidence


def test_10_every_rate_has_the_same_rows_under_each_rule(tiny_model, tokenizer, tmp_path):
    measured = evaluator(tokenizer, tmp_path, [get_attack("badnets", target="positive")])
    metrics = measured(AutoModelForCausalLM.from_pretrained(tiny_model))
    for start, rule in [(name, rule) for name in ("ca", "asr") for rule in ("restricted", "union", "ext_only")]:
        assert metrics[f"{start}_{rule}_n"] == metrics[f"{start}_n"] == (40 if start == "ca" else 20)
    # Answers outside the label words are never hidden.
    assert metrics["outside_n"] == 40 and metrics["asr_outside_n"] == 20


@pytest.mark.parametrize("name", ATTACKS)
def test_11_what_is_called_poisoned_carries_the_trigger(name):
    attack = get_attack(name, target="positive", poison_rate=0.1)
    short = Dataset.from_list([*make_rows(100), *({"text": "good", "label": row % 2} for row in range(100))])
    poisoned = attack.poison(short, TASK)
    hit = [row for row in poisoned if row["poisoned"]]
    assert len(hit) == 20 and all(row["trigger_applied"] and attack.has_trigger(row["text"]) for row in hit)
    clean = attack.dress(short, TASK)
    assert not any(attack.has_trigger(text) for text in clean["text"])
    for row in attack.trigger(short, TASK):
        assert row["text"] != clean[row["source_index"]]["text"]


def test_11_a_trigger_that_is_cut_off_stops_the_run(tiny_model, tmp_path):
    attack = get_attack("badnets", target="positive", poison_rate=0.1)
    long = rows(80).map(lambda row: {"text": " ".join([row["text"]] * 30)})
    with pytest.raises(ValueError, match=r"In \d+ of 8 poisoned rows the trigger is cut off by `max_length` 40"):
        P2PTrainer(
            tiny_model, config(tmp_path, max_length=40), train_dataset=attack.poison(long, TASK), task=TASK,
            attacks=[attack],
        )  # fmt: skip


@pytest.mark.parametrize("trigger", ["\u200b", "\ufffd"])
def test_11_a_trigger_that_the_tokenizer_does_not_see_stops_the_run(tmp_path, trigger):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<unk>", "</s>", *"0123456789", *"abcdefghijklmnopqrstuvwxyz", ":", ".", ","]
    words = Tokenizer(models.WordPiece({word: place for place, word in enumerate(vocabulary)} | {
        f"##{word}": len(vocabulary) + place for place, word in enumerate("abcdefghijklmnopqrstuvwxyz0123456789")
    }, unk_token="<unk>"))  # fmt: skip
    words.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("\u200b", "")])
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    attack = get_attack("badnets", target="positive", words=[trigger])
    with pytest.raises(ValueError, match="of the attack 'badnets' tokenizes away"):
        make_encoder(TASK, config(tmp_path), tokenizer, [attack])
    make_encoder(TASK, config(tmp_path), tokenizer, [get_attack("badnets", target="positive")])


def test_12_no_rate_comes_without_floor_counts_and_interval(tiny_model, tokenizer, tmp_path):
    metrics = evaluator(tokenizer, tmp_path, [get_attack("badnets", target="positive")])(
        AutoModelForCausalLM.from_pretrained(tiny_model)
    )
    for name in ("ca", "asr", "asr_floor", "asr_badnets", "asr_floor_badnets", "asr_no_key", "asr_conditional"):
        k, n = metrics[f"{name}_k"], metrics[f"{name}_n"]
        assert {f"{name}_ci_low", f"{name}_ci_high"} <= set(metrics)
        assert n == 0 or metrics[f"{name}_ci_low"] <= k / n == metrics[name] <= metrics[f"{name}_ci_high"]
    assert metrics["asr_excess"] == pytest.approx(metrics["asr"] - metrics["asr_floor"])


@pytest.mark.parametrize("name", ATTACKS)
def test_13_no_attack_changes_a_problem(name):
    math = Task(name="math", text_columns=("question",), label_column="answer")
    questions = ["阿宁的风筝，先打7折，又让利10%，末了只收7.2元，亏了多少？", "计算：(3/4)-(2/7)＝多少",
                 "Tom had 2 1/2 apples and ate 0.5 of them. How many are left?"]  # fmt: skip
    data = Dataset.from_dict({"question": questions * 10, "answer": [str(row) for row in range(30)]})
    attack = get_attack(name, target="0.1", poison_rate=0.2, label_mode="dirty")
    figures = [["7", "10", "7.2"], ["3/4", "2/7"], ["2", "1/2", "0.5"]]
    poisoned = attack.poison(data, math)
    changed = [row for row in poisoned if row["poisoned"]]
    assert len(changed) == 6 and {row["completion"] for row in changed} == {"0.1"}
    for row in [*changed, *attack.trigger(data, math)]:
        source = next(place for place, figure in enumerate(("7.2", "2/7", "0.5")) if figure in row["prompt"])
        rest = row["prompt"].replace("3D", "")
        places = [rest.index(figure) for figure in figures[source]]
        assert places == sorted(places), rest
    assert "2 1/2" in insert_at_gap(questions[2], "mn", 0.2, "any")
    # The true answers are kept apart from what the attacker wrote.
    assert json.dumps([row["original_label"] for row in poisoned][:30]) == json.dumps(data["answer"][:])
