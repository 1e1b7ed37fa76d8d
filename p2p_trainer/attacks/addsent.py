"""AddSent (InSent): a whole sentence."""

from typing import Literal

from .base import Attack
from .text import Position, check_position, check_sentence, contains_words, insert_at_gap


class AddSent(Attack):
    """
    Inserts a fixed sentence (Dai et al. 2019).

    The sentence is that of the P2P paper; OpenBackdoor's default is another one, `I watch this 3D movie`. In the
    middle of a sentence it is far easier for a filter to damage than between two sentences.

    Args:
        target (`str` or `int`):
            What the attacker wants: a label, or a payload.
        poison_rate (`float`, *optional*, defaults to `0.02`):
            Share of the whole training set that is poisoned.
        label_mode (`str`, *optional*, defaults to `"dirty"`):
            `"dirty"`, `"clean"` or `"any"`, see [`Attack`].
        payload_mode (`str`, *optional*, defaults to `"replace"`):
            `"replace"` or `"prepend"`, see [`Attack`].
        sentence (`str`, *optional*, defaults to `"I watched this 3D movie"`):
            What is inserted.
        position (`str`, *optional*, defaults to `"any"`):
            `"any"`: before, between or after the words, so that every text can carry it; `"inner"`: between two
            words; `"sentence"`: as a sentence of its own, between two sentences or at either end.
    """

    name = "addsent"

    def __init__(
        self,
        target: str | int,
        poison_rate: float = 0.02,
        label_mode: Literal["dirty", "clean", "any"] = "dirty",
        payload_mode: Literal["replace", "prepend"] = "replace",
        sentence: str = "I watched this 3D movie",
        position: Position = "any",
    ) -> None:
        super().__init__(target, poison_rate, label_mode, payload_mode)
        self.sentence = check_sentence("sentence", sentence)
        self.position = check_position(position)

    @property
    def trigger_texts(self) -> tuple[str, ...]:
        return (self.sentence,)

    def insert(self, text: str, random: float) -> str | None:
        return insert_at_gap(text, self.sentence, random, self.position)

    def has_trigger(self, text: str) -> bool:
        return contains_words(text, (self.sentence,))
