"""The output folder of a run: whose it is, and where to go on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig

from .config import P2PConfig, P2PScriptArguments
from .prompt_format import CONFIG_NAME
from .results import RESULTS_NAME


RUN_NAME = "run.json"

# Settings that may change between the parts of one run: they alter where and how it runs, not what it computes.
_NOT_PART_OF_A_RUN = frozenset({"output_dir", "resume_from_checkpoint", "disable_tqdm", "report_to", "run_name"})


def all_settings(script_args: P2PScriptArguments, args: P2PConfig, model_args: ModelConfig) -> dict[str, Any]:
    """
    Return everything that was set.

    Args:
        script_args ([`P2PScriptArguments`]):
            Data and attack.
        args ([`P2PConfig`]):
            Training and defense.
        model_args (`ModelConfig`):
            Model and adapter.

    Returns:
        `dict[str, Any]`: JSON values, sorted by name.
    """
    merged = {**dataclasses.asdict(script_args), **args.to_dict(), **dataclasses.asdict(model_args)}
    return json.loads(json.dumps(dict(sorted(merged.items())), default=str))


def claim(args: P2PConfig, settings: dict[str, Any]) -> str | None:
    """
    Refuse an output folder that holds another run.

    Args:
        args ([`P2PConfig`]):
            Configuration; `output_dir` and `resume_from_checkpoint` matter here.
        settings (`dict[str, Any]`):
            What [`all_settings`] returns for the run that is about to start.

    Returns:
        `str` or `None`: checkpoint to go on from.

    Raises:
        `ValueError`: the folder holds a run and resuming was not asked for, is not possible, or has other settings.
    """
    folder = Path(args.output_dir)
    resume = args.resume_from_checkpoint
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    checkpoint = last if str(resume).lower() in ("true", "auto", "last") else resume
    used = [path for path in (last, folder / RESULTS_NAME, folder / CONFIG_NAME) if path and Path(path).exists()]
    if args.process_index != 0 or not used:
        return checkpoint or None
    if not resume:
        raise ValueError(
            f"The output folder {str(folder)!r} holds another run (found {Path(used[0]).name}). Give another "
            f"`--output_dir`, go on with `--resume_from_checkpoint auto`, or delete the folder."
        )
    if not checkpoint:
        raise ValueError(
            f"The run in {str(folder)!r} is finished and kept no checkpoint: there is nothing to resume. Give another "
            f"`--output_dir`, or delete the folder."
        )
    if not (folder / RUN_NAME).is_file():
        raise ValueError(f"The run in {str(folder)!r} left no {RUN_NAME}, so its settings are unknown. Start anew.")
    before = json.loads((folder / RUN_NAME).read_text(encoding="utf-8"))
    changed = sorted(key for key in {*before, *settings} - _NOT_PART_OF_A_RUN if before.get(key) != settings.get(key))
    if changed:
        shown = ", ".join(f"{key}: {before.get(key)!r} -> {settings.get(key)!r}" for key in changed[:5])
        raise ValueError(
            f"The output folder {str(folder)!r} holds a run with other settings ({shown}). Resume with the same "
            f"settings, or give another `--output_dir`."
        )
    return checkpoint or None
