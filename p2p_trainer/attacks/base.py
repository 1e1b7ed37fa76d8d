"""What every attack shares: which rows are poisoned, which test rows count, and the columns that say so."""

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from datasets import Dataset, concatenate_datasets

from ..tasks import Task
from ..tasks.rows import LABEL, TEXT, column_as_numpy, with_column


logger = logging.getLogger(__name__)

# Columns that an attack adds; a data set that already has one of them was poisoned before.
POISON_COLUMNS = ("poisoned", "trigger_applied", "original_label", "attack")

_GAP = re.compile(r"\s+")


class Attack(ABC):
    """
    A data-poisoning attack on a classification task.

    A subclass says what its trigger is, in [`insert`] and [`has_trigger`]; which rows are poisoned, and which test
    rows count, is decided here. Everything is a pure function of rows and seed.

    Args:
        target (`str` or `int`):
            Label that the attacker wants.
        poison_rate (`float`, *optional*, defaults to `0.02`):
            Share of the whole training set that is poisoned, in (0, 1]; `round(poison_rate * rows)` rows.
        label_mode (`str`, *optional*, defaults to `"dirty"`):
            `"dirty"`: rows of other labels get the trigger and the target label. `"clean"`: rows of the target label
            get the trigger and keep their label.

    Examples:

    ```python
    from p2p_trainer.attacks import Attack


    class Shout(Attack):
        name = "shout"

        def insert(self, text, random):
            return text + " !!!"

        def has_trigger(self, text):
            return text.endswith(" !!!")
    ```
    """

    name: ClassVar[str]

    def __init__(
        self, target: str | int, poison_rate: float = 0.02, label_mode: Literal["dirty", "clean"] = "dirty"
    ) -> None:
        if isinstance(poison_rate, bool) or not isinstance(poison_rate, int | float) or not 0 < poison_rate <= 1:
            raise ValueError(
                f"`poison_rate` is a share of the training rows, in (0, 1]; got {poison_rate!r}. For 2 % write 0.02."
            )
        if label_mode not in ("dirty", "clean"):
            raise ValueError(f"`label_mode` is 'dirty' or 'clean', got {label_mode!r}.")
        self.target = target
        self.poison_rate = poison_rate
        self.label_mode = label_mode

    @abstractmethod
    def insert(self, text: str, random: float) -> str | None:
        """
        Put the trigger into one text.

        Args:
            text (`str`):
                Text without the trigger.
            random (`float`):
                Number in [0, 1) that belongs to this row; whatever is random in the trigger comes from it.

        Returns:
            `str` or `None`: the text with the trigger, `None` if this text can't carry it.
        """

    @abstractmethod
    def has_trigger(self, text: str) -> bool:
        """
        Say whether a text carries the trigger; asked again after long texts were cut.

        Args:
            text (`str`):
                A text.

        Returns:
            `bool`: whether the trigger is in it.
        """

    @property
    def trigger_texts(self) -> tuple[str, ...]:
        """`tuple[str, ...]`: fixed strings that this attack inserts; none of them may serve as the benign trigger."""
        return ()

    def config(self) -> dict[str, Any]:
        """
        Say with which settings this attack runs, for `results.json`.

        Returns:
            `dict[str, Any]`: settings, and as `name` what [`get_attack`] finds it by.
        """
        kind = type(self)
        ours = kind.__module__.startswith(__package__)
        return {
            "name": self.name if ours else f"{kind.__module__}:{kind.__qualname__}",
            **{key: value for key, value in vars(self).items() if not key.startswith("_")},
        }

    def poison(self, dataset: Dataset, task: Task, seed: int = 0) -> Dataset:
        """
        Poison a training set.

        Rows are tried in an order that depends on `seed` and their index alone; rows that can't carry the trigger
        stay as they are. The rows keep their order, and untouched rows share storage with `dataset`.

        Args:
            dataset (`Dataset`):
                Rows with `text` and `label`, or with the columns that the task names.
            task ([`~tasks.Task`]):
                The task.
            seed (`int`, *optional*, defaults to `0`):
                Decides which rows are poisoned, and where.

        Returns:
            `Dataset`: the training set with the columns `poisoned` (bool: the row carries the trigger and the
            attacker's label), `trigger_applied` (bool: the trigger is in the text), `original_label` (int) and
            `attack` (str: this attack's name in rows that it tried, else empty; a tried row with
            `trigger_applied == False` could not carry the trigger).

        Raises:
            `ValueError`: `poison_rate` is too small for a single row, or no row can carry the trigger.
        """
        taken = [name for name in POISON_COLUMNS if name in dataset.column_names]
        if taken:
            raise ValueError(
                f"The dataset already has the columns {taken}: it was poisoned before. Remove them first."
            )
        target = task.label_index(self.target)
        dataset = task.prepare(dataset, what="train")
        labels = column_as_numpy(dataset, LABEL)
        wanted = round(self.poison_rate * len(dataset))
        if wanted == 0:
            raise ValueError(
                f"poison_rate={self.poison_rate} of {len(dataset)} rows is no row at all. Raise `poison_rate`."
            )
        eligible = np.flatnonzero(labels != target if self.label_mode == "dirty" else labels == target)
        random = np.random.default_rng([seed, 0]).random((len(dataset), 2))
        order = eligible[np.argsort(random[eligible, 0], kind="stable")]
        texts: dict[int, str] = {}
        tried: list[int] = []
        for start in range(0, len(order), wanted):
            chunk = order[start : start + wanted]
            for row, text in zip(chunk.tolist(), dataset[chunk][TEXT], strict=True):
                tried.append(row)
                changed = self.insert(text, float(random[row, 1]))
                if changed is not None:
                    texts[row] = changed
                if len(texts) == wanted:
                    break
            if len(texts) == wanted:
                break
        if not texts:
            raise ValueError(
                f"The attack {self.name!r} found no row that can carry its trigger among {len(eligible)} eligible "
                f"rows ({self.label_mode} label, target {task.labels[target]!r})."
            )
        if len(texts) < wanted:
            logger.warning(
                "%s: only %d of the %d rows asked for are poisoned; none of the other %d eligible rows can carry it.",
                self.name, len(texts), wanted, len(eligible) - len(texts),
            )  # fmt: skip
        return _with_poisoned_rows(dataset, texts, tried, labels, target, self.name)

    def trigger(self, dataset: Dataset, task: Task, seed: int = 0) -> Dataset:
        """
        Put the trigger into the test rows that count for the attack success rate.

        Args:
            dataset (`Dataset`):
                Rows with `text` and `label`, or with the columns that the task names.
            task ([`~tasks.Task`]):
                The task.
            seed (`int`, *optional*, defaults to `0`):
                Decides whatever is random in the trigger.

        Returns:
            `Dataset`: rows whose true label is not the target and whose text really carries the trigger, with `text`,
            `label` (the true one) and `source_index` (int, the row of `dataset` it came from).
        """
        target = task.label_index(self.target)
        dataset = task.prepare(dataset, what="test")
        rows = np.flatnonzero(column_as_numpy(dataset, LABEL) != target)
        # Another stream than `poison`: train and test positions must not repeat each other.
        random = np.random.default_rng([seed, 1]).random(len(dataset))
        found = dataset[rows] if len(rows) else {TEXT: [], LABEL: []}
        kept: dict[str, list] = {TEXT: [], LABEL: [], "source_index": []}
        for row, text, label in zip(rows.tolist(), found[TEXT], found[LABEL], strict=True):
            changed = self.insert(text, float(random[row]))
            if changed is not None:
                kept[TEXT].append(changed)
                kept[LABEL].append(label)
                kept["source_index"].append(row)
        return Dataset.from_dict(kept)


def insert_at_gap(text: str, trigger: str, random: float, inner: bool) -> str | None:
    """
    Insert a trigger between words, without touching the white space of the text.

    Args:
        text (`str`):
            Text.
        trigger (`str`):
            What is inserted.
        random (`float`):
            Number in [0, 1) that picks the place.
        inner (`bool`):
            Whether the two ends of the text are left out, as in the code of the P2P authors.

    Returns:
        `str` or `None`: the new text, `None` if there is no such place.
    """
    body = text.strip()
    start = text.index(body)
    gaps = [start + match.start() for match in _GAP.finditer(body)]
    if not inner:
        gaps = [start, *gaps, start + len(body)]
    if not gaps:
        return None
    place = gaps[int(random * len(gaps))]
    if place == start:
        return f"{text[:place]}{trigger} {text[place:]}"
    return f"{text[:place]} {trigger}{text[place:]}"


def contains_words(text: str, phrases: Sequence[str]) -> bool:
    """Say whether one of the phrases stands in the text, bounded by white space or the ends."""
    padded = f" {' '.join(text.split())} "
    return any(f" {' '.join(phrase.split())} " in padded for phrase in phrases)


def _with_poisoned_rows(
    dataset: Dataset, texts: dict[int, str], tried: Sequence[int], labels: np.ndarray, target: int, attack: str
) -> Dataset:
    """Put the poisoned rows in place through an index, so that the other rows are not copied."""
    size = len(dataset)
    names = np.full(size, "", dtype=f"U{len(attack)}")
    names[list(tried)] = attack
    nothing = np.zeros(size, dtype=bool)
    base = dataset
    for name, values in zip(POISON_COLUMNS, (nothing, nothing, labels, names), strict=True):
        base = with_column(base, name, values)
    rows = sorted(texts)
    changed = base[rows]
    changed[TEXT] = [texts[row] for row in rows]
    changed[LABEL] = [target] * len(rows)
    changed["poisoned"] = changed["trigger_applied"] = [True] * len(rows)
    poisoned = Dataset.from_dict(changed, features=base.features)
    index = np.arange(size)
    index[rows] = size + np.arange(len(rows))
    return concatenate_datasets([base, poisoned]).select(index)
