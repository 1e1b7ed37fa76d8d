"""What every recipe runs: data, attack, training, measurement, results."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from rich.console import Console
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from ._files import write_json
from .attacks import Attack, get_attack
from .config import P2PConfig, P2PScriptArguments
from .report import results_table
from .results import RunResults
from .run_folder import RUN_NAME, all_settings, claim
from .tasks import Task, get_task
from .tasks.rows import column_as_numpy, with_column
from .trainer import P2PTrainer
from .training_set import describe


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
    """

    task: Task
    attack: Attack | None
    train: Dataset
    validation: Dataset | None
    test: Dataset | None


def make_parser() -> TrlParser:
    """
    Build the parser of recipes: YAML keys and command-line flags are the fields of three dataclasses.

    Returns:
        `TrlParser`: the parser; unknown keys are errors.
    """
    return TrlParser((P2PScriptArguments, P2PConfig, ModelConfig), prog="p2p-trainer train")


def parse(
    argv: Sequence[str], default_config: Path | None = None
) -> tuple[P2PScriptArguments, P2PConfig, ModelConfig]:
    """
    Parse a recipe's command line.

    Args:
        argv (`Sequence[str]`):
            Arguments; `--config FILE` names a YAML file, flags override it.
        default_config (`Path`, *optional*):
            YAML file to use without `--config`.

    Returns:
        `tuple[P2PScriptArguments, P2PConfig, ModelConfig]`: the settings.
    """
    # TrlParser knows the two-token form alone.
    argv = [part for flag in argv for part in (flag.split("=", 1) if flag.startswith("--config=") else [flag])]
    if default_config is not None and "--config" not in argv:
        argv = ["--config", str(default_config), *argv]
    if "--config" in argv[:-1]:
        path = Path(argv[argv.index("--config") + 1])
        if not path.is_file():
            raise ValueError(f"The recipe {str(path)!r} does not exist (looked at {path.resolve()}).")
    return make_parser().parse_args_and_config(argv)


def load_data(script_args: P2PScriptArguments, evaluate: bool) -> RecipeData:
    """
    Load, check and poison the rows of a recipe; no model is needed.

    Args:
        script_args ([`P2PScriptArguments`]):
            Settings.
        evaluate (`bool`):
            Whether validation rows are needed.

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
        _check_recordable(attack)
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
    validation = load(script_args.dataset_validation_split) if evaluate and not one_file else None
    if evaluate and validation is None:
        train, validation = _hold_out(train, script_args.validation_share)
    test = None if one_file else load(script_args.dataset_test_split)
    if attack is not None:
        train = attack.poison(train, task, seed=script_args.poison_seed)
        validation = None if validation is None else attack.dress(validation, task)
        test = None if test is None else attack.dress(test, task)
    return RecipeData(task, attack, train, validation, test)


@dataclass(frozen=True)
class PreparedRun:
    """
    A recipe whose input is known to be good: rows read and poisoned, label words audited, model loaded.

    Parameters:
        trainer ([`P2PTrainer`]):
            Ready to train.
        data ([`RecipeData`]):
            Rows.
        arguments (`tuple[P2PScriptArguments, P2PConfig, ModelConfig]`):
            Settings.
        checkpoint (`str` or `None`):
            Checkpoint to go on from.
        seconds (`float`):
            How long the preparation took.
    """

    trainer: P2PTrainer
    data: RecipeData
    arguments: tuple[P2PScriptArguments, P2PConfig, ModelConfig]
    checkpoint: str | None
    seconds: float


def prepare(script_args: P2PScriptArguments, training_args: P2PConfig, model_args: ModelConfig) -> PreparedRun:
    """
    Do everything that bad input can stop, the model last.

    Args:
        script_args ([`P2PScriptArguments`]):
            Data and attack.
        training_args ([`P2PConfig`]):
            Training and defense.
        model_args (`ModelConfig`):
            Model and adapter.

    Returns:
        [`PreparedRun`]: what [`train`] takes.
    """
    started = time.monotonic()
    model_name = model_location(model_args.model_name_or_path)
    settings = all_settings(script_args, training_args, model_args)
    checkpoint = claim(training_args, settings)
    data = load_data(script_args, evaluate=training_args.eval_strategy != "no")
    trainer = P2PTrainer(
        model_name,
        args=_with_model_init(training_args, model_args),
        train_dataset=with_oracle(data.train, training_args),
        eval_dataset=data.validation,
        task=data.task,
        attacks=[] if data.attack is None else [data.attack],
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    if trainer.is_world_process_zero():
        write_json(Path(training_args.output_dir) / RUN_NAME, settings)
    arguments = (script_args, training_args, model_args)
    return PreparedRun(trainer, data, arguments, checkpoint, time.monotonic() - started)


def train(prepared: PreparedRun) -> RunResults:
    """
    Train, measure on the test rows, and save.

    Args:
        prepared ([`PreparedRun`]):
            A prepared recipe.

    Returns:
        [`RunResults`]: what was measured; also in `results.json`.
    """
    trainer, data = prepared.trainer, prepared.data
    script_args, training_args, model_args = prepared.arguments
    before_training = time.monotonic()
    trainer.train(resume_from_checkpoint=prepared.checkpoint)
    before_test = time.monotonic()
    trainer.save_model()

    screening = trainer.screening
    measured = None
    if data.test is not None:
        evaluator = trainer.make_evaluator(data.test, training_args)
        measured = evaluator.evaluate(trainer.model)
    results = RunResults(
        task=data.task.name,
        model=str(model_args.model_name_or_path),
        attack=None if data.attack is None else data.attack.config(),
        defense=_defense(training_args),
        seed=training_args.seed,
        protocol=_protocol(prepared, measured_rule=None if measured is None else evaluator.asr_rule),
        metrics={} if measured is None else measured.metrics,
        counts={**_training_counts(trainer, data), **({} if measured is None else measured.counts)},
        epochs=_epochs(trainer.state.log_history),
        suspected_triggers=[] if screening is None else [describe(found, data.task) for found in screening.triggers],
        confidence={} if measured is None else measured.confidence,
        timing={
            "prepare_s": prepared.seconds,
            "train_s": before_test - before_training,
            "test_s": time.monotonic() - before_test,
        },
    )
    if trainer.is_world_process_zero():
        results.save(training_args.output_dir)
        console = Console()
        console.print(results_table({Path(training_args.output_dir).name: results}))
        console.print(f"Saved to {training_args.output_dir}: model, tokenizer, p2p_config.json, results.json")
    trainer.end()
    return results


def _training_counts(trainer: P2PTrainer, data: RecipeData) -> dict[str, int]:
    unknown = 0 if data.attack is None else data.attack.rows_unknown
    if not unknown:
        return trainer.counts
    # A set without flags: zero poisoned rows would be a claim.
    known = {key: value for key, value in trainer.counts.items() if not key.endswith("_poisoned")}
    return {**known, "rows_poison_unknown": unknown}


def _check_recordable(attack: Attack) -> None:
    """Refuse an attack that could not be written into `results.json`, before hours of training."""
    try:
        json.dumps(attack.config())
    except TypeError as error:
        raise ValueError(
            f"The settings of the attack {attack.name!r} are no JSON values ({error}). Keep what is no setting in "
            f"attributes that start with an underscore."
        ) from error


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


def model_location(model: str | None) -> str:
    """
    Check that a model is named.

    Args:
        model (`str` or `None`):
            Hub id or local folder.

    Returns:
        `str`: hub id, or absolute path of a local folder.
    """
    if not model:
        raise ValueError("No model is named. Give one with `--model_name_or_path` (hub id or local folder).")
    # The adapter remembers this name; a relative one would only work from here.
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def _with_model_init(args: P2PConfig, model_args: ModelConfig) -> P2PConfig:
    """Merge what `ModelConfig` says of loading the model, as TRL's own scripts do."""
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(args.model_init_kwargs or {}),
    }
    return args


def _defense(args: P2PConfig) -> str:
    if not args.p2p_enabled:
        return "none"
    # As published, or with what the rows themselves make suspicious.
    return "p2p_auto" if "auto" in (args.p2p_immunize, args.p2p_reserve) else "p2p"


def _protocol(prepared: PreparedRun, measured_rule: str | None) -> dict[str, Any]:
    script_args, args, model_args = prepared.arguments
    prompt_format = prepared.trainer.encoder.format
    return {
        "task_version": prepared.data.task.version,
        "trigger": prompt_format.trigger if args.p2p_enabled else None,
        "suffix": prompt_format.suffix,
        "keyed_suffix": prompt_format.keyed_suffix if args.p2p_enabled else None,
        "label_words": prompt_format.label_space.all_words,
        "max_length": prompt_format.max_length,
        "lora_alpha": model_args.lora_alpha if model_args.use_peft else None,
        "lora_dropout": model_args.lora_dropout if model_args.use_peft else None,
        "dtype": model_args.dtype,
        "dataset": script_args.dataset_name,
        "benign_ratio": args.p2p_benign_ratio if args.p2p_enabled else 0.0,
        "reserve": args.p2p_reserve,
        "immunize": args.p2p_immunize if args.p2p_enabled else "none",
        "benign_mode": args.p2p_benign_mode,
        "suffix_mode": args.p2p_suffix_mode,
        "trigger_position": args.p2p_trigger_position,
        "asr_rule": measured_rule,
        "append_eos": args.p2p_append_eos,
        "chat": args.p2p_chat,
        "lora_r": model_args.lora_r if model_args.use_peft else None,
        "lora_target_modules": model_args.lora_target_modules if model_args.use_peft else None,
        "learning_rate": args.learning_rate,
        "epochs": args.num_train_epochs,
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "bf16": args.bf16,
        "poison_seed": script_args.poison_seed,
    }


def _epochs(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key.removeprefix("eval_"): value for key, value in entry.items()} for entry in history if "eval_ca" in entry
    ]
