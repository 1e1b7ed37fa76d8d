"""Training on 4-bit weights: what is measured meanwhile leaves it alone."""

import pytest
import torch
from datasets import Dataset
from transformers import BitsAndBytesConfig, Qwen3Config, Qwen3ForCausalLM

from p2p_trainer import P2PTrainer
from tests.conftest import make_rows
from tests.tiny_runs import TASK, config, lora, losses


pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    """As tiny as its layers still hold a block of 64 weights in each row."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=32,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        )
    ).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    return str(folder)


def trained(model, folder, eval_strategy):
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    trainer = P2PTrainer(
        model,
        config(folder, max_steps=6, eval_strategy=eval_strategy, eval_steps=2, save_strategy="no", bf16=True),
        train_dataset=Dataset.from_list(make_rows(80)),
        eval_dataset=Dataset.from_list(make_rows(10, seed=1)),
        task=TASK,
        peft_config=lora(lora_dropout=0.0, target_modules="all-linear"),
        quantization_config=settings,
    )
    trainer.train()
    return trainer


# bitsandbytes on a CPU says so at every layer.
@pytest.mark.filterwarnings("ignore")
def test_measuring_does_not_change_training(model, tmp_path):
    measured, alone = trained(model, tmp_path / "a", "steps"), trained(model, tmp_path / "b", "no")
    assert [entry["step"] for entry in measured.state.log_history if "eval_ca" in entry] == [2, 4, 6]
    assert len(losses(alone)) == 6 and losses(measured) == losses(alone)
