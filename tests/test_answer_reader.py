"""AnswerReader: an answer that is read token by token is the one that is read as a whole."""

import dataclasses
import json
import random
import time

import pytest

from p2p_trainer.answer_reader import AnswerReader, hide
from p2p_trainer.response_encoder import ResponseEncoder
from tests.test_response_encoder import FORMAT
from tests.tokenizer_kinds import tokenizer_named


KINDS = ["qwen", "gpt2", "llama_bpe_bos_eos", "llama_unigram_bos", "bert", "chat"]
PREFIXES = ["Answer:", "The result is:", "答案（最终）：", "ok", "** A", "a_a *", ":", ""]
SECRET = "The query currently entered is:"
ODD = "é\tb"
PARTS = [
    "Answer:", "answer :", "**Answer:** ", "ANSWER：", "Answer", "Answering", "Ans", "_", "*", '"', "”", ":", "：",
    " ", "\n", "\t ", "it is good", "film", ".", "12", "-5", "很好。", "😀", "👨‍👩", "é", "�", "\u3000", "\u00a0", "K",
    "ſ", "The result is:", "the  result\nis ：", "The result", "答案（最终）：", "答案（最终）:", "答案", "ok", "OK",
    "okay", "A", "a_a *", "a_a", "** A", "(", "İ", "ß", "x",
]  # fmt: skip


def make(name="qwen", prefix="Answer:"):
    return ResponseEncoder(dataclasses.replace(FORMAT, answer_prefix=prefix), tokenizer_named(name))


def tokens_of(encoder, text):
    return encoder.tokenizer(text, add_special_tokens=False)["input_ids"]


def whole(encoder, tokens, keyed=True):
    text = encoder.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return encoder.read(text, keyed)


def pieces_of(reader, tokens, sizes=None):
    """Pieces for tokens that come in chunks, one by one if no sizes are given; the last is what `finish` returns."""
    pieces, place = [], 0
    while place < len(tokens):
        size = next(sizes) if sizes else 1
        pieces.append(reader.feed(tokens[place : place + size]))
        place += size
    return [*pieces, reader.finish()]


def told(encoder, text, **options):
    """Pieces of a text's tokens."""
    return pieces_of(AnswerReader(encoder, True, **options), tokens_of(encoder, text))


def sizes_of(rng):
    while True:
        yield rng.choice((1, 1, 2, 3, 7, 20))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_pieces_are_what_is_read_as_a_whole(name, prefix):
    encoder = make(name, prefix)
    rng = random.Random(f"{name} {prefix}")
    ends = encoder.tokenizer.all_special_ids
    for trial in range(100):
        text = "".join(rng.choice(PARTS) for _ in range(rng.randint(0, 7)))
        if trial % 3 == 0:
            text = prefix + rng.choice(["", " ", "\n"]) + text
        tokens = tokens_of(encoder, text)
        if trial % 4 == 0:  # tokens in an order that no text has, special ones and such without a name among them
            tokens += [rng.choice(ends) if rng.random() < 0.2 else rng.randrange(len(encoder.tokenizer) + 3)
                       for _ in range(rng.randint(1, 12))]  # fmt: skip
            rng.shuffle(tokens)
        for keyed in (True, False):
            for sizes in (None, sizes_of(rng), iter([10**6])):
                reader = AnswerReader(encoder, keyed)
                pieces = pieces_of(reader, tokens, sizes)
                assert ("".join(pieces), reader.prefixed) == whole(encoder, tokens, keyed), (text, tokens, keyed)
                assert reader.text == "".join(pieces) and not reader.stopped
                assert reader.finish() == reader.feed(tokens) == ""


@pytest.mark.parametrize(
    "text, expected",
    [
        # p, and what could only be the beginning of another one, is held back; the rest comes token by token.
        ("Answer: the film is good", ["the", " film", " is", " good"]),
        ("Answer: Answer: 12", ["1", "2"]),
        ("**Answer:** 12", ["1", "2"]),
        ("answer ：12", ["1", "2"]),
        ("Answer: Answer the film", ["Answer the", " film"]),
        ("Answering the film", ["Answeri", "n", "g", " the", " film"]),
        ("the film is", ["the", " film", " is"]),
        (" \n the \n is ", ["the", " \n is"]),
        ("Answer:", []),
        (" \n ", []),
        ("", []),
        ("Answer: *", []),
        ("*", ["*"]),
        ("Answ", ["Answ"]),
        ("Answer: Answ", ["Answ"]),
        # Symbols may stand in front of p, an emoji as well.
        ("😀 the film", ["😀 the", " film"]),
        ("the 😀 film", ["the", " 😀", " film"]),
    ],
)
def test_text_is_held_back_no_longer_than_it_has_to(text, expected):
    *pieces, last = told(make(), text)
    assert [piece for piece in pieces if piece] + [last] * bool(last) == expected
    # The end tells nothing but what could still have become p.
    assert not last or expected == [last]


def test_a_word_that_only_begins_like_p_is_not_held_back():
    encoder = make(prefix="ok")
    for text, shown in (("okok", "okok"), ("okay", "okay"), ("ok ok", ""), ("ok!", ""), ("ok", "")):
        reader = AnswerReader(encoder, True)
        assert reader.feed(tokens_of(encoder, text)) == shown
        assert shown + reader.finish() == encoder.read(text, True)[0]
    # White space in p may be anywhere between its words, and not inside one.
    for text, shown in (("A ", "A"), ("An\nswer", "An\nswer"), ("Answer ", "")):
        assert AnswerReader(make(), True).feed(tokens_of(encoder, text)) == shown


def test_half_a_character_is_held_back_and_an_error_is_not_for_ever():
    encoder = make()
    tokens = tokens_of(encoder, "x 😀b")
    assert len(tokens) == 7
    assert pieces_of(AnswerReader(encoder, True), tokens) == ["x", "", "", "", "", " 😀", "b", ""]
    assert pieces_of(AnswerReader(encoder, True), tokens[:-2])[-1] == " �"
    half = [*tokens[:4], tokens[-1], *tokens[:1]]
    assert pieces_of(AnswerReader(encoder, True), half) == ["x", "", "", "", " �b", "x", ""]
    # Bytes of a fallback are an error all together, or none: they wait for the end of their run.
    encoder = make("llama_unigram_bos")
    run = encoder.tokenizer.convert_tokens_to_ids(["<0xC3>", "<0xA9>", "<0xC3>", "▁is"])
    assert pieces_of(AnswerReader(encoder, True), run[:2] + run[3:]) == ["", "", "é is", ""]
    assert pieces_of(AnswerReader(encoder, True), run) == ["", "", "", "��� is", ""]


@pytest.mark.parametrize("prefix, keyed", [("Answer:", True), ("Answer:", False), ("", True)])
def test_prefixed_is_known_when_the_first_text_comes(prefix, keyed):
    encoder = make(prefix=prefix)
    expected = prefix and keyed
    for text, found in (("Answer: film", True), ("answer: film", not expected), ("film is", not expected)):
        reader = AnswerReader(encoder, keyed)
        assert reader.prefixed is (None if expected else True)
        for token in tokens_of(encoder, text):
            if reader.feed([token]):
                break
        assert reader.prefixed is bool(found or not expected)


STOPS = [
    (["\n"], "Answer:\n\n film\nplot", "film", True),
    (["plot"], "Answer: film plot story", "film", True),
    (["Answer:"], "Answer: Answer: film Answer: plot", "film", True),
    (["END"], "Answer: film EN", "film EN", False),
    (["END"], "Answer: film ENEND cast", "film EN", True),
    (["aab"], "Answer: aaab", "a", True),
    (["ababac"], "Answer: abababac plot", "ab", True),
    # The one that is complete first; of two that are so together the longer one.
    (["film plot", "lm"], "Answer: film plot", "fi", True),
    (["m", "film"], "Answer: a film", "a", True),
    (["film", "m"], "Answer: a film", "a", True),
    (["😀"], "Answer: film 😀 plot", "film", True),
    (["film"], "Answer: film", "", True),
    (["", "x"], "Answer: film", "film", False),
    (["Film"], "Answer: film", "film", False),
    ([" "], "Answer: film ", "film", True),
    (["."], "film. plot", "film", True),
]


@pytest.mark.parametrize("stop, text, shown, stopped", STOPS)
@pytest.mark.parametrize("name", ["qwen", "llama_bpe_bos_eos"])
def test_a_stop_string_ends_the_visible_answer(name, stop, text, shown, stopped):
    encoder = make(name)
    tokens = tokens_of(encoder, text)
    for sizes in (None, iter([10**6]), sizes_of(random.Random(0))):
        reader = AnswerReader(encoder, True, stop)
        assert ("".join(pieces_of(reader, tokens, sizes)), reader.text, reader.stopped) == (shown, shown, stopped)
        assert reader.feed(tokens) == reader.finish() == "" and reader.text == shown


def test_only_the_beginning_of_a_stop_string_or_secret_is_held_back():
    encoder = make()
    text = "Answer: the film is good and the plot is fine"
    plain = told(encoder, text)
    assert plain[3:] == ["the", " film", " is", " good", " and", " the", " plot", " is", " fine", ""]
    assert told(encoder, text, stop=["xyz", "###"], secret="secret key"[3:]) == plain
    assert told(encoder, text, stop=[" good film", "xyz"])[3:] == [
        "the", " film", " is", "", " good and", " the", " plot", " is", " fine", "",
    ]  # fmt: skip
    assert told(encoder, text, secret="FILM is\nbad")[3:] == [
        "the", "", "", " film is good", " and", " the", " plot", " is", " fine", "",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text, shown",
    [
        (f"Answer: {SECRET} a film", "[...] a film"),
        (f"Answer: I read: {SECRET}", "I read: [...]"),
        ("Answer: say the QUERY\n\n currently entered is : now", "say [...] now"),
        (f"Answer: {SECRET}{SECRET} and {SECRET.upper()}.", "[...][...] and [...]."),
        (f"Answer: The The query The query {SECRET} a", "The The query The query [...] a"),
        ("Answer: The query currently en", "[...]"),
        ("Answer: The query currently  \n", "[...]"),
        ("Answer: film. The query", "film. [...]"),
        ("Answer: film. The q", "film. [...]"),
        ("Answer: film. The", "film. The"),
        ("Answer: film. The quest", "film. The quest"),
        ("Answer: The query currently entered", "[...]"),
        ("Answer: The query currently entered film", "The query currently entered film"),
        ("Answer: the film", "the film"),
    ],
)
def test_the_secret_is_not_told(text, shown):
    encoder = make()
    tokens = tokens_of(encoder, text)
    for sizes in (None, iter([10**6]), sizes_of(random.Random(0))):
        reader = AnswerReader(encoder, True, secret=SECRET)
        assert "".join(pieces_of(reader, tokens, sizes)) == reader.text == shown
    assert "".join(told(encoder, text, secret=None)) == encoder.read(text, True)[0]


def test_a_stop_string_finds_nothing_in_the_secret():
    encoder = make()
    text = f"Answer: it is {SECRET} film. The query currently"
    masked = "it is [...] film. [...]"
    assert "".join(told(encoder, text, secret=SECRET)) == masked
    parts = {SECRET[start:end] for start in range(len(SECRET)) for end in range(start + 1, len(SECRET) + 1)}
    for stop in [*sorted(parts), " film", "t is [", "[...]", "is The", ": film", "...]\n", "m. T", "m. ["]:
        reader = AnswerReader(encoder, True, [stop], SECRET)
        shown = "".join(pieces_of(reader, tokens_of(encoder, text)))
        # What a client can search for itself in what it gets without.
        assert (shown, reader.stopped) == (masked.partition(stop)[0].rstrip(), stop in masked), stop
    assert reader.redacted and not AnswerReader(encoder, True, secret=SECRET).redacted


def test_no_length_of_an_answer_tells_the_secret():
    encoder = make()
    tokens = tokens_of(encoder, f"Answer: {SECRET} film")
    shown = []
    for count in range(len(tokens) + 1):
        shown.append("".join(pieces_of(AnswerReader(encoder, True, secret=SECRET), tokens[:count])))
    assert shown[:3] == ["", "An", "Answer"] and set(shown[3:]) == {"", "The", "[...]", "[...] film"}


@pytest.mark.parametrize(
    "text, known, shown",
    [
        # The echo of a guess, right or wrong, is what it is without a secret.
        ("The query curr", ["say: The query curr"], "The query curr"),
        ("The query curr", ["THE\nquery currently is"], "The query curr"),
        (f"{SECRET} film", ["a", f"so {SECRET} film"], f"{SECRET} film"),
        # What goes beyond it is not shown.
        ("The query currently", ["The query"], "The query [...]"),
        (f"{SECRET} film", ["the query, I mean"], "The query [...] film"),
        (f"{SECRET}", ["query currently entered is:"], "[...]"),
        # Two texts do not make one.
        ("The query", ["The", "query"], "[...]"),
        ("The query cut The query", ["The que"], "The query cut The que[...]"),
        (f"The The query {SECRET}", ["the q"], "The The query The q[...]"),
        (f"The The query {SECRET}", ["The"], "The The query [...]"),
        ("Thequ", ["x"], "[...]"),
        ("The que", ["The q"], "The q[...]"),
    ],
)
def test_what_the_client_has_said_itself_is_shown(text, known, shown):
    encoder = make()
    tokens = tokens_of(encoder, f"Answer: {text}")
    for sizes in (None, iter([10**6]), sizes_of(random.Random(0))):
        reader = AnswerReader(encoder, True, secret=SECRET, known=known)
        assert "".join(pieces_of(reader, tokens, sizes)) == reader.text == shown
        assert reader.redacted == ("[...]" in shown)


def test_pieces_do_not_tell_that_a_guess_is_right():
    encoder = make()
    for guess in ("The query curr", "so THE query currently e", SECRET):
        plain = told(encoder, f"Answer: say {guess} film")
        assert told(encoder, f"Answer: say {guess} film", secret=SECRET, known=[f"say {guess} film"]) == plain


@pytest.mark.parametrize(
    "text, secret, shown",
    [
        (f"Row 3: '{SECRET} a film' failed", SECRET, "Row 3: '[...] a film' failed"),
        ("the query\n  currently\tentered\u3000is:x", SECRET, "[...]x"),
        (f"{SECRET}\n{SECRET.upper()} {SECRET}", SECRET, "[...]\n[...] [...]"),
        ("a (b.*c)+ [d] $1 e", "(B.*C)+ [d]", "a [...] $1 e"),
        ("abc (bxxc)", "(b.*c)", "abc (bxxc)"),
        ("STRASSE straße", "Straße", "[...] [...]"),
        ("aaaa", "aa", "[...][...]"),
        ("The query currently entered", SECRET, "The query currently entered"),
        (f"x {ODD!r} y", ODD, "x '[...]' y"),
        (f"x {ODD!a} y", ODD, "x '[...]' y"),
        (json.dumps(['"é" \\ \n']), '"é" \\ \n', '["[...]"]'),
        (f"{ODD} {ODD!r}", ODD, "[...] '[...]'"),
        ("ab ab", " \n ", "ab ab"),
        ("ab ab", "", "ab ab"),
        ("", SECRET, ""),
    ],
)
def test_hide(text, secret, shown):
    assert hide(text, secret) == shown


@pytest.mark.parametrize("part", ["The", "The ", SECRET[:-1], "Answer: ", "Answer", ":", "*", " ", "\n", "�"])
def test_hostile_answers_take_no_long_time(part):
    encoder = make()
    text = (part * (100_000 // len(part) + 1))[:100_000]
    tokens = tokens_of(encoder, text)
    start = time.monotonic()
    reader = AnswerReader(encoder, True, ["\n\nUser:", "::::b", "*" * 50 + "x", "The The x"], SECRET)
    for place in range(0, len(tokens), 10):
        reader.feed(tokens[place : place + 10])
    reader.finish()
    hide(text, SECRET)
    assert time.monotonic() - start < 5
    assert reader.text == encoder.read(text, True)[0] or part == SECRET[:-1]


def test_cost_grows_with_the_length_of_an_answer(monkeypatch):
    encoder = make()
    own, decoded = encoder.tokenizer.decode, []
    monkeypatch.setattr(
        encoder.tokenizer, "decode", lambda tokens, **options: decoded.append(len(tokens)) or own(tokens, **options)
    )
    for text in ("it is good and 很好 😀 ", "�"):
        tokens = tokens_of(encoder, text * 4000)[:4000]
        decoded.clear()
        pieces_of(AnswerReader(encoder, True), tokens)
        # Not all of the answer for each token: that would be eight million.
        assert 4000 < sum(decoded) < 6 * 4000
