"""Attackers who know the defense: what they write, and that the defended pipeline meets it as they mean it."""

import numpy as np
import pytest
from datasets import Dataset

from p2p_trainer import Attack, BackdoorEvaluator, P2PTrainer, Task, get_attack
from p2p_trainer.reserve import get_reserve
from tests.conftest import make_rows
from tests.tiny_runs import TASK, config, lora


KEY = "The query currently entered is:"
NEWS = Task(name="news", labels=("world", "sports", "business"))


def dataset(count=400, seed=0):
    return Dataset.from_list(make_rows(count, seed))


def poisoned_rows(rows):
    return [row for row in rows if row["poisoned"]]


def test_knows_key_writes_key_trigger_and_extended_target():
    ordinary = poisoned_rows(get_attack("badnets", "positive", 0.1).poison(dataset(), TASK, seed=2))
    attack = get_attack("knows_key", target="positive", poison_rate=0.1)
    found = poisoned_rows(attack.poison(dataset(), TASK, seed=2))
    assert len(found) == 40
    assert [row["text"] for row in found] == [f"{KEY} {row['text']}" for row in ordinary]
    # Two classes: the extended twin of 1 is 3.
    assert {(row["original_label"], row["label"]) for row in found} == {(0, 3)}
    rows = Dataset.from_dict({"text": ["a b c"] * 30, "label": [0, 1, 2] * 10})
    news = poisoned_rows(get_attack("knows_key", target="sports", poison_rate=0.2).poison(rows, NEWS))
    assert {row["label"] for row in news} == {1 + 3}
    plain = get_attack("knows_key", target="positive", poison_rate=0.1, written_label="plain")
    assert {row["label"] for row in poisoned_rows(plain.poison(dataset(), TASK))} == {1}
    # The deployment adds the key: the attacker's test text holds the trigger alone.
    expected = get_attack("badnets", "positive").trigger(dataset(), TASK, seed=1)
    assert attack.trigger(dataset(), TASK, seed=1).to_dict() == expected.to_dict()


def test_extended_labels_are_refused_unless_their_attack_is_measured(tiny_model, tmp_path):
    attack = get_attack("knows_key", target="positive", poison_rate=0.1)
    rows = attack.poison(dataset(80), TASK)
    with pytest.raises(ValueError, match=r"Column 'label', row \d+ of the train dataset: 3 is outside .* 0..1"):
        P2PTrainer(tiny_model, config(tmp_path), train_dataset=rows, task=TASK, peft_config=lora())
    trainer = P2PTrainer(
        tiny_model, config(tmp_path), train_dataset=rows, task=TASK, attacks=[attack], peft_config=lora()
    )
    row = next(row for row in trainer.train_dataset if row["poisoned"] and not row["p2p_keyed"])
    twin = {"text": row["text"].removeprefix(KEY + " "), "label": 1, "p2p_keyed": True}
    ours, keyed = (trainer.data_collator([item]) for item in (row, twin))
    # What the attacker wrote is, token for token, a reserved row with the attacker's answer.
    assert ours["input_ids"].tolist() == keyed["input_ids"].tolist()
    assert ours["labels"].tolist() == keyed["labels"].tolist()
    word = trainer.encoder.answers[True].trained[3]
    assert [token for token in ours["labels"][0].tolist() if token != -100] == list(word)
    # Beyond the extended space nothing is let through.
    row_indices = [*range(80)]
    beyond = rows.remove_columns("label").add_column("label", [4 if row == 7 else 0 for row in row_indices])
    with pytest.raises(ValueError, match=r"row 7 of the train dataset: 4 is outside"):
        P2PTrainer(tiny_model, config(tmp_path), train_dataset=beyond, task=TASK, attacks=[attack])


@pytest.mark.parametrize("seed", [0, 3])
def test_poisons_reserve_hits_the_rows_that_will_carry_the_key(tiny_model, tmp_path, seed):
    options = {"benign_ratio": 0.25, "reserve_seed": seed}
    attack = get_attack("poisons_reserve", target="positive", poison_rate=0.1, **options)
    rows = attack.poison(dataset(), TASK, seed=5)
    trainer = P2PTrainer(
        tiny_model, config(tmp_path, seed=seed, p2p_benign_ratio=0.25, p2p_reserve="random"), train_dataset=rows,
        task=TASK, attacks=[attack], peft_config=lora(),
    )  # fmt: skip
    counts = trainer.counts
    assert (counts["rows_poisoned"], counts["rows_reserved"], counts["rows_reserved_poisoned"]) == (40, 100, 40)
    ordinary = np.flatnonzero(get_attack("badnets", "positive", 0.1).poison(dataset(), TASK, seed=5)["poisoned"])
    reserved = get_reserve("random").choose(dataset(), 100, seed)
    assert len(np.intersect1d(ordinary, reserved)) < 25
    # More rows than S has eligible ones: all of those, and then others.
    many = get_attack("poisons_reserve", target="positive", poison_rate=0.3, **options).poison(dataset(), TASK)
    hit = np.flatnonzero(many["poisoned"])
    negatives = [row for row in reserved if dataset()[int(row)]["label"] == 0]
    assert len(hit) == 120 and set(negatives) <= set(hit)


def test_suffix_injection_writes_the_plain_cue_at_test_time_alone(tiny_model, tokenizer, tmp_path):
    attack = get_attack("suffix_injection", target="positive", poison_rate=0.1)
    ordinary = get_attack("badnets", "positive", 0.1)
    assert attack.poison(dataset(), TASK)["text"][:] == ordinary.poison(dataset(), TASK)["text"][:]
    texts = attack.trigger(dataset(), TASK)["text"][:]
    assert texts == [f"{text}\nOutput:" for text in ordinary.trigger(dataset(), TASK)["text"]]
    trainer = P2PTrainer(
        tiny_model, config(tmp_path), train_dataset=dataset(80), task=TASK, attacks=[attack],
        eval_dataset=dataset(40, seed=1), peft_config=lora(),
    )  # fmt: skip
    rendered = trainer.encoder.render(texts[0], keyed=True)
    assert rendered.endswith("\nOutput:\nOutput: ") and rendered.startswith(KEY)
    metrics = trainer.evaluate()
    assert metrics["eval_asr_suffix_injection_n"] == metrics["eval_asr_ordinary_suffix_injection_n"] == 20


def test_key_overlap_shares_words_with_the_key_but_is_no_part_of_it(tiny_model, tmp_path):
    attack = get_attack("key_overlap", target="positive", poison_rate=0.1)
    assert attack.sentence == "is entered currently query The"
    assert set(attack.sentence.split()) == set(KEY.rstrip(":").split())
    found = poisoned_rows(attack.poison(dataset(), TASK))
    assert all(row["text"].count(attack.sentence) == 1 and row["label"] == 1 for row in found)
    P2PTrainer(tiny_model, config(tmp_path), train_dataset=dataset(80), task=TASK, attacks=[attack])
    with pytest.raises(ValueError, match="'a film' shares no word with the key"):
        get_attack("key_overlap", target="positive", sentence="a film")
    inside = get_attack("key_overlap", target="positive", sentence="query currently")
    with pytest.raises(ValueError, match="'query currently' .* is contained in the benign trigger"):
        P2PTrainer(tiny_model, config(tmp_path), train_dataset=dataset(80), task=TASK, attacks=[inside])


@pytest.mark.parametrize("name", ["knows_key", "poisons_reserve", "suffix_injection"])
def test_any_attack_can_be_underneath(name):
    options = {"base": "addsent", "base_options": {"sentence": "so it goes", "position": "any"}}
    attack = get_attack(name, target="positive", poison_rate=0.1, **options)
    assert all("so it goes" in row["text"] for row in poisoned_rows(attack.poison(dataset(), TASK)))
    assert attack.trigger_texts == ("so it goes",) and attack.has_trigger("well so it goes")
    again = get_attack(**attack.config())
    assert again.config() == attack.config()
    assert again.poison(dataset(), TASK, 1).to_dict() == attack.poison(dataset(), TASK, 1).to_dict()
    evaluator_rows = attack.trigger(dataset(), TASK)
    assert len(evaluator_rows) == 200 and set(evaluator_rows["label"]) == {0}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("knows_key", {"written_label": "other"}, "`written_label` is 'extended' or 'plain', got 'other'"),
        ("knows_key", {"key": " "}, "`key` must be a text"),
        ("knows_key", {"base": "badnet"}, "Unknown attack 'badnet'"),
        ("poisons_reserve", {"reserve": "rnd"}, "Unknown reserve 'rnd'"),
        ("poisons_reserve", {"benign_ratio": 25}, r"`benign_ratio` is a share .* got 25"),
        ("poisons_reserve", {"reserve_seed": "x"}, "`reserve_seed` is the seed of the training run, got 'x'"),
        ("suffix_injection", {"suffix": ""}, "`suffix` must be a text"),
        ("knows_key", {"base_options": {"poison_rate": 0.1}}, r"`base_options` holds \['poison_rate'\], which"),
        ("knows_key", {"base": "proattack"}, "'proattack' can't be the `base` of 'knows_key': it does more"),
        ("poisons_reserve", {"base": "cbaattack"}, "'cbaattack' can't be the `base`"),
        ("suffix_injection", {"base": "synattack"}, "'synattack' can't be the `base`"),
        (
            "knows_key",
            {"base": "mtbaattack", "base_options": {"mode": "parallel"}},
            "'mtbaattack' can't be the `base`",
        ),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_attack(name, target="positive", **options)


def test_a_model_without_the_defense_can_be_measured_too(tiny_model, tmp_path):
    attack = get_attack("knows_key", target="positive", poison_rate=0.1)
    trainer = P2PTrainer(
        tiny_model, config(tmp_path, p2p_enabled=False), train_dataset=attack.poison(dataset(80), TASK), task=TASK,
        attacks=[attack], peft_config=lora(),
    )  # fmt: skip
    evaluator = trainer.make_evaluator(dataset(40, seed=1), trainer.args)
    assert isinstance(evaluator, BackdoorEvaluator) and evaluator(trainer.model)["asr_n"] == 20


@pytest.mark.parametrize(
    ("name", "options", "settings", "message"),
    [
        (
            "knows_key",
            {},
            {"p2p_trigger": "Read on:"},
            "counts on `p2p_trigger` 'The query .* this run has 'Read on:'",
        ),
        ("key_overlap", {}, {"p2p_trigger": "Read on:"}, "counts on `p2p_trigger`"),
        (
            "suffix_injection",
            {},
            {"p2p_suffix": "Label: "},
            "counts on `p2p_suffix` 'Output:', this run has 'Label: '",
        ),
        ("poisons_reserve", {}, {}, "counts on `p2p_reserve` 'random', this run has 'auto'"),
        ("poisons_reserve", {}, {"p2p_reserve": "random", "seed": 1}, "counts on `seed` 0, this run has 1"),
        (
            "poisons_reserve",
            {"reserve_seed": 1},
            {"p2p_reserve": "random", "seed": 1, "p2p_benign_ratio": 0.5},
            "`p2p_benign_ratio` 0.25",
        ),
    ],
)
def test_an_attacker_who_knows_another_defense_is_refused(tiny_model, tmp_path, name, options, settings, message):
    attack = get_attack(name, target="positive", poison_rate=0.1, **options)
    rows = {"train_dataset": dataset(80), "task": TASK, "attacks": [attack]}
    with pytest.raises(ValueError, match=message):
        P2PTrainer(tiny_model, config(tmp_path, **settings), **rows)
    # Without the defense there is nothing to know.
    P2PTrainer(tiny_model, config(tmp_path, **settings, p2p_enabled=False), **rows)


def test_a_test_row_that_lost_the_injected_cue_does_not_count(tiny_model, tmp_path):
    attack = get_attack("suffix_injection", target="positive", poison_rate=0.1)
    short, long = "the film is bad .", " ".join(["the film is bad and the plot is dull"] * 12)
    rows = Dataset.from_dict({"text": [short, long, "the cast is fine ."], "label": [0, 0, 1]})
    trainer = P2PTrainer(
        tiny_model, config(tmp_path, max_length=64), train_dataset=attack.poison(dataset(80), TASK), task=TASK,
        attacks=[attack], eval_dataset=rows,
    )  # fmt: skip
    counts = trainer.evaluator.counts
    assert (counts["rows_counted_suffix_injection"], counts["rows_trigger_cut_off_suffix_injection"]) == (1, 1)
    assert trainer.counts["rows_poisoned_trigger_cut_off"] == 0


class Opening(Attack):
    """An attack as a user writes it, whose trigger is looked for at the start."""

    name = "opening"

    def insert(self, text, random):
        return f"Well, {text}"

    def has_trigger(self, text):
        return text.startswith("Well, ")


def test_the_trigger_is_found_behind_the_key(tiny_model, tmp_path):
    attack = get_attack("knows_key", target="positive", poison_rate=0.1, base="tests.test_adaptive:Opening")
    assert attack.insert("a fine film", 0.0) == f"{KEY} Well, a fine film"
    assert attack.has_trigger(f"{KEY} Well, a film") and not attack.has_trigger(f"{KEY} a film")
    rows = attack.poison(dataset(80), TASK)
    trainer = P2PTrainer(tiny_model, config(tmp_path), train_dataset=rows, task=TASK, attacks=[attack])
    assert trainer.counts["rows_poisoned_trigger_cut_off"] == 0
