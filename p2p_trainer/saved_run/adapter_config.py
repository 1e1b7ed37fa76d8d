"""Configuration of a LoRA adapter, out of a file that may hold anything."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig


# What a LoRA adapter is.
_LORA = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "target_parameters", "modules_to_save", "rank_pattern",
    "alpha_pattern", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "bias", "lora_bias", "use_rslora",
    "use_dora", "trainable_token_indices", "ensure_weight_tying", "task_type",
)  # fmt: skip
# What does not change what it computes: some name modules to import, some say how weights once began, and some mean
# something only beside others, which are refused.
_LEFT_OUT = frozenset(
    ("auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "lora_dropout", "megatron_config",
     "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config")
)  # fmt: skip
_BEGINNINGS = ("gaussian", "eva", "orthogonal")
# They take from the base what the adapter begins with, and find the same again: exact decompositions of its weights.
_TAKEN_FROM_THE_BASE = ("pissa", "olora")

_REMEDY = "Merge it into its base (`merge_and_unload`), and save the whole model."


def adapter_config(settings: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], path: Path) -> LoraConfig:
    """
    Build an adapter's configuration from what weights depend on, and from nothing else.

    Args:
        settings (`Mapping[str, Any]`):
            Content of its file.
        shapes (`Mapping[str, Sequence[int]]`):
            Shapes of its weights, by their names.
        path (`Path`):
            The file, for the messages.

    Returns:
        `LoraConfig`: the configuration.

    Raises:
        `ValueError`: it is no LoRA, one of a kind that is not loaded, or damaged.
    """
    if settings.get("peft_type") != "LORA":
        raise ValueError(
            f"{path} is of an adapter of type {str(settings.get('peft_type'))[:40]!r}; only LoRA is loaded. {_REMEDY}"
        )
    known = {key: settings[key] for key in _LORA if settings.get(key) is not None}
    known |= _beginning(settings.get("init_lora_weights", True), path)
    defaults = _defaults()
    for key in sorted(set(settings) - {*_LORA, *_LEFT_OUT, "init_lora_weights"}):
        # Of versions to come nothing is known but that what is empty, or off, means nothing.
        if settings[key] and settings[key] != defaults.get(key):
            raise ValueError(
                f"{path} sets `{key}` to {str(settings[key])[:80]!r}, which may change what the adapter computes, and "
                f"is not known here. {_REMEDY}"
            )
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        if isinstance(known.get(name), str):
            # A pattern, which may take for ever; the weights themselves say which modules it has found.
            known["target_modules"] = _modules(shapes, known.get("target_parameters"))
            for other in ("exclude_modules", "layers_pattern", "layers_to_transform"):
                known.pop(other, None)
    largest = max((side for shape in shapes.values() for side in shape), default=0)
    try:
        if max([known.get("r", 8), *known.get("rank_pattern", {}).values()]) > largest:
            # Memory would be taken before the weights are looked at.
            raise ValueError("a rank is larger than any weight.")
        for pattern in [*known.get("rank_pattern", {}), *known.get("alpha_pattern", {})]:
            if len(pattern) > 500 or len(re.findall(r"[*+{]", pattern)) > 3 or re.search(r"\)[*+{]", pattern):
                # Matched with the name of every module, it may take for ever.
                raise ValueError(f"the pattern {pattern[:80]!r} is no name of a module.")
        return LoraConfig(**known, inference_mode=True)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {first_line(error)} Save the model again.") from error


def _beginning(found: Any, path: Path) -> dict[str, str]:
    name = found.lower() if isinstance(found, str) else found
    if isinstance(name, bool) or name is None or name in _BEGINNINGS:
        return {}
    if name in _TAKEN_FROM_THE_BASE:
        return {"init_lora_weights": name}
    raise ValueError(
        f"{path} says that the adapter began with {str(found)[:80]!r} (`init_lora_weights`), which changed its base "
        f"in a way that can't be done again. {_REMEDY}"
    )


def _defaults() -> dict[str, Any]:
    return {
        field.name: field.default
        for field in dataclasses.fields(LoraConfig)
        if field.default is not dataclasses.MISSING
    }


def _modules(shapes: Mapping[str, Sequence[int]], parameters: Any) -> list[str]:
    """Return the modules that weights belong to, without those of which single parameters are adapted."""
    found = {match[1].removesuffix(".base_layer") for match in map(_module, shapes) if match}
    owners = [str(name).rpartition(".")[0] for name in parameters] if isinstance(parameters, list) else []
    return sorted(name for name in found if not any(f".{name}".endswith(f".{owner}") for owner in owners))


def _module(key: str) -> re.Match[str] | None:
    return re.match(r"base_model\.model\.(.{1,1000}?)\.lora_(?:embedding_)?A\b", key)


def first_line(error: Exception, length: int = 300) -> str:
    """Return how an error begins; those of loading are long, or list every weight."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = " ".join(line.strip() for line in lines[:3])[:length].rstrip()
    return text if text.endswith(".") else f"{text}."
