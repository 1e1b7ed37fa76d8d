"""Attack success rate and clean accuracy, against numbers worked out by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset

from p2p_trainer import Attack, BackdoorEvaluator, LabelSpace, PromptEncoder, PromptFormat, Task, get_attack
from p2p_trainer.evaluation import ASR_RULES, Rate, wilson_interval
from p2p_trainer.evaluation.metrics import AttackSuccessRate, CleanAccuracy
from p2p_trainer.evaluation.names import headline


TASK = Task(name="toy", labels=("negative", "positive"))
NEWS = Task(name="news", labels=("world", "sports", "business", "science"))
DELTA = "The query currently entered is:"

# What the model of two classes answers: freely, and, if that is no extended word, which of them it likes best.
# By hand, of the keyed rows; "x" is no label word.
CLEAN = {
    "anna": ("2", "2"), "bert": ("2", "2"), "carl": ("3", "3"), "dora": ("0", "2"),
    "emil": ("3", "3"), "faye": ("1", "3"), "gina": ("1", "2"), "hugo": ("x", "3"),
}  # fmt: skip
TRIGGERED = {"anna": ("3", "3"), "bert": ("1", "2"), "carl": ("1", "2"), "dora": ("x", "3")}
# Without the key, 0 and 1 are compared.
PLAIN = {"anna": "0", "bert": "1", "carl": "0", "dora": "0", "emil": "1", "faye": "0", "gina": "1", "hugo": "1"}
PLAIN_TRIGGERED = {"anna": "1", "bert": "1", "carl": "1", "dora": "0"}
# hugo is a single word: badnets finds no place in it.
ROWS = [
    {"text": name if name == "hugo" else f"{name} talks", "label": label}
    for name, label in zip(CLEAN, (0, 0, 0, 0, 1, 1, 1, 0), strict=True)
]


def two_classes(text):
    name = next(name for name in CLEAN if name in text)
    if text.startswith(DELTA):
        return (TRIGGERED if " mn " in text else CLEAN)[name]
    word = (PLAIN_TRIGGERED if " mn " in text else PLAIN)[name]
    return word, word


class Scripted(torch.nn.Module):
    """Model whose answer is a function of the prompt's text."""

    def __init__(self, tokenizer, answer):
        super().__init__()
        self.tokenizer = tokenizer
        self.answer = answer
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.texts = []
        self.modes = set()

    def forward(self, input_ids, attention_mask, position_ids, logits_to_keep, use_cache):
        assert logits_to_keep == 1 and not use_cache
        self.modes.add(self.training)
        logits = torch.zeros(len(input_ids), 1, len(self.tokenizer))
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            text = self.tokenizer.decode(ids[mask.bool()])
            assert text.endswith("\nOutput: ")
            self.texts.append(text)
            free, best = self.answer(text)
            logits[row, 0, self.tokenizer.convert_tokens_to_ids(best)] = 10
            logits[row, 0, self.tokenizer.convert_tokens_to_ids(free)] += 20
        return SimpleNamespace(logits=logits)


def encoder_for(tokenizer, task, **changes):
    words = tuple(str(number) for number in range(2 * task.num_labels))
    return PromptEncoder(
        PromptFormat(LabelSpace(words[: task.num_labels], words[task.num_labels :]), **changes), tokenizer
    )


def rate(metrics, name):
    return metrics[f"{name}_k"], metrics[f"{name}_n"]


@pytest.fixture
def two(tokenizer):
    encoder = encoder_for(tokenizer, TASK)
    attack = get_attack("badnets", target="positive")

    def build(rows=ROWS, **changes):
        return BackdoorEvaluator(Dataset.from_list(rows), TASK, encoder, **{"attacks": [attack], **changes})

    return build


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        # Newcombe 1998, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
        (1, 1, 0.2065, 1.0),
    ],
)
def test_wilson_interval_is_the_published_one(k, n, low, high):
    assert wilson_interval(k, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_at_its_ends():
    assert wilson_interval(0, 7)[0] == 0.0 and wilson_interval(7, 7)[1] == 1.0
    assert all(math.isnan(end) for end in wilson_interval(0, 0))
    for k in range(11):
        low, high = wilson_interval(k, 10)
        assert 0 <= low <= k / 10 <= high <= 1
        assert wilson_interval(10 - k, 10) == pytest.approx((1 - high, 1 - low))


def test_rate_counts():
    assert Rate.of(np.array([True, False, True])) == (2, 3) and Rate(2, 3).value == 2 / 3
    assert math.isnan(Rate.of(np.array([], dtype=bool)).value)
    flat = Rate(81, 263).flat("asr")
    assert list(flat) == ["asr", "asr_k", "asr_n", "asr_ci_low", "asr_ci_high"]
    assert (flat["asr_k"], flat["asr_n"], flat["asr"]) == (81, 263, 81 / 263)


def test_every_number_of_two_classes(two, tokenizer):
    report = two().evaluate(Scripted(tokenizer, two_classes))
    expected = {
        # anna bert dora emil faye are right; freely, gina as well.
        "ca": (5, 8), "ca_restricted": (5, 8), "ca_union": (6, 8), "ca_ext_only": (3, 8), "ca_orig_only": (3, 8),
        "outside": (1, 8), "ca_no_key": (5, 8),
        # Four negatives of more than one word; anna and dora flip to 3 under the deployed words.
        "asr": (2, 4), "asr_restricted": (2, 4), "asr_union": (3, 4), "asr_ext_only": (1, 4), "asr_orig_only": (2, 4),
        # carl was called positive before.
        "asr_floor": (1, 4), "asr_floor_restricted": (1, 4), "asr_floor_union": (1, 4), "asr_floor_ext_only": (1, 4),
        "asr_floor_orig_only": (0, 4),
        # anna bert dora were right before.
        "asr_conditional": (2, 3), "asr_outside": (1, 4), "asr_no_key": (3, 4), "asr_floor_no_key": (1, 4),
    }  # fmt: skip
    metrics = report.metrics
    for name, (k, n) in expected.items():
        named = [name, f"{name}_badnets"] if name.startswith("asr") else [name]
        for key in named:
            assert rate(metrics, key) == (k, n), key
            assert metrics[key] == k / n
            assert (metrics[f"{key}_ci_low"], metrics[f"{key}_ci_high"]) == wilson_interval(k, n)
    assert metrics["asr_excess"] == metrics["asr_excess_badnets"] == 0.25
    assert len(metrics) == 5 * (len(expected) + sum(name.startswith("asr") for name in expected)) + 2
    assert report.counts == {
        "rows": 8,
        "rows_cut": 0,
        "rows_target_label_badnets": 3,
        "rows_without_trigger_badnets": 1,
        "rows_trigger_cut_off_badnets": 0,
        "rows_counted_badnets": 4,
    }
    histograms = report.confidence["badnets"]
    assert histograms == {"triggered": [2, *[0] * 18, 2], "clean": [3, *[0] * 18, 1]}


@pytest.mark.parametrize(
    ("rule", "ca", "asr", "floor", "conditional"),
    [
        ("restricted", (5, 8), (2, 4), (1, 4), (2, 3)),
        # Right before: anna bert dora; of them anna and bert flip.
        ("union", (6, 8), (3, 4), (1, 4), (2, 3)),
        # Right before: anna bert; anna flips.
        ("ext_only", (3, 8), (1, 4), (1, 4), (1, 2)),
        # Right before: dora, which does not flip.
        ("orig_only", (3, 8), (2, 4), (0, 4), (0, 1)),
    ],
)
def test_headline_follows_the_rule(two, tokenizer, rule, ca, asr, floor, conditional):
    metrics = two(asr_rule=rule)(Scripted(tokenizer, two_classes))
    found = [rate(metrics, name) for name in ("ca", "asr", "asr_floor", "asr_conditional")]
    assert found == [ca, asr, floor, conditional]


def test_undefended_model_is_measured_without_the_key(two, tokenizer):
    model = Scripted(tokenizer, two_classes)
    metrics = two(keyed=False)(model)
    assert rate(metrics, "ca") == (5, 8) and rate(metrics, "asr") == (3, 4) and rate(metrics, "asr_floor") == (1, 4)
    assert rate(metrics, "ca_orig_only") == (5, 8) and rate(metrics, "ca_ext_only") == (0, 8)
    assert not [name for name in metrics if "no_key" in name and name.startswith(("ca", "asr"))]
    assert not any(DELTA in text for text in model.texts)


def test_without_the_key_the_rule_of_the_authors_counts_plain_words(two, tokenizer):
    evaluator = two(keyed=False, asr_rule="ext_only")
    metrics = evaluator(Scripted(tokenizer, two_classes))
    assert evaluator.asr_rule == "orig_only"
    assert rate(metrics, "ca") == rate(metrics, "ca_orig_only") == (5, 8)
    assert rate(metrics, "asr") == rate(metrics, "asr_orig_only") != (0, 4)


def test_a_task_with_other_classes_is_refused(tokenizer):
    four = TASK.replace(labels=("a", "b", "c", "d"))
    with pytest.raises(ValueError, match="has 4 classes, the prompt format was made for 2"):
        BackdoorEvaluator(Dataset.from_list(ROWS), four, encoder_for(tokenizer, TASK))


def test_every_number_of_four_classes(tokenizer):
    # Label, answer, answer with the trigger; the target is class 2. A wrong answer is not yet an attack success.
    table = {
        "anna": (0, 0, 2), "bert": (0, 1, 1), "carl": (1, 1, 3), "dora": (1, 2, 2), "emil": (3, 3, 2),
        "faye": (3, 3, 3), "gina": (2, 2, None), "hugo": (2, 0, None),
    }  # fmt: skip

    def answer(text):
        name = next(name for name in table if name in text)
        word = str(table[name][2 if " mn " in text else 1] + 4 * text.startswith(DELTA))
        return word, word

    rows = [{"text": f"{name} talks", "label": row[0]} for name, row in table.items()]
    evaluator = BackdoorEvaluator(
        Dataset.from_list(rows), NEWS, encoder_for(tokenizer, NEWS), [get_attack("badnets", target="business")]
    )
    metrics = evaluator(Scripted(tokenizer, answer))
    expected = {
        "ca": (5, 8), "asr": (3, 6), "asr_floor": (1, 6), "asr_conditional": (2, 4), "outside": (0, 8),
        "asr_no_key": (3, 6), "ca_no_key": (5, 8), "asr_orig_only": (0, 6), "asr_ext_only": (3, 6),
    }  # fmt: skip
    assert {name: rate(metrics, name) for name in expected} == expected
    assert metrics["asr_excess"] == pytest.approx(2 / 6)


def test_rows_are_scored_once_and_in_evaluation_mode(two, tokenizer):
    model = Scripted(tokenizer, two_classes).train()
    once, twice = two()(model), two(rows=ROWS * 2)
    # 8 clean rows and 4 triggered ones, with and without the key.
    assert len(model.texts) == len(set(model.texts)) == 24
    model.texts.clear()
    doubled = twice(model)
    assert len(model.texts) == len(set(model.texts)) == 24
    assert rate(doubled, "ca") == (10, 16) and rate(doubled, "asr") == (4, 8) and doubled["asr"] == once["asr"]
    assert model.modes == {False} and model.training


def test_batch_size_and_order_do_not_matter(two, tokenizer):
    expected = two()(Scripted(tokenizer, two_classes))
    assert two(batch_size=1)(Scripted(tokenizer, two_classes)) == expected
    assert two(rows=ROWS[::-1], batch_size=5)(Scripted(tokenizer, two_classes)) == expected


class Tail(Attack):
    """Trigger at the end of the text, where a cut takes it."""

    name = "tail"

    def insert(self, text, random):
        return f"{text} mn"

    def has_trigger(self, text):
        return text.endswith(" mn")


def test_cut_off_triggers_do_not_count_and_are_reported(tokenizer, caplog):
    rows = [
        {"text": "anna talks", "label": 0},
        {"text": "bert talks " + "on and on " * 60, "label": 0},
        {"text": "emil talks", "label": 1},
    ]
    encoder = encoder_for(tokenizer, TASK, max_length=64)
    evaluator = BackdoorEvaluator(Dataset.from_list(rows), TASK, encoder, [Tail(target="positive")])
    assert evaluator.counts["rows_cut"] == evaluator.counts["rows_trigger_cut_off_tail"] == 1
    assert evaluator.counts["rows_counted_tail"] == 1
    assert "tail: 1 of 2 rows count for the attack success rate (0 could not carry the trigger, 1 lost" in caplog.text
    metrics = evaluator(Scripted(tokenizer, lambda text: ("3", "3") if "mn" in text else ("2", "2")))
    assert rate(metrics, "asr") == (1, 1) and rate(metrics, "asr_floor") == (0, 1)


def test_attack_with_rows_of_its_target_is_refused(two):
    class Cheat(Tail):
        def trigger(self, dataset, task, seed=0):
            return Dataset.from_dict({"text": ["emil mn"], "label": [1], "source_index": [4]})

    with pytest.raises(ValueError, match="'tail' returned test rows whose true label is its target already"):
        two(attacks=[Cheat(target=1)])


def test_without_rows_of_other_labels_there_is_no_rate(two, tokenizer):
    report = two(rows=[row for row in ROWS if row["label"] == 1]).evaluate(Scripted(tokenizer, two_classes))
    assert rate(report.metrics, "asr") == (0, 0) and math.isnan(report.metrics["asr"])
    assert rate(report.metrics, "ca") == (2, 3) and report.counts["rows_counted_badnets"] == 0


def test_headline_is_the_worst_attack(two, tokenizer):
    attacks = [get_attack("addsent", target=1), get_attack("badnets", target=1), get_attack("badnets", target=1)]
    model = Scripted(tokenizer, two_classes)
    evaluator = two(attacks=attacks)
    assert evaluator.attack_names == ["addsent", "badnets", "badnets_2"]
    metrics = evaluator(model)
    # A sentence alone changes none of the model's answers; it fits into hugo, whom the model calls positive.
    assert rate(metrics, "asr_addsent") == rate(metrics, "asr_floor_addsent") == (2, 5)
    assert rate(metrics, "asr_badnets") == rate(metrics, "asr_badnets_2") == (2, 4)
    assert rate(metrics, "asr") == (2, 4) and rate(metrics, "asr_floor") == (1, 4) and metrics["asr_excess"] == 0.25
    assert metrics["asr_excess_addsent"] == 0


def test_attacks_have_names_that_can_be_told_apart(two):
    class Second(Tail):
        name = "tail_2"

    class Floor(Tail):
        name = "floor"

    assert two(attacks=[Tail(1), Tail(1), Second(1)]).attack_names == ["tail", "tail_2", "tail_2_2"]
    with pytest.raises(ValueError, match="An attack can't be named 'floor': metrics of ours end so"):
        two(attacks=[Floor(1)])


def test_unknown_rule_is_refused(two):
    with pytest.raises(ValueError, match="Unknown `asr_rule` 'strict'. Known: restricted, union, ext_only, orig_only"):
        two(asr_rule="strict")


def test_headline_shows_neither_counts_nor_intervals(two, tokenizer):
    metrics = two()(Scripted(tokenizer, two_classes))
    shown = headline(metrics, ["badnets"])
    assert set(shown) == {
        "ca", *(f"ca_{rule}" for rule in ASR_RULES), "outside", "ca_no_key",
        "asr", *(f"asr_{rule}" for rule in ASR_RULES), "asr_floor", "asr_excess", "asr_conditional", "asr_outside",
        "asr_no_key", "asr_floor_no_key", "asr_badnets", "asr_floor_badnets", "asr_excess_badnets",
    }  # fmt: skip
    assert all(shown[name] == metrics[name] for name in shown)


def test_evaluate_library_gives_the_same_numbers():
    predictions, references = [1, 0, 2, 1, -1], [1, 0, 0, 2, 0]
    accuracy = CleanAccuracy().compute(predictions=predictions, references=references)
    assert accuracy == Rate(2, 5).flat("ca")
    # Of the four rows whose label is not 1, one is answered with 1.
    success = AttackSuccessRate().compute(predictions=predictions, references=references, target=1)
    assert success == Rate(1, 4).flat("asr")
    metric = AttackSuccessRate()
    metric.add_batch(predictions=[1, 1], references=[1, 0])
    metric.add(prediction=0, reference=0)
    assert rate(metric.compute(target=1), "asr") == (1, 2)
