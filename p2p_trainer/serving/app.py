"""
The HTTP server of a defended model: OpenAI's routes, vLLM's `classify`, health and metrics.

`transformers serve` is not subclassed: its modules are no public API, and its handlers own prompt, tokens and answer,
so none of them can keep the key out of usage and errors, restrict an answer to classes, cut a long text and not the
key, or bound what waits. It serves what `p2p-trainer export` writes, which needs none of this code.
"""

import asyncio
import functools
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from ..decoding import Sampling
from .batching import BadPrompt, Closed, EngineError, Overloaded
from .connections import BACKLOG, Connection, room_for_connections
from .errors import ApiError, internal_error, invalid_request, overloaded
from .limits import Gate
from .metrics import Metrics
from .prompts import chat_prompt
from .replies import Answerer, EventStream, Part, Reply, usage_of
from .schemas import Asked, ChatRequest, ClassifyRequest, CompletionRequest, WrittenRequest


if TYPE_CHECKING:
    from ..inference import Classification
    from .engine import Engine, Prompt

logger = logging.getLogger(__name__)

MAX_BODY = 2**20

# Requests that are still read, or whose answer is on its way, beside those whose rows wait.
_IN_PASSING = 256
# Texts that are counted at a time, between which other clients have their turn.
_COUNTED = 8
# Seconds that running requests may take to end when the server is told to stop.
_GRACE = 30
_POSTED = ("/v1/chat/completions", "/v1/completions", "/v1/classify")
_READ = ("/health", "/v1/models", "/metrics")

_A = TypeVar("_A", bound=Asked)


def create_app(
    engine: "Engine",
    name: str,
    chat: bool,
    max_body: int = MAX_BODY,
    withhold_unprefixed: bool = False,
) -> Gate:
    """
    Set up the server; the engine starts and ends with it.

    Args:
        engine ([`Engine`]):
            The engine, not started yet.
        name (`str`):
            Name under which the model is served.
        chat (`bool`):
            Whether the model was trained with a chat template.
        max_body (`int`, *optional*, defaults to `1048576`):
            Longest request body, in bytes.
        withhold_unprefixed (`bool`, *optional*, defaults to `False`):
            Whether a written answer that does not begin with the prefix is withheld.

    Returns:
        [`~limits.Gate`]: an ASGI application.
    """
    metrics = Metrics(engine)
    server = _Server(engine, name, chat, Answerer(engine, metrics, withhold_unprefixed))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await engine.close()
            server.counter.shutdown(wait=False, cancel_futures=True)

    # No pages of documentation: they would have the operator's browser load scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_exception_handler(ApiError, _said)
    app.add_exception_handler(EngineError, _said)
    app.add_exception_handler(HTTPException, _said)
    app.add_exception_handler(Exception, _said)

    # Asked with HEAD by those who only want the status.
    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        alive = engine.alive
        return JSONResponse({"status": "ok" if alive else "unavailable"}, 200 if alive else 503)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [server.entry]})

    # The name of a run on the hub has a slash.
    @app.get("/v1/models/{asked:path}")
    async def model(asked: str) -> Response:
        _check_name(asked, name)
        return JSONResponse(server.entry)

    @app.get("/metrics")
    async def numbers() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/v1/classify")
    async def classify(request: Request) -> Response:
        return await server.classify(await _body(request, ClassifyRequest, name), metrics)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        asked = await _body(request, ChatRequest, name)
        prompt = chat_prompt(asked.messages, bool(engine.labels), chat)
        said = [message.content for message in asked.messages]
        longest = asked.max_completion_tokens or asked.max_tokens
        return await server.write(asked, [prompt], said, longest, request.scope["state"]["request_id"])

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = await _body(request, CompletionRequest, name)
        return await server.write(
            asked, asked.prompt, asked.prompt, asked.max_tokens, request.scope["state"]["request_id"]
        )

    return Gate(app, metrics, (*_POSTED, *_READ), _POSTED, max_body, engine.max_waiting + _IN_PASSING)


def make_server(app: Gate) -> uvicorn.Server:
    """
    Set up uvicorn for the server; it leaves the log as it is. From here on, the process may have as many files open as
    the system lets it.

    Args:
        app ([`~limits.Gate`]):
            The application.

    Returns:
        `uvicorn.Server`: to be run with a socket that listens.
    """

    class Bounded(Connection):
        most = room_for_connections()

    config = uvicorn.Config(
        app,
        http=Bounded,
        backlog=BACKLOG,
        ws="none",
        lifespan="on",
        # The gate writes a line for each request, without what is the client's.
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_GRACE,
    )
    return uvicorn.Server(config)


class _Server:
    """What the routes share."""

    def __init__(self, engine: "Engine", name: str, chat: bool, answerer: Answerer) -> None:
        self.engine = engine
        self.name = name
        self.chat = chat
        self.answerer = answerer
        self.entry = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "p2p-trainer"}
        # A megabyte of text takes a tokenizer a second, in which no other client may wait.
        self.counter = ThreadPoolExecutor(1, "p2p-counter")

    async def classify(self, asked: ClassifyRequest, metrics: Metrics) -> Response:
        if not self.engine.labels:
            raise ApiError(400, "This model writes its answers, it has no classes. Use /v1/chat/completions.")
        found = await self.engine.classify(asked.input)
        for one in found:
            metrics.answer(None, one.label is None)
        head = {"id": f"classify-{time.time_ns():x}", "object": "list", "created": int(time.time())}
        return JSONResponse(
            {
                **head,
                "model": self.name,
                "data": [_entry(index, one) for index, one in enumerate(found)],
                "usage": usage_of(await self.count(asked.input), 0),
            }
        )

    async def write(
        self, asked: WrittenRequest, prompts: "Sequence[Prompt]", said: Sequence[str], longest: int | None, name: str
    ) -> Response:
        # Greedy by default, and with a seed: the same request gets the same answer.
        sampling = Sampling(
            max_new_tokens=longest,
            temperature=asked.temperature or 0.0,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            seed=asked.seed or 0,
        )
        reply = Reply(isinstance(asked, ChatRequest), self.name, self.count, said)
        if not asked.stream:
            return JSONResponse(await reply.whole(await self.answerer.answer(prompts, sampling, asked.stop)))
        pieces = self.answerer.stream(prompts[0], sampling, asked.stop)
        # What can't be asked, or not now, shows here, while there is still a status to say it with.
        first: Part = await anext(pieces)
        usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
        return EventStream(reply.events(first, pieces, usage), pieces, functools.partial(_last_words, name))

    async def count(self, texts: Sequence[str]) -> int:
        loop = asyncio.get_running_loop()
        total = 0
        for start in range(0, len(texts), _COUNTED):
            counts = map(self.engine.count_tokens, texts[start : start + _COUNTED])
            total += await loop.run_in_executor(self.counter, sum, counts)
        return total


def _entry(index: int, found: "Classification") -> dict[str, Any]:
    """One entry as vLLM writes it, with the classes by name; the probabilities of a withheld answer would tell it."""
    withheld = found.label is None
    return {
        "index": index,
        "label": found.label,
        "probs": [] if withheld else list(found.scores.values()),
        "num_classes": len(found.scores),
        "score": None if withheld else found.score,
        "scores": {} if withheld else found.scores,
    }


async def _body(request: Request, kind: type[_A], name: str) -> _A:
    # Read by pydantic and not by `json`: it bounds depth and numbers, and refuses what is no Unicode.
    try:
        asked = kind.model_validate_json(await request.body())
    except ValidationError as error:
        raise invalid_request(error) from None
    _check_name(asked.model, name)
    return asked


def _check_name(asked: str, name: str) -> None:
    if asked != name:
        message = f"The model does not exist. This server has {name!r}."
        raise ApiError(404, message, "model", "model_not_found")


def _as_api_error(error: Exception, request_id: str) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BadPrompt):
        return ApiError(400, str(error), code="bad_prompt")
    if isinstance(error, Overloaded):
        return overloaded("Too many requests are waiting.")
    if isinstance(error, Closed):
        return ApiError(503, "The server is shutting down.", code="closed", headers={"retry-after": "5"})
    if isinstance(error, HTTPException):
        known = {404: "There is no such route.", 405: "The route has no such method."}
        return ApiError(error.status_code, known.get(error.status_code, "Bad request."), headers=error.headers)
    return internal_error(request_id)


async def _said(request: Request, error: Exception) -> Response:
    return _as_api_error(error, request.scope["state"]["request_id"]).response()


def _last_words(request_id: str, error: Exception) -> str:
    if not isinstance(error, ApiError | EngineError):
        logger.error("%s failed in the middle of a stream.", request_id, exc_info=error)
    return json.dumps(_as_api_error(error, request_id).body())
