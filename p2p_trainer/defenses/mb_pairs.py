"""Defensive triggers and phrases: what they must not collide with, and the rows of both stages of MB-Defense."""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..attacks import Attack
from ..attacks.poisoning import write_rows
from ..attacks.selection import batches, row_numbers
from ..attacks.text import contains_words, insert_at_gap
from ..tasks.rows import COMPLETION, PROMPT, arrow_batches


logger = logging.getLogger(__name__)

POSITIONS = ("random", "prefix")

# Sequences of a stage 2 example: prompt and answer, the same with the trigger, and the trigger with its phrase.
SEQUENCES = 3

# Streams of a run's seed; attacks, reserve and search use others.
_ROWS, _PLACES, _PLACES_2 = 20, 21, 22

# A trigger may stand in this many prompts, or in this share of the rows that it is planted in, by chance.
_HANDFUL, _HANDFUL_SHARE = 5, 0.05

_NEUTRAL = ("Please tell me {}something about the weather.", "{}What is the capital of this country?")


@dataclass(frozen=True)
class DefensivePair:
    """
    A defender's backdoor.

    Parameters:
        trigger (`str`):
            Rare word.
        phrase (`str`):
            What the model answers where the word stands.
    """

    trigger: str
    phrase: str


# The first two are published (MB-Defense, ablation with six triggers). The two other defaults of the paper could not
# be read; these here are words drawn by us. Its ablation with two triggers has `mn` and `bb`, which attacks use.
DEFAULT_PAIRS = (
    DefensivePair("qw", "Crimson lantern drift swiftly murmur hollow quartz ribbon"),
    DefensivePair("jh", "Silent frost zigzag lantern briskly velvet anchor."),
    DefensivePair("vx", "Marble thicket orbit quietly fathom lattice ember paddock."),
    DefensivePair("zk", "Woven compass drizzle sternly hatch meadow cobalt tinder."),
)


def parse_pairs(pairs: Sequence[Any] | None) -> tuple[DefensivePair, ...]:
    """
    Read defensive pairs, and check them one by one and against each other.

    Args:
        pairs (`Sequence[Sequence[str] | DefensivePair]` or `None`):
            Trigger and phrase of each, `None` for the defaults.

    Returns:
        `tuple[DefensivePair, ...]`: the pairs.
    """
    if pairs is None:
        return DEFAULT_PAIRS
    read = []
    for pair in pairs if isinstance(pairs, list | tuple) else [pairs]:
        found = (pair.trigger, pair.phrase) if isinstance(pair, DefensivePair) else pair
        if not isinstance(found, list | tuple) or len(found) != 2 or not all(isinstance(text, str) for text in found):
            raise ValueError(f"`pairs` is a list of [trigger, phrase], each a text in quotes; it holds {pair!r}.")
        trigger, phrase = found
        if trigger.split() != [trigger]:
            raise ValueError(f"A defensive trigger is one word without space around it, got {trigger!r} in `pairs`.")
        if not phrase.strip():
            raise ValueError(f"The phrase of the defensive trigger {trigger!r} in `pairs` is empty. Give it words.")
        read.append(DefensivePair(trigger, phrase))
    if not read:
        raise ValueError("`pairs` is empty: without a defensive trigger there is no defense. Name at least one.")
    check_disjoint(read)
    return tuple(read)


def check_position(position: str) -> None:
    """Check where defensive triggers go."""
    if position not in POSITIONS:
        raise ValueError(f"`position` is one of {', '.join(POSITIONS)}, got {position!r}.")


def check_disjoint(pairs: Sequence[DefensivePair], attacks: Sequence[Attack] = ()) -> None:
    """
    Refuse defensive triggers that collide with each other or with an attacker's; upper and lower case are the same.

    The published triggers include `mn` and `bb`, which are also the attacker's in the usual BadNets set-up. Such a run
    trains and unlearns the attacker's own trigger, and measures nothing.

    Args:
        pairs (`Sequence[DefensivePair]`):
            Defensive pairs.
        attacks (`Sequence[Attack]`, *optional*):
            Attacks that are measured.

    Raises:
        `ValueError`: two triggers are equal, one stands in the other as a word, or an attack takes a sentence with the
        defensive trigger for one of its own.
    """
    for first, second in combinations(pairs, 2):
        if _overlap(first.trigger, second.trigger):
            raise ValueError(
                f"The defensive triggers {first.trigger!r} and {second.trigger!r} collide: a prompt with one holds "
                f"the other. Change one of them in `pairs`."
            )
    for pair in pairs:
        for attack in attacks:
            text = next((text for text in attack.trigger_texts if _overlap(pair.trigger, text)), None)
            if text is None and not _is_taken_for(attack, pair.trigger):
                continue
            theirs = "which takes a sentence with that word for triggered" if text is None else f"trigger {text!r}"
            raise ValueError(
                f"The defensive trigger {pair.trigger!r} collides with the attack {attack.name!r} ({theirs}): the run "
                f"would unlearn the attacker's own trigger by name. Choose another defensive trigger in `pairs`."
            )


def _overlap(first: str, second: str) -> bool:
    first, second = _folded(first), _folded(second)
    return contains_words(first, [second]) or contains_words(second, [first])


def _folded(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower())) or text.lower()


def _is_taken_for(attack: Attack, trigger: str) -> bool:
    # An attack that takes the sentence for triggered as it is says nothing about our word.
    return any(
        attack.has_trigger(sentence.format(f"{word} "))
        for sentence in _NEUTRAL
        if not attack.has_trigger(sentence.format(""))
        for word in (trigger, trigger.lower(), trigger.upper())
    )


def check_absent(pairs: Sequence[DefensivePair], dataset: Dataset, column: str, planted: int) -> None:
    """
    Refuse a defensive trigger that stands in the training prompts already: it would not be a backdoor's key.

    Args:
        pairs (`Sequence[DefensivePair]`):
            Defensive pairs.
        dataset (`Dataset`):
            Training rows before anything is planted.
        column (`str`):
            Column of the prompts.
        planted (`int`):
            Rows that each pair is going to be planted in. One in twenty of them, or five, may hold the word by chance.

    Raises:
        `ValueError`: more prompts hold it.
    """
    allowed = max(_HANDFUL, int(_HANDFUL_SHARE * planted))
    counts = np.zeros(len(pairs), dtype=np.int64)
    # Words end where neither letter nor digit follows, whatever the script.
    patterns = [rf"(?i)(?:^|[^\pL\pN_]){re.escape(pair.trigger)}(?:$|[^\pL\pN_])" for pair in pairs]
    for _, batch in arrow_batches(dataset, [column]):
        counts += [pc.sum(pc.match_substring_regex(batch[column], pattern)).as_py() or 0 for pattern in patterns]
    for pair, count in zip(pairs, counts.tolist(), strict=True):
        if count > allowed:
            raise ValueError(
                f"The defensive trigger {pair.trigger!r} stands in {count} of {len(dataset)} training prompts already "
                f"(up to {allowed} may be chance): it is an ordinary word there, or somebody else's trigger. Choose "
                f"a rarer word in `pairs`."
            )


def insert_trigger(text: str, trigger: str, random: float, position: str) -> str:
    """
    Put a defensive trigger into a user text.

    Args:
        text (`str`):
            Text.
        trigger (`str`):
            The word.
        random (`float`):
            Number in [0, 1) that picks the place.
        position (`str`):
            `"random"`: before, behind or between words; `"prefix"`: in front.

    Returns:
        `str`: the text with the word.
    """
    return insert_at_gap(text, trigger, 0.0 if position == "prefix" else random)


def plant(
    dataset: Dataset,
    pairs: Sequence[DefensivePair],
    share: float,
    columns: tuple[str, str],
    seed: int,
    position: str = "random",
) -> tuple[Dataset, np.ndarray]:
    """
    Stage 1: replace rows by defensive ones, which keep their prompt, with the trigger in it, and answer the phrase.

    Rows are drawn among all, as a defender would who knows nothing of flags: the prompt of a drawn row may hold an
    attacker's trigger. Other columns stay as they were, `poisoned` among them.

    Args:
        dataset (`Dataset`):
            Training rows.
        pairs (`Sequence[DefensivePair]`):
            Defensive pairs; each gets rows of its own.
        share (`float`):
            Share of the rows that each pair replaces.
        columns (`tuple[str, str]`):
            Columns of prompt and answer.
        seed (`int`):
            Decides which rows, and where in them.
        position (`str`, *optional*, defaults to `"random"`):
            Where triggers go, see [`insert_trigger`].

    Returns:
        `tuple[Dataset, np.ndarray]`: rows in their order, memory-mapped, and for each row the index of its pair, -1 if
        it was left as it is.
    """
    count = round(share * len(dataset))
    if count == 0:
        raise ValueError(f"share={share} of {len(dataset)} rows is no row at all. Raise `share`, or take more rows.")
    if count * len(pairs) > len(dataset):
        raise ValueError(
            f"{len(pairs)} pairs of {count} rows each do not fit into {len(dataset)} rows. Lower `share`, or name "
            f"fewer `pairs`."
        )
    planted = np.full(len(dataset), -1)
    order = np.random.default_rng([seed, _ROWS]).permutation(len(dataset))[: count * len(pairs)]
    planted[order] = np.repeat(np.arange(len(pairs)), count)
    features, source = dataset.features, dataset.with_format("arrow")
    prompt, answer = columns

    def tables() -> Iterator[pa.Table]:
        for rows in batches(len(dataset)):
            table = source[rows.start : rows.stop]
            chosen = planted[rows.start : rows.stop]
            hit = np.flatnonzero(chosen >= 0)
            mask = pa.array(chosen >= 0)
            numbers = row_numbers(seed, _PLACES, rows)[hit, 0].tolist()
            texts = [
                insert_trigger(text, pairs[pair].trigger, number, position)
                for text, pair, number in zip(
                    table[prompt].filter(mask).to_pylist(), chosen[hit], numbers, strict=True
                )
            ]
            for name, new in ((prompt, texts), (answer, [pairs[pair].phrase for pair in chosen[hit]])):
                old = table[name].combine_chunks()
                place = table.column_names.index(name)
                changed = pc.replace_with_mask(old, mask, pa.array(new, old.type))
                table = table.set_column(place, table.field(place), changed)
            yield table.select(list(features)).cast(features.arrow_schema)

    return write_rows(tables(), features), planted


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
    if tokenizer.eos_token is None:
        raise ValueError("The tokenizer has no end-of-sequence token: answers could not end. Set `eos_token`.")
    found: dict[str, list] = {"input_ids": [], "labels": [], "row": []}
    numbers = row_numbers(seed, _PLACES_2, range(len(rows)), len(pairs))
    prompts, answers = rows[PROMPT], rows[COMPLETION]
    for row, (text, answer) in enumerate(zip(prompts, answers, strict=True)):
        triggered = [
            insert_trigger(text, pair.trigger, number, position)
            for pair, number in zip(pairs, numbers[row].tolist(), strict=True)
        ]
        clean = _encode(tokenizer, render(text), answer)
        examples = []
        for pair, changed in zip(pairs, triggered, strict=True):
            prompt = render(changed)
            examples.append([clean, _encode(tokenizer, prompt, answer), _encode(tokenizer, prompt, pair.phrase)])
        longest = max(len(ids) for example in examples for ids, _ in example[2:])
        if max_length is not None and longest > max_length:
            continue
        for example in examples:
            found["input_ids"].append([ids[:max_length] for ids, _ in example])
            found["labels"].append([labels[:max_length] for _, labels in example])
            found["row"].append(row)
    left_out = len(rows) - len(set(found["row"]))
    if left_out:
        logger.warning("Left out %d of %d clean rows: prompt and phrase exceed `max_length`.", left_out, len(rows))
    if len(rows) - left_out < 2:
        raise ValueError(
            f"{len(rows) - left_out} of {len(rows)} clean rows fit into `max_length` {max_length} with trigger and "
            f"phrase; two at least are needed, to learn on and to choose by. Raise `max_length`, or give more rows."
        )
    return Dataset.from_dict(found)


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    end = tokenizer.eos_token
    alone = tokenizer(text=prompt)["input_ids"]
    ids = tokenizer(text=prompt + answer + ("" if answer.endswith(end) else end))["input_ids"]
    start = next((place for place, (one, other) in enumerate(zip(alone, ids, strict=False)) if one != other), None)
    start = min(len(alone), len(ids)) if start is None else start
    return ids, [-100] * start + ids[start:]
