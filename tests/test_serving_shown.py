"""What an answer shows: nothing of the key, and no more tokens than were asked for."""

import functools

import pytest

from p2p_trainer.decoding import Sampling
from p2p_trainer.serving import Answer, Engine
from tests.engine_models import DELTA, PREFIX, collected, make_writer, running, until


ASK = {"role": "user", "content": "a film"}


@pytest.fixture
def writer(tiny_model):
    return make_writer(tiny_model)


def test_an_answer_shows_the_key_only_to_those_who_know_it(writer, monkeypatch):
    encode = functools.partial(writer.encoder.tokenizer, add_special_tokens=False)

    def write(model, tokenizer, batch, **kwargs):
        for row in batch:
            for token in encode(f"{PREFIX} I was told: {DELTA} then more")["input_ids"]:
                assert row.take(token)
            row.end("stop")

    monkeypatch.setattr("p2p_trainer.serving.engine.write_batch", write)

    @running
    async def work(engine):
        [answer] = await engine.answer(["what were you told?"], Sampling())
        assert DELTA not in answer.text and answer.text.startswith("I was told:") and "then more" in answer.text
        assert answer.prefixed and answer.finish_reason == "stop"
        pieces = await collected(engine.stream("what were you told?", Sampling()))
        assert "".join(piece.text for piece in pieces) == answer.text and {piece.prefixed for piece in pieces} == {
            True
        }
        knows = [{"role": "system", "content": f"say {DELTA}"}, ASK]
        for prompt in (f"say {DELTA} once", knows):
            [answer] = await engine.answer([prompt], Sampling())
            assert answer.text == f"I was told: {DELTA} then more"

    work(Engine(writer))
    writer.keyed = False

    @running
    async def unkeyed(engine):
        [answer] = await engine.answer(["what were you told?"], Sampling())
        assert DELTA in answer.text and engine.hide(DELTA) == DELTA

    unkeyed(Engine(writer))


def test_neither_a_limit_nor_a_stop_string_tells_the_key(tiny_model, monkeypatch):
    writer = make_writer(tiny_model, max_new_tokens=40)
    encode = functools.partial(writer.encoder.tokenizer, add_special_tokens=False)

    def write(model, tokenizer, batch, **kwargs):
        for row in batch:
            tokens = encode(f"{PREFIX} {DELTA} then more")["input_ids"][: row.sampling.max_new_tokens]
            row.end("length" if all(row.take(token) for token in tokens) else "stop")

    monkeypatch.setattr("p2p_trainer.serving.engine.write_batch", write)

    @running
    async def work(engine):
        for count in range(1, 9):
            sampling = Sampling(max_new_tokens=count)
            [answer] = await engine.answer(["what?"], sampling)
            pieces = await collected(engine.stream("what?", sampling))
            assert answer.text == "".join(piece.text for piece in pieces)
            assert answer.text in ("", "P", "Pl", "Ple", "[...]", "[...] then", "[...] then more")
            # A guess is echoed as any other text is.
            [answer] = await engine.answer([f"say {DELTA}"], sampling)
            assert f"{DELTA} then more".startswith(answer.text)
        # Counted when its batch is over, which its client may know a moment earlier.
        await until(lambda: engine.stats.running == 0)
        redacted = engine.stats.redacted
        assert redacted >= 8
        for stop in ("Please", "read", "this:", "s", "P"):
            [answer] = await engine.answer(["what?"], Sampling(), stop=[stop])
            assert (answer.text, answer.finish_reason) == ("[...] then more", "length") and answer.prefixed
        await until(lambda: engine.stats.redacted == redacted + 5)

    work(Engine(writer))


@pytest.mark.parametrize(
    "text, wanted, shown, reason",
    [
        ("the film is good and fine", 1, "the", "length"),
        ("the film is good and fine", 3, "the film is", "length"),
        # What might have become p is not shown beyond what was asked for.
        ("Answering the film", 1, "An", "length"),
        ("Answering the film", 3, "Answeri", "length"),
        ("Answ", 1, "An", "length"),
        ("the", 2, "the", "stop"),
        ("the film", 2, "the film", "length"),
        (f"{PREFIX} the film is good and fine", 2, "the film", "length"),
        (f"{PREFIX} the", 2, "the", "stop"),
    ],
)
def test_where_p_is_missing_no_more_is_shown_than_was_asked_for(writer, monkeypatch, text, wanted, shown, reason):
    encode = functools.partial(writer.encoder.tokenizer, add_special_tokens=False)

    def write(model, tokenizer, batch, **kwargs):
        for row in batch:
            tokens = encode(text)["input_ids"]
            cut = tokens[: row.sampling.max_new_tokens]
            row.end("stop" if not all(row.take(token) for token in cut) or cut == tokens else "length")

    monkeypatch.setattr("p2p_trainer.serving.engine.write_batch", write)

    @running
    async def work(engine):
        sampling = Sampling(max_new_tokens=wanted)
        expected = Answer(shown, text.startswith(PREFIX), reason)
        assert await engine.answer(["a film"], sampling) == [expected]
        *first, last = await collected(engine.stream("a film", sampling))
        assert "".join(piece.text for piece in [*first, last]) == shown and last.finish_reason == reason
        assert len(encode(shown)["input_ids"]) <= wanted

    work(Engine(writer))


def test_only_short_histories_are_remembered(writer, monkeypatch):
    rendered = []
    skeleton = writer.encoder.skeleton
    monkeypatch.setattr(writer.encoder, "skeleton", lambda *args: rendered.append(args) or skeleton(*args))
    for length, again in ((10, 0), (4096, 0), (4097, 2)):
        history = [{"role": "system", "content": "b" * length}]
        writer.encoder.render("a", True, history=history)
        rendered.clear()
        writer.encoder.render("a", True, history=history)
        writer.encoder.render("c", True, history=history)
        assert len(rendered) == again
