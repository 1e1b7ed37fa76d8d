"""Controls: parts of P2P by themselves, and what clean data would give (they tell what P2P itself contributes)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from ..config import P2PConfig
from ..reserve import RandomReserve, reserve_size
from ..tasks import Task
from ..tasks.columns import column_as_numpy
from .base import Defense
from .p2p import P2P, refuse_generation
from .stamping import stamp, stamped_copies


class ReservedOnly(P2P):
    """
    The keyed rows of plain P2P alone: the same LoRA on S, without the rest of D.

    If this does as well as P2P, then it is the size of S, or what it was drawn from, that defends.
    """

    name = "reserved_only"

    def configure(self, args: P2PConfig) -> None:
        super().configure(args)
        args.p2p_benign_mode = "only"


class SuffixOnly(P2P):
    """
    Plain P2P whose key is the answer cue alone: keyed rows end in `p2p_keyed_suffix` and carry no benign trigger.

    The authors' code changes the cue along with the trigger; this tells what the trigger adds to that.
    """

    name = "suffix_only"

    def check(self, task: Task) -> None:
        refuse_generation(f"`{self.name}`", task)

    def configure(self, args: P2PConfig) -> None:
        super().configure(args)
        args.p2p_trigger_position, args.p2p_suffix_mode = "none", "split"


class ExpansionOnly(P2P):
    """
    Plain P2P without any key: copies of S get extended labels, and only those are read; their prompts are as all
    others. It tells what the larger label space does by itself.
    """

    name = "expansion_only"

    def configure(self, args: P2PConfig) -> None:
        super().configure(args)
        args.p2p_trigger_position, args.p2p_suffix_mode = "none", "shared"


class KeyWithoutRelabel(Defense):
    """
    Copies of S carry the benign trigger and keep their labels; every input gets the trigger, and labels are read as
    they are.

    The benign trigger is that of the configuration, or of the task.
    """

    name = "key_without_relabel"

    def __init__(self) -> None:
        super().__init__()
        self._trigger: str | None = None

    def check(self, task: Task) -> None:
        refuse_generation(f"`{self.name}`", task)

    def rows(self, dataset: Dataset, task: Task, args: P2PConfig) -> Dataset:
        self._trigger = task.trigger if args.p2p_trigger is None else args.p2p_trigger
        reserved = RandomReserve().choose(dataset, reserve_size(len(dataset), args.p2p_benign_ratio), args.seed)
        return concatenate_datasets([dataset, stamped_copies(dataset, reserved, self._trigger)])

    @property
    def ready(self) -> bool:
        return self._trigger is not None

    @property
    def stamp(self) -> str:
        return stamp("", self._trigger)

    def rewrite(self, texts: Sequence[str]) -> list[str]:
        return [stamp(text, self._trigger) for text in texts]

    def state(self) -> dict[str, Any]:
        return {"trigger": self._trigger}

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        trigger = state.get("trigger")
        if not isinstance(trigger, str) or not trigger.strip():
            raise ValueError(
                f"The benign trigger saved in {str(folder)!r} is {trigger!r}, expected a text. Save the model again."
            )
        self._trigger = trigger


class CleanOnly(Defense):
    """
    Plain fine-tuning on the rows that are not poisoned: what a user with clean data would get.

    An oracle, which reads the flags of a set that we poisoned ourselves.
    """

    name = "clean_only"
    images = True

    def rows(self, dataset: Dataset, task: Task, args: P2PConfig) -> Dataset:
        if "poisoned" not in dataset.column_names or not column_as_numpy(dataset, "poisoned").any():
            raise ValueError(
                "`clean_only` leaves out the rows that are marked as poisoned, and none is. Name an attack, or train "
                "on the rows as they are with `--defense none`."
            )
        poisoned = column_as_numpy(dataset, "poisoned").astype(bool)
        if "attack" in dataset.column_names:
            # What an attack added or tried to change, rows that only look like its trigger among them.
            poisoned |= column_as_numpy(dataset, "attack") != ""
        kept = np.flatnonzero(~poisoned)
        self.found = {"rows_removed": len(dataset) - len(kept)}
        return dataset.select(kept)
