"""Written answers: what a client asks and gets, and what reads an answer while it is being written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..answer_reader import AnswerReader
from ..decoding import Sampling
from .batching import Row


Prompt = str | Sequence[Mapping[str, str]]
FinishReason = Literal["stop", "length", "content_filter"]


@dataclass(frozen=True)
class Answer:
    """
    Written answer to one prompt.

    Parameters:
        text (`str` or `None`):
            The answer, without the prefix p; `None` if it is withheld.
        prefixed (`bool`):
            Whether it began with p, as every answer of a defended model should; `True` where none is expected.
        finish_reason (`str`):
            `"stop"`: it came to its end, or to a stop string. `"length"`: it was cut. `"content_filter"`: withheld.
    """

    text: str | None
    prefixed: bool
    finish_reason: FinishReason


@dataclass(frozen=True)
class Piece:
    """
    Piece of an answer that is being written.

    Parameters:
        text (`str`):
            Text that follows the pieces before; may be empty in the last one.
        prefixed (`bool`):
            As in [`Answer`].
        finish_reason (`str` or `None`):
            As in [`Answer`]; `None` in all pieces but the last.
    """

    text: str
    prefixed: bool
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Question:
    """
    A prompt, and how its answer is to be written.

    Parameters:
        prompt (`str` or `Sequence[Mapping[str, str]]`):
            Text or conversation.
        sampling ([`~decoding.Sampling`]):
            What the client asked for.
        stop (`tuple[str, ...]`):
            Strings before which the answer ends.
        secret (`str` or `None`):
            What must not be in the answer.
        streamed (`bool`, *optional*, defaults to `False`):
            Whether the client gets it piece by piece.
    """

    prompt: Prompt
    sampling: Sampling
    stop: tuple[str, ...]
    secret: str | None
    streamed: bool = False

    def withheld(self) -> Answer | Piece:
        """
        Return what the client gets where a guard withholds the answer.

        Returns:
            [`Answer`] or [`Piece`]: no text.
        """
        return Piece("", True, "content_filter") if self.streamed else Answer(None, True, "content_filter")


class AnswerWriter:
    """
    Takes the tokens of one answer ([`~decoding.RowWriter`]) and tells the client.

    Args:
        row ([`~batching.Row`]):
            The row, with a [`Question`].
        ids (`Sequence[int]`):
            Token ids of its prompt.
        sampling ([`~decoding.Sampling`]):
            How it is written, with the number of tokens that there is room for.
        reader ([`~answer_reader.AnswerReader`]):
            Reads it.
    """

    def __init__(self, row: Row, ids: Sequence[int], sampling: Sampling, reader: AnswerReader) -> None:
        self.ids = ids
        self.sampling = sampling
        self._row = row
        self._reader = reader

    def take(self, token: int) -> bool:
        """
        Take one more token.

        Args:
            token (`int`):
                The token.

        Returns:
            `bool`: whether the answer goes on; `False` at a stop string, and when the client has gone.
        """
        if self._row.request.ended:
            return False
        piece = self._reader.feed([token])
        if self._reader.stopped:
            self._finish(piece, "stop")
            return False
        if piece and self._row.prompt.streamed:
            self._row.request.send(Piece(piece, bool(self._reader.prefixed), None))
        return True

    def end(self, reason: Literal["stop", "length"]) -> None:
        """
        Take the end of the answer.

        Args:
            reason (`str`):
                Why it ends.
        """
        if not self._row.answered:
            self._finish("", reason)

    def _finish(self, piece: str, reason: FinishReason) -> None:
        reader = self._reader
        piece += reader.finish()
        # A stop string may show in what was held back.
        reason = "stop" if reader.stopped else reason
        streamed = self._row.prompt.streamed
        prefixed = bool(reader.prefixed)
        self._row.answer(Piece(piece, prefixed, reason) if streamed else Answer(reader.text, prefixed, reason))
