"""
P2PTrainer beside plain SFTTrainer and a hand-written loop on one GPU: throughput, model FLOP utilisation and memory.

    python -m tests.performance.gpu_bench --model {0.6b,1.7b,8b,tiny} [--steps 20]

Weights are random and built here, so that no network is needed; speed and memory do not depend on them. `tiny` runs on
a CPU too. Each line trains twice over the same rows, and the second epoch counts.
"""

import argparse
import gc
import itertools
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase, PrinterCallback, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import is_flash_attn_2_available
from trl import SFTConfig, SFTTrainer

from p2p_trainer import P2PConfig, P2PTrainer, get_task
from p2p_trainer.assembly import make_encoder
from p2p_trainer.estimation.devices import find_device
from p2p_trainer.training_set import build_training_set
from tests.performance.bench import anonymous_mib


MODELS = {
    "0.6b": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 3072},
    "1.7b": {"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 6144},
    "8b": {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 12288,
           "tie_word_embeddings": False},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 16, "intermediate_size": 128, "vocab_size": 1024},
}  # fmt: skip
LORA = {"r": 16, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
# Label word and end of sequence: all that the loss lies on.
ANSWER = 2
# Known words of the toy tokenizer, one token each.
WORDS = ("the", "film", "plot", "cast", "is", "good", "dull", "and")
FORMULA = (
    "MFU: (4 N + 6 A + 6 layers x heads x head_dim x length) FLOP per token and 4 hidden x vocabulary per answer "
    "token. N: frozen weights of the layers (forward pass and gradient of their input, none of their own), A: the "
    "adapter's; causal attention. Not counted: recomputation, other logits and, in `real`, padding"
)


@dataclass(frozen=True)
class Work:
    """What is trained on: D*, the same rows as tokens, and what they are."""

    rows: Dataset
    tokenized: Dataset
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    batch: int
    steps: int
    what: str


@dataclass(frozen=True)
class Measured:
    """One epoch."""

    seconds: float
    steps: int
    rows: int
    real: int
    padded: int
    peak: int


class Meter:
    """Counts tokens and time from a forward pass on, without waiting for the device in between."""

    def __init__(self, model: Qwen3ForCausalLM, warmup: int) -> None:
        self.warmup = warmup
        self.passes = self.rows = self.padded = 0
        self.real = torch.zeros((), dtype=torch.int64, device=model.device)
        self.started = 0.0
        self.peak = 0.0
        model.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: torch.nn.Module, inputs: tuple, keywords: dict[str, Any]) -> None:
        self.passes += 1
        self.peak = max(self.peak, anonymous_mib() * 2**20)
        if self.passes <= self.warmup:
            return
        if self.passes == self.warmup + 1:
            synchronize()
            self.started = time.perf_counter()
        self.rows += len(keywords["attention_mask"])
        self.padded += keywords["attention_mask"].numel()
        self.real += keywords["attention_mask"].sum()

    def read(self) -> Measured:
        synchronize()
        seconds = time.perf_counter() - self.started
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else int(self.peak)
        return Measured(seconds, self.passes - self.warmup, self.rows, int(self.real), self.padded, peak)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def config_of(name: str) -> Qwen3Config:
    """The configuration of a Qwen3 model, as published."""
    size = {"vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
    return Qwen3Config(
        **{**size, **MODELS[name]}, max_position_embeddings=40_960, bos_token_id=None, eos_token_id=0, pad_token_id=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip


def build(config: Qwen3Config, attention: str) -> Qwen3ForCausalLM:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config._attn_implementation = attention
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(usual)


def flops(config: Qwen3Config, rows: float, tokens: float, length: float) -> float:
    """
    FLOPs of one forward and backward pass with LoRA on q_proj and v_proj; see `FORMULA`.

    Args:
        config (`Qwen3Config`):
            Model.
        rows (`float`):
            Rows, with `ANSWER` logits each.
        tokens (`float`):
            Tokens of all rows.
        length (`float`):
            Mean length of a row, in tokens.

    Returns:
        `float`: FLOPs.
    """
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    hidden, layers = config.hidden_size, config.num_hidden_layers
    frozen = layers * hidden * (2 * queries + 2 * keys + 3 * config.intermediate_size)
    adapter = layers * LORA["r"] * (2 * hidden + queries + keys)
    per_token = 4 * frozen + 6 * adapter + 6 * layers * queries * length
    return tokens * per_token + rows * ANSWER * 4 * hidden * config.vocab_size


def texts_of(count: int, words: int | None) -> list[str]:
    """Texts of as many words, or of as many as in SST-2: 19 on average, 2 to 52."""
    draw = random.Random(0)
    found = []
    for _ in range(count):
        length = words or min(52, max(2, round(draw.gammavariate(4.2, 19 / 4.2))))
        found.append(" ".join(draw.choice(WORDS) for _ in range(length)))
    return found


def work_of(steps: int, batch: int, max_length: int, words: int | None, folder: str) -> Work:
    # Not at the top: it sets the number of threads.
    from tests.conftest import make_tokenizer

    tokenizer, task = make_tokenizer(), get_task("sst2")
    args = p2p_config(folder, max_length=max_length)
    encoder = make_encoder(task, args, tokenizer)
    # With a keyed copy of a quarter of the rows an epoch has as many steps as were asked for.
    count = steps * batch * 4 // 5
    rows = Dataset.from_dict({"text": texts_of(count, words), "label": [row % 2 for row in range(count)]})
    star = build_training_set(task.prepare(rows), task, args).rows
    ids, labels = encoder.encode_rows(star["text"][:], star["label"][:], star["p2p_keyed"][:])
    mean = sum(map(len, ids)) / len(ids)
    return Work(
        rows, Dataset.from_dict({"input_ids": ids, "labels": labels}), tokenizer, max_length, batch, steps,
        f"{mean:.0f} tokens a row ({min(map(len, ids))} to {max(map(len, ids))})",
    )  # fmt: skip


def p2p_config(folder: str, **changes: Any) -> P2PConfig:
    return P2PConfig(folder, p2p_reserve="random", p2p_immunize="none", **settings(**changes))


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "learning_rate": 2e-4, "bf16": True, "gradient_checkpointing": False, "disable_tqdm": True,
        "report_to": "none", "logging_strategy": "no", "save_strategy": "no", **changes,
    }  # fmt: skip


def of_trainer(work: Work, checkpointing: bool, **changes: Any) -> dict[str, Any]:
    return settings(
        max_length=work.max_length, per_device_train_batch_size=work.batch, max_steps=2 * work.steps,
        gradient_checkpointing=checkpointing, **changes,
    )  # fmt: skip


def with_p2p(model: Qwen3ForCausalLM, work: Work, folder: str, checkpointing: bool, **changes: Any) -> None:
    trainer = P2PTrainer(
        model, p2p_config(folder, **of_trainer(work, checkpointing, **changes)), train_dataset=work.rows,
        task=get_task("sst2"), processing_class=work.tokenizer, peft_config=LoraConfig(**LORA),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def with_sft(model: Qwen3ForCausalLM, work: Work, folder: str, checkpointing: bool) -> None:
    use_cpu = not torch.accelerator.is_available()
    trainer = SFTTrainer(
        model, SFTConfig(folder, use_cpu=use_cpu, **of_trainer(work, checkpointing)), train_dataset=work.tokenized,
        processing_class=work.tokenizer, peft_config=LoraConfig(**LORA),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def by_hand(model: Qwen3ForCausalLM, work: Work, folder: str, checkpointing: bool) -> None:
    """The straightforward loop: rows padded to the full length, logits and loss of all positions."""
    device = model.device
    network = get_peft_model(model, LoraConfig(**LORA))
    if checkpointing:
        network.enable_input_require_grads()
        network.gradient_checkpointing_enable({"use_reentrant": False})
    network.train()
    optimizer = torch.optim.AdamW([weight for weight in network.parameters() if weight.requires_grad], lr=2e-4)
    draw = random.Random(0)
    for _ in range(2):
        order = draw.sample(range(len(work.tokenized)), len(work.tokenized))
        for start in range(0, len(order), work.batch):
            batch = padded(work, order[start : start + work.batch])
            with torch.autocast(device.type, torch.bfloat16):
                loss = network(**{name: values.to(device) for name, values in batch.items()}).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def padded(work: Work, rows: Sequence[int]) -> dict[str, torch.Tensor]:
    shape = len(rows), work.max_length
    batch = {"input_ids": torch.full(shape, 1), "labels": torch.full(shape, -100)}
    mask = torch.zeros(shape, dtype=torch.long)
    for place, row in enumerate(rows):
        for name, values in batch.items():
            found = torch.tensor(work.tokenized[row][name])
            values[place, : len(found)] = found
        mask[place, : len(found)] = 1
    return {**batch, "attention_mask": mask}


Contender = Callable[[Qwen3ForCausalLM, Work, str, bool], None]
CONTENDERS: dict[str, Contender] = {
    "hand-written loop": by_hand,
    "SFTTrainer": with_sft,
    "P2PTrainer": with_p2p,
    "P2PTrainer, group_by_length": lambda *given: with_p2p(*given, train_sampling_strategy="group_by_length"),
    "P2PTrainer, AdamW not fused": lambda *given: with_p2p(*given, optim="adamw_torch"),
}


def measure(contender: Contender, config: Qwen3Config, attention: str, work: Work, checkpointing: bool) -> Measured:
    """Train a fresh model, and give its memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = build(config, attention)
    meter = Meter(model, work.steps)
    with tempfile.TemporaryDirectory() as folder:
        contender(model, work, folder, checkpointing)
    return meter.read()


def add_row(
    table: Table, name: str, found: Measured | None, loop: Measured | None, config: Qwen3Config, peak: float | None
) -> None:
    if found is None:
        table.add_row(f"    {name}", "out of memory")
        return
    used = [
        flops(config, found.rows, tokens, tokens / found.rows) / found.seconds for tokens in (found.padded, found.real)
    ]
    shares = [f"{100 * speed / peak:.1f} %" if peak else f"{speed / 1e12:.1f} TFLOP/s" for speed in used]
    against = f"{found.real / found.seconds / (loop.real / loop.seconds):.2f}" if loop else ""
    table.add_row(
        f"    {name}", f"{1000 * found.seconds / found.steps:.1f} ms", f"{found.padded / found.seconds:.0f}",
        f"{found.real / found.seconds:.0f}", against, *shares, f"{found.peak / 2**30:.2f} GiB",
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args(argv)
    disable_progress_bars()
    on_gpu = torch.cuda.is_available()
    device, config, tiny = find_device(not on_gpu, torch.bfloat16), config_of(args.model), args.model == "tiny"
    where = device.name if on_gpu else "no GPU here: on a CPU, whose peak is measured, not known"
    table = Table(
        "what", "step", "tokens/s", "real tokens/s", "against the loop", "MFU", "MFU, real", "peak memory",
        title=f"Qwen3 {args.model}, random weights, bf16, LoRA r 16 on q_proj and v_proj, {args.steps} steps; {where}",
        caption=FORMULA,
    )  # fmt: skip
    batch = 4 if tiny else 32
    # Of SST-2's lengths, and so long that the work fills the device.
    kinds = [(128, None)] if tiny else [(128, None), (512, 470)]
    attentions = ["sdpa", *(["flash_attention_2"] if on_gpu and is_flash_attn_2_available() else [])]
    with tempfile.TemporaryDirectory() as folder:
        works = [work_of(args.steps, batch, max_length, words, folder) for max_length, words in kinds]
    for work, attention, checkpointing in itertools.product(works, attentions, (False, True)):
        saving = "with" if checkpointing else "without"
        table.add_row(f"batch {batch}, {work.what}; {attention}; {saving} checkpointing")
        loop = None
        for name, contender in CONTENDERS.items():
            try:
                found: Measured | None = measure(contender, config, attention, work, checkpointing)
            except torch.cuda.OutOfMemoryError:
                found = None
            loop = found if contender is by_hand else loop
            add_row(table, name, found, loop, config, device.flops)
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
