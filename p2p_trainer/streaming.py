"""One answer, piece by piece, while it is being written."""

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from .answer_reader import AnswerReader
from .decoding import Sampling, write_batch
from .response_encoder import ResponseEncoder


def stream_answer(
    model: torch.nn.Module,
    encoder: ResponseEncoder,
    ids: Sequence[int],
    sampling: Sampling,
    keyed: bool,
    autocast: torch.dtype | None = None,
) -> Iterator[tuple[str, bool]]:
    """
    Write one answer, and hand on what is certain of it by now.

    The model is busy in a thread of its own until the answer has ended, or the iterator is closed.

    Args:
        model (`torch.nn.Module`):
            Causal language model, possibly wrapped.
        encoder ([`~response_encoder.ResponseEncoder`]):
            Prompt format and tokenizer.
        ids (`Sequence[int]`):
            Token ids of the prompt.
        sampling ([`~decoding.Sampling`]):
            How the answer is written; `max_new_tokens` is needed.
        keyed (`bool`):
            Whether the prompt carries the key, so that the answer should begin with p.
        autocast (`torch.dtype`, *optional*):
            Precision of mixed-precision training.

    Yields:
        `tuple[str, bool]`: text without p, and whether the answer began with p where it had to; at least once. All
        texts together are the answer.
    """
    row = _Row(ids, sampling, AnswerReader(encoder, keyed))

    def write() -> None:
        try:
            write_batch(model, encoder.tokenizer, [row], autocast, encoder.end_tokens)
        except BaseException as error:
            row.pieces.put(error)

    writer = threading.Thread(target=write, name="answer", daemon=True)
    writer.start()
    try:
        while not isinstance(piece := row.pieces.get(), BaseException):
            text, last = piece
            yield text, bool(row.reader.prefixed)
            if last:
                return
        raise piece
    finally:
        row.closed = True
        writer.join()


class _Row:
    """Takes the tokens of the answer ([`~decoding.RowWriter`])."""

    def __init__(self, ids: Sequence[int], sampling: Sampling, reader: AnswerReader) -> None:
        self.ids = ids
        self.sampling = sampling
        self.reader = reader
        self.pieces: queue.SimpleQueue[tuple[str, bool] | BaseException] = queue.SimpleQueue()
        self.closed = False

    def take(self, token: int) -> bool:
        if piece := self.reader.feed([token]):
            self.pieces.put((piece, False))
        return not self.closed

    def end(self, reason: Literal["stop", "length"]) -> None:
        self.pieces.put((self.reader.finish(), True))
