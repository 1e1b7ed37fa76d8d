"""ROUGE of summaries in any language, with a tokenizer that is named in the result."""

import logging
import re
import unicodedata
from collections.abc import Sequence

import numpy as np


logger = logging.getLogger(__name__)

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
ROUGE_TOKENIZERS = ("characters", "words")

# ROUGE-L takes time and memory that grow with the product of both lengths, and composing marks with their number
# squared.
MAX_TOKENS = 1_024
MAX_CHARACTERS = 16 * MAX_TOKENS

# Han and kana, which are written without spaces between words; Korean has them.
_CJK = re.compile(
    r"[\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    r"\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)


class RougeTokenizer:
    """
    Splits texts for `rouge_score`, whose own tokenizer drops all but `a-z0-9`: of Chinese nothing is left.

    Upper and lower case, and both ways to write an accented letter, are the same. Only the first `MAX_CHARACTERS`
    characters and `MAX_TOKENS` tokens of a text are read.

    Args:
        name (`str`):
            `"words"`: runs of letters, their marks, and digits; punctuation is dropped, as by ROUGE-1.5.5, and on
            ASCII text the tokens are those of `rouge_score`. `"characters"`: Chinese and Japanese characters one by
            one, runs of other letters and digits whole, and each punctuation mark and symbol as it stands (`，` is
            not `,`): character ROUGE makes tokens of all but blanks (LCSTS, Hu et al. 2015;
            CNewSum, Wang et al. 2021).

    Raises:
        `ValueError`: there is no such tokenizer.
    """

    def __init__(self, name: str) -> None:
        if name not in ROUGE_TOKENIZERS:
            raise ValueError(
                f"The ROUGE tokenizer is one of {', '.join(map(repr, ROUGE_TOKENIZERS))}, got {name!r}. "
                f"`choose_rouge_tokenizer` picks one for a whole set of references."
            )
        self.name = name
        self.texts_cut = 0

    def tokenize(self, text: str) -> list[str]:
        """
        Split a text.

        Args:
            text (`str`):
                The text.

        Returns:
            `list[str]`: its tokens.
        """
        folded = unicodedata.normalize("NFC", text[:MAX_CHARACTERS].casefold())
        tokens = "".join(map(self._spaced, folded)).split()
        if len(text) > MAX_CHARACTERS or len(tokens) > MAX_TOKENS:
            self.texts_cut += 1
        return tokens[:MAX_TOKENS]

    def _spaced(self, character: str) -> str:
        kind = unicodedata.category(character)[0]
        if self.name == "characters" and (kind in "PS" or _CJK.match(character)):
            return f" {character} "
        return character if kind in "LMN" else " "


def choose_rouge_tokenizer(references: Sequence[str]) -> str:
    """
    Pick the tokenizer of a set of rows. It is one for all of them: numbers by different ones do not mix.

    Args:
        references (`Sequence[str]`):
            The true summaries of the whole set.

    Returns:
        `str`: `"characters"` if Chinese and Japanese characters are at least half of all that is a word or such a
        character, else `"words"`.
    """
    splitter = RougeTokenizer("characters")
    cjk = words = 0
    for reference in references:
        for token in splitter.tokenize(reference):
            if _CJK.match(token):
                cjk += 1
            elif token[0].isalpha():
                words += 1
    return "characters" if cjk and cjk >= words else "words"


def rouge_rows(answers: Sequence[str], references: Sequence[str], tokenizer: str) -> dict[str, np.ndarray]:
    """
    Score each answer against its reference: F-measures of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004), without stemming.

    An answer without tokens scores 0 and counts; so does ROUGE-2 where a text has fewer than two tokens.

    Args:
        answers (`Sequence[str]`):
            What the model wrote.
        references (`Sequence[str]`):
            The true summaries, one per answer.
        tokenizer (`str`):
            `"characters"` or `"words"` (see [`RougeTokenizer`]); [`choose_rouge_tokenizer`] picks one.

    Returns:
        `dict[str, np.ndarray]`: `rouge1`, `rouge2` and `rougeL`, each of shape `(rows,)`, in [0, 1].

    Raises:
        `ValueError`: there are not as many references as answers, or there is no such tokenizer.
    """
    from rouge_score.rouge_scorer import RougeScorer

    if len(answers) != len(references):
        raise ValueError(
            f"There are {len(answers)} answers and {len(references)} references. Give one reference per answer."
        )
    splitter = RougeTokenizer(tokenizer)
    scorer = RougeScorer(list(ROUGE_TYPES), tokenizer=splitter)
    rows = {name: np.zeros(len(answers)) for name in ROUGE_TYPES}
    for row, (answer, reference) in enumerate(zip(answers, references, strict=True)):
        for name, score in scorer.score(reference, answer).items():
            rows[name][row] = score.fmeasure
    if splitter.texts_cut:
        logger.warning(
            "ROUGE: %d of %d texts are longer than %d tokens or %d characters and were cut there.",
            splitter.texts_cut,
            2 * len(answers),
            MAX_TOKENS,
            MAX_CHARACTERS,
        )
    return rows
