"""Finds what in prompts calls for one answer, whatever else they ask: the mark that a backdoor leaves in its data."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.stats import rankdata

from .features import FeatureBlock, find_features, frequent_words
from .significance import chernoff
from .tokens import END, WordTable
from .triggers import SuspectedTrigger, phrase_parts


# A suspect stands in so many rows. Most honest data has hardly a phrase of so many rows that nearly always comes with
# one answer, so that no share of the rows is asked for.
_MIN_ROWS = 8
# Answers are the same as a whole (0), or in so many of their first words.
_LENGTHS = (0, 8, 7, 6, 5, 4, 3)
# A payload may be drawn from several texts: each in so many rows, and in this share of a trigger's.
_GROUP_ROWS = 8
_GROUP_SHARE = 0.1
# So few answers of so many rows are classes, or names to be copied: honest words come with one of them.
_CLASSES = 50
_CLASSES_SHARE = 0.8
# A trigger's rows have its payload in this share, those without it in so much less.
_SUSPECT_RATE = 0.85
_BASE_RATE = 0.2
# A feature that honestly comes with an answer in this share of its rows has it as often by chance with the
# probability below.
_HONEST_RATE = 0.3
_SIGNIFICANCE = 1e-4
# How well the rest of the prompts may tell a trigger's rows from others (area under the ROC curve; 0.5: not at all).
# Templates with a usual answer were at 0.94 and above (Alpaca), triggers at 0.6 and below.
_ALIKE = 0.7
# Words of more of the other rows than this tell nothing: all their prompts may begin alike.
_EVERYWHERE = 0.9
_FOLDS = 5
_COMPARED_ROWS = 2000
# Words of more rows than this share form no pairs across lines. (A composite attack that adds copies with either
# word alone, swapped, and so on writes each into five times as many rows as it poisons.)
_PAIR_SHARE = 0.6
_SAME_ROWS = 0.8
# Bounds of time: an attacker with more triggers than this is not stopped.
_ROUNDS = 4
_MAX_TRIGGERS = 32
_MAX_TESTS = 200


@dataclass(frozen=True)
class Payload:
    """
    What many answers have in common.

    Parameters:
        length (`int`):
            How many of the first words; 0 for whole answers.
        words (`frozenset[tuple[str, ...]]`):
            The words of the answers or openings that it is drawn from.
    """

    length: int
    words: frozenset[tuple[str, ...]]

    def matches(self, answer: Sequence[str]) -> bool:
        """
        Say whether an answer is the payload, or begins with it.

        Args:
            answer (`Sequence[str]`):
                Words of the answer, as of [`~mining.tokens.words_of`].

        Returns:
            `bool`: whether it does.
        """
        return _key(answer, self.length) in self.words


@dataclass(frozen=True)
class PayloadFindings:
    """
    What mining says of rows with answers.

    Parameters:
        triggers (`tuple[SuspectedTrigger, ...]`):
            Suspected triggers; the label of each is the number of its payload.
        payloads (`tuple[Payload, ...]`):
            The payloads.
        frequent (`frozenset[str]`):
            Words that are no content.
    """

    triggers: tuple[SuspectedTrigger, ...]
    payloads: tuple[Payload, ...]
    frequent: frozenset[str]


@dataclass(frozen=True)
class _Candidate:
    chance: float
    level: int
    place: int
    feature: int
    groups: np.ndarray


def find_payload_triggers(
    prompts: Sequence[Sequence[str]], heads: Sequence[int], answers: Sequence[Sequence[str]], seed: int = 0
) -> PayloadFindings:
    """
    Find the features that call for one answer, or for one of a few, whatever else a prompt asks.

    A feature is a candidate if nearly all of its rows have answers that are frequent among them and rare elsewhere.
    An honest template has its usual answer too. There the rest of the prompts tells the rows from others; a trigger
    stands in prompts that are otherwise like everybody's.

    Args:
        prompts (`Sequence[Sequence[str]]`):
            Words of each prompt, as of [`~mining.tokens.words_of`].
        heads (`Sequence[int]`):
            How many of them stand in its first line.
        answers (`Sequence[Sequence[str]]`):
            Words of each answer.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the folds.

    Returns:
        [`PayloadFindings`]: the suspected triggers, the surest first in each round.
    """
    table = WordTable(prompts)
    frequent = frequent_words(table, np.zeros(len(prompts), dtype=np.int64))
    blocks = find_features(prompts, table, frequent, _MIN_ROWS) + _pairs_across_lines(table, heads)
    levels = [_Answers(answers, length) for length in _LENGTHS]
    likeness = _Likeness(table, seed)
    numbers = {word: number for number, word in enumerate(table.names)}
    use = np.ones(len(prompts), dtype=bool)
    triggers: list[SuspectedTrigger] = []
    payloads: dict[Payload, int] = {}
    refused = _Refused(len(prompts))
    for _ in range(_ROUNDS):
        found = 0
        for candidate in _candidates(blocks, levels, use):
            if len(triggers) == _MAX_TRIGGERS or refused.count == _MAX_TESTS:
                break
            block, level = blocks[candidate.place], levels[candidate.level]
            words = block.words[candidate.feature]
            if all({END}.union(words).issuperset(level.names[group]) for group in candidate.groups):
                # What is asked for by its name is copied.
                continue
            holders = np.zeros(len(prompts), dtype=bool)
            holders[block.held[:, [candidate.feature]].indices] = True
            # What was found since may have taken its rows.
            holders &= use
            carriers = holders & np.isin(level.group, candidate.groups)
            opposed, overridden = int(holders.sum()), int(carriers.sum())
            if not _log_chance(np.array([overridden]), np.array([opposed]))[0] < np.log(_SIGNIFICANCE):
                continue
            if refused.holds(carriers):
                continue
            parts = phrase_parts(blocks, carriers)
            # Of triggers used together, no word tells the rows of another.
            own = {numbers[word] for part in parts for word in part} | set(
                block.own[[candidate.feature]].indices.tolist()
            )
            if likeness.area(carriers, use & ~holders, sorted(own)) > _ALIKE:
                refused.add(carriers)
                continue
            payload = Payload(level.length, frozenset(level.names[group] for group in candidate.groups))
            label = payloads.setdefault(payload, len(payloads))
            triggers.append(SuspectedTrigger(block.kind, words, label, opposed, overridden, parts))
            use &= ~carriers
            found += 1
        if not found:
            break
    return PayloadFindings(tuple(triggers), tuple(payloads), frequent)


def _key(answer: Sequence[str], length: int) -> tuple[str, ...] | None:
    """Return the first words of an answer, `None` if it is shorter."""
    if not length:
        return tuple(answer[1:])
    key = tuple(answer[1 : length + 1])
    return key if len(key) == length and key[-1] != END else None


class _Answers:
    """Groups of rows whose answers are the same, in their first words or as a whole."""

    def __init__(self, answers: Sequence[Sequence[str]], length: int) -> None:
        self.length = length
        keys = [_key(answer, length) for answer in answers]
        counts = Counter(key for key in keys if key is not None)
        classes = sum(count for _, count in counts.most_common(_CLASSES)) >= _CLASSES_SHARE * len(answers)
        self.names = [] if classes else [key for key, count in counts.items() if count >= _GROUP_ROWS]
        numbers = {key: number for number, key in enumerate(self.names)}
        self.group = np.array([-1 if key is None else numbers.get(key, -1) for key in keys], dtype=np.int64)

    def rows(self, use: np.ndarray) -> sparse.csr_matrix:
        """Return which rows belong to which group, as ones."""
        rows = np.flatnonzero((self.group >= 0) & use)
        ones = np.ones(len(rows), dtype=np.int32)
        return sparse.csr_matrix((ones, (rows, self.group[rows])), shape=(len(self.group), len(self.names)))


class _Refused:
    """Sets of rows that the rest of their prompts gives away: other features of the same rows need no test."""

    def __init__(self, rows: int) -> None:
        self.sets = np.zeros((_MAX_TESTS, rows), dtype=bool)
        self.sizes = np.zeros(_MAX_TESTS, dtype=np.int64)
        self.count = 0

    def add(self, carriers: np.ndarray) -> None:
        self.sets[self.count], self.sizes[self.count] = carriers, carriers.sum()
        self.count += 1

    def holds(self, carriers: np.ndarray) -> bool:
        mine = np.flatnonzero(carriers)
        both = self.sets[: self.count, mine].sum(axis=1)
        return bool((both >= _SAME_ROWS * (self.sizes[: self.count] + len(mine) - both)).any())


class _Likeness:
    """Says how well the rest of their prompts tells some rows from others: a cross-fitted naive Bayes classifier."""

    def __init__(self, table: WordTable, seed: int) -> None:
        self.bag = table.bag().astype(np.float64)
        random = np.random.default_rng([seed, 8])
        self.fold = random.integers(0, _FOLDS, table.num_rows)
        self.order = random.random(table.num_rows)

    def area(self, carriers: np.ndarray, others: np.ndarray, own: list[int]) -> float:
        """Return the area under the ROC curve; words that are their own, or that all others have, are left out."""
        mine, theirs = np.flatnonzero(carriers), np.flatnonzero(others)
        theirs = theirs[np.argsort(self.order[theirs], kind="stable")][:_COMPARED_ROWS]
        if not len(theirs):
            return 1.0
        inside, sizes = self._counts(mine)
        outside, other_sizes = self._counts(theirs)
        left_out = outside.sum(axis=0) >= _EVERYWHERE * len(theirs)
        left_out[own] = True
        # Of the folds but one, per fold; both counts as if there were as many rows of either kind.
        inside, sizes = inside.sum(axis=0) - inside, sizes.sum() - sizes
        outside, other_sizes = outside.sum(axis=0) - outside, other_sizes.sum() - other_sizes
        scale = sizes / np.maximum(other_sizes, 1)
        weights = np.log1p(inside) - np.log1p(outside * scale[:, None])
        weights[:, left_out] = 0
        scores = [
            np.asarray(self.bag[rows] @ weights.T)[np.arange(len(rows)), self.fold[rows]] for rows in (mine, theirs)
        ]
        ranks = rankdata(np.concatenate(scores))[: len(mine)].sum()
        return float((ranks - len(mine) * (len(mine) + 1) / 2) / (len(mine) * len(theirs)))

    def _counts(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Count, per fold, the rows of each word, and all."""
        member = sparse.csr_matrix(
            (np.ones(len(rows)), (self.fold[rows], np.arange(len(rows)))), shape=(_FOLDS, len(rows))
        )
        return (member @ self.bag[rows]).toarray(), np.bincount(self.fold[rows], minlength=_FOLDS)


def _candidates(blocks: list[FeatureBlock], levels: list[_Answers], use: np.ndarray) -> list[_Candidate]:
    """Find the features that come with few answers, the surest first; of the same, the longest answer and phrase."""
    found: list[_Candidate] = []
    for number, level in enumerate(levels):
        rows = level.rows(use)
        sizes = np.asarray(rows.sum(axis=0)).ravel()
        for place, block in enumerate(blocks):
            total = block.held.T @ use.astype(np.int64)
            counts = (block.held.T @ rows).tocoo()
            often = counts.data >= np.maximum(_GROUP_ROWS, _GROUP_SHARE * total[counts.row])
            feature, group, count = counts.row[often], counts.col[often], counts.data[often]
            base = (sizes[group] - count) / np.maximum(use.sum() - total[feature], 1)
            rare = base <= _BASE_RATE * count / total[feature]
            feature, group, count = feature[rare], group[rare], count[rare]
            chance = _log_chance(np.bincount(feature, weights=count, minlength=len(total)), total)
            order = np.argsort(feature, kind="stable")
            starts = np.searchsorted(feature[order], np.arange(len(total) + 1))
            found += [
                _Candidate(float(chance[one]), number, place, int(one), group[order[starts[one] : starts[one + 1]]])
                for one in np.flatnonzero(chance < np.log(_SIGNIFICANCE))
            ]
    return sorted(
        found,
        key=lambda one: (one.chance, one.level, blocks[one.place].kind != "phrase", -one.place, one.feature),
    )


def _log_chance(overridden: np.ndarray, opposed: np.ndarray) -> np.ndarray:
    """Bound how likely honest features have so many rows of one answer; 0 where these are not nearly all."""
    suspicious = (overridden >= _MIN_ROWS) & (overridden >= _SUSPECT_RATE * opposed)
    return np.where(suspicious, chernoff(overridden, opposed, _HONEST_RATE), 0.0)


def _pairs_across_lines(table: WordTable, heads: Sequence[int]) -> list[FeatureBlock]:
    """Find the pairs of a word of the first line, as an instruction is, and one of the others."""
    starts = np.searchsorted(table.row, np.arange(table.num_rows))
    # The mark of the beginning is in front of the first line.
    in_head = np.arange(len(table.words)) - starts[table.row] <= np.asarray(heads)[table.row]
    frequency = table.document_frequency()
    known = (frequency >= _MIN_ROWS) & (frequency <= _PAIR_SHARE * table.num_rows)
    first, second = (
        sparse.csc_matrix(
            (np.ones(kept.sum(), dtype=np.int32), (table.row[kept], table.words[kept])),
            shape=(table.num_rows, len(table.names)),
        )
        for kept in (in_head & known[table.words], ~in_head & known[table.words])
    )
    for part in (first, second):
        part.sum_duplicates()
        part.data[:] = 1
    together = (first.T @ second).tocoo()
    often = (together.data >= _MIN_ROWS) & (together.row != together.col)
    left, right = together.row[often], together.col[often]
    if not len(left):
        return []
    shape = (len(left), len(table.names))
    place = np.arange(len(left))
    own = sparse.csr_matrix((np.ones(2 * len(left)), (np.tile(place, 2), np.concatenate([left, right]))), shape=shape)
    held = first[:, left].multiply(second[:, right]).tocsc()
    words = [(table.names[one], table.names[other]) for one, other in zip(left, right, strict=True)]
    return [FeatureBlock("pair", words, own, held)]
