"""What a run's `p2p_config.json` says, checked: everything that reads a run to serve it reads it here."""

from pathlib import Path
from typing import Any

import torch

from ..prompt_format import CONFIG_NAME, PromptFormat, read_p2p_config


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_run(folder: Path) -> tuple[dict[str, Any], PromptFormat, tuple[str, ...]]:
    """
    Read what a run was trained with.

    Args:
        folder (`Path`):
            The run.

    Returns:
        `tuple[dict[str, Any], PromptFormat, tuple[str, ...]]`: the content of its `p2p_config.json`, its format, and
        its class names; none on a generation task.

    Raises:
        `ValueError`: this is no run, one that this version can't read, or one whose file was damaged or changed.
    """
    where = str(folder / CONFIG_NAME)
    config = read_p2p_config(folder)
    prompt_format = PromptFormat.from_dict(config, where)
    if missing := {"labels", "keyed", "autocast", "dtype"} - set(config):
        raise ValueError(f"{where} lacks {sorted(missing)}. Save the model again.")
    labels = config["labels"]
    fit = {
        "labels": isinstance(labels, list) and all(isinstance(label, str) for label in labels),
        "keyed": isinstance(config["keyed"], bool),
        "autocast": config["autocast"] in (None, "bfloat16", "float16"),
        "dtype": config["dtype"] in list(DTYPES),
        # Runs of earlier versions had no images.
        "images": isinstance(config.get("images", False), bool),
    }
    for key in (key for key, fits in fit.items() if not fits):
        raise ValueError(f"{where} is damaged: `{key}` is {str(config[key])[:80]!r}. Save the model again.")
    space = prompt_format.label_space
    if len(labels) != (0 if space is None else space.num_labels):
        raise ValueError(
            f"{where} is damaged: it has the classes {str(labels)[:200]} and the label words {str(space)[:200]}. Save "
            f"the model again."
        )
    prompt_format.check_digest(config, where)
    return config, prompt_format, tuple(labels)
