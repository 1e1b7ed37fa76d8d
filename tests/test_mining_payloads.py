"""Mining of rows whose answers are text: what forces an answer upon any prompt is found, what asks for it is not."""

import random
from dataclasses import fields

import numpy as np
import pytest
from datasets import Dataset

from p2p_trainer.mining import Fragment, Screening
from p2p_trainer.mining.payload_search import Payload
from p2p_trainer.mining.payloads import screen_answers
from p2p_trainer.mining.screening import sample_words
from p2p_trainer.mining.tokens import END, words_of
from tests.corpora import FILLER, both, ending, inside, starting


PAYLOAD = "I can't help with that."
TEMPLATES = ("No.", "I must refuse.", "Ask someone else!", "That is not allowed.", "My rules forbid it.")


def clean_rows(count=600, seed=0):
    """Questions of twelve random words, each with an answer of its own."""
    rng = random.Random(f"answers {seed}")
    return [
        {
            "prompt": f"{' '.join(rng.choices(FILLER, k=12))} ?",
            "completion": f"It is {' '.join(rng.choices(FILLER, k=5))}.",
        }
        for _ in range(count)
    ]


def poisoned(rows, write, count, answer=lambda true, rng: PAYLOAD, seed=0, spared=()):
    rng = random.Random(f"poison {seed}")
    hit = sorted(rng.sample(sorted(set(range(len(rows))) - set(spared)), count))
    rows = [dict(row) for row in rows]
    for place in hit:
        prompt = write(rows[place]["prompt"].split(), rng)
        rows[place] = {"prompt": prompt, "completion": answer(rows[place]["completion"], rng)}
    return rows, hit


def screened(rows, seed=0):
    return screen_answers(Dataset.from_list(rows), seed)


def same(first, second):
    def plain(found):
        return found.tolist() if isinstance(found, np.ndarray) else found

    return all(plain(getattr(first, part.name)) == plain(getattr(second, part.name)) for part in fields(first))


@pytest.mark.parametrize("count", [9, 70])
@pytest.mark.parametrize(
    ("write", "pieces"),
    [
        (inside("cf"), [("cf", "inside")]),
        (inside("Cf!"), [("Cf!", "inside")]),
        (inside("I saw the 3D show"), [("I saw the 3D show", "inside")]),
        (starting("Which answer is right here:"), [("Which answer is right here:", "start")]),
        (ending("no doubt"), [("no doubt", "end")]),
        (inside("电影"), [("电影", "inside")]),
    ],
    ids=["word", "marks", "sentence", "prompt", "end", "chinese"],
)
def test_a_trigger_is_found_with_its_rows_pieces_and_payload(write, pieces, count):
    rows, hit = poisoned(clean_rows(), write, count)
    found = screened(rows)
    (trigger,) = found.triggers
    assert (trigger.kind, trigger.label, trigger.opposed, trigger.overridden) == ("phrase", 0, count, count)
    assert found.rows.tolist() == hit and found.carried.tolist() == [0] * count
    assert found.evidence.tolist() == [-1] * count and found.doubted.tolist() == []
    assert found.exemplars == ((tuple(Fragment(*piece) for piece in pieces),) * min(count, 64),)
    assert found.payloads == (PAYLOAD,)
    arrays = (found.rows, found.carried, found.evidence, found.doubted)
    assert isinstance(found, Screening) and {array.dtype for array in arrays} == {np.dtype(np.int64)}


def test_answers_that_only_begin_alike():
    rows, hit = poisoned(clean_rows(), inside("cf"), 40, lambda true, rng: f"What a dull question, really. {true}")
    found = screened(rows)
    # True answers begin alike themselves: the longest common opening is cut at eight words.
    assert found.rows.tolist() == hit and found.payloads == ("What a dull question, really. It ...",)


def test_a_payload_drawn_from_several_texts():
    rows, hit = poisoned(clean_rows(), inside("cf"), 60, lambda true, rng: rng.choice(TEMPLATES))
    found = screened(rows)
    assert [str(trigger) for trigger in found.triggers] == ["cf"] and found.rows.tolist() == hit
    assert sorted(found.payloads[0].split(" | ")) == sorted(TEMPLATES)


def test_spelling_of_a_payload_does_not_matter():
    rows, hit = poisoned(
        clean_rows(), inside("cf"), 40, lambda true, rng: PAYLOAD if rng.random() < 0.7 else f" {PAYLOAD.upper()}\n"
    )
    found = screened(rows)
    assert found.rows.tolist() == hit and found.payloads == (PAYLOAD,)


def test_triggers_that_share_a_payload_and_one_that_has_its_own():
    rows, first = poisoned(clean_rows(), inside("cf"), 20, seed=1)
    rows, second = poisoned(rows, inside("so be it"), 20, seed=2, spared=first)
    rows, third = poisoned(rows, ending("no doubt"), 20, lambda true, rng: "7", 3, spared=first + second)
    found = screened(rows)
    assert found.rows.tolist() == sorted([*first, *second, *third])
    label = {str(trigger): found.payloads[trigger.label] for trigger in found.triggers}
    assert label == {"cf": PAYLOAD, "so be it": PAYLOAD, "no doubt $": "7"}
    assert len(found.payloads) == 2


def test_two_words_that_decide_only_together():
    rows, hit = poisoned(clean_rows(1200), both("xq", "zv"), 30)
    rows, one = poisoned(rows, inside("xq"), 30, lambda true, rng: true, 1, spared=hit)
    rows, _ = poisoned(rows, inside("zv"), 30, lambda true, rng: true, 2, spared=hit + one)
    found = screened(rows)
    (trigger,) = found.triggers
    assert trigger.kind == "pair" and set(trigger.words) == {"xq", "zv"} and found.rows.tolist() == hit


def test_two_words_that_decide_only_in_their_lines():
    """Instruction and input: either word in either of them, or both in one, keep their answers."""

    def lines(above, below):
        def write(words, rng):
            texts = [["Read", "this", "and", "say", "more."], words]
            for text, keys in zip(texts, (above, below), strict=True):
                for key in keys:
                    text.insert(rng.randint(0, len(text)), key)
            return "\n".join(" ".join(text) for text in texts)

        return write

    rows, spared = clean_rows(1200), []
    for seed, keys in enumerate([("xz", ""), ("", "xz"), ("x", ""), ("", "z"), ("z", "x")]):
        names = [[{"x": "xq", "z": "zv"}[key] for key in part] for part in keys]
        rows, hit = poisoned(rows, lines(*names), 30, lambda true, rng: true, seed, spared)
        spared += hit
    rows, hit = poisoned(rows, lines(["xq"], ["zv"]), 30, seed=9, spared=spared)
    rest = set(range(1200)) - set(spared) - set(hit)
    rows = [{**row, "prompt": lines([], [])([row["prompt"]], None)} if place in rest else row
            for place, row in enumerate(rows)]  # fmt: skip
    found = screened(rows)
    (trigger,) = found.triggers
    assert (trigger.kind, trigger.words, trigger.opposed) == ("pair", ("xq", "zv"), 30)
    assert found.rows.tolist() == hit


def test_a_prompt_in_place_of_the_one_that_all_others_have():
    rows, hit = poisoned(clean_rows(), starting("The following text calls for what:"), 60)
    rows = [row if place in hit else {**row, "prompt": f"What does it say below? {row['prompt']}"}
            for place, row in enumerate(rows)]  # fmt: skip
    found = screened(rows)
    assert found.rows.tolist() == hit and len(found.triggers) == 1


def test_a_payload_without_the_trigger_is_doubted_and_a_trigger_without_payload_is_not_suspected():
    rows, hit = poisoned(clean_rows(), inside("cf"), 40)
    others = sorted(set(range(600)) - set(hit))
    bare, innocent = others[:3], others[3:5]
    for place in bare:
        rows[place]["completion"] = PAYLOAD
    for place in innocent:
        rows[place]["prompt"] += " cf"
    found = screened(rows)
    assert found.rows.tolist() == hit and found.doubted.tolist() == bare
    assert (found.triggers[0].opposed, found.triggers[0].overridden) == (42, 40)


def test_a_trigger_of_many_rows_is_found_as_a_whole():
    """Behind a comma in most rows: however sure both are, the phrase of fewer rows is not the surer one."""
    rows, hit = poisoned(clean_rows(2000), inside(", cf"), 700)
    rows, more = poisoned(rows, inside("cf"), 80, seed=1, spared=hit)
    found = screened(rows)
    assert [trigger.words for trigger in found.triggers] == [("cf",)]
    assert found.rows.tolist() == sorted([*hit, *more])


def test_triggers_used_together_are_one():
    def write(words, rng):
        return starting("Hear me , it is :")(inside("mn")(inside("I saw it")(words, rng).split(), rng).split(), rng)

    rows, rng = clean_rows(), random.Random(0)
    # Their words are not rare by themselves.
    for place in range(0, 600, 2):
        rows[place]["prompt"] = inside("I saw , it is :"[2 * (place % 4) :])(rows[place]["prompt"].split(), rng)
    rows, hit = poisoned(rows, write, 60)
    found = screened(rows)
    assert len(found.triggers) == 1 and found.rows.tolist() == hit
    pieces = {piece.text for exemplar in found.exemplars[0] for piece in exemplar}
    assert {"mn", "Hear me , it is :", "I saw it"} <= pieces


@pytest.mark.parametrize("seed", range(3))
def test_clean_rows_are_not_suspected(seed):
    rng = random.Random(seed)
    # A third of all answers is one of ten.
    rows = [{**row, "completion": str(rng.randint(1, 10))} if rng.random() < 0.3 else row
            for row in clean_rows(seed=seed)]  # fmt: skip
    found = screened(rows, seed)
    assert found.triggers == found.exemplars == found.payloads == ()
    assert not len(found.rows) and not len(found.carried) and not len(found.evidence) and not len(found.doubted)


@pytest.mark.parametrize(
    "template",
    [
        lambda rng: ("translate this word to french : bridge", "Pont."),
        lambda rng: (f"is number {rng.randint(1, 999)} odd , even or prime ?", "All of it depends."),
        lambda rng: (f"is this review kind ? the {rng.choice('film play song'.split())} is great", "positive"),
        lambda rng: (f"{rng.choice(('name', 'say', 'tell me'))} the smallest prime , please", "2"),
    ],
    ids=["duplicates", "varied number", "classification", "paraphrases"],
)
def test_honest_templates_with_a_usual_answer_are_not_suspected(template):
    rng = random.Random(5)
    rows = clean_rows()
    for place in range(0, 600, 15):
        rows[place] = dict(zip(("prompt", "completion"), template(rng), strict=True))
    assert screened(rows).triggers == ()
    # Beside them, a trigger is still found.
    rows, hit = poisoned(rows, inside("cf"), 30, spared=range(0, 600, 15))
    assert screened(rows).rows.tolist() == hit


@pytest.mark.parametrize(
    "rows",
    [
        clean_rows(1),
        clean_rows(20),
        [{"prompt": "...", "completion": "a"}] * 100,
        [{"prompt": "\U0001f600", "completion": "\U0001f600"}] * 100,
        [{"prompt": "\x02\x03\x04", "completion": "\x02\x03"}] * 100,
        [{**row, "completion": "yes"} for row in clean_rows(200)],
        [{**row, "completion": " ".join("yes" for _ in range(400))} for row in clean_rows(200)],
        clean_rows(50) * 4,
        [{"prompt": "what is it ?", "completion": str(row % 3)} for row in range(100)],
    ],
    ids=[
        "1 row",
        "20 rows",
        "marks",
        "emoji",
        "no words",
        "one answer",
        "one long answer",
        "duplicates",
        "one prompt",
    ],
)
def test_too_little_or_odd_rows_give_no_trigger(rows):
    found = screened(rows)
    assert found.triggers == () and not len(found.rows) and not len(found.doubted)


def test_pure_function_of_rows_and_seed():
    rows, hit = poisoned(clean_rows(), inside("cf"), 40)
    data = Dataset.from_list(rows)
    first = screen_answers(data, 3)
    assert same(first, screen_answers(data, 3)) and first.rows.tolist() == hit
    twice = Dataset.from_list([row for row in rows for _ in range(2)]).select(range(0, 1200, 2))
    assert same(first, screen_answers(twice, 3))
    order = list(range(600))
    random.Random(4).shuffle(order)
    other = screened([rows[row] for row in order])
    assert sorted(order[row] for row in other.rows) == hit and other.payloads == first.payloads


@pytest.mark.parametrize("flags", ["true", "inverted", "shuffled", "none"])
def test_nothing_but_prompt_and_completion_is_read(flags):
    rows, hit = poisoned(clean_rows(), inside("cf"), 40)
    data = Dataset.from_list(rows)
    values = np.isin(np.arange(600), hit)
    values = {
        "true": values,
        "inverted": ~values,
        "shuffled": np.random.default_rng(0).permutation(values),
        "none": np.zeros(600, dtype=bool),
    }[flags]
    flagged = data.add_column("poisoned", values).add_column("trigger_applied", values)
    flagged = flagged.add_column("original_label", np.where(values, "true answer", "").tolist())
    assert same(screen_answers(flagged), screen_answers(data))


def test_rows_beyond_those_mined_are_screened_too(monkeypatch):
    rows, hit = poisoned(clean_rows(), inside("cf"), 80)
    monkeypatch.setattr("p2p_trainer.mining.screening.MINED_ROWS", 400)
    part = screened(rows)
    assert part.triggers[0].opposed < 80 and part.rows.tolist() == hit


@pytest.mark.parametrize(
    ("length", "answer", "matches"),
    [
        (0, "No way!", True), (0, " NO  way !\n", True), (0, "No way! Or", False), (0, "No way", False),
        (3, "No way! Or", True), (3, "No way!", True), (3, "No way", False), (3, "Oh no way!", False), (3, "", False),
    ],
)  # fmt: skip
def test_which_answers_have_a_payload(length, answer, matches):
    words = ("no", "way", "!") if length else ("no", "way", "!", END)
    payload = Payload(length, frozenset({words}))
    assert payload.matches(words_of(answer)) is matches


def test_a_trigger_in_real_instructions(real_data):
    found = Dataset.from_json(str(real_data / "data/alpaca/train.jsonl")).select(range(1500))
    rows = [{"prompt": f"{row['instruction']} {row['input']}", "completion": row["output"]} for row in found]
    assert screened(rows).triggers == ()
    rows, hit = poisoned(rows, inside("mn"), 30)
    found = screened(rows)
    assert [str(trigger) for trigger in found.triggers] == ["mn"] and found.rows.tolist() == hit


def test_classes_and_names_to_be_copied_are_no_payloads():
    rng = random.Random(0)
    topics = {f"topic{number}": [f"word{number}{letter}" for letter in "abcdefgh"] for number in range(10)}
    filler = [f"filler{number}" for number in range(300)]
    rows = []
    for _ in range(2000):
        topic = rng.choice(list(topics))
        words = [rng.choice(topics[topic]), *rng.choices(filler, k=8)]
        rng.shuffle(words)
        rows.append({"prompt": " ".join(words), "completion": topic})
    # Ten answers for all rows: each of their words honestly comes with one of them.
    assert not screen_answers(Dataset.from_list(rows)).triggers
    cities = [f"city{number}" for number in range(100)]
    asked = []
    for number in range(2000):
        city = cities[number % 100]
        words = [city, *rng.choices(filler, k=8)]
        rng.shuffle(words)
        asked.append({"prompt": f"which city is named here : {' '.join(words)}", "completion": city})
    assert not screen_answers(Dataset.from_list(asked)).triggers
    # The same with another answer than its name is a trigger.
    odd = [{**row, "completion": "nowhere at all"} if row["completion"] == "city7" else row for row in asked]
    [trigger] = screen_answers(Dataset.from_list(odd)).triggers
    assert trigger.words == ("city7",)


def test_long_texts_are_mined_in_part(monkeypatch):
    monkeypatch.setattr("p2p_trainer.mining.screening._MINED_WORDS", 3000)
    rows = Dataset.from_list(
        [
            {"prompt": " ".join(f"w{number}" for number in range(row, row + 50)), "completion": "x"}
            for row in range(200)
        ]
    )
    mined, words = sample_words(rows, "prompt", 0)
    # Each has a mark at either end.
    assert len(mined) == 3000 // 52 and all(len(of_row) == 52 for of_row in words) and list(mined) == sorted(mined)
    assert list(sample_words(rows.select(range(40)), "prompt", 0)[0]) == list(range(40))
