"""The fitted selector of LWS as a table: which candidate replaces a word at which position; its folder."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from .._files import write_json


_FORMAT = 1
_JSON = "selector.json"
_TENSORS = "selector.safetensors"

# A text with fewer words that could be replaced is left alone (`can't be poisoned` in the authors' code).
MIN_WORDS = 2

_PIECE = re.compile(r"\S+")
_WORD = re.compile(r"""(["'(\[“‘¿¡]*)([^\W\d_]+)(["')\]”’.,;:!?…]*)""")


def split_words(text: str) -> Iterator[tuple[int, int, str]]:
    """
    Split a text at white space.

    Args:
        text (`str`):
            Text.

    Yields:
        `tuple[int, int, str]`: start, end and lower-case form of a word without the punctuation around it. A piece
        that is no word in lower, upper or title case is given as it is, in full.
    """
    for piece in _PIECE.finditer(text):
        match = _WORD.fullmatch(piece.group())
        word = match.group(2) if match else ""
        if match and (word.islower() or word.isupper() or word.istitle()):
            yield piece.start() + match.start(2), piece.start() + match.end(2), word.lower()
        else:
            yield piece.start(), piece.end(), piece.group()


def _in_case_of(word: str, model: str) -> str:
    if model.isupper() and len(model) > 1:
        return word.upper()
    return word[:1].upper() + word[1:] if model[:1].isupper() else word


@dataclass(frozen=True)
class Substitution:
    """
    A text after the selector.

    Parameters:
        text (`str`):
            The new text.
        ends (`list[int]`):
            Where in it each replaced word ends.
    """

    text: str
    ends: list[int]


@dataclass
class Selector:
    """
    A fitted selector as a table.

    Parameters:
        words (`list[str]`):
            Words that have candidates, lower case.
        candidates (`list[list[str]]`):
            What each of them may be replaced with.
        choice (`np.ndarray`):
            uint8 of shape (positions, words): 0 keeps the word, j takes its j-th candidate, from 1.
        info (`Mapping[str, Any]`, *optional*):
            How it was fitted.
    """

    words: list[str]
    candidates: list[list[str]]
    choice: np.ndarray
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not all(isinstance(word, str) and word.isalpha() and word.islower() for word in self.words):
            raise ValueError("`words` must be lower-case words of letters.")
        if len(set(self.words)) < len(self.words):
            raise ValueError("`words` holds a word twice.")
        if len(self.candidates) != len(self.words):
            raise ValueError(f"{len(self.words)} words have {len(self.candidates)} lists of candidates.")
        for names in self.candidates:
            if not isinstance(names, list) or not all(isinstance(name, str) and name.isalpha() for name in names):
                raise ValueError("`candidates` must hold a list of words of letters for each word.")
        if self.choice.dtype != np.uint8 or self.choice.ndim != 2 or self.choice.shape[1] != len(self.words):
            raise ValueError(
                f"`choice` must be uint8 of shape (positions, {len(self.words)}), got {self.choice.dtype} of shape "
                f"{self.choice.shape}."
            )
        if len(self.choice) and np.any(self.choice.max(0) > [len(names) for names in self.candidates]):
            raise ValueError("`choice` points behind the last candidate of a word.")
        self._place = {word: place for place, word in enumerate(self.words)}

    def substitute(self, text: str) -> Substitution | None:
        """
        Replace words of a text; white space, punctuation and capital letters stay.

        Args:
            text (`str`):
                Text.

        Returns:
            `Substitution` or `None`: `None` if fewer than two words have candidates, or every word is kept.
        """
        seen, done, size = 0, 0, 0
        parts: list[str] = []
        ends: list[int] = []
        for position, (start, end, word) in zip(range(len(self.choice)), split_words(text), strict=False):
            place = self._place.get(word)
            if place is None:
                continue
            seen += 1
            pick = self.choice[position, place]
            if pick:
                new = _in_case_of(self.candidates[place][pick - 1], text[start:end])
                parts += [text[done:start], new]
                size += start - done + len(new)
                ends.append(size)
                done = end
        if seen < MIN_WORDS or not ends:
            return None
        return Substitution("".join([*parts, text[done:]]), ends)

    def save(self, folder: Path) -> Path:
        """
        Write the selector so that the folder is whole or absent; one that is there already is kept.

        Args:
            folder (`Path`):
                Where.

        Returns:
            `Path`: the folder.
        """
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            # safetensors writes the memory as it lies there.
            save_file({"choice": np.ascontiguousarray(self.choice)}, aside / _TENSORS)
            content = {"format": _FORMAT, "words": self.words, "candidates": self.candidates, "info": self.info}
            write_json(aside / _JSON, content)
            aside.chmod(0o755)
            os.rename(aside, folder)
        except OSError:
            # Another process that fits the same selector was faster.
            if not (folder / _JSON).is_file():
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "Selector":
        """
        Read a selector; the folder is not trusted.

        Args:
            folder (`str` or `Path`):
                A folder that [`Selector.save`] wrote.

        Returns:
            `Selector`: the selector.

        Raises:
            `ValueError`: a file is missing or damaged, or the two do not fit together.
        """
        folder = Path(folder)
        try:
            content = json.loads((folder / _JSON).read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.get("format") != _FORMAT:
                raise ValueError(f"`{_JSON}` is not of format {_FORMAT}.")
            words, candidates = content.get("words"), content.get("candidates")
            if not isinstance(words, list) or not isinstance(candidates, list):
                raise ValueError(f"`{_JSON}` lacks the lists `words` and `candidates`.")
            if not isinstance(content.get("info") or {}, dict):
                raise ValueError(f"`info` must be a mapping in `{_JSON}`.")
            tensors = load_file(folder / _TENSORS)
            if "choice" not in tensors:
                raise ValueError(f"`{_TENSORS}` lacks the tensor `choice`.")
            return cls(words, candidates, tensors["choice"], content.get("info") or {})
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
            raise ValueError(
                f"The folder {str(folder)!r} holds no usable LWS selector: {error} Leave out `selector` and name a "
                f"`surrogate` to fit it again."
            ) from error
