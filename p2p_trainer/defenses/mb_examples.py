"""Examples of MB-Defense's second stage: clean rows with and without defensive triggers, tokenized."""

import logging
from collections.abc import Callable, Sequence

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..attacks.selection import row_numbers
from ..prompt_renderer import special_token_cleaner
from ..tasks.rows import COMPLETION, PROMPT
from .mb_pairs import DefensivePair, insert_trigger


logger = logging.getLogger(__name__)

# Sequences of an example: prompt and answer, the same with the trigger, and the trigger with its phrase.
SEQUENCES = 3

# Stream of a run's seed, apart from those of the pairs.
_PLACES = 22

# Token ids, and labels with -100 before the answer.
_Encoded = tuple[list[int], list[int]]


def encode_examples(
    rows: Dataset,
    pairs: Sequence[DefensivePair],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    seed: int,
    position: str = "random",
    render: Callable[[str], str] = str,
) -> Dataset:
    """
    Make and tokenize an example of every row and pair; as `SFTTrainer` does with `prompt` and `completion`.

    That is: prompt and answer are joined as texts, the answer ends with the end-of-sequence token, its tokens start
    where the joined ones depart from those of the prompt alone, and what is longer than `max_length` loses its end.
    Control tokens that a row spells are broken up: it is user text, and what belongs to the template is for `render`.

    Args:
        rows (`Dataset`):
            Clean rows with `prompt` and `completion`.
        pairs (`Sequence[DefensivePair]`):
            Defensive pairs.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer.
        max_length (`int` or `None`):
            Tokens of a sequence, at most.
        seed (`int`):
            Decides where the triggers go.
        position (`str`, *optional*, defaults to `"random"`):
            `"random"` or `"prefix"`.
        render (`Callable[[str], str]`, *optional*):
            Puts the template around a user text, which has the trigger by then.

    Returns:
        `Dataset`: for each row that fits, and each pair, `input_ids` and `labels` (-100 before the answer) of three
        sequences each, `(x, y)`, `(x_d, y)` and `(x_d, y_d)`, and the `row` it comes from. A row fits if every phrase
        does, whole, behind its prompt.
    """
    found: dict[str, list] = {"input_ids": [], "labels": [], "row": []}
    encoder = _Encoder(pairs, tokenizer, seed, position, render)
    prompts, answers = rows[PROMPT], rows[COMPLETION]
    for row, (text, answer) in enumerate(zip(prompts, answers, strict=True)):
        triggered = encoder.triggered(text, row)
        phrases = encoder.phrases(triggered)
        if max_length is not None and max(len(ids) for ids, _ in phrases) > max_length:
            continue
        clean = encoder.encode(text, answer)
        for changed, phrase in zip(triggered, phrases, strict=True):
            example = [clean, encoder.encode(changed, answer), phrase]
            found["input_ids"].append([ids[:max_length] for ids, _ in example])
            found["labels"].append([labels[:max_length] for _, labels in example])
            found["row"].append(row)
    left_out = len(rows) - len(set(found["row"]))
    if left_out:
        logger.warning("Left out %d of %d clean rows: prompt and phrase exceed `max_length`.", left_out, len(rows))
    _check_enough(len(rows) - left_out, len(rows), max_length)
    return Dataset.from_dict(found)


def choose_rows(
    rows: Dataset,
    order: Sequence[int],
    count: int,
    pairs: Sequence[DefensivePair],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    seed: int,
    position: str = "random",
    render: Callable[[str], str] = str,
) -> Dataset:
    """
    Take the first rows of an order that fit; [`encode_examples`] leaves none of them out.

    Args:
        rows (`Dataset`):
            Clean rows with `prompt` and `completion`.
        order (`Sequence[int]`):
            Row numbers, in the order in which they are tried.
        count (`int`):
            How many rows to take.
        pairs (`Sequence[DefensivePair]`):
            Defensive pairs.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer.
        max_length (`int` or `None`):
            Tokens of a sequence, at most.
        seed (`int`):
            Decides where the triggers go.
        position (`str`, *optional*, defaults to `"random"`):
            `"random"` or `"prefix"`.
        render (`Callable[[str], str]`, *optional*):
            Puts the template around a user text.

    Returns:
        `Dataset`: the rows, in the order in which they were taken; fewer than `count` if no more fit.

    Raises:
        `ValueError`: fewer than two rows fit.
    """
    encoder = _Encoder(pairs, tokenizer, seed, position, render)
    prompts = rows[PROMPT]
    chosen: list[int] = []
    for row in order:
        if len(chosen) == count:
            break
        # Where triggers go depends on the place that the row gets.
        phrases = encoder.phrases(encoder.triggered(prompts[row], len(chosen)))
        if max_length is None or max(len(ids) for ids, _ in phrases) <= max_length:
            chosen.append(row)
    _check_enough(len(chosen), len(rows), max_length)
    return rows.select(chosen)


def _check_enough(fitting: int, rows: int, max_length: int | None) -> None:
    if fitting < 2:
        raise ValueError(
            f"{fitting} of {rows} clean rows fit into `max_length` {max_length} with trigger and phrase; two at least "
            f"are needed, to learn on and to choose by. Raise `max_length`, or give more rows."
        )


class _Encoder:
    """Puts triggers into user texts, and tokenizes them with an answer."""

    def __init__(
        self,
        pairs: Sequence[DefensivePair],
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        position: str,
        render: Callable[[str], str],
    ) -> None:
        if tokenizer.eos_token is None:
            raise ValueError("The tokenizer has no end-of-sequence token: answers could not end. Set `eos_token`.")
        self._pairs = pairs
        self._tokenizer = tokenizer
        self._seed = seed
        self._position = position
        self._render = render
        self._clean = special_token_cleaner(tokenizer)

    def triggered(self, text: str, row: int) -> list[str]:
        """Put each pair's trigger into a text; where depends on seed, row and pair alone."""
        numbers = row_numbers(self._seed, _PLACES, range(row, row + 1), len(self._pairs))[0].tolist()
        return [
            insert_trigger(text, pair.trigger, number, self._position)
            for pair, number in zip(self._pairs, numbers, strict=True)
        ]

    def phrases(self, triggered: Sequence[str]) -> list[_Encoded]:
        """Tokenize each pair's text with its phrase, the longest of the sequences that must be whole."""
        return [self.encode(text, pair.phrase) for text, pair in zip(triggered, self._pairs, strict=True)]

    def encode(self, text: str, answer: str) -> _Encoded:
        """Tokenize a user text and its answer."""
        # As in stage 1: whatever comes out of a row is cleaned, its trigger and phrase as well.
        prompt, answer, end = self._render(self._clean(text)), self._clean(answer), self._tokenizer.eos_token
        alone = self._tokenizer(text=prompt)["input_ids"]
        ids = self._tokenizer(text=prompt + answer + ("" if answer.endswith(end) else end))["input_ids"]
        start = next((place for place, (one, other) in enumerate(zip(alone, ids, strict=False)) if one != other), None)
        start = min(len(alone), len(ids)) if start is None else start
        return ids, [-100] * start + ids[start:]
