"""Weights of a run: whole, or an adapter on its base; each must fit, and nothing else is read."""

import os
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from .folder import check_model_config, read_object


_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

# What a LoRA adapter is; other entries name modules to import, other models, or how weights once began.
_LORA = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "target_parameters", "modules_to_save", "rank_pattern",
    "alpha_pattern", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "bias", "lora_bias", "use_rslora",
    "use_dora", "trainable_token_indices", "ensure_weight_tying", "task_type",
)  # fmt: skip


def load_weights(
    folder: Path,
    images: bool,
    device: torch.device,
    dtype: torch.dtype,
    quantization: BitsAndBytesConfig | None = None,
    base_model: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel | PeftModel:
    """
    Load what a run's folder holds.

    Args:
        folder (`Path`):
            The folder.
        images (`bool`):
            Whether it is a vision-language model.
        device (`torch.device`):
            Where to.
        dtype (`torch.dtype`):
            Type of the weights.
        quantization (`BitsAndBytesConfig`, *optional*):
            How the weights of the base are held.
        base_model (`str`, *optional*):
            Base model of an adapter, if not where the adapter says.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether models may bring code.

    Returns:
        `PreTrainedModel` or `PeftModel`: the model, in evaluation mode.

    Raises:
        `ValueError`: weights are missing, no safetensors, or do not fit.
    """
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if quantization is not None:
        # Such weights are made where they stay.
        options |= {"quantization_config": quantization, "device_map": {"": device}}
    kind = AutoModelForImageTextToText if images else AutoModelForCausalLM
    if (folder / _ADAPTER_CONFIG).is_file():
        model = _load_adapter(kind, folder, base_model, options)
    else:
        if not list(folder.glob("*.safetensors")):
            raise ValueError(
                f"{str(folder)!r} holds neither an adapter ({_ADAPTER_CONFIG}) nor model weights (*.safetensors). "
                f"Give the output folder of a `P2PTrainer` run."
            )
        try:
            model = _load_whole(kind, folder, options)
        except Exception as error:  # another architecture, a missing shard and a wrong shape end in the same remedy
            raise ValueError(
                f"The model in {str(folder)!r} can't be loaded: {_first_line(error)} Save the model again."
            ) from error
    if quantization is None:
        model.to(device)
    return model.eval()


def _load_whole(kind: type, where: str | Path, options: dict[str, Any]) -> PreTrainedModel:
    if os.path.isdir(where):
        check_model_config(Path(where))
    model, found = kind.from_pretrained(where, use_safetensors=True, output_loading_info=True, **options)
    # transformers fills them with random numbers and goes on.
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{len(missing)} weights are missing, such as {missing[0]!r}.")
    return model


def _load_adapter(kind: type, folder: Path, base_model: str | None, options: dict[str, Any]) -> PeftModel:
    weights = folder / _ADAPTER_WEIGHTS
    if not weights.is_file():
        raise ValueError(
            f"{str(folder)!r} holds no {_ADAPTER_WEIGHTS}. Other weight files are not read, since loading them can "
            f"run code. Save the model again."
        )
    settings = read_object(folder / _ADAPTER_CONFIG)
    try:
        with safe_open(weights, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - it is no dictionary
            shapes = {key: part.get_shape() for key, part in slices.items()}
            dtypes = {key: _DTYPES.get(part.get_dtype()) for key, part in slices.items()}
    except Exception as error:  # safetensors has no error of its own that is public
        raise ValueError(f"{weights} is damaged: {_first_line(error)} Save the model again.") from error
    config = _adapter_config(settings, shapes, folder / _ADAPTER_CONFIG)
    base = base_model or settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base.strip() or "\0" in base:
        raise ValueError(
            f"{folder / _ADAPTER_CONFIG} names no base model (found {str(base)[:80]!r}). Name it with `base_model` "
            f"(`--base_model MODEL`)."
        )
    if os.path.isfile(os.path.join(base, _ADAPTER_CONFIG)):
        raise ValueError(
            f"The base model {base!r} of the adapter in {str(folder)!r} is an adapter itself. Merge that one into its "
            f"own base, and name the result with `base_model` (`--base_model MODEL`)."
        )
    revision = settings.get("revision") if base_model is None else None
    if isinstance(revision, str):
        options = {**options, "revision": revision}
    try:
        model = _load_whole(kind, base, options)
    except Exception as error:  # a missing folder, a refused connection and a missing file end in the same remedy
        problem = "can't be loaded" if os.path.isdir(base) else "is no local folder and can't be had from the Hub"
        raise ValueError(
            f"The base model {base!r} of the adapter in {str(folder)!r} {problem}: {_first_line(error)} Name the base "
            f"model with `base_model` (`--base_model MODEL`)."
        ) from error
    misfit = f"The adapter in {str(folder)!r} does not fit the base model {base!r}"
    remedy = "Name the base model that it was trained on with `base_model` (`--base_model MODEL`)."
    try:
        # Not with `low_cpu_mem_usage`, which rounds an adapter to the type of its base (peft 0.21).
        adapted = PeftModel(model, config)
        loaded = adapted.load_adapter(folder, "default")
    except Exception as error:  # another shape, a module that is not there
        raise ValueError(f"{misfit}: {_first_line(error, 400)} {remedy}") from error
    # PEFT warns of those, and leaves weights at random; others it drops without a word.
    wrong = [f"missing: {key}" for key in sorted(loaded.missing_keys)]
    wrong += [f"without a place: {key}" for key in sorted(loaded.unexpected_keys)]
    if wrong:
        raise ValueError(f"{misfit}: {len(wrong)} of its weights are {'; '.join(wrong[:3])}. {remedy}")
    for name, weight in adapted.named_parameters():
        # As they were trained: beside quantised weights in bfloat16, where PEFT loads them in float32.
        if (trained := dtypes.get(name.replace(".default", "", 1))) is not None:
            weight.data = weight.data.to(trained)
    return adapted


def _adapter_config(settings: dict[str, Any], shapes: dict[str, list[int]], path: Path) -> LoraConfig:
    """Build the adapter's configuration from what weights depend on, and from nothing else."""
    if settings.get("peft_type") != "LORA":
        raise ValueError(
            f"{path} is of an adapter of type {str(settings.get('peft_type'))[:40]!r}; only LoRA is loaded. Merge it "
            f"into its base (`merge_and_unload`), and save the whole model."
        )
    known = {key: settings[key] for key in _LORA if settings.get(key) is not None}
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        if isinstance(known.get(name), str):
            # A pattern, which may take for ever; the weights themselves say which modules it has found.
            known["target_modules"] = sorted({found[1] for found in map(_module, shapes) if found})
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
        raise ValueError(f"{path} is damaged: {_first_line(error)} Save the model again.") from error


def _module(key: str) -> re.Match[str] | None:
    return re.match(r"base_model\.model\.(.{1,1000}?)\.lora_(?:embedding_)?A\b", key)


def _first_line(error: Exception, length: int = 300) -> str:
    """Return how an error begins; those of loading are long, or list every weight."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = " ".join(line.strip() for line in lines[:3])[:length].rstrip()
    return text if text.endswith(".") else f"{text}."
