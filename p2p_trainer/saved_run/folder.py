"""Where a run is: a folder, or the hub."""

import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.utils import validate_repo_id

from ..prompt_format import CONFIG_NAME


# What a run is loaded from; no pickles, and no code.
_LOADED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_NOT_LOADED = ("checkpoint-*/*", "runs/*")
# Some publish a model once more, in the format of another library.
_NOT_OF_A_BASE = ("*/*", "consolidated*.safetensors")


def find_run(name_or_path: str | Path, revision: str | None = None) -> Path:
    """
    Find a saved run; one on the hub is fetched, without pickles and code, or taken from the cache.

    Args:
        name_or_path (`str` or `Path`):
            Folder, or hub id.
        revision (`str`, *optional*):
            Branch, tag or commit of a hub id.

    Returns:
        `Path`: local folder.

    Raises:
        `ValueError`: it is no folder, and no hub id or none that can be had.
    """
    name = os.path.expanduser(name_or_path)
    # Unlike `Path.is_dir`, it takes names that are too long for any file.
    if os.path.isdir(name):
        return Path(name)
    lacks = f"{name!r} holds no {CONFIG_NAME} (found: no folder)"
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError(f"{lacks}, and it can be no hub id. Give the output folder of a `P2PTrainer` run.") from error
    try:
        return _fetch(name, revision, _NOT_LOADED)
    except ValueError as error:
        raise ValueError(
            f"{lacks}, and it {error}. Give the output folder of a `P2PTrainer` run, or a hub id that is in the cache "
            f"or can be reached (`HF_HUB_OFFLINE`, `HF_TOKEN`)."
        ) from error


def find_model(name: str, revision: str | None = None) -> Path:
    """
    Find a whole model; one on the hub is fetched, without pickles and code, or taken from the cache.

    Args:
        name (`str`):
            Folder, or hub id.
        revision (`str`, *optional*):
            Branch, tag or commit of a hub id.

    Returns:
        `Path`: local folder.

    Raises:
        `ValueError`: it is no folder, and no hub id or none that can be had.
    """
    if os.path.isdir(name):
        return Path(name)
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError("is no local folder and can be no hub id") from error
    try:
        return _fetch(name, revision, _NOT_OF_A_BASE)
    except ValueError as error:
        raise ValueError(f"is no local folder and {error}") from error


def _fetch(name: str, revision: str | None, ignored: Sequence[str]) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*_LOADED], ignore_patterns=[*ignored]))
    except Exception as error:  # no network, no such repository, no access: all end in the same remedy
        first = (str(error).strip().splitlines() or ["no details"])[0][:200]
        raise ValueError(f"can't be had from the Hub ({type(error).__name__}: {first})") from error
