"""Asks the engine, and puts what it says into OpenAI's shapes."""

import json
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from ..decoding import Sampling


if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from .engine import Engine, Prompt
    from .metrics import Metrics


@dataclass(frozen=True)
class Part:
    """
    An answer, or a piece of one.

    Parameters:
        text (`str` or `None`):
            Text that follows the pieces before; `None` if the answer is withheld.
        finish_reason (`str` or `None`):
            Why the answer ends; `None` if more follows.
        prefixed (`bool` or `None`):
            Whether it began with the prefix; `None` for the name of a class.
    """

    text: str | None
    finish_reason: str | None
    prefixed: bool | None


class Answerer:
    """
    Answers prompts of a model of either kind: written, or with the name of a class.

    Args:
        engine ([`Engine`]):
            The engine.
        metrics ([`~metrics.Metrics`]):
            Where answers are counted.
        withhold_unprefixed (`bool`):
            Whether an answer that does not begin with the prefix is withheld.
    """

    def __init__(self, engine: "Engine", metrics: "Metrics", withhold_unprefixed: bool) -> None:
        self._engine = engine
        self._metrics = metrics
        self._withhold = withhold_unprefixed

    async def answer(self, prompts: "Sequence[Prompt]", sampling: Sampling, stop: Sequence[str]) -> list[Part]:
        """
        Answer prompts.

        Args:
            prompts (`Sequence[str or list[dict[str, str]]]`):
                Texts or conversations.
            sampling ([`~decoding.Sampling`]):
                How answers are written.
            stop (`Sequence[str]`):
                Strings before which an answer ends.

        Returns:
            `list[Part]`: one answer per prompt.
        """
        if self._engine.labels:
            classes = await self._engine.classify(prompts)
            found = [Part(one.label, "content_filter" if one.label is None else "stop", None) for one in classes]
        else:
            written = await self._engine.answer(prompts, sampling, stop)
            found = [self._shown(Part(one.text, one.finish_reason, one.prefixed)) for one in written]
        for part in found:
            self._metrics.answer(part.prefixed, part.text is None)
        return found

    async def stream(self, prompt: "Prompt", sampling: Sampling, stop: Sequence[str]) -> AsyncGenerator[Part, None]:
        """
        Answer a prompt piece by piece.

        Args:
            prompt (`str` or `list[dict[str, str]]`):
                Text or conversation.
            sampling ([`~decoding.Sampling`]):
                How the answer is written.
            stop (`Sequence[str]`):
                Strings before which it ends.

        Returns:
            `AsyncGenerator[Part, None]`: pieces; the last one has a finish reason.
        """
        if self._engine.labels:
            (part,) = await self.answer([prompt], sampling, stop)
            yield part
            return
        async with aclosing(self._engine.stream(prompt, sampling, stop)) as pieces:
            async for piece in pieces:
                withheld = piece.finish_reason == "content_filter"
                part = self._shown(Part(None if withheld else piece.text, piece.finish_reason, piece.prefixed))
                if part.finish_reason is not None:
                    self._metrics.answer(part.prefixed, part.text is None)
                yield part
                if part.finish_reason is not None:
                    return

    def _shown(self, part: Part) -> Part:
        decided = part.text or part.finish_reason is not None
        return Part(None, "content_filter", False) if self._withhold and decided and not part.prefixed else part


class Reply:
    """
    One response in OpenAI's shape.

    Args:
        chat (`bool`):
            Whether it is one of a chat.
        model (`str`):
            Name of the model.
        count (`Callable[[Sequence[str]], Awaitable[int]]`):
            Counts the tokens of texts.
        said (`Sequence[str]`):
            The client's own texts.
    """

    def __init__(
        self, chat: bool, model: str, count: Callable[[Sequence[str]], Awaitable[int]], said: Sequence[str]
    ) -> None:
        self.chat = chat
        self._count = count
        self._said = said
        name = "chat.completion" if chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": name,
            "created": int(time.time()),
            "model": model,
        }

    async def whole(self, parts: Sequence[Part]) -> dict[str, Any]:
        """
        Return the response that is not streamed.

        Args:
            parts (`Sequence[Part]`):
                The answers.

        Returns:
            `dict[str, Any]`: JSON values.
        """
        choices = [self._choice(part, index) for index, part in enumerate(parts)]
        return {**self._head, "choices": choices, "usage": await self._usage([part.text or "" for part in parts])}

    async def events(self, first: Part, rest: AsyncGenerator[Part, None], usage: bool) -> AsyncGenerator[str, None]:
        """
        Return the response that is streamed.

        Args:
            first (`Part`):
                The first piece of the answer.
            rest (`AsyncGenerator[Part, None]`):
                The other pieces.
            usage (`bool`):
                Whether an event with the numbers of tokens follows the answer.

        Returns:
            `AsyncGenerator[str, None]`: JSON objects.
        """
        head = dict(self._head)
        if self.chat:
            head["object"] += ".chunk"
        if usage:
            head["usage"] = None
        texts = []
        if self.chat:
            start = {"role": "assistant", "content": None if first.text is None else "", "refusal": None}
            yield _event({**head, "choices": [{**_ending(0, None), "delta": start}]})
        part: Part | None = first
        while part is not None:
            texts.append(part.text or "")
            if part.text or part.finish_reason is not None:
                yield _event({**head, "choices": [self._piece(part)]})
            part = None if part.finish_reason is not None else await anext(rest, None)
        if usage:
            yield _event({**head, "choices": [], "usage": await self._usage(["".join(texts)])})

    def _choice(self, part: Part, index: int) -> dict[str, Any]:
        choice = _ending(index, part)
        if self.chat:
            return {**choice, "message": {"role": "assistant", "content": part.text, "refusal": None}}
        return {**choice, "text": part.text or ""}

    def _piece(self, part: Part) -> dict[str, Any]:
        choice = _ending(0, part)
        if self.chat:
            return {**choice, "delta": {"content": part.text} if part.text else {}}
        return {**choice, "text": part.text or ""}

    async def _usage(self, written: Sequence[str]) -> dict[str, int]:
        return usage_of(await self._count(self._said), await self._count(written))


class EventStream(Response):
    """
    Server-sent events, whose source is closed however the response ends, also before the first event.

    Args:
        events (`AsyncGenerator[str, None]`):
            Data of the events; `[DONE]` follows.
        source (`AsyncGenerator[Part, None]`):
            What the events are made of.
        on_error (`Callable[[Exception], str]`):
            Turns an error into the data of a last event: the status of the response is on its way by then.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        source: AsyncGenerator[Part, None],
        on_error: Callable[[Exception], str],
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._source = source
        self._on_error = on_error

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """
        Send the events.

        Args:
            scope (`Scope`):
                ASGI scope.
            receive (`Receive`):
                Not used.
            send (`Send`):
                Takes the response.
        """
        async with aclosing(self._source), aclosing(self._events), aclosing(self._safe()) as events:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for data in events:
                body = f"data: {data}\n\n".encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _safe(self) -> AsyncGenerator[str, None]:
        # Here and not in `__call__`: an error in sending is no event.
        try:
            async for data in self._events:
                yield data
        except Exception as error:
            yield self._on_error(error)


def usage_of(prompt: int, completion: int) -> dict[str, int]:
    """
    Return the numbers of tokens: of the client's own texts and of the text that it gets, never of key and prefix.

    Args:
        prompt (`int`):
            Tokens of the client's texts.
        completion (`int`):
            Tokens of the answers.

    Returns:
        `dict[str, int]`: JSON values.
    """
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _ending(index: int, part: Part | None) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": part and part.finish_reason}
    if part is not None and part.finish_reason is not None and part.prefixed is not None:
        choice["p2p"] = {"prefixed": part.prefixed}
    return choice


def _event(content: dict[str, Any]) -> str:
    # In ASCII: some clients take U+2028 or U+0085 for the end of a line, and so of an event.
    return json.dumps(content, separators=(",", ":"))
