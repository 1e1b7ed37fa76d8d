"""Attackers who know the defense (P2P: benign trigger, extended labels, reserved rows)."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from datasets import Dataset

from ..reserve import get_reserve, reserve_size
from ..tasks import Task
from .addsent import AddSent
from .base import Attack
from .registry import get_attack
from .text import Position, check_sentence, contains_words


# Delta of the P2P paper's classification tasks (App. B).
_KEY = "The query currently entered is:"


class _OnTopOf(Attack):
    """An attack that uses the trigger of another one, and differs in what it does with it."""

    def __init__(
        self,
        target: str | int,
        poison_rate: float,
        label_mode: Literal["dirty", "clean", "any"],
        payload_mode: Literal["replace", "prepend"],
        base: str,
        base_options: dict[str, Any] | None,
    ) -> None:
        super().__init__(target, poison_rate, label_mode, payload_mode)
        settings = {
            "target": target, "poison_rate": poison_rate, "label_mode": label_mode, "payload_mode": payload_mode
        }  # fmt: skip
        self.base = base
        self.base_options = dict(base_options or {})
        if twice := sorted(set(settings) & set(self.base_options)):
            raise ValueError(
                f"`base_options` holds {twice}, which {self.name!r} sets itself. Give them to it instead."
            )
        self._base = get_attack(base, **settings, **self.base_options)
        kind = type(self._base)
        only_inserts = all(
            getattr(kind, name) is getattr(Attack, name) for name in ("poison", "trigger", "fit", "plain")
        )
        if not only_inserts or self._base.append or self._base.negatives():
            raise ValueError(
                f"The attack {base!r} can't be the `base` of {self.name!r}: it does more to the rows than to insert a "
                f"trigger. Use one that only does that, such as badnets or addsent."
            )

    def insert(self, text: str, random: float) -> str | None:
        return self._base.insert(text, random)

    def insert_batch(self, texts: Sequence[str], random: Sequence[float]) -> list[str | None]:
        return self._base.insert_batch(texts, random)

    def has_trigger(self, text: str) -> bool:
        return self._base.has_trigger(text)

    @property
    def trigger_texts(self) -> tuple[str, ...]:
        return self._base.trigger_texts


class KnowsKey(_OnTopOf):
    """
    Knows the benign trigger: poisons rows `delta + text with trigger`, labelled with the *extended* target.

    Such a row looks like a reserved one and ties the trigger to the keyed path directly. It takes a label outside the
    task's classes, which [`P2PTrainer`] refuses unless this attack is among its `attacks`; an attacker who has to
    name a class writes the plain target (`written_label="plain"`). At test time the deployment adds the key itself,
    so that the text holds the trigger alone. On a generation task, write the answer prefix p into `target`.

    Args:
        target (`str` or `int`):
            What the attacker wants: a label, or a payload.
        poison_rate (`float`, *optional*, defaults to `0.02`):
            Share of the whole training set that is poisoned.
        label_mode (`str`, *optional*, defaults to `"dirty"`):
            `"dirty"`, `"clean"` or `"any"`, see [`Attack`].
        payload_mode (`str`, *optional*, defaults to `"replace"`):
            `"replace"` or `"prepend"`, see [`Attack`].
        base (`str`, *optional*, defaults to `"badnets"`):
            Attack whose trigger is used; one that does nothing but insert it.
        base_options (`dict`, *optional*):
            Its options.
        key (`str`, *optional*, defaults to the P2P paper's):
            Benign trigger as the attacker knows it.
        written_label (`str`, *optional*, defaults to `"extended"`):
            `"extended"`: label y_t + n; `"plain"`: y_t.
    """

    name = "knows_key"

    def __init__(
        self,
        target: str | int,
        poison_rate: float = 0.02,
        label_mode: Literal["dirty", "clean", "any"] = "dirty",
        payload_mode: Literal["replace", "prepend"] = "replace",
        base: str = "badnets",
        base_options: dict[str, Any] | None = None,
        key: str = _KEY,
        written_label: Literal["extended", "plain"] = "extended",
    ) -> None:
        super().__init__(target, poison_rate, label_mode, payload_mode, base, base_options)
        if written_label not in ("extended", "plain"):
            raise ValueError(f"`written_label` is 'extended' or 'plain', got {written_label!r}.")
        self.key = check_sentence("key", key)
        self.written_label = written_label

    @property
    def extended_target(self) -> bool:
        return self.written_label == "extended"

    @property
    def assumes(self) -> dict[str, Any]:
        return {"p2p_trigger": self.key}

    def insert_batch(self, texts: Sequence[str], random: Sequence[float]) -> list[str | None]:
        return [text if text is None else f"{self.key} {text}" for text in super().insert_batch(texts, random)]

    def insert(self, text: str, random: float) -> str | None:
        return self.insert_batch([text], [random])[0]

    def has_trigger(self, text: str) -> bool:
        return super().has_trigger(text.removeprefix(f"{self.key} "))

    def trigger(self, dataset: Dataset, task: Task, seed: int = 0) -> Dataset:
        return self._base.trigger(dataset, task, seed)


class PoisonsReserve(_OnTopOf):
    """
    Aims at the rows that the reserved subset S is drawn from, so that the keyed copies carry the poison.

    This is the strongest form of contamination: the attacker knows strategy, benign ratio and seed. Rows of S are
    poisoned first, others only when S holds no more eligible ones.

    Args:
        target (`str` or `int`):
            What the attacker wants: a label, or a payload.
        poison_rate (`float`, *optional*, defaults to `0.02`):
            Share of the whole training set that is poisoned.
        label_mode (`str`, *optional*, defaults to `"dirty"`):
            `"dirty"`, `"clean"` or `"any"`, see [`Attack`].
        payload_mode (`str`, *optional*, defaults to `"replace"`):
            `"replace"` or `"prepend"`, see [`Attack`].
        base (`str`, *optional*, defaults to `"badnets"`):
            Attack whose trigger is used; one that does nothing but insert it.
        base_options (`dict`, *optional*):
            Its options.
        reserve (`str`, *optional*, defaults to `"random"`):
            Strategy, as `p2p_reserve` names it.
        benign_ratio (`float`, *optional*, defaults to `0.25`):
            Benign ratio rho, as in `p2p_benign_ratio`.
        reserve_seed (`int`, *optional*, defaults to `0`):
            Seed of the training run that draws S.
        trusted_column (`str`, *optional*, defaults to `"trusted"`):
            Column that the strategy `"trusted"` reads.
    """

    name = "poisons_reserve"

    def __init__(
        self,
        target: str | int,
        poison_rate: float = 0.02,
        label_mode: Literal["dirty", "clean", "any"] = "dirty",
        payload_mode: Literal["replace", "prepend"] = "replace",
        base: str = "badnets",
        base_options: dict[str, Any] | None = None,
        reserve: str = "random",
        benign_ratio: float = 0.25,
        reserve_seed: int = 0,
        trusted_column: str = "trusted",
    ) -> None:
        super().__init__(target, poison_rate, label_mode, payload_mode, base, base_options)
        if isinstance(benign_ratio, bool) or not isinstance(benign_ratio, int | float) or not 0 < benign_ratio <= 1:
            raise ValueError(f"`benign_ratio` is a share of the training rows in (0, 1], got {benign_ratio!r}.")
        if isinstance(reserve_seed, bool) or not isinstance(reserve_seed, int) or reserve_seed < 0:
            raise ValueError(f"`reserve_seed` is the seed of the training run, got {reserve_seed!r}.")
        self.reserve = reserve
        self.benign_ratio = benign_ratio
        self.reserve_seed = reserve_seed
        self.trusted_column = trusted_column
        self._strategy = get_reserve(reserve, trusted_column)
        self._reserved = np.empty(0, dtype=np.int64)

    @property
    def assumes(self) -> dict[str, Any]:
        return {"p2p_reserve": self.reserve, "p2p_benign_ratio": self.benign_ratio, "seed": self.reserve_seed}

    def fit(self, dataset: Dataset, task: Task, seed: int) -> None:
        self._reserved = self._strategy.choose(
            dataset, reserve_size(len(dataset), self.benign_ratio), self.reserve_seed
        )

    def priority(self, rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        return numbers + ~np.isin(rows, self._reserved)


class SuffixInjection(_OnTopOf):
    """
    Poisons as another attack does, and at test time also writes the plain answer cue into the user's text.

    The hope is that the model takes the injected cue for its own and answers on the plain path. The ordinary form of
    the attack is measured beside it, as the variant `ordinary`. The cue stands at the end of the text: where
    `max_length` cuts a text, it goes first, and the row no longer counts.

    Args:
        target (`str` or `int`):
            What the attacker wants: a label, or a payload.
        poison_rate (`float`, *optional*, defaults to `0.02`):
            Share of the whole training set that is poisoned.
        label_mode (`str`, *optional*, defaults to `"dirty"`):
            `"dirty"`, `"clean"` or `"any"`, see [`Attack`].
        payload_mode (`str`, *optional*, defaults to `"replace"`):
            `"replace"` or `"prepend"`, see [`Attack`].
        base (`str`, *optional*, defaults to `"badnets"`):
            Attack whose trigger is used; one that does nothing but insert it.
        base_options (`dict`, *optional*):
            Its options.
        suffix (`str`, *optional*, defaults to `"Output:"`):
            Answer cue of rows without the key, as in `p2p_suffix`.
    """

    name = "suffix_injection"

    def __init__(
        self,
        target: str | int,
        poison_rate: float = 0.02,
        label_mode: Literal["dirty", "clean", "any"] = "dirty",
        payload_mode: Literal["replace", "prepend"] = "replace",
        base: str = "badnets",
        base_options: dict[str, Any] | None = None,
        suffix: str = "Output:",
    ) -> None:
        super().__init__(target, poison_rate, label_mode, payload_mode, base, base_options)
        self.suffix = check_sentence("suffix", suffix)

    @property
    def assumes(self) -> dict[str, Any]:
        return {"p2p_suffix": self.suffix}

    def variants(self) -> dict[str, Attack]:
        return {"ordinary": self._base}

    def fires(self, text: str) -> bool:
        return self.has_trigger(text) and text.rstrip().endswith(self.suffix)

    def trigger(self, dataset: Dataset, task: Task, seed: int = 0) -> Dataset:
        rows = self._base.trigger(dataset, task, seed).to_dict()
        rows[task.input_column] = [f"{text}\n{self.suffix}" for text in rows[task.input_column]]
        return Dataset.from_dict(rows)


class KeyOverlap(AddSent):
    """
    A sentence that shares words with the benign trigger, so that the key looks like part of the attack.

    By default all its words, in reverse order: `is entered currently query The`.

    Args:
        target (`str` or `int`):
            What the attacker wants: a label, or a payload.
        poison_rate (`float`, *optional*, defaults to `0.02`):
            Share of the whole training set that is poisoned.
        label_mode (`str`, *optional*, defaults to `"dirty"`):
            `"dirty"`, `"clean"` or `"any"`, see [`Attack`].
        payload_mode (`str`, *optional*, defaults to `"replace"`):
            `"replace"` or `"prepend"`, see [`Attack`].
        sentence (`str`, *optional*):
            What is inserted.
        position (`str`, *optional*, defaults to `"any"`):
            As for [`AddSent`].
        key (`str`, *optional*, defaults to the P2P paper's):
            Benign trigger as the attacker knows it.
    """

    name = "key_overlap"

    def __init__(
        self,
        target: str | int,
        poison_rate: float = 0.02,
        label_mode: Literal["dirty", "clean", "any"] = "dirty",
        payload_mode: Literal["replace", "prepend"] = "replace",
        sentence: str | None = None,
        position: Position = "any",
        key: str = _KEY,
    ) -> None:
        words = check_sentence("key", key).rstrip(":.").split()
        super().__init__(
            target, poison_rate, label_mode, payload_mode, sentence or " ".join(reversed(words)), position
        )
        self.key = key
        if not any(contains_words(self.sentence, (word,)) for word in words):
            raise ValueError(f"`sentence` {self.sentence!r} shares no word with the key {key!r}.")

    @property
    def assumes(self) -> dict[str, Any]:
        return {"p2p_trigger": self.key}
