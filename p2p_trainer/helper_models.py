"""Models beside the one that is trained: language models that score, judge or rewrite texts."""

from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def missing_model(kind: str, name: str, error: Exception, remedy: str) -> ValueError:
    """
    Build the error for a model that can't be had.

    Args:
        kind (`str`):
            What it is for.
        name (`str`):
            Its folder or hub id.
        error (`Exception`):
            What loading it raised.
        remedy (`str`):
            What to do.

    Returns:
        `ValueError`: the error.
    """
    path = Path(name).expanduser().resolve()
    problem = (
        "can't be loaded" if path.is_dir() else f"is no local folder (looked at {path}) and can't be had from the "
        "Hugging Face Hub"
    )  # fmt: skip
    reason = (str(error).strip().splitlines() or ["no details"])[0][:200]
    return ValueError(f"The {kind} {name!r} {problem} ({type(error).__name__}: {reason}). {remedy}")


def check_causal_model(kind: str, name: str, remedy: str) -> "PreTrainedTokenizerBase":
    """
    Look whether a causal language model is there, without reading its weights.

    Args:
        kind (`str`):
            What it is for, for the messages.
        name (`str`):
            Its folder or hub id.
        remedy (`str`):
            What to do if it is not there.

    Returns:
        `PreTrainedTokenizerBase`: its tokenizer.

    Raises:
        `ValueError`: configuration or tokenizer can't be loaded, it is no causal language model, or a local folder has
            no weights as safetensors.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # a missing folder, a refused connection and a missing file end in the same remedy
        raise missing_model(kind, name, error, remedy) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"The {kind} {name!r} is of type {config.model_type!r}, which has no causal language model. {remedy}"
        )
    folder = Path(name).expanduser()
    if folder.is_dir() and not any(next(folder.glob(f"*.safetensors{end}"), None) for end in ("", ".index.json")):
        error = FileNotFoundError("no *.safetensors and no *.safetensors.index.json in the folder")
        raise missing_model(kind, name, error, remedy)
    return tokenizer


def load_causal_model(
    kind: str, name: str, remedy: str, exact: bool = False
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """
    Load a causal language model; only safetensors are read, and no code of the model's runs.

    Args:
        kind (`str`):
            What it is for, for the messages.
        name (`str`):
            Its folder or hub id.
        remedy (`str`):
            What to do if it is not there.
        exact (`bool`, *optional*, defaults to `False`):
            Whether it runs in float32 on an accelerator as well, as it does on a CPU.

    Returns:
        `tuple[PreTrainedModel, PreTrainedTokenizerBase]`: the model, in evaluation mode on the accelerator if there is
        one, and its tokenizer.

    Raises:
        `ValueError`: it can't be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        dtype = "auto" if accelerator and not exact else torch.float32
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True)
    except Exception as error:  # as in `check_causal_model`
        raise missing_model(kind, name, error, remedy) from error
    return model.to(accelerator or "cpu").eval(), tokenizer
