"""What each process of `test_distributed.py` runs: train, evaluate, and measure a saved model."""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from datasets import Dataset

from p2p_trainer import BackdoorEvaluator, DefendedModel, P2PTrainer, get_attack
from tests.conftest import make_rows
from tests.tiny_runs import TASK, config, lora, losses


ATTACKS = (get_attack("badnets", target="positive"), get_attack("addsent", target="positive"))


def measure(folder):
    """All numbers of a saved model: many batches of which the last is short, and fewer batches than processes."""
    model = DefendedModel.from_pretrained(folder, device="cpu")
    return {
        f"{rows} rows": BackdoorEvaluator(
            Dataset.from_list(make_rows(rows, seed=5)), TASK, model.encoder, ATTACKS, batch_size=batch_size
        )(model.model)
        for rows, batch_size in ((23, 4), (3, 32))
    }


def train(model, folder, batch_size):
    trainer = P2PTrainer(
        model,
        config(
            folder,
            per_device_train_batch_size=batch_size,
            use_cpu=True,
            ddp_find_unused_parameters=False,
            eval_strategy="epoch",
            save_strategy="epoch",
        ),
        train_dataset=Dataset.from_list(make_rows(96)),
        eval_dataset=Dataset.from_list(make_rows(23, seed=1)),
        task=TASK,
        attacks=ATTACKS,
        peft_config=lora(),
    )
    trainer.train()
    return trainer


def main(model, saved, folder):
    trainer = train(model, folder / "run", batch_size=4)
    rates = {key: value for key, value in trainer.evaluate().items() if "ca" in key or "asr" in key}
    found = {
        "world_size": trainer.args.world_size,
        "backend": dist.get_backend(),
        "kind": trainer.accelerator.distributed_type.value,
        "losses": losses(trainer),
        "rates": rates,
        "epochs": [entry["eval_asr"] for entry in trainer.state.log_history if "eval_asr" in entry],
        "measured": measure(saved),
        "counts": trainer.counts,
    }
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
    trainer.end()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
