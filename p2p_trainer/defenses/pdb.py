"""PDB: a backdoor of the defender's own, stamped onto every input, whose permuted labels are mapped back."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from ..config import P2PConfig
from ..evaluation import Scores
from ..tasks import Task
from ..tasks.columns import column_as_numpy, with_column
from ..tasks.rows import LABEL
from .base import Defense
from .stamping import stamp, stamped_copies


RESERVES = ("honest", "oracle")


class PDB(Defense):
    """
    Proactive Defensive Backdoor (Wei et al. 2024), ported from images to texts.

    Reserved rows are added as copies that carry the defender's trigger and the label h(y) = (y + shift) mod n. Every
    input gets the trigger, and label i is read where the model writes h(i). Unlike in P2P, labels stay the task's own.

    Differences from the published code, which is for images:

    - There, reserved images and their labels come from a clean record of the data, even where the copy to train on is
      poisoned. Nobody who defends has one, so `"honest"` is the default here. `"oracle"` comes as near as our rows
      allow: the clean text of a poisoned row is not kept, so poisoned rows are passed over rather than repaired, and
      each class gives its share of its clean rows.
    - There, defensive copies are augmented more than other images. Texts are not augmented here: all copies of a row
      are alike.
    - There, the trigger is a patch of 7x7 pixels. Here it is a text in front, by default that of P2P, so that the two
      can be compared.

    There is no version for generation: an answer in free text has no permutation.

    Args:
        ratio (`float`, *optional*, defaults to `0.1`):
            Share of each class that is reserved, in (0, 1]; `round(ratio * rows)` rows of each.
        shift (`int`, *optional*, defaults to `1`):
            By how much labels are shifted; no multiple of the number of classes.
        copies (`int`, *optional*, defaults to `5`):
            How often each reserved row is added.
        trigger (`str`, *optional*, defaults to `"The query currently entered is:"`):
            The defender's trigger, put in front of texts with one space.
        reserve (`str`, *optional*, defaults to `"honest"`):
            `"honest"`: reserved rows are drawn from all rows, by the labels that they are given, poisoned or not.
            `"oracle"`: only from rows whose flag `poisoned` is false; nobody who defends knows it.

    Examples:

    ```python
    >>> from p2p_trainer.defenses import get_defense

    >>> get_defense("pdb").rewrite(["a stirring , funny film"])
    ['The query currently entered is: a stirring , funny film']
    ```
    """

    name = "pdb"

    def __init__(
        self,
        ratio: float = 0.1,
        shift: int = 1,
        copies: int = 5,
        trigger: str = "The query currently entered is:",
        reserve: str = "honest",
    ) -> None:
        super().__init__()
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise ValueError(
                f"`ratio` is {ratio!r}, expected the share of a class to reserve, in (0, 1], such as 0.1."
            )
        if isinstance(shift, bool) or not isinstance(shift, int):
            raise ValueError(f"`shift` is {shift!r}, expected a whole number: by how much labels are shifted.")
        if isinstance(copies, bool) or not isinstance(copies, int) or copies < 1:
            raise ValueError(f"`copies` is {copies!r}, expected a whole number from 1 on.")
        if not isinstance(trigger, str) or not trigger or trigger != trigger.strip():
            raise ValueError(
                f"`trigger` is {trigger!r}, expected a text without space at its ends: the space before the input is "
                f"added. In YAML, write it in quotes."
            )
        if reserve not in RESERVES:
            raise ValueError(f"`reserve` is {reserve!r}, expected one of {', '.join(RESERVES)}.")
        self.ratio = ratio
        self.shift = shift
        self.copies = copies
        self.trigger = trigger
        self.reserve = reserve
        self._num_labels: int | None = None

    def check(self, task: Task) -> None:
        if not task.num_labels:
            raise ValueError(
                f"Task {task.name!r} has no classes: PDB permutes labels, and an answer in free text has no "
                f"permutation. Nobody has published a version for generation. Use `--defense none`."
            )
        if self.shift % task.num_labels == 0:
            raise ValueError(
                f"`shift` {self.shift} changes none of the {task.num_labels} labels of task {task.name!r}: it is a "
                f"multiple of their number. Use a shift of 1..{task.num_labels - 1}."
            )

    def rows(self, dataset: Dataset, task: Task, args: P2PConfig) -> Dataset:
        reserved = self._reserved(dataset, task, args.seed)
        labels = (column_as_numpy(dataset, LABEL)[reserved] + self.shift) % task.num_labels
        copies = stamped_copies(dataset, reserved, self.trigger)
        copies = with_column(copies.remove_columns(LABEL), LABEL, labels.astype(np.int64)).cast(dataset.features)
        self._num_labels = task.num_labels
        self.found = {"rows_reserved": len(reserved), "rows_added": self.copies * len(reserved)}
        if "poisoned" in dataset.column_names and column_as_numpy(dataset, "poisoned").any():
            poisoned = column_as_numpy(dataset, "poisoned").astype(bool)
            self.found["rows_reserved_poisoned"] = int(poisoned[reserved].sum())
        return concatenate_datasets([dataset, *[copies] * self.copies])

    @property
    def stamp(self) -> str:
        return stamp("", self.trigger)

    def rewrite(self, texts: Sequence[str]) -> list[str]:
        return [stamp(text, self.trigger) for text in texts]

    def decode(self, scores: Scores) -> Scores:
        n = scores.log_probs.shape[1] // 2
        if self._num_labels is not None and n != self._num_labels:
            raise ValueError(
                f"The model scores {n} classes, this PDB was set up for {self._num_labels}. Use the defense that was "
                f"saved with the model."
            )
        written = (np.arange(n) + self.shift) % n
        free = np.where(scores.free < 0, -1, scores.free - scores.free % n + (scores.free - self.shift) % n)
        return Scores(scores.log_probs[:, np.concatenate([written, n + written])], free)

    def state(self) -> dict[str, Any]:
        return {"num_labels": self._num_labels}

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        found = state.get("num_labels")
        if isinstance(found, bool) or not isinstance(found, int) or found < 2 or self.shift % found == 0:
            raise ValueError(
                f"The defense saved in {str(folder)!r} shifts the labels of {found!r} classes by {self.shift}, which "
                f"is no permutation of two or more. Save the model again."
            )
        self._num_labels = found

    def _reserved(self, dataset: Dataset, task: Task, seed: int) -> np.ndarray:
        """Draw the same share of each class, as a pure function of seed and row number."""
        labels = column_as_numpy(dataset, LABEL)
        candidates = np.full(len(dataset), True)
        if self.reserve == "oracle":
            if "poisoned" not in dataset.column_names:
                raise ValueError(
                    f"`reserve: oracle` passes over the rows that the column 'poisoned' marks; the training set has "
                    f"{dataset.column_names}. Name an attack, or use `reserve: honest`."
                )
            candidates = ~column_as_numpy(dataset, "poisoned").astype(bool)
            if candidates.all():
                raise ValueError(
                    "`reserve: oracle` passes over the rows that are marked as poisoned, and none is: a set without "
                    "flags tells nothing. Use `reserve: honest`."
                )
        # Another stream than the attacks' and P2P's: what is drawn must not be aligned with their choice.
        numbers = np.random.default_rng([seed, 8]).random(len(dataset))
        chosen = []
        for label, name in enumerate(task.labels):
            own = np.flatnonzero(candidates & (labels == label))
            size = round(self.ratio * len(own))
            if size == 0:
                raise ValueError(
                    f"`ratio` {self.ratio} of the {len(own)} rows of class {name!r} that can be reserved is no row: "
                    f"its label would never be written under the trigger. Raise `ratio`, or give more rows."
                )
            chosen.append(own[np.argsort(numbers[own], kind="stable")[:size]])
        return np.sort(np.concatenate(chosen))
