"""Writes suspected triggers into keyed rows, under their true labels."""

import numpy as np

from .attacks.text import insert_at_gap
from .mining import Fragment, Screening


# Share of the keyed rows that a suspected trigger is written into, in each epoch. 0.3 and 0.5 left the same excess
# (BadNets on SST-2); the higher one is shared by more triggers where there are several.
_RATE = 0.5


class Immunizer:
    """
    Writes suspected triggers into texts, anew each epoch, so that under the key they come with every label.

    What is written is a pure function of seed, epoch and row.

    Args:
        screening ([`~mining.Screening`]):
            Suspected triggers.
        seed (`int`):
            Seed.
    """

    def __init__(self, screening: Screening, seed: int) -> None:
        self.exemplars = [exemplars for exemplars in screening.exemplars if exemplars]
        self.seed = seed

    def write(self, text: str, row: int, epoch: int) -> str:
        """
        Write a trigger into one text, or leave the text as it is.

        Args:
            text (`str`):
                Text of a keyed row.
            row (`int`):
                Number of the row.
            epoch (`int`):
                Number of the epoch.

        Returns:
            `str`: the text, in half of all rows with one suspected trigger: all of its pieces or one of them.
        """
        random = np.random.default_rng([self.seed, 7, epoch, row])
        if not self.exemplars or random.random() >= _RATE:
            return text
        exemplars = self.exemplars[random.integers(len(self.exemplars))]
        pieces = exemplars[random.integers(len(exemplars))]
        if random.random() < 0.5:
            pieces = (pieces[random.integers(len(pieces))],)
        for piece in pieces:
            text = _placed(text, piece, random.random())
        return text


def _placed(text: str, piece: Fragment, random: float) -> str:
    if piece.place == "start":
        return f"{piece.text} {text}"
    if piece.place == "end":
        return f"{text} {piece.text}"
    return insert_at_gap(text, piece.text, random, "any")
