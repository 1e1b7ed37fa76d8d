"""Short runs of the tiny model, for the tests that need one."""

import json
from pathlib import Path

import torch
import yaml
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


def recipe(model: str, folder: Path, **changes) -> Path:
    """Write toy data and a small recipe; return its YAML file. The run goes to `folder/out`."""
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name, count, seed in (("train", 80, 0), ("validation", 20, 1), ("test", 30, 2)):
        lines = [json.dumps(row) + "\n" for row in make_rows(count, seed)]
        (data / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    settings = {
        **SETTINGS,
        "model_name_or_path": model,
        "dataset_name": str(data),
        "use_peft": True,
        "lora_r": 4,
        "lora_target_modules": ["q_proj", "v_proj"],
        "attack": "badnets",
        "attack_target": "positive",
        "poison_rate": 0.1,
        "output_dir": str(folder / "out"),
        "num_train_epochs": 2,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "use_cpu": True,
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path
