"""What clients of the engine may ask, and what they get: the model's own answers, without the key."""

import asyncio
import functools

import numpy as np
import pytest
import torch

from p2p_trainer import DefendedModel
from p2p_trainer.decoding import Sampling
from p2p_trainer.evaluation import Guard
from p2p_trainer.serving import Answer, BadPrompt, BatchFailed, Engine, Piece
from p2p_trainer.vision_encoder import VisionPromptEncoder
from tests.conftest import make_tokenizer
from tests.engine_models import DELTA, PREFIX, TEXTS, collected, make_classifier, make_writer, running, same, until


ASK = {"role": "user", "content": "a film"}


@pytest.fixture
def classifier(tiny_model):
    return make_classifier(tiny_model)


@pytest.fixture
def writer(tiny_model):
    return make_writer(tiny_model)


def test_written_answers_are_those_of_the_model_alone(writer):
    prompts = [*TEXTS[:30], [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the plot"}]]
    expected = writer.generate(prompts)

    @running
    async def work(engine):
        parts = await asyncio.gather(
            *(engine.answer(prompts[start : start + 1 + start % 4], Sampling()) for start in range(31))
        )
        assert await engine.answer([], Sampling()) == []
        assert engine.stats.batches < 31
        return parts

    for start, answers in enumerate(work(Engine(writer, batch_size=8))):
        found = [(answer.text, answer.prefixed) for answer in answers]
        assert found == [(one.text, one.prefixed) for one in expected[start : start + 1 + start % 4]]
        assert {answer.finish_reason for answer in answers} <= {"stop", "length"}


def test_draws_do_not_depend_on_who_else_asks(writer):
    settings = [Sampling(temperature=1.5 * (n % 3 > 0), top_p=1 - 0.3 * (n % 2), seed=n) for n in range(9)]

    @running
    async def work(engine):
        alone = [await engine.answer([TEXTS[n]], sampling) for n, sampling in enumerate(settings)]
        assert engine.stats.batches == 9
        together = await asyncio.gather(*(engine.answer([TEXTS[n]], one) for n, one in enumerate(settings)))
        assert together == alone and engine.stats.batches < 18
        assert len({answer.text for [answer] in alone}) > 3

    work(Engine(writer))


def test_pieces_of_a_stream_make_the_answer(writer):
    @running
    async def work(engine):
        for seed in range(6):
            sampling = Sampling(temperature=2.0, seed=seed)
            [whole] = await engine.answer([TEXTS[seed]], sampling)
            *first, last = await collected(engine.stream(TEXTS[seed], sampling))
            assert "".join(piece.text for piece in [*first, last]) == whole.text
            assert len(first) > 1 and all(piece.text and piece.finish_reason is None for piece in first)
            assert (last.finish_reason, last.prefixed) == (whole.finish_reason, whole.prefixed)
            stop = whole.text[4:6]
            [stopped] = await engine.answer([TEXTS[seed]], sampling, stop=[stop])
            assert stopped.finish_reason == "stop" and stopped.text == whole.text.partition(stop)[0].rstrip()

    work(Engine(writer))


@pytest.mark.parametrize(
    "prompt, message",
    [
        (" \n", "Prompt 1 is empty"),
        ("a \ud800", "Prompt 1 is no valid Unicode"),
        (7, "Prompt 1 is neither a text nor a conversation"),
        ([], "Prompt 1 is neither"),
        ([{"role": "user", "content": ""}], "Prompt 1 is empty"),
        ([{"role": "user", "content": ["parts"]}], "Prompt 1 is neither"),
        ([{"role": "tool", "content": "a"}, ASK], "Prompt 1 is neither"),
        ([ASK, {"role": "system", "content": "b"}, ASK], "Prompt 1 is neither"),
        ([{"role": "system", "content": "\udfff"}, ASK], "Prompt 1 is no valid Unicode"),
        ([ASK, {"role": "assistant", "content": "film " * 200}, ASK], "Prompt 1 can't be asked. If it has earlier"),
        ("a" * 6777, "Prompt 1 has 6777 characters, and this server takes 6400 at most. The model would not"),
        ([{"role": "system", "content": "b" * 6771}, ASK], "Prompt 1 has 6777 characters"),
    ],
)
def test_prompts_that_can_not_be_asked_are_explained_without_the_key(writer, prompt, message):
    @running
    async def work(engine):
        with pytest.raises(BadPrompt, match=message) as raised:
            await engine.answer(["fine", prompt], Sampling())
        assert DELTA not in str(raised.value)
        with pytest.raises(BadPrompt, match=message.replace("1", "0")):
            await collected(engine.stream(prompt, Sampling()))
        assert engine.stats.failures == 0

    work(Engine(writer))


def test_models_are_asked_for_what_they_do(tiny_model, classifier, writer):
    @running
    async def classes(engine):
        assert (engine.kind, engine.labels, engine.max_waiting) == ("classification", ("bad", "good"), 1024)
        for texts, message in ((["a", ""], "Text 1 is empty"), (["\udc00"], "Text 0 is no valid"), ([3], "Text 0 is")):
            with pytest.raises(BadPrompt, match=message):
                await engine.classify(texts)
        with pytest.raises(BadPrompt, match="writes no answers"):
            await engine.answer(["a"], Sampling())

    @running
    async def answers(engine):
        assert (engine.kind, engine.labels) == ("generation", ())
        with pytest.raises(BadPrompt, match="has no classes"):
            await engine.classify(["a"])

    @running
    async def plain(engine):
        assert len(await engine.answer(["a", [ASK]], Sampling())) == 2
        with pytest.raises(BadPrompt, match="Prompt 0 has earlier turns, and this model was trained without"):
            await engine.answer([[ASK, {"role": "assistant", "content": "b"}, ASK]], Sampling())

    @running
    async def long(engine):
        with pytest.raises(BadPrompt, match="^Text 1 has 32769 characters, and this server takes 32768 at most"):
            await engine.classify(["a", "a" * 32769])
        [found] = await engine.classify(["a" * 32768])
        same([found], classifier.classify("a" * 32768))

    classes(Engine(classifier))
    long(Engine(classifier))
    answers(Engine(writer))
    plain(Engine(make_writer(tiny_model, chat=False)))


def test_withheld_answers_have_no_text(classifier, writer):
    class Silent(Guard):
        def inputs(self, texts):
            return [f"now {text}" for text in texts]

        def withheld(self, texts):
            return np.array(["plot" in text for text in texts])

    expected = writer.generate("now the film"), classifier.classify("now the film")
    writer.guard = classifier.guard = Silent()

    @running
    async def answers(engine):
        quiet, found = await engine.answer(["the plot", "the film"], Sampling())
        assert quiet == Answer(None, True, "content_filter") and found.text == expected[0][0].text
        assert await collected(engine.stream("the plot", Sampling())) == [Piece("", True, "content_filter")]

    @running
    async def classes(engine):
        quiet, found = await engine.classify(["the plot", "the film"])
        assert (quiet.label, quiet.index) == (None, -1)
        same([found], expected[1])

    answers(Engine(writer))
    classes(Engine(classifier))


@pytest.mark.parametrize("wanted, written", [(None, 12), (1000, 12), (3, 6), (1, 4)])
def test_p_does_not_count_and_the_operator_caps(writer, wanted, written, monkeypatch):
    rows = []

    def write(model, tokenizer, batch, **kwargs):
        rows.extend(batch)
        assert kwargs == {"end_tokens": [tokenizer.eos_token_id]}
        for row in batch:
            row.end("length")

    assert len(writer.encoder.tokenizer(PREFIX)["input_ids"]) == 3
    monkeypatch.setattr("p2p_trainer.serving.engine.write_batch", write)

    @running
    async def work(engine):
        sampling = Sampling(max_new_tokens=wanted, temperature=0.5, seed=4)
        assert await engine.answer(["a film"], sampling) == [Answer("", False, "length")]

    work(Engine(writer))
    assert [row.sampling for row in rows] == [Sampling(written, 0.5, 1.0, 4)]
    assert [row.ids for row in rows] == writer.prepare(["a film"])


def test_answers_stay_within_the_positions_of_the_model(tiny_model):
    # The format allows more than the 512 positions of the model.
    model = make_writer(tiny_model, max_length=600, max_new_tokens=100)
    prompt = "film " * 600

    @running
    async def work(engine):
        long = model.prepare([prompt])[0]
        assert len(long) in (499, 500)
        [answer] = await engine.answer([prompt], Sampling(temperature=1.0))
        assert answer.finish_reason in ("length", "stop") and engine.stats.failures == 0

    work(Engine(model))
    model = make_writer(tiny_model, max_length=700, max_new_tokens=100)

    @running
    async def refused(engine):
        with pytest.raises(BadPrompt, match="Prompt 0 can't be asked"):
            await engine.answer([prompt], Sampling())

    refused(Engine(model))


def test_matrix_products_run_in_the_type_of_training(tiny_model, monkeypatch):
    model, types = make_writer(tiny_model), []
    model = DefendedModel(model.model, model.encoder, (), autocast=torch.bfloat16)

    def write(model, tokenizer, batch, **kwargs):
        types.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)

    monkeypatch.setattr("p2p_trainer.serving.engine.write_batch", write)

    @running
    async def work(engine):
        with pytest.raises(BatchFailed):
            await engine.answer(["a film"], Sampling())

    work(Engine(model))
    assert types == [torch.bfloat16]


def test_a_stop_string_counts_where_the_end_of_the_answer_shows_it(writer, monkeypatch):
    def write(model, tokenizer, batch, **kwargs):
        for row in batch:
            # May be the beginning of p, and so is held back.
            assert all(row.take(token) for token in tokenizer("Ans", add_special_tokens=False)["input_ids"])
            row.end("length")

    monkeypatch.setattr("p2p_trainer.serving.engine.write_batch", write)

    @running
    async def work(engine):
        assert await engine.answer(["a film"], Sampling(), stop=["s"]) == [Answer("An", False, "stop")]
        assert await collected(engine.stream("a film", Sampling(), stop=["s"])) == [Piece("An", False, "stop")]
        assert await engine.answer(["a film"], Sampling(), stop=["x"]) == [Answer("Ans", False, "length")]

    work(Engine(writer))


def test_tokens_are_counted_without_key_and_template(writer):
    engine = Engine(writer)
    text = "the film is good"
    assert engine.count_tokens(text) == len(make_tokenizer()(text)["input_ids"]) == 4
    assert engine.count_tokens("") == 0
    # Spelt by a client, a control token is text.
    assert engine.count_tokens("<|endoftext|>") > 1
    assert DELTA not in engine.hide(f"asked {DELTA} a film") and "a film" in engine.hide(f"asked {DELTA} a film")


def test_what_can_not_be_asked_fails_alone(classifier, writer, caplog):
    class Refuses(Guard):
        def inputs(self, texts):
            if "odd" in texts:
                raise ValueError(f"can't read {DELTA} odd")
            return list(texts)

    async def work(model, ask, message):
        engine = Engine(model)
        tasks = [asyncio.create_task(ask(engine, texts)) for texts in (TEXTS[:3], ["fine", "odd"], TEXTS[:1])]
        await until(lambda: engine.stats.waiting == 6)
        engine.start()
        first, odd, last = await asyncio.gather(*tasks, return_exceptions=True)
        assert (len(first), len(last), type(odd), str(odd)) == (3, 1, BadPrompt, message)
        assert (engine.stats.batches, engine.stats.failures) == (1, 0)
        await engine.close()

    classifier.guard = writer.guard = Refuses()
    asyncio.run(work(classifier, Engine.classify, "Text 1 can't be classified."))
    message = "Prompt 1 can't be asked. If it has earlier turns, leave out the oldest, or ask the last question alone."
    asyncio.run(work(writer, functools.partial(Engine.answer, sampling=Sampling()), message))
    assert "odd" in caplog.text and DELTA not in caplog.text


@pytest.mark.parametrize("changes", [{"batch_size": 0}, {"max_waiting": 0}, {"batch_size": True}])
def test_numbers_below_one_are_refused(classifier, changes):
    with pytest.raises(ValueError, match="is a number of at least 1"):
        Engine(classifier, **changes)


def test_models_with_images_are_refused(classifier):
    classifier.encoder = VisionPromptEncoder.__new__(VisionPromptEncoder)
    with pytest.raises(ValueError, match="trained with images, which can't be served yet"):
        Engine(classifier)
