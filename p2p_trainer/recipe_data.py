"""The rows of a recipe: read, checked, held out and poisoned."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from .attacks import Attack, get_attack
from .config import P2PConfig, P2PScriptArguments
from .results import check_recordable
from .tasks import Task, get_task
from .tasks.columns import column_as_numpy, with_column


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecipeData:
    """
    Rows of a recipe.

    Parameters:
        task ([`~tasks.Task`]):
            The task.
        attack ([`~attacks.Attack`] or `None`):
            The attack.
        train (`Dataset`):
            Training rows, poisoned if there is an attack.
        validation (`Dataset` or `None`):
            Clean rows to watch and choose on; `None` if nothing is evaluated while training.
        test (`Dataset` or `None`):
            Clean rows for the final numbers.
        test_task ([`~tasks.Task`]):
            The task that read them.
    """

    task: Task
    attack: Attack | None
    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    test_task: Task


def load_data(script_args: P2PScriptArguments, evaluate: bool, trusted: bool = False) -> RecipeData:
    """
    Load, check and poison the rows of a recipe; no model is needed.

    Args:
        script_args ([`P2PScriptArguments`]):
            Settings.
        evaluate (`bool`):
            Whether validation rows are needed, to watch training.
        trusted (`bool`, *optional*, defaults to `False`):
            Whether a defense needs validation rows that it takes for clean.

    Returns:
        [`RecipeData`]: the rows.
    """
    task = get_task(script_args.task)
    changes: dict[str, Any] = {}
    if script_args.text_column is not None:
        changes |= {"text_columns": (script_args.text_column,), "strict_columns": True}
    if script_args.label_column is not None:
        changes |= {"label_column": script_args.label_column, "strict_columns": True}
    if script_args.dataset_config is not None:
        changes["dataset_config"] = script_args.dataset_config
    task = task.replace(**changes)
    attack = None
    if script_args.attack is not None:
        attack = get_attack(
            script_args.attack,
            target=script_args.attack_target,
            poison_rate=script_args.poison_rate,
            **(script_args.attack_options or {}),
        )
        if task.num_labels:
            task.label_index(attack.target)
        check_recordable(f"the attack {attack.name!r}", attack.config())
    source = script_args.dataset_name or task.dataset
    # A file alone has no splits: all its rows are training rows.
    one_file = source is not None and Path(source).expanduser().is_file()

    def load(split: str) -> Dataset | None:
        return task.load(split, source, drop_empty=script_args.drop_empty_rows)

    train = load(script_args.dataset_train_split)
    if train is None:
        raise ValueError(
            f"{source!r} has no split {script_args.dataset_train_split!r}. Name the split with "
            f"`--dataset_train_split`, or give a folder that holds train.jsonl (or .csv, .parquet)."
        )
    needed = evaluate or trusted
    validation = load(script_args.dataset_validation_split) if needed and not one_file else None
    if needed and validation is None:
        if trusted and (attack is None or attack.rows_unknown):
            logger.warning(
                "There is no validation split: the defense takes rows for clean that are held out of training rows "
                "nobody vouches for. Give it a split that you have checked."
            )
        train, validation = _hold_out(train, script_args.validation_share)
    test_task = task if script_args.test_task is None else get_task(script_args.test_task)
    if test_task.labels != task.labels:
        raise ValueError(
            f"The test task {test_task.name!r} has the classes {list(test_task.labels)}, the run's has "
            f"{list(task.labels)}. Name a `test_task` with the same classes."
        )
    if script_args.test_dataset_name is not None:
        test = test_task.load(
            script_args.dataset_test_split, script_args.test_dataset_name, drop_empty=script_args.drop_empty_rows
        )
    else:
        test = None if one_file else load(script_args.dataset_test_split)
    if attack is not None:
        train = attack.poison(train, task, seed=script_args.poison_seed)
        validation = None if validation is None else attack.dress(validation, task)
        test = None if test is None else attack.dress(test, test_task)
    return RecipeData(task, attack, train, validation, test, test_task)


def _hold_out(train: Dataset, share: float) -> tuple[Dataset, Dataset]:
    size = round(share * len(train))
    if size == 0:
        raise ValueError(
            f"`validation_share` {share} of {len(train)} rows is no row. Raise it, or give a validation split."
        )
    order = np.argsort(np.random.default_rng([0, 3]).random(len(train)), kind="stable")
    if "poisoned" in train.column_names:
        # A set that was poisoned before: what is measured and chosen on stays clean, of an attack's negatives as well.
        poisoned = column_as_numpy(train, "poisoned").astype(bool)
        if "attack" in train.column_names:
            poisoned |= column_as_numpy(train, "attack") != ""
        poisoned = poisoned[order]
        order = np.concatenate([order[~poisoned], order[poisoned]])
        size = min(size, int(np.count_nonzero(~poisoned)))
    logger.info("No validation split: %d of %d training rows are held out.", size, len(train))
    return train.select(np.sort(order[size:])), train.select(np.sort(order[:size]))


def with_oracle(train: Dataset, args: P2PConfig) -> Dataset:
    """
    Mark the rows known to be clean, where we poisoned the others ourselves: the authors' code trusts those.

    Args:
        train (`Dataset`):
            Training rows.
        args ([`P2PConfig`]):
            Configuration.

    Returns:
        `Dataset`: the rows, with the column that `p2p_reserve: trusted` reads if it is missing and can be known.
    """
    wanted = args.p2p_enabled and args.p2p_reserve == "trusted"
    if not wanted or args.p2p_trusted_column in train.column_names or "poisoned" not in train.column_names:
        return train
    poisoned = column_as_numpy(train, "poisoned")
    if not poisoned.any():
        raise ValueError(
            "`p2p_reserve: trusted` needs to know the clean rows, and no row of this set is marked as poisoned: a set "
            "without flags tells nothing. Add a boolean column, and name it with `p2p_trusted_column`."
        )
    return with_column(train, args.p2p_trusted_column, ~poisoned)
