"""What defenses with more than one training run, or more than one process, share."""

from typing import TypeVar

import torch.distributed as dist
from transformers import Trainer


T = TypeVar("T")


def drop_training_state(trainer: Trainer) -> None:
    """
    Give back the memory of a trainer's optimizer and scheduler; its model can be saved and evaluated as before.

    Args:
        trainer (`Trainer`):
            A trainer that has ended; trained again, it starts with a fresh optimizer.
    """
    handler = trainer.callback_handler
    trainer.optimizer = trainer.lr_scheduler = handler.optimizer = handler.lr_scheduler = None
    # With DDP, the wrapper holds buckets of the size of all gradients.
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()


def make_room(trainer: Trainer) -> None:
    """
    Take a trainer whose model is no longer needed off the accelerator.

    Args:
        trainer (`Trainer`):
            A trainer that has ended. Weights that are sharded or quantized stay where they are.
    """
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    drop_training_state(trainer)
    if trainer.accelerator.device.type != "cpu" and not sharded and not getattr(trainer.model, "is_quantized", False):
        trainer.model.to("cpu")
        # What was moved is free only now.
        trainer.accelerator.free_memory()


def of_first_process(value: T) -> T:
    """
    Have all processes of a distributed run go on with what the first one found: rounding may differ between devices.

    Args:
        value (`T`):
            What this process found.

    Returns:
        `T`: what the first process found; `value` itself where there is only one.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    found = [value]
    dist.broadcast_object_list(found, src=0)
    return found[0]
