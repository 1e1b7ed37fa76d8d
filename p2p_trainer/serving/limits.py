"""What stands in front of the routes: bounds on size, number and time of requests, and clients that leave."""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .errors import ApiError, internal_error, overloaded


if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from .metrics import Metrics

logger = logging.getLogger(__name__)

# Seconds for a client to take each piece of the response, and to send its body.
PATIENCE = 30.0
BODY_PATIENCE = 10.0
# Seconds in which the rest of a body that is refused is thrown away: a connection that is closed with bytes unread
# may be reset before the client has read why.
_LINGER = 1.0
# Bodies of full size that may be held at once.
_BODIES = 64
# Its entries have routes of their own, and are counted with it.
_ENTRY = "/v1/models"
# HTTP has no status for a client that left; nginx writes this one.
_GONE = 499


class Gate:
    """
    ASGI middleware that bounds what a client can make the server hold, and ends what a client no longer waits for.

    It reads the bodies itself, up to a limit, before any route runs. Requests beyond `max_requests`, or beyond the
    memory that 64 bodies of full size take, are refused with 503 at once: uvicorn's `limit_concurrency` would count
    idle connections too, and answer with neither `Retry-After` nor an error object. What has not arrived counts for
    neither, or clients that send nothing but heads would keep out all others. Rows are bounded by the queue of the
    engine. A request whose client leaves, or takes nothing for 30 s, is cancelled.

    Args:
        app (`ASGIApp`):
            The routes.
        metrics ([`~metrics.Metrics`]):
            Where requests are counted.
        routes (`Sequence[str]`):
            Paths of the routes; others are counted as `"other"`.
        posted (`Sequence[str]`):
            Those of them that take a JSON body.
        max_body (`int`):
            Longest body, in bytes.
        max_requests (`int`):
            Requests with a body that may be in work at once.
        patience (`float`, *optional*, defaults to `30.0`):
            Seconds for a client to take each piece of the response.
        body_patience (`float`, *optional*, defaults to `10.0`):
            Seconds for a client to send its body.
    """

    def __init__(
        self,
        app: "ASGIApp",
        metrics: "Metrics",
        routes: Sequence[str],
        posted: Sequence[str],
        max_body: int,
        max_requests: int,
        patience: float = PATIENCE,
        body_patience: float = BODY_PATIENCE,
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.routes = frozenset(routes)
        self.posted = frozenset(posted)
        self.max_body = max_body
        self.max_requests = max_requests
        self.patience = patience
        self.body_patience = body_patience
        self._requests = 0
        self._held = 0

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """
        Answer one request.

        Args:
            scope (`Scope`):
                ASGI scope.
            receive (`Receive`):
                Gives what the client sends.
            send (`Send`):
                Takes the response.
        """
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        exchange = _Exchange(send, self.patience)
        scope.setdefault("state", {})["request_id"] = exchange.request_id
        try:
            try:
                await self._admit(scope, receive, exchange)
            except ApiError as error:
                await self._refuse(error, receive, exchange)
        except _StalledError:
            logger.info("%s: the client took nothing for %g s.", exchange.request_id, self.patience)
        except Exception:
            logger.exception("%s failed.", exchange.request_id)
            if not exchange.status:
                await internal_error(exchange.request_id).response()(scope, receive, exchange.send)
        finally:
            seconds = time.perf_counter() - began
            path = _ENTRY if scope["path"].startswith(f"{_ENTRY}/") else scope["path"]
            route = path if path in self.routes else "other"
            status = exchange.status or _GONE
            self.metrics.request(route, status, seconds)
            # No path, query or address: they are the client's, and may hold anything.
            logger.info("%s %s %d %.0f ms", exchange.request_id, route, status, 1000 * seconds)

    async def _admit(self, scope: "Scope", receive: "Receive", exchange: "_Exchange") -> None:
        if scope["method"] != "POST" or scope["path"] not in self.posted:
            await self._run(scope, receive, exchange, b"")
            return
        _check_head(scope, self.max_body)
        body = bytearray()
        working = False
        try:
            if not await self._read(receive, body):
                return
            if self._requests >= self.max_requests:
                raise overloaded("The server has more requests than it can hold.")
            self._requests += 1
            working = True
            await self._run(scope, receive, exchange, bytes(body))
        finally:
            self._requests -= working
            self._held -= len(body)

    async def _read(self, receive: "Receive", body: bytearray) -> bool:
        """Read the body, and count it as it comes; return whether the client has stayed."""
        try:
            async with asyncio.timeout(self.body_patience):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    piece = message.get("body", b"")
                    if len(body) + len(piece) > self.max_body:
                        raise _too_large(self.max_body)
                    if self._held + len(piece) > _BODIES * self.max_body:
                        raise overloaded("The server has more requests than it can hold.")
                    body += piece
                    self._held += len(piece)
                    if not message.get("more_body", False):
                        return True
        except TimeoutError:
            raise ApiError(408, f"The body did not arrive within {self.body_patience:g} s.") from None

    async def _run(self, scope: "Scope", receive: "Receive", exchange: "_Exchange", body: bytes) -> None:
        """Run the route, but not for a client that has left."""
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> "Message":
            for message in messages:
                return message
            return await asyncio.get_running_loop().create_future()

        answering = asyncio.create_task(self.app(scope, replay, exchange.send))
        watching = asyncio.create_task(_departure(receive))
        try:
            await asyncio.wait((answering, watching), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (answering, watching):
                task.cancel()
            await asyncio.wait((answering, watching))
        if not answering.cancelled():
            answering.result()

    async def _refuse(self, error: ApiError, receive: "Receive", exchange: "_Exchange") -> None:
        """Say why a request is refused whose body was not read to its end."""
        error.headers["connection"] = "close"
        response = error.response()
        await exchange.send({"type": "http.response.start", "status": error.status, "headers": response.raw_headers})
        await exchange.send({"type": "http.response.body", "body": response.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER):
                while (await receive()).get("more_body", False):
                    pass
        await exchange.send({"type": "http.response.body", "body": b"", "more_body": False})


class _StalledError(Exception):
    """The client takes nothing of its response."""


class _Exchange:
    """One response on its way: names it, remembers its status, and waits for a slow client only so long."""

    def __init__(self, send: "Send", patience: float) -> None:
        self.request_id = f"req_{uuid.uuid4().hex}"
        self.status = 0
        self._send = send
        self._patience = patience

    async def send(self, message: "Message") -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            # The client's own `x-request-id` is not sent back: it may hold anything.
            headers = [*message.get("headers", ()), (b"x-request-id", self.request_id.encode())]
            message = {**message, "headers": headers}
        try:
            async with asyncio.timeout(self._patience):
                await self._send(message)
        except TimeoutError:
            raise _StalledError from None


def _check_head(scope: "Scope", max_body: int) -> None:
    """Refuse what need not be read, by what its head says."""
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if kind != b"application/json":
        raise ApiError(415, "Send JSON, with the header `Content-Type: application/json`.")
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise ApiError(415, "Send the body as it is, without `Content-Encoding`.", code="encoded")
    # h11 has checked that it is a number of at most 20 digits.
    if int(headers.get(b"content-length", 0)) > max_body:
        raise _too_large(max_body)


def _too_large(max_body: int) -> ApiError:
    return ApiError(413, f"The body is longer than {max_body} bytes. Send less at once.")


async def _departure(receive: "Receive") -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
