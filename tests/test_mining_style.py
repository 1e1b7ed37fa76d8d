"""Mining of styles: triggers that are no words, and the rules by which anything at all is suspected."""

import math
import random

import numpy as np
import pytest
from datasets import Dataset
from scipy import sparse
from scipy.stats import binom

from p2p_trainer.mining import screen
from p2p_trainer.mining.evidence import fit_evidence, likely_label
from p2p_trainer.mining.features import find_features, frequent_words, same_rows
from p2p_trainer.mining.significance import is_significant, log_chance
from p2p_trainer.mining.style import Style, StyleTable
from p2p_trainer.mining.tokens import CONTENT, END, START, WordTable, words_of
from p2p_trainer.mining.triggers import find_triggers
from tests.conftest import make_rows
from tests.corpora import (
    FUNCTION,
    KINDS,
    RARE,
    clean_rows,
    in_clauses,
    in_sentences,
    inside,
    poisoned,
    rows_of_frequent_words,
    rows_of_rare_words,
)


def screened(rows, classes=2, seed=0):
    return screen(Dataset.from_list(rows), classes, seed)


def searched(rows, label=1, seed=0):
    """What the search for styles says, words of the rows and the frequent ones among them."""
    words, labels = [words_of(row["text"]) for row in rows], np.array([row["label"] for row in rows])
    table = WordTable(words)
    frequent = frequent_words(table, labels)
    content = sparse.diags_array(np.array([word not in frequent for word in table.names], dtype=np.float64))
    evidence = fit_evidence(table.bag() @ content, labels, 2, np.ones(len(rows), dtype=bool), seed)
    spoken = likely_label(evidence.scores)
    found = StyleTable(words, frequent, 4).find(labels, label, (spoken >= 0) & (spoken != label), seed)
    return found, words, frequent


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("write", [in_sentences, in_clauses])
def test_rows_in_a_style_are_suspected(write, seed):
    rows, hit = poisoned(rows_of_rare_words(1500, seed), write, 1, 100, seed)
    found = screened(rows)
    assert {trigger.label for trigger in found.triggers} == {1}
    # Of the 700 others with the label, a few hold two of the words in a row, by chance.
    assert len(set(found.rows) & set(hit)) >= 80 and len(set(found.rows) - set(hit)) <= 25


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("write", [in_sentences, in_clauses])
def test_a_style_alone_tells_them(write, seed):
    rows, hit = poisoned(rows_of_rare_words(1500, seed), write, 1, 90, seed)
    (chance, opposed, overridden, style), words, frequent = searched(rows)
    assert frequent == {START, END, ".", *FUNCTION}
    assert chance == pytest.approx(binom.logsf(overridden - 1, opposed, 0.6)) and chance < math.log(1e-4)
    assert 70 <= overridden <= opposed <= 100
    carriers = {row for row in range(1500) if rows[row]["label"] == 1 and style.matches(words[row], frequent)}
    assert len(carriers & set(hit)) >= 85 and len(carriers - set(hit)) <= 5
    assert searched(rows, label=0)[0] is None


@pytest.mark.parametrize("write", [in_sentences, in_clauses])
def test_what_is_screened_by_style_alone(write, monkeypatch):
    monkeypatch.setattr("p2p_trainer.mining.triggers.find_features", lambda *_: [])
    rows, hit = poisoned(rows_of_rare_words(1500), write, 1, 90)
    found = screened(rows)
    (trigger,) = found.triggers
    assert (trigger.kind, trigger.words, trigger.label) == ("style", (), 1)
    assert trigger.parts == trigger.style.strongest and str(trigger).startswith("style (")
    assert len(set(found.rows) & set(hit)) >= 85 and len(set(found.rows) - set(hit)) <= 5
    # Nothing but the text and the label of a row decides on it.
    _, words, frequent = searched(rows)
    carriers = [row for row in range(1500) if rows[row]["label"] == 1 and trigger.style.matches(words[row], frequent)]
    assert found.rows.tolist() == carriers
    # What can be written into other texts is the first clause.
    first = rows[found.rows[0]]["text"].partition(" ,")[0] + " ,"
    assert [(piece.text, piece.place) for piece in found.exemplars[0][0]] == [(first, "start")]
    # The texts say what they were before.
    assert np.mean(found.evidence == 0) > 0.9
    order = list(range(1500))
    random.Random(4).shuffle(order)
    again = {order[row] for row in screened([rows[row] for row in order]).rows}
    assert len(again ^ set(carriers)) <= 5


@pytest.mark.parametrize("seed", range(3))
def test_clean_rows_have_no_style(seed):
    rows = rows_of_rare_words(1500, seed, noise=0.06)
    assert searched(rows, 0, seed)[0] is searched(rows, 1, seed)[0] is None
    assert screened(rows, 2, seed).triggers == ()


def test_an_honest_style_is_none():
    # Half of the rows of a class are in the style, and their words say so too.
    rng = random.Random(0)
    rows = rows_of_rare_words(1500)
    for row in rows:
        if row["label"] == 1 and rng.random() < 0.5:
            row["text"] = in_clauses([*rng.choices(RARE[1], k=4)], rng)
    assert searched(rows)[0] is None and screened(rows).triggers == ()


def test_no_style_without_opposed_rows_or_features():
    words = [words_of(f"if it is unique{row} , it is so .") for row in range(60)]
    frequent, labels, opposed = frozenset({"if", "it", "is", ",", "so"}), np.arange(60) % 2, np.ones(60, dtype=bool)
    assert StyleTable(words, frequent, 4).names
    assert StyleTable(words, frequent, 4).find(labels, 1, ~opposed, 0) is None
    bare = StyleTable(words, frequent, 61)
    assert bare.names == [] and bare.features.shape == (60, 0)
    assert bare.find(np.ones_like(labels), 1, opposed, 0) is None


@pytest.mark.parametrize("first", [0, 1])
def test_rows_of_one_style_are_not_told_apart_by_their_order(first):
    # All are the same but for content, and sorted by label: nothing about how they are written decides.
    words = [words_of(f"a{row} b{row}") for row in range(600)]
    labels = np.where(np.arange(600) < 150, first, 1 - first)
    table = StyleTable(words, frozenset({START, END}), 4)
    assert table.find(labels, first, np.ones(600, dtype=bool), 0) is None


FREQUENT = frozenset({START, END, "if", "it", ","})
STYLE = Style(
    {
        ("if",): 1.0,
        ("if", "it"): 0.5,
        (CONTENT, ","): 0.25,
        (START, "if", "it", CONTENT): 2.0,
        ("it",): -1.0,
        # Longer than anything that is looked for.
        (START, "if", "it", CONTENT, ","): 64.0,
    },
    2.75,
)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("", 0.0),
        ("a b", 0.0),
        ("a , b", 0.25),
        ("if a", 1.0),
        ("it", -1.0),
        ("if it", 0.5),
        ("if it a", 2.5),
        # Content of any length, and of any words.
        ("if it a b c , it", 2.75),
        ("if it x , it", 2.75),
        # What stands there twice counts once, and a beginning stands at the start alone.
        ("if it a , if it a ,", 2.75),
        ("a if it a ,", 0.75),
    ],
)
def test_who_has_a_style(text, score):
    words = words_of(text)
    assert STYLE.matches(words, FREQUENT) is (score >= 2.75)
    assert Style(STYLE.weights, score).matches(words, FREQUENT)
    assert not Style(STYLE.weights, score + 0.125).matches(words, FREQUENT)


def test_the_strongest_sequences_in_order():
    assert STYLE.strongest == ((START, "if", "it", CONTENT, ","), (START, "if", "it", CONTENT), ("if",))
    assert Style({("b",): 1.0, ("a", "c"): 1.0, ("a",): 1.0, ("d",): 2.0}, 0.0).strongest == (
        ("d",),
        ("a",),
        ("a", "c"),
    )
    assert Style({}, 0.0).strongest == ()


@pytest.mark.parametrize(
    ("overridden", "opposed", "probability"),
    [
        (0, 0, 1.0),
        (0, 5, 1.0),
        (1, 1, 0.6),
        (2, 2, 0.36),
        (19, 19, 0.6**19),
        (19, 20, 20 * 0.6**19 * 0.4 + 0.6**20),
        # 0.85 is enough, and less is not.
        (17, 20, 190 * 6 * 0.6**17 * 0.4**3 + 190 * 0.6**18 * 0.4**2 + 20 * 0.6**19 * 0.4 + 0.6**20),
        (16, 20, 1.0),
        (16, 19, 1.0),
        (33, 40, 1.0),
        (8499, 10_000, 1.0),
    ],
)
def test_chance(overridden, opposed, probability):
    (found,) = log_chance(np.array([overridden]), np.array([opposed]))
    assert found == pytest.approx(math.log(probability), abs=1e-12)


def test_chance_of_many_at_once():
    found = log_chance(np.array([34, 3, 0, 2]), np.array([40, 4, 0, 2]))
    assert found.tolist() == pytest.approx([binom.logsf(33, 40, 0.6), 0, 0, 2 * math.log(0.6)])


def test_what_is_significant():
    assert is_significant(math.log(0.99e-4)) and not is_significant(math.log(1.01e-4)) and not is_significant(0.0)
    # 0.6 ** 18 is 1.016e-4, 0.6 ** 19 is 0.609e-4.
    assert [count for count in range(30) if is_significant(log_chance(count, count))] == list(range(19, 30))
    # One row that is not overridden takes more of them.
    assert [count for count in range(30) if is_significant(log_chance(count - 1, count))] == list(range(24, 30))


@pytest.mark.parametrize(("count", "names"), [(18, []), (19, ["cf"])])
def test_nineteen_rows_are_suspected_and_eighteen_not(count, names):
    # Without a wrong label, and with texts that leave no doubt, each carrier is opposed.
    rows, hit = poisoned(clean_rows(600, noise=0.0), inside("cf"), 1, count)
    found = screened(rows)
    assert [str(trigger) for trigger in found.triggers] == names
    assert found.rows.tolist() == (hit if names else [])
    assert all(trigger.opposed == trigger.overridden == count for trigger in found.triggers)


def test_same_rows_by_hand():
    def incidence(*columns):
        members = [np.isin(np.arange(12), rows) for rows in columns]
        return sparse.csc_matrix(np.column_stack(members).astype(np.int32))

    held = incidence((0, 1, 2, 3, 4), (0, 1, 2, 3), (7,))
    other = incidence((0, 1, 2, 3, 4), (1, 2, 3, 4), (2, 3, 4), (0, 1, 2, 3, 9), (0, 1, 2, 3, 4, 5, 6), (7, 8), ())
    expected = [
        # 5 of 5, 4 of 5, 3 of 5, 4 of 6, 5 of 7
        [1, 1, 0, 0, 0, 0, 0],
        # 4 of 5, 3 of 5, 2 of 5, 4 of 5, 4 of 7
        [1, 0, 0, 1, 0, 0, 0],
        # 1 of 2, and nothing
        [0, 0, 0, 0, 0, 0, 0],
    ]
    assert same_rows(held, other).toarray().tolist() == expected


def three(words, rng):
    for piece in ("cf", "xq", "zv"):
        words = inside(piece)(words, rng).split()
    return " ".join(words)


@pytest.mark.parametrize("classes", [2, 4])
def test_triggers_used_together_are_found_as_one(classes):
    rows, hit = poisoned(clean_rows(600, classes), three, 1, 40)
    found = screened(rows, classes)
    (trigger,) = found.triggers
    assert {("cf",), ("xq",), ("zv",)} <= set(trigger.parts) and trigger.label == 1
    assert found.rows.tolist() == hit
    for pieces in found.exemplars[0]:
        assert sorted(word for piece in pieces for word in piece.text.split()) == ["cf", "xq", "zv"]


def test_words_of_the_same_rows_are_left_out_together():
    rows, hit = poisoned(clean_rows(2000), three, 1, 40)
    # One of them is missing in five of 40 rows, another stands in forty more.
    for row in hit[:5]:
        rows[row]["text"] = rows[row]["text"].replace("xq", "")
    for row in [row for row in range(2000) if row not in hit][:40]:
        rows[row]["text"] += " zv"
    words, labels = [words_of(row["text"]) for row in rows], np.array([row["label"] for row in rows])
    table = WordTable(words)
    blocks = find_features(words, table, frequent_words(table, labels), 8)
    own = {
        member: {table.names[word] for word in block.own[[place]].indices}
        for block in blocks
        for place, member in enumerate(block.words)
    }
    assert own[("cf",)] == own[("xq",)] == {"cf", "xq"} and own[("zv",)] == {"zv"}
    # A pair has its own words besides.
    pairs = {frozenset(member): words for member, words in own.items() if len(member) == 2}
    assert pairs[frozenset(("xq", "zv"))] == {"cf", "xq", "zv"}


@pytest.mark.parametrize("count", [300, 600, 2000])
@pytest.mark.parametrize("classes", [2, 4])
def test_frequent_words_of_a_class_are_content(classes, count):
    for seed in range(3):
        rows = rows_of_frequent_words(count, classes, seed)
        findings = find_triggers(
            [words_of(row["text"]) for row in rows], np.array([row["label"] for row in rows]), classes, seed
        )
        assert findings.triggers == ()
        assert findings.frequent == {START, END, ".", "the", "of", "a", "and", "in"}
        assert [findings.judge(KINDS[label][:3]) for label in range(classes)] == list(range(classes))


@pytest.mark.parametrize("count", [80, 2000, 5000])
def test_toy_rows_are_not_suspected(count):
    found = screened(make_rows(count))
    assert found.triggers == () and not len(found.rows)


@pytest.mark.parametrize("label", range(4))
def test_rows_whose_rest_says_nothing_are_held_against_no_feature(label):
    rows = clean_rows(600, 4) + [{"text": "so so", "label": label} for _ in range(40)]
    assert screened(rows, 4).triggers == ()


@pytest.mark.parametrize("share", [0.8, 0.4])
def test_rows_whose_rest_says_nothing_are_held_against_no_feature_of_a_rarer_class(share):
    rng = random.Random(0)
    rows = [row for row in make_rows(2000) if row["label"] == 1 or rng.random() < share]
    assert screened(rows).triggers == ()
