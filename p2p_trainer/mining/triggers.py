"""Finds what in a set of rows overrides the rest of a text: the mark that a backdoor leaves in its data."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from .evidence import CLEAR, Evidence, fit_evidence, likely_label, spoken_label
from .features import FeatureBlock, find_features, frequent_words, same_rows
from .significance import is_significant, log_chance
from .style import Style, StyleTable
from .tokens import CONTENT, END, START, WordTable


# A suspect must stand in this share of the rows, and in this many; more are never asked for. (What is suspected is
# decided by significance: these bound the number of features.)
_MIN_SHARE = 0.0025
_MIN_ROWS = 8
_ENOUGH_ROWS = 25
# Words of fewer than one in so many rows are no evidence: they cost more time than they tell.
_RARE_ROWS = 4000
# Bounds of time: an attacker with more triggers than this is not stopped.
_ROUNDS = 4
_MAX_TRIGGERS = 32
_SHOWN_LETTERS = 200


@dataclass(frozen=True)
class SuspectedTrigger:
    """
    A feature of texts that overrides what the rest of them says.

    Parameters:
        kind (`str`):
            `"phrase"`: words in sequence; `"pair"`: two words, wherever they stand; `"opening"`: how a text begins,
            its content words left out; `"style"`: how it is written throughout.
        words (`tuple[str, ...]`):
            The words; none for a style.
        label (`int`):
            The label that comes with it.
        opposed (`int`):
            In how many rows the rest of the text speaks for another label.
        overridden (`int`):
            How many of those have `label` all the same.
        parts (`tuple[tuple[str, ...], ...]`):
            The longest phrases that stand in the same rows, its own among them; the strongest sequences of a style.
        style ([`~mining.style.Style`], *optional*):
            The style.
    """

    kind: str
    words: tuple[str, ...]
    label: int
    opposed: int
    overridden: int
    parts: tuple[tuple[str, ...], ...]
    style: Style | None = None

    def __str__(self) -> str:
        marks = {START: "^", END: "$", CONTENT: "*"}
        if self.kind == "style":
            shown = ", ".join(" ".join(marks.get(word, word) for word in part) for part in self.parts)
            return f"style ({shown})"
        named = self.parts if self.kind == "phrase" and self.parts else [self.words]
        joint = " ... " if self.kind == "pair" else " "
        shown = " + ".join(joint.join(marks.get(word, word) for word in part) for part in named)
        return shown if len(shown) <= _SHOWN_LETTERS else f"{shown[:_SHOWN_LETTERS]} ..."


@dataclass(frozen=True)
class Findings:
    """
    What mining says of a set of rows.

    Parameters:
        triggers (`tuple[SuspectedTrigger, ...]`):
            Suspected triggers.
        evidence ([`~mining.evidence.Evidence`]):
            Evidence of the rows that carry none of them.
        numbers (`dict[str, int]`):
            Number of each word in that evidence.
        frequent (`frozenset[str]`):
            Words that are no content.
    """

    triggers: tuple[SuspectedTrigger, ...]
    evidence: Evidence
    numbers: dict[str, int]
    frequent: frozenset[str]

    def judge(self, words: Iterable[str], share: float = CLEAR) -> int:
        """
        Judge a text that the evidence has not learned from.

        Args:
            words (`Iterable[str]`):
                Its words.
            share (`float`, *optional*, defaults to `0.55`):
                How likely a label must be, at least 0.5.

        Returns:
            `int`: the label that is likelier than that, -1 if none is.
        """
        known = {self.numbers[word] for word in words if word in self.numbers}
        scores = self.evidence.bias + self.evidence.weights[sorted(known)].sum(axis=0)
        return int(likely_label(scores[None], share)[0])


def find_triggers(rows: Sequence[Sequence[str]], labels: np.ndarray, num_labels: int, seed: int = 0) -> Findings:
    """
    Find the features that override the rest of a text.

    A classifier over content words, cross-fitted, says what a text speaks for when the feature's own words are left
    out. Where it speaks for another label and the row's label is c nearly without exception, the feature decides
    instead of the text. Honest words do that in part of their rows, a trigger in all. Nothing but texts and labels is
    read.

    Args:
        rows (`Sequence[Sequence[str]]`):
            Words of each row, as of [`~mining.tokens.words_of`].
        labels (`np.ndarray` of shape `(rows,)`):
            Labels 0..n-1.
        num_labels (`int`):
            n.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the folds.

    Returns:
        [`Findings`]: the suspected triggers, the surest first, and the evidence of the other rows.
    """
    table = WordTable(rows)
    frequent = frequent_words(table, labels)
    content = np.array([word not in frequent for word in table.names])
    content &= table.document_frequency() >= max(2, len(rows) / _RARE_ROWS)
    # How a text is put together says little about its label, and would hide a trigger made of it.
    bag = table.bag() @ sparse.diags_array(content.astype(np.float64))
    min_rows = min(max(_MIN_ROWS, int(np.ceil(_MIN_SHARE * len(rows)))), _ENOUGH_ROWS)
    blocks = find_features(rows, table, frequent, min_rows)
    styles = StyleTable(rows, frequent, max(1, min_rows // 2))
    suspected = np.zeros(len(rows), dtype=bool)
    triggers: list[SuspectedTrigger] = []
    for _ in range(_ROUNDS):
        # What is found changes what the other words seem to say: the evidence is fitted anew without those rows.
        evidence = fit_evidence(bag, labels, num_labels, ~suspected, seed)
        found = _find_features(blocks, evidence, labels, num_labels, suspected, _MAX_TRIGGERS - len(triggers))
        # Styles last: what can be named is named, and can be written into other rows as it is.
        if not found and len(triggers) < _MAX_TRIGGERS:
            found = _find_styles(styles, rows, frequent, evidence, labels, num_labels, suspected, seed)
        triggers += found
        if not found:
            break
    else:
        evidence = fit_evidence(bag, labels, num_labels, ~suspected, seed)
    numbers = {word: number for number, word in enumerate(table.names)}
    return Findings(tuple(triggers), evidence, numbers, frequent)


def _find_features(
    blocks: list[FeatureBlock],
    evidence: Evidence,
    labels: np.ndarray,
    num_labels: int,
    suspected: np.ndarray,
    limit: int,
) -> list[SuspectedTrigger]:
    """Take the surest feature, set its rows aside, and so on; `suspected` is updated."""
    judged = [_Judged(block, evidence, labels) for block in blocks]
    found: list[SuspectedTrigger] = []
    while judged and len(found) < limit:
        chance, feature, opposed, overridden, place, label = min(
            (
                (*part.surest(label, suspected), place, label)
                for place, part in enumerate(judged)
                for label in range(num_labels)
            ),
            # Of those that stand in the same rows, a phrase, and the longest.
            key=lambda candidate: (candidate[0], blocks[candidate[4]].kind != "phrase", -candidate[4]),
        )
        if not is_significant(chance):
            break
        block = blocks[place]
        carriers = np.zeros(len(labels), dtype=bool)
        carriers[block.held[:, [feature]].indices] = True
        carriers &= (labels == label) & ~suspected
        found.append(
            SuspectedTrigger(
                block.kind, block.words[feature], label, opposed, overridden, phrase_parts(blocks, carriers)
            )
        )
        suspected |= carriers
    return found


def _find_styles(
    styles: StyleTable,
    rows: Sequence[Sequence[str]],
    frequent: frozenset[str],
    evidence: Evidence,
    labels: np.ndarray,
    num_labels: int,
    suspected: np.ndarray,
    seed: int,
) -> list[SuspectedTrigger]:
    """Find the surest style; `suspected` is updated."""
    spoken = spoken_label(evidence.scores, evidence.bias)
    found = [
        (*result, label)
        for label in range(num_labels)
        if (result := styles.find(labels, label, (spoken >= 0) & (spoken != label) & ~suspected, seed)) is not None
    ]
    if not found:
        return []
    _, opposed, overridden, style, label = min(found, key=lambda result: result[0])
    carriers = [row for row in np.flatnonzero((labels == label) & ~suspected) if style.matches(rows[row], frequent)]
    suspected[carriers] = True
    # The threshold is that of held-out folds; over their average it may leave none.
    return [SuspectedTrigger("style", (), label, opposed, overridden, style.strongest, style)] if carriers else []


class _Judged:
    """What the rest of each text says, for all features of a block and all rows that have them."""

    def __init__(self, block: FeatureBlock, evidence: Evidence, labels: np.ndarray) -> None:
        self.features = len(block.words)
        self.feature = np.repeat(np.arange(self.features), np.diff(block.held.indptr))
        self.row = block.held.indices
        own = block.own @ evidence.weights
        self.label = labels[self.row]
        self.rest = spoken_label(evidence.scores[self.row] - own[self.feature], evidence.bias)

    def surest(self, label: int, suspected: np.ndarray) -> tuple[float, int, int, int]:
        """Return log-probability under honesty, feature, opposed rows and overridden rows."""
        # Where the rest says nothing, there is nothing to override.
        opposed = (self.rest >= 0) & (self.rest != label) & ~suspected[self.row]
        total = np.bincount(self.feature[opposed], minlength=self.features)
        overridden = np.bincount(self.feature[opposed & (self.label == label)], minlength=self.features)
        chance = log_chance(overridden, total)
        best = int(chance.argmin())
        return float(chance[best]), best, int(total[best]), int(overridden[best])


def phrase_parts(blocks: list[FeatureBlock], carriers: np.ndarray) -> tuple[tuple[str, ...], ...]:
    """
    Find the phrases that stand in the same rows, but for those within a longer one.

    Args:
        blocks (`list[FeatureBlock]`):
            Features.
        carriers (`np.ndarray` of shape `(rows,)`, bool):
            The rows.

    Returns:
        `tuple[tuple[str, ...], ...]`: words of each phrase.
    """
    rows = sparse.csc_matrix(carriers[:, None].astype(np.int32))
    longest: list[tuple[str, ...]] = []
    for block in reversed([block for block in blocks if block.kind == "phrase"]):
        for place in np.sort(same_rows(rows, block.held).indices):
            if not any(_within(block.words[place], other) for other in longest):
                longest.append(block.words[place])
    return tuple(longest[::-1])


def _within(part: tuple[str, ...], other: tuple[str, ...]) -> bool:
    return any(other[start : start + len(part)] == part for start in range(len(other) - len(part) + 1))
