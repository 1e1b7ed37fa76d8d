"""The engine behind the server: many clients, batches of one model, and no way to lose the worker."""

import asyncio
import functools
import gc
import logging
import threading

import pytest
import torch

from p2p_trainer.answer_reader import AnswerReader
from p2p_trainer.decoding import Sampling
from p2p_trainer.evaluation import Guard
from p2p_trainer.inference import Classification
from p2p_trainer.serving import BatchFailed, Closed, Engine
from p2p_trainer.serving.batching import Request, RowQueue
from tests.engine_models import (
    DELTA,
    TEXTS,
    WAIT,
    collected,
    make_classifier,
    make_writer,
    running,
    same,
    until,
)


@pytest.fixture
def classifier(tiny_model):
    return make_classifier(tiny_model)


@pytest.fixture
def writer(tiny_model):
    return make_writer(tiny_model)


class Gate(Guard):
    """Holds the worker before each batch, once it is shut."""

    def __init__(self):
        self.entered, self.opened = threading.Event(), threading.Event()
        self.opened.set()
        self.asked = []

    def inputs(self, texts):
        self.asked.append(list(texts))
        self.entered.set()
        assert self.opened.wait(WAIT)
        return list(texts)


@pytest.fixture
def held(monkeypatch):
    """Holds the worker at a token of the longest answer: `held.at` is its number, from 1."""

    class Held:
        at, entered, opened = 3, threading.Event(), threading.Event()
        fed = 0

    feed = AnswerReader.feed

    def slow(reader, tokens):
        reader.fed = getattr(reader, "fed", 0) + 1
        Held.fed = max(Held.fed, reader.fed)
        if reader.fed == Held.at:
            Held.entered.set()
            assert Held.opened.wait(WAIT)
        return feed(reader, tokens)

    monkeypatch.setattr(AnswerReader, "feed", slow)
    return Held


def test_two_hundred_clients_get_the_answers_of_the_model_alone(classifier):
    requests = [[TEXTS[(n * 7 + row) % 40] for row in range(1 + n % 5)] for n in range(200)]
    expected = [classifier.classify(texts) for texts in requests]

    async def work():
        engine = Engine(classifier, batch_size=32)
        tasks = [asyncio.create_task(engine.classify(texts)) for texts in requests]
        await until(lambda: engine.stats.waiting == 600)
        engine.start()
        found = await asyncio.wait_for(asyncio.gather(*tasks), WAIT)
        stats = engine.stats
        assert (stats.waiting, stats.batches, stats.rows, stats.failures) == (0, 19, 600, 0)
        await engine.close()
        return found

    for answers, alone in zip(asyncio.run(work()), expected, strict=True):
        same(answers, alone)


@pytest.mark.parametrize("streamed", [False, True])
def test_clients_that_go_end_their_row_of_the_batch(tiny_model, held, streamed):
    held.at = 8
    sampling = Sampling(temperature=2.0, seed=1)

    @running
    async def work(engine):
        stream = engine.stream(TEXTS[0], sampling)
        ask = asyncio.create_task(anext(stream) if streamed else engine.answer([TEXTS[0]], sampling))
        await until(held.entered.is_set)
        if streamed:
            await ask
            await stream.aclose()
        else:
            ask.cancel()
        await asyncio.sleep(0)
        held.opened.set()
        await until(lambda: engine.stats.running == 0)
        # One token was being taken when the client left.
        assert held.fed == 8 and engine.stats.failures == 0
        [answer] = await engine.answer([TEXTS[0]], sampling)
        assert answer.finish_reason == "length" and held.fed == 12

    work(Engine(make_writer(tiny_model, answer_prefix="")))


def test_short_answers_do_not_wait_for_long_ones(tiny_model, held):
    held.at = 5

    @running
    async def work(engine):
        asked = [
            asyncio.create_task(engine.answer([text], Sampling(max_new_tokens=length)))
            for text, length in ((TEXTS[0], 12), (TEXTS[1], 2))
        ]
        [short] = await asked[1]
        assert short.finish_reason == "length" and not asked[0].done() and engine.stats.batches == 1
        held.opened.set()
        [long] = await asked[0]
        assert len(long.text) > len(short.text)

    work(Engine(make_writer(tiny_model, answer_prefix="")))


@pytest.mark.parametrize(
    "error", [RuntimeError, KeyError, TypeError, torch.OutOfMemoryError, MemoryError, SystemExit, KeyboardInterrupt]
)
@pytest.mark.parametrize("kind", ["classification", "generation"])
def test_a_batch_that_fails_takes_no_other_with_it(classifier, writer, error, kind, caplog):
    class Breaks(Guard):
        def inputs(self, texts):
            if any("break" in text for text in texts):
                raise error(f"no memory for {DELTA} break")
            return list(texts)

    model = classifier if kind == "classification" else writer
    model.guard = Breaks()

    @running
    async def work(engine):
        ask = engine.classify if kind == "classification" else functools.partial(engine.answer, sampling=Sampling())
        for _ in range(2):
            with pytest.raises(BatchFailed) as raised:
                await ask(["break this"])
            assert "break" not in str(raised.value) and DELTA not in str(raised.value)
            assert raised.value.__cause__ is None and raised.value.__context__ is None
            assert len(await ask(TEXTS[:3])) == 3
        assert (engine.stats.batches, engine.stats.failures) == (4, 2) and engine.alive

    with caplog.at_level(logging.DEBUG):
        work(Engine(model))
    assert "A batch of 1 rows failed." in caplog.text and error.__name__ in caplog.text and "break" in caplog.text
    assert DELTA not in caplog.text


def test_closing_ends_what_runs_and_what_waits(tiny_model, held):
    async def work():
        engine = Engine(make_writer(tiny_model, answer_prefix=""), batch_size=2)
        assert not engine.alive
        engine.start()
        [thread] = [thread for thread in threading.enumerate() if thread.name == "p2p-engine"]
        assert thread.daemon and engine.alive
        with pytest.raises(RuntimeError, match="started or closed before"):
            engine.start()
        tasks = [asyncio.create_task(engine.answer(TEXTS[:3], Sampling()))]
        await until(held.entered.is_set)
        tasks.append(asyncio.create_task(collected(engine.stream(TEXTS[0], Sampling()))))
        await until(lambda: engine.stats.waiting == 2)
        closing = [asyncio.create_task(engine.close()) for _ in range(2)]
        found = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), WAIT)
        assert [type(error) for error in found] == [Closed, Closed] and engine.stats.waiting == 0
        # One that waits for the thread may itself be given up.
        closing[0].cancel()
        held.opened.set()
        await asyncio.wait_for(closing[1], WAIT)
        assert held.fed == 3 and not thread.is_alive() and not engine.alive and engine.stats.failures == 0
        await engine.close()
        with pytest.raises(Closed):
            await engine.answer(TEXTS[:1], Sampling())
        with pytest.raises(RuntimeError, match="started or closed before"):
            engine.start()

    asyncio.run(work())


def test_closing_does_not_wait_for_ever(classifier, caplog):
    gate = classifier.guard = Gate()
    gate.opened.clear()

    async def work():
        engine = Engine(classifier)
        engine.start()
        task = asyncio.create_task(engine.classify(TEXTS[:2]))
        await until(gate.entered.is_set)
        await asyncio.wait_for(engine.close(grace=0.05), WAIT)
        with pytest.raises(Closed):
            await task
        assert engine.alive and "has not ended within 0.05 s" in caplog.text
        gate.opened.set()
        await engine.close()
        assert not engine.alive

    asyncio.run(work())


def test_the_key_is_hidden_before_a_log_line_is_cut(classifier, monkeypatch, caplog):
    def fail(texts, batch_size):
        raise RuntimeError(f"x{DELTA}" + "y" * rest)

    monkeypatch.setattr(classifier, "classify", fail)
    rest = 8000 - len(DELTA) // 2 - 1

    @running
    async def work(engine):
        with pytest.raises(BatchFailed):
            await engine.classify(TEXTS[:1])

    with caplog.at_level(logging.DEBUG):
        work(Engine(classifier))
    assert "[...]yyy" in caplog.text and DELTA[-4:] not in caplog.text


def test_requests_of_an_engine_that_never_started_end_when_it_is_closed(classifier):
    async def work():
        engine = Engine(classifier)
        task = asyncio.create_task(engine.classify(TEXTS[:2]))
        await until(lambda: engine.stats.waiting == 2)
        await engine.close()
        with pytest.raises(Closed):
            await task

    asyncio.run(work())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_dies_leaves_nobody_waiting(classifier, monkeypatch):
    def broken(queue, count, length):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(RowQueue, "take", broken)

    async def work():
        engine = Engine(classifier)
        task = asyncio.create_task(engine.classify(TEXTS[:2]))
        await until(lambda: engine.stats.waiting == 2)
        engine.start()
        with pytest.raises(Closed):
            await asyncio.wait_for(task, WAIT)
        await until(lambda: not engine.alive)
        with pytest.raises(Closed):
            await engine.classify(TEXTS[:1])
        await engine.close()

    asyncio.run(work())


def test_a_row_that_is_forgotten_fails_its_request(writer, monkeypatch):
    monkeypatch.setattr("p2p_trainer.serving.engine.write_batch", lambda *args, **kwargs: None)

    @running
    async def work(engine):
        with pytest.raises(BatchFailed):
            await engine.answer(["a film", "a plot"], Sampling())
        # The other row need not be asked any more.
        assert engine.stats.waiting == 0 and engine.stats.batches == 1

    work(Engine(writer, batch_size=1))


def test_event_loops_may_come_and_go(classifier):
    expected = classifier.classify(TEXTS[:4])
    gate = classifier.guard = Gate()
    engine = Engine(classifier)
    engine.start()
    same(asyncio.run(engine.classify(TEXTS[:4])), expected)

    async def leaves():
        task = asyncio.create_task(engine.classify(TEXTS[:2]))
        await until(gate.entered.is_set)
        return task

    gate.entered.clear()
    gate.opened.clear()
    # Its loop is closed before there is an answer.
    asyncio.run(leaves())
    gate.opened.set()
    same(asyncio.run(engine.classify(TEXTS[:4])), expected)
    asyncio.run(engine.close())


def test_nothing_is_left_of_ten_thousand_requests(classifier, monkeypatch):
    monkeypatch.setattr(
        classifier,
        "classify",
        lambda texts, **_: [Classification("bad", 0, 1.0, {"bad": 1.0, "good": 0.0})] * len(texts),
    )

    def kept():
        gc.collect()
        return sum(type(found) is Request for found in gc.get_objects())

    @running
    async def work(engine):
        async def client(number):
            for _ in range(100):
                await engine.classify([f"text {number}"])

        await asyncio.gather(*(client(number) for number in range(100)))
        await until(lambda: engine.stats.running == 0)
        assert engine.stats.rows == 10_000 and kept() <= 1
        broken = [asyncio.create_task(engine.classify(["late"])) for _ in range(100)]
        await asyncio.sleep(0)
        for task in broken:
            task.cancel()
        await asyncio.gather(*broken, return_exceptions=True)
        del broken, task
        # What is running now was woken by their results.
        await asyncio.sleep(0)
        await until(lambda: engine.stats.running == 0 == engine.stats.waiting)
        assert kept() <= 1

    work(Engine(classifier))
