"""
The trainer beside plain `SFTTrainer` on the same tokens, and batches of rows of like length beside random ones.

    python -m tests.performance.training_bench WHO FOLDER    # one trainer alone, for its peak memory
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars, load_from_disk
from peft import LoraConfig
from rich.table import Table
from trl import SFTConfig, SFTTrainer

from p2p_trainer import P2PConfig, P2PTrainer, get_task
from tests.performance.bench import BATCH, Material, Peak, StepTimes, in_own_process, ms, timed


STEPS = 12
SETTINGS = {
    "per_device_train_batch_size": BATCH,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "report_to": "none",
    "logging_strategy": "no",
    "save_strategy": "no",
    "use_cpu": True,
    "max_length": 128,
}
# Learns something within an epoch, where the paper's learning rate would not (recipes/sst2_small.yaml).
LEARNING = {"learning_rate": 3e-3, "lora": {"r": 16, "target_modules": "all-linear"}}


def p2p_trainer(model: str, rows: Dataset, folder: Path, **changes: Any) -> P2PTrainer:
    lora = changes.pop("lora", {"r": 16, "target_modules": ["q_proj", "v_proj"]})
    return P2PTrainer(
        model, P2PConfig(str(folder / "p2p"), **{**SETTINGS, "max_steps": STEPS, **changes}), train_dataset=rows,
        task=get_task("sst2"), peft_config=LoraConfig(**lora), callbacks=[StepTimes()],
    )  # fmt: skip


def sft_trainer(model: str, tokenized: Dataset, folder: Path) -> SFTTrainer:
    return SFTTrainer(
        model, SFTConfig(str(folder / "sft"), learning_rate=2e-4, max_steps=STEPS, **SETTINGS),
        train_dataset=tokenized, peft_config=LoraConfig(r=16, target_modules=["q_proj", "v_proj"]),
        callbacks=[StepTimes()],
    )  # fmt: skip


def tokenized(trainer: P2PTrainer) -> Dataset:
    """What the collator makes of D*, made beforehand. Suspected triggers, which it writes anew each epoch, are not."""
    star = trainer.train_dataset
    ids, labels = trainer.encoder.encode_rows(star["text"], star["label"], star["p2p_keyed"])
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def step_seconds(trainer: SFTTrainer) -> list[float]:
    """Train, and return the seconds of all steps but the first two, which warm up."""
    trainer.train()
    (times,) = (item for item in trainer.callback_handler.callbacks if isinstance(item, StepTimes))
    return times.seconds[1:]


def training(found: Material, folder: Path, rounds: int, table: Table) -> None:
    """Add the rows of this part to the table of `make bench`."""
    probe = p2p_trainer(found.model, found.train, folder, p2p_immunize="none")
    same = tokenized(probe)
    speed(found, same, folder, rounds, table)
    memory(found, same, folder, rounds, table)
    collating(probe, table)
    grouping(found, folder, rounds, table)


def speed(found: Material, same: Dataset, folder: Path, rounds: int, table: Table) -> None:
    tokens: dict[str, int] = {}

    def ours() -> list[float]:
        trainer = p2p_trainer(found.model, found.train, folder, p2p_immunize="none")
        seconds = step_seconds(trainer)
        tokens["ours"] = trained_tokens(trainer)
        return seconds

    def theirs() -> list[float]:
        trainer = sft_trainer(found.model, same, folder)
        seconds = step_seconds(trainer)
        tokens["theirs"] = trained_tokens(trainer)
        return seconds

    ours(), theirs()
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(rounds):
        # The one that runs second is at a disadvantage on a machine that slows down, so they take turns at it.
        turn: list[tuple[str, Callable[[], list[float]]]] = [("ours", ours), ("theirs", theirs)]
        for who, run in turn if number % 2 == 0 else turn[::-1]:
            seconds[who] += run()
    # The same seed shuffles both alike: the same rows, tokens and padding in each step.
    if tokens["ours"] != tokens["theirs"]:
        raise RuntimeError(f"The trainers did not train on the same tokens: {tokens}")
    pairs = list(zip(seconds["ours"], seconds["theirs"], strict=True))
    mine, other = (statistics.median(values) for values in seconds.values())
    table.add_row(
        "training step / SFTTrainer, same tokens", ms(mine), ms(other),
        f"{statistics.median(a / b for a, b in pairs):.3f}", "<= 1.03",
    )  # fmt: skip
    per_step = tokens["ours"] / STEPS
    table.add_row(
        "tokens per second / SFTTrainer, same tokens", f"{per_step / mine:.0f}", f"{per_step / other:.0f}",
        f"{statistics.median(b / a for a, b in pairs):.3f}", ">= 0.97",
    )  # fmt: skip


def trained_tokens(trainer: SFTTrainer) -> int:
    """Tokens that a trainer has seen, as TRL counts them."""
    return int(next(entry["num_tokens"] for entry in reversed(trainer.state.log_history) if "num_tokens" in entry))


def memory(found: Material, same: Dataset, folder: Path, rounds: int, table: Table) -> None:
    """Peak of the whole process, libraries, search and D* included; each run has one of its own."""
    found.train.save_to_disk(folder / "rows")
    same.save_to_disk(folder / "tokenized")
    (folder / "model_name").write_text(found.model, encoding="utf-8")
    peaks: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(min(rounds, 3)):
        for who, values in peaks.items():
            values.append(float(in_own_process("training_bench", who, folder)))
    ratio = statistics.median(a / b for a, b in zip(*peaks.values(), strict=True))
    mine, other = (statistics.median(values) for values in peaks.values())
    table.add_row(
        "peak memory of a process that trains / SFTTrainer", f"{mine:.0f} MiB", f"{other:.0f} MiB", f"{ratio:.3f}",
        "<= 1.02",
    )  # fmt: skip


def collating(probe: P2PTrainer, table: Table) -> None:
    star, collate = probe.train_dataset, probe.data_collator
    batches = [[star[row] for row in range(start, start + BATCH)] for start in range(0, 40 * BATCH, BATCH)]
    collate(batches[0])
    seconds = statistics.median(timed(lambda batch=batch: collate(batch)) for batch in batches)
    step = statistics.median(step_seconds(probe))
    table.add_row("collator / training step", ms(seconds), ms(step), f"{seconds / step:.4f}", "<= 0.02")


class CountingCollator:
    """A collator that counts what it makes."""

    def __init__(self, collate: Callable[[list[dict]], dict[str, torch.Tensor]]) -> None:
        self.collate = collate
        self.rows = self.tokens = self.padded = 0

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        batch = self.collate(examples)
        self.rows += len(examples)
        self.tokens += int(batch["attention_mask"].sum())
        self.padded += batch["attention_mask"].numel()
        return batch


def grouping(found: Material, folder: Path, rounds: int, table: Table) -> None:
    """One epoch with rows of like length in each batch and one with rows at random, per seed: speed and quality."""
    seeds = range(min(rounds, 3))
    results: dict[str, list[dict[str, float]]] = {"group_by_length": [], "random": []}
    for seed in seeds:
        turn = list(results)
        for strategy in turn if seed % 2 == 0 else turn[::-1]:
            results[strategy].append(one_epoch(found, folder, strategy, seed))

    def mean(key: str) -> tuple[float, float]:
        grouped, random = (statistics.mean(result[key] for result in of) for of in results.values())
        return grouped, random

    def add(what: str, key: str, form: str, goal: str, digits: int = 3) -> None:
        grouped, random = mean(key)
        table.add_row(f"    {what}", form.format(grouped), form.format(random), f"{grouped / random:.{digits}f}", goal)

    table.add_row(f"one epoch, LoRA on all linear layers, lr 3e-3, {len(seeds)} seed(s): group_by_length / random")
    add("seconds of training", "seconds", "{:.1f} s", "< 1")
    add("tokens per row, padding among them", "padded", "{:.1f}", "< 1")
    add("tokens per row without padding", "tokens", "{:.1f}", "1")
    add("loss on the test rows", "loss", "{:.4f}", "")
    grouped, random = mean("ca")
    table.add_row(
        "    clean accuracy on the test rows", f"{100 * grouped:.1f} %", f"{100 * random:.1f} %",
        f"{100 * (grouped - random):+.1f} points", "not lower",
    )  # fmt: skip


def one_epoch(found: Material, folder: Path, strategy: str, seed: int) -> dict[str, float]:
    trainer = p2p_trainer(
        found.model, found.train, folder, **LEARNING, max_steps=-1, num_train_epochs=1, seed=seed,
        train_sampling_strategy=strategy,
    )  # fmt: skip
    counted = trainer.data_collator = CountingCollator(trainer.data_collator)
    seconds = trainer.train().metrics["train_runtime"]
    if counted.rows < len(trainer.train_dataset):
        raise RuntimeError(f"Of {len(trainer.train_dataset)} rows {counted.rows} were trained on.")
    padded, tokens = counted.padded / counted.rows, counted.tokens / counted.rows
    metrics = trainer.evaluate(found.test)
    return {
        "seconds": seconds, "padded": padded, "tokens": tokens, "loss": metrics["eval_loss"], "ca": metrics["eval_ca"],
    }  # fmt: skip


def main() -> None:
    who, folder = sys.argv[1], Path(sys.argv[2])
    disable_progress_bars()
    model = (folder / "model_name").read_text(encoding="utf-8")
    with Peak() as peak:
        if who == "ours":
            trainer: SFTTrainer = p2p_trainer(model, load_from_disk(folder / "rows"), folder, p2p_immunize="none")
        else:
            trainer = sft_trainer(model, load_from_disk(folder / "tokenized"), folder)
        trainer.train()
    print(peak.mib)


if __name__ == "__main__":
    main()
