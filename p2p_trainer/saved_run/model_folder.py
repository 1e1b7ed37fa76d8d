"""What a folder with a whole model may say, before anything of it is loaded."""

import re
from pathlib import Path
from typing import Any

from .._files import read_object


# Names of a model's weight files; those of an index are taken as they stand.
_WEIGHTS = re.compile(r"[^/\\]+\.safetensors")
_NAMED = re.compile(r"[^/\\]+\.safetensors(\.index\.json)?")

# A model of a million weights has an index of that size.
_LARGEST_INDEX = 2**27

_BITSANDBYTES = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")


def check_model_folder(folder: Path, trained_here: bool) -> None:
    """
    Refuse a whole model that asks for code or pickles, or whose weights are others than training left or had.

    Args:
        folder (`Path`):
            Folder of the model.
        trained_here (`bool`):
            Whether it is a run's own model, and no base.

    Raises:
        `ValueError`: it asks for kernels (compiled code, fetched from the Hub), names weights that are no safetensors
            or lie elsewhere, or is quantised in a way in which no run is trained.
    """
    path = folder / "config.json"
    if path.is_file():
        _check_config(path, trained_here)
    for index in folder.glob("*.safetensors.index.json"):
        named = read_object(index, _LARGEST_INDEX).get("weight_map")
        names = named.values() if isinstance(named, dict) else [named]
        if wrong := [name for name in names if not _is(name, _WEIGHTS)]:
            raise ValueError(
                f"{index} names the weight file {str(wrong[0])[:80]!r}; only *.safetensors beside it are read. Save "
                f"the model again."
            )


def _check_config(path: Path, trained_here: bool) -> None:
    waiting = [read_object(path)]
    while waiting:
        for key, value in waiting.pop().items():
            if key == "quantization_config" and value is not None:
                _check_quantization(path, value, trained_here)
            elif isinstance(value, dict):
                waiting.append(value)
            if re.fullmatch(r"_?(attn|experts)_implementation(_internal)?", key) and "/" in str(value):
                raise ValueError(
                    f"{path} asks for the kernel {value!r} (`{key}`), which is code from the Hub. Remove that entry."
                )
            if key == "transformers_weights" and not _is(value, _NAMED):
                raise ValueError(
                    f"{path} names the weight file {str(value)[:80]!r} (`{key}`); only *.safetensors beside it are "
                    f"read. Save the model again."
                )


def _check_quantization(path: Path, settings: Any, trained_here: bool) -> None:
    known = settings if isinstance(settings, dict) else {}
    loads = known.get("load_in_4bit") is True or known.get("load_in_8bit") is True
    method = known.get("quant_method", "bitsandbytes" if loads else None)
    if trained_here:
        raise ValueError(
            f"{path} says that the weights are quantised (`quantization_config` of {str(method)[:40]!r}), and runs "
            f"save whole models as they were trained: unquantised. Remove that entry if it was added to the file."
        )
    if method not in _BITSANDBYTES:
        raise ValueError(
            f"{path} says that the base is quantised by {str(method)[:40]!r} (`quantization_config`), of which only "
            f"bitsandbytes is known to load as an adapter was trained on it. Use the unquantised model as base."
        )


def _is(name: Any, pattern: re.Pattern[str]) -> bool:
    return isinstance(name, str) and pattern.fullmatch(name) is not None
