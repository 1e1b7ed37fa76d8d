"""The demo's base model: a tiny Qwen3 and its tokenizer, pre-trained from scratch on made-up plain text.

It stands where Qwen3-8B would stand, on a machine with neither hub nor GPU. It sees plain text only: no labelled row,
no prompt of the task, not the defender's key and not the attacker's word.
"""

import hashlib
import json
import math
import os
import random
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed

from recipes.demo import corpus


EOS_TOKEN, PAD_TOKEN = "<|endoftext|>", "<|pad|>"
RECIPE_FILE = "demo_recipe.json"


@dataclass(frozen=True)
class BaseModelRecipe:
    """Everything that decides which base model comes out. Its fingerprint is the key of the cache."""

    n_documents: int = 48_000
    vocab_size: int = 1536
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 3
    num_heads: int = 4
    lesson_size: int = 2_000
    batch_size: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    seed: int = 0

    def fingerprint(self) -> str:
        grammar = Path(corpus.__file__).read_text(encoding="utf-8")
        return hashlib.sha256((json.dumps(asdict(self), sort_keys=True) + grammar).encode()).hexdigest()[:16]


def build_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every digit, and a space before a digit, is a token of its own (as in Qwen3)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[0-9]| (?=[0-9])"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN, PAD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS_TOKEN, pad_token=PAD_TOKEN)


def _batches(documents: list[list[int]], recipe: BaseModelRecipe, pad_id: int) -> list[torch.Tensor]:
    """
    Cuts the documents into lessons, in their order, and each lesson into shuffled batches of documents of like length,
    so that almost nothing is padding.
    """
    batches = []
    for first in range(0, len(documents), recipe.lesson_size):
        lesson = sorted(documents[first : first + recipe.lesson_size], key=len)
        starts = list(range(0, len(lesson), recipe.batch_size))
        random.Random(first + recipe.seed).shuffle(starts)
        for start in starts:
            rows = [torch.tensor(ids) for ids in lesson[start : start + recipe.batch_size]]
            batches.append(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id))
    return batches


def _pretrain(model: Qwen3ForCausalLM, batches: list[torch.Tensor], recipe: BaseModelRecipe) -> float:
    """One pass, with warmup and cosine decay. Returns the mean loss of the last tenth of the steps."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    total = len(batches)
    warmup = max(1, total // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / (total - warmup))
        ),
    )
    losses: list[float] = []
    model.train()
    with tqdm(batches, desc="pre-training the base model", unit="step") as bar:
        for input_ids in bar:
            labels = input_ids.masked_fill(input_ids == model.config.pad_token_id, -100)
            # Rows are padded on the right and attention is causal, so no mask is needed.
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(input_ids=input_ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            if len(losses) % 20 == 0:
                bar.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)
    last = losses[-max(1, total // 10) :]
    return sum(last) / len(last)


def _build(recipe: BaseModelRecipe) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast, float]:
    set_seed(recipe.seed)
    texts = corpus.build_pretraining_text(recipe.n_documents, recipe.seed)
    tokenizer = build_tokenizer(texts, recipe.vocab_size)
    documents = [ids + [tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.num_layers,
            num_attention_heads=recipe.num_heads,
            num_key_value_heads=recipe.num_heads,
            head_dim=recipe.hidden_size // recipe.num_heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            attn_implementation="eager",  # on a CPU and with short rows faster than sdpa
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    loss = _pretrain(model, _batches(documents, recipe, tokenizer.pad_token_id), recipe)
    return model, tokenizer, loss


def _finished(folder: Path, fingerprint: str) -> bool:
    try:
        return json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))["fingerprint"] == fingerprint
    except (OSError, ValueError, KeyError):
        return False


def build_base_model(folder: Path, seed: int = 0, recipe: BaseModelRecipe | None = None) -> Path:
    """
    Pre-trains the demo's base model, unless `folder` already holds the one of this recipe.

    Args:
        folder (`Path`): Where model and tokenizer go, in the format of `from_pretrained`.
        seed (`int`, *optional*, defaults to `0`): Seed of text, weights and order. Ignored if `recipe` is given.
        recipe (`BaseModelRecipe`, *optional*): Other settings than the defaults.

    Returns:
        `Path`: `folder`.
    """
    folder = Path(folder)
    recipe = recipe or BaseModelRecipe(seed=seed)
    fingerprint = recipe.fingerprint()
    if _finished(folder, fingerprint):
        return folder
    if folder.exists() and any(folder.iterdir()) and not (folder / RECIPE_FILE).is_file():
        raise FileExistsError(
            f"{folder} holds something other than a demo base model; give another folder or empty it."
        )

    # One thread: sums that are split among threads round differently, and then every machine has a model of its own.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, tokenizer, loss = _build(recipe)
    finally:
        torch.set_num_threads(threads)

    # Written aside and renamed: whoever is killed half-way leaves no half model that looks like a whole one.
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        about = {"fingerprint": fingerprint, "final_loss": round(loss, 4), "recipe": asdict(recipe)}
        (aside / RECIPE_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        aside.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder
