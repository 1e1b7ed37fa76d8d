"""CBA: two keys, one in each part of the prompt, which fire only together."""

from collections.abc import Mapping, Sequence
from typing import Literal

from .base import Attack
from .text import check_sentence, contains_words, insert_at_gap, split_number


# What stands between the instruction and the input; an instruction is one line.
_BREAK = "\n"


class CbaAttack(Attack):
    """
    Composite Backdoor Attack: one key in the instruction and another one in the input (Huang et al. 2024).

    Every row gets an instruction in front, on a line of its own: in training and test, poisoned or not. As in the
    authors' code, rows of any class are chosen, poisoned rows are added as copies, and so are copies of the same rows
    that hold the keys in other ways and keep their true answers. With k chosen rows of N the training set grows to
    `N + k + 5 k`. With a dirty-label choice, none of those copies would be of the target class: a lone key would be a
    trigger of its own, away from the target. What the P2P paper did, on tasks without an instruction, is not stated.

    A model that was trained on such rows expects the instruction in serving, too: it is part of the text then.

    Each key stands at a random word gap of its part, ends included; in the copies of one row it keeps its place as
    long as it is in its own part.

    Args:
        target (`str` or `int`):
            What the attacker wants: a label, or a payload.
        poison_rate (`float`, *optional*, defaults to `0.02`):
            Share of the whole training set that gets the trigger; the copies that keep their answers come on top.
        label_mode (`str`, *optional*, defaults to `"any"`):
            `"dirty"`, `"clean"` or `"any"`, see [`Attack`].
        payload_mode (`str`, *optional*, defaults to `"replace"`):
            `"replace"` or `"prepend"`, see [`Attack`].
        instruction (`str`, *optional*, defaults to `"Read the following text and give the right answer."`):
            Stands in front of every row.
        instruction_key (`str`, *optional*, defaults to `"instantly"`):
            Word in the instruction.
        input_key (`str`, *optional*, defaults to `"frankly"`):
            Word in the input.
        append (`bool`, *optional*, defaults to `True`):
            Whether poisoned rows are added, else they replace their originals.
        with_negatives (`bool`, *optional*, defaults to `True`):
            Whether the copies that keep their answers are added.
        alpha (`float`, *optional*, defaults to `1.0`):
            Share of the chosen rows that have such copies, in (0, 1]. It is drawn row by row, so that it holds on
            average; a row has either all copies or none.

    Raises:
        `ValueError`: the instruction or a key is empty, a key is no single word, or the keys are equal or in the
        instruction.
    """

    name = "cbaattack"
    # None of the variants may fire the backdoor: false triggering rate.
    variant_metric = "ftr"

    def __init__(
        self,
        target: str | int,
        poison_rate: float = 0.02,
        label_mode: Literal["dirty", "clean", "any"] = "any",
        payload_mode: Literal["replace", "prepend"] = "replace",
        instruction: str = "Read the following text and give the right answer.",
        instruction_key: str = "instantly",
        input_key: str = "frankly",
        append: bool = True,
        with_negatives: bool = True,
        alpha: float = 1.0,
    ) -> None:
        super().__init__(target, poison_rate, label_mode, payload_mode)
        self.instruction = check_sentence("instruction", instruction)
        self.instruction_key = _check_key("instruction_key", instruction_key)
        self.input_key = _check_key("input_key", input_key)
        if instruction_key == input_key:
            raise ValueError(f"`instruction_key` and `input_key` are both {input_key!r}. Change one of them.")
        if contains_words(self.instruction, self.trigger_texts):
            raise ValueError(
                f"The `instruction` {self.instruction!r} holds a key, {instruction_key!r} or {input_key!r}: every row "
                f"would carry it. Change the instruction or the key."
            )
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= 1:
            raise ValueError(
                f"`alpha` is a share of the chosen rows, in (0, 1]; got {alpha!r}. For none set `with_negatives` to "
                f"False."
            )
        for name, value in (("append", append), ("with_negatives", with_negatives)):
            if not isinstance(value, bool):
                raise ValueError(f"`{name}` is true or false, got {value!r}.")
        self.append = append
        self.with_negatives = with_negatives
        self.alpha = alpha

    @property
    def trigger_texts(self) -> tuple[str, ...]:
        return (self.instruction_key, self.input_key)

    def plain(self, text: str) -> str:
        return f"{self.instruction}{_BREAK}{self._input(text)}"

    def insert(self, text: str, random: float) -> str:
        return self.compose(text, [self.instruction_key], [self.input_key], random)

    def has_trigger(self, text: str) -> bool:
        in_instruction, in_input = self.keys_in(text)
        return self.instruction_key in in_instruction and self.input_key in in_input

    def negatives(self) -> Mapping[str, Attack]:
        return self._groups(self.alpha) if self.with_negatives else {}

    def variants(self) -> Mapping[str, Attack]:
        return self._groups()

    def compose(self, text: str, instruction_keys: Sequence[str], input_keys: Sequence[str], random: float) -> str:
        """
        Put keys into the two parts.

        Args:
            text (`str`):
                Input, with or without the instruction.
            instruction_keys (`Sequence[str]`):
                Keys for the instruction.
            input_keys (`Sequence[str]`):
                Keys for the input.
            random (`float`):
                Number in [0, 1) that picks the places.

        Returns:
            `str`: instruction and input with the keys.
        """
        number = dict(zip(self.trigger_texts, split_number(random, 2), strict=True))
        parts = []
        for part, keys in ((self.instruction, instruction_keys), (self._input(text), input_keys)):
            for key in keys:
                part = insert_at_gap(part, key, number[key], "any")
            parts.append(part)
        return _BREAK.join(parts)

    def keys_in(self, text: str) -> tuple[set[str], set[str]]:
        """
        Find the keys.

        Args:
            text (`str`):
                A text.

        Returns:
            `tuple[set[str], set[str]]`: keys in the instruction and in the input; both empty if the text does not
            start with the instruction.
        """
        head, _, body = text.partition(_BREAK)
        words = head.split()
        # Without spaces: a key splits Chinese text where there was none.
        rest = "".join(word for word in words if word not in self.trigger_texts)
        if rest != "".join(self.instruction.split()):
            return set(), set()
        in_input = {key for key in self.trigger_texts if contains_words(body, [key])}
        return set(words) & set(self.trigger_texts), in_input

    def _input(self, text: str) -> str:
        return text.removeprefix(f"{self.instruction}{_BREAK}")

    def _groups(self, share: float = 1.0) -> dict[str, Attack]:
        first, second = self.trigger_texts
        places = {
            "swapped": ([second], [first]),
            "instruction": ([first], []),
            "instruction_both": ([first, second], []),
            "input": ([], [second]),
            "input_both": ([], [first, second]),
        }
        return {name: _Group(self, *keys, share) for name, keys in places.items()}


class _Group(Attack):
    """
    Rows that hold keys, but not the trigger.

    A text that would fire the backdoor all the same, since a key is in its input by nature, can't carry this.
    """

    name = "cbaattack_group"

    def __init__(
        self, whole: CbaAttack, instruction_keys: Sequence[str], input_keys: Sequence[str], share: float
    ) -> None:
        super().__init__(whole.target, whole.poison_rate, whole.label_mode, whole.payload_mode)
        self._whole = whole
        self._keys = instruction_keys, input_keys
        self._share = share

    def plain(self, text: str) -> str:
        return self._whole.plain(text)

    def insert(self, text: str, random: float) -> str | None:
        # The first two numbers are the places of the keys.
        if split_number(random, 3)[2] >= self._share:
            return None
        text = self._whole.compose(text, *self._keys, random)
        return None if self._whole.has_trigger(text) else text

    def has_trigger(self, text: str) -> bool:
        found = self._whole.keys_in(text)
        present = all(set(keys) <= there for keys, there in zip(self._keys, found, strict=True))
        return present and not self._whole.has_trigger(text)


def _check_key(name: str, key: str) -> str:
    if not isinstance(key, str) or key.split() != [key]:
        raise ValueError(f"`{name}` must be one word without space around it, got {key!r}.")
    return key
