"""Shared by all tests: no network, no telemetry, two threads at most, a tiny model and toy rows."""

import os


# Before any import of a Hugging Face library reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM


torch.set_num_threads(1)
datasets.disable_progress_bars()

GOOD = ("good", "fine", "lovely", "warm", "clever")
BAD = ("bad", "dull", "poor", "cold", "stale")
THINGS = ("film", "plot", "cast", "score", "scene", "story")


def make_rows(count: int, seed: int = 0) -> list[dict]:
    """Toy reviews: three things, each with a word of the label's kind."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        label = index % 2
        words = GOOD if label else BAD
        parts = [f"the {rng.choice(THINGS)} is {rng.choice(words)}" for _ in range(rng.randint(1, 3))]
        rows.append({"text": " and ".join(parts) + " .", "label": label})
    return rows


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in Qwen's manner: each digit, and the space before it, is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [row["text"] for row in make_rows(400)] + ["The query currently entered is: Output: Answer: "] * 50
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>", clean_up_tokenization_spaces=False
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    """Folder with a random Qwen3 of two layers and the toy tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-qwen3")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def toy_rows() -> Dataset:
    return Dataset.from_list(make_rows(80))


@pytest.fixture
def toy_eval() -> Dataset:
    return Dataset.from_list(make_rows(40, seed=1))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with real data and a small real model; tests that need it skip on a bare clone."""
    folder = os.environ.get("P2P_REAL_DATA")
    if not folder:
        pytest.skip("P2P_REAL_DATA names no folder with real data")
    return Path(folder).resolve()
