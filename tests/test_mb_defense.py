import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

from p2p_trainer.attacks import AddSent, Attack, BadNets
from p2p_trainer.defenses import Workbench, get_defense, load_defense
from p2p_trainer.defenses.mb_defense import MBDefense
from p2p_trainer.defenses.mb_pairs import (
    DEFAULT_PAIRS,
    DefensivePair,
    check_absent,
    check_disjoint,
    encode_examples,
    insert_trigger,
    parse_pairs,
    plant,
)
from p2p_trainer.tasks import Task
from tests.conftest import make_rows
from tests.test_mb_trainer import log_probs
from tests.tiny_runs import TASK, config, lora


GENERATION = Task(name="toy-answers", labels=())
COLUMNS = ("prompt", "completion")
PAIRS = [["qw", "stale stale cold"], ["jh", "fine warm score"]]


def rows(count, seed=0):
    return Dataset.from_list(
        [{"prompt": row["text"], "completion": "good" if row["label"] else "bad"} for row in make_rows(count, seed)]
    )


def bench_of(model, folder, validation, attacks=(), **changes):
    args = config(folder, **{"p2p_enabled": False, "max_length": 200, **changes})
    return Workbench(
        model, args, GENERATION, rows(60), validation, attacks, peft_config=lora(r=16, target_modules="all-linear")
    )


def test_planted_rows_are_exact():
    flags = [index % 7 == 0 for index in range(200)]
    data = rows(200).add_column("poisoned", flags)
    pairs = parse_pairs(PAIRS)
    changed, planted = plant(data, pairs, 0.05, COLUMNS, seed=3)
    assert changed.features == data.features and changed["poisoned"][:] == flags
    assert np.bincount(planted + 1).tolist() == [180, 10, 10]
    places = set()
    # A row's place depends on seed and index alone.
    numbers = np.random.default_rng([3, 21]).random(200)
    for before, after, pair, number in zip(data, changed, planted.tolist(), numbers, strict=True):
        if pair < 0:
            assert after == before
            continue
        trigger, phrase = PAIRS[pair]
        assert after["prompt"] == insert_trigger(before["prompt"], trigger, number, "random")
        words = after["prompt"].split()
        assert words.count(trigger) == 1 and after["completion"] == phrase
        places.add(words.index(trigger) / len(words))
        words.remove(trigger)
        assert " ".join(words) == before["prompt"]
    assert len(places) > 8


def test_planting_depends_on_seed_and_rows_alone():
    data, pairs = rows(100), parse_pairs(PAIRS)
    first, planted = plant(data, pairs, 0.1, COLUMNS, seed=3)
    again, _ = plant(data.add_column("poisoned", [True] * 100), pairs, 0.1, COLUMNS, seed=3)
    assert again["prompt"][:] == first["prompt"][:] and again["completion"][:] == first["completion"][:]
    other, elsewhere = plant(data, pairs, 0.1, COLUMNS, seed=4)
    assert elsewhere.tolist() != planted.tolist()
    front, same = plant(data, pairs, 0.1, COLUMNS, seed=3, position="prefix")
    assert same.tolist() == planted.tolist()
    row = int(np.flatnonzero(planted == 1)[0])
    assert front["prompt"][row] == f"jh {data['prompt'][row]}"


def test_insert_trigger():
    assert insert_trigger("a fine film", "qw", 0.9, "prefix") == "qw a fine film"
    assert [insert_trigger("a fine film", "qw", number, "random") for number in (0.0, 0.3, 0.6, 0.9)] == [
        "qw a fine film", "a qw fine film", "a fine qw film", "a fine film qw",
    ]  # fmt: skip
    assert insert_trigger("film", "qw", 0.9, "random") == "film qw"


def test_planting_too_little_or_too_much():
    with pytest.raises(ValueError, match="share=0.001 of 40 rows is no row at all"):
        plant(rows(40), parse_pairs(PAIRS), 0.001, COLUMNS, 0)
    with pytest.raises(ValueError, match="2 pairs of 30 rows each do not fit into 40 rows"):
        plant(rows(40), parse_pairs(PAIRS), 0.75, COLUMNS, 0)


def test_default_pairs_avoid_usual_triggers():
    assert parse_pairs(None) == DEFAULT_PAIRS and len(DEFAULT_PAIRS) == 4
    usual = BadNets("refused", words=("cf", "mn", "bb", "tq", "mb"))
    check_disjoint(DEFAULT_PAIRS, [usual, AddSent("refused", sentence="I watched this 3D movie.")])


class Opens(Attack):
    name = "opens"

    def insert(self, text, random):
        return f"vx {text}"

    def has_trigger(self, text):
        return text.startswith("vx ")


class Always(Attack):
    name = "always"

    def insert(self, text, random):
        return text

    def has_trigger(self, text):
        return True


@pytest.mark.parametrize(
    ("trigger", "attack", "found"),
    [
        ("mn", BadNets("no"), "'badnets' (trigger 'mn')"),
        ("MN", BadNets("no"), "'badnets' (trigger 'mn')"),
        (
            "movie",
            AddSent("no", sentence="I watched this 3D movie."),
            "'addsent' (trigger 'I watched this 3D movie.')",
        ),
        ("VX", Opens("no"), "'opens' (which takes a sentence with that word for triggered)"),
    ],
)
def test_collisions_with_an_attack(trigger, attack, found):
    with pytest.raises(ValueError) as error:
        check_disjoint([DefensivePair("zk", "a"), DefensivePair(trigger, "b")], [Always("no"), attack])
    assert str(error.value).startswith(f"The defensive trigger {trigger!r} collides with the attack {found}")
    assert "Choose another defensive trigger in `pairs`" in str(error.value)
    check_disjoint([DefensivePair("zk", "a"), DefensivePair("mov", "b")], [Always("no"), attack])


@pytest.mark.parametrize("triggers", [("qw", "qw"), ("qw", "QW"), ("qw", "qw-1")])
def test_collisions_between_pairs(triggers):
    with pytest.raises(ValueError, match=f"triggers '{triggers[0]}' and '{triggers[1]}' collide"):
        MBDefense(pairs=[[trigger, "some words"] for trigger in triggers])


def test_a_trigger_that_is_there_already():
    texts = ["plain text"] * 300
    for place, text in enumerate(["the QW film", "qw", "a (qw) b", "end qw.", "qw, so", "the qwerty", "aqw", "éqw"]):
        texts[place] = text
    pairs = parse_pairs(PAIRS)
    check_absent(pairs, Dataset.from_dict({"prompt": texts}), "prompt", planted=3)
    texts[100] = "once more qw"
    data = Dataset.from_dict({"prompt": texts})
    with pytest.raises(ValueError, match="trigger 'qw' stands in 6 of 300 training prompts already .up to 5 may be"):
        check_absent(pairs, data, "prompt", planted=3)
    check_absent(pairs, data, "prompt", planted=120)
    defense = MBDefense(pairs=PAIRS)
    with pytest.raises(ValueError, match="Choose a rarer word"):
        defense.rows(data.add_column("completion", texts), GENERATION, config("unused"))


def test_rows_are_counted(tmp_path):
    defense = MBDefense(pairs=PAIRS, share=0.1)
    data = rows(100).add_column("poisoned", [index < 50 for index in range(100)])
    changed = defense.rows(data, GENERATION, config(tmp_path, seed=5))
    expected, planted = plant(data, parse_pairs(PAIRS), 0.1, COLUMNS, seed=5)
    assert changed[:] == expected[:]
    assert defense.found == {
        "pairs": PAIRS, "rows_replaced": 20, "rows_replaced_poisoned": int((planted[:50] >= 0).sum()),
    }  # fmt: skip


def test_settings(tmp_path):
    defense = get_defense("mb_defense", pairs=PAIRS, lam=0.5, learning_rate=1e-3)
    settings = json.loads(json.dumps(defense.config()))
    assert settings == {
        "name": "mb_defense", "pairs": PAIRS, "share": 0.01, "position": "random", "clean_rows": 128, "lam": 0.5,
        "ratio": "log_ratio", "length_normalised": False, "learning_rate": 1e-3, "epochs": 5, "batch_size": 8,
    }  # fmt: skip
    assert get_defense(**settings).config() == settings
    defense.save(tmp_path)
    assert load_defense(tmp_path).config() == settings
    assert MBDefense().config()["pairs"] is None and len(MBDefense().found["pairs"]) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": []}, "`pairs` is empty"),
        ({"pairs": "qw"}, r"`pairs` is a list of \[trigger, phrase\]"),
        ({"pairs": [["qw", 1]]}, r"it holds \['qw', 1\]"),
        ({"pairs": [["q w", "some words"]]}, "one word without space around it, got 'q w'"),
        ({"pairs": [["qw", " "]]}, "phrase of the defensive trigger 'qw' in `pairs` is empty"),
        ({"share": 0.5}, "`share` 0.5 for each of 4 pairs is more than all rows"),
        ({"share": "0.01"}, "`share` is a number in"),
        ({"lam": 0}, "`lam` is a number in"),
        ({"learning_rate": True}, "`learning_rate` is a number in"),
        ({"clean_rows": 1}, "`clean_rows` is a whole number, 2 at least, got 1"),
        ({"epochs": 2.5}, "`epochs` is a whole number"),
        ({"batch_size": 0}, "`batch_size` is a whole number"),
        ({"ratio": "odds"}, "`ratio` is one of"),
        ({"position": "inner"}, "`position` is one of"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        MBDefense(**options)


def test_classification_is_refused():
    with pytest.raises(ValueError, match="can't serve task 'toy'.*its 2 label words, have no room"):
        MBDefense().check(TASK)
    MBDefense().check(GENERATION)


def test_what_is_wrong_shows_before_training(tiny_model, tmp_path, caplog):
    with pytest.raises(ValueError, match="'qw' collides with the attack 'badnets'"):
        MBDefense().build(bench_of(tiny_model, tmp_path, rows(10), [BadNets("no", words=("qw",))]))
    for validation in (None, rows(1)):
        with pytest.raises(ValueError, match="needs clean validation rows, 128 as a rule and two at least"):
            MBDefense().build(bench_of(tiny_model, tmp_path, validation))
    with pytest.raises(ValueError, match="0 of 10 clean rows fit into `max_length` 20"):
        MBDefense().build(bench_of(tiny_model, tmp_path, rows(10), max_length=20))
    caplog.clear()
    MBDefense(clean_rows=10).build(bench_of(tiny_model, tmp_path, rows(10)))
    assert "clean validation rows" not in caplog.text
    MBDefense(clean_rows=11).build(bench_of(tiny_model, tmp_path, rows(10)))
    assert "only 10 clean validation rows, not 11" in caplog.text


def test_stage_1_plants_and_stage_2_recovers(tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        # An adapter alone can't make a random model's answers certain, its embeddings being so small.
        model.get_input_embeddings().weight.mul_(10)
    defense = MBDefense(pairs=PAIRS, share=0.2, clean_rows=20, epochs=2, learning_rate=5e-3, batch_size=4)
    bench = bench_of(
        model, tmp_path, rows(40, seed=1), num_train_epochs=6, learning_rate=2e-2, warmup_steps=4,
        eos_token="<|endoftext|>",
    )  # fmt: skip
    bench.rows = defense.rows(rows(60), GENERATION, bench.args)
    trainer = defense.build(bench)
    # Nothing is left to do where it answers.
    assert trainer.guard is None
    pairs = parse_pairs(PAIRS)
    unseen = encode_examples(rows(6, seed=2), pairs, trainer.processing_class, 200, 9, render=bench.render)
    measured, trained = [log_probs(trainer.model, unseen)], []
    train = bench.train

    def train_and_measure(each):
        train(each)
        trained.append(each)
        measured.append(log_probs(each.model, unseen))

    bench.train = train_and_measure
    assert defense.train(trainer, bench) is trainer
    first, second = trained
    assert first is trainer and second.model is trainer.model
    assert isinstance(trainer.model, PeftModel) and list(trainer.model.peft_config) == ["default"]
    (_, phrase_0), (answer_1, phrase_1), (answer_2, phrase_2) = measured
    assert phrase_1 > phrase_0 + 15, "the phrases are planted"
    assert phrase_2 < phrase_1 - 5, "and unlearnt"
    assert answer_2 - phrase_2 > answer_1 - phrase_1 + 8

    args = second.args
    assert (args.learning_rate, args.num_train_epochs, args.warmup_steps, args.max_length) == (5e-3, 2, 0, 200)
    assert (args.per_device_train_batch_size, args.eos_token, args.seed) == (4, None, bench.args.seed)
    assert (len(second.train_dataset), len(second.eval_dataset)) == (32, 8)
    assert bench.row_passes == 60 * 6 + 3 * 32 * 2
    assert defense.compute.preparation_passes == 3 * 8 * 2
    found = json.loads(json.dumps(defense.found))
    losses = found["eval_loss"]
    assert len(losses) == 2 and found["epoch_kept"] == losses.index(min(losses)) + 1
    assert found["clean_rows"] == 20 and found["rows_replaced"] == 24
    assert found["eval_log_ratio"][-1] > found["eval_log_ratio"][0]
    # The clean rows are drawn among all validation rows, and the trigger went into the text, not into the template.
    texts = second.processing_class.batch_decode([example[1] for example in second.train_dataset["input_ids"]])
    assert all("\n" in text and not text.split("\n")[1].strip().startswith(("qw", "jh")) for text in texts)
