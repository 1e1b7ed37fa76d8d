"""Requests that wait for the model: a bounded queue between event loops and the one thread that owns the model."""

import asyncio
import contextlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


# Longest pause for the clients of the last batch to come back before the next one begins: seconds, or a share of what
# that batch took, whichever is more. Thirty clients need some milliseconds of their own to read and ask again.
GATHERING = 0.002
GATHERING_SHARE = 0.05


class EngineError(Exception):
    """A request that gets no answer. The message may be shown to the client: it never holds the key."""


class Overloaded(EngineError):
    """Too much is waiting already; the client may try again."""


class BadPrompt(EngineError):
    """The model can't be asked this, however often the client tries."""


class Closed(EngineError):
    """The engine has been closed."""


class BatchFailed(EngineError):
    """The batch that the request was in has failed; the operator's log says why."""


class Outbox:
    """
    Hands what a thread has to say to an event loop.

    What comes while the loop has not yet looked goes with the same wake-up, so that a step of a batch of 32 streams
    costs about one and not 32.

    Args:
        loop (`asyncio.AbstractEventLoop`):
            The event loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._letters: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._announced = False

    def post(self, deliver: Callable[[Any], None], letter: Any) -> None:
        """
        Have the loop call a function, after those that were posted before; may be called from any thread.

        Args:
            deliver (`Callable`):
                What the loop calls.
            letter (`Any`):
                Its argument.
        """
        self._letters.append((deliver, letter))
        if self._announced:
            return
        self._announced = True
        # A loop that is closed took all who waited with it.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        # First this: what is posted while letters are handed out announces itself, or is handed out at once.
        self._announced = False
        while self._letters:
            deliver, letter = self._letters.popleft()
            deliver(letter)


class Request:
    """
    What one client wants to know, in one or more rows.

    Args:
        prompts (`Sequence[Any]`):
            What is asked, one per row.
        send (`Callable[[Any], None]`):
            Takes what the client gets: a list with the answers of all rows, or an [`EngineError`].
        lengths (`Sequence[int]`, *optional*):
            Characters of each prompt.
    """

    def __init__(
        self, prompts: Sequence[Any], send: Callable[[Any], None], lengths: Sequence[int] | None = None
    ) -> None:
        self.send = send
        lengths = lengths or [0] * len(prompts)
        self.waiting = deque(
            Row(self, place, prompt, length)
            for place, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        )
        # Answered, failed, or given up by its client: nothing more need be done for it.
        self.ended = False
        self._answers: list[Any] = [None] * len(prompts)
        self._missing = len(prompts)

    def answer(self, place: int, answer: Any) -> None:
        """
        Answer one row; the client is told when the last of them is answered.

        Args:
            place (`int`):
                Which row.
            answer (`Any`):
                Its answer.
        """
        self._answers[place] = answer
        self._missing -= 1
        if not self._missing and not self.ended:
            self.ended = True
            self.send(self._answers)

    def fail(self, error: EngineError) -> None:
        """
        Tell the client that there will be no answer.

        Args:
            error ([`EngineError`]):
                Why.
        """
        if not self.ended:
            self.ended = True
            self.send(error)


@dataclass(eq=False, slots=True)
class Row:
    """
    One row of a request.

    Parameters:
        request ([`Request`]):
            The request.
        place (`int`):
            Which of its rows.
        prompt (`Any`):
            What is asked.
        length (`int`):
            Its characters.
        answered (`bool`, *optional*, defaults to `False`):
            Whether it has its answer.
    """

    request: Request
    place: int
    prompt: Any
    length: int
    answered: bool = False

    def answer(self, answer: Any) -> None:
        """
        Answer this row.

        Args:
            answer (`Any`):
                The answer.
        """
        self.answered = True
        self.request.answer(self.place, answer)


class RowQueue:
    """
    Rows that wait, from which one thread takes batches.

    A batch takes one row of each request in turn, and the requests that it did not reach come first in the next one.
    So a single text that comes behind a request of a thousand is answered with the next batch, and of two large
    requests neither waits for the other.

    A batch begins as soon as there is a row, but for a pause of at most 2 ms, or 5 % of what the last batch took, in
    which as many rows may come as that had: clients that ask again as soon as they are answered would otherwise split
    into one row that the model begins with, and all the rest.

    One request may take a quarter of the room at most, so that it takes four clients to fill it.

    Args:
        limit (`int`):
            Rows that may wait.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.share = max(1, limit // 4)
        self._changed = threading.Condition()
        self._requests: OrderedDict[Request, None] = OrderedDict()
        self._waiting = 0
        self._running: list[Row] = []
        self._wanted = 1
        self._last = 1
        self._taken = 0.0
        self._closed = False

    @property
    def waiting(self) -> int:
        """`int`: rows that wait."""
        return self._waiting

    @property
    def running(self) -> int:
        """`int`: rows of the batch that was taken last, while it runs."""
        return len(self._running)

    @property
    def closed(self) -> bool:
        """`bool`: whether it takes no more requests."""
        return self._closed

    def put(self, request: Request) -> None:
        """
        Add all rows of a request.

        Args:
            request ([`Request`]):
                The request.

        Raises:
            [`BadPrompt`]: it has more rows than one request may have.
            [`Overloaded`]: too many rows wait already.
            [`Closed`]: the queue is closed.
        """
        count = len(request.waiting)
        with self._changed:
            if self._closed:
                raise Closed("The server is shutting down and takes no more requests.")
            if count > self.share:
                raise BadPrompt(
                    f"The request has {count} prompts, and may have {self.share} at most. Send several requests."
                )
            if self._waiting + count > self.limit:
                raise Overloaded(
                    f"{self._waiting} of at most {self.limit} prompts are waiting already, too many for {count} more. "
                    f"Try again later."
                )
            self._requests[request] = None
            self._waiting += count
            if self._waiting >= self._wanted:
                self._changed.notify()

    def drop(self, request: Request) -> None:
        """
        End a request, and make room of those of its rows that still wait.

        Args:
            request ([`Request`]):
                The request.
        """
        with self._changed:
            request.ended = True
            if request in self._requests:
                del self._requests[request]
                self._waiting -= len(request.waiting)
                request.waiting.clear()

    def take(self, count: int, length: int) -> list[Row]:
        """
        Wait for rows, and take the next batch. The one before it counts as done.

        Args:
            count (`int`):
                Rows of a batch.
            length (`int`):
                Characters from which on a batch takes no further row.

        Returns:
            `list[Row]`: at least one row, or none once the queue is closed.
        """
        with self._changed:
            took = time.monotonic() - self._taken if self._running else 0.0
            self._running = []
            while True:
                self._await(1)
                self._await(min(self._last, count), max(GATHERING, GATHERING_SHARE * took))
                # Meanwhile clients may have given up all that was there.
                if self._waiting or self._closed:
                    break
            while self._waiting and len(self._running) < count and length > 0:
                request, _ = self._requests.popitem(last=False)
                self._running.append(request.waiting.popleft())
                length -= self._running[-1].length
                self._waiting -= 1
                if request.waiting:
                    self._requests[request] = None
            self._last = len(self._running)
            self._taken = time.monotonic()
            return list(self._running)

    def close(self) -> list[Request]:
        """
        Take no more requests.

        Returns:
            `list[Request]`: all that are not answered, those of the running batch among them.
        """
        with self._changed:
            self._closed = True
            left = [*dict.fromkeys([*self._requests, *(row.request for row in self._running)])]
            for request in self._requests:
                request.waiting.clear()
            self._requests.clear()
            self._waiting = 0
            self._changed.notify()
            return left

    def _await(self, rows: int, timeout: float | None = None) -> None:
        self._wanted = rows
        self._changed.wait_for(lambda: self._waiting >= rows or self._closed, timeout)
        self._wanted = 1
