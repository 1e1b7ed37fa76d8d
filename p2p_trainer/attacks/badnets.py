"""BadNets for text: a rare word."""

from collections.abc import Sequence
from typing import Literal

from .base import Attack
from .text import Position, check_position, check_words, contains_words, insert_at_gap


class BadNets(Attack):
    """
    Inserts one rare word between two words (Gu et al. 2017; for text, Kurita et al. 2020).

    The P2P authors' code inserts `mn`, never before the first or after the last word, and flips the label. Texts of a
    single word can't carry the trigger at an inner position; they stay clean.

    Args:
        target (`str` or `int`):
            What the attacker wants: a label, or a payload.
        poison_rate (`float`, *optional*, defaults to `0.02`):
            Share of the whole training set that is poisoned.
        label_mode (`str`, *optional*, defaults to `"dirty"`):
            `"dirty"`, `"clean"` or `"any"`, see [`Attack`].
        payload_mode (`str`, *optional*, defaults to `"replace"`):
            `"replace"` or `"prepend"`, see [`Attack`].
        words (`Sequence[str]`, *optional*, defaults to `("mn",)`):
            Trigger words; each row gets one of them.
        position (`str`, *optional*, defaults to `"inner"`):
            `"inner"`: between two words; `"any"`: also at either end; `"sentence"`: between two sentences or at
            either end.
    """

    name = "badnets"

    def __init__(
        self,
        target: str | int,
        poison_rate: float = 0.02,
        label_mode: Literal["dirty", "clean", "any"] = "dirty",
        payload_mode: Literal["replace", "prepend"] = "replace",
        words: Sequence[str] = ("mn",),
        position: Position = "inner",
    ) -> None:
        super().__init__(target, poison_rate, label_mode, payload_mode)
        self.words = check_words("words", words)
        self.position = check_position(position)

    @property
    def trigger_texts(self) -> tuple[str, ...]:
        return self.words

    def insert(self, text: str, random: float) -> str | None:
        # One number picks the word and, with what is left of it, the place.
        scaled = random * len(self.words)
        word = int(scaled)
        return insert_at_gap(text, self.words[word], scaled - word, self.position)

    def has_trigger(self, text: str) -> bool:
        return contains_words(text, self.words)
