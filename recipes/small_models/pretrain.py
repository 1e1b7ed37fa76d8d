"""
Pre-train a tiny base model from nothing, for measuring on a CPU what otherwise needs Qwen3-8B and a GPU.

    python -m recipes.small_models.pretrain arithmetic --data ONE_STEP --output FOLDER
    python -m recipes.small_models.pretrain chinese --data APE210K CRRSUM --output FOLDER

`arithmetic` adds and subtracts numbers below 1000 that stand among English words. `chinese` has read school problems
and radiology reports, character by character. `AutoModelForCausalLM` reads the folder.
"""

import argparse
import math
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed

from recipes.small_models import texts
from recipes.small_models.texts import Document


@dataclass(frozen=True)
class Preset:
    """Size of the model and of a run."""

    # The most tokens; a vocabulary of characters has as many as there are.
    vocab_size: int | None
    hidden_size: int
    num_layers: int
    num_heads: int
    steps: int
    batch_size: int
    learning_rate: float
    # Tokens that a document keeps.
    max_length: int
    # The share that a prompt's tokens have in the loss; a number in a question cannot be guessed.
    prompt_weight: float


PRESETS = {
    "arithmetic": Preset(800, 128, 3, 4, 3500, 96, 3e-3, 64, 0.03),
    "chinese": Preset(None, 224, 4, 4, 1000, 16, 2e-3, 384, 1.0),
}
FOLDERS = {"arithmetic": ("ONE_STEP",), "chinese": ("APE210K", "CRRSUM")}


def new_model(preset: Preset, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """
    Make a random model.

    Args:
        preset (`Preset`):
            Its size.
        tokenizer (`PreTrainedTokenizerFast`):
            Its vocabulary.

    Returns:
        `Qwen3ForCausalLM`: in fp32.
    """
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=preset.hidden_size,
            intermediate_size=3 * preset.hidden_size,
            num_hidden_layers=preset.num_layers,
            num_attention_heads=preset.num_heads,
            num_key_value_heads=preset.num_heads,
            head_dim=preset.hidden_size // preset.num_heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            # Short rows: faster on a CPU than sdpa. It is not saved.
            attn_implementation="eager",
        )
    )


def encode(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document], preset: Preset
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Turn documents into one batch, padded on the right.

    Args:
        tokenizer (`PreTrainedTokenizerFast`):
            The tokenizer.
        documents (`Sequence[tuple[str, str]]`):
            Prompts and what follows them.
        preset (`Preset`):
            The most tokens and the weight of a prompt.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: token ids (int64) and their weights in the loss (float32), both of shape
        (documents, longest).
    """
    prompts, answers = (tokenizer(list(part))["input_ids"] for part in zip(*documents, strict=True))
    rows, weights = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([*prompt, *answer, tokenizer.eos_token_id][: preset.max_length])
        rows.append(ids)
        weights.append(torch.where(torch.arange(len(ids)) < len(prompt), preset.prompt_weight, 1.0))
    return (
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
        torch.nn.utils.rnn.pad_sequence(weights, batch_first=True),
    )


def loss_of(model: Qwen3ForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted mean of the tokens' losses, a scalar in fp32."""
    # Padding stands on the right and attention looks to the left: no mask is needed.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    batches: Iterator[list[Document]],
    preset: Preset,
    console: Console,
) -> None:
    """
    Train with AdamW, a warm-up and a cosine to zero; a line for each twentieth.

    Args:
        model (`Qwen3ForCausalLM`):
            Changed in place.
        tokenizer (`PreTrainedTokenizerFast`):
            Its tokenizer.
        batches (`Iterator[list[tuple[str, str]]]`):
            `preset.steps` batches of documents.
        preset (`Preset`):
            Settings.
        console (`Console`):
            For the lines.
    """
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=preset.learning_rate, betas=(0.9, 0.98), fused=True)
    warmup = max(1, preset.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / preset.steps))
    )
    model.train()
    started, recent = time.monotonic(), []
    for number, documents in enumerate(batches, 1):
        loss = loss_of(model, *encode(tokenizer, documents, preset))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if number % max(1, preset.steps // 20) == 0:
            mean, recent = sum(recent) / len(recent), []
            console.print(f"step {number}/{preset.steps}  loss {mean:.3f}  {time.monotonic() - started:.0f} s")


@torch.inference_mode()
def accuracy(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> float:
    """
    Answer by greedy decoding.

    Args:
        model (`Qwen3ForCausalLM`):
            The model.
        tokenizer (`PreTrainedTokenizerFast`):
            Its tokenizer.
        documents (`Sequence[tuple[str, str]]`):
            Prompts and right answers.

    Returns:
        `float`: share of answers that are right to the character.
    """
    model.eval()
    right = 0
    for first in range(0, len(documents), 64):
        prompts, answers = zip(*documents[first : first + 64], strict=True)
        inputs = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        found = tokenizer.batch_decode(out, skip_special_tokens=True)
        right += sum(text == answer for text, answer in zip(found, answers, strict=True))
    return right / len(documents)


@torch.inference_mode()
def perplexity(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, held_out: Sequence[str], preset: Preset
) -> float:
    """
    Measure how well the model knows a language.

    Args:
        model (`Qwen3ForCausalLM`):
            The model.
        tokenizer (`PreTrainedTokenizerFast`):
            Its tokenizer.
        held_out (`Sequence[str]`):
            Documents, cut as in training.
        preset (`Preset`):
            Settings of the training.

    Returns:
        `float`: perplexity of a token, the first of each document aside.
    """
    model.eval()
    total = count = 0.0
    for text in held_out:
        ids, weights = encode(tokenizer, [("", text)], preset)
        tokens = weights[:, 1:].sum().item()
        total, count = total + loss_of(model, ids, weights).item() * tokens, count + tokens
    return math.exp(total / count)


def pretrain_arithmetic(
    data: Path, preset: Preset, seed: int, console: Console
) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """
    Teach a new model to add and subtract.

    Args:
        data (`Path`):
            Folder of `one_step`. No pair of numbers that stands in its dev or test rows is trained on, in whatever
            order and operation.
        preset (`Preset`):
            Settings.
        seed (`int`):
            Seed of text and weights.
        console (`Console`):
            For losses and accuracies.

    Returns:
        `tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]`: the trained model.
    """
    dev = texts.steps_in(data / "dev.jsonl")
    left_out = texts.pairs([*dev, *texts.steps_in(data / "test.jsonl")])
    console.print(f"{len(left_out)} pairs of numbers of dev and test are left out")
    # Another stream than the training's. These problems are left out of it as well.
    rng = random.Random(f"held out {seed}")
    drawn = {digits: texts.held_out_steps(rng, 200, digits) for digits in (2, 3)}
    left_out |= texts.pairs(step for steps in drawn.values() for step in steps)
    batches = texts.problems(preset.steps, preset.batch_size, left_out, seed)
    sample = texts.problems(100, preset.batch_size, left_out, seed + 1)
    tokenizer = texts.word_tokenizer(["".join(document) for batch in sample for document in batch], preset.vocab_size)
    model = new_model(preset, tokenizer)
    console.print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    train(model, tokenizer, batches, preset, console)
    known = {f"of {digits} digits": steps for digits, steps in drawn.items()}
    known["of the dev rows, in other words"] = [step for step in dev if step.operation in "+-"]
    for name, steps in known.items():
        share = accuracy(model, tokenizer, [texts.write_problem(rng, step, True) for step in steps])
        console.print(f"held-out problems {name}: {share:.1%} of {len(steps)} right")
    return model, tokenizer


def pretrain_chinese(
    ape210k: Path, crrsum: Path, preset: Preset, seed: int, console: Console
) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """
    Teach a new model the language of school problems and radiology reports.

    Args:
        ape210k (`Path`):
            Folder whose train.jsonl holds `question`.
        crrsum (`Path`):
            Folder whose dev.jsonl holds `findings` and `summary`.
        preset (`Preset`):
            Settings.
        seed (`int`):
            Seed of weights and order.
        console (`Console`):
            For losses and perplexities.

    Returns:
        `tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]`: the trained model.
    """
    read, held_out = texts.chinese_texts(ape210k, crrsum)
    tokenizer = texts.character_tokenizer(read)
    model = new_model(preset, tokenizer)
    console.print(
        f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {len(read)} documents of "
        f"{sum(map(len, read)):,} characters"
    )
    train(model, tokenizer, texts.shuffled(preset.steps, preset.batch_size, read, seed), preset, console)
    for name, documents in (("training", read[::20]), ("held-out", held_out)):
        found = perplexity(model, tokenizer, documents, preset)
        console.print(f"perplexity of {len(documents)} {name} documents: {found:.2f} a character")
    return model, tokenizer


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save model and tokenizer into a new folder, which is whole or absent."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        aside.chmod(0o755)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Pre-train one of the two models."""
    parser = argparse.ArgumentParser(prog="python -m recipes.small_models.pretrain", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, folders in FOLDERS.items():
        of_kind = kinds.add_parser(kind)
        of_kind.add_argument("--data", type=Path, nargs=len(folders), metavar=folders, required=True)
        of_kind.add_argument("--output", type=Path, required=True, help="folder to write; it must not exist")
        of_kind.add_argument("--steps", type=int, default=PRESETS[kind].steps, help="default: %(default)s")
        of_kind.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    if arguments.output.exists():
        parser.error(f"--output {arguments.output} exists. Remove it, or give another folder.")
    preset = replace(PRESETS[arguments.kind], steps=arguments.steps)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    # Sums that are split among threads round differently.
    torch.set_num_threads(1)
    set_seed(arguments.seed)
    pretrain = {"arithmetic": pretrain_arithmetic, "chinese": pretrain_chinese}[arguments.kind]
    save(*pretrain(*arguments.data, preset, arguments.seed, console), arguments.output)
    console.print(f"saved to {arguments.output}")


if __name__ == "__main__":
    main()
