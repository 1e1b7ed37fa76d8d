"""Weights of a run: whole, or an adapter on its base; each must fit, and nothing else is read."""

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from .._files import read_object
from .adapter_config import adapter_config, first_line
from .folder import find_model
from .model_folder import check_model_folder


_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


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
        check_model_folder(folder, trained_here=True)
        try:
            model = _load_whole(kind, folder, options)
        except Exception as error:  # another architecture, a missing shard and a wrong shape end in the same remedy
            raise ValueError(
                f"The model in {str(folder)!r} can't be loaded: {first_line(error)} Save the model again."
            ) from error
    if quantization is None:
        model.to(device)
    return model.eval()


def _load_whole(kind: type, where: str | Path, options: dict[str, Any]) -> PreTrainedModel:
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
        raise ValueError(f"{weights} is damaged: {first_line(error)} Save the model again.") from error
    config = adapter_config(settings, shapes, folder / _ADAPTER_CONFIG)
    base = base_model or settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base.strip() or "\0" in base:
        raise ValueError(
            f"{folder / _ADAPTER_CONFIG} names no base model (found {str(base)[:80]!r}). Name it with `base_model` "
            f"(`--base_model MODEL`)."
        )
    revision = settings.get("revision") if base_model is None else None
    model = _load_base(kind, base, revision if isinstance(revision, str) else None, folder, options)
    misfit = f"The adapter in {str(folder)!r} does not fit the base model {base!r}"
    remedy = "Name the base model that it was trained on with `base_model` (`--base_model MODEL`)."
    try:
        grown = _resize(model, shapes)
        # Not with `low_cpu_mem_usage`, which rounds an adapter to the type of its base (peft 0.21).
        adapted = PeftModel(model, config)
        loaded = adapted.load_adapter(folder, "default")
    except Exception as error:  # another shape, a module that is not there
        raise ValueError(f"{misfit}: {first_line(error, 400)} {remedy}") from error
    # PEFT warns of those, and leaves weights at random; others it drops without a word.
    wrong = [f"missing: {key}" for key in sorted(loaded.missing_keys)]
    # Of embeddings that have grown and are trained whole, PEFT writes both this and the plain name.
    twice = {key for key in shapes if key.replace(".modules_to_save.", ".") in shapes.keys() - {key}}
    wrong += [f"without a place: {key}" for key in sorted(set(loaded.unexpected_keys) - twice)]
    if wrong:
        raise ValueError(f"{misfit}: {len(wrong)} of its weights are {'; '.join(wrong[:3])}. {remedy}")
    for name, weight in adapted.named_parameters():
        # As they were trained: beside quantised weights in bfloat16, where PEFT loads them in float32.
        key = name.replace(".default", "", 1)
        if key not in grown | twice and (trained := dtypes.get(key)) is not None:
            weight.data = weight.data.to(trained)
    return adapted


def _load_base(kind: type, base: str, revision: str | None, folder: Path, options: dict[str, Any]) -> PreTrainedModel:
    """Load the base model of the adapter in `folder`."""
    remedy = "Name the base model with `base_model` (`--base_model MODEL`)."
    whose = f"The base model {base!r} of the adapter in {str(folder)!r}"
    place: str | Path = base
    if os.path.isdir(base) or not options["trust_remote_code"]:
        try:
            place = find_model(base, revision)
        except ValueError as error:
            raise ValueError(f"{whose} {error}. {remedy}") from error
        if (place / _ADAPTER_CONFIG).is_file():
            raise ValueError(
                f"{whose} is an adapter itself. Merge that one into its own base, and name the result with "
                f"`base_model` (`--base_model MODEL`)."
            )
        check_model_folder(place, trained_here=False)
    else:
        # Its code is fetched file by file, as it is asked for.
        options = {**options, **({} if revision is None else {"revision": revision})}
    try:
        return _load_whole(kind, place, options)
    except Exception as error:  # another architecture, a missing shard and a wrong shape end in the same remedy
        raise ValueError(f"{whose} can't be loaded: {first_line(error)} {remedy}") from error


def _resize(model: PreTrainedModel, shapes: dict[str, list[int]]) -> set[str]:
    """Give the base as many rows for tokens as the adapter's file has; return the names of what is in it of them."""
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    names = [name for name, module in model.named_modules() if any(module is layer for layer in layers)]
    keys = [f"base_model.model.{name}{inner}.weight" for name in names for inner in ("", ".base_layer")]
    saved = {key for key in keys if key in shapes}
    rows, width = layers[0].weight.shape
    # Whole ones, that is: a file may claim any number of rows of no width.
    sizes = {shapes[key][0] for key in saved if len(shapes[key]) == 2 and shapes[key][1] == width}
    if len(sizes) != 1 or sizes == {rows}:
        return set()
    if len(saved) < len({layer.weight.data_ptr() for layer in layers}):
        raise ValueError("it has rows for new tokens in only one of input and output embeddings.")
    model.resize_token_embeddings(sizes.pop(), mean_resizing=False)
    return saved
