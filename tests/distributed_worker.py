"""What runs in each process of `test_distributed.py`: a recipe as users launch it, that says what it saw."""

import hashlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from p2p_trainer import BackdoorEvaluator, DefendedModel, config, get_attack, launch
from p2p_trainer.defenses.p2p import P2PAuto
from p2p_trainer.reserve import KEYED, ROW
from tests.conftest import make_rows
from tests.tiny_runs import TASK


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


class Observed(P2PAuto):
    """
    The default defense; each process writes into `folder` what it found.

    Args:
        folder (`str`):
            Where to.
        saved (`str`, *optional*):
            A saved run to measure as well.
        fail (`dict`, *optional*):
            `rank` that fails, and `where`: "training", "evaluation" or "saving".
    """

    name = "observed"

    def __init__(self, folder, saved=None, fail=None):
        super().__init__()
        self.folder = folder
        self.saved = saved
        self.fail = fail
        self._refused = None
        self._rank = int(os.environ.get("RANK", 0))
        if "RANK" in os.environ:
            sys.addaudithook(self._hear)

    def build(self, bench):
        trainer = super().build(bench)
        collator, own = trainer.data_collator, trainer.data_collator.written
        measured = set() if bench.validation is None else set(bench.validation["text"])

        def written(example, column):
            text = own(example, column)
            if example[column] not in measured:
                # In a file of its own for each worker of a data loader.
                with open(Path(self.folder) / f"seen-{self._rank}-{os.getpid()}.jsonl", "a") as file:
                    seen = [int(collator._epoch[0]), example[ROW], example[KEYED], example["label"], text]
                    file.write(json.dumps(seen) + "\n")
            return text

        collator.written = written
        if self.fail is not None and self.fail["rank"] == self._rank:
            self._break(trainer)
        if trainer.is_fsdp_enabled:
            try:
                trainer.evaluate()
            except ValueError as error:
                self._refused = str(error)
        return trainer

    def train(self, trainer, bench):
        trainer = super().train(trainer, bench)
        weights = list(trainer.model.parameters())
        found = {
            "world_size": trainer.args.world_size,
            "machine": os.environ.get("GROUP_RANK"),
            "backend": dist.get_backend() if dist.is_initialized() else None,
            "kind": trainer.accelerator.distributed_type.value,
            "stage": getattr(trainer.accelerator.state.deepspeed_plugin, "zero_stage", None),
            "sharded": sum(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in weights)
            / len(weights),
            "quantized": getattr(trainer.model, "is_loaded_in_4bit", False),
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "eval_losses": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
            "epochs": [entry for entry in trainer.state.log_history if "eval_ca" in entry],
            "counts": trainer.counts,
            "rows": hashlib.sha256(json.dumps(trainer.train_dataset.to_list()).encode()).hexdigest(),
            "refused": self._refused,
            "measured": None if self.saved is None else measure(self.saved),
        }
        (Path(self.folder) / f"rank{self._rank}.json").write_text(json.dumps(found))
        return trainer

    def _hear(self, event, arguments):
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            path = str(arguments[0])
            if "/out/" in path:
                with open(Path(self.folder) / f"wrote-{self._rank}.txt", "a") as file:
                    file.write(path.split("/out/")[1] + "\n")

    def _break(self, trainer):
        where = self.fail["where"]

        def broken(*given, **settings):
            raise MemoryError(f"no room for {where}")

        if where == "training":
            trainer.add_callback(FailsAtStep3(broken))
        elif where == "evaluation":
            trainer.evaluator.evaluate = broken
        else:
            trainer.save_model = broken


class FailsAtStep3(TrainerCallback):
    def __init__(self, broken):
        self.broken = broken

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.broken()


def shard_on_cpu():
    """Let FSDP2 run without a device: accelerate would fall back to DDP without a word."""
    PartialState._prepare_backend = lambda *given, **settings: ("gloo", DistributedType.MULTI_GPU)
    config.torch = SimpleNamespace(accelerator=SimpleNamespace(is_available=lambda: True))


if __name__ == "__main__":
    shard_on_cpu()
    launch.main()
