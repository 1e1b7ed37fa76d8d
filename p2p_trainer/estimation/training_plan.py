"""The settings of a recipe that decide what its training takes: processes, batches, types and lengths."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from trl import ModelConfig

from ..assembly import mixed_precision
from ..config import P2PConfig
from .model_size import ModelSize


@dataclass(frozen=True)
class Launch:
    """
    How many processes train, and what each holds.

    Parameters:
        strategy (`str`, *optional*, defaults to `"ddp"`):
            `"ddp"`: all of it. `"zero2"`: its share of gradients and optimizer states. `"zero3"`, `"fsdp2"`: its
            share of everything.
        processes (`int`, *optional*, defaults to `1`):
            Processes, on all machines.
        machines (`int`, *optional*, defaults to `1`):
            Machines.
    """

    strategy: str = "ddp"
    processes: int = 1
    machines: int = 1


@dataclass(frozen=True)
class Plan:
    """
    The settings that decide what a run takes.

    Parameters:
        batch_size (`int`):
            Rows per process and pass.
        accumulation (`int`):
            Passes per step.
        eval_batch_size (`int`):
            Rows per process in evaluation.
        checkpointing (`bool`):
            Whether activations are computed again in the backward pass.
        dtype (`torch.dtype`):
            Type that the base model is loaded in.
        quantisation (`str` or `None`):
            `"nf4"`, `"nf4, double"` or `"int8"`.
        autocast (`torch.dtype` or `None`):
            Type of mixed precision.
        optimizer (`str`):
            Name of the optimizer.
        launch ([`Launch`]):
            Processes.
        cpu (`bool`):
            Whether it runs on a CPU.
        longest (`int`):
            Tokens of the longest row, cut to `max_length`.
        answer (`int`):
            Most tokens of a row that have loss on them.
        new_tokens (`int`, *optional*, defaults to `0`):
            Most tokens that evaluation writes per answer; 0 where it scores label words.
    """

    batch_size: int
    accumulation: int
    eval_batch_size: int
    checkpointing: bool
    dtype: torch.dtype
    quantisation: str | None
    autocast: torch.dtype | None
    optimizer: str
    launch: Launch
    cpu: bool
    longest: int
    answer: int
    new_tokens: int = 0


def read_launch(path: str | Path | None, world_size: int) -> Launch:
    """
    Read processes and strategy off a configuration of `accelerate launch`.

    Args:
        path (`str` or `Path` or `None`):
            YAML file; `None` takes the processes there are.
        world_size (`int`):
            How many those are.

    Returns:
        [`Launch`]: what it says.

    Raises:
        `ValueError`: there is no such file, or it is no such configuration.
    """
    if path is None:
        return Launch(processes=world_size)
    if not Path(path).is_file():
        raise ValueError(f"The accelerate configuration {str(path)!r} does not exist.")
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        processes, machines = (int(found.get(name) or 1) for name in ("num_processes", "num_machines"))
        kind = str(found.get("distributed_type") or "NO").upper()
        stage = (found.get("deepspeed_config") or {}).get("zero_stage", 2)
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is no configuration of `accelerate launch`: {error}") from error
    strategy = {"FSDP": "fsdp2", "DEEPSPEED": {2: "zero2", 3: "zero3"}.get(stage, "ddp")}.get(kind, "ddp")
    return Launch(strategy, max(processes, 1), max(machines, 1))


def make_plan(
    args: P2PConfig,
    model_args: ModelConfig,
    size: ModelSize,
    launch: Launch,
    longest: int,
    answer: int,
    new_tokens: int = 0,
) -> Plan:
    """
    Take from the settings of a recipe what matters here.

    Args:
        args ([`P2PConfig`]):
            Training.
        model_args (`ModelConfig`):
            Model and adapter.
        size ([`~model_size.ModelSize`]):
            The model.
        launch ([`Launch`]):
            Processes.
        longest (`int`):
            Tokens of the longest row.
        answer (`int`):
            Most tokens of a row that have loss on them.
        new_tokens (`int`, *optional*, defaults to `0`):
            Most tokens that evaluation writes per answer.

    Returns:
        [`Plan`]: the settings.
    """
    four = "nf4, double" if model_args.use_bnb_nested_quant else "nf4"
    return Plan(
        batch_size=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        eval_batch_size=args.per_device_eval_batch_size,
        checkpointing=args.gradient_checkpointing,
        dtype=size.dtype,
        quantisation=four if model_args.load_in_4bit else "int8" if model_args.load_in_8bit else None,
        autocast=mixed_precision(args),
        optimizer=str(getattr(args.optim, "value", args.optim)),
        launch=launch,
        cpu=args.use_cpu or not torch.accelerator.is_available(),
        longest=longest,
        answer=answer,
        new_tokens=new_tokens,
    )


def padded_length(lengths: Sequence[int], batch_size: int, grouped: bool, seed: int = 0) -> float:
    """
    Say how many tokens a row takes in its batch, padding among them.

    Args:
        lengths (`Sequence[int]`):
            Tokens of some rows.
        batch_size (`int`):
            Rows per batch.
        grouped (`bool`):
            Whether rows of like length share a batch.
        seed (`int`, *optional*, defaults to `0`):
            Decides the batches.

    Returns:
        `float`: tokens per row.
    """
    order = np.sort(lengths) if grouped else np.random.default_rng(seed).permutation(lengths)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return sum(int(batch.max()) * len(batch) for batch in batches) / len(order)
