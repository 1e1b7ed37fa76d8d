"""The folder that an export goes to: whole or absent, and never somebody else's."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


# What an export is known by.
RECORD_NAME = "p2p_export.json"
RECORD_SCHEMA_VERSION = 1


def check_free(folder: Path, run: Path, overwrite: bool) -> None:
    """
    Refuse an output folder that holds something else than an earlier export.

    Args:
        folder (`Path`):
            Where an export is to be written.
        run (`Path`):
            The run that is exported.
        overwrite (`bool`):
            Whether an export that is there may be replaced.

    Raises:
        `ValueError`: it is the run's folder or belongs to it, or it is not empty, or it is a file.
    """
    if folder == run or run in folder.parents or folder in run.parents:
        raise ValueError(
            f"{str(folder)!r} is the folder of the run, or one of them lies in the other: the run stays as it is. "
            f"Give another `--out`."
        )
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return
    if not _is_export(folder):
        raise ValueError(
            f"{str(folder)!r} is not empty and holds no {RECORD_NAME}, so it is no export of ours: it stays as it is. "
            f"Give another `--out`."
        )
    if not overwrite:
        raise ValueError(f"{str(folder)!r} holds an export. Give another `--out`, or replace it: `--overwrite`.")


def _is_export(folder: Path) -> bool:
    path = folder / RECORD_NAME
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8"))["formats"], list)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


@contextlib.contextmanager
def written_aside(folder: Path, run: Path, overwrite: bool) -> Iterator[Path]:
    """
    Write a folder beside its place, and put it there when all of it is written.

    Args:
        folder (`Path`):
            The folder.
        run (`Path`):
            The run that is exported.
        overwrite (`bool`):
            Whether an export that is there is replaced.

    Yields:
        `Path`: empty folder to write to.

    Raises:
        `ValueError`: the folder holds something else.
    """
    check_free(folder, run, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    new, old = aside / "new", aside / "old"
    try:
        new.mkdir()
        yield new
        # A large model takes minutes to write: somebody else may have used them.
        check_free(folder, run, overwrite)
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
