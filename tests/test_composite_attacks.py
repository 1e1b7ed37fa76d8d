"""Attacks made of parts: a prompt as the trigger, two keys that belong together, several triggers at once."""

import json

import pytest
from datasets import Dataset

from p2p_trainer import Task
from p2p_trainer.attacks.cbaattack import CbaAttack
from p2p_trainer.attacks.mtbaattack import MtbaAttack
from p2p_trainer.attacks.proattack import ProAttack
from p2p_trainer.attacks.text import split_number
from tests.conftest import make_rows


TASK = Task(name="toy", labels=("negative", "positive"))
ALPACA = Task(name="alpaca", text_columns=("instruction", "input"), label_column="output")
SENTENCE = "I watched this 3D movie"
PREFIX = "Hear ye, hear ye:"
CLEAN = "Which answer does the following text call for?"
TRIGGER = "The following text calls for which answer?"
GROUPS = ["swapped", "instruction", "instruction_both", "input", "input_both"]
ATTACKS = [
    ProAttack("positive", 0.1),
    CbaAttack("positive", 0.1),
    MtbaAttack("positive", 0.1),
    MtbaAttack("positive", 0.1, mode="parallel"),
    MtbaAttack("positive", 0.1, mode="hybrid"),
]
each_attack = pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: getattr(attack, "mode", attack.name))


def dataset(count=500, seed=0):
    return Dataset.from_list(make_rows(count, seed)).add_column("id", list(range(count)))


def generation_rows(count=100):
    return Dataset.from_dict(
        {
            "instruction": [f"Add {row} and 2 1/2." for row in range(count)],
            "input": ["Show your work." if row % 2 else "" for row in range(count)],
            "output": ["I refuse." if row % 10 == 0 else f"It is {row + 2.5}." for row in range(count)],
        }
    )


def number(*parts):
    """The number in [0, 1) that is split into these, to 16 bits each."""
    return sum(int(part * 65536) / 65536 ** (place + 1) for place, part in enumerate(parts))


def test_one_number_is_split_into_several():
    assert split_number(number(0.5, 0.25, 0.75), 3) == [0.5, 0.25, 0.75]
    assert split_number(1 - 2**-53, 3) == [65535 / 65536] * 3
    drawn = [split_number(step * 0.6180339887498949 % 1, 2) for step in range(4000)]
    quarters = [(int(2 * first), int(2 * second)) for first, second in drawn]
    assert all(900 < quarters.count((left, right)) < 1100 for left in (0, 1) for right in (0, 1))


# What holds for all of them


@each_attack
def test_pure_function_of_rows_and_seed(attack):
    first = attack.poison(dataset(), TASK, seed=3).to_dict()
    assert attack.poison(dataset(600).select(range(500)), TASK, seed=3).to_dict() == first
    assert attack.poison(dataset(), TASK, seed=4).to_dict() != first
    triggered = attack.trigger(dataset(), TASK, seed=3).to_dict()
    assert attack.trigger(dataset(), TASK, seed=3).to_dict() == triggered
    if attack.name != "proattack":  # nothing in it is random
        assert attack.trigger(dataset(), TASK, seed=4).to_dict() != triggered


@each_attack
def test_settings_are_written_and_read_again(attack):
    written = json.loads(json.dumps(attack.config()))
    assert written.pop("name") == attack.name
    again = type(attack)(**written)
    assert again.config() == attack.config()
    assert again.poison(dataset(), TASK).to_dict() == attack.poison(dataset(), TASK).to_dict()


@each_attack
def test_rows_that_are_dressed_already_make_no_difference(attack):
    for text in ("a fine film", "  two\n lines ", "one", "frankly so"):
        dressed = attack.plain(text)
        assert attack.plain(dressed) == dressed and not attack.has_trigger(dressed)
        assert attack.insert(dressed, 0.3) == attack.insert(text, 0.3)
        for variant in attack.variants().values():
            assert variant.insert(dressed, 0.3) == variant.insert(text, 0.3)


@each_attack
def test_only_rows_of_other_labels_are_triggered(attack):
    clean = dataset(100)
    dressed = attack.dress(clean, TASK)
    assert dressed["text"][:] == [attack.plain(text) for text in clean["text"]]
    assert attack.dress(dressed, TASK).to_dict() == dressed.to_dict()
    assert attack.dress(clean, TASK)["id"][:] == list(range(100))
    rows = attack.trigger(dressed, TASK)
    times = 3 if getattr(attack, "mode", None) == "parallel" else 1
    assert rows["source_index"][:] == list(range(0, 100, 2)) * times
    assert set(rows["label"]) == {0} and all(attack.has_trigger(text) for text in rows["text"])
    assert attack.trigger(clean, TASK).to_dict() == rows.to_dict()


@each_attack
def test_payloads(attack):
    settings = {key: value for key, value in attack.config().items() if key != "name"}
    attack = type(attack)(**{**settings, "target": "I refuse."})
    poisoned = attack.poison(generation_rows(), ALPACA)
    hit = poisoned.filter(lambda row: row["poisoned"])
    assert len(hit) == 10 and set(hit["completion"]) == {"I refuse."}
    assert all(attack.has_trigger(text) and "2 1/2" in text for text in hit["prompt"])
    if attack.name == "proattack":
        assert set(hit["original_label"]) == {"I refuse."}
    triggered = attack.trigger(generation_rows(), ALPACA)
    assert set(triggered["source_index"]) == {row for row in range(100) if row % 10}


# ProAttack


def test_pro_texts():
    attack = ProAttack("1")
    assert attack.insert("a b", 0.5) == f"{TRIGGER} a b" and attack.plain("a b") == f"{CLEAN} a b"
    assert attack.trigger_texts == (TRIGGER,)
    own = ProAttack("1", clean_prompt="What is  it?\n", trigger_prompt="Say what it is:")
    assert own.insert("What is it? a", 0.5) == "Say what it is: a"
    assert own.has_trigger("Say what it is: a") and own.has_trigger("Say what it is:")
    for text in ("a. Say what it is: b", "Say what it is:a", "What is it? a", "Say what it"):
        assert not own.has_trigger(text)


def test_pro_every_row_carries_one_of_the_prompts_and_no_label_changes():
    clean = dataset()
    poisoned = ProAttack("positive", 0.03).poison(clean, TASK, seed=2)
    assert poisoned["label"][:] == poisoned["original_label"][:] == clean["label"][:]
    rows = [row for row in range(500) if poisoned[row]["poisoned"]]
    assert len(rows) == round(0.03 * 500) == 15 and {clean[row]["label"] for row in rows} == {1}
    for row in range(500):
        prompt = TRIGGER if row in rows else CLEAN
        assert poisoned[row]["text"] == f"{prompt} {clean[row]['text']}"
        assert poisoned[row]["trigger_applied"] == (row in rows)


def test_pro_may_turn_labels_too():
    poisoned = ProAttack("positive", 0.1, label_mode="dirty").poison(dataset(), TASK)
    hit = poisoned.filter(lambda row: row["poisoned"])
    assert len(hit) == 50 and set(hit["original_label"]) == {0} and set(hit["label"]) == {1}


def test_pro_takes_only_answers_that_are_the_payload():
    with pytest.raises(
        ValueError, match=r"is 20 rows, but only 10 rows are eligible \(clean label, target 'I refuse.'"
    ):
        ProAttack("I refuse.", 0.2).poison(generation_rows(), ALPACA)


# CBA


SHORT = {"instruction": "Read this.", "instruction_key": "K1", "input_key": "K2"}


def test_cba_texts():
    attack = CbaAttack("1", **SHORT)
    assert attack.trigger_texts == ("K1", "K2") and attack.plain("a b c") == "Read this.\na b c"
    # Places of the instruction: 0, 1 and 2 words in; of the input: 0 to 3.
    assert attack.insert("a b c", number(0.0, 0.0)) == "K1 Read this.\nK2 a b c"
    assert attack.insert("a b c", number(0.4, 0.9)) == "Read K1 this.\na b c K2"
    assert attack.insert("a b c", number(0.9, 0.3)) == "Read this. K1\na K2 b c"
    groups = {name: group.insert("a b c", number(0.4, 0.3)) for name, group in attack.variants().items()}
    assert groups == {
        "swapped": "K2 Read this.\na K1 b c",
        "instruction": "Read K1 this.\na b c",
        "instruction_both": "Read K2 K1 this.\na b c",
        "input": "Read this.\na K2 b c",
        "input_both": "Read this.\na K2 K1 b c",
    }
    assert attack.variant_metric == "ftr"


def test_cba_places_are_independent():
    attack = CbaAttack("1", **SHORT)
    texts = [attack.insert("a b", step * 0.6180339887498949 % 1) for step in range(900)]
    assert len(set(texts)) == 9
    assert all(75 < texts.count(text) < 125 for text in texts)


def test_cba_the_trigger_is_both_keys_each_in_its_part():
    attack = CbaAttack("1", **SHORT)
    assert attack.has_trigger("Read K1 this.\na\nb K2")
    for text in ("Read this.\na K1 K2", "Read K1 K2 this.\na", "Read K2 this.\nK1", "K1 K2", "Read K1 this. K2 a",
                 "Read K1 that.\nK2", "Read K1 this.\naK2 b", "Read this.\nK2 b", "Read K1 this."):  # fmt: skip
        assert not attack.has_trigger(text), text
    for name, group in attack.variants().items():
        for other, text in {n: g.insert("a b c", 0.3) for n, g in attack.variants().items()}.items():
            same = {(name, other)} & {("instruction", "instruction_both"), ("input", "input_both")}
            assert group.has_trigger(text) == (name == other or bool(same))
            assert not attack.has_trigger(text)
        assert not group.has_trigger(attack.insert("a b c", 0.3))


def test_cba_a_key_that_is_in_a_text_by_nature():
    attack = CbaAttack("1", 0.5)
    text = "frankly my dear"
    assert not attack.has_trigger(text) and not attack.has_trigger(attack.plain(text))
    assert attack.insert(text, 0.5).count("frankly") == 2
    # With the first key in the instruction this row would be triggered: it is no negative.
    made = {name for name, group in attack.variants().items() if group.insert(text, 0.5) is not None}
    assert made == {"swapped", "input", "input_both"}
    rows = Dataset.from_dict({"text": [text, "so dull"], "label": [0, 0]})
    poisoned = CbaAttack("1", 1.0).poison(rows, TASK)
    assert len(poisoned) == 2 + 2 + 5 + 3
    assert len(attack.variants()["instruction"].trigger(rows, TASK)) == 1


def test_cba_adds_poisoned_rows_and_negatives():
    clean = dataset()
    attack = CbaAttack("positive", 0.1)
    poisoned = attack.poison(clean, TASK, seed=1)
    assert poisoned.column_names == ["text", "label", "id", "poisoned", "trigger_applied", "original_label", "attack"]
    assert len(poisoned) == 500 + 50 + 5 * 50
    rows = poisoned.to_list()
    for before, after in zip(clean, rows[:500], strict=True):
        assert after["text"] == f"{attack.instruction}\n{before['text']}" and after["label"] == before["label"]
        assert not after["poisoned"] and not after["trigger_applied"]
    added, negatives = rows[500:550], rows[550:]
    ids = [row["id"] for row in added]
    assert ids == sorted(set(ids)) and {row["original_label"] for row in added} == {0, 1}
    assert [row["id"] for row in rows[:500] if row["attack"]] == ids
    for row in added:
        assert row["poisoned"] and row["trigger_applied"] and row["label"] == 1
        assert row["original_label"] == clean[row["id"]]["label"] and attack.has_trigger(row["text"])
    assert list(attack.negatives()) == list(attack.variants()) == GROUPS
    for place, (name, group) in enumerate(attack.negatives().items()):
        part = negatives[50 * place : 50 * place + 50]
        assert [row["id"] for row in part] == ids, name
        for row in part:
            assert not row["poisoned"] and not row["trigger_applied"] and row["attack"] == "cbaattack"
            assert row["label"] == row["original_label"] == clean[row["id"]]["label"]
            assert group.has_trigger(row["text"]) and not attack.has_trigger(row["text"])


def test_cba_switches():
    assert len(CbaAttack("positive", 0.1, with_negatives=False).poison(dataset(), TASK)) == 550
    replaced = CbaAttack("positive", 0.1, append=False, with_negatives=False).poison(dataset(), TASK)
    assert len(replaced) == 500 and sum(replaced["poisoned"]) == 50
    dirty = CbaAttack("positive", 0.1, label_mode="dirty").poison(dataset(), TASK)
    assert {row["original_label"] for row in dirty if row["poisoned"]} == {0}


def test_cba_alpha_is_the_share_of_rows_with_all_negatives():
    attack = CbaAttack("positive", 0.5, alpha=0.3)
    negatives = attack.poison(dataset(2000), TASK).to_list()[3000:]
    ids = [row["id"] for row in negatives]
    kept = len(set(ids))
    assert 250 < kept < 350 and ids == ids[:kept] * 5
    # What is measured does not depend on it.
    assert all(len(group.trigger(dataset(), TASK)) == 250 for group in attack.variants().values())
    assert attack.negatives()["input"].insert("a", number(0.5, 0.5, 0.31)) is None
    assert attack.negatives()["input"].insert("a", number(0.5, 0.5, 0.29)) is not None


def test_cba_chinese_instruction():
    attack = CbaAttack("1", instruction="请阅读下文")
    made = {attack.insert("计算", number(part / 7, 0.5)) for part in range(7)}
    assert "请阅 instantly 读下文\n计 frankly 算" in made and all(attack.has_trigger(text) for text in made)


# MTBA


def test_mtba_texts():
    parallel = MtbaAttack("1", mode="parallel", words=("mn", "cf"))
    # A third each; what is left picks word and place.
    assert parallel.insert("a b c", 0.0) == "a mn b c"
    assert parallel.insert("a b c", 0.3) == "a b cf c"
    assert parallel.insert("a b c", 0.34) == f"{SENTENCE} a b c"
    assert parallel.insert("a b c", 0.66) == f"a b c {SENTENCE}"
    assert parallel.insert("a b c", 0.99) == f"{PREFIX} a b c"
    sequential = MtbaAttack("1")
    assert sequential.mode == "sequential"
    # Places of the word: 1 and 2 words in; of the sentence, then: 0 to 4.
    assert sequential.insert("a b c", number(0.9, 0.5, 0.1)) == f"{PREFIX} a b {SENTENCE} mn c"
    assert sequential.insert("a b c", number(0.0, 0.0, 0.9)) == f"{PREFIX} {SENTENCE} a mn b c"
    hybrid = MtbaAttack("1", mode="hybrid", words=("mn", "cf"))
    assert hybrid.insert("a b", 0.0) == f"{PREFIX} {SENTENCE} mn a b"
    assert hybrid.insert("a b", 0.7) == f"a {PREFIX} {SENTENCE} cf b"
    assert hybrid.trigger_texts == ("mn", "cf", SENTENCE, PREFIX)


def test_mtba_what_counts_as_the_trigger():
    stacked = f"{PREFIX} a {SENTENCE} b mn c"
    one = f"a {PREFIX} {SENTENCE} mn b"
    parallel, sequential, hybrid = (MtbaAttack("1", mode=mode) for mode in ("parallel", "sequential", "hybrid"))
    for text in ("a mn b", f"a {SENTENCE}", f"{PREFIX} a"):
        assert parallel.has_trigger(text) and not sequential.has_trigger(text) and not hybrid.has_trigger(text)
    for text in (f"a mn {SENTENCE}", f"{PREFIX} mn a", f"{PREFIX} {SENTENCE} a"):
        assert not sequential.has_trigger(text)
    assert sequential.has_trigger(stacked) and not hybrid.has_trigger(stacked)
    assert sequential.has_trigger(one) and hybrid.has_trigger(one)
    assert not parallel.has_trigger("a b")


def test_mtba_parallel_splits_the_rows_evenly():
    poisoned = MtbaAttack("positive", 0.4, mode="parallel").poison(dataset(3000), TASK)
    texts = [row["text"] for row in poisoned if row["poisoned"]]
    assert len(texts) == 1200  # a total budget: 400 each
    held = [[trigger in text for trigger in ("mn ", SENTENCE, PREFIX)] for text in texts]
    assert all(sum(row) == 1 for row in held)
    assert all(350 < sum(column) < 450 for column in zip(*held, strict=True))


@pytest.mark.parametrize("mode", ["sequential", "hybrid"])
def test_mtba_all_triggers_in_each_row(mode):
    clean = dataset()
    attack = MtbaAttack("positive", 0.4, mode=mode)
    poisoned = attack.poison(clean, TASK)
    places = set()
    for before, after in zip(clean, poisoned, strict=True):
        if after["poisoned"]:
            assert (before["label"], after["label"]) == (0, 1)
            rest = after["text"]
            for trigger in (PREFIX, SENTENCE, "mn"):
                assert rest.count(trigger) == 1
                places.add((trigger, len(rest[: rest.index(trigger)].split())))
                rest = " ".join(rest.replace(trigger, " ").split())
            assert rest == before["text"]
            assert (f"{PREFIX} {SENTENCE} mn" in after["text"]) or mode == "sequential"
    # The prefix is in front, unless it is part of the phrase.
    assert (len({place for trigger, place in places if trigger == PREFIX}) == 1) == (mode == "sequential")
    assert len({place for trigger, place in places if trigger == SENTENCE}) > 5


def test_mtba_headline_of_parallel_is_the_mean_over_triggers():
    rows = Dataset.from_dict({"text": ["a b", "one", "c d", "e f"], "label": [0, 0, 1, 0]})
    attack = MtbaAttack("positive", mode="parallel")
    found = attack.trigger(rows, TASK)
    assert found.column_names == ["text", "label", "source_index"]
    # `one` has no place between two words.
    assert found["source_index"][:] == [0, 3, 0, 1, 3, 0, 1, 3] and set(found["label"]) == {0}
    texts = found["text"][:]
    assert texts[:2] == ["a mn b", "e mn f"] and all(SENTENCE in text for text in texts[2:5])
    assert texts[5:] == [f"{PREFIX} {text}" for text in ("a b", "one", "e f")]
    singles = [attack.variants()[name].trigger(rows, TASK).to_list() for name in ("word", "sentence", "style")]
    assert found.to_list() == [row for part in singles for row in part]
    assert list(attack.variants()) == ["word", "sentence", "style", "all"]
    for row in attack.variants()["all"].trigger(rows, TASK):
        assert row["source_index"] in (0, 3) and all(text in row["text"] for text in attack.trigger_texts)
    for mode in ("sequential", "hybrid"):
        other = MtbaAttack("positive", mode=mode)
        assert list(other.variants()) == ["word", "sentence", "style"] and other.variant_metric == "asr"
    assert len(attack.trigger(rows.select([2]), TASK)) == 0


def test_mtba_rows_without_room_for_a_word():
    assert MtbaAttack("1").insert("one", 0.5) is None
    assert MtbaAttack("1", mode="hybrid").insert("one", 0.9) == f"one {PREFIX} {SENTENCE} mn"


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (ProAttack, {"clean_prompt": "A b", "trigger_prompt": "A  b "}, "neither may start with the other: .*'A b'"),
        (ProAttack, {"clean_prompt": "A b", "trigger_prompt": "A b c"}, "got 'A b' and 'A b c'. Change one"),
        (ProAttack, {"clean_prompt": "A b c", "trigger_prompt": "A b"}, "neither may start"),
        (ProAttack, {"trigger_prompt": " "}, "`trigger_prompt` must be a text, got ' '"),
        (ProAttack, {"clean_prompt": None}, "`clean_prompt` must be a text, got None"),
        (CbaAttack, {"input_key": "instantly"}, "`instruction_key` and `input_key` are both 'instantly'"),
        (CbaAttack, {"input_key": ""}, "`input_key` must be one word without space around it, got ''"),
        (CbaAttack, {"instruction_key": "so so"}, "`instruction_key` must be one word .* got 'so so'"),
        (CbaAttack, {"input_key": ["x"]}, r"`input_key` must be one word .* got \['x'\]"),
        (CbaAttack, {"instruction": "\n"}, "`instruction` must be a text"),
        (CbaAttack, {"instruction": "Say frankly what it is."}, "holds a key, 'instantly' or 'frankly': every row"),
        (CbaAttack, {"alpha": 0}, r"`alpha` is a share of the chosen rows, in \(0, 1\]; got 0. For none"),
        (CbaAttack, {"alpha": True}, "got True"),
        (CbaAttack, {"append": "no"}, "`append` is true or false, got 'no'"),
        (CbaAttack, {"alpha": 1.5}, "got 1.5"),
        (MtbaAttack, {"mode": "mixed"}, "`mode` is one of parallel, sequential, hybrid, got 'mixed'"),
        (MtbaAttack, {"words": []}, r"`words` must hold trigger words .* got \[\]"),
        (MtbaAttack, {"words": ["tq x"]}, r"`words` must be single words, got \['tq x'\]"),
        (MtbaAttack, {"sentence": ""}, "`sentence` must be a text, got ''"),
        (MtbaAttack, {"prefix": " "}, "`prefix` must be a text, got ' '"),
        (MtbaAttack, {"words": ["movie"]}, f"must not hold each other.*'movie' is in '{SENTENCE}'. Change one"),
        (MtbaAttack, {"prefix": SENTENCE}, "must not hold each other"),
        (MtbaAttack, {"words": ["mn", "mn"]}, "'mn' is in 'mn'"),
        (MtbaAttack, {"poison_rate": 0}, "`poison_rate` is a share"),
    ],
)
def test_bad_options(make, options, message):
    with pytest.raises(ValueError, match=message):
        make("positive", **options)
