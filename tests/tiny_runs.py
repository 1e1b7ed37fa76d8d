"""Short runs of the tiny model, for the tests that need one."""

from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig

from p2p_trainer import P2PConfig, P2PTrainer, Task
from tests.conftest import make_rows


TASK = Task(name="toy", labels=("negative", "positive"))

SETTINGS = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


def config(folder, **changes):
    return P2PConfig(str(folder), **{**SETTINGS, **changes})


def plain_config(folder, **changes):
    return SFTConfig(str(folder), use_cpu=not torch.accelerator.is_available(), **{**SETTINGS, **changes})


def lora(**changes):
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **changes})


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adapter(trainer):
    """Copies of the adapter's weights, named as in its file."""
    weights = trainer.model.named_parameters()
    return {name.replace(".default", ""): weight.detach().clone() for name, weight in weights if "lora" in name}


def saved_run(model: str, folder: Path, full: bool = False, **changes) -> P2PTrainer:
    """Train on toy rows, by default until something is learnt, and save; the trainer is there to compare with."""
    trainer = P2PTrainer(
        model,
        config(folder, **{"num_train_epochs": 5, "p2p_benign_ratio": 1.0, **changes}),
        train_dataset=Dataset.from_list(make_rows(80)),
        task=TASK,
        peft_config=None if full else lora(r=16, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
    return trainer
