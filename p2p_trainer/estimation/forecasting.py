"""What a recipe takes on the devices there are, in a few lines: memory, whether it fits, hours."""

import math
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from trl import ModelConfig

from ..config import P2PConfig
from ..data_collator import Encoder
from ..recipe import model_location
from ..recipe_data import RecipeData
from ..reserve import KEYED
from ..response_encoder import ResponseEncoder
from ..tasks.columns import text_lengths
from ..tasks.rows import HISTORY
from ..vision_encoder import VisionPromptEncoder
from .cost import ENOUGH, GIB, TOO_MUCH, Memory, advise, estimate_memory, reading_flops, training_flops
from .devices import UTILISATION, Device, find_device
from .model_size import ModelSize, read_model
from .training_plan import Launch, Plan, make_plan, padded_length


# Rows that are tokenized, and those with the longest texts beside them.
_SAMPLE, _LONGEST = 1000, 64


@dataclass(frozen=True)
class Lengths:
    """
    How long rows are, in tokens, cut to `max_length`.

    Parameters:
        sample (`list[int]`):
            Rows spread over the set.
        longest (`int`):
            The longest row.
        answer (`int`):
            Most tokens of a row that have loss on them.
    """

    sample: list[int]
    longest: int
    answer: int


@dataclass(frozen=True)
class Forecast:
    """
    What a recipe takes.

    Parameters:
        lines (`dict[str, str]`):
            Name -> text: `parameters`, `memory`, `fits` and `time`.
        fits (`bool`):
            `False` if it clearly does not.
    """

    lines: dict[str, str]
    fits: bool


def forecast(
    data: RecipeData,
    rows: Dataset,
    encoder: Encoder,
    args: P2PConfig,
    model_args: ModelConfig,
    launch: Launch,
    steps: int,
) -> Forecast:
    """
    Estimate memory and time; reads the model's configuration and never its weights.

    Args:
        data ([`~recipe_data.RecipeData`]):
            Rows that are evaluated, and the attack.
        rows (`Dataset`):
            Rows that are trained on, with `p2p_keyed`.
        encoder ([`~prompt_encoder.PromptEncoder`] or [`~response_encoder.ResponseEncoder`]):
            Tokenizes them.
        args ([`P2PConfig`]):
            Training.
        model_args (`ModelConfig`):
            Model and adapter.
        launch ([`~training_plan.Launch`]):
            Processes.
        steps (`int`):
            Training steps.

    Returns:
        [`Forecast`]: the lines.

    Raises:
        `OSError` or `ValueError`: the model's configuration can't be had or used.
    """
    size = read_model(model_location(model_args.model_name_or_path), args, model_args)
    lengths = measure_lengths(rows, encoder, args)
    new_tokens = 0 if data.task.num_labels else encoder.format.max_new_tokens
    plan = make_plan(args, model_args, size, launch, lengths.longest, lengths.answer, new_tokens)
    device = find_device(plan.cpu, plan.autocast or plan.dtype)
    memory = estimate_memory(size, plan)
    verdict, fits = _verdict(size, plan, memory, device)
    billions = size.parameters / 1e9
    lines = {
        "parameters": f"{billions:.3g} billion, {size.trained:,} trained",
        "memory": _broken_down(memory, plan, size),
        "fits": verdict,
        "time": _hours(data, size, plan, lengths, args, device, steps),
    }
    return Forecast(lines, fits)


def measure_lengths(rows: Dataset, encoder: Encoder, args: P2PConfig) -> Lengths:
    """
    Tokenize some rows, the longest among them.

    Args:
        rows (`Dataset`):
            Training rows with `p2p_keyed`.
        encoder ([`~prompt_encoder.PromptEncoder`] or [`~response_encoder.ResponseEncoder`]):
            Tokenizes them.
        args ([`P2PConfig`]):
            Configuration.

    Returns:
        [`Lengths`]: their lengths. Rows with images are taken to fill `max_length`.
    """
    if isinstance(encoder, VisionPromptEncoder):
        return Lengths([args.max_length], args.max_length, 4)
    spread = np.unique(np.linspace(0, len(rows) - 1, min(_SAMPLE, len(rows))).astype(int))
    written = isinstance(encoder, ResponseEncoder)
    size = text_lengths(rows, encoder.columns if written else encoder.columns[:1])
    longest = np.argsort(-size, kind="stable")[:_LONGEST]
    chosen = rows.select(np.concatenate([spread, longest]).tolist())
    text, answer = encoder.columns
    columns = [chosen[text][:], chosen[answer][:], chosen[KEYED][:]]
    if written and HISTORY in chosen.column_names:
        columns.append([history or () for history in chosen[HISTORY][:]])
    ids, labels = encoder.encode_rows(*columns)
    counts = [len(row) for row in ids]
    return Lengths(counts[: len(spread)], max(counts), max(sum(label != -100 for label in row) for row in labels))


def _broken_down(memory: Memory, plan: Plan, size: ModelSize) -> str:
    def gib(value: float) -> str:
        return f"{value / GIB:.2f}"

    kind = plan.quantisation or str(plan.dtype).removeprefix("torch.")
    parts = [f"{gib(memory.weights)} weights ({kind})"]
    if size.adapter:
        parts.append(f"{gib(memory.adapter)} adapter")
    parts += [
        f"{gib(memory.gradients)} gradients",
        f"{gib(memory.optimizer)} optimizer ({plan.optimizer})",
        f"{gib(memory.activations)} activations ({plan.batch_size} rows of {plan.longest} tokens"
        f"{', checkpointing' if plan.checkpointing else ''})",
        f"{gib(memory.evaluation)} evaluation in their place ({plan.eval_batch_size} rows)",
        f"{gib(memory.context)} libraries",
    ]
    text = f"{memory.total / GIB:.3g} GiB a process at the peak: " + ", ".join(parts)
    if not size.forward:
        text += "; activations of this architecture are not known, and left out"
    elif size.images:
        text += "; images are left out, rows are taken to fill max_length"
    return text


def _verdict(size: ModelSize, plan: Plan, memory: Memory, device: Device) -> tuple[str, bool]:
    launch = plan.launch
    measured = "" if device.cpu else "; estimated, not measured on GPUs"
    if device.memory is None:
        return f"{device.name} does not say how much memory it has{measured}", True
    # The processes of a machine share its main memory.
    limit = device.memory / (math.ceil(launch.processes / launch.machines) if device.cpu else 1)
    share = memory.total / limit
    shown = (
        f"{memory.total / GIB:.3g} of {limit / GIB:.3g} GiB ({device.name}, {launch.processes} x {launch.strategy})"
    )
    if share <= ENOUGH:
        return f"yes: {shown}{measured}", True
    ways = "\n".join(f"- {way}" for way in advise(size, plan, ENOUGH * limit))
    said = "no" if share > TOO_MUCH else "perhaps not"
    return f"{said}: {shown}{measured}. Any of these would do:\n{ways}", share <= TOO_MUCH


def _hours(
    data: RecipeData, size: ModelSize, plan: Plan, lengths: Lengths, args: P2PConfig, device: Device, steps: int
) -> str:
    if not size.forward or device.flops is None:
        return f"not known: {'this architecture' if not size.forward else device.name} is not in the tables"
    grouped = args.train_sampling_strategy in ("group_by_length", "batch_rebalance")
    length = padded_length(lengths.sample, plan.batch_size, grouped)
    trained = steps * plan.batch_size * plan.accumulation * plan.launch.processes
    speed = device.flops * UTILISATION * plan.launch.processes
    if device.cpu:
        # They share the cores that were measured.
        speed /= math.ceil(plan.launch.processes / plan.launch.machines)
    training = training_flops(size, plan, trained * length, length) / speed
    read = _evaluated(data, args, steps)
    mean = sum(lengths.sample) / len(lengths.sample)
    evaluation = reading_flops(size, read * mean, mean) / speed
    # Each written token reads all weights once per batch; the rest of its time is not counted.
    batches = math.ceil(read / plan.eval_batch_size / plan.launch.processes)
    evaluation += batches * plan.new_tokens * estimate_memory(size, plan).weights / device.bandwidth
    peak = f"{device.flops / 1e12:.3g} TFLOPS {'measured' if device.cpu else 'peak'}"
    least = "at least " if plan.new_tokens else ""
    return (
        f"training {_duration(training)}, evaluation {least}{_duration(evaluation)} ({read:,} texts), if "
        f"{UTILISATION:.0%} of {peak} is reached; {length:.0f} tokens a row with padding"
    )


def _evaluated(data: RecipeData, args: P2PConfig, steps: int) -> int:
    """Count the texts that all evaluations read: clean and triggered rows, with the key and without it."""
    variants = 1 if data.attack is None else 2 + len(data.attack.variants())
    variants *= 2 if args.p2p_enabled else 1
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    times = {"epoch": math.ceil(args.num_train_epochs), "no": 0}.get(strategy)
    if times is None:
        every = args.eval_steps or args.logging_steps
        times = int(steps // (every if every >= 1 else max(1, math.ceil(every * steps))))
    watched = 0 if data.validation is None else len(data.validation)
    if not data.task.num_labels and args.p2p_eval_rows is not None:
        watched = min(watched, args.p2p_eval_rows)
    return variants * (times * watched + (0 if data.test is None else len(data.test)))


def _duration(seconds: float) -> str:
    if seconds < 60:
        return "less than a minute"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
