"""What waits for the model: whose turn it is, how much of it, and how long a batch waits for more."""

import asyncio
import threading
import time

import pytest

from p2p_trainer.inference import Classification
from p2p_trainer.serving import BadPrompt, Engine, Overloaded
from p2p_trainer.serving.batching import Request, RowQueue
from tests.engine_models import TEXTS, WAIT, make_classifier, until


@pytest.fixture
def classifier(tiny_model):
    return make_classifier(tiny_model)


def recorded(monkeypatch, model):
    """Replace the model's classification with one that only notes its batches."""
    batches = []

    def classify(texts, batch_size):
        batches.append(list(texts))
        return [Classification("bad", 0, 1.0, {"bad": 1.0, "good": 0.0})] * len(texts)

    monkeypatch.setattr(model, "classify", classify)
    return batches


def test_large_requests_leave_room_for_others(classifier, monkeypatch):
    batches = recorded(monkeypatch, classifier)

    async def work():
        engine = Engine(classifier, batch_size=4)
        large = asyncio.create_task(engine.classify([f"a{n}" for n in range(7)]))
        others = [asyncio.create_task(engine.classify([text])) for text in ("b", "c")]
        await until(lambda: engine.stats.waiting == 9)
        engine.start()
        assert len(await large) == 7 and len(await asyncio.gather(*others)) == 2
        await engine.close()

    asyncio.run(work())
    assert batches == [["a0", "b", "c", "a1"], ["a2", "a3", "a4", "a5"], ["a6"]]


def test_a_batch_waits_for_the_clients_of_the_last_one(monkeypatch):
    monkeypatch.setattr("p2p_trainer.serving.batching.GATHERING", WAIT)
    queue = RowQueue(9)
    requests = [Request([name], None) for name in "abcde"]
    queue.put(requests[0])
    # Nothing came before: a lone row does not wait.
    assert [row.prompt for row in queue.take(4, 1)] == ["a"]
    queue.put(requests[1])
    queue.put(requests[2])
    assert [row.prompt for row in queue.take(4, 1)] == ["b", "c"]
    queue.put(requests[3])
    found = []
    thread = threading.Thread(target=lambda: found.extend(row.prompt for row in queue.take(4, 1)))
    thread.start()
    thread.join(0.05)
    assert thread.is_alive() and queue.waiting == 1
    queue.put(requests[4])
    thread.join(WAIT)
    assert found == ["d", "e"] and queue.running == 2


def test_a_batch_that_took_long_is_followed_by_a_longer_pause(monkeypatch):
    monkeypatch.setattr("p2p_trainer.serving.batching.GATHERING", 0.0)
    now = [0.0]
    monkeypatch.setattr("p2p_trainer.serving.batching.time.monotonic", lambda: now[0])
    pauses = []

    def wait_for(condition, timeout=None):
        pauses.append(timeout)
        # The other client comes back within the pause, if there is one.
        if timeout:
            queue.put(Request(["late"], None))
        assert timeout is not None or condition()

    def taken(seconds):
        now[0] += seconds
        pauses.clear()
        return [row.prompt for row in queue.take(4, 1)], pauses[1]

    queue = RowQueue(20)
    monkeypatch.setattr(queue._changed, "wait_for", wait_for)
    for name in "ab":
        queue.put(Request([name], None))
    assert taken(0) == (["a", "b"], 0.0)
    queue.put(Request(["c"], None))
    assert taken(8.0) == (["c", "late"], pytest.approx(0.4))
    monkeypatch.undo()
    # What a lone client waits for is there already.
    queue = RowQueue(20)
    monkeypatch.setattr("p2p_trainer.serving.batching.GATHERING_SHARE", 1e6)
    for _ in range(3):
        queue.put(Request(["alone"], None))
        began = time.monotonic()
        assert len(queue.take(4, 1)) == 1 and time.monotonic() - began < 1
        time.sleep(0.01)


def test_a_batch_is_bounded_by_its_text_too():
    queue = RowQueue(100)
    for name, length in (("a", 7), ("b", 3), ("c", 9), ("d", 30), ("e", 1)):
        queue.put(Request([name], None, [length]))
    batches = [[row.prompt for row in queue.take(4, 10)] for _ in range(3)]
    assert batches == [["a", "b"], ["c", "d"], ["e"]]


def test_a_request_waits_as_a_whole_or_not_at_all(classifier):
    async def work():
        engine = Engine(classifier, max_waiting=15)
        first = [asyncio.create_task(engine.classify(TEXTS[:3])) for _ in range(4)]
        await until(lambda: engine.stats.waiting == 12)
        more = asyncio.create_task(engine.classify(TEXTS[:1]))
        await until(lambda: engine.stats.waiting == 13)
        with pytest.raises(Overloaded, match="^13 of at most 15 prompts are waiting already, too many for 3 more"):
            await engine.classify(TEXTS[:3])
        # However much room there is, one client can't take it all.
        with pytest.raises(BadPrompt, match="^The request has 4 prompts, and may have 3 at most"):
            await engine.classify(TEXTS[:4])
        second = asyncio.create_task(engine.classify(TEXTS[:2]))
        await until(lambda: engine.stats.waiting == 15)
        engine.start()
        assert [len(await task) for task in (*first, more, second)] == [3, 3, 3, 3, 1, 2]
        await engine.close()

    asyncio.run(work())


def test_clients_that_go_leave_their_room_in_the_queue(classifier, monkeypatch):
    batches = recorded(monkeypatch, classifier)

    async def work():
        engine = Engine(classifier, max_waiting=12)
        others = [asyncio.create_task(engine.classify(["other"] * 3)) for _ in range(2)]
        await until(lambda: engine.stats.waiting == 6)
        for other in others:
            other.cancel()
        gone = asyncio.create_task(engine.classify(["gone"] * 3))
        stays = asyncio.create_task(engine.classify(["stays"]))
        await until(lambda: engine.stats.waiting == 4)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert engine.stats.waiting == 1
        assert not [task for task in others if not task.cancelled()]
        more = asyncio.create_task(engine.classify(["more"] * 3))
        await until(lambda: engine.stats.waiting == 4)
        engine.start()
        await asyncio.gather(stays, more)
        await engine.close()

    asyncio.run(work())
    assert batches == [["stays", "more", "more", "more"]]
