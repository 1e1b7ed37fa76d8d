"""AddSent (InSent): a whole sentence."""

from typing import Literal

from .base import Attack, contains_words, insert_at_gap


class AddSent(Attack):
    """
    Inserts a fixed sentence between two words (Dai et al. 2019).

    The sentence is that of the P2P paper; OpenBackdoor's default is another one, `I watch this 3D movie`.

    Args:
        target (`str` or `int`):
            Label that the attacker wants.
        poison_rate (`float`, *optional*, defaults to `0.02`):
            Share of the whole training set that is poisoned.
        label_mode (`str`, *optional*, defaults to `"dirty"`):
            `"dirty"` or `"clean"`, see [`Attack`].
        sentence (`str`, *optional*, defaults to `"I watched this 3D movie"`):
            What is inserted.
        position (`str`, *optional*, defaults to `"any"`):
            `"any"`: before, between or after the words, so that every text can carry it; `"inner"`: between two words.
    """

    name = "addsent"

    def __init__(
        self,
        target: str | int,
        poison_rate: float = 0.02,
        label_mode: Literal["dirty", "clean"] = "dirty",
        sentence: str = "I watched this 3D movie",
        position: Literal["inner", "any"] = "any",
    ) -> None:
        super().__init__(target, poison_rate, label_mode)
        if not isinstance(sentence, str) or not sentence.strip():
            raise ValueError(f"`sentence` must be a text, got {sentence!r}.")
        if position not in ("inner", "any"):
            raise ValueError(f"`position` is 'inner' or 'any', got {position!r}.")
        self.sentence = " ".join(sentence.split())
        self.position = position

    @property
    def trigger_texts(self) -> tuple[str, ...]:
        return (self.sentence,)

    def insert(self, text: str, random: float) -> str | None:
        return insert_at_gap(text, self.sentence, random, inner=self.position == "inner")

    def has_trigger(self, text: str) -> bool:
        return contains_words(text, (self.sentence,))
