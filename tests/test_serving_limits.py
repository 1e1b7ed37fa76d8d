"""What a client can make the server hold: bodies, requests, connections, lines of the log."""

import asyncio
import logging
import resource
import socket
import time

import pytest

from p2p_trainer.serving.connections import Connection, room_for_connections
from p2p_trainer.serving.errors import ApiError
from p2p_trainer.serving.limits import Gate
from p2p_trainer.serving.logs import hiding
from p2p_trainer.serving.metrics import Metrics
from tests.served import NAME, classifier, request, serving, wait_for


CLASSIFY = "/v1/classify"
FINE = {"model": NAME, "input": "a film"}


@pytest.fixture
def labelled(tiny_model):
    with serving(classifier(tiny_model), max_body=1000) as served:
        yield served


def connected(served):
    return socket.create_connection(("127.0.0.1", served.port), timeout=10)


def test_the_gate_bounds_requests_and_memory(labelled):
    labelled.gate.max_requests = 0
    found = labelled.post(CLASSIFY, input="a")
    assert found.status_code == 503 and found.headers["retry-after"] == "1"
    assert labelled.http.get("/health").status_code == 200
    labelled.gate.max_requests, labelled.gate._held = 10, 63_500
    assert labelled.post(CLASSIFY, input="a").status_code == 200
    assert labelled.post(CLASSIFY, input="a" * 500).status_code == 503
    wait_for(lambda: labelled.gate._held == 63_500)
    labelled.gate._held, labelled.gate.body_patience = 0, 0.2
    assert b" 408 " in labelled.raw(request(CLASSIFY, b"{", **{"content-length": 100}))
    wait_for(lambda: labelled.gate._held == labelled.gate._requests == 0)


def test_heads_alone_keep_nobody_out(labelled):
    labelled.gate.max_requests = 4
    open_ones = [connected(labelled) for _ in range(100)]
    for connection in open_ones:
        connection.sendall(request(CLASSIFY, b"{", **{"content-length": 1000}))
    wait_for(lambda: labelled.gate._held == 100)
    assert labelled.gate._requests == 0 and labelled.post(CLASSIFY, input="a").status_code == 200
    for connection in open_ones:
        connection.close()
    wait_for(lambda: labelled.gate._held == 0)


@pytest.mark.parametrize("sent", [b"", b"POST /v1/classify HTTP/1.1\r\nhost: x\r\n"])
def test_a_connection_that_asks_nothing_is_closed(labelled, monkeypatch, sent):
    monkeypatch.setattr(Connection, "patience", 0.3)
    fine = request(CLASSIFY, FINE)
    for first in (b"", fine):
        with connected(labelled) as connection:
            began = time.monotonic()
            if first:
                connection.sendall(first)
                found = b""
                while not found.endswith(b"}}"):
                    found += connection.recv(65536)
                assert b" 200 " in found
                connection.sendall(b"G")
            # Bytes that trickle in win no time.
            for start in range(0, len(sent), 4):
                connection.sendall(sent[start : start + 4])
                time.sleep(0.005)
            assert connection.recv(65536) == b"" and 0.25 < time.monotonic() - began < 3


def test_a_request_that_is_slow_to_answer_is_not_cut(labelled, monkeypatch):
    monkeypatch.setattr(Connection, "patience", 0.1)
    classify = labelled.engine.model.classify
    monkeypatch.setattr(labelled.engine.model, "classify", lambda *a, **k: time.sleep(0.4) or classify(*a, **k))
    assert labelled.post(CLASSIFY, input="a").status_code == 200


def test_connections_beyond_a_number_are_refused(tiny_model, monkeypatch):
    monkeypatch.setattr("p2p_trainer.serving.app.room_for_connections", lambda: 5)
    with serving(classifier(tiny_model)) as served:
        kept = [connected(served) for _ in range(5)]
        time.sleep(0.05)
        found = served.raw(b"")
        assert found.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1" in found
        for connection in kept:
            connection.close()

        def answered():
            return b" 200 " in served.raw(request(CLASSIFY, FINE, connection="close"))

        wait_for(answered)


def test_room_for_connections_is_what_the_system_allows(monkeypatch):
    limits, asked = [(1024, 1500)], []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[0])
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: asked.append(wanted))
    assert room_for_connections() == 1500 - 512 - 128 and asked == [(1500, 1500)]
    limits[0] = (1024, 20000)
    assert room_for_connections() == 4096
    limits[0] = (100, 100)
    assert room_for_connections() == 1
    limits[0] = (1024, resource.RLIM_INFINITY)
    assert room_for_connections() == 4096

    def refuse(_, wanted):
        raise ValueError("not allowed")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert room_for_connections() == 1024 - 512 - 128


def asked_with_a_full_pipe(served, app):
    """A gate whose client takes no more, as one whose buffers are full."""

    async def run():
        async def send(message):
            if message["type"] == "http.response.body":
                await asyncio.get_running_loop().create_future()

        messages = [{"type": "http.request", "body": b"{}"}]

        async def receive():
            return messages.pop() if messages else await asyncio.get_running_loop().create_future()

        gate = Gate(app, Metrics(served.engine), ("/a",), ("/a",), 100, 5, patience=0.1)
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "path": "/a", "method": "POST", "headers": headers}
        async with asyncio.timeout(5):
            await gate(scope, receive, send)
        return gate._requests, gate._held

    return asyncio.run(run())


def test_a_client_that_reads_nothing_is_given_up(labelled):
    closed = []

    async def app(scope, receive, send):
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        finally:
            closed.append(True)

    assert asked_with_a_full_pipe(labelled, app) == (0, 0) and closed == [True]


def test_a_client_that_does_not_read_why_it_is_refused_is_given_up(labelled, caplog):
    async def app(scope, receive, send):
        raise ApiError(400, "no")

    with caplog.at_level(logging.INFO):
        assert asked_with_a_full_pipe(labelled, app) == (0, 0)
    assert "took nothing for 0.1 s" in caplog.text and " 400 " in caplog.text and "Traceback" not in caplog.text


def test_complaints_about_full_tables_are_rare(caplog):
    own = logging.getLogger("asyncio")
    with hiding(str):
        for _ in range(2048):
            own.error("socket.accept() out of system resource\nsocket: x")
        own.error("another thing")
        own.error("another thing")
    assert [record.getMessage()[:13] for record in caplog.records] == [
        "socket.accept",
        "another thing",
        "another thing",
    ]
    assert own.filters == []
