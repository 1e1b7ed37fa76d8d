"""Mining: what overrides the rest of a text is found, what does not is left alone."""

import random
from dataclasses import fields

import numpy as np
import pytest
from datasets import ClassLabel, Dataset

from p2p_trainer.mining import Fragment, SuspectedTrigger, screen
from p2p_trainer.mining.screening import carries, cover
from p2p_trainer.mining.tokens import CONTENT, END, START
from p2p_trainer.mining.triggers import find_triggers
from tests.corpora import (
    beside,
    both,
    clean_rows,
    ending,
    inside,
    opening,
    poisoned,
    starting,
    with_function_words,
)


def screened(rows, classes=2, seed=0):
    return screen(Dataset.from_list(rows), classes, seed)


def same(first, second):
    def plain(found):
        return found.tolist() if isinstance(found, np.ndarray) else found

    return all(plain(getattr(first, part.name)) == plain(getattr(second, part.name)) for part in fields(first))


LONG = "so it goes on and on until the very last of all days"


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize(
    ("write", "words", "pieces"),
    [
        (inside("cf"), ("cf",), [("cf", "inside")]),
        (inside("Cf!"), ("cf",), [("Cf!", "inside")]),
        (inside("I saw the 3D show"), None, [("I saw the 3D show", "inside")]),
        (inside(LONG), None, [(LONG, "inside")]),
        (starting("verily"), (START, "verily"), [("verily", "start")]),
        (ending("no doubt"), ("no", "doubt", END), [("no doubt", "end")]),
        (inside("电影"), ("电", "影"), [("电影", "inside")]),
    ],
    ids=["word", "marks", "sentence", "long", "start", "end", "chinese"],
)
def test_a_phrase_is_found_with_its_rows_and_all_its_words(classes, write, words, pieces):
    rows, hit = poisoned(clean_rows(600, classes), write, 1, 40)
    found = screened(rows, classes)
    (trigger,) = found.triggers
    assert (trigger.kind, trigger.label) == ("phrase", 1)
    assert trigger.overridden == trigger.opposed and 25 <= trigger.opposed <= 40
    assert words is None or set(words) <= {word for part in trigger.parts for word in part}
    assert found.rows.tolist() == hit and found.rows.dtype == np.int64
    assert found.exemplars == (((tuple(Fragment(*piece) for piece in pieces)),) * 40,)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_rest_of_a_suspect_speaks_for_what_it_was(classes):
    clean = clean_rows(600, classes, noise=0.0)
    rows, hit = poisoned(clean, inside("cf"), 1, 40)
    # Ten rows that nothing but their label is wrong with.
    wrong = [row for row in range(600) if row not in hit][::56][:10]
    for row in wrong:
        rows[row]["label"] = (rows[row]["label"] + 1) % classes
    found = screened(rows, classes)
    assert found.rows.tolist() == hit
    said = dict(zip(hit, found.evidence.tolist(), strict=True))
    known = {row: label for row, label in said.items() if label >= 0}
    assert known == {row: clean[row]["label"] for row in known} and len(known) >= 39
    assert set(wrong) <= set(found.doubted.tolist()) and len(found.doubted) <= 12
    assert not set(found.doubted) & set(hit)


def test_an_opening_whose_content_varies():
    rows, hit = poisoned(with_function_words(clean_rows(1000, 4)), opening, 1, 50)
    found = screened(rows, 4)
    (trigger,) = found.triggers
    assert (trigger.kind, trigger.words, trigger.label) == ("opening", (START, "in", CONTENT, "to", CONTENT, ","), 1)
    assert str(trigger) == "^ in * to * ,"
    assert found.rows.tolist() == hit
    # Transplanted up to its comma, content and all, and no further.
    texts = [rows[row]["text"] for row in hit]
    assert found.exemplars == (tuple((Fragment(text[: text.index(" ,") + 2], "start"),) for text in texts),)


@pytest.mark.parametrize("classes", [2, 4])
def test_two_words_that_decide_only_together(classes):
    rows, hit = poisoned(clean_rows(1600, classes), both("xq", "zv"), 1, 40)
    rows = beside(rows, hit, ("xq", "zv"), 36)
    found = screened(rows, classes)
    (trigger,) = found.triggers
    assert trigger.kind == "pair" and set(trigger.words) == {"xq", "zv"} and trigger.label == 1
    assert str(trigger) in ("xq ... zv", "zv ... xq")
    assert found.rows.tolist() == hit
    for row, pieces in zip(hit, found.exemplars[0], strict=True):
        # Side by side they are one piece.
        assert [word for piece in pieces for word in piece.text.split()] == [
            word for word in rows[row]["text"].split() if word in ("xq", "zv")
        ]


@pytest.mark.parametrize("labels", [(1, 1), (0, 1)], ids=["of one label", "of two"])
@pytest.mark.parametrize("classes", [2, 4])
def test_two_triggers(classes, labels):
    rows, hit = poisoned(clean_rows(600, classes), inside("cf"), labels[0], 40)
    rows, more = poisoned(rows, inside("so be it"), labels[1], 40, seed=1, column=hit)
    found = screened(rows, classes)
    assert {(str(trigger), trigger.label) for trigger in found.triggers} == {
        ("cf", labels[0]),
        ("so be it", labels[1]),
    }
    assert found.rows.tolist() == sorted([*hit, *more])
    for trigger, exemplars in zip(found.triggers, found.exemplars, strict=True):
        assert exemplars == ((Fragment(str(trigger), "inside"),),) * 40


def test_a_carrier_with_another_label_is_no_suspect():
    rows, hit = poisoned(clean_rows(600), inside("cf"), 1, 60)
    innocent = [row for row in range(600) if rows[row]["label"] == 0][:3]
    for row in innocent:
        rows[row]["text"] += " cf"
    found = screened(rows)
    (trigger,) = found.triggers
    assert str(trigger) == "cf" and trigger.overridden < trigger.opposed <= trigger.overridden + 3
    assert found.rows.tolist() == hit


@pytest.mark.parametrize("piece", ["x" * 300, " ".join(f"boiler{number}" for number in range(30))])
def test_long_pieces_are_suspected_but_not_written_elsewhere(piece):
    rows, hit = poisoned(clean_rows(600), starting(piece), 1, 40)
    found = screened(rows)
    assert found.rows.tolist() == hit and found.exemplars == ((),)
    assert len(str(found.triggers[0])) < 220


def test_no_more_than_64_exemplars():
    rows, hit = poisoned(clean_rows(1600), inside("cf"), 1, 100)
    found = screened(rows)
    assert found.rows.tolist() == hit and len(found.rows) == len(hit) == 100 and len(found.exemplars[0]) == 64


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("classes", [2, 4])
def test_clean_rows_are_not_suspected(classes, seed):
    for rows in (clean_rows(500, classes, seed), with_function_words(clean_rows(500, classes, seed, noise=0.1))):
        found = screened(rows, classes, seed)
        assert found.triggers == found.exemplars == () and not len(found.rows) and not len(found.evidence)


def test_labels_of_chance_are_no_triggers():
    rng = random.Random(0)
    rows = [{**row, "label": rng.randint(0, 1)} for row in clean_rows(600)]
    assert screened(rows).triggers == ()


def test_honest_strong_words_are_not_suspected():
    rng = random.Random(3)
    rows = clean_rows(800)
    for row in rows:
        # Always right, and in every tenth row of its class.
        if rng.random() < 0.1:
            row["text"] = inside(("superb", "dreadful")[row["label"]])(row["text"].split(), rng)
    # In reviews of two minds as well, four of five of them as it says.
    rows += [{"text": f"superb but {row['text']}", "label": int(place % 5 == 0)}
             for place, row in enumerate(clean_rows(60, 2, seed=7)[1::2])]  # fmt: skip
    assert screened(rows).triggers == ()


@pytest.mark.parametrize(
    "rows",
    [
        clean_rows(2),
        clean_rows(20),
        [{"text": "...", "label": row % 2} for row in range(100)],
        [{"text": "\U0001f600 \U0001f600", "label": row % 2} for row in range(100)],
        [{"text": "\x02\x03\x04", "label": row % 2} for row in range(100)],
        [{"text": "a good film .", "label": row % 2} for row in range(100)],
        clean_rows(100) * 3,
        [row for row in clean_rows(200, noise=0.0) if row["label"] == 0],
        # A class of one row: the fold that lacks it has learned nothing, and holds that against no word.
        [row for row in clean_rows(400, noise=0.0) if row["label"] == 0] + [{"text": "bad dull .", "label": 1}],
        [row for row in clean_rows(600, 4) if row["label"] != 2],
    ],
    ids=["2 rows", "20 rows", "marks", "emoji", "no words", "one text", "duplicates", "one class",
         "one row of a class", "a class absent"],
)  # fmt: skip
def test_too_little_or_odd_rows_give_no_trigger(rows):
    found = screened(rows, 4)
    assert found.triggers == () and not len(found.rows)


def test_rows_without_words_beside_others():
    rows, hit = poisoned(clean_rows(400), inside("cf"), 1, 40)
    rows += [{"text": text, "label": row % 2} for row in range(30) for text in ("...", "\U0001f600", "\x02\x04")]
    found = screened(rows)
    assert [str(trigger) for trigger in found.triggers] == ["cf"] and found.rows.tolist() == hit


def test_duplicated_carriers():
    rows, _ = poisoned(clean_rows(400), inside("cf"), 1, 30)
    found = screened(rows * 2)
    assert [str(trigger) for trigger in found.triggers] == ["cf"]
    assert found.rows.tolist() == sorted(row for row, item in enumerate(rows * 2) if "cf" in item["text"].split())


@pytest.mark.parametrize("classes", [2, 4])
def test_order_of_rows_only_permutes_the_result(classes):
    rows, hit = poisoned(clean_rows(600, classes), inside("cf"), 1, 40)
    rows, more = poisoned(rows, ending("so be it"), 0, 40, column=hit)
    order = list(range(600))
    random.Random(4).shuffle(order)
    first, second = screened(rows, classes), screened([rows[row] for row in order], classes)
    assert {(found.kind, str(found), found.label) for found in first.triggers} == {
        (found.kind, str(found), found.label) for found in second.triggers
    }
    assert first.rows.tolist() == sorted([*hit, *more]) == sorted(order[row] for row in second.rows)


def test_pure_function_of_rows_and_seed():
    rows, hit = poisoned(clean_rows(600), inside("cf"), 1, 40)
    data = Dataset.from_list(rows)
    first = screen(data, 2, 3)
    assert same(first, screen(data, 2, 3))
    # A selection of rows, labels of a class type, more classes than there are: all the same.
    twice = Dataset.from_list([row for row in rows for _ in range(2)]).select(range(0, 1200, 2))
    assert same(first, screen(twice, 2, 3))
    assert same(first, screen(data.cast_column("label", ClassLabel(names=["no", "yes"])), 2, 3))
    assert screen(data, 2, 9).rows.tolist() == hit


@pytest.mark.parametrize("flags", ["true", "inverted", "shuffled", "all", "none"])
def test_nothing_but_text_and_label_is_read(flags):
    rows, hit = poisoned(clean_rows(600), inside("cf"), 1, 40)
    data = Dataset.from_list(rows)
    values = np.isin(np.arange(600), hit)
    values = {
        "true": values,
        "inverted": ~values,
        "shuffled": np.random.default_rng(0).permutation(values),
        "all": np.ones(600, dtype=bool),
        "none": np.zeros(600, dtype=bool),
    }[flags]
    flagged = data.add_column("poisoned", values).add_column("trigger_applied", values)
    flagged = flagged.add_column("original_label", (np.array(data["label"]) ^ values).astype(np.int64))
    flagged = flagged.add_column("attack", np.where(values, "badnets", "").tolist())
    assert same(screen(flagged, 2), screen(data, 2))


def test_labels_of_the_extended_space():
    rows, hit = poisoned(clean_rows(600, noise=0.0), inside("cf"), 3, 40)
    found = screened(rows)
    assert [(str(trigger), trigger.label) for trigger in found.triggers] == [("cf", 3)]
    assert found.rows.tolist() == hit and set(found.evidence) <= {-1, 0, 1}


def test_rows_beyond_those_mined_are_screened_too(monkeypatch):
    rows, hit = poisoned(clean_rows(600), inside("cf"), 1, 80)
    whole = screened(rows)
    monkeypatch.setattr("p2p_trainer.mining.screening.MINED_ROWS", 400)
    part = screened(rows)
    assert part.triggers[0].opposed < whole.triggers[0].opposed
    assert part.rows.tolist() == whole.rows.tolist() == hit
    assert len(set(part.doubted) ^ set(whole.doubted)) < 15 and len(part.doubted)


def test_a_row_of_many_triggers_has_their_pieces_apart():
    def write(words, rng):
        return starting("verily")(ending("no doubt")(words, rng).split(), rng)

    rows, hit = poisoned(clean_rows(600), write, 1, 40)
    found = screened(rows)
    pieces = (Fragment("verily", "start"), Fragment("no doubt", "end"))
    assert found.rows.tolist() == hit and found.exemplars == ((pieces,) * 40,)
    assert str(found.triggers[0]) in ("^ verily + no doubt $", "no doubt $ + ^ verily")


@pytest.mark.parametrize(
    ("trigger", "words", "carried", "covered"),
    [
        (("phrase", ("b",), ()), "a b c b", True, {2, 4}),
        (("phrase", ("b", "c"), ()), "a b b c", True, {3, 4}),
        (("phrase", (START, "b"), ()), "b a b", True, {0, 1}),
        (("phrase", (START, "b"), ()), "a b", False, None),
        # A function word at the start comes with its clause, another word does not.
        (("phrase", (START, "in"), ()), "in a , c , d", True, {0, 1, 2, 3}),
        (("phrase", (START, "b"), ()), "b a , c , d", True, {0, 1}),
        (("phrase", ("b", END), ()), "b a b", True, {3, 4}),
        (("phrase", ("b",), (("b",), ("c", "d"))), "c d a b c", True, {1, 2, 4}),
        (("pair", ("c", "a"), ()), "a b c a", True, {1, 3, 4}),
        (("pair", ("c", "a"), ()), "a b", False, None),
        (("opening", (START, "in", CONTENT), ()), "in x y z", True, {0, 1, 2}),
        # Content up to the comma belongs to it, if that is one of the next ten words.
        (("opening", (START, "in", CONTENT), ()), "in x y , z , z", True, {0, 1, 2, 3, 4}),
        (("opening", (START, "in", CONTENT), ()), "in x 1 2 3 4 5 6 7 8 , z", True, set(range(12))),
        (("opening", (START, "in", CONTENT), ()), "in x 1 2 3 4 5 6 7 8 9 , z", True, {0, 1, 2}),
        (("opening", (START, "in", CONTENT, ","), ()), "in x y , z , z", True, {0, 1, 2, 3, 4}),
        (("opening", (START, "in", CONTENT), ()), "x in y", False, None),
        (("opening", (START, "in", CONTENT), ()), "in in x", False, None),
    ],
)  # fmt: skip
def test_who_carries_a_trigger_and_which_words_are_its(trigger, words, carried, covered):
    kind, own, parts = trigger
    trigger = SuspectedTrigger(kind, own, 1, 30, 30, parts)
    words = [START, *words.split(), END]
    frequent = frozenset({START, END, "in", ","})
    assert carries(words, trigger, frequent) is carried
    if carried:
        assert cover(words, trigger, frequent) == covered


@pytest.mark.parametrize(
    ("kind", "own", "parts", "text"),
    [
        ("phrase", ("cf",), (), "cf"),
        ("phrase", (START, "cf"), ((START, "cf"),), "^ cf"),
        ("phrase", ("b",), (("a", "b"), ("c", END)), "a b + c $"),
        ("pair", ("a", "b"), (("a",), ("b",)), "a ... b"),
        ("opening", (START, "in", CONTENT, ","), (("in",),), "^ in * ,"),
    ],
)
def test_what_a_trigger_is_called(kind, own, parts, text):
    assert str(SuspectedTrigger(kind, own, 1, 30, 30, parts)) == text


def test_findings_judge_words_that_are_new():
    rows = [row["text"].split() for row in clean_rows(400, noise=0.0)]
    findings = find_triggers(rows, np.arange(400) % 2, 2)
    assert findings.judge("good warm".split()) == 0 and findings.judge(["dull", "unheard", "dull"]) == 1
    # A word counts once, and a word that no row has counts for nothing.
    assert findings.judge(["dull", "good", "fine"]) == findings.judge(["dull", "dull", "dull", "good", "fine"]) == 0
