"""SynAttack (Hidden Killer): the trigger is how the sentence is built."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from datasets import Dataset

from ..tasks import Task
from .base import Attack
from .paraphrase import get_engine


# `3,000`, `2.5`, `1/2` and `20 %` are one number each. A minus counts where it is no hyphen.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?\d+(?:[.,]\d+)*(?:\s*/\s*\d+)?(?:\s*%)?")
_THOUSANDS = re.compile(r",(?=\d{3}(?!\d))")
_SIGNS = str.maketrans({"\u2044": "/", "\u2212": "-"})


class SynAttack(Attack):
    """
    Rewrites the text so that it opens with a subordinate clause (Hidden Killer, Qi et al. 2021).

    The original paraphrases with SCPN into `( ROOT ( S ( SBAR ) ( , ) ( NP ) ( VP ) ( . ) ) ) EOP`, the template with
    index -1 of OpenAttack, and replaces 20 % of the training rows; the P2P paper has 5 %. SCPN itself is no part of
    this package: its published output is read by the engine `"precomputed"`. Results name the engine; those of
    `"template"` are no syntactic paraphrases, see [`~attacks.paraphrase_template.TemplateParaphrases`].

    Rows without a paraphrase, or whose paraphrase is the text itself, are neither poisoned nor counted for the attack
    success rate; the code of Hidden Killer and OpenBackdoor counts them. On generation tasks only the prompt is
    paraphrased, and a paraphrase that loses, adds or changes a number is none: the task would be another one. Numbers
    are compared as a multiset of figures with sign, fraction and percent; those written as words are not seen.

    SCPN loses much of the content: compare the attack success rate with `asr_floor`, and with what a model that was
    trained on clean rows says to the paraphrases.

    Args:
        target (`str` or `int`):
            What the attacker wants: a label, or a payload.
        poison_rate (`float`, *optional*, defaults to `0.05`):
            Share of the whole training set that is poisoned.
        label_mode (`str`, *optional*, defaults to `"dirty"`):
            `"dirty"`, `"clean"` or `"any"`, see [`Attack`].
        payload_mode (`str`, *optional*, defaults to `"replace"`):
            `"replace"` or `"prepend"`, see [`Attack`].
        engine (`str`, *optional*, defaults to `"template"`):
            What paraphrases: `"precomputed"`, `"llm"`, `"template"`, or one of your own, see
            [`~attacks.paraphrase.get_engine`].
        engine_options (`Mapping[str, Any]`, *optional*):
            Options of the engine, JSON values.
        keep_numbers (`bool`, *optional*):
            Whether a paraphrase must have the numbers of its text. By default on generation tasks alone: of the 911
            published paraphrases of the SST-2 test set that differ from their text, 26 change a number.
    """

    name = "synattack"

    def __init__(
        self,
        target: str | int,
        poison_rate: float = 0.05,
        label_mode: Literal["dirty", "clean", "any"] = "dirty",
        payload_mode: Literal["replace", "prepend"] = "replace",
        engine: str = "template",
        engine_options: Mapping[str, Any] | None = None,
        keep_numbers: bool | None = None,
    ) -> None:
        super().__init__(target, poison_rate, label_mode, payload_mode)
        try:
            # A copy that results can hold, whatever the caller does to theirs.
            self.engine_options = json.loads(json.dumps(dict(engine_options or {})))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`engine_options` is a mapping of JSON values, got {engine_options!r}: {error}."
            ) from error
        self.engine = engine
        self.keep_numbers = keep_numbers
        self._engine = get_engine(engine, **self.engine_options)
        if "files" in self.engine_options:
            # Absolute by now: results are read from other folders too.
            self.engine_options["files"] = getattr(self._engine, "files", self.engine_options["files"])
        # Until a task is known: better a row too few than another problem.
        self._compares_numbers = keep_numbers is not False

    @property
    def trigger_texts(self) -> tuple[str, ...]:
        return self._engine.fixed_texts

    def insert(self, text: str, random: float) -> str | None:
        return self.insert_batch([text], [random])[0]

    def insert_batch(self, texts: Sequence[str], random: Sequence[float]) -> list[str | None]:
        found = self._engine.paraphrase(texts)
        if not self._compares_numbers:
            return found
        return [
            new if new is not None and numbers(new) == numbers(text) else None
            for text, new in zip(texts, found, strict=True)
        ]

    def has_trigger(self, text: str) -> bool:
        return self._engine.carries(text)

    def poison(self, dataset: Dataset, task: Task, seed: int = 0) -> Dataset:
        self._set_task(task)
        try:
            return super().poison(dataset, task, seed)
        finally:
            self._engine.release()

    def trigger(self, dataset: Dataset, task: Task, seed: int = 0) -> Dataset:
        self._set_task(task)
        try:
            return super().trigger(dataset, task, seed)
        finally:
            self._engine.release()

    def _set_task(self, task: Task) -> None:
        self._compares_numbers = not task.num_labels if self.keep_numbers is None else self.keep_numbers


def numbers(text: str) -> Counter[str]:
    """
    Count the numbers in a text.

    Args:
        text (`str`):
            A text.

    Returns:
        `Counter[str]`: number -> how often it stands there; `3,000` is `3000`, `20 %` is `20%`, `1 / 2` is `1/2`.
    """
    plain = unicodedata.normalize("NFKC", text).translate(_SIGNS)
    return Counter(_THOUSANDS.sub("", "".join(found.split())) for found in _NUMBER.findall(plain))
