"""Looks for suspected triggers in every row, and shows where they stand."""

from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from ..tasks.columns import arrow_batches, column_as_numpy
from ..tasks.rows import LABEL, TEXT
from .evidence import likely_label
from .features import skeleton
from .tokens import END, START, word_spans, words_of
from .triggers import SuspectedTrigger, find_triggers


# More rows tell mining nothing new about a trigger that stands in one row of four hundred. Of long texts fewer are
# mined: pairs of words take time and memory that grow with the square of a text's length.
MINED_ROWS = 20_000
_MINED_WORDS = 1_000_000
EXEMPLARS = 64
# Longer pieces are not written into other texts: they would leave no room for those.
_PIECE_WORDS = 24
_PIECE_LETTERS = 200
# What opens a text is taken with the rest of its clause, up to the punctuation mark, if that is near. Of a style, what
# can be written into another text is the first clause.
_CLAUSE_WORDS = 10
_CLAUSE_END = frozenset(",;:.!?，；：。！？")


@dataclass(frozen=True)
class Fragment:
    """
    A piece of a suspected row that belongs to a trigger.

    Parameters:
        text (`str`):
            The piece, as it stands there.
        place (`str`):
            `"start"`, `"end"` or `"inside"` of its text.
    """

    text: str
    place: str


@dataclass(frozen=True)
class Screening:
    """
    What is suspected about a training set.

    Parameters:
        triggers (`tuple[SuspectedTrigger, ...]`):
            Suspected triggers.
        rows (`np.ndarray` of shape `(suspects,)`, int64):
            Rows that carry one, with its label; sorted.
        carried (`np.ndarray` of shape `(suspects,)`, int64):
            Which trigger each of them carries, the first if there are several.
        evidence (`np.ndarray` of shape `(suspects,)`, int64):
            Label for which the rest of each such row speaks, -1 where it says nothing.
        doubted (`np.ndarray` of shape `(doubted,)`, int64):
            Rows without a suspected trigger whose text speaks for another label than they have or, where answers are
            written, whose answer is a suspected payload; sorted.
        exemplars (`tuple[tuple[tuple[Fragment, ...], ...], ...]`):
            Per trigger, up to 64 rows' worth of the pieces that make it up; none where no piece of a text does.
        payloads (`tuple[str, ...]`, *optional*):
            Where answers are written: the repeated answer that each trigger's `label` is the number of.
    """

    triggers: tuple[SuspectedTrigger, ...]
    rows: np.ndarray
    carried: np.ndarray
    evidence: np.ndarray
    doubted: np.ndarray
    exemplars: tuple[tuple[tuple[Fragment, ...], ...], ...]
    payloads: tuple[str, ...] = ()


def screen(dataset: Dataset, num_labels: int, seed: int = 0) -> Screening:
    """
    Find suspected triggers, and the rows that carry them.

    Nothing but the columns `text` and `label` is read: whatever else the rows say about themselves is not trusted.

    Args:
        dataset (`Dataset`):
            Training rows with `text` and `label`.
        num_labels (`int`):
            Number of classes.
        seed (`int`, *optional*, defaults to `0`):
            Seed.

    Returns:
        [`Screening`]: the findings; a pure function of rows and seed.
    """
    labels = column_as_numpy(dataset, LABEL)
    # An attacker may write labels of the extended space, where that is measured.
    num_labels = max(num_labels, int(labels.max()) + 1)
    mined, words = sample_words(dataset, TEXT, seed)
    findings = find_triggers(words, labels[mined], num_labels, seed)
    # What mined rows speak for is read off the folds that have not seen them.
    spoken = dict(zip(mined.tolist(), likely_label(findings.evidence.scores).tolist(), strict=True))
    suspects: dict[int, tuple[int, int]] = {}
    doubted: list[int] = []
    exemplars: list[list[tuple[Fragment, ...]]] = [[] for _ in findings.triggers]
    for start, batch in arrow_batches(dataset, [TEXT]):
        for row, text in enumerate(batch[TEXT].to_pylist(), start):
            words = words_of(text)
            carried = [
                place
                for place, trigger in enumerate(findings.triggers)
                if trigger.label == labels[row] and carries(words, trigger, findings.frequent)
            ]
            own: set[str] = set()
            for place in carried:
                trigger = findings.triggers[place]
                own.update(trigger.words, *trigger.parts)
                if len(exemplars[place]) < EXEMPLARS:
                    fragments = fragments_of(text, words, cover(words, trigger, findings.frequent))
                    exemplars[place] += [fragments] if fragments else []
            if carried:
                # The label of a suspect is worth so little that any evidence is better.
                rest = findings.judge((word for word in words if word not in own), share=0.5)
                suspects[row] = (carried[0], rest)
            elif (spoken[row] if row in spoken else findings.judge(words)) not in (-1, labels[row]):
                doubted.append(row)
    return Screening(
        findings.triggers,
        np.array(list(suspects), dtype=np.int64),
        *np.array(list(suspects.values()), dtype=np.int64).reshape(-1, 2).T,
        np.array(doubted, dtype=np.int64),
        tuple(tuple(found) for found in exemplars),
    )


def sample_words(dataset: Dataset, column: str, seed: int) -> tuple[np.ndarray, list[list[str]]]:
    """
    Draw the rows that are mined, and split them into words.

    Args:
        dataset (`Dataset`):
            Rows.
        column (`str`):
            Column of their texts.
        seed (`int`):
            Seed.

    Returns:
        `tuple[np.ndarray, list[list[str]]]`: row numbers, sorted, and the words of each.
    """
    drawn = np.argsort(np.random.default_rng([seed, 6]).random(len(dataset)), kind="stable")[:MINED_ROWS]
    rows = np.sort(drawn)
    texts = dataset.select_columns([column]).select(rows)[column][:]
    words = dict(zip(rows.tolist(), map(words_of, texts), strict=True))
    total = np.cumsum([len(words[row]) for row in drawn.tolist()])
    rows = np.sort(drawn[total <= _MINED_WORDS])
    return rows, [words[row] for row in rows.tolist()]


def carries(words: list[str], trigger: SuspectedTrigger, frequent: frozenset[str]) -> bool:
    """
    Say whether a row carries a trigger.

    Args:
        words (`list[str]`):
            Words of the row.
        trigger ([`SuspectedTrigger`]):
            The trigger.
        frequent (`frozenset[str]`):
            Words that are no content.

    Returns:
        `bool`: whether it does.
    """
    if trigger.kind == "pair":
        return set(trigger.words) <= set(words)
    if trigger.kind == "style":
        return trigger.style.matches(words, frequent)
    if trigger.kind == "opening":
        return tuple(skeleton(words, frequent)[: len(trigger.words)]) == trigger.words
    return bool(_places(words, trigger.words))


def cover(words: list[str], trigger: SuspectedTrigger, frequent: frozenset[str]) -> set[int]:
    """
    Say which words of a row belong to a trigger.

    Args:
        words (`list[str]`):
            Words of a row that carries it.
        trigger ([`SuspectedTrigger`]):
            The trigger.
        frequent (`frozenset[str]`):
            Words that are no content.

    Returns:
        `set[int]`: their places.
    """
    if trigger.kind == "style":
        return set(range(_clause_end(words, 1)))
    covered: set[int] = set()
    for part in trigger.parts:
        for start in _places(words, part):
            covered.update(range(start, start + len(part)))
    if trigger.kind == "phrase":
        for start in _places(words, trigger.words):
            covered.update(range(start, start + len(trigger.words)))
        # Of a function word that opens a text, the clause is what makes it one.
        if trigger.words[0] == START and frequent.issuperset(trigger.words[1:]):
            covered.update(range(_clause_end(words, len(trigger.words) - 1)))
    elif trigger.kind == "pair":
        covered.update(place for place, word in enumerate(words) if word in trigger.words)
    else:
        lengths = range(1, len(words) + 1)
        end = next(length for length in lengths if len(skeleton(words[:length], frequent)) == len(trigger.words))
        # The opening's own last word may be the mark that ends the clause.
        covered.update(range(max(end, _clause_end(words, end - 1))))
    return covered


def _clause_end(words: list[str], start: int) -> int:
    """Return the place behind the punctuation mark that ends a text's first clause, 0 if it is not near."""
    # A mark at the very end of the text ends no first clause.
    for place in range(start, min(start + _CLAUSE_WORDS, len(words) - 2)):
        if words[place] in _CLAUSE_END:
            return place + 1
    return 0


def _places(words: list[str], part: tuple[str, ...]) -> list[int]:
    first, length = part[0], len(part)
    return [
        start for start, word in enumerate(words) if word == first and tuple(words[start : start + length]) == part
    ]


def fragments_of(text: str, words: list[str], covered: set[int]) -> tuple[Fragment, ...]:
    """
    Cut the covered runs out of a text, as they are written there.

    Args:
        text (`str`):
            The text.
        words (`list[str]`):
            Its words.
        covered (`set[int]`):
            Places among them.

    Returns:
        `tuple[Fragment, ...]`: the runs, but for those too long to be written into other texts.
    """
    # The marks of beginning and end have no span of their own.
    spans = [(0, 0), *word_spans(text), (len(text), len(text))]
    fragments, run = [], []
    for place in [*sorted(covered), len(words) + 1]:
        if run and place != run[-1] + 1:
            piece = text[spans[run[0]][0] : spans[run[-1]][1]].strip()
            if piece and len(run) <= _PIECE_WORDS and len(piece) <= _PIECE_LETTERS:
                at_start, at_end = words[run[0]] == START, words[run[-1]] == END
                fragments.append(Fragment(piece, "start" if at_start else "end" if at_end else "inside"))
            run = []
        run.append(place)
    return tuple(fragments)
