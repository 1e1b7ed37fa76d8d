"""`p2p-trainer poison`: writes a poisoned data set."""

import json
import shlex
from pathlib import Path
from typing import Any

from datasets import Dataset

from .attacks import Attack
from .attacks.poisoned_files import check_free, with_keys, write_set
from .results import installed_versions
from .tasks import get_task
from .tasks.columns import column_as_numpy


def run(
    task: str, source: str, attack: Attack, out: str, seed: int = 0, drop_empty: bool = False, overwrite: bool = False
) -> str:
    """
    Poison the training rows of some data, put the trigger into its other rows, and write both.

    Args:
        task (`str`):
            Task name or YAML file.
        source (`str`):
            Local folder, file (training rows alone) or hub id.
        attack ([`~attacks.Attack`]):
            The attack.
        out (`str`):
            Folder to write.
        seed (`int`, *optional*, defaults to `0`):
            Decides which rows are poisoned, and where. Test triggers are those of the evaluator, whatever the seed.
        drop_empty (`bool`, *optional*, defaults to `False`):
            Whether rows with an empty text are left out rather than an error.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether a poisoned set that is there is replaced.

    Returns:
        `str`: two lines: what was written, and the command that trains on it.

    Raises:
        `ValueError`: the folder holds something else, or data or attack are at fault.
    """
    task_name, task = task, get_task(task)
    folder = Path(out).expanduser().resolve()
    check_free(folder, overwrite)
    try:
        json.dumps(attack.config())
    except TypeError as error:
        raise ValueError(f"The settings of the attack {attack.name!r} are no JSON values ({error}).") from error
    # A file alone has no splits: all its rows are training rows.
    names = ("train",) if Path(source).expanduser().is_file() else ("train", "validation", "test")
    splits = {name: task.load(name, source, drop_empty=drop_empty) for name in names}
    train = splits.pop("train")
    if train is None:
        raise ValueError(f"{source!r} has no split 'train'. Give a folder that holds train.jsonl (or .csv, .parquet).")
    written = {"train": attack.poison(with_keys(train, task), task, seed)}
    for name, rows in splits.items():
        if rows is not None:
            written[name] = attack.dress(rows, task)
            # With the evaluator's seed, so that a run on these files measures what a run with the attack would.
            written[f"triggered_{name}"] = attack.trigger(written[name], task)
    record = {
        "task": task.name,
        "labels": list(task.labels),
        "seed": seed,
        # Only now does an attack that learns know where what it learnt lies.
        "attack": json.loads(json.dumps(attack.config())),
        "extended_target": attack.extended_target,
        "trigger_texts": list(attack.trigger_texts),
        "counts": _counts(written),
        "versions": installed_versions(),
    }
    write_set(folder, written, record, overwrite)
    return _summary(task_name, source, folder, record, drop_empty)


def _counts(written: dict[str, Dataset]) -> dict[str, int]:
    train = written["train"]
    return {
        "rows": len(train),
        "poisoned": int(column_as_numpy(train, "poisoned").sum()),
        "tried": int((column_as_numpy(train, "attack") != "").sum()),
        **{name: len(rows) for name, rows in written.items() if name.startswith("triggered_")},
    }


def _summary(task: str, source: str, folder: Path, record: dict[str, Any], drop_empty: bool) -> str:
    counts = record["counts"]
    made = "".join(f", {counts[key]} {key.replace('_', ' ')} rows" for key in counts if key.startswith("triggered_"))
    # Labels of the extended space are let through as part of the attack alone, not as somebody's data.
    data = source if record["extended_target"] else str(folder)
    command = [
        "p2p-trainer", "train", "--config", "RECIPE.yaml", "--task", task, "--dataset_name", data, "--attack",
        "poisoned_set", "--attack_target", str(record["attack"]["target"]), "--attack_options",
        json.dumps({"folder": str(folder)}),
    ]  # fmt: skip
    if drop_empty and data == source:
        command += ["--drop_empty_rows", "true"]
    return (
        f"{folder}: {counts['poisoned']} of {counts['rows']} training rows poisoned{made}.\n"
        f"Train on it: {shlex.join(command)}\n"
    )
