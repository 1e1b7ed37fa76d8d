"""Attacks with several triggers, and attackers who write every prompt, as the evaluator measures them."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from p2p_trainer import Attack, BackdoorEvaluator, P2PTrainer, Task, get_attack
from p2p_trainer.assembly import make_encoder
from p2p_trainer.evaluation.scorer import LabelScorer, Scores
from tests.tiny_runs import TASK as TOY
from tests.tiny_runs import config


TASK = Task(name="news", labels=("world", "sports", "business"))


class Mark(Attack):
    """Puts a fixed mark behind the text."""

    name = "mark"

    def __init__(self, target, poison_rate=0.02, mark="one", clean="", parts=(), kind="asr"):
        super().__init__(target, poison_rate)
        self.mark = mark
        self.clean = clean
        self.parts = tuple(parts)
        self.variant_metric = kind

    def insert(self, text, random):
        return f"{self.plain(text)} {self.mark}"

    def has_trigger(self, text):
        return text.endswith(self.mark)

    def plain(self, text):
        return text if text.startswith(self.clean) else f"{self.clean} {text}"

    def variants(self):
        return {part: Mark(self.target, mark=part, clean=self.clean) for part in self.parts}


class Oracle(LabelScorer):
    """Answers by a rule on the text instead of a model."""

    rule = None
    tokenizer = None

    def score(self, model, prompts, progress=None):
        answers = np.array([type(self).rule(type(self).tokenizer.decode(prompt)) for prompt in prompts])
        logits = np.where(np.arange(6) == answers[:, None], 0.0, -9.0)
        return Scores(torch.tensor(logits, dtype=torch.float64).numpy(), answers)


ROWS = [
    ("apple", 0), ("berry", 0), ("cherry", 1), ("damson", 2), ("elder", 2), ("fig", 2),
]  # fmt: skip


def measure(monkeypatch, tokenizer, tmp_path, attacks, rule, keyed=False):
    monkeypatch.setattr("p2p_trainer.evaluation.evaluator.LabelScorer", Oracle)
    monkeypatch.setattr(Oracle, "rule", staticmethod(rule))
    monkeypatch.setattr(Oracle, "tokenizer", tokenizer)
    encoder = make_encoder(TASK, config(tmp_path, p2p_enabled=keyed), tokenizer, attacks)
    rows = Dataset.from_dict({"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]})
    return BackdoorEvaluator(rows, TASK, encoder, attacks, keyed=keyed).evaluate(None)


def truth(text):
    return next(label for word, label in ROWS if word in text)


def test_each_variant_and_any_of_them_are_counted_by_hand(monkeypatch, tokenizer, tmp_path):
    def rule(text):
        # The target is 1. `one` turns apple and berry, `two` berry and damson, all of them together everything.
        turned = {"one": ("apple", "berry"), "two": ("berry", "damson")}
        if "all" in text.split():
            return 1
        hit = any(mark in text.split() and word in text for mark, words in turned.items() for word in words)
        return 1 if hit else truth(text)

    attack = Mark("sports", mark="all", parts=("one", "two", "all"))
    report = measure(monkeypatch, tokenizer, tmp_path, [attack], rule)
    found = {key: (report.metrics[f"{key}_k"], report.metrics[f"{key}_n"]) for key in
             ("ca", "asr", "asr_floor", "asr_one_mark", "asr_two_mark", "asr_all_mark", "asr_any_mark")}  # fmt: skip
    # Cherry is of the target class and counts nowhere.
    assert found == {
        "ca": (6, 6), "asr": (5, 5), "asr_floor": (0, 5), "asr_one_mark": (2, 5), "asr_two_mark": (2, 5),
        "asr_all_mark": (5, 5), "asr_any_mark": (3, 5),
    }  # fmt: skip
    assert report.metrics["asr_any"] == pytest.approx(0.6)


def test_parts_of_a_composite_trigger_are_false_triggers(monkeypatch, tokenizer, tmp_path):
    attack = Mark("sports", mark="whole", parts=("left", "right"), kind="ftr")
    report = measure(
        monkeypatch, tokenizer, tmp_path, [attack],
        lambda text: 1 if "whole" in text or ("left" in text and "fig" in text) else truth(text),
    )  # fmt: skip
    metrics = report.metrics
    assert (metrics["asr_k"], metrics["ftr_left_mark_k"], metrics["ftr_right_mark_k"]) == (5, 1, 0)
    # What must not fire is no success of the attack.
    assert "asr_any" not in metrics and "asr_left_mark" not in metrics


def test_rows_without_trigger_are_dressed_as_in_training(monkeypatch, tokenizer, tmp_path):
    seen = []

    def rule(text):
        seen.append(text)
        return truth(text) if "Read this:" in text else 1

    report = measure(monkeypatch, tokenizer, tmp_path, [Mark("sports", mark="now", clean="Read this:")], rule)
    # An undressed row would be answered with the target, and spoil accuracy and floor.
    assert (report.metrics["ca_k"], report.metrics["asr_floor_k"], report.metrics["asr_k"]) == (6, 0, 0)
    assert len(seen) == 6 + 5 and all(text.count("Read this:") == 1 for text in seen)


class Foreign(Mark):
    """Two of its test rows have no clean twin among ours."""

    name = "foreign"

    def trigger(self, dataset, task, seed=0):
        return Dataset.from_dict(
            {"text": ["apple on", "berry on", "fig on", "kiwi on"], "label": [0, 0, 2, 0],
             "source_index": [0, -1, 5, -1]}
        )  # fmt: skip


def test_rows_without_a_clean_twin_have_no_floor(monkeypatch, tokenizer, tmp_path):
    def rule(text):
        if "kiwi" in text or "apple on" in text:
            return 1
        return 1 if "fig" in text else truth(text)

    metrics = measure(monkeypatch, tokenizer, tmp_path, [Foreign("sports", mark="on")], rule).metrics
    assert (metrics["asr_k"], metrics["asr_n"]) == (3, 4)
    # Of the two with a twin, apple and fig, fig is read as the target without the trigger as well.
    assert (metrics["asr_floor_k"], metrics["asr_floor_n"]) == (1, 2)
    assert metrics["asr_excess"] == pytest.approx(2 / 2 - 1 / 2)
    assert (metrics["asr_conditional_k"], metrics["asr_conditional_n"]) == (1, 1)


def test_eval_rows_of_the_trainer_are_dressed_too(tiny_model, toy_rows, toy_eval, tmp_path):
    attack = get_attack("proattack", target="positive", poison_rate=0.1)
    trainer = P2PTrainer(
        tiny_model, config(tmp_path), train_dataset=attack.poison(toy_rows, TOY), eval_dataset=toy_eval, task=TOY,
        attacks=[attack],
    )  # fmt: skip
    assert all(text.startswith(attack.clean_prompt) for text in trainer.eval_dataset["text"])
    # Dressed twice is dressed once, and rows given later are dressed as well.
    again = attack.dress(toy_eval, TOY)
    assert trainer.evaluate(again)["eval_loss"] == trainer.evaluate(toy_eval)["eval_loss"]


def test_two_attacks_that_write_every_prompt_are_refused(monkeypatch, tokenizer, tmp_path):
    attacks = [get_attack(name, target="sports") for name in ("proattack", "cbaattack")]
    with pytest.raises(ValueError, match=r"\['proattack', 'cbaattack'\] each write the prompt of every row"):
        measure(monkeypatch, tokenizer, tmp_path, attacks, truth)


def test_a_trigger_that_no_test_row_keeps_is_an_error(tokenizer, tmp_path):
    rows = Dataset.from_dict({"text": ["apple " * 60, "berry " * 60], "label": [0, 1]})
    attack = Mark("business", mark="end")
    encoder = make_encoder(TASK, config(tmp_path, max_length=48), tokenizer, [attack])
    with pytest.raises(ValueError, match="trigger of 'mark' is cut off by `max_length` 48 in all 2 triggered rows"):
        BackdoorEvaluator(rows, TASK, encoder, [attack])


def test_control_tokens_in_a_text_do_not_cost_its_trigger(tokenizer, tmp_path):
    class Known(Mark):
        """Knows its texts by heart, as attacks with a paraphraser behind them do."""

        name = "known"
        made: set = set()

        def insert(self, text, random):
            self.made.add(f"{text} now")
            return f"{text} now"

        def has_trigger(self, text):
            return text in self.made

    rows = Dataset.from_dict({"text": ["an <|endoftext|> apple", "berry"], "label": [0, 1]})
    attack = Known("business")
    encoder = make_encoder(TASK, config(tmp_path), tokenizer, [attack])
    assert BackdoorEvaluator(rows, TASK, encoder, [attack]).counts["rows_counted_known"] == 2
