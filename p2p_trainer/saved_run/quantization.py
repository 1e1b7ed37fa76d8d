"""How bitsandbytes holds a run's base model."""

import re
from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig


_TYPES = ("float32", "bfloat16", "float16")

# What a run's file may say, and the values that mean something; what else it says is left out.
_SETTINGS: dict[str, tuple[Any, ...]] = {
    "load_in_4bit": (True, False),
    "load_in_8bit": (True, False),
    "bnb_4bit_quant_type": ("nf4", "fp4"),
    "bnb_4bit_use_double_quant": (True, False),
    "bnb_4bit_compute_dtype": _TYPES,
    "bnb_4bit_quant_storage": (*_TYPES, "uint8", "int8", "float64"),
    "llm_int8_has_fp16_weight": (True, False),
}
_SKIPPED = "llm_int8_skip_modules"


def choose_quantization(
    asked: str | BitsAndBytesConfig | None, recorded: Any, computed: torch.dtype | None, where: str
) -> BitsAndBytesConfig | None:
    """
    Settle how the base model is held.

    Args:
        asked (`str` or `BitsAndBytesConfig`, *optional*):
            `"4bit"`, `"8bit"`, `"none"`, or settings; by default as in training.
        recorded (`Any`):
            What the run's file says of its training: `None`, or settings.
        computed (`torch.dtype`, *optional*):
            Type of matrix products, where settings are ours to choose.
        where (`str`):
            The run's file, for the messages.

    Returns:
        `BitsAndBytesConfig` or `None`: settings, `None` if nothing is quantised.

    Raises:
        `ValueError`: it is unknown, the file's settings are damaged, or bitsandbytes is not installed.
    """
    trained = None if recorded is None else _read(recorded, where)
    if asked is None:
        settings = trained
    elif isinstance(asked, BitsAndBytesConfig):
        settings = asked
    elif asked == "none":
        settings = None
    elif asked in ("4bit", "8bit"):
        flag = f"load_in_{asked}"
        # The adapter has learnt on weights that were rounded so.
        same = trained is not None and getattr(trained, flag)
        settings = trained if same else BitsAndBytesConfig(**{flag: True}, **_own(asked, computed))
    else:
        raise ValueError(f"`quantization` is '4bit', '8bit', 'none' or a `BitsAndBytesConfig`, got {asked!r}.")
    if settings is not None and find_spec("bitsandbytes") is None:
        whose = "The run was trained on" if asked is None else "`quantization` asks for"
        raise ValueError(
            f"{whose} weights quantised by bitsandbytes, which is not installed. Install it "
            f"(`pip install 'p2p_trainer[quant]'`), or serve the unquantised weights with `quantization=\"none\"` "
            f"(`--quantization none`): answers then differ a little."
        )
    return settings


def _own(asked: str, computed: torch.dtype | None) -> dict[str, Any]:
    if asked == "8bit":
        return {}
    return {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": computed or torch.float32}


def _read(recorded: Any, where: str) -> BitsAndBytesConfig:
    found = recorded if isinstance(recorded, dict) else {}
    known = {key: value for key, value in found.items() if key in _SETTINGS or key in ("llm_int8_threshold", _SKIPPED)}
    wrong = {key: value for key, value in known.items() if not _is_setting(key, value)}
    if wrong or known.get("load_in_4bit", False) == known.get("load_in_8bit", False):
        raise ValueError(
            f"{where} is damaged: its `quantization` has {str(wrong or recorded)[:200]}, expected settings of "
            f"bitsandbytes, or null. Save the model again."
        )
    return BitsAndBytesConfig(**known)


def _is_setting(key: str, value: Any) -> bool:
    if key == _SKIPPED:
        # transformers takes them for patterns.
        names = value if isinstance(value, list) else [] if value is None else [None]
        return all(isinstance(name, str) and re.fullmatch(r"[\w.]{1,200}", name) for name in names)
    if key == "llm_int8_threshold":
        return isinstance(value, float) and 0 <= value < 1e6
    return any(type(value) is type(fit) and value == fit for fit in _SETTINGS[key])
