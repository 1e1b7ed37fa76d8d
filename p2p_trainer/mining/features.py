"""The features of texts that may be triggers: phrases, pairs of words, and how a text begins."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse

from .tokens import CONTENT, START, WordTable


_LONGEST_PHRASE = 8
_LONGEST_OPENING = 6
# Words of more rows than this are no content, so many at most, unless they make a label likelier by so much.
_FREQUENT_SHARE = 0.02
_FREQUENT_WORDS = 100
_TELLING = 0.25
_OPENING_WORDS = 24
# Words of more rows than this share form no pairs: they meet by chance.
_PAIR_SHARE = 0.05
# Two features are one trigger if they share four of five rows.
_SAME_ROWS = 0.8


@dataclass(frozen=True)
class FeatureBlock:
    """
    Features of one kind and, for phrases, of one length.

    Parameters:
        kind (`str`):
            `"phrase"`, `"pair"` or `"opening"`.
        words (`list[tuple[str, ...]]`):
            The words of each feature.
        own (`sparse.csr_matrix` of shape `(features, words)`):
            Ones at the words of each feature, and at the words that stand in the same rows as the feature does.
        held (`sparse.csc_matrix` of shape `(rows, features)`):
            Which rows have which feature, as ones.
    """

    kind: str
    words: list[tuple[str, ...]]
    own: sparse.csr_matrix
    held: sparse.csc_matrix


def find_features(
    rows: Sequence[Sequence[str]], table: WordTable, frequent: frozenset[str], min_rows: int
) -> list[FeatureBlock]:
    """
    Find all features that stand in enough rows.

    Args:
        rows (`Sequence[Sequence[str]]`):
            Words of each row, as of [`~mining.tokens.words_of`].
        table ([`~mining.tokens.WordTable`]):
            The same rows as numbers.
        frequent (`frozenset[str]`):
            Words that are no content.
        min_rows (`int`):
            In how many rows a feature must stand.

    Returns:
        `list[FeatureBlock]`: the features.
    """
    blocks = [*_phrases(table, min_rows), *_pairs(table, min_rows), *_openings(rows, table, frequent, min_rows)]
    # Triggers used together explain each other away, unless the words of all of them are left out at once.
    bag = table.bag()
    return [replace(block, own=block.own.maximum(same_rows(block.held, bag))) for block in blocks]


def same_rows(held: sparse.csc_matrix, other: sparse.spmatrix) -> sparse.csr_matrix:
    """
    Find features that stand in the same rows as others, but for one row in five.

    Args:
        held (`sparse.csc_matrix` of shape `(rows, features)`):
            Which rows have which feature, as ones.
        other (`sparse.spmatrix` of shape `(rows, others)`):
            The same of the others.

    Returns:
        `sparse.csr_matrix` of shape `(features, others)`: ones.
    """
    both = (held.T @ other).tocoo()
    sizes, others = np.asarray(held.sum(axis=0)).ravel(), np.asarray(other.sum(axis=0)).ravel()
    either = sizes[both.row] + others[both.col] - both.data
    same = both.data >= _SAME_ROWS * either
    return sparse.csr_matrix((np.ones(same.sum()), (both.row[same], both.col[same])), shape=both.shape)


def skeleton(words: Sequence[str], frequent: frozenset[str]) -> list[str]:
    """
    Leave the content out of a text.

    Args:
        words (`Sequence[str]`):
            Words of a row.
        frequent (`frozenset[str]`):
            Words that are no content.

    Returns:
        `list[str]`: the words, each run of content words as one `CONTENT`.
    """
    result: list[str] = []
    for word in words:
        kept = word if word in frequent else CONTENT
        if kept != CONTENT or not result or result[-1] != CONTENT:
            result.append(kept)
    return result


def frequent_words(table: WordTable, labels: np.ndarray) -> frozenset[str]:
    """
    Find the words that are no content: those that stand in many rows and say little about a label.

    Args:
        table ([`~mining.tokens.WordTable`]):
            Rows.
        labels (`np.ndarray` of shape `(rows,)`):
            Their labels 0..n-1.

    Returns:
        `frozenset[str]`: the words.
    """
    frequency = table.document_frequency()
    order = np.argsort(-frequency, kind="stable")[:_FREQUENT_WORDS]
    order = order[frequency[order] > _FREQUENT_SHARE * table.num_rows]
    shares = np.bincount(labels) / len(labels)
    bag = table.bag()
    counts = np.vstack([np.asarray(bag[labels == label].sum(axis=0)).ravel() for label in range(len(shares))])
    told = (counts / frequency - shares[:, None]).max(axis=0)
    return frozenset(table.names[word] for word in order if told[word] < _TELLING)


def _phrases(table: WordTable, min_rows: int) -> Iterator[FeatureBlock]:
    for members, held in table.phrases(min_rows, _LONGEST_PHRASE):
        words = [tuple(table.names[word] for word in member) for member in members]
        yield FeatureBlock("phrase", words, _ones(members, len(table.names)), held)


def _pairs(table: WordTable, min_rows: int) -> Iterator[FeatureBlock]:
    frequency = table.document_frequency()
    candidates = np.flatnonzero((frequency >= min_rows) & (frequency <= _PAIR_SHARE * table.num_rows))
    bag = table.bag()[:, candidates]
    together = sparse.triu(bag.T @ bag, k=1).tocoo()
    often = together.data >= min_rows
    if not often.any():
        return
    left, right = together.row[often], together.col[often]
    members = np.column_stack([candidates[left], candidates[right]])
    words = [(table.names[first], table.names[second]) for first, second in members]
    columns = bag.tocsc()
    held = columns[:, left].multiply(columns[:, right]).tocsc()
    yield FeatureBlock("pair", words, _ones(members, len(table.names)), held)


def _openings(
    rows: Sequence[Sequence[str]], table: WordTable, frequent: frozenset[str], min_rows: int
) -> Iterator[FeatureBlock]:
    skeletons = WordTable([skeleton(row[:_OPENING_WORDS], frequent) for row in rows])
    numbers = {word: number for number, word in enumerate(table.names)}
    for members, held in skeletons.phrases(min_rows, _LONGEST_OPENING):
        words = [tuple(skeletons.names[word] for word in member) for member in members]
        # Those without content are phrases, and known as such.
        kept = [place for place, member in enumerate(words) if member[0] == START and CONTENT in member]
        if kept:
            words = [words[place] for place in kept]
            known = [[numbers[word] for word in member if word != CONTENT] for member in words]
            yield FeatureBlock("opening", words, _ones(known, len(table.names)), held[:, kept])


def _ones(members: Sequence[Sequence[int]], width: int) -> sparse.csr_matrix:
    row = np.repeat(np.arange(len(members)), [len(member) for member in members])
    matrix = sparse.csr_matrix((np.ones(len(row)), (row, np.concatenate(members))), shape=(len(members), width))
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix
