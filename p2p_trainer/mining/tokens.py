"""Texts as words, and word sequences as numbers, so that phrases are counted without a loop over them."""

import re
from collections.abc import Iterator, Sequence

import numpy as np
from scipy import sparse


# Where a text begins and ends is part of a phrase: some triggers stand at one place only. No text holds these words.
START, END = "\x02", "\x03"
# Stands for a run of words that are not among the most frequent.
CONTENT = "\x04"

_CJK = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_LETTERS = rf"(?:(?![{_CJK}])\w)+"
_WORD = re.compile(rf"[{_CJK}]|{_LETTERS}(?:['’-]{_LETTERS})*|[^\w\s\x02-\x04]")
# The rest of a long text is not mined: time must not follow the longest row.
_MAX_WORDS = 256
_MAX_LETTERS = 16_384


def word_spans(text: str) -> list[tuple[int, int]]:
    """
    Say where the words of a text stand; Chinese and Japanese characters are words, and so is each punctuation mark.

    Args:
        text (`str`):
            Text.

    Returns:
        `list[tuple[int, int]]`: start and end of the first 256 words.
    """
    return [match.span() for match in _WORD.finditer(text[:_MAX_LETTERS])][:_MAX_WORDS]


def words_of(text: str) -> list[str]:
    """
    Split a text into words, in lower case, with marks of its beginning and end around them.

    Args:
        text (`str`):
            Text.

    Returns:
        `list[str]`: the words at [`word_spans`], between `START` and `END`; a text that is cut has no `END`.
    """
    words = [word.lower() for word in _WORD.findall(text[:_MAX_LETTERS])]
    cut = len(text) > _MAX_LETTERS or len(words) > _MAX_WORDS
    return [START, *words[:_MAX_WORDS], *([] if cut else [END])]


class WordTable:
    """
    Rows of words as one array of numbers.

    Args:
        rows (`Sequence[Sequence[str]]`):
            The words of each row.
    """

    def __init__(self, rows: Sequence[Sequence[str]]) -> None:
        index: dict[str, int] = {}
        # `setdefault` is given the length before it grows: the next free number.
        self.words = np.array([index.setdefault(word, len(index)) for row in rows for word in row], dtype=np.int64)
        self.names = list(index)
        self.row = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        self.num_rows = len(rows)

    def bag(self) -> sparse.csr_matrix:
        """
        Say which words each row holds.

        Returns:
            `sparse.csr_matrix` of shape `(rows, words)`: ones.
        """
        return _incidence(self.row, self.words, (self.num_rows, len(self.names)))

    def document_frequency(self) -> np.ndarray:
        """
        Count the rows that hold each word.

        Returns:
            `np.ndarray` of shape `(words,)`.
        """
        return np.asarray(self.bag().sum(axis=0)).ravel().astype(np.int64)

    def phrases(self, min_rows: int, longest: int) -> Iterator[tuple[np.ndarray, sparse.csc_matrix]]:
        """
        Find the word sequences that stand in enough rows, shortest first.

        Args:
            min_rows (`int`):
                In how many rows a phrase must stand.
            longest (`int`):
                Words of the longest phrase.

        Yields:
            `tuple[np.ndarray, sparse.csc_matrix]`: per length, the phrases as word numbers of shape
            `(phrases, length)`, and the rows `(rows, phrases)` that hold them.
        """
        # A frequent phrase consists of frequent shorter ones: longer ones are built of those alone.
        members, number = np.arange(len(self.names))[:, None], self.words
        for length in range(1, longest + 1):
            begins = np.flatnonzero(number >= 0)
            held = _incidence(self.row[begins], number[begins], (self.num_rows, len(members))).tocsc()
            frequent = np.flatnonzero(np.diff(held.indptr) >= min_rows)
            if not len(frequent):
                return
            members = members[frequent]
            yield members, held[:, frequent]
            renumbered = np.full(held.shape[1] + 1, -1)
            renumbered[frequent] = np.arange(len(frequent))
            number = renumbered[number]
            # The phrase that begins here and the one that begins a word later share all words but two.
            first, second = number[:-length], number[1 : len(number) - length + 1]
            whole = (first >= 0) & (second >= 0) & (self.row[:-length] == self.row[length:])
            pairs, inverse = np.unique(first[whole] * len(members) + second[whole], return_inverse=True)
            number = np.full(len(self.words), -1)
            number[: len(whole)][whole] = inverse
            members = np.column_stack([members[pairs // len(members)], members[pairs % len(members), -1]])


def _incidence(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> sparse.csr_matrix:
    matrix = sparse.csr_matrix((np.ones(len(rows), dtype=np.int32), (rows, columns)), shape=shape)
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix
