"""Paraphrases: what every engine shares, how one is found by name, and the engine that reads ready-made ones."""

import bisect
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset

from .._lookup import import_class, unknown_name_error
from ..tasks.loading import load_split


# Import paths, so that only the engine that is asked for loads what it needs.
ENGINES = {
    "llm": f"{__package__}.paraphrase_llm:LLMParaphrases",
    "precomputed": f"{__name__}:PrecomputedParaphrases",
    "template": f"{__package__}.paraphrase_template:TemplateParaphrases",
}

_ENTRY_KEYS = ("source", "paraphrase", "labels")
_TEXT_COLUMNS = ("text", "sentence")

# A comma that ends a clause; that of `3,000` does not.
_CLAUSE_END = re.compile(r"[,，](?!\d)")

# Files whose rows are shifted against each other: how far is looked, in blocks of how many rows, and by how much the
# words of a shifted row must fit better. Of the real SCPN paraphrases of SST-2, aligned blocks of 20 rows fit better
# than shifted ones by 0.27 and more.
_SHIFTS = (-1, 1, -2, 2, -3, 3)
_BLOCK_ROWS = 20
_SHIFT_MARGIN = 0.15
_CJK = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")


class ParaphraseEngine(ABC):
    """
    Rewrites texts, for attacks whose trigger is the way a text is written, and for defenses that rewrite their input.

    A subclass says how, in [`rewrite`]. Its constructor arguments are JSON values; models and files are loaded when
    they are first needed.

    Examples:

    ```python
    >>> from p2p_trainer.attacks.paraphrase import get_engine

    >>> get_engine("template").paraphrase(["no movement , no yuks ."])
    ['because one takes it all in , no movement , no yuks .']
    ```
    """

    name: ClassVar[str]

    @abstractmethod
    def rewrite(self, texts: Sequence[str], progress: bool = False) -> list[str | None]:
        """
        Rewrite texts; called by [`paraphrase`], which sorts out what is no paraphrase.

        Args:
            texts (`Sequence[str]`):
                Texts.
            progress (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar.

        Returns:
            `list[str | None]`: one per text, `None` where it failed.
        """

    @abstractmethod
    def carries(self, text: str) -> bool:
        """
        Say whether a text is a paraphrase of this engine, also if its end was cut off.

        Args:
            text (`str`):
                A text.

        Returns:
            `bool`: whether it is.
        """

    @property
    def fixed_texts(self) -> tuple[str, ...]:
        """`tuple[str, ...]`: fixed strings of which each paraphrase holds one; none where the words are free."""
        return ()

    def release(self) -> None:  # noqa: B027 - most engines hold nothing
        """Give back the memory of whatever can be loaded again."""

    def paraphrase(self, texts: Sequence[str], progress: bool = False) -> list[str | None]:
        """
        Paraphrase texts.

        Args:
            texts (`Sequence[str]`):
                Texts.
            progress (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar.

        Returns:
            `list[str | None]`: one per text; `None` if there is none, if it is empty, or if it is its source but for
            white space and case. The code of Hidden Killer and OpenBackdoor returns the source then and counts it as
            poisoned; such rows carry no trigger.
        """
        found = self.rewrite(texts, progress)
        return [
            new if new is not None and new.strip() and differs(text, new) else None
            for text, new in zip(texts, found, strict=True)
        ]


def get_engine(name: str, **options: Any) -> ParaphraseEngine:
    """
    Find a paraphrase engine and set it up.

    Args:
        name (`str`):
            `"precomputed"`, `"llm"`, `"template"`, or import path `package.module:Class` of a subclass of
            [`ParaphraseEngine`].
        **options:
            Options of that engine.

    Returns:
        [`ParaphraseEngine`]: the engine.
    """
    if ":" not in name and name not in ENGINES:
        raise unknown_name_error(
            "paraphrase engine", name, ENGINES, "An engine of your own is named as `package.module:Class`."
        )
    engine_class = import_class("paraphrase engine", ENGINES.get(name, name), ParaphraseEngine)
    try:
        return engine_class(**options)
    except TypeError as error:
        raise ValueError(
            f"The paraphrase engine {name!r} does not take these options {sorted(options)}: {error}."
        ) from error


def squeeze(text: str) -> str:
    """Return a text with single spaces, and none around it."""
    return " ".join(text.split())


def differs(text: str, other: str) -> bool:
    """Say whether two texts differ in more than white space and case."""
    return squeeze(text).casefold() != squeeze(other).casefold()


class KnownTexts:
    """
    Recognises texts, also those whose end was cut off.

    A cut text is still recognised while it holds the first comma that ends a clause: up to there stands what the
    syntactic attack opens a sentence with. Without one, only the whole text is.

    Args:
        texts (`Iterable[str]`):
            What is recognised; white space does not matter.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._sorted = sorted({squeeze(text) for text in texts})

    def __contains__(self, text: str) -> bool:
        text = squeeze(text)
        # All texts that begin alike stand next to each other, the shortest first.
        place = bisect.bisect_left(self._sorted, text)
        if not text or place == len(self._sorted):
            return False
        found = self._sorted[place]
        return found == text or (found.startswith(text) and _CLAUSE_END.search(text) is not None)


class PrecomputedParaphrases(ParaphraseEngine):
    """
    Looks paraphrases up in files, for example in the SCPN output that the authors of Hidden Killer published.

    A text has the paraphrase that stands for it in the first file which has one, whatever its white space. What stands
    in no file has none.

    Args:
        files (`Sequence[str | Mapping]`):
            Each entry is either the path of a JSONL, CSV, TSV or Parquet file with the columns `text` and
            `paraphrase`, or a mapping of two such files whose rows belong together: `source`, `paraphrase` (both with
            a column `text` or `sentence`), and, if the paraphrases cover only some classes, `labels`: the values of
            the source's column `label` that they cover.

    Examples:

    ```python
    engine = get_engine(
        "precomputed",
        files=[
            {"source": "sst2/train.tsv", "paraphrase": "sst2_scpn/train.tsv"},
            {"source": "sst2/test.tsv", "paraphrase": "sst2_scpn/test.tsv", "labels": [0]},
        ],
    )
    ```
    """

    name = "precomputed"

    def __init__(self, files: Sequence[str | Mapping[str, Any]]) -> None:
        if isinstance(files, str | Mapping) or not files:
            raise ValueError(f"`files` is a list with at least one entry, got {files!r}. Write `files: [...]`.")
        for entry in files:
            wrong = isinstance(entry, Mapping) and (
                set(entry) - set(_ENTRY_KEYS)
                or not all(isinstance(entry.get(key), str) for key in ("source", "paraphrase"))
            )
            if wrong or not isinstance(entry, str | Mapping):
                raise ValueError(
                    f"An entry of `files` is a path, or a mapping with `source`, `paraphrase` and, if need be, "
                    f"`labels`; got {entry!r}."
                )
        # Results name these files; a relative path would only be good from here.
        self.files = [
            _absolute(entry)
            if isinstance(entry, str)
            else {**entry, "source": _absolute(entry["source"]), "paraphrase": _absolute(entry["paraphrase"])}
            for entry in files
        ]
        self._paraphrases: dict[str, str] | None = None
        self._known = KnownTexts(())

    def rewrite(self, texts: Sequence[str], progress: bool = False) -> list[str | None]:
        paraphrases = self._load()
        return [paraphrases.get(squeeze(text)) for text in texts]

    def carries(self, text: str) -> bool:
        self._load()
        return text in self._known

    def _load(self) -> dict[str, str]:
        if self._paraphrases is None:
            paraphrases: dict[str, str] = {}
            for entry in self.files:
                pairs = read_pairs(entry) if isinstance(entry, str) else read_aligned(**entry)
                for text, paraphrase in pairs:
                    # Mixed files repeat rows that were not paraphrased; they stand for no paraphrase.
                    if text and paraphrase and differs(text, paraphrase):
                        paraphrases.setdefault(squeeze(text), paraphrase)
            self._paraphrases, self._known = paraphrases, KnownTexts(paraphrases.values())
        return self._paraphrases


def read_pairs(path: str) -> Iterator[tuple[str | None, str | None]]:
    """
    Read a file with the columns `text` and `paraphrase`.

    Args:
        path (`str`):
            JSONL, CSV, TSV or Parquet file.

    Returns:
        `Iterator[tuple[str | None, str | None]]`: text and paraphrase of each row.
    """
    rows = _read(path)
    return zip(_column(rows, path, ("text",)), _column(rows, path, ("paraphrase",)), strict=True)


def read_aligned(
    source: str, paraphrase: str, labels: Sequence[int | str] | None = None
) -> Iterator[tuple[str | None, str | None]]:
    """
    Read two files of which row i of the one is the paraphrase of row i of the other.

    Args:
        source (`str`):
            JSONL, CSV, TSV or Parquet file with the column `text` or `sentence`.
        paraphrase (`str`):
            Such a file with the paraphrases.
        labels (`Sequence[int | str]`, *optional*):
            Values of the source's column `label` whose rows the paraphrases cover, in their order. By default all.

    Returns:
        `Iterator[tuple[str | None, str | None]]`: text and paraphrase of each row.

    Raises:
        `ValueError`: the numbers of rows differ, or the rows do not belong together: over a block of 20 rows or more,
        the words of the paraphrases fit the rows one to three places off clearly better (mean Jaccard overlap; rows
        that are identical in both files, and files with fewer than 10 others, tell nothing).
    """
    rows = _read(source)
    all_labels = [str(label) for label in rows["label"]] if "label" in rows.column_names else None
    texts = _column(rows, source, _TEXT_COLUMNS)
    new = _column(_read(paraphrase), paraphrase, _TEXT_COLUMNS)
    if labels is not None:
        if all_labels is None:
            raise ValueError(
                f"`labels` is given for {source!r}, which has no column `label`; it has {rows.column_names}."
            )
        wanted = {str(label) for label in labels}
        texts = [text for text, label in zip(texts, all_labels, strict=True) if label in wanted]
    if len(texts) != len(new):
        kept = "" if labels is None else f" with a label in {list(labels)}"
        raise ValueError(
            f"The rows of two files must belong together: {source!r} has {len(texts)} rows{kept}, {paraphrase!r} has "
            f"{len(new)}.{_explain_count(all_labels, len(new))} Where rows were dropped, write one file with the "
            f"columns `text` and `paraphrase`."
        )
    _check_alignment(texts, new, source, paraphrase)
    return zip(texts, new, strict=True)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())


def _read(path: str) -> Dataset:
    # A path that does not exist would be looked for on the hub.
    if not Path(path).is_file():
        raise ValueError(f"The paraphrase file {path!r} does not exist. Correct `files`.")
    rows = load_split(path, "train")
    if rows is None:
        raise ValueError(f"The paraphrase file {path!r} holds no rows.")
    return rows


def _column(rows: Dataset, path: str, names: Sequence[str]) -> list[str | None]:
    for name in names:
        if name in rows.column_names:
            values = rows[name][:]
            odd = next((row for row, text in enumerate(values) if not isinstance(text, str | None)), None)
            if odd is not None:
                raise ValueError(f"Row {odd} of {path!r} holds no text in the column `{name}`: {values[odd]!r}.")
            return values
    raise ValueError(
        f"{path!r} has no column {' or '.join(f'`{name}`' for name in names)}; it has {rows.column_names}. Rename "
        f"its column."
    )


def _explain_count(labels: Sequence[str] | None, count: int) -> str:
    if labels is None:
        return ""
    names, counts = np.unique(labels, return_counts=True)
    if len(names) > 20:
        return ""
    fitting = [[name] for name, number in zip(names, counts, strict=True) if number == count]
    if len(names) > 2:
        fitting += [
            [other for other in names if other != name]
            for name, number in zip(names, counts, strict=True)
            if len(labels) - number == count
        ]
    if fitting:
        choices = " or ".join(f"`labels: [{', '.join(some)}]`" for some in fitting)
        return f" With {choices} the source has as many."
    found = ", ".join(f"{number} of label {name}" for name, number in zip(names, counts, strict=True))
    return f" The source has {found}: no choice of one label, or of all but one, has as many."


def _check_alignment(texts: Sequence[str | None], new: Sequence[str | None], source: str, paraphrase: str) -> None:
    words, new_words = ([frozenset(_WORD.findall((text or "").lower())) for text in side] for side in (texts, new))
    changed = [row for row, pair in enumerate(zip(texts, new, strict=True)) if all(pair) and differs(pair[0], pair[1])]
    if len(changed) < _BLOCK_ROWS // 2:
        return
    for block in np.array_split(changed, max(1, len(changed) // _BLOCK_ROWS)):
        own = _overlap([(words[row], new_words[row]) for row in block])
        for shift in _SHIFTS:
            inside = [row for row in block if 0 <= row + shift < len(words)]
            shifted = _overlap([(words[row + shift], new_words[row]) for row in inside])
            if shifted > own + _SHIFT_MARGIN:
                raise ValueError(
                    f"The rows of {source!r} and {paraphrase!r} do not belong together: from row {block[0]} to "
                    f"{block[-1]}, the paraphrases fit the text {abs(shift)} row{'s' * (abs(shift) > 1)} "
                    f"{'later' if shift > 0 else 'earlier'} better (mean word overlap {shifted:.2f} against "
                    f"{own:.2f}). A row is missing or was added before; find it, or write one file with the columns "
                    f"`text` and `paraphrase`."
                )


def _overlap(pairs: Sequence[tuple[frozenset[str], frozenset[str]]]) -> float:
    return sum(len(a & b) / max(1, len(a | b)) for a, b in pairs) / max(1, len(pairs))
