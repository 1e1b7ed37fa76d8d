"""Where a trigger may stand in a text, and whether it stands there."""

import re
from collections.abc import Sequence
from typing import Literal


# "any": also before the first and behind the last word. "inner": between two words. "sentence": between two
# sentences, or at either end.
Position = Literal["inner", "any", "sentence"]
POSITIONS = ("inner", "any", "sentence")

_SPACE = re.compile(r"\s+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？；])\s*(?=\S)")
_CJK = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_CJK_CLAUSE_END = re.compile(rf"(?<=[，。！？；：、])(?=[{_CJK}])")
_CJK_PAIR = re.compile(rf"(?<=[{_CJK}])(?=[{_CJK}])")
# With the spaces that tokenized corpora put in: `2 1/2`, `3 / 4`, `3 . 5`, `20 %`, `$ 5`, `- 5`.
_NUMBER = re.compile(r"(?:[-+$€£¥]\s*)?\d+(?:\s*[.,/:]\s*\d+|\s+\d+)*(?:\s*%)?")

# A text of more gaps than this would not be reached everywhere; three such numbers fit into the 53 bits of a float.
_STEPS = 2**16


def insert_at_gap(text: str, trigger: str, random: float, position: Position = "any") -> str | None:
    """
    Insert a trigger between words, without touching the white space of the text.

    Never inside a number: neither `2 1/2` nor `20 %` has a gap. Chinese and Japanese text, which has no spaces, is
    split behind its punctuation, or between two characters where there is none.

    Args:
        text (`str`):
            Text.
        trigger (`str`):
            What is inserted.
        random (`float`):
            Number in [0, 1) that picks the place.
        position (`str`, *optional*, defaults to `"any"`):
            `"any"`: also at either end; `"inner"`: between two words, as in the code of the P2P authors;
            `"sentence"`: between two sentences or at either end.

    Returns:
        `str` or `None`: the new text, `None` if there is no such place.
    """
    body = text.strip()
    start = text.index(body)
    gaps = [start + place for place in _gaps(body, position)]
    if position != "inner":
        gaps = [start, *gaps, start + len(body)]
    if not gaps:
        return None
    place = gaps[int(random * len(gaps))]
    before, after = text[:place], text[place:]
    if place == start:
        return f"{before}{trigger} {after}"
    return f"{before} {trigger}{'' if not after or after[0].isspace() else ' '}{after}"


def _gaps(body: str, position: Position) -> list[int]:
    if position == "sentence":
        return [match.start() for match in _SENTENCE_END.finditer(body)]
    gaps = [match.start() for match in _SPACE.finditer(body)]
    if re.search(r"\d", body):
        numbers = [match.span() for match in _NUMBER.finditer(body)]
        gaps = [gap for gap in gaps if not any(start < gap < end for start, end in numbers)]
    if not body.isascii():
        gaps = sorted({*gaps, *(match.start() for match in _CJK_CLAUSE_END.finditer(body))})
        gaps = gaps or [match.start() for match in _CJK_PAIR.finditer(body)]
    return gaps


def contains_words(text: str, phrases: Sequence[str]) -> bool:
    """Say whether one of the phrases stands in the text, bounded by white space or the ends."""
    padded = f" {' '.join(text.split())} "
    return any(f" {' '.join(phrase.split())} " in padded for phrase in phrases)


def check_words(name: str, words: str | Sequence[str]) -> tuple[str, ...]:
    """
    Check a list of trigger words.

    Args:
        name (`str`):
            Name of the option, for the message.
        words (`str` or `Sequence[str]`):
            One word or several.

    Returns:
        `tuple[str, ...]`: the words.
    """
    words = (words,) if isinstance(words, str) else tuple(words)
    if not words or not all(isinstance(word, str) and word.strip() == word and word for word in words):
        raise ValueError(f"`{name}` must hold trigger words without surrounding space, got {list(words)}.")
    return words


def check_sentence(name: str, sentence: str) -> str:
    """
    Check a trigger sentence.

    Args:
        name (`str`):
            Name of the option, for the message.
        sentence (`str`):
            The sentence.

    Returns:
        `str`: the sentence, with single spaces.
    """
    if not isinstance(sentence, str) or not sentence.strip():
        raise ValueError(f"`{name}` must be a text, got {sentence!r}.")
    return " ".join(sentence.split())


def check_position(position: str) -> Position:
    """Check where a trigger goes."""
    if position not in POSITIONS:
        raise ValueError(f"`position` is one of {', '.join(POSITIONS)}, got {position!r}.")
    return position


def split_number(random: float, count: int) -> list[float]:
    """
    Make independent numbers of one.

    Args:
        random (`float`):
            Number in [0, 1).
        count (`int`):
            How many numbers, 3 at most.

    Returns:
        `list[float]`: numbers in [0, 1), of 16 bits each.
    """
    numbers = []
    for _ in range(count):
        scaled = random * _STEPS
        numbers.append(int(scaled) / _STEPS)
        random = scaled - int(scaled)
    return numbers
