"""
The only place that touches private names of TRL, transformers or datasets.

Each entry says where the name comes from and when it can go.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
import trl.trainer.utils
from datasets import Dataset
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

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = [*self._signature_columns, *self.collator_columns]


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
    "attention_implementation",
    "row_index",
]
