"""
How long the trainer waits for its data, and what D* takes as its rows grow.

    python -m tests.performance.data_bench FILE MODE MODEL    # start-up on an Arrow file, in a process of its own
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from rich.table import Table
from torch.utils.data import DataLoader

from p2p_trainer import P2PConfig, P2PTrainer, get_attack, get_task
from tests.performance.bench import Material, Peak, in_own_process, ms, save_random_model, timed
from tests.performance.training_bench import SETTINGS, STEPS


WORKERS = (0, 2, 4)
SIZES = (10_000, 1_000_000)
BIG = 10_000_000
# The search looks at each row in Python; minutes at ten million.
MODES = {
    "plain": {"p2p_reserve": "random", "p2p_immunize": "none"},
    "search": {"p2p_reserve": "auto", "p2p_immunize": "auto"},
    "grouped": {"p2p_reserve": "random", "p2p_immunize": "none", "train_sampling_strategy": "group_by_length"},
}


class WaitingTrainer(P2PTrainer):
    """Notes how long it waits for the batches of each step."""

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        start = time.perf_counter()
        found = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.notes.append((start, time.perf_counter() - start))
        return found

    def waits(self) -> tuple[list[float], list[float]]:
        """Seconds of waiting and of whole steps, but for the first ones, when workers start."""
        starts, waited = zip(*self.notes, strict=True)
        whole = [after - before for before, after in zip(starts, starts[1:], strict=False)]
        return list(waited[2:-1]), whole[2:]


def loading(found: Material, folder: Path, rounds: int, table: Table) -> None:
    """Add rows on the share of a step that the trainer waits for its data."""
    waited: dict[int, list[float]] = {count: [] for count in WORKERS}
    whole: dict[int, list[float]] = {count: [] for count in WORKERS}
    for _ in range(rounds):
        for count in WORKERS:
            trainer = WaitingTrainer(
                found.model,
                P2PConfig(
                    str(folder / "loading"), **SETTINGS, max_steps=STEPS, dataloader_num_workers=count,
                    dataloader_persistent_workers=count > 0,
                ),
                train_dataset=found.train, task=get_task("sst2"),
                peft_config=LoraConfig(r=16, target_modules=["q_proj", "v_proj"]),
            )  # fmt: skip
            trainer.notes = []
            trainer.train()
            waits, steps = trainer.waits()
            waited[count] += waits
            whole[count] += steps
    for count in WORKERS:
        wait, step = statistics.median(waited[count]), statistics.median(whole[count])
        share = sum(waited[count]) / sum(whole[count])
        table.add_row(
            f"waiting for data, {count} workers / training step", ms(wait), ms(step), f"{share:.4f}", "<= 0.02"
        )


def scaling(folder: Path, big: bool, table: Table) -> None:
    """Add rows on start-up and memory of D* as it grows."""
    model, files = save_random_model(folder / "scaling"), {}
    sizes = (*SIZES, BIG) if big else SIZES
    for rows in sizes:
        files[rows] = write_rows(folder / f"{rows}.arrow", rows)
    for mode in MODES:
        results = {}
        for rows in sizes if mode == "plain" else SIZES:
            results[rows] = json.loads(in_own_process("data_bench", files[rows], mode, model))
        compared(mode, results, table)


def compared(mode: str, results: dict[int, dict[str, float]], table: Table) -> None:
    small, *larger = results
    described = ", ".join(f"{key}: {value}" for key, value in MODES[mode].items())
    table.add_row(f"D* of rows of 100 bytes, 2 % poisoned, tiny model; {described}")
    for rows in larger:
        before, after = results[small], results[rows]
        name = f"{rows // 1_000_000} M"
        for key, what, goal in (
            ("poison_s", "poisoning", "< 60 s" if rows == SIZES[-1] else ""),
            ("trainer_s", "P2PTrainer: check, search, reserve, D*", "< 120 s" if rows == BIG else ""),
            ("batch_s", "first batch", ""),
        ):
            if key == "poison_s" and mode != "plain":
                continue
            table.add_row(f"    {what}: {name} / 10 k", f"{after[key]:.2f} s", f"{before[key]:.2f} s", "", goal)
        for key, what, goal in (
            ("poison_mib", "peak memory of poisoning", "not by rows"),
            ("trainer_mib", "peak memory of P2PTrainer", "an index"),
            ("batch_mib", "peak memory of the first batch", "an index"),
        ):
            if key == "poison_mib" and mode != "plain":
                continue
            grown = (after[key] - before[key]) * 2**20 / (rows - small)
            table.add_row(
                f"    {what}: {name} / 10 k", f"{after[key]:.0f} MiB", f"{before[key]:.0f} MiB",
                f"{grown:.0f} B a row", goal,
            )  # fmt: skip


def write_rows(path: Path, rows: int) -> Path:
    """Write rows of three clauses each, drawn from a pool; hardly any two are the same, and labels are random."""
    random = np.random.default_rng(0)
    clauses = pa.array([" ".join(f"word{number}" for number in random.zipf(1.3, 5) % 5000) for _ in range(20_000)])
    schema = pa.schema({"text": pa.string(), "label": pa.int64()})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for start in range(0, rows, 100_000):
            count = min(100_000, rows - start)
            parts = [clauses.take(pa.array(random.integers(len(clauses), size=count))) for _ in range(3)]
            text = pc.binary_join_element_wise(*parts, " ")
            # Both classes are there, however few rows.
            label = pa.array((random.integers(2, size=count) + np.arange(count)) % 2)
            stream.write_batch(pa.record_batch([text, label], schema=schema))
    return path


def start_up(path: str, mode: str, model: str) -> dict[str, float]:
    """Seconds and peak memory of each phase between the file and the first batch."""
    task, rows = get_task("sst2"), Dataset.from_file(path)
    attack = get_attack("badnets", target="positive", poison_rate=0.02)
    settings: dict[str, Any] = {**SETTINGS, **MODES[mode], "max_steps": 1}

    def trainer(rows: Dataset) -> P2PTrainer:
        return P2PTrainer(
            model, P2PConfig(str(Path(path).parent / "out"), **settings), train_dataset=rows, task=task,
            peft_config=LoraConfig(r=4, target_modules=["q_proj"]),
        )  # fmt: skip

    # What is imported and set up once is not a matter of rows.
    next(iter(trainer(attack.poison(rows.select(range(1000)), task)).get_train_dataloader()))
    found: dict[str, float] = {}
    with Peak() as peak:
        found["poison_s"], poisoned = measured(lambda: attack.poison(task.prepare(rows), task))
    found["poison_mib"] = peak.grown
    with Peak() as peak:
        found["trainer_s"], built = measured(lambda: trainer(poisoned))
    found["trainer_mib"] = peak.grown
    with Peak() as peak:
        found["batch_s"] = timed(lambda: first_batch(built.get_train_dataloader()))
    found["batch_mib"] = peak.grown
    return found


def measured(action: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def first_batch(loader: DataLoader) -> dict[str, torch.Tensor]:
    return next(iter(loader))


def main() -> None:
    disable_progress_bars()
    print(json.dumps(start_up(*sys.argv[1:4])))


if __name__ == "__main__":
    main()
