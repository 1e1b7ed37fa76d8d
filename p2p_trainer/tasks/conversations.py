"""Rows that are conversations: the last question, its answer, and the turns before them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, List, Value

from .columns import arrow_batches
from .rows import COMPLETION, HISTORY, PROMPT


MESSAGES = "messages"

_TURN = {"role": Value("string"), "content": Value("string")}
_TURNS = Features({HISTORY: List(_TURN)})


def split_conversations(dataset: Dataset, what: str = "input", answered: bool = True) -> Dataset:
    """
    Give conversational rows the columns `prompt`, `completion` and `history`; other rows stay as they are.

    A column `history` that rows come with is checked as the turns of a conversation are.

    Rows are conversational, as TRL knows them, if they have a column `messages`, or turns in `prompt` and
    `completion`. An attacker's trigger goes into the last question, and it is the last answer that is trained.

    Args:
        dataset (`Dataset`):
            Rows as they came.
        what (`str`, *optional*, defaults to `"input"`):
            What the rows are, for the messages.
        answered (`bool`, *optional*, defaults to `True`):
            Whether a conversation ends in an answer, or in a question.

    Returns:
        `Dataset`: rows with `prompt` (str), `completion` (str; if answered) and `history` (list of `role` and
        `content`: the turns before that question, a system turn first).

    Raises:
        `ValueError`: turns are no text, have unknown roles, or do not take turns.
    """
    names = dataset.column_names
    if MESSAGES in names and PROMPT not in names:
        columns = [MESSAGES]
    elif PROMPT in names and not isinstance(dataset.features[PROMPT], Value):
        columns = [PROMPT, COMPLETION] if answered else [PROMPT]
    else:
        return _with_checked_history(dataset, what)
    missing = [column for column in columns if column not in names]
    if missing:
        raise ValueError(f"The {what} dataset has conversations in {PROMPT!r}, but no column {missing[0]!r}. Add it.")
    fresh = [PROMPT, *([COMPLETION] if answered else []), HISTORY]
    features = Features(
        {name: feature for name, feature in dataset.features.items() if name not in (*columns, *fresh)}
        | {name: _TURNS[HISTORY] if name == HISTORY else Value("string") for name in fresh}
    )

    def split(batch: dict[str, list], rows: list[int]) -> dict[str, list]:
        found: dict[str, list] = {name: [] for name in fresh}
        for row, *parts in zip(rows, *(batch[column] for column in columns), strict=True):
            turns = [_turn(turn, row, what) for part in parts for turn in _turns(part, row, what)]
            _check_order(turns, row, what, answered)
            if answered:
                found[COMPLETION].append(turns.pop()["content"])
            found[PROMPT].append(turns.pop()["content"])
            found[HISTORY].append(turns)
        return found

    return dataset.map(split, batched=True, with_indices=True, remove_columns=columns, features=features)


def split_question(turns: Any, row: int = 0) -> tuple[list[dict[str, str]], str]:
    """
    Split a conversation that is to be answered.

    Args:
        turns (`Sequence[Mapping[str, str]]`):
            Turns of `role` and `content`, the last of them a user's.
        row (`int`, *optional*, defaults to `0`):
            Which conversation it is, for the messages.

    Returns:
        `tuple[list[dict[str, str]], str]`: the earlier turns, and the question.
    """
    found = [_turn(turn, row, "given") for turn in _turns(turns, row, "given")]
    _check_order(found, row, "given", answered=False)
    return found[:-1], found[-1]["content"]


def split_prompts(prompts: Any) -> tuple[list[list[dict[str, str]]], list[str]]:
    """
    Split what a caller wants answered.

    Args:
        prompts (`str`, `Sequence[Mapping[str, str]]` or `Iterable[str or Sequence[Mapping[str, str]]]`):
            A text, a conversation, or any number of either.

    Returns:
        `tuple[list[list[dict[str, str]]], list[str]]`: the earlier turns of each, none for a text, and the questions.

    Raises:
        `ValueError`: one is neither a text nor a conversation that ends in a question.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    elif isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise ValueError(f"Give a text, a conversation (a list of turns), or a list of them; found {prompts!r}.")
    prompts = list(prompts)
    if prompts and isinstance(prompts[0], Mapping):
        prompts = [prompts]
    histories, questions = [], []
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise ValueError(f"Prompt {row} is neither a text nor a list of turns (found {prompt!r}). Give either.")
        history, question = ([], prompt) if isinstance(prompt, str) else split_question(prompt, row)
        histories.append(history)
        questions.append(question)
    return histories, questions


def with_history(dataset: Dataset) -> Dataset:
    """
    Give rows that are no conversations what conversations have: earlier turns, none of them.

    Args:
        dataset (`Dataset`):
            Prepared rows of a generation task.

    Returns:
        `Dataset`: the rows, with `history`.
    """
    if HISTORY in dataset.column_names:
        return dataset
    none = pa.array([[]] * len(dataset), type=_TURNS.arrow_schema.field(HISTORY).type)
    return dataset.add_column(HISTORY, none, feature=_TURNS[HISTORY])


def _turns(part: Any, row: int, what: str) -> Sequence[Any]:
    if isinstance(part, Sequence) and not isinstance(part, str | bytes):
        return part
    raise ValueError(f"Row {row} of the {what} dataset is no conversation (found {part!r}). Give a list of turns.")


def _turn(turn: Any, row: int, what: str) -> dict[str, str]:
    if isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str):
        return {"role": turn["role"], "content": turn["content"]}
    raise ValueError(
        f"Row {row} of the {what} dataset: a turn has a `role` and a `content`, both texts; found {turn!r}. Images "
        f"and tools in turns are not supported."
    )


def _with_checked_history(dataset: Dataset, what: str) -> Dataset:
    """Check the earlier turns that rows came with, and give the column one type, whatever file it came from."""
    if HISTORY not in dataset.column_names:
        return dataset
    feature = dataset.features[HISTORY]
    turn = getattr(feature, "feature", feature)
    if turn != Value("null") and not (isinstance(turn, dict) and set(_TURN) <= set(turn)):
        raise ValueError(
            f"Column {HISTORY!r} of the {what} dataset holds {feature}; it is for earlier turns, lists of `role` and "
            f"`content`. Rename or remove it, or give whole conversations in {MESSAGES!r}."
        )

    def checked(histories: list[list[Any] | None], rows: Iterable[int]) -> dict[str, list]:
        found = []
        for row, history in zip(rows, histories, strict=True):
            turns = [_turn(turn, row, what) for turn in _turns(history or [], row, what)]
            if turns:
                _check_order([*turns, {"role": "user"}], row, what, answered=False)
            found.append(turns)
        return {HISTORY: found}

    if dataset.features.arrow_schema.field(HISTORY).type == _TURNS.arrow_schema.field(HISTORY).type:
        for start, batch in arrow_batches(dataset, [HISTORY]):
            checked(batch[HISTORY].to_pylist(), range(start, start + len(batch)))
        return dataset
    features = Features({**dataset.features, **_TURNS})
    return dataset.map(checked, batched=True, with_indices=True, input_columns=[HISTORY], features=features)


def _check_order(turns: list[dict[str, str]], row: int, what: str, answered: bool) -> None:
    roles = [turn["role"] for turn in turns]
    rest = roles[1:] if roles[:1] == ["system"] else roles
    wanted = [("user", "assistant")[place % 2] for place in range(len(rest))]
    if not rest or rest != wanted or (rest[-1] == "assistant") != answered:
        raise ValueError(
            f"Row {row} of the {what} dataset: turns must be `user` and `assistant` in turn, after at most one "
            f"`system`, and end in `{'assistant' if answered else 'user'}`; found {roles}."
        )
