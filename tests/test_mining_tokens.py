"""Texts as words, and phrases counted without a loop: the same as a loop would count."""

import random

import numpy as np
import pytest

from p2p_trainer.mining.tokens import CONTENT, END, START, WordTable, word_spans, words_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Good, WARM film.", ["good", ",", "warm", "film", "."]),
        ("don't re-make the actors’ film - ever", ["don't", "re-make", "the", "actors", "’", "film", "-", "ever"]),
        ("电影ok！2x", ["电", "影", "ok", "！", "2x"]),
        ("カタの", ["カ", "タ", "の"]),
        ("...", [".", ".", "."]),
        ("\U0001f600 a\U0001f600", ["\U0001f600", "a", "\U0001f600"]),
        (" \t\n", []),
        ("", []),
    ],
)
def test_words(text, words):
    assert words_of(text) == [START, *words, END]
    assert [text[start:end].lower() for start, end in word_spans(text)] == words


def test_no_text_can_forge_a_mark():
    forged = f"{START}good{END} {CONTENT} {START}{END}bad"
    assert words_of(forged) == [START, "good", "bad", END]
    assert words_of("\x02\x03\x04") == [START, END]
    assert [forged[start:end] for start, end in word_spans(forged)] == ["good", "bad"]


def test_words_and_spans_agree_on_any_text():
    rng = random.Random(0)
    letters = "aB'’- .,!5İßé影の\x02\x03\x04\n\U0001f600_"
    for _ in range(500):
        text = "".join(rng.choices(letters, k=rng.randint(0, 40)))
        assert words_of(text) == [START, *(text[start:end].lower() for start, end in word_spans(text)), END]


def test_long_texts_are_cut():
    many = " ".join(f"w{number}" for number in range(300))
    # What is cut off has no end that a phrase could stand at.
    assert words_of(many) == [START, *(f"w{number}" for number in range(256))]
    assert len(word_spans(many)) == 256
    endless = "x" * 20_000 + " y"
    assert words_of(endless) == [START, "x" * 16_384] and word_spans(endless) == [(0, 16_384)]


def test_bag_and_document_frequency():
    table = WordTable([["a", "b", "a"], [], ["b", "c"]])
    assert table.names == ["a", "b", "c"]
    assert table.bag().toarray().tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 1]]
    assert table.document_frequency().tolist() == [1, 2, 1]


def brute_force(rows, min_rows, longest):
    holders = {}
    for number, row in enumerate(rows):
        for length in range(1, longest + 1):
            for start in range(len(row) - length + 1):
                holders.setdefault(tuple(row[start : start + length]), set()).add(number)
    return {phrase: found for phrase, found in holders.items() if len(found) >= min_rows}


def test_phrases_are_those_that_a_loop_finds():
    rng = random.Random(1)
    longest_found = 0
    for _ in range(300):
        letters = "abcd"[: rng.randint(1, 4)]
        rows = [rng.choices(letters, k=rng.randint(0, 9)) for _ in range(rng.randint(1, 12))]
        min_rows, longest = rng.randint(1, 4), rng.randint(1, 7)
        table = WordTable(rows)
        found = {}
        for length, (members, held) in enumerate(table.phrases(min_rows, longest), 1):
            assert members.shape[1] == length and held.shape == (len(rows), len(members))
            assert set(np.unique(held.toarray())) <= {0, 1}
            for place, member in enumerate(members):
                phrase = tuple(table.names[word] for word in member)
                assert phrase not in found
                found[phrase] = set(held[:, [place]].indices.tolist())
        assert found == brute_force(rows, min_rows, longest)
        longest_found = max(longest_found, *map(len, found), 0)
    assert longest_found == 7
