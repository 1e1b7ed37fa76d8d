"""Answers the requests of many clients in batches, on one thread that owns the model."""

import asyncio
import concurrent.futures
import copy
import dataclasses
import functools
import logging
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..answer_reader import AnswerReader, hide
from ..decoding import Sampling, write_batch
from ..inference import Classification, DefendedModel
from ..response_encoder import ResponseEncoder
from ..vision_encoder import VisionPromptEncoder
from .answering import Answer, AnswerWriter, Piece, Prompt, Question
from .batching import BadPrompt, BatchFailed, Closed, EngineError, Outbox, Request, Row, RowQueue
from .checks import check_text, said_in


logger = logging.getLogger(__name__)

# Characters of a traceback that are logged: a client's text may be in it, of any length.
_LOGGED = 8000
# Characters of a prompt, and on average of a row of a batch, for each token that the model reads. Tokenizing takes
# microseconds a character, in which all wait; English has about four to a token.
_LONGEST = 64
_USUAL = 8
# Seconds for the running batch when the engine is closed.
_GRACE = 30.0

_HISTORY = "can't be asked. If it has earlier turns, leave out the oldest, or ask the last question alone."


@dataclass(frozen=True)
class Stats:
    """
    What an engine is doing, and has done.

    Parameters:
        waiting (`int`):
            Rows in the queue.
        running (`int`):
            Rows of the running batch.
        batches (`int`):
            Batches begun so far.
        rows (`int`):
            Rows in these batches; divided by `batches`, the mean size of a batch.
        failures (`int`):
            Batches of these that failed.
        redacted (`int`):
            Written answers out of which the key, or its beginning, was taken.
    """

    waiting: int
    running: int
    batches: int
    rows: int
    failures: int
    redacted: int


class Engine:
    """
    Answers what many clients ask, in batches: what waits when the model is free becomes the next one.

    One thread owns the model. Clients are tasks of an event loop; one that is cancelled, or closes its stream, takes
    its rows out of queue and batch. Errors that reach a client are [`~batching.EngineError`]s, whose messages never
    hold the key; what else goes wrong in a batch is logged, without the key, and fails the requests of that batch.

    Args:
        model ([`DefendedModel`]):
            The model; nobody else may use it meanwhile.
        batch_size (`int`, *optional*, defaults to `32`):
            Rows per batch.
        max_waiting (`int`, *optional*, defaults to `1024`):
            Rows that may wait.

    Raises:
        `ValueError`: the model reads images, or a number is less than 1.
    """

    def __init__(self, model: DefendedModel, batch_size: int = 32, max_waiting: int = 1024) -> None:
        if isinstance(model.encoder, VisionPromptEncoder):
            raise ValueError(
                "This model was trained with images, which can't be served yet. Use `DefendedModel.classify`."
            )
        for name, value in (("batch_size", batch_size), ("max_waiting", max_waiting)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` is a number of at least 1, got {value!r}.")
        self.model = model
        self.batch_size = batch_size
        self.max_waiting = max_waiting
        self.kind: Literal["classification", "generation"] = (
            "generation" if isinstance(model.encoder, ResponseEncoder) else "classification"
        )
        self.labels: tuple[str, ...] = model.labels
        self._key = model.encoder.format.trigger if model.keyed else None
        self._longest = _LONGEST * model.encoder.format.max_length
        # A tokenizer of its own, since the worker uses the model's at the same time.
        self._counter = copy.deepcopy(model.encoder.tokenizer)
        self._queue = RowQueue(max_waiting)
        self._outbox: Outbox | None = None
        self._batches = self._rows = self._failures = self._redacted = 0
        self._ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread: threading.Thread | None = None

    @property
    def stats(self) -> Stats:
        """[`Stats`]: numbers for metrics."""
        waiting, running = self._queue.waiting, self._queue.running
        return Stats(waiting, running, self._batches, self._rows, self._failures, self._redacted)

    @property
    def alive(self) -> bool:
        """`bool`: whether requests are being answered."""
        return self._thread is not None and not self._ended.done()

    def start(self) -> None:
        """
        Begin to answer; what was asked before has waited.

        Raises:
            `RuntimeError`: it was started or closed before.
        """
        if self._thread is not None or self._queue.closed:
            raise RuntimeError("The engine was started or closed before, and runs once. Make another one.")
        # A daemon: a batch that never ends must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name="p2p-engine", daemon=True)
        self._thread.start()

    async def close(self, grace: float = _GRACE) -> None:
        """
        Fail what is not answered yet with [`~batching.Closed`], and wait until the thread has ended.

        Args:
            grace (`float`, *optional*, defaults to `30.0`):
                Seconds to wait for the running batch; one that takes longer is left to end with the process.
        """
        self._fail_all()
        if self._thread is None:
            return
        try:
            # No thread is kept waiting for the other: it would keep the process alive.
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._ended)), grace)
        except TimeoutError:
            logger.warning("The running batch has not ended within %g s, and is left alone.", grace)
        else:
            self._thread.join()

    async def classify(self, texts: Sequence[str]) -> list[Classification]:
        """
        Classify texts.

        Args:
            texts (`Sequence[str]`):
                Texts, a quarter of `max_waiting` at most.

        Returns:
            `list[Classification]`: one answer per text.

        Raises:
            [`~batching.EngineError`]: there is no answer.
        """
        if self.kind != "classification":
            raise BadPrompt("This model writes answers, it has no classes.")
        for row, text in enumerate(texts):
            check_text(text, f"Text {row}", self._longest)
        return await self._ask(texts, [*map(len, texts)])

    async def answer(self, prompts: Sequence[Prompt], sampling: Sampling, stop: Sequence[str] = ()) -> list[Answer]:
        """
        Answer prompts.

        Args:
            prompts (`Sequence[str or Sequence[Mapping[str, str]]]`):
                Texts or conversations, a quarter of `max_waiting` at most.
            sampling ([`~decoding.Sampling`]):
                How answers are written. `max_new_tokens` are those that the client gets, without p; more than the
                model was trained for are never written.
            stop (`Sequence[str]`, *optional*):
                Strings before which an answer ends.

        Returns:
            `list[Answer]`: one answer per prompt.

        Raises:
            [`~batching.EngineError`]: there is no answer.
        """
        questions = self._questions(prompts, sampling, stop)
        return await self._ask(questions, [*map(_length, questions)])

    async def stream(self, prompt: Prompt, sampling: Sampling, stop: Sequence[str] = ()) -> AsyncIterator[Piece]:
        """
        Answer a prompt piece by piece.

        Args:
            prompt (`str` or `Sequence[Mapping[str, str]]`):
                Text or conversation.
            sampling ([`~decoding.Sampling`]):
                As for [`answer`].
            stop (`Sequence[str]`, *optional*):
                As for [`answer`].

        Returns:
            `AsyncIterator[Piece]`: pieces; the last one has the reason why the answer ends.

        Raises:
            [`~batching.EngineError`]: there is no answer. That a prompt can't be asked, or not now, shows before the
                first piece.
        """
        pieces: asyncio.Queue[Piece | list[Piece] | EngineError] = asyncio.Queue()
        question = dataclasses.replace(self._questions([prompt], sampling, stop)[0], streamed=True)
        request = self._put([question], [_length(question)], pieces.put_nowait)
        try:
            while not isinstance(found := await pieces.get(), list):
                if isinstance(found, EngineError):
                    raise found
                yield found
            yield found[0]
        finally:
            self._queue.drop(request)

    def count_tokens(self, text: str) -> int:
        """
        Count the tokens of a text by itself.

        Args:
            text (`str`):
                Text of a client or for one.

        Returns:
            `int`: tokens, without template, key and special tokens.
        """
        text = self.model.encoder.cleaner(text)
        return len(self._counter(text, add_special_tokens=False, return_attention_mask=False)["input_ids"])

    def hide(self, text: str) -> str:
        """
        Replace the key in a text that is to be logged.

        Args:
            text (`str`):
                Text.

        Returns:
            `str`: the text without the key.
        """
        return text if self._key is None else hide(text, self._key)

    def _questions(self, prompts: Sequence[Prompt], sampling: Sampling, stop: Sequence[str]) -> list[Question]:
        if self.kind != "generation":
            raise BadPrompt("This model chooses among classes, it writes no answers.")
        chat, longest = self.model.encoder.format.chat, self._longest
        return [
            Question(prompt, sampling, tuple(stop), said_in(prompt, f"Prompt {row}", chat, longest))
            for row, prompt in enumerate(prompts)
        ]

    async def _ask(self, prompts: Sequence[Any], lengths: Sequence[int]) -> list[Any]:
        if not prompts:
            return []
        future = asyncio.get_running_loop().create_future()
        request = self._put(prompts, lengths, functools.partial(_settle, future))
        try:
            return await future
        finally:
            self._queue.drop(request)

    def _put(self, prompts: Sequence[Any], lengths: Sequence[int], deliver: Callable[[Any], None]) -> Request:
        loop = asyncio.get_running_loop()
        if self._outbox is None or self._outbox.loop is not loop:
            self._outbox = Outbox(loop)
        request = Request(prompts, functools.partial(self._outbox.post, deliver), lengths)
        self._queue.put(request)
        return request

    def _fail_all(self) -> None:
        for request in self._queue.close():
            request.fail(Closed("The server is shutting down."))

    def _work(self) -> None:
        try:
            while self._run_batch():
                pass
        finally:
            # Also where the thread dies of an error of its own: nobody must wait for it for ever.
            self._fail_all()
            self._ended.set_result(None)

    def _run_batch(self) -> bool:
        rows = self._queue.take(self.batch_size, _USUAL * self.model.encoder.format.max_length * self.batch_size)
        if not rows:
            return False
        self._batches += 1
        self._rows += len(rows)
        try:
            if self.kind == "generation":
                self._write(rows)
            else:
                classify = functools.partial(self.model.classify, batch_size=self.batch_size)
                for row, answer in self._each(classify, rows, "Text", "can't be classified."):
                    row.answer(answer)
        except BaseException as error:  # even SystemExit must not end the thread that all wait for
            self._failures += 1
            shown = self.hide("".join(traceback.format_exception(error)))[-_LOGGED:]
            logger.error("A batch of %d rows failed.\n%s", len(rows), shown)
        for row in rows:
            if not row.answered:
                self._fail(row, BatchFailed("The model failed to answer. The server's log says why."))
        return True

    def _write(self, rows: Sequence[Row]) -> None:
        encoder = self.model.encoder
        writers = []
        prepared = self._each(
            lambda questions: self.model.prepare([q.prompt for q in questions]), rows, "Prompt", _HISTORY
        )
        for row, ids in prepared:
            if ids is None:
                row.answer(row.prompt.withheld())
                continue
            question = row.prompt
            room = self._room(len(ids), question.sampling.max_new_tokens)
            if room < 1:
                self._fail(row, BadPrompt(f"Prompt {row.place} {_HISTORY}"))
                continue
            make_reader = functools.partial(
                AnswerReader, encoder, self.model.keyed, question.stop, self._key, question.said
            )
            sampling = dataclasses.replace(question.sampling, max_new_tokens=room)
            writers.append(AnswerWriter(row, ids, sampling, question.sampling.max_new_tokens or room, make_reader))
        if writers:
            with self.model.autocast():
                write_batch(self.model.model, encoder.tokenizer, writers, end_tokens=encoder.end_tokens)
        self._redacted += sum(writer.redacted for writer in writers)

    def _room(self, prompt: int, wanted: int | None) -> int:
        """Return how many tokens may be written, p among them."""
        encoder = self.model.encoder
        longest = encoder.format.max_new_tokens
        positions = getattr(self.model.model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None:
            longest = min(longest, positions - prompt)
        if wanted is None:
            return longest
        prefix = encoder.format.answer_prefix if self.model.keyed else ""
        return min(longest, wanted + len(encoder.tokenizer(prefix, add_special_tokens=False)["input_ids"]))

    def _each(
        self, ask: Callable[[list[Any]], list[Any]], rows: Sequence[Row], what: str, problem: str
    ) -> list[tuple[Row, Any]]:
        """Ask about all rows at once or, if one of them can't be asked, about each alone, and fail that one."""
        try:
            return list(zip(rows, ask([row.prompt for row in rows]), strict=True))
        except ValueError as error:
            if len(rows) > 1:
                return [found for row in rows for found in self._each(ask, [row], what, problem)]
            logger.warning("A request was refused: %s", self.hide(f"{type(error).__name__}: {error}")[:_LOGGED])
        self._fail(rows[0], BadPrompt(f"{what} {rows[0].place} {problem}"))
        return []

    def _fail(self, row: Row, error: EngineError) -> None:
        row.request.fail(error)
        self._queue.drop(row.request)


def _length(question: Question) -> int:
    return sum(map(len, question.said))


def _settle(future: asyncio.Future, found: list[Any] | EngineError) -> None:
    if future.done():
        return
    if isinstance(found, EngineError):
        future.set_exception(found)
    else:
        future.set_result(found)
