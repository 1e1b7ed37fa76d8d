"""
The only place that touches private names of TRL, transformers or datasets.

Each entry says where the name comes from and when it can go.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import trl.trainer.utils
from datasets import Dataset
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTTrainer
from trl.trainer.sft_trainer import (  # not exported from `trl` (trl 1.16)
    DataCollatorForLanguageModeling,
    DataCollatorForVisionLanguageModeling,
)


class ColumnKeepingSFTTrainer(SFTTrainer):
    """
    `SFTTrainer` that hands more columns to the collator, and names what it extends.

    TRL keeps `input_ids`, `labels` and `seq_lengths` alone (trl/trainer/sft_trainer.py, 1.16, line 1487). Overriding
    the method is what TRL's own trainers do; it can go once transformers has a public hook (transformers#43598).
    """

    _tag_names: ClassVar[list[str]] = ["trl", "sft", "p2p"]
    _name = "P2P"
    _paper: ClassVar[dict[str, str]] = {
        "title": "P2P: A Poison-to-Poison Remedy for Reliable Backdoor Defense in LLMs",
        "id": "2510.04503",
        "citation": """\
@inproceedings{zhao2026p2p,
    title     = {{P2P: A Poison-to-Poison Remedy for Reliable Backdoor Defense in LLMs}},
    author    = {Shuai Zhao and Xinyi Wu and Shiqian Zhao and Xiaobao Wu and Zhongliang Guo and Yanhao Jia
                 and Anh Tuan Luu},
    booktitle = {Findings of the Association for Computational Linguistics: ACL 2026},
    year      = 2026,
}""",
    }

    # Columns to keep besides those of `SFTTrainer`; set before `SFTTrainer.__init__` runs.
    collator_columns: tuple[str, ...] = ()

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with _only_answers_are_scored():
            return super().compute_loss(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.accelerator.is_fsdp2 and not _is_spread(self.model):
            # accelerate would ask for an optimizer.
            raise ValueError(
                "FSDP2 spreads the model when training begins, and can't evaluate it before that. Call `train` first, "
                "set `eval_on_start: true`, or evaluate in one process."
            )
        return super().evaluate(*args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = [*self._signature_columns, *self.collator_columns]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        # Rows of like length, in an order that all processes agree on (transformers/trainer.py, 5.23, line 1071).
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        args = self.args
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        # The sampler's own is a column of `datasets`, which reads a table for each length that is looked up.
        dataset = self.train_dataset if train_dataset is None else train_dataset
        lengths, rows = dataset.data.column(args.length_column_name).to_numpy(), row_index(dataset)
        lengths = lengths if rows is None else lengths[rows]
        return LengthOrder(step, lengths, args.seed if args.data_seed is None else args.data_seed)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        # The public event `on_save` comes when older ones are deleted (transformers/trainer.py, 5.23, line 3355).
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with self.writing_checkpoint(folder):
            super()._save_checkpoint(model, trial)

    def writing_checkpoint(self, folder: Path) -> contextlib.AbstractContextManager[None]:
        """
        Wrap the writing of a checkpoint, the deletion of older ones included; a seam for subclasses.

        Args:
            folder (`Path`):
                The checkpoint.

        Returns:
            `AbstractContextManager`: entered and left by all processes.
        """
        return contextlib.nullcontext()

    def set_tokens_trained(self, count: int) -> None:
        """
        Go on counting tokens from here; TRL (trl/trainer/sft_trainer.py, 1.16, line 1215) starts a resumed run at 0.

        Args:
            count (`int`):
                Tokens so far.
        """
        self._total_train_tokens = count


class LengthOrder(LengthGroupedSampler):
    """
    `LengthGroupedSampler` whose order is a pure function of lengths, seed and epoch.

    That of transformers (5.23) shuffles with each process's global random numbers. Dropout on the CPU takes as many of
    them as a process's batches are long: from the second epoch on, two processes shared out two different orders, and
    a quarter of the rows was never trained on. It also groups by the batch of one process, not by that of a step, so
    that the order changed with their number.

    Args:
        batch_size (`int`):
            Rows per step, of all processes.
        lengths (`np.ndarray` of shape `(rows,)`):
            Length of each row.
        seed (`int`):
            Seed.
    """

    def __init__(self, batch_size: int, lengths: np.ndarray, seed: int) -> None:
        super().__init__(batch_size, lengths=np.asarray(lengths), generator=torch.Generator())
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """
        Say which epoch it is; the trainer's data loader does.

        Args:
            epoch (`int`):
                Number of the epoch, from 0.
        """
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Yield the same rows as transformers' sampler would, without a Python number for each of them."""
        self.generator.manual_seed(self.seed + self.epoch)
        rows = torch.randperm(len(self.lengths), generator=self.generator).numpy()
        # transformers/trainer_pt_utils.py, 5.23, line 484.
        size = self.batch_size * max(1, min(len(rows) // (4 * self.batch_size), 50))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            rows[start : start + size] = part[np.argsort(-self.lengths[part], kind="stable")]
        # The longest row first, so that what does not fit fails at once.
        longest = size * int(np.argmax(self.lengths[rows[::size]]))
        rows[[0, longest]] = rows[[longest, 0]]
        for start in range(0, len(rows), size):
            yield from rows[start : start + size].tolist()


def _is_spread(model: torch.nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


@contextlib.contextmanager
def _only_answers_are_scored() -> Iterator[None]:
    """
    Let the loss skip positions without a label on the CPU as well.

    TRL does so on devices with Triton alone: on others a changing number of positions may recompile the graph
    (trl/trainer/utils.py, 1.16, `compact`), which is not so on a CPU. There, with answers of two tokens, all the other
    positions cost more than a third of a training step. Where TRL has no such switch, nothing is changed.
    """
    original = getattr(trl.trainer.utils, "_use_triton", None)
    if original is None:
        yield
        return
    trl.trainer.utils._use_triton = lambda device: device.type == "cpu" or original(device)
    try:
        yield
    finally:
        trl.trainer.utils._use_triton = original


def keep_weights_unpacked(model: torch.nn.Module) -> None:
    """
    Keep 4-bit weights in the form that can be trained through.

    On CPUs with AVX512-BF16, bitsandbytes (0.50) repacks them in place at the first forward pass in evaluation mode,
    rounds their scales, and from then on multiplies with a kernel that has no gradient: after the first evaluation,
    training went on with wrong gradients, without a word. Other models are left as they are.

    Args:
        model (`torch.nn.Module`):
            A model, possibly quantised.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def end_training(trainer: SFTTrainer) -> None:
    """
    Finish trackers and leave the process group.

    transformers has `Trainer.end` from 5.18 on; the floor is 5.17.

    Args:
        trainer (`SFTTrainer`):
            A trainer that is done.
    """
    getattr(trainer, "end", trainer.accelerator.end_training)()


def attention_implementation(model: torch.nn.Module) -> str | None:
    """
    Say which attention a model runs.

    transformers has no public getter (5.23, `PreTrainedConfig._attn_implementation`).

    Args:
        model (`torch.nn.Module`):
            A model, possibly wrapped by PEFT or DDP.

    Returns:
        `str` or `None`: `"sdpa"`, `"eager"`, `"flash_attention_2"`, ...
    """
    inner: Any = getattr(model, "module", model)
    config = getattr(inner, "config", None)
    return getattr(config, "_attn_implementation", None)


def row_index(dataset: Dataset) -> np.ndarray | None:
    """
    Say which rows of its table a data set shows.

    `datasets` has no public getter (5.2, `Dataset._indices`), and its `add_column` copies such a selection.

    Args:
        dataset (`Dataset`):
            A data set.

    Returns:
        `np.ndarray` or `None`: table rows in their order, `None` if they are all there in the table's own.
    """
    # As signed numbers: `Dataset.select` computes with them, and NumPy makes floats of unsigned ones.
    return None if dataset._indices is None else dataset._indices.column(0).to_numpy().astype(np.int64)


__all__ = [
    "ColumnKeepingSFTTrainer",
    "DataCollatorForLanguageModeling",
    "DataCollatorForVisionLanguageModeling",
    "LengthOrder",
    "attention_implementation",
    "end_training",
    "keep_weights_unpacked",
    "row_index",
]
