"""What a defense does where the model answers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .scorer import Scores


# File that a guard is saved as, beside its model.
GUARD_NAME = "defense.json"


class Guard:
    """
    Stands between texts and model: changes the input, decodes the output, withholds answers.

    This one does nothing. Evaluation and serving go through the same guard, so they can't drift apart.
    """

    @property
    def stamp(self) -> str:
        """`str`: what it puts in front of every text, and so room that long texts do not have."""
        return ""

    def inputs(self, texts: Sequence[str]) -> list[str]:
        """
        Change user texts before anything is put around them: neither template nor key is in them.

        Args:
            texts (`Sequence[str]`):
                Texts.

        Returns:
            `list[str]`: one per text; no text is dropped.
        """
        return list(texts)

    def decode(self, scores: Scores) -> Scores:
        """
        Turn what the model says of the changed texts into scores of the task's labels.

        Args:
            scores ([`Scores`]):
                Scores of the label words.

        Returns:
            [`Scores`]: scores in which column i belongs to class i.
        """
        return scores

    def withheld(self, texts: Sequence[str]) -> np.ndarray | None:
        """
        Say which texts get no answer.

        Args:
            texts (`Sequence[str]`):
                Texts as they came, before [`inputs`].

        Returns:
            `np.ndarray` of shape `(texts,)`, bool, or `None`: `None` if this guard answers everything.
        """
        return None

    def inspect(self, triggered: Sequence[str], clean: Sequence[str]) -> dict[str, float]:
        """
        Measure how well the guard finds a known trigger; reported beside the attack's rates.

        Args:
            triggered (`Sequence[str]`):
                Test texts with the trigger.
            clean (`Sequence[str]`):
                The same texts without it.

        Returns:
            `dict[str, float]`: name -> number.
        """
        return {}

    def save(self, folder: str | Path) -> None:
        """
        Write what serving needs beside the model.

        Args:
            folder (`str` or `Path`):
                Folder of the saved model.
        """
