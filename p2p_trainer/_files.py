"""Files that are whole or absent: written aside, then renamed."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """
    Write a JSON file so that a kill leaves either the old or the new one.

    Args:
        path (`Path`):
            The file; its folder is created.
        content (`Mapping[str, Any]`):
            JSON values.

    Returns:
        `Path`: the file.
    """
    return write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> Path:
    """
    Write a text file so that a kill leaves either the old or the new one.

    Args:
        path (`Path`):
            The file; its folder is created.
        text (`str`):
            Its content.

    Returns:
        `Path`: the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    return path


def share_weights(folder: str | Path) -> None:
    """
    Let others read weights as they may read the files beside them: safetensors writes them for their owner alone.

    Args:
        folder (`str` or `Path`):
            Folder with weights.
    """
    for weights in Path(folder).glob("*.safetensors"):
        weights.chmod(0o644)
