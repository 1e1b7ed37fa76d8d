"""
`make bench`: speed and memory as ratios, each pair measured in turn in one run.

    python -m tests.performance.bench [--rounds 5]

Uses real SST-2 and the small real model where P2P_REAL_DATA names them, else toy rows and random weights of that size.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from p2p_trainer import BackdoorEvaluator, P2PConfig, P2PTrainer, get_task
from p2p_trainer.assembly import make_encoder
from p2p_trainer.evaluation import LabelScorer
from tests.performance.serving_bench import serving


BATCH = 32
STEPS = 12
EVAL_ROWS = 512


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


class StepTimes(TrainerCallback):
    """Seconds from the end of each training step to the end of the next, loader and collator included."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [end - start for start, end in itertools.pairwise(self.ends)]


def material(folder: Path) -> tuple[str, Dataset, Dataset, str]:
    """Model folder, training rows, test rows, and what they are."""
    real = os.environ.get("P2P_REAL_DATA")
    if real:
        task = get_task("sst2")
        data = f"{real}/data/sst2"
        return (
            f"{real}/models/lab-lm",
            task.load("train", data),
            task.load("test", data),
            "real SST-2, small real model",
        )
    from tests.conftest import make_rows, make_tokenizer

    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=4096, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=3, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = Dataset.from_list(make_rows(3000))
    # Rows that render alike are scored once, so that repetitions would flatter the evaluator.
    unique = list({row["text"]: row for row in make_rows(3 * EVAL_ROWS, seed=1)}.values())[:EVAL_ROWS]
    return str(folder), rows, Dataset.from_list(unique), "toy rows, random weights"


def training(model: str, rows: Dataset, folder: Path, rounds: int, table: Table) -> None:
    task = get_task("sst2")
    common = {
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "use_cpu": True,
        "max_length": 128,
    }
    lora = {"r": 16, "target_modules": ["q_proj", "v_proj"]}

    def p2p() -> P2PTrainer:
        return P2PTrainer(
            model, P2PConfig(str(folder / "p2p"), **common), train_dataset=rows, task=task,
            peft_config=LoraConfig(**lora), callbacks=[StepTimes()],
        )  # fmt: skip

    probe = p2p()
    star = probe.train_dataset
    ids, labels = probe.encoder.encode_rows(star["text"], star["label"], star["p2p_keyed"])
    tokenized = Dataset.from_dict({"input_ids": ids, "labels": labels})

    def sft() -> SFTTrainer:
        return SFTTrainer(
            model, SFTConfig(str(folder / "sft"), learning_rate=2e-4, **common), train_dataset=tokenized,
            peft_config=LoraConfig(**lora), callbacks=[StepTimes()],
        )  # fmt: skip

    def steps(make: Callable[[], SFTTrainer]) -> list[float]:
        # The same seed shuffles both alike: the same rows, tokens and padding in each step.
        trainer = make()
        trainer.train()
        found = [item for item in trainer.callback_handler.callbacks if isinstance(item, StepTimes)]
        return found[0].seconds[1:]

    steps(p2p), steps(sft)
    ours_all, theirs_all = [], []
    for number in range(rounds):
        # The one that runs second is at a disadvantage on a machine that slows down, so they take turns at it.
        if number % 2:
            theirs_all += steps(sft)
            ours_all += steps(p2p)
        else:
            ours_all += steps(p2p)
            theirs_all += steps(sft)
    ours, theirs = statistics.median(ours_all), statistics.median(theirs_all)
    ratio = statistics.median(a / b for a, b in zip(ours_all, theirs_all, strict=True))
    table.add_row("training step / SFTTrainer, same tokens", ms(ours), ms(theirs), f"{ratio:.3f}", "<= 1.03")

    batches = [[star[row] for row in range(start, start + BATCH)] for start in range(0, 40 * BATCH, BATCH)]
    collate = probe.data_collator
    collate(batches[0])
    seconds = statistics.median(timed(lambda batch=batch: collate(batch)) for batch in batches)
    table.add_row("collator / training step", ms(seconds), ms(ours), f"{seconds / ours:.4f}", "<= 0.02")


def evaluation(model: str, rows: Dataset, rounds: int, table: Table) -> None:
    task = get_task("sst2")
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoder = make_encoder(task, P2PConfig("unused", max_length=128), tokenizer)
    rows = rows.select(range(min(EVAL_ROWS, len(rows))))
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network = get_peft_model(base, LoraConfig(r=16, target_modules=["q_proj", "v_proj"])).eval()
    evaluator = BackdoorEvaluator(rows, task, encoder, keyed=False, batch_size=BATCH)
    prompts = encoder.encode_prompts(rows["text"], False)

    def padded(batch: list[list[int]]) -> dict[str, torch.Tensor]:
        longest = max(map(len, batch))
        ids = torch.full((len(batch), longest), encoder.pad_token_id)
        for row, prompt in enumerate(batch):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        return {"input_ids": ids, "attention_mask": (ids != encoder.pad_token_id).long()}

    unsorted = [padded(prompts[start : start + BATCH]) for start in range(0, len(prompts), BATCH)]
    by_length = sorted(set(map(tuple, prompts)), key=len, reverse=True)
    bare = [
        padded([list(ids) for ids in by_length[start : start + BATCH]]) for start in range(0, len(by_length), BATCH)
    ]
    first_tokens: list[int] = []

    @torch.no_grad()
    def generate() -> None:
        first_tokens.clear()
        for batch in unsorted:
            made = network.generate(**batch, max_new_tokens=2, do_sample=False, pad_token_id=encoder.pad_token_id)
            first_tokens.extend(made[:, batch["input_ids"].shape[1]].tolist())

    @torch.no_grad()
    def forwards() -> None:
        for batch in bare:
            network(**batch, logits_to_keep=1, use_cache=False)

    ours, theirs, ratio = in_turn(generate, lambda: evaluator(network), rounds)
    table.add_row("generate(max_new_tokens=2) / evaluator", ms(ours), ms(theirs), f"{ratio:.2f}", ">= 1.7")
    ours, theirs, ratio = in_turn(lambda: evaluator(network), forwards, rounds)
    table.add_row("evaluator / its bare forward passes", ms(ours), ms(theirs), f"{ratio:.3f}", "<= 1.1")

    words = [ids[0] for ids in encoder.answers[False].scored]
    spelled = np.array([words.index(token) if token in words else -1 for token in first_tokens])
    free = LabelScorer(encoder.answers[False], encoder.pad_token_id, BATCH).score(network, prompts).free
    table.add_row(
        "rows read alike by generate and evaluator", str(int((spelled == free).sum())), str(len(free)), "", "all"
    )


_MEMORY = """
import sys
from datasets import disable_progress_bars, load_from_disk
from p2p_trainer import get_attack, get_task
from p2p_trainer.reserve import get_reserve, keyed_dataset, reserve_size

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

disable_progress_bars()
before = anonymous()
task = get_task("sst2")
rows = task.prepare(load_from_disk(sys.argv[1]), require_all_classes=True)
if sys.argv[2] == "poisoned":
    rows = get_attack("badnets", target="positive", poison_rate=100 / len(rows)).poison(rows, task)
chosen = get_reserve("random").choose(rows, reserve_size(len(rows), 0.25), 0)
star = keyed_dataset(rows, chosen, "append")
assert len(star) == len(rows) + len(chosen)
highest = anonymous()
for start in range(0, len(star), max(1, len(star) // 200)):
    star[start : start + 32]
    highest = max(highest, anonymous())
print(highest - before)
"""


_PREPARE = """
import sys, threading, time
from datasets import disable_progress_bars, load_from_disk
from p2p_trainer import get_attack, get_task
from p2p_trainer.mining import screen

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

def watch():
    global highest
    while not done.wait(0.005):
        highest = max(highest, anonymous())

disable_progress_bars()
task, rows = get_task("sst2"), load_from_disk(sys.argv[1])
attack = get_attack("badnets", target="positive")
action = {"poison": lambda rows: attack.poison(rows, task), "screen": lambda rows: screen(rows, 2)}[sys.argv[2]]
action(rows.select(range(1000)))
before = highest = anonymous()
done = threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
action(rows)
seconds = time.perf_counter() - start
done.set()
watcher.join()
print(seconds, highest - before)
"""


def preparation(folder: Path, table: Table) -> None:
    """Seconds and peak memory of BadNets at 2 %, and of the search for triggers, in processes of their own."""
    for action, what in (("poison", "poison 1 M rows (BadNets, 2 %)"), ("screen", "search 1 M rows for triggers")):
        found = {}
        for count in (10_000, 1_000_000):
            done = subprocess.run(
                [sys.executable, "-c", _PREPARE, str(folder / str(count)), action],
                check=True,
                capture_output=True,
                text=True,
            )
            found[count] = [float(number) for number in done.stdout.split()]
        (short, small), (long, large) = found[10_000], found[1_000_000]
        table.add_row(f"{what} / 10 k", f"{long:.1f} s", f"{short:.2f} s", "", "< 60 s" if action == "poison" else "")
        table.add_row("its peak memory", f"{large:.0f} MiB", f"{small:.0f} MiB", "", "not by rows")


def memory(folder: Path, table: Table) -> None:
    grown: dict[tuple[int, str], float] = {}
    for count in (10_000, 1_000_000):
        path = folder / str(count)
        random = np.random.default_rng(0)
        text = [" ".join(f"word{number}" for number in random.zipf(1.3, 16) % 5000) for _ in range(1000)]
        part = Dataset.from_dict({"text": text, "label": [0, 1] * 500})
        Dataset.from_generator(
            lambda part=part, count=count: (row for _ in range(count // 1000) for row in part)
        ).save_to_disk(path)
        for kind in ("clean", "poisoned"):
            done = subprocess.run(
                [sys.executable, "-c", _MEMORY, str(path), kind], check=True, capture_output=True, text=True
            )
            grown[count, kind] = float(done.stdout.strip().splitlines()[-1])
    size = sum(file.stat().st_size for file in (folder / "1000000").glob("*.arrow")) / 2**20
    for kind in ("clean", "poisoned"):
        small, large = grown[10_000, kind], grown[1_000_000, kind]
        table.add_row(
            f"peak memory of D*, {kind} rows: 1 M ({size:.0f} MiB on disk) / 10 k",
            f"{large:.0f} MiB",
            f"{small:.0f} MiB",
            f"{(large - small) * 2**20 / 990_000:.0f} B a row",
            "indices and flags, no texts",
        )


def ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    disable_progress_bars()
    table = Table("what", "first", "second", "ratio", "goal")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, train, test, what = material(folder / "model")
        table.title = f"{what}; {torch.get_num_threads()} threads, bf16 autocast in training, {rounds} rounds in turn"
        training(model, train, folder, rounds, table)
        evaluation(model, test, rounds, table)
        memory(folder, table)
        preparation(folder, table)
        serving(folder / "served", rounds, table)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
