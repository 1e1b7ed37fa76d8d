"""
`make demo`: poison made-up reviews, fine-tune a tiny model without a defense, with P2P as published, and with this
package's default, and show what came of it.

    python -m recipes.demo.run [--output_dir outputs/demo] [--any_setting_of_the_recipe VALUE]

Everything comes from the project's own code: the corpus, the base model, the attack. Corpus and base model are kept
between calls, the runs are not.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from p2p_trainer.report import plot_runs, results_table
from p2p_trainer.results import RunResults
from recipes.demo.base_model import build_base_model
from recipes.demo.corpus import build_corpus


HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]

# Name -> folder and flags. The last is what `p2p_` settings are without being named.
RUNS = {
    "no defense": ("undefended", ["--p2p_enabled", "false"]),
    "P2P as published": ("p2p_published", ["--p2p_reserve", "random", "--p2p_immunize", "none"]),
    "P2P (default)": ("p2p", []),
}

READING = """\
CA: clean accuracy. ASR: how often a triggered row gets the attacker's label. Floor: how often
the same rows get it without the trigger, by honest error; an ASR at the floor is a defended
model. Excess: ASR - floor, in points. ASR without key: the same weights when the benign trigger
is left out; P2P does not unlearn the backdoor."""


def train(name: str, folder: Path, extra: list[str]) -> RunResults:
    """Run the recipe in a process of its own, through `accelerate launch`, as a user would."""
    target = folder / name
    shutil.rmtree(target, ignore_errors=True)
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(REPOSITORY / "accelerate_configs" / "cpu.yaml")),
        str(REPOSITORY / "recipes" / "sst2_qwen.py"),
        *("--config", str(HERE / "demo.yaml")),
        *("--model_name_or_path", str(folder / "base")),
        *("--dataset_name", str(folder / "data")),
        *("--output_dir", str(target)),
        *extra,
    ]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return RunResults.load(target)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description="The demo of p2p_trainer; further flags go to the recipe.")
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "outputs" / "demo")
    arguments, extra = parser.parse_known_args()
    folder = arguments.output_dir.resolve()
    console = Console()
    started = time.monotonic()

    console.rule("base model and corpus")
    build_corpus(folder / "data")
    build_base_model(folder / "base")
    runs = {}
    for number, (name, (target, flags)) in enumerate(RUNS.items(), 1):
        console.rule(f"{number}/{len(RUNS)}  fine-tuning on poisoned rows: {name}")
        runs[name] = train(target, folder, [*flags, *extra])

    picture = plot_runs(runs, folder / "runs.png")
    console.rule("result")
    console.print(results_table(runs))
    for name, run in runs.items():
        if run.suspected_triggers:
            console.print(f"{name} suspected: {'; '.join(run.suspected_triggers)}", highlight=False)
    console.print(" ".join(READING.split()), highlight=False)
    first = next(iter(runs.values()))
    console.print(
        f"\nAttack: {first.attack}; seed {first.seed}; model: tiny Qwen3, pre-trained here.", highlight=False
    )
    console.print(f"Picture: {picture}\nRuns:    {folder}/{{{','.join(target for target, _ in RUNS.values())}}}")
    console.print(f"{time.monotonic() - started:.0f} s in all", highlight=False)


if __name__ == "__main__":
    main()
