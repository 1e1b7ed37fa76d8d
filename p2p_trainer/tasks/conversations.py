"""Rows that are conversations: the last question, its answer, and the turns before them."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, List, Value

from .rows import COMPLETION, HISTORY, PROMPT


MESSAGES = "messages"

_TURN = {"role": Value("string"), "content": Value("string")}


def split_conversations(dataset: Dataset, what: str = "input", answered: bool = True) -> Dataset:
    """
    Give conversational rows the columns `prompt`, `completion` and `history`; other rows stay as they are.

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
        _check_history(dataset, what)
        return dataset
    missing = [column for column in columns if column not in names]
    if missing:
        raise ValueError(f"The {what} dataset has conversations in {PROMPT!r}, but no column {missing[0]!r}. Add it.")
    fresh = [PROMPT, *([COMPLETION] if answered else []), HISTORY]
    features = Features(
        {name: feature for name, feature in dataset.features.items() if name not in (*columns, *fresh)}
        | {name: List(_TURN) if name == HISTORY else Value("string") for name in fresh}
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


def _turns(part: Any, row: int, what: str) -> Sequence[Any]:
    if isinstance(part, list):
        return part
    raise ValueError(f"Row {row} of the {what} dataset is no conversation (found {part!r}). Give a list of turns.")


def _turn(turn: Any, row: int, what: str) -> dict[str, str]:
    if isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str):
        return {"role": turn["role"], "content": turn["content"]}
    raise ValueError(
        f"Row {row} of the {what} dataset: a turn has a `role` and a `content`, both texts; found {turn!r}. Images "
        f"and tools in turns are not supported."
    )


def _check_history(dataset: Dataset, what: str) -> None:
    """Refuse a column that has the name of ours and holds something else."""
    feature = dataset.features.get(HISTORY)
    turn = getattr(feature, "feature", feature)
    if turn in (None, Value("null")) or isinstance(turn, dict) and set(_TURN) <= set(turn):
        return
    raise ValueError(
        f"Column {HISTORY!r} of the {what} dataset holds {feature}; it is for earlier turns, lists of `role` and "
        f"`content`. Rename or remove it, or give whole conversations in {MESSAGES!r}."
    )


def _check_order(turns: list[dict[str, str]], row: int, what: str, answered: bool) -> None:
    roles = [turn["role"] for turn in turns]
    rest = roles[1:] if roles[:1] == ["system"] else roles
    wanted = [("user", "assistant")[place % 2] for place in range(len(rest))]
    if not rest or rest != wanted or (rest[-1] == "assistant") != answered:
        raise ValueError(
            f"Row {row} of the {what} dataset: turns must be `user` and `assistant` in turn, after at most one "
            f"`system`, and end in `{'assistant' if answered else 'user'}`; found {roles}."
        )
