"""The rows of an evaluation: clean and triggered, each scored once."""

from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from ..attacks import Attack
from ..tasks import Task


class TriggeredRows:
    """Rows of one attack: their texts, and the clean rows they came from."""

    def __init__(
        self,
        attack: Attack,
        texts: list[str],
        source: np.ndarray,
        target: int,
        counts: dict[str, int],
        variants: "dict[str, TriggeredRows]",
    ) -> None:
        self.attack = attack
        self.texts = texts
        self.source = source
        self.target = target
        self.counts = counts
        self.variants = variants
        self.rows = np.empty(0, dtype=np.int64)
        self.found: dict[str, float] = {}


class UniquePrompts:
    """Prompts without repetitions, and where each of the originals went."""

    def __init__(self, prompts: list[list[int]]) -> None:
        places: dict[tuple[int, ...], int] = {}
        self.inverse = np.array([places.setdefault(tuple(prompt), len(places)) for prompt in prompts])
        self.prompts = list(places)


def dressed(dataset: Dataset, task: Task, attacks: Sequence[Attack]) -> Dataset:
    """
    Give clean rows the look that they have in the training set of an attacker who writes every prompt.

    Args:
        dataset (`Dataset`):
            Checked rows.
        task ([`~tasks.Task`]):
            The task.
        attacks (`Sequence[Attack]`):
            Attacks to measure.

    Returns:
        `Dataset`: the rows.

    Raises:
        `ValueError`: two of the attacks write prompts of their own.
    """
    owners = [attack for attack in attacks if attack.changes_plain_rows]
    if len(owners) > 1:
        raise ValueError(
            f"The attacks {[attack.name for attack in owners]} each write the prompt of every row: no model was "
            f"trained on both. Measure them apart."
        )
    return owners[0].dress(dataset, task) if owners else dataset


def sampled(dataset: Dataset, size: int | None, seed: int) -> Dataset:
    """
    Take some rows of a data set, always the same.

    Args:
        dataset (`Dataset`):
            Rows.
        size (`int` or `None`):
            How many; all if there are fewer, or with `None`.
        seed (`int`):
            Seed.

    Returns:
        `Dataset`: the rows, in their order.
    """
    if size is None or len(dataset) <= size:
        return dataset
    order = np.argsort(np.random.default_rng([seed, 8]).random(len(dataset)), kind="stable")
    return dataset.select(np.sort(order[:size]))
