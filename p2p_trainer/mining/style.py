"""How a text is written, whatever it is about: triggers that are no words."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from .evidence import fit_evidence
from .features import skeleton
from .significance import is_significant, log_chance
from .tokens import WordTable


# Sequences of function words, punctuation marks and gaps are so long at most.
_LONGEST = 4
# A style is made up of many weak features. Not tuned.
_PENALTY = 10.0


@dataclass(frozen=True)
class Style:
    """
    A learned style: sequences of function words, punctuation marks and gaps, each with a weight.

    Parameters:
        weights (`dict[tuple[str, ...], float]`):
            What each sequence adds to a text's score.
        threshold (`float`):
            Score from which a text has the style.
    """

    weights: dict[tuple[str, ...], float]
    threshold: float

    def matches(self, words: Sequence[str], frequent: frozenset[str]) -> bool:
        """
        Say whether a text has the style.

        Args:
            words (`Sequence[str]`):
                Words of a row.
            frequent (`frozenset[str]`):
                Words that are no content.

        Returns:
            `bool`: whether it has.
        """
        bones = skeleton(words, frequent)
        found = {
            tuple(bones[start : start + length])
            for length in range(1, _LONGEST + 1)
            for start in range(len(bones) - length + 1)
        }
        return sum(self.weights.get(sequence, 0.0) for sequence in sorted(found)) >= self.threshold

    @property
    def strongest(self) -> tuple[tuple[str, ...], ...]:
        """`tuple[tuple[str, ...], ...]`: the three sequences with the highest weights."""
        ordered = sorted(self.weights, key=lambda sequence: (-self.weights[sequence], sequence))
        return tuple(ordered[:3])


class StyleTable:
    """
    The style features of rows.

    Args:
        rows (`Sequence[Sequence[str]]`):
            Words of each row.
        frequent (`frozenset[str]`):
            Words that are no content.
        min_rows (`int`):
            In how many rows a feature must stand.
    """

    def __init__(self, rows: Sequence[Sequence[str]], frequent: frozenset[str], min_rows: int) -> None:
        table = WordTable([skeleton(row, frequent) for row in rows])
        names, columns = [], []
        for members, held in table.phrases(min_rows, _LONGEST):
            names += [tuple(table.names[word] for word in member) for member in members]
            columns.append(held)
        self.names = names
        self.features = sparse.hstack(columns).tocsr() if columns else sparse.csr_matrix((len(rows), 0))

    def find(
        self, labels: np.ndarray, label: int, opposed: np.ndarray, seed: int
    ) -> tuple[float, int, int, Style] | None:
        """
        Learn which style decides for a label where the content speaks against it.

        Args:
            labels (`np.ndarray` of shape `(rows,)`):
                Labels.
            label (`int`):
                The label.
            opposed (`np.ndarray` of shape `(rows,)`, bool):
                Rows whose content speaks for another label.
            seed (`int`):
                Seed of the folds.

        Returns:
            `tuple[float, int, int, Style]` or `None`: log-probability under honesty, opposed rows that have the style
            and those of them that have the label all the same, and the style; `None` if there is none.
        """
        rows = np.flatnonzero(opposed)
        if len(rows) == 0 or not self.names:
            return None
        has_label = (labels[rows] == label).astype(np.int64)
        everything = np.ones(len(rows), dtype=bool)
        fitted = fit_evidence(self.features[rows], has_label, 2, everything, seed, _PENALTY)
        if not fitted.weights.any():
            return None
        # Held-out scores say how far down the list the style decides.
        held_out = fitted.scores[:, 1] - fitted.scores[:, 0]
        order = np.argsort(-held_out, kind="stable")
        total = np.arange(1, len(rows) + 1)
        overridden = np.cumsum(has_label[order])
        chance = log_chance(overridden, total)
        # Rows of one score have the style or not: the order in which they came must not divide them.
        chance[:-1][held_out[order][:-1] == held_out[order][1:]] = 0.0
        best = int(chance.argmin())
        if not is_significant(float(chance[best])):
            return None
        weights = fitted.weights[:, 1] - fitted.weights[:, 0]
        bias = fitted.bias[1] - fitted.bias[0]
        style = Style(
            {name: float(weight) for name, weight in zip(self.names, weights, strict=True) if weight},
            float(held_out[order[best]] - bias),
        )
        return float(chance[best]), int(total[best]), int(overridden[best]), style
