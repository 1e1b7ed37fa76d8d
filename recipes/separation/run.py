"""
Train the runs of the study, one after another.

    python -m recipes.separation.run --model MODEL --data DATA --out outputs/separation
        [--seeds 0 1 2] [--only NAME ...] [--scpn FOLDER] [--dry_run]

Runs that are finished already are skipped, so that it can be stopped and started again.
"""

import argparse
import fnmatch
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from p2p_trainer.results import RESULTS_NAME
from recipes.separation.settings import PLAIN, SETTINGS, folder_name


REPOSITORY = Path(__file__).resolve().parents[2]
TAIL_LINES = 30


def command(name: str, kind: str, seed: int, model: str, data: str, out: Path, scpn: Path | None = None) -> list[str]:
    """
    Build the command of one run; it is meant for the repository's root.

    Args:
        name (`str`):
            Setting.
        kind (`str`):
            `"none"` or `"p2p"`.
        seed (`int`):
            Seed of training and attack.
        model (`str`):
            Base model.
        data (`str`):
            SST-2.
        out (`Path`):
            Folder of all runs.
        scpn (`Path`, *optional*):
            Folder with the SCPN paraphrases of SST-2, for SynAttack.

    Returns:
        `list[str]`: the command.
    """
    setting = SETTINGS[name]
    flags = {"--attack": setting.attack, "--p2p_enabled": "true" if kind == "p2p" else "false", **setting.training}
    if kind == "p2p":
        flags |= {**PLAIN, **setting.defense}
    options = []
    if setting.attack == "synattack":
        files = [
            {"source": f"{data}/train.jsonl", "paraphrase": f"{scpn}/train.jsonl"},
            {"source": f"{data}/test.jsonl", "paraphrase": f"{scpn}/test.jsonl", "labels": [0]},
        ]
        options = ["--attack_options", json.dumps({"engine": "precomputed", "engine_options": {"files": files}})]
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--quiet", "--config_file", "accelerate_configs/cpu.yaml"),
        *("recipes/sst2_qwen.py", "--config", "recipes/sst2_small.yaml"),
        *("--model_name_or_path", model, "--dataset_name", data),
        *("--seed", str(seed), "--poison_seed", str(seed)),
        *(part for flag, value in flags.items() for part in (flag, *value.split())),
        *options,
        *("--output_dir", str(out / folder_name(name, kind, seed))),
    ]


def planned(only: Sequence[str], seeds: Sequence[int] | None) -> Iterator[tuple[str, str, int]]:
    """
    List runs.

    Args:
        only (`Sequence[str]`):
            Settings, `*` standing for anything; none means all.
        seeds (`Sequence[int]` or `None`):
            Seeds; `None` takes those of each setting.

    Returns:
        `Iterator[tuple[str, str, int]]`: setting, kind and seed.

    Raises:
        `ValueError`: there is no such setting.
    """
    for pattern in only:
        if not fnmatch.filter(SETTINGS, pattern):
            raise ValueError(f"There is no setting {pattern!r}. Known: {', '.join(SETTINGS)}.")
    for name, setting in SETTINGS.items():
        if not only or any(fnmatch.fnmatchcase(name, pattern) for pattern in only):
            for seed in setting.seeds if seeds is None else seeds:
                for kind in setting.kinds:
                    yield name, kind, seed


def local(place: str) -> str:
    """Make a local path absolute: the runs start elsewhere. A hub id stays as it is."""
    return str(Path(place).resolve()) if Path(place).exists() else place


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(prog="python -m recipes.separation.run", description=__doc__.split("\n")[1])
    parser.add_argument("--model", required=True, help="Base model: hub id or folder.")
    parser.add_argument("--data", required=True, help="SST-2: hub id or folder.")
    parser.add_argument("--out", type=Path, default=Path("outputs/separation"), help="Folder of all runs.")
    parser.add_argument("--seeds", type=int, nargs="+", help="By default 0 1 2, for the shares of S 0.")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="Settings; * stands for anything.")
    parser.add_argument("--scpn", type=Path, help="Folder with the SCPN paraphrases of SST-2, for SynAttack.")
    parser.add_argument("--dry_run", action="store_true", help="Show the commands and run nothing.")
    arguments = parser.parse_args(argv)
    try:
        plan = list(planned(arguments.only, arguments.seeds))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    out, scpn = arguments.out.resolve(), arguments.scpn and arguments.scpn.resolve()
    console = Console(highlight=False, markup=False, soft_wrap=True)
    # A strategy that is named by its import path is found from the root.
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    if arguments.dry_run:
        console.print(f"# in {REPOSITORY}, with PYTHONPATH=.")
    for number, (name, kind, seed) in enumerate(plan, 1):
        label = f"{number}/{len(plan)} {folder_name(name, kind, seed)}"
        if SETTINGS[name].attack == "synattack" and scpn is None:
            console.print(f"# {label}: skipped, SynAttack needs --scpn")
            continue
        if (out / folder_name(name, kind, seed) / RESULTS_NAME).is_file():
            console.print(f"# {label}: finished already")
            continue
        parts = command(name, kind, seed, local(arguments.model), local(arguments.data), out, scpn)
        if arguments.dry_run:
            console.print(shlex.join(parts))
            continue
        console.print(f"# {label}")
        done = subprocess.run(
            parts, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": path}, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if done.returncode != 0:
            tail = "\n".join(done.stdout.splitlines()[-TAIL_LINES:])
            raise SystemExit(f"{tail}\nerror: {label} failed with {done.returncode}: {shlex.join(parts)}")


if __name__ == "__main__":
    main()
