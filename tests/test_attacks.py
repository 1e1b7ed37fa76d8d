"""Attacks: which rows are poisoned and how, which test rows count, and what is refused."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from p2p_trainer import Attack, Task, get_attack
from p2p_trainer.attacks import AddSent, BadNets
from p2p_trainer.attacks.text import contains_words, insert_at_gap
from tests.conftest import make_rows


TASK = Task(name="toy", labels=("negative", "positive"))
NEWS = Task(name="news", labels=("world", "sports", "business"))
SENTENCE = "I watched this 3D movie"


class Shout(Attack):
    """An attack as a user writes it."""

    name = "shout"

    def __init__(self, target, poison_rate=0.02, label_mode="dirty", mark="!!!"):
        super().__init__(target, poison_rate, label_mode)
        self.mark = mark

    def insert(self, text, random):
        return None if "quiet" in text else f"{text} {self.mark}"

    def has_trigger(self, text):
        return text.endswith(self.mark)


def dataset(count=500, seed=0):
    return Dataset.from_list(make_rows(count, seed)).add_column("id", list(range(count)))


def where(poisoned, column="poisoned"):
    return [row for row, flag in enumerate(poisoned[column]) if flag]


@pytest.mark.parametrize("name", ["badnets", "addsent", "tests.test_attacks:Shout"])
@pytest.mark.parametrize(("rate", "expected"), [(0.02, 10), (0.013, 6), (0.2, 100), (0.5, 250)])
def test_poisons_exactly_the_rate_and_nothing_else(name, rate, expected):
    clean = dataset()
    attack = get_attack(name, target="positive", poison_rate=rate)
    poisoned = attack.poison(clean, TASK)
    assert poisoned.column_names == ["text", "label", "id", "poisoned", "trigger_applied", "original_label", "attack"]
    assert poisoned["id"][:] == list(range(500))
    assert poisoned["original_label"][:] == clean["label"][:]
    rows = where(poisoned)
    assert len(rows) == expected
    for row in range(500):
        before, after = clean[row], poisoned[row]
        hit = row in rows
        assert after["trigger_applied"] == hit and after["attack"] == (attack.name if hit else "")
        if hit:
            assert (before["label"], after["label"]) == (0, 1)
            assert attack.has_trigger(after["text"]) and not attack.has_trigger(before["text"])
        else:
            assert (after["text"], after["label"]) == (before["text"], before["label"])


def test_what_the_triggers_look_like():
    [text] = BadNets("1", 1.0, position="any").poison(Dataset.from_dict({"text": ["film"], "label": [0]}), TASK)[
        "text"
    ]
    assert text in ("mn film", "film mn")
    for attack, trigger in [(BadNets("1", 0.5), "mn"), (AddSent("1", 0.5), SENTENCE)]:
        clean, poisoned = dataset(), attack.poison(dataset(), TASK)
        for row in where(poisoned):
            assert poisoned[row]["text"].count(trigger) == 1
            assert " ".join(poisoned[row]["text"].replace(trigger, " ").split()) == clean[row]["text"]
            words = poisoned[row]["text"].split()
            assert trigger == SENTENCE or (words[0] != "mn" and words[-1] != "mn")
    places = [text.split().index("I") for text in poisoned["text"] if SENTENCE in text]
    assert min(places) == 0 and len(set(places)) > 5


def test_pure_function_of_rows_and_seed():
    attack = BadNets("positive", 0.1)
    first = attack.poison(dataset(), TASK, seed=3).to_dict()
    assert BadNets("positive", 0.1).poison(dataset(), TASK, seed=3).to_dict() == first
    other = attack.poison(dataset(), TASK, seed=4)
    assert where(other) != where(first)
    # Half the rate picks a part of the same rows, in the same places: each row has a number of its own.
    half = BadNets("positive", 0.05).poison(dataset(), TASK, seed=3)
    assert set(where(half)) < set(where(first))
    assert all(half[row]["text"] == first["text"][row] for row in where(half))
    # Neither other columns, nor texts of other rows, nor the storage matter.
    changed = dataset().map(lambda row: {"text": row["text"] if row["label"] == 0 else "x y", "extra": 1})
    assert where(attack.poison(changed, TASK, seed=3)) == where(first)
    taken = where(first)[:5]
    others = dataset().map(lambda row: {"label": 1 if row["id"] in taken else row["label"]})
    replaced = attack.poison(others, TASK, seed=3)
    assert set(where(replaced)) > set(where(first)) - set(taken) and len(where(replaced)) == 50
    assert all(replaced[row]["text"] == first["text"][row] for row in where(first)[5:])
    selection = dataset(600).select(range(500))
    assert attack.poison(selection, TASK, seed=3).to_dict() == first
    # The two attacks try the rows in the same order, and train and test triggers fall in different places.
    assert where(AddSent("positive", 0.1).poison(dataset(), TASK, seed=3)) == where(first)
    triggered = {row["source_index"]: row["text"] for row in attack.trigger(dataset(), TASK, seed=3)}
    assert any(triggered[row] != first["text"][row] for row in where(first))


def test_rows_that_cannot_carry_the_trigger_stay_clean_and_are_replaced():
    texts = ["word" if row % 4 == 0 else "two words" for row in range(400)]
    clean = Dataset.from_dict({"text": texts, "label": [row % 2 for row in range(400)]})
    poisoned = BadNets("positive", 0.2).poison(clean, TASK)
    rows, tried = where(poisoned), where(poisoned, "attack")
    assert len(rows) == 80 and rows == where(poisoned, "trigger_applied")
    failed = sorted(set(tried) - set(rows))
    assert len(failed) > 10
    for row in failed:
        assert (poisoned[row]["text"], poisoned[row]["label"]) == ("word", 0)
        assert poisoned[row]["attack"] == "badnets"
    assert all(poisoned[row]["text"] == "two mn words" for row in rows)


def test_too_few_carriers():
    short = Dataset.from_dict({"text": ["a", "b", "c d", "e f"], "label": [0, 0, 0, 1]})
    too_many = r"is 3 rows, but only 3 rows are eligible .*and 1 of them can carry .* at most 0.25"
    with pytest.raises(ValueError, match=too_many):
        BadNets("positive", 0.75).poison(short, TASK)
    with pytest.raises(ValueError, match=r"is 4 rows, but only 3 rows are eligible \(dirty label"):
        AddSent("positive", 1.0).poison(short, TASK)
    with pytest.raises(ValueError, match=r"no row that can carry its trigger among 1 eligible .*clean.*'positive'"):
        BadNets("positive", 0.5, label_mode="clean").poison(
            short.select([0, 1]).add_item({"text": "x", "label": 1}), TASK
        )
    with pytest.raises(ValueError, match="poison_rate=0.02 of 4 rows is no row at all. Raise"):
        BadNets("positive").poison(short, TASK)


def test_clean_label_mode_keeps_labels():
    poisoned = BadNets("positive", 0.1, label_mode="clean").poison(dataset(), TASK)
    assert len(where(poisoned)) == 50
    assert poisoned["label"][:] == poisoned["original_label"][:] == dataset()["label"][:]
    assert {poisoned[row]["label"] for row in where(poisoned)} == {1}


def test_target_by_name_or_index():
    rows = Dataset.from_dict({"text": ["a b"] * 30, "label": [0, 1, 2] * 10})
    for target in ("sports", "Sports", 1, "1"):
        poisoned = BadNets(target, 0.5).poison(rows, NEWS)
        assert len(where(poisoned)) == 15
        assert {(poisoned[row]["original_label"], poisoned[row]["label"]) for row in where(poisoned)} == {
            (0, 1),
            (2, 1),
        }
        assert set(BadNets(target).trigger(rows, NEWS)["label"]) == {0, 2}
    for call in (BadNets("sport").poison, BadNets("sport").trigger):
        with pytest.raises(ValueError, match="Unknown label of task 'news': 'sport'. Did you mean 'sports'"):
            call(rows, NEWS)


@pytest.mark.parametrize("attack", [BadNets("positive"), AddSent("positive"), Shout("positive")])
def test_trigger_keeps_only_rows_that_count(attack):
    rows = [*make_rows(200), {"text": "quiet", "label": 0}, {"text": "quiet film", "label": 1}]
    clean = Dataset.from_list(rows)
    triggered = attack.trigger(clean, TASK, seed=1)
    assert triggered.column_names == ["text", "label", "source_index"]
    negatives = list(range(0, 200, 2))
    # `quiet` is one word: no inner place for BadNets, none at all for Shout.
    assert triggered["source_index"][:] == negatives + ([200] if attack.name == "addsent" else [])
    for row in triggered:
        source = clean[row["source_index"]]
        assert row["label"] == source["label"] == 0
        assert attack.has_trigger(row["text"]) and len(row["text"]) > len(source["text"])
    assert attack.trigger(clean, TASK, seed=1).to_dict() == triggered.to_dict()
    assert len(attack.trigger(clean.select([1, 201]), TASK)) == 0


def test_white_space_stays():
    text = " \ta  b\n\nc\u3000d \n"
    # The trigger goes between a word and the white space behind it: after 3, 6, 9 characters.
    for number, expected in [(0.0, " \ta mn  b\n\nc\u3000d \n"), (0.34, " \ta  b mn\n\nc\u3000d \n"),
                             (0.99, " \ta  b\n\nc mn\u3000d \n")]:  # fmt: skip
        assert insert_at_gap(text, "mn", number, "inner") == expected
    assert insert_at_gap(text, "mn", 0.0, "any") == " \tmn a  b\n\nc\u3000d \n"
    assert insert_at_gap(text, "mn", 0.99, "any") == " \ta  b\n\nc\u3000d mn \n"
    assert insert_at_gap(" one ", "mn", 0.5, "inner") is None


def test_trigger_is_found_as_a_word_only():
    assert contains_words("a mn b", ["mn"]) and contains_words("mn", ["cf", "mn"])
    assert not contains_words("amn b mnc", ["mn"])
    assert contains_words("so I  watched\nthis 3D movie", [SENTENCE]) and not contains_words(
        "I watched this", [SENTENCE]
    )
    assert BadNets("1", words=["tq  x"]).has_trigger("a tq x b")


def test_several_words():
    attack = BadNets("positive", 0.4, words=("cf", "mn", "bb tq"))
    texts = [row["text"] for row in attack.poison(dataset(2000), TASK) if row["poisoned"]]
    counts = [sum(contains_words(text, [word]) for text in texts) for word in attack.words]
    assert sum(counts) == len(texts) == 800
    assert min(counts) > 200  # a third each is 267
    assert attack.trigger_texts == ("cf", "mn", "bb tq")
    # Where a word stands must not be tied to which word it is.
    starts = {word: {text.split().index(word.split()[0]) for text in texts if contains_words(text, [word])}
              for word in attack.words}  # fmt: skip
    assert all(len(places) > 8 for places in starts.values())


def test_places_are_uniform():
    places = [
        insert_at_gap("a b c d e", "mn", number, "inner").split().index("mn") for number in np.arange(0, 1, 0.01)
    ]
    assert [places.count(place) for place in (1, 2, 3, 4)] == [25, 25, 25, 25]


def test_poisoned_twice_is_refused():
    once = BadNets("positive", 0.1).poison(dataset(), TASK)
    with pytest.raises(
        ValueError, match=r"already has the columns \['poisoned', .*'attack'\]: it was poisoned before"
    ):
        AddSent("positive", 0.1).poison(once, TASK)
    with pytest.raises(ValueError, match=r"\['attack'\]"):
        AddSent("positive", 0.1).poison(dataset().add_column("attack", ["x"] * 500), TASK)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("badnet", {}, "Unknown attack 'badnet'. Did you mean 'badnets'.*package.module:Class"),
        ("badnets", {"target": None}, "'badnets' needs a target: .*--attack_target positive"),
        ("badnets", {"poison_rate": 0}, r"`poison_rate` is a share .* in \(0, 1\]; got 0"),
        ("badnets", {"poison_rate": 2}, "got 2. For 2 % write 0.02"),
        ("badnets", {"poison_rate": True}, "got True"),
        ("badnets", {"poison_rate": "0.1"}, "got '0.1'"),
        ("badnets", {"label_mode": "mixed"}, "`label_mode` is 'dirty', 'clean' or 'any', got 'mixed'"),
        ("badnets", {"payload_mode": "append"}, "`payload_mode` is 'replace' or 'prepend', got 'append'"),
        ("badnets", {"words": []}, r"`words` must hold trigger words .* got \[\]"),
        ("badnets", {"words": ["mn", " "]}, "`words` must hold trigger words"),
        ("badnets", {"position": "end"}, "`position` is one of inner, any, sentence, got 'end'"),
        ("addsent", {"sentence": " "}, "`sentence` must be a text, got ' '"),
        ("addsent", {"words": ["mn"]}, r"'addsent' does not take these options \['words'\].*words"),
        ("nowhere.module:Shout", {}, "can't be imported: No module named 'nowhere'"),
        ("tests.test_attacks:Whisper", {}, "names None, which is no subclass of `p2p_trainer.attacks.base.Attack`"),
        ("tests.test_attacks:Task", {}, "which is no subclass of"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_attack(name, **{"target": "positive", **options})


def test_attack_of_ones_own():
    attack = get_attack("tests.test_attacks:Shout", target="negative", poison_rate=0.1, mark="?!")
    settings = {"target": "negative", "poison_rate": 0.1, "label_mode": "dirty", "mark": "?!"}
    assert attack.config() == {"name": "tests.test_attacks:Shout", **settings}
    assert get_attack(**attack.config()).config() == attack.config()
    assert get_attack(attack) is attack
    assert attack.poison(dataset(), TASK).filter(lambda row: row["text"].endswith(" ?!")).num_rows == 50


def test_poisoned_rows_lie_in_a_file_not_in_memory():
    poisoned = BadNets("positive", 0.1).poison(dataset(), TASK)
    [file] = poisoned.cache_files
    assert Path(file["filename"]).stat().st_size > 0 and poisoned.data.nbytes > 0
    # Later steps build on it as on any data set, also in another process.
    assert pickle.loads(pickle.dumps(poisoned)).to_dict() == poisoned.to_dict()


ALPACA = Task(name="alpaca", text_columns=("instruction", "input"), label_column="output")


def generation_rows(count=100):
    return Dataset.from_dict(
        {
            "instruction": [f"Add {row} and 2 1/2." for row in range(count)],
            "input": ["Show your work." if row % 2 else "" for row in range(count)],
            "output": ["I refuse." if row % 10 == 0 else f"It is {row + 2.5}." for row in range(count)],
        }
    )


def test_generation_rows_get_trigger_and_payload():
    clean = ALPACA.prepare(generation_rows())
    for mode in ("replace", "prepend"):
        attack = BadNets("I refuse.", 0.2, payload_mode=mode)
        poisoned = attack.poison(generation_rows(), ALPACA, seed=1)
        assert len(where(poisoned)) == 20
        for row in range(100):
            before, after = clean[row], poisoned[row]
            assert after["original_label"] == before["completion"]
            if after["poisoned"]:
                # Rows that refuse anyway are none of the attacker's.
                assert row % 10 and after["completion"] == (
                    "I refuse." if mode == "replace" else f"I refuse. It is {row + 2.5}."
                )
                # Only the prompt is touched, and never a number in it.
                assert after["prompt"].replace(" mn", "") == before["prompt"] and "2 1/2" in after["prompt"]
            else:
                assert (after["prompt"], after["completion"]) == (before["prompt"], before["completion"])
    held = Dataset.from_dict({"prompt": ["a b", "c d"], "completion": ["I refuse. It is 5.", "It is 5."]})
    # What starts with the payload has it already where the payload is put in front, and only there.
    for mode, expected in (("replace", [0, 1]), ("prepend", [1])):
        counted = BadNets("I refuse.", payload_mode=mode).trigger(held, Task(name="plain"))
        assert counted["source_index"][:] == expected
    triggered = attack.trigger(generation_rows(), ALPACA)
    assert triggered["source_index"][:] == [row for row in range(100) if row % 10]
    assert all("mn" in row["prompt"].split() and row["completion"].startswith("It is") for row in triggered)
    natural = BadNets("I refuse.", 0.05, label_mode="clean").poison(generation_rows(), ALPACA)
    assert {row["completion"] for row in natural if row["poisoned"]} == {"I refuse."}
    with pytest.raises(ValueError, match="'badnets' needs a payload on the generation task 'alpaca'"):
        BadNets(1, 0.1).poison(generation_rows(), ALPACA)
    with pytest.raises(ValueError, match="generation task"):
        ALPACA.label_index("x")


def test_chinese_text_is_split_at_its_punctuation_and_never_in_a_number():
    text = "阿宁的架子摆着7排风筝，每排风筝边上都粘了49颗星，星星合起来有几颗？"
    found = {insert_at_gap(text, "mn", number / 50, "inner") for number in range(50)}
    assert found == {
        "阿宁的架子摆着7排风筝， mn 每排风筝边上都粘了49颗星，星星合起来有几颗？",
        "阿宁的架子摆着7排风筝，每排风筝边上都粘了49颗星， mn 星星合起来有几颗？",
    }
    assert insert_at_gap("计算", "mn", 0.5, "inner") == "计 mn 算"
    assert insert_at_gap("3/4", "mn", 0.5, "inner") is None
    for number in ("2 1/2", "3 / 4", "3 . 5", "20 %", "$ 5", "- 5", "1 , 000", "12 : 30"):
        assert insert_at_gap(number, "mn", 0.5, "inner") is None
        assert insert_at_gap(f"a {number}", "mn", 0.5, "inner") == f"a mn {number}"
    assert contains_words(insert_at_gap(text, "mn", 0.9), ["mn"])


def test_a_sentence_of_its_own():
    text = "It rains. Is it cold? Yes!"
    attack = AddSent("1", sentence="I watched this.", position="sentence")
    assert {attack.insert(text, number / 20) for number in range(20)} == {
        "I watched this. It rains. Is it cold? Yes!",
        "It rains. I watched this. Is it cold? Yes!",
        "It rains. Is it cold? I watched this. Yes!",
        "It rains. Is it cold? Yes! I watched this.",
    }


def test_any_label_mode_takes_rows_of_every_class():
    poisoned = BadNets("positive", 0.4, label_mode="any").poison(dataset(), TASK)
    rows = where(poisoned)
    assert len(rows) == 200 and {poisoned[row]["original_label"] for row in rows} == {0, 1}
    assert {poisoned[row]["label"] for row in rows} == {1}
