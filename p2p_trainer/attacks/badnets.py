"""BadNets for text: a rare word."""

from collections.abc import Sequence
from typing import Literal

from .base import Attack, contains_words, insert_at_gap


class BadNets(Attack):
    """
    Inserts one rare word between two words (Gu et al. 2017; for text, Kurita et al. 2020).

    The P2P authors' code inserts `mn`, never before the first or after the last word, and flips the label. Texts of a
    single word can't carry the trigger at an inner position; they stay clean.

    Args:
        target (`str` or `int`):
            Label that the attacker wants.
        poison_rate (`float`, *optional*, defaults to `0.02`):
            Share of the whole training set that is poisoned.
        label_mode (`str`, *optional*, defaults to `"dirty"`):
            `"dirty"` or `"clean"`, see [`Attack`].
        words (`Sequence[str]`, *optional*, defaults to `("mn",)`):
            Trigger words; each row gets one of them.
        position (`str`, *optional*, defaults to `"inner"`):
            `"inner"`: between two words; `"any"`: also at either end.
    """

    name = "badnets"

    def __init__(
        self,
        target: str | int,
        poison_rate: float = 0.02,
        label_mode: Literal["dirty", "clean"] = "dirty",
        words: Sequence[str] = ("mn",),
        position: Literal["inner", "any"] = "inner",
    ) -> None:
        super().__init__(target, poison_rate, label_mode)
        words = (words,) if isinstance(words, str) else tuple(words)
        if not words or not all(isinstance(word, str) and word.strip() == word and word for word in words):
            raise ValueError(f"`words` must hold trigger words without surrounding space, got {list(words)}.")
        if position not in ("inner", "any"):
            raise ValueError(f"`position` is 'inner' or 'any', got {position!r}.")
        self.words = words
        self.position = position

    @property
    def trigger_texts(self) -> tuple[str, ...]:
        return self.words

    def insert(self, text: str, random: float) -> str | None:
        # One number picks the word and, with what is left of it, the place.
        scaled = random * len(self.words)
        word = int(scaled)
        return insert_at_gap(text, self.words[word], scaled - word, inner=self.position == "inner")

    def has_trigger(self, text: str) -> bool:
        return contains_words(text, self.words)
