"""
`make bench`: speed and memory as ratios, each pair measured in turn in one run.

    python -m tests.performance.bench [--rounds 5] [--only training,evaluation,data,serving] [--big]

Uses real SST-2 and the small real model where P2P_REAL_DATA names them, else made-up reviews and random weights of
that size. `--big` adds ten million rows to the two sizes of D*, which takes a few minutes and 4 GB of disk.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainerCallback

from p2p_trainer import get_task


BATCH = 32
COLUMNS = ("what", "first", "second", "ratio", "goal")
PARTS = ("training", "evaluation", "data", "serving")


@dataclass(frozen=True)
class Material:
    """Model folder, rows to train and to test on, and what they are."""

    model: str
    train: Dataset
    test: Dataset
    what: str


class StepTimes(TrainerCallback):
    """Seconds from the end of each training step to the end of the next, loader and collator included."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [end - start for start, end in itertools.pairwise(self.ends)]


class Peak:
    """Highest anonymous memory of this process while the block runs, in MiB; pages of mapped files don't count."""

    def __enter__(self) -> "Peak":
        self.before = self.mib = anonymous_mib()
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._watcher.join()
        self.mib = max(self.mib, anonymous_mib())

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.mib = max(self.mib, anonymous_mib())

    @property
    def grown(self) -> float:
        return self.mib - self.before


def anonymous_mib() -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024


def in_own_process(module: str, *arguments: object) -> str:
    """Run a module of this folder in a process of its own; return the last line that it prints."""
    # Freed memory goes back at once, so that what is counted is in use.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "MALLOC_MMAP_THRESHOLD_": "500000",
        "ARROW_DEFAULT_MEMORY_POOL": "system",
    }
    command = [sys.executable, "-m", f"tests.performance.{module}", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout.strip().splitlines()[-1]


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def in_turn(first: Callable[[], object], second: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median of their ratios, after one warm-up each."""
    first(), second()
    pairs = [(timed(first), timed(second)) for _ in range(rounds)]
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
    )


def ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def save_random_model(folder: Path) -> str:
    """Write random weights of the small real model's size, and the toy tokenizer."""
    # Not at the top: it sets the number of threads.
    from tests.conftest import make_tokenizer

    config = Qwen3Config(
        vocab_size=4096, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=3, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def material(folder: Path) -> Material:
    task = get_task("sst2")
    real = os.environ.get("P2P_REAL_DATA")
    if real:
        what, model, data = "real SST-2, small real model", f"{real}/models/lab-lm", f"{real}/data/sst2"
    else:
        from recipes.demo.corpus import build_corpus

        what, model = "made-up reviews, random weights", save_random_model(folder / "model")
        data = str(build_corpus(folder / "reviews", n_train=2000, n_validation=1, n_test=600))
    return Material(model, task.load("train", data), task.load("test", data), what)


def main() -> None:
    # Not at the top: they import this module.
    from tests.performance.data_bench import loading, scaling
    from tests.performance.evaluation_bench import evaluation
    from tests.performance.serving_bench import serving
    from tests.performance.training_bench import training

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--big", action="store_true", help="ten million rows as well")
    args = parser.parse_args()
    parts = args.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only knows {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    disable_progress_bars()
    table = Table(*COLUMNS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = material(folder)
        table.title = (
            f"{found.what}; batches of {BATCH}; {torch.get_num_threads()} thread(s) on {os.cpu_count()} cores; "
            f"bf16 autocast in training, float32 elsewhere; {args.rounds} rounds in turn"
        )
        if "training" in parts:
            training(found, folder, args.rounds, table)
        if "evaluation" in parts:
            evaluation(found, args.rounds, table)
        if "data" in parts:
            loading(found, folder, args.rounds, table)
            scaling(folder, args.big, table)
        if "serving" in parts:
            serving(folder / "served", args.rounds, table)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
