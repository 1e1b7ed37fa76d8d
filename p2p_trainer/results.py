"""`results.json`: what a run was, and what it measured."""

import importlib.metadata
import json
import math
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ._files import write_json


RESULTS_NAME = "results.json"
RESULTS_SCHEMA_VERSION = 3

_PACKAGES = ("p2p_trainer", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "scikit-learn")


@dataclass
class RunResults:
    """
    Content of `results.json`.

    Parameters:
        task (`str`):
            Name of the task.
        model (`str`):
            Base model.
        attack (`dict[str, Any]` or `None`):
            Attack with its settings.
        defense (`str`):
            Name of the defense; without one, `"p2p_auto"`, `"p2p"` (as published: nothing about it is `auto`) or
            `"none"`, as the settings say.
        seed (`int`):
            Seed of the training run.
        protocol (`dict[str, Any]`):
            The switches that decide every number of this field.
        metrics (`dict[str, float]`):
            Flat name -> number, on the test rows.
        counts (`dict[str, int]`):
            Rows read, poisoned, reserved, cut, counted.
        epochs (`list[dict[str, float]]`):
            The same rates per epoch, on the validation rows.
        suspected_triggers (`list[str]`):
            What was suspected about the training rows.
        defense_options (`dict[str, Any]`):
            Options of the defense, if one was named.
        defense_report (`dict[str, Any]`):
            What the defense found out or chose: thresholds, keywords, rows removed.
        confidence (`dict[str, Any]`):
            Histograms of the model's confidence in the target.
        compute (`dict[str, float]`):
            What was spent: `rows_given`, `train_row_passes` (rows that went through training steps, once per time)
            beside `plain_row_passes` (the same for plain training), `train_s`, `search_s` (P2P's search for
            triggers), `preparation_passes` (texts that a model read before serving, outside training steps) and
            `preparation_s`, `serving_passes_per_text` (see [`~defenses.Compute`]) and `serving_ms_per_text`.
        response_matrix (`dict[str, dict[str, int]]`):
            Of generated answers: trigger -> behaviour -> how many.
        timing (`dict[str, float]`):
            Seconds.
        versions (`dict[str, str]`):
            Python and packages.
        schema_version (`int`):
            Version of this layout.
    """

    task: str
    model: str
    attack: dict[str, Any] | None
    defense: str
    seed: int
    protocol: dict[str, Any]
    metrics: dict[str, float]
    counts: dict[str, int]
    epochs: list[dict[str, float]] = field(default_factory=list)
    suspected_triggers: list[str] = field(default_factory=list)
    defense_options: dict[str, Any] = field(default_factory=dict)
    defense_report: dict[str, Any] = field(default_factory=dict)
    confidence: dict[str, Any] = field(default_factory=dict)
    compute: dict[str, float] = field(default_factory=dict)
    response_matrix: dict[str, dict[str, int]] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: installed_versions())
    schema_version: int = RESULTS_SCHEMA_VERSION

    def save(self, folder: str | Path) -> Path:
        """
        Write `results.json`, whole or not at all.

        Args:
            folder (`str` or `Path`):
                Folder of the run.

        Returns:
            `Path`: the file.
        """
        return write_json(Path(folder) / RESULTS_NAME, without_nan(asdict(self)))

    @classmethod
    def load(cls, folder: str | Path) -> "RunResults":
        """
        Read `results.json`.

        Args:
            folder (`str` or `Path`):
                Folder of the run.

        Returns:
            [`RunResults`]: its content.
        """
        path = Path(folder) / RESULTS_NAME
        if not path.is_file():
            raise ValueError(f"{str(folder)!r} holds no {RESULTS_NAME}. Give the output folder of a finished run.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content["schema_version"]
            if version > RESULTS_SCHEMA_VERSION:
                raise ValueError(
                    f"{path} has schema version {version}, this p2p_trainer reads up to {RESULTS_SCHEMA_VERSION}. "
                    f"Upgrade p2p_trainer."
                )
            return cls(**content)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged: {error!r}.") from error


def check_recordable(what: str, settings: dict[str, Any]) -> None:
    """
    Refuse settings that could not be written into `results.json`, before hours of training.

    Args:
        what (`str`):
            Whose they are, for the message.
        settings (`dict[str, Any]`):
            The settings.

    Raises:
        `ValueError`: they are no JSON values.
    """
    try:
        json.dumps(settings)
    except TypeError as error:
        raise ValueError(
            f"The settings of {what} are no JSON values ({error}). Keep what is no setting in attributes that start "
            f"with an underscore."
        ) from error


def installed_versions() -> dict[str, str]:
    """
    Say what is installed.

    Returns:
        `dict[str, str]`: Python and package versions.
    """
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def without_nan(value: Any) -> Any:
    """
    Make a value fit for JSON, which has no NaN: a rate out of no rows is null.

    Args:
        value (`Any`):
            Dictionaries, lists and numbers.

    Returns:
        `Any`: the same with `None` for every NaN and infinity.
    """
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    if isinstance(value, np.generic):
        return without_nan(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value
