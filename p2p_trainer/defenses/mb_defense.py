"""MB-Defense: plant backdoors beside the attacker's, then unlearn them all through ours."""

import dataclasses
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset

from ..config import P2PConfig
from ..tasks import Task
from ..tasks.columns import column_as_numpy
from ..trainer import P2PTrainer
from .base import Defense
from .mb_examples import SEQUENCES, choose_rows
from .mb_loss import check_ratio
from .mb_pairs import check_absent, check_disjoint, check_position, insert_trigger, parse_pairs, plant
from .mb_trainer import MBDefenseConfig, MBDefenseTrainer, refuse_sharded
from .runs import drop_training_state
from .workbench import Workbench


logger = logging.getLogger(__name__)

# Folder of the model between the stages, beside the final one.
STAGE_1 = "stage1"

# Stream of the seed, apart from those of pairs and trainer.
_CLEAN = 24


class MBDefense(Defense):
    """
    Plants backdoors beside the attacker's, then unlearns them, and his with them (MB-Defense, Kim & Lee, ACL 2026,
    arXiv 2601.04448). For generation tasks.

    Stage 1: each defensive pair, a rare word and a phrase of random words, replaces 1 % of the training rows, drawn
    among all: the prompt keeps its text and gets the word, the answer is the phrase. All is trained as usual. Stage 2
    trains on a few clean validation rows, see [`~defenses.mb_trainer.MBDefenseTrainer`]: with and without the words,
    the model is to answer the truth.

    The authors' code was not available. From the paper: T = 4 pairs, 1 % each, 128 clean rows, of which a fifth
    chooses among 5 epochs. Not readable, so ours: lambda, learning rate and batch size of stage 2, where in the prompt
    the trigger goes, and two of the default pairs (`vx`, `zk`; `qw` and `jh` are published). We compare
    log-probabilities where the paper prints a ratio of probabilities, see [`~defenses.mb_loss.mb_loss`]. Triggers that
    collide with a measured attack's are an error, and so are phrases that could be taken for its payload; the
    published `mn` and `bb` are usual triggers of BadNets. The model that stage 1 leaves is saved to `stage1` in the
    output folder until stage 2 has ended.

    Args:
        pairs (`list[list[str]]` or `None`, *optional*):
            Trigger and phrase of each pair; `None` for `mb_pairs.DEFAULT_PAIRS`.
        share (`float`, *optional*, defaults to `0.01`):
            Share of the training rows that each pair replaces.
        position (`str`, *optional*, defaults to `"random"`):
            Where triggers go in the prompt, in both stages: `"random"` (between words or at either end) or `"prefix"`.
        clean_rows (`int`, *optional*, defaults to `128`):
            Validation rows for stage 2, drawn among those that fit into `max_length`; all of them, with a warning, if
            there are fewer.
        lam (`float`, *optional*, defaults to `1.0`):
            Weight of the term of stage 2 that prefers the answer to the phrase.
        ratio (`str`, *optional*, defaults to `"log_ratio"`):
            `"log_ratio"` or `"ratio"` (as printed).
        length_normalised (`bool`, *optional*, defaults to `False`):
            Whether `"log_ratio"` compares mean log-probabilities of a token instead of sums.
        learning_rate (`float` or `None`, *optional*):
            Learning rate of stage 2, by default the run's.
        epochs (`int`, *optional*, defaults to `5`):
            Epochs of stage 2, of which the one with the lowest loss on its validation part is kept.
        batch_size (`int`, *optional*, defaults to `8`):
            Examples per step and device in stage 2; each is three sequences.

    Examples:

    ```python
    >>> from p2p_trainer.defenses import get_defense

    >>> defense = get_defense("mb_defense", pairs=[["qw", "crimson lantern drift"], ["jh", "silent frost zigzag"]])
    ```
    """

    name = "mb_defense"
    needs_validation = True
    resumable = False

    def __init__(
        self,
        pairs: list[list[str]] | None = None,
        share: float = 0.01,
        position: Literal["random", "prefix"] = "random",
        clean_rows: int = 128,
        lam: float = 1.0,
        ratio: Literal["log_ratio", "ratio"] = "log_ratio",
        length_normalised: bool = False,
        learning_rate: float | None = None,
        epochs: int = 5,
        batch_size: int = 8,
    ) -> None:
        super().__init__()
        self._pairs = parse_pairs(pairs)
        check_position(position)
        check_ratio(ratio, length_normalised)
        for name, value, least in (
            ("clean_rows", clean_rows, 2),
            ("epochs", epochs, 1),
            ("batch_size", batch_size, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` is a whole number, {least} at least, got {value!r}.")
        rate = 1.0 if learning_rate is None else learning_rate
        for name, value, most in (("share", share, 1), ("lam", lam, math.inf), ("learning_rate", rate, math.inf)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < most:
                raise ValueError(f"`{name}` is a number in (0, {most}), got {value!r}.")
        if share * len(self._pairs) > 1:
            raise ValueError(f"`share` {share} for each of {len(self._pairs)} pairs is more than all rows. Lower it.")
        self.pairs = pairs if pairs is None else [[pair.trigger, pair.phrase] for pair in self._pairs]
        self.share = share
        self.position = position
        self.clean_rows = clean_rows
        self.lam = lam
        self.ratio = ratio
        self.length_normalised = length_normalised
        self.learning_rate = learning_rate
        self.epochs = epochs
        self.batch_size = batch_size
        self._clean: Dataset | None = None
        self.found["pairs"] = [[pair.trigger, pair.phrase] for pair in self._pairs]

    def check(self, task: Task) -> None:
        if task.num_labels:
            raise ValueError(
                f"`mb_defense` can't serve task {task.name!r}: its backdoors answer phrases, and the answers of a "
                f"classification task, its {task.num_labels} label words, have no room for them. Take another "
                f"defense, or a generation task."
            )

    def rows(self, dataset: Dataset, task: Task, args: P2PConfig) -> Dataset:
        columns = task.input_column, task.output_column
        check_absent(self._pairs, dataset, columns[0], round(self.share * len(dataset)))
        rows, planted = plant(dataset, self._pairs, self.share, columns, args.seed, self.position)
        self.found["rows_replaced"] = int(np.count_nonzero(planted >= 0))
        poisoned = column_as_numpy(dataset, "poisoned").astype(bool) if "poisoned" in dataset.column_names else None
        if poisoned is not None and poisoned.any():
            self.found["rows_replaced_poisoned"] = int(np.count_nonzero(poisoned[planted >= 0]))
        return rows

    def build(self, bench: Workbench) -> P2PTrainer:
        check_disjoint(self._pairs, bench.attacks)
        if any(attack.rows_unknown for attack in bench.attacks):
            self.found.pop("rows_replaced_poisoned", None)
        rows = 0 if bench.validation is None else len(bench.validation)
        if rows < 2:
            raise ValueError(
                f"`mb_defense` needs clean validation rows, {self.clean_rows} as a rule and two at least; found "
                f"{rows}. Give the data a validation split."
            )
        if bench.args.p2p_chat:
            raise ValueError(
                "`p2p_chat: true` is not possible with `mb_defense`: stage 2 renders prompts with the template of the "
                "task. Set it to false."
            )
        # What stage 2 would refuse has to show before stage 1 is trained.
        args = self._stage_2(bench.args)
        trainer = super().build(bench)
        refuse_sharded(trainer)
        order = np.random.default_rng([bench.args.seed, _CLEAN]).permutation(rows).tolist()
        self._clean = choose_rows(
            bench.validation, order, self.clean_rows, self._pairs, trainer.processing_class, args.max_length,
            args.seed, self.position, _render(trainer),
        )  # fmt: skip
        if len(self._clean) < self.clean_rows:
            logger.warning(
                "MB-Defense: only %d clean validation rows of %d fit, not %d.", len(self._clean), rows, self.clean_rows
            )
        return trainer

    def train(self, trainer: P2PTrainer, bench: Workbench) -> P2PTrainer:
        bench.train(trainer)
        # If stage 2 breaks the model, hours of training are not lost. Not for the hub, hence `True`.
        folder = str(Path(bench.args.output_dir) / STAGE_1)
        trainer.save_model(folder, True)
        drop_training_state(trainer)
        second = MBDefenseTrainer(
            trainer.model,
            args=self._stage_2(bench.args),
            train_dataset=self._clean,
            pairs=self._pairs,
            render=_render(trainer),
            processing_class=trainer.processing_class,
        )
        try:
            bench.train(second)
        except ValueError as error:
            raise ValueError(f"{error} The model of stage 1 is saved in {folder!r}.") from error
        drop_training_state(second)
        if trainer.args.should_save:
            # It holds all backdoors, and would go wherever the output folder goes.
            shutil.rmtree(folder)
        # An example is three sequences, of which the bench has counted one.
        bench.row_passes += (SEQUENCES - 1) * len(second.train_dataset) * self.epochs
        evaluations = [entry for entry in second.state.log_history if "eval_loss" in entry]
        # Their time is part of the training time.
        self.compute.preparation_passes += SEQUENCES * len(second.eval_dataset) * len(evaluations)
        self.found |= {
            "clean_rows": len({*second.train_dataset["row"], *second.eval_dataset["row"]}),
            "eval_loss": [entry["eval_loss"] for entry in evaluations],
            "eval_clean_nll": [entry["eval_clean_nll"] for entry in evaluations],
            "eval_log_ratio": [entry["eval_log_ratio"] for entry in evaluations],
            "epoch_kept": round(second.best_epoch),
        }
        return trainer

    def probes(self) -> dict[str, tuple[str | Callable[[str], str], str]]:
        # In the middle of the prompt, or at its start: where stage 1 may have put it.
        return {
            pair.trigger: (lambda text, word=pair.trigger: insert_trigger(text, word, 0.5, self.position), pair.phrase)
            for pair in self._pairs
        }

    def _stage_2(self, args: P2PConfig) -> MBDefenseConfig:
        fields = {field.name for field in dataclasses.fields(MBDefenseConfig) if field.init}
        # `to_dict` hides whatever ends so, `eos_token` as well; the tokenizer of stage 1 has them already.
        settings = {
            name: value for name, value in args.to_dict().items() if name in fields and not name.endswith("_token")
        }
        changes: dict[str, Any] = {
            "num_train_epochs": self.epochs,
            "max_steps": -1,
            "learning_rate": self.learning_rate or args.learning_rate,
            "per_device_train_batch_size": self.batch_size,
            "per_device_eval_batch_size": self.batch_size,
            "gradient_accumulation_steps": 1,
            # A number of steps was meant for stage 1, which is much longer.
            "warmup_steps": args.warmup_steps if args.warmup_steps < 1 else 0,
            "train_sampling_strategy": "random",
            "eval_strategy": "epoch",
            "save_strategy": "no",
            "load_best_model_at_end": False,
            "metric_for_best_model": None,
            "greater_is_better": None,
            "eval_on_start": False,
            "eval_delay": 0,
            "push_to_hub": False,
            # The model is there, with its chat template.
            "model_init_kwargs": None,
            "chat_template_path": None,
            "packing": False,
            "padding_free": False,
            "assistant_only_loss": False,
            "mb_lambda": self.lam,
            "mb_ratio": self.ratio,
            "mb_length_normalised": self.length_normalised,
            "mb_position": self.position,
        }
        return MBDefenseConfig(**{**settings, **changes})


def _render(trainer: P2PTrainer) -> Callable[[str], str]:
    """Put around a text what stood around it in stage 1."""
    head, tail = trainer.encoder.format.parts(keyed=False)
    return lambda text: head + text.strip() + tail
