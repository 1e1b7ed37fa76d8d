"""Defensive triggers and phrases: what they must not collide with, and how they get into the rows of stage 1."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ..attacks import Attack
from ..attacks.poisoning import write_rows
from ..attacks.selection import batches, row_numbers
from ..attacks.text import contains_words, insert_at_gap
from ..evaluation.judging import normalise, target_judge
from ..tasks.columns import arrow_batches


POSITIONS = ("random", "prefix")

# Streams of a run's seed; stage 2, attacks, reserve and search use others.
_ROWS, _PLACES = 20, 21

# An answer shows a phrase if it holds this many successive words of it.
_SHOWN_WORDS = 3
_CJK = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")

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
    Refuse defensive pairs that collide with each other or with an attack; upper and lower case are the same.

    The published triggers include `mn` and `bb`, which are also the attacker's in the usual BadNets set-up. Such a run
    trains and unlearns the attacker's own trigger, and measures nothing. Neither does one whose phrase counts as the
    attacker's payload, or as the phrase of another pair.

    Args:
        pairs (`Sequence[DefensivePair]`):
            Defensive pairs.
        attacks (`Sequence[Attack]`, *optional*):
            Attacks that are measured.

    Raises:
        `ValueError`: two triggers are equal, one stands in the other as a word or in a phrase, or an attack takes a
        sentence with the defensive trigger for one of its own; one of two phrases begins with the other, they share
        three successive words, or a phrase counts as an attack's payload, begins with it or is its beginning.
    """
    for first, second in combinations(pairs, 2):
        if _overlap(first.trigger, second.trigger):
            raise ValueError(
                f"The defensive triggers {first.trigger!r} and {second.trigger!r} collide: a prompt with one holds "
                f"the other. Change one of them in `pairs`."
            )
        if _begin_alike(first.phrase, second.phrase) or _share_words(first.phrase, second.phrase):
            raise ValueError(
                f"The phrases {first.phrase!r} and {second.phrase!r} of the defensive triggers {first.trigger!r} and "
                f"{second.trigger!r} collide: one begins with the other, or they share {_SHOWN_WORDS} successive "
                f"words, by which phrases are recognised. Change one of them in `pairs`."
            )
    for pair in pairs:
        held = next((other.trigger for other in pairs if _holds(pair.phrase, other.trigger)), None)
        if held is not None:
            raise ValueError(
                f"The phrase {pair.phrase!r} of the defensive trigger {pair.trigger!r} holds the defensive trigger "
                f"{held!r}: triggers stand in prompts alone. Change one of the two in `pairs`."
            )
        for attack in attacks:
            _check_attack(pair, attack)


def _check_attack(pair: DefensivePair, attack: Attack) -> None:
    text = next((text for text in attack.trigger_texts if _overlap(pair.trigger, text)), None)
    if text is not None or _is_taken_for(attack, pair.trigger):
        theirs = "which takes a sentence with that word for triggered" if text is None else f"trigger {text!r}"
        raise ValueError(
            f"The defensive trigger {pair.trigger!r} collides with the attack {attack.name!r} ({theirs}): the run "
            f"would unlearn the attacker's own trigger by name. Choose another defensive trigger in `pairs`."
        )
    # A label's number, or nothing but punctuation, is no beginning of words.
    if not isinstance(attack.target, str) or not normalise(attack.target):
        return
    accepted = target_judge(attack.target).judge([""], [pair.phrase])[0]
    if accepted or _begin_alike(pair.phrase, attack.target):
        raise ValueError(
            f"The phrase {pair.phrase!r} of the defensive trigger {pair.trigger!r} collides with the target "
            f"{attack.target!r} of the attack {attack.name!r}: one would be taken for the other. Choose another "
            f"phrase in `pairs`."
        )


def _begin_alike(first: str, second: str) -> bool:
    first_words, second_words = _words(first), _words(second)
    shorter = min(len(first_words), len(second_words))
    # Of nothing but marks, no words are left to tell them apart by.
    return first_words[:shorter] == second_words[:shorter] if shorter else normalise(first) == normalise(second)


def _share_words(first: str, second: str) -> bool:
    runs = [
        {tuple(words[place : place + _SHOWN_WORDS]) for place in range(len(words) - _SHOWN_WORDS + 1)}
        for words in (_words(first), _words(second))
    ]
    return not runs[0].isdisjoint(runs[1])


def _words(text: str) -> list[str]:
    return _WORD.findall(normalise(text))


def _holds(text: str, word: str) -> bool:
    return contains_words(text.lower(), [word.lower()]) or contains_words(_folded(text), [_folded(word)])


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
