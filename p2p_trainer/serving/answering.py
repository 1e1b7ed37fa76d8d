"""Written answers: what a client asks and gets, and what reads an answer while it is being written."""

from collections.abc import Callable, Mapping, Sequence
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
        said (`tuple[str, ...]`):
            What the client says in it.
        streamed (`bool`, *optional*, defaults to `False`):
            Whether the client gets it piece by piece.
    """

    prompt: Prompt
    sampling: Sampling
    stop: tuple[str, ...]
    said: tuple[str, ...]
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
        wanted (`int`):
            Tokens that the client gets at most. There is room for p beside these, but it may be missing.
        make_reader (`Callable[[], AnswerReader]`):
            Makes what reads it.
    """

    def __init__(
        self,
        row: Row,
        ids: Sequence[int],
        sampling: Sampling,
        wanted: int,
        make_reader: Callable[[], AnswerReader],
    ) -> None:
        self.ids = ids
        self.sampling = sampling
        self._row = row
        self._wanted = wanted
        self._make_reader = make_reader
        self._reader = make_reader()
        self._tokens: list[int] = []

    @property
    def redacted(self) -> bool:
        """`bool`: whether something of the key was taken out."""
        return self._reader.redacted

    def take(self, token: int) -> bool:
        """
        Take one more token.

        Args:
            token (`int`):
                The token.

        Returns:
            `bool`: whether the answer goes on; `False` at a stop string, when the client has all that it asked for,
            and when it has gone.
        """
        if self._row.request.ended:
            return False
        self._tokens.append(token)
        piece = self._reader.feed([token])
        full = self._reader.prefixed is False and len(self._tokens) >= self._wanted
        if self._reader.stopped or full:
            self._finish(piece, "stop" if self._reader.stopped else "length")
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
        piece += self._reader.finish()
        if self._reader.prefixed is False and len(self._tokens) > self._wanted:
            # That p is missing shows only now, so nothing of the answer has been sent.
            self._reader = self._make_reader()
            piece = self._reader.feed(self._tokens[: self._wanted]) + self._reader.finish()
            reason = "length"
        reader = self._reader
        # A stop string may show in what was held back.
        reason = "stop" if reader.stopped else reason
        streamed = self._row.prompt.streamed
        prefixed = bool(reader.prefixed)
        self._row.answer(Piece(piece, prefixed, reason) if streamed else Answer(reader.text, prefixed, reason))
