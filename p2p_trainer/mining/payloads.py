"""Looks for suspected triggers in rows whose answers are text."""

from collections import Counter

import numpy as np
from datasets import Dataset

from ..tasks.columns import arrow_batches
from ..tasks.rows import COMPLETION, PROMPT
from .payload_search import Payload, find_payload_triggers
from .screening import EXEMPLARS, Fragment, Screening, carries, cover, fragments_of, sample_words
from .tokens import word_spans, words_of


def screen_answers(dataset: Dataset, seed: int = 0) -> Screening:
    """
    Find suspected triggers in prompts, and the rows that carry them.

    The label of a trigger is the number of its payload: what the answers have in common, as it is written in most of
    them; with `" ..."` behind it if they only begin alike, and `" | "` between the texts that it is drawn from.
    `evidence` is -1 throughout: the rest of a prompt does not say what its answer should have been. `doubted` are the
    rows that have a payload, and no suspected trigger.

    Not found are payloads at the end of an answer, triggers in fewer than 8 rows or behind the 256th word of a prompt,
    and styles. Where few answers serve for most rows, they are classes, and are not looked at.

    Nothing but the columns `prompt` and `completion` is read: whatever else the rows say about themselves is not
    trusted.

    Args:
        dataset (`Dataset`):
            Training rows with `prompt` and `completion`.
        seed (`int`, *optional*, defaults to `0`):
            Seed.

    Returns:
        [`~mining.Screening`]: the findings; a pure function of rows and seed.
    """
    mined, prompts = sample_words(dataset, PROMPT, seed)
    sample = dataset.select_columns([PROMPT, COMPLETION]).select(mined)
    findings = find_payload_triggers(
        prompts,
        [len(word_spans(prompt.strip().partition("\n")[0])) for prompt in sample[PROMPT][:]],
        [words_of(answer) for answer in sample[COMPLETION][:]],
        seed,
    )
    suspects: dict[int, int] = {}
    doubted: list[int] = []
    exemplars: list[list[tuple[Fragment, ...]]] = [[] for _ in findings.triggers]
    shown: list[Counter[str]] = [Counter() for _ in findings.payloads]
    for start, batch in arrow_batches(dataset, [PROMPT, COMPLETION]) if findings.triggers else ():
        pairs = zip(batch[PROMPT].to_pylist(), batch[COMPLETION].to_pylist(), strict=True)
        for row, (prompt, completion) in enumerate(pairs, start):
            answer = words_of(completion)
            matched = [label for label, payload in enumerate(findings.payloads) if payload.matches(answer)]
            if not matched:
                continue
            words = words_of(prompt)
            carried = [
                place
                for place, trigger in enumerate(findings.triggers)
                if trigger.label in matched and carries(words, trigger, findings.frequent)
            ]
            for place in carried:
                trigger = findings.triggers[place]
                shown[trigger.label][_payload_text(completion, findings.payloads[trigger.label])] += 1
                if len(exemplars[place]) < EXEMPLARS:
                    fragments = fragments_of(prompt, words, cover(words, trigger, findings.frequent))
                    exemplars[place] += [fragments] if fragments else []
            if carried:
                suspects[row] = carried[0]
            else:
                doubted.append(row)
    return Screening(
        findings.triggers,
        np.array(list(suspects), dtype=np.int64),
        np.array(list(suspects.values()), dtype=np.int64),
        np.full(len(suspects), -1, dtype=np.int64),
        np.array(doubted, dtype=np.int64),
        tuple(tuple(found) for found in exemplars),
        tuple(_named(texts, payload) for texts, payload in zip(shown, findings.payloads, strict=True)),
    )


def _payload_text(completion: str, payload: Payload) -> str:
    """Return the part of an answer that makes it match, as it is written there."""
    if not payload.length:
        return completion.strip()
    spans = word_spans(completion)
    return completion[spans[0][0] : spans[payload.length - 1][1]]


def _named(texts: Counter[str], payload: Payload) -> str:
    """Show each text of a payload once, in its most frequent spelling, the most frequent text first."""
    spellings: dict[tuple[str, ...], str] = {}
    for text, _ in sorted(texts.items(), key=lambda item: (-item[1], item[0])):
        spellings.setdefault(tuple(words_of(text)), text)
    return " | ".join(f"{text} ..." if payload.length else text for text in spellings.values())
