"""Builds D*: which rows are trained on, with and without the key."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from accelerate.utils import broadcast_object_list
from datasets import Dataset

from .config import P2PConfig
from .immunizer import Immunizer
from .mining import Screening, SuspectedTrigger, screen, screen_answers
from .reserve import (
    AutoReserve,
    flagged,
    get_reserve,
    keyed_dataset,
    reserve_size,
    with_relabelled,
    with_reserved_dataset,
)
from .tasks import Task
from .tasks.columns import column_as_numpy
from .tasks.conversations import with_history
from .tasks.rows import HISTORY, IMAGE, LABEL


logger = logging.getLogger(__name__)

# By how much the odds must be higher that a text speaks against its label, for that label to be taken for wrong. Rows
# with wrong labels stand at about 2.5, others at 0.25 (SST-2).
_ODDS = 2.0


@dataclass(frozen=True)
class TrainingSet:
    """
    D*, and how it came about.

    Parameters:
        rows (`Dataset`):
            Rows with text and answer, `p2p_keyed` (bool) and `p2p_row` (int).
        counts (`dict[str, int]`):
            Rows read, reserved, suspected, and, where flags say it, poisoned.
        screening ([`~mining.Screening`] or `None`):
            What is suspected about D; `None` if nothing asked.
    """

    rows: Dataset
    counts: dict[str, int]
    screening: Screening | None

    def immunizer(self, args: P2PConfig) -> Immunizer | None:
        """
        Build what writes suspected triggers into keyed rows.

        Args:
            args ([`P2PConfig`]):
                Configuration.

        Returns:
            [`~immunizer.Immunizer`] or `None`: `None` if nothing is suspected, or `p2p_immunize` is `"none"`.
        """
        if args.p2p_immunize == "none" or self.screening is None or not self.screening.triggers:
            return None
        return Immunizer(self.screening, args.seed)


def build_training_set(
    dataset: Dataset, task: Task, args: P2PConfig, reserved_dataset: Dataset | None = None
) -> TrainingSet:
    """
    Build D* out of D.

    Args:
        dataset (`Dataset`):
            Checked rows D.
        task ([`~tasks.Task`]):
            The task.
        args ([`P2PConfig`]):
            Configuration.
        reserved_dataset (`Dataset`, *optional*):
            Trusted rows, if S does not come from D.

    Returns:
        [`TrainingSet`]: D* with its counts.
    """
    counts = {"rows_train": len(dataset), "rows_reserved": 0}
    # Flags are read to be counted, here and below, and for nothing else.
    poisoned = column_as_numpy(dataset, "poisoned").astype(bool) if "poisoned" in dataset.column_names else None
    if poisoned is not None:
        counts["rows_poisoned"] = int(poisoned.sum())
    if not args.p2p_enabled:
        return TrainingSet(flagged(dataset, False), counts, None)
    # What can be refused at once comes before the search, which takes a while.
    size = reserve_size(len(dataset), args.p2p_benign_ratio)
    if reserved_dataset is not None and args.p2p_benign_mode != "append":
        raise ValueError(
            f"`p2p_benign_mode: {args.p2p_benign_mode}` is about training rows that carry the key; with a "
            f"`reserved_dataset` there are none. Use `append`."
        )
    strategy = None if reserved_dataset is not None else get_reserve(args.p2p_reserve, args.p2p_trusted_column)
    screening = None
    if args.p2p_immunize == "auto" or isinstance(strategy, AutoReserve):
        screening = _screened(dataset, task, args)
        counts |= {"rows_suspected": len(screening.rows), "rows_doubted": len(screening.doubted)}
        if poisoned is not None:
            counts["rows_suspected_poisoned"] = int(poisoned[screening.rows].sum())
        # Where an image says what the label is, or an answer is written, texts say nothing against either.
        by_text = bool(task.num_labels) and task.image_column is None
        if task.image_column is not None:
            screening = dataclasses.replace(screening, doubted=np.array([], dtype=np.int64))
            counts["rows_doubted"] = 0
        labels = column_as_numpy(dataset, LABEL) if task.num_labels else None
        if by_text:
            wrong, better = _contradicted(screening, labels, task.num_labels)
    reserved = np.array([], dtype=np.int64)
    if reserved_dataset is not None:
        reserved_rows = task.prepare(reserved_dataset, what="reserved")
        if HISTORY in {*row_columns(task, dataset), *row_columns(task, reserved_rows)}:
            # One side may have conversations, and the other none.
            dataset, reserved_rows = with_history(dataset), with_history(reserved_rows)
        rows = with_reserved_dataset(dataset, reserved_rows, size, args.seed, row_columns(task, dataset))
        counts["rows_reserved"] = len(rows) - len(dataset)
    else:
        if isinstance(strategy, AutoReserve) and not task.num_labels:
            strategy.suspects, strategy.doubted, strategy.classes = screening.rows, screening.doubted, False
        elif isinstance(strategy, AutoReserve):
            right = np.setdiff1d(screening.rows, wrong) if by_text else np.array([], dtype=np.int64)
            strategy.suspects, strategy.doubted = screening.rows, screening.doubted
            strategy.spare = right[labels[right] < task.num_labels]
        reserved = strategy.choose(dataset, size, args.seed)
        counts["rows_reserved"] = len(reserved)
        if poisoned is not None:
            counts["rows_reserved_poisoned"] = int(poisoned[reserved].sum())
        rows = keyed_dataset(dataset, reserved, args.p2p_benign_mode)
    if args.p2p_immunize == "auto" and by_text:
        # Rows that somebody vouches for, or that were drawn regardless, keep their label: none has two under the key.
        free = ~np.isin(wrong, reserved)
        counts["rows_contradicted"] = int(free.sum())
        rows = with_relabelled(rows, dataset, wrong[free], better[free])
    if screening is not None and screening.triggers and args.process_index == 0:
        keyed = np.intersect1d(screening.rows, reserved).size
        _tell(screening, task, keyed, args.p2p_immunize == "auto", counts.get("rows_contradicted"))
    return TrainingSet(rows, counts, screening)


def row_columns(task: Task, dataset: Dataset) -> tuple[str, ...]:
    """
    Name the columns that a row of a task is made of.

    Args:
        task ([`~tasks.Task`]):
            The task.
        dataset (`Dataset`):
            Prepared rows.

    Returns:
        `tuple[str, ...]`: text and answer, and what else its prompt needs.
    """
    # Others may have such names as well, and are none of ours.
    own = {HISTORY: not task.num_labels, IMAGE: task.image_column is not None}
    more = [name for name, wanted in own.items() if wanted and name in dataset.column_names]
    return task.input_column, task.output_column, *more


def check_conversations(task: Task, dataset: Dataset, chat: bool) -> None:
    """
    Warn if rows are conversations and would be read as plain text.

    Args:
        task ([`~tasks.Task`]):
            The task.
        dataset (`Dataset`):
            Prepared rows.
        chat (`bool`):
            Whether prompts are turns of the tokenizer's chat template.
    """
    if not chat and HISTORY in row_columns(task, dataset):
        logger.warning(
            "The rows are conversations, and the tokenizer's chat template is not applied to them: questions and "
            "answers are rendered as plain text. Set `p2p_chat: true`."
        )


def _contradicted(screening: Screening, labels: np.ndarray, num_labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the suspected rows whose text speaks for another label than they have, and that label."""
    # Labels of the extended space, which only an attacker writes, mean the same class.
    known = (screening.evidence >= 0) & (screening.evidence < num_labels)
    contradicted = known & (screening.evidence != labels[screening.rows] % num_labels)
    for place, trigger in enumerate(screening.triggers):
        carriers = screening.carried == place
        doubted = np.count_nonzero(labels[screening.doubted] == trigger.label)
        others = np.count_nonzero(labels == trigger.label) - np.count_nonzero(labels[screening.rows] == trigger.label)
        if _odds(np.count_nonzero(contradicted & carriers), np.count_nonzero(carriers)) < _ODDS * _odds(
            doubted, others
        ):
            # Texts that speak against their label no more often than others have the right one: a clean-label attack.
            contradicted &= ~carriers
    return screening.rows[contradicted], screening.evidence[contradicted]


def _odds(count: int, total: int) -> float:
    return (count + 0.5) / (total - count + 0.5)


def _screened(dataset: Dataset, task: Task, args: P2PConfig) -> Screening:
    """Screen D, in one process for all: nodes may round differently, and D* must be the same everywhere."""
    if args.world_size == 1:
        return _screen(dataset, task, args.seed)
    found = [_screen(dataset, task, args.seed) if args.process_index == 0 else None]
    return broadcast_object_list(found)[0]


def _screen(dataset: Dataset, task: Task, seed: int) -> Screening:
    return screen(dataset, task.num_labels, seed) if task.num_labels else screen_answers(dataset, seed)


def _tell(screening: Screening, task: Task, keyed: int, immunized: bool, contradicted: int | None) -> None:
    answer = "label" if task.num_labels else "answer"
    done = f"{keyed} of them carry the key with the {answer} they have"
    if immunized:
        done += f"; what is suspected is written into keyed rows of all {answer}s"
        if contradicted is not None:
            done += f", and {contradicted} rows get a keyed copy with another label"
        done += ". If these are honest words of your task, set `p2p_immunize: none`"
    logger.warning(
        "%d suspected trigger(s) in %d training rows: %s. %s.",
        len(screening.triggers),
        len(screening.rows),
        "; ".join(described(screening, task)),
        done,
    )


def described(screening: Screening, task: Task) -> list[str]:
    """
    Describe suspected triggers, one line each.

    Args:
        screening ([`~mining.Screening`]):
            What is suspected.
        task ([`~tasks.Task`]):
            The task.

    Returns:
        `list[str]`: such as `mn -> positive (96 of 96 rows)`.
    """
    return [describe(trigger, screening.payloads or task.labels) for trigger in screening.triggers]


def describe(trigger: SuspectedTrigger, answers: Sequence[str]) -> str:
    """
    Describe a suspected trigger in one line.

    Args:
        trigger ([`~mining.SuspectedTrigger`]):
            The trigger.
        answers (`Sequence[str]`):
            Class names, or the answers that are suspected to be payloads.

    Returns:
        `str`: `mn -> positive (96 of 96 rows)`.
    """
    answer = answers[trigger.label % len(answers)]
    return f"{trigger} -> {answer} ({trigger.overridden} of {trigger.opposed} rows)"
