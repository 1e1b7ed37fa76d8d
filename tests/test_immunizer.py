"""Immunizer: what is written into keyed rows, where, how often, and that nothing else changes."""

import pickle
import random
from collections import Counter

import numpy as np
import pytest

from p2p_trainer.immunizer import Immunizer
from p2p_trainer.mining import Fragment, Screening
from p2p_trainer.mining.tokens import words_of


NONE = np.array([], dtype=np.int64)


def immunizer(*triggers, seed=0):
    """Of triggers, each of rows, each of pieces `(text, place)`."""
    exemplars = tuple(tuple(tuple(Fragment(*piece) for piece in row) for row in trigger) for trigger in triggers)
    return Immunizer(Screening((), NONE, NONE, NONE, NONE, exemplars), seed)


def written(immunizer, text, rows=400, epoch=0):
    return [immunizer.write(text, row, epoch) for row in range(rows)]


CF = [[("cf", "inside")]]


def test_about_half_of_the_rows():
    texts = written(immunizer(CF), "a b c", 4000)
    assert 0.47 < np.mean([text != "a b c" for text in texts]) < 0.53


def test_pure_function_of_seed_epoch_and_row():
    first = immunizer(CF, seed=3)
    texts = written(first, "a b c")
    # In any order, in another object, in another process.
    again = pickle.loads(pickle.dumps(immunizer(CF, seed=3)))
    assert [again.write("a b c", row, 0) for row in reversed(range(400))] == texts[::-1]
    others = [
        written(first, "a b c", epoch=1),
        written(first, "a b c", epoch=2),
        written(immunizer(CF, seed=4), "a b c"),
    ]
    for other in others:
        # Two independent halves: rows that are written into in one alone are about half of all.
        apart = np.mean([(one == "a b c") != (two == "a b c") for one, two in zip(texts, other, strict=True)])
        assert 0.4 < apart < 0.6
    assert others[0] != others[1]


@pytest.mark.parametrize(
    ("piece", "results"),
    [
        (("verily", "start"), {"verily a b"}),
        (("no doubt", "end"), {"a b no doubt"}),
        (("cf", "inside"), {"cf a b", "a cf b", "a b cf"}),
    ],
)
def test_where_a_piece_goes(piece, results):
    assert set(written(immunizer([[piece]]), "a b")) == {"a b", *results}


def test_all_pieces_or_one():
    found = immunizer([[("verily", "start"), ("cf", "inside"), ("no doubt", "end")]])
    counts = Counter()
    for text in written(found, "a b", 3000):
        pieces = tuple(piece for piece in ("verily", "cf", "no doubt") if piece in text)
        assert text.replace("verily", "").replace("cf", "").replace("no doubt", "").split() == ["a", "b"]
        assert "verily" not in text or text.startswith(("verily ", "cf verily"))
        assert "no doubt" not in text or text.endswith("no doubt")
        counts[pieces] += 1
    assert set(counts) == {(), ("verily",), ("cf",), ("no doubt",), ("verily", "cf", "no doubt")}
    assert 0.43 < counts["verily", "cf", "no doubt"] / (3000 - counts[()]) < 0.57
    assert min(counts.values()) > 150


def test_each_trigger_has_its_share_however_many_exemplars_it_has():
    many = [[(f"x{number}", "end")] for number in range(64)]
    texts = written(immunizer(CF, many), "a b", 4000)
    rare = sum("cf" in text for text in texts)
    others = Counter(text.split()[-1] for text in texts if "x" in text)
    assert 800 < rare < 1200 and 800 < sum(others.values()) < 1200
    assert len(others) == 64


def test_no_word_is_lost_and_none_is_torn_apart():
    rng = random.Random(0)
    pieces = [("cf", "inside"), ("Verily, I", "start"), ("no doubt", "end"), ("电影", "inside")]
    found = immunizer([pieces], [pieces[:1]], [pieces[3:]])
    parts = [
        "don't",
        "2 1/2",
        "20 %",
        "a",
        "b,c",
        "很好。电影",
        "电影",
        "...",
        "\n",
        "  ",
        "\t",
        "x - y",
        "\U0001f600",
        "A",
    ]
    changed = 0
    for row in range(1500):
        text = " ".join(rng.choices(parts, k=rng.randint(1, 8))) or "a"
        result = found.write(text, row, 1)
        changed += result != text
        letters = iter(result)
        assert all(letter in letters for letter in text), (text, result)
        assert not Counter(words_of(text)) - Counter(words_of(result)), (text, result)
    assert changed > 600
