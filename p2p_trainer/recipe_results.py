"""Puts together what a recipe's run was, what it measured, and what it cost."""

from typing import Any

from trl import ModelConfig

from .config import P2PConfig, P2PScriptArguments
from .defenses import Defense, Workbench
from .evaluation.answer_scores import metric_name
from .recipe_data import RecipeData
from .recipe_measure import Measurement
from .results import RunResults
from .tasks.rows import COMPLETION
from .trainer import P2PTrainer
from .training_set import described


Arguments = tuple[P2PScriptArguments, P2PConfig, ModelConfig]


def collect(
    arguments: Arguments,
    data: RecipeData,
    trainer: P2PTrainer,
    defense: Defense,
    bench: Workbench,
    measured: Measurement | None,
    timing: dict[str, float],
) -> RunResults:
    """
    Put a run's results together.

    Args:
        arguments (`tuple[P2PScriptArguments, P2PConfig, ModelConfig]`):
            Settings.
        data ([`~recipe_data.RecipeData`]):
            Rows.
        trainer ([`P2PTrainer`]):
            Holds the model that was measured.
        defense ([`~defenses.Defense`]):
            The defense.
        bench ([`~defenses.Workbench`]):
            What it trained with.
        measured ([`~recipe_measure.Measurement`] or `None`):
            Numbers on the test rows.
        timing (`dict[str, float]`):
            Seconds.

    Returns:
        [`RunResults`]: the content of `results.json`.
    """
    script_args, args, model_args = arguments
    screening = trainer.screening
    named = script_args.defense is not None
    settings = defense.config() if named else {}
    return RunResults(
        task=data.task.name,
        model=str(model_args.model_name_or_path),
        attack=None if data.attack is None else data.attack.config(),
        defense=settings.pop("name") if named else _defense(args),
        defense_options=settings,
        defense_report=defense.found,
        seed=args.seed,
        protocol=_protocol(arguments, data, trainer, measured),
        metrics={} if measured is None else measured.report.metrics,
        counts={**_training_counts(trainer, data), **({} if measured is None else measured.report.counts)},
        epochs=_epochs(trainer.state.log_history),
        suspected_triggers=[] if screening is None else described(screening, data.task),
        confidence={} if measured is None else measured.report.confidence,
        response_matrix={} if measured is None else measured.matrix,
        compute=_compute(args, data, trainer, defense, bench),
        timing=timing,
    )


def _compute(
    args: P2PConfig, data: RecipeData, trainer: P2PTrainer, defense: Defense, bench: Workbench
) -> dict[str, float]:
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    plain = args.max_steps * batch if args.max_steps > 0 else len(data.train) * args.num_train_epochs
    return {
        "rows_given": len(data.train),
        "train_row_passes": bench.row_passes,
        "plain_row_passes": plain,
        "train_s": bench.train_s,
        "search_s": trainer.search_s,
        **defense.compute.report(),
    }


def _training_counts(trainer: P2PTrainer, data: RecipeData) -> dict[str, int]:
    unknown = 0 if data.attack is None else data.attack.rows_unknown
    if not unknown:
        return trainer.counts
    # A set without flags: zero poisoned rows would be a claim.
    known = {key: value for key, value in trainer.counts.items() if not key.endswith("_poisoned")}
    return {**known, "rows_poison_unknown": unknown}


def _defense(args: P2PConfig) -> str:
    if not args.p2p_enabled:
        return "none"
    # As published, or with what the rows themselves make suspicious.
    return "p2p_auto" if "auto" in (args.p2p_immunize, args.p2p_reserve) else "p2p"


def _protocol(
    arguments: Arguments, data: RecipeData, trainer: P2PTrainer, measured: Measurement | None
) -> dict[str, Any]:
    script_args, args, model_args = arguments
    settings = {
        "task_version": data.task.version,
        "max_length": args.max_length,
        "lora_alpha": model_args.lora_alpha if model_args.use_peft else None,
        "lora_dropout": model_args.lora_dropout if model_args.use_peft else None,
        "dtype": model_args.dtype,
        "dataset": script_args.dataset_name,
        "lora_r": model_args.lora_r if model_args.use_peft else None,
        "lora_target_modules": model_args.lora_target_modules if model_args.use_peft else None,
        "learning_rate": args.learning_rate,
        "epochs": args.num_train_epochs,
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "bf16": args.bf16,
        "poison_seed": script_args.poison_seed,
    }
    prompt_format = trainer.encoder.format
    settings |= {
        "trigger": prompt_format.trigger if args.p2p_enabled else None,
        "benign_ratio": args.p2p_benign_ratio if args.p2p_enabled else 0.0,
        "reserve": args.p2p_reserve,
        "immunize": args.p2p_immunize if args.p2p_enabled else "none",
        "benign_mode": args.p2p_benign_mode,
        "trigger_position": args.p2p_trigger_position,
        "append_eos": args.p2p_append_eos,
        "chat": args.p2p_chat,
    }
    if prompt_format.label_space is None:
        known = data.test is not None and data.test_task.label_column is not None
        return {
            **settings,
            "answer_prefix": prompt_format.answer_prefix if args.p2p_enabled else None,
            "metric": metric_name(data.test_task.metric, data.test[COMPLETION]) if known else None,
            "max_new_tokens": args.p2p_max_new_tokens,
            "eval_rows": args.p2p_eval_rows,
            "test_task": data.test_task.name,
            "test_dataset": script_args.test_dataset_name,
            "judge_model": script_args.judge_model,
        }
    return {
        **settings,
        "suffix": prompt_format.suffix,
        "keyed_suffix": prompt_format.keyed_suffix if args.p2p_enabled else None,
        "label_words": prompt_format.label_space.all_words,
        "suffix_mode": args.p2p_suffix_mode,
        "asr_rule": None if measured is None else measured.rule,
    }


def _epochs(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key.removeprefix("eval_"): value for key, value in entry.items()}
        for entry in history
        if {"eval_ca", "eval_clean_unaffected"} & set(entry)
    ]
