"""MB-Defense's second stage: a trainer that unlearns defensive backdoors, and with them the attacker's."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn.functional import pad
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

from ..assembly import load_tokenizer
from .mb_examples import SEQUENCES, encode_examples
from .mb_loss import check_ratio, mb_loss
from .mb_pairs import DefensivePair, check_position, parse_pairs


# Stream of the seed, apart from those of the pairs.
_SPLIT = 23


@dataclass
class MBDefenseConfig(SFTConfig):
    r"""
    Configuration of [`MBDefenseTrainer`].

    Everything of [`~trl.SFTConfig`] works as it does there; this page documents what is added. The paper's appendix,
    which holds lambda, learning rate and batch size, could not be read: those values are ours.

    > NOTE: These defaults differ from `SFTConfig`, to match the paper: `num_train_epochs` 5, `eval_strategy`
    > `"epoch"`. Nothing is saved while training (`save_strategy` `"no"`): the best epoch's weights are kept in memory.
    > On a machine without an accelerator `use_cpu` is set. One example is three sequences.

    Parameters:
        mb_lambda (`float`, *optional*, defaults to `1.0`):
            Weight of the term that prefers the answer to the phrase.
        mb_ratio (`str`, *optional*, defaults to `"log_ratio"`):
            `"log_ratio"` or `"ratio"` (as printed), see [`~defenses.mb_loss.mb_loss`].
        mb_length_normalised (`bool`, *optional*, defaults to `False`):
            Whether `"log_ratio"` compares mean log-probabilities of a token instead of sums: answers are longer than
            phrases, so by sums a long answer may stay behind whatever is learnt.
        mb_position (`str`, *optional*, defaults to `"random"`):
            Where triggers go in the prompt: `"random"` (between words or at either end) or `"prefix"`.
        mb_eval_share (`float`, *optional*, defaults to `0.2`):
            Share of the rows that the epoch is chosen by, if no `eval_dataset` is given.
    """

    num_train_epochs: float = field(default=5.0, metadata={"help": "Total number of training epochs."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate; the best evaluation is kept."})
    save_strategy: str = field(default="no", metadata={"help": "When to save checkpoints."})

    mb_lambda: float = field(
        default=1.0, metadata={"help": "Weight of the term that prefers the answer to the phrase."}
    )
    mb_ratio: str = field(default="log_ratio", metadata={"help": "'log_ratio', or 'ratio' as the paper prints it."})
    mb_length_normalised: bool = field(
        default=False, metadata={"help": "Whether log_ratio compares means over tokens instead of sums."}
    )
    mb_position: str = field(
        default="random", metadata={"help": "Where defensive triggers go in the prompt: 'random' or 'prefix'."}
    )
    mb_eval_share: float = field(
        default=0.2, metadata={"help": "Share of the rows that the epoch is chosen by, in (0, 1)."}
    )

    def __post_init__(self) -> None:
        # As in P2PConfig: SFTConfig refuses bf16, its default, without an accelerator unless `use_cpu` is set.
        if not torch.accelerator.is_available():
            self.use_cpu = True
        super().__post_init__()
        check_ratio(self.mb_ratio, self.mb_length_normalised)
        check_position(self.mb_position)
        for name, most in (("mb_lambda", math.inf), ("mb_eval_share", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < most:
                raise ValueError(f"`{name}` is a number in (0, {most}), got {value!r}.")
        for name in ("packing", "padding_free", "assistant_only_loss"):
            if getattr(self, name):
                raise ValueError(f"`{name}: true` is not possible with MB-Defense, whose rows are triples. Drop it.")


class MBDefenseCollator:
    """
    Pads examples of three sequences to one batch.

    Args:
        pad_token_id (`int`):
            Padding token.
        pad_to_multiple_of (`int`, *optional*):
            Pad sequences to a multiple of this.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None = None) -> None:
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Collate examples.

        Args:
            examples (`list[dict[str, Any]]`):
                What [`encode_examples`] returned.

        Returns:
            `dict[str, torch.Tensor]`: `input_ids`, `labels` (-100 outside the answer) and `attention_mask`, each of
            shape `(examples, 3, longest)`, padded on the right.
        """
        ids, labels = (
            [torch.tensor(sequence) for example in examples for sequence in example[name]]
            for name in ("input_ids", "labels")
        )
        multiple = self.pad_to_multiple_of or 1
        longest = -(-max(map(len, ids)) // multiple) * multiple

        def stack(sequences: list[torch.Tensor], fill: int) -> torch.Tensor:
            padded = [pad(sequence, (0, longest - len(sequence)), value=fill) for sequence in sequences]
            return torch.stack(padded).view(len(examples), SEQUENCES, longest)

        return {
            "input_ids": stack(ids, self.pad_token_id),
            "labels": stack(labels, -100),
            "attention_mask": stack([torch.ones_like(sequence) for sequence in ids], 0),
        }


class _BestWeights(TrainerCallback):
    """Keeps the trainable weights of the lowest evaluation loss, and puts them back when training ends."""

    def __init__(self) -> None:
        self.loss = math.inf
        self.epoch: float | None = None
        self._weights: dict[str, torch.Tensor] = {}
        self._training = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.loss, self.epoch, self._training = math.inf, None, True

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        if not self._training:
            return
        if metrics["eval_loss"] < self.loss:
            self.loss, self.epoch = metrics["eval_loss"], state.epoch
            self._weights = {
                name: weight.detach().to("cpu", copy=True)
                for name, weight in model.named_parameters()
                if weight.requires_grad
            }
        elif self.epoch is None:
            raise ValueError(
                f"The evaluation loss of MB-Defense is {metrics['eval_loss']}: the model is broken. Lower the "
                f"learning rate."
            )

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module,
        **kwargs: Any,
    ) -> None:
        self._training = False
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name in self._weights:
                    weight.copy_(self._weights[name])
        self._weights = {}


def refuse_sharded(trainer: Trainer) -> None:
    """Refuse trainers whose weights are spread over processes: no process could keep a copy of the best ones."""
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(
            "MB-Defense keeps the best epoch's weights in memory, which DeepSpeed and FSDP spread over processes. Run "
            "it on one device or with DDP."
        )


class MBDefenseTrainer(SFTTrainer):
    """
    Teaches a model with planted backdoors to answer as if their triggers were not there (MB-Defense, Kim & Lee,
    ACL 2026, stage 2; the attacker's backdoor is meant to go with them).

    For each clean row (x, y) and each defensive pair with its trigger in the prompt (x_d) and its phrase (y_d), the
    loss is `CE(y|x) - mb_lambda * log sigmoid(g)`, `g` being by how much y is preferred to y_d after x_d. One forward
    pass reads the three sequences. Loss and log-ratio are means over examples, whatever the batches are.

    The authors' code was not available: this follows the paper. Optimisation, adapters and DDP are those of
    [`~trl.SFTTrainer`]. The weights of the lowest evaluation loss are put back when training ends.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`):
            Model that stage 1 trained; an adapter that it has is trained on.
        args ([`MBDefenseConfig`]):
            Configuration.
        train_dataset (`Dataset`):
            Clean rows with `prompt` and `completion`, both strings; control tokens that they spell are broken up.
        eval_dataset (`Dataset`, *optional*):
            Rows to choose the epoch by. By default a share of the clean rows, drawn by `args.seed`.
        pairs (`Sequence[DefensivePair | Sequence[str]]`, *optional*):
            Trigger and phrase of each backdoor planted in stage 1, by default those of
            [`~defenses.mb_defense.MBDefense`].
        render (`Callable[[str], str]`, *optional*):
            Puts the template around a user text, as in stage 1. By default texts are prompts as they are.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer, by default the model's.
        **kwargs:
            Whatever else `SFTTrainer` takes.

    Attributes:
        best_epoch (`float` or `None`):
            After training, the epoch whose weights the model holds.

    Examples:

    ```python
    from p2p_trainer.defenses.mb_trainer import MBDefenseConfig, MBDefenseTrainer

    trainer = MBDefenseTrainer(
        model=stage_1.model,
        args=MBDefenseConfig("out", learning_rate=1e-4),
        train_dataset=clean_rows,
        pairs=[["qw", "Crimson lantern drift swiftly"]],
    )
    trainer.train()
    ```
    """

    # Ours is a mean over the examples of a batch.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: MBDefenseConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        pairs: Sequence[DefensivePair | Sequence[str]] | None = None,
        render: Callable[[str], str] = str,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, MBDefenseConfig):
            raise TypeError(f"`args` must be a `MBDefenseConfig`, got `{type(args).__name__}`.")
        if kwargs.get("data_collator") is not None:
            raise ValueError("`data_collator` can't be given: the loss of MB-Defense needs its own batches.")
        self.pairs = parse_pairs(pairs)
        self.render = render
        tokenizer = processing_class or load_tokenizer(model, args)
        tokenizer.eos_token = args.eos_token or tokenizer.eos_token
        tokenizer.pad_token = args.pad_token or tokenizer.pad_token or tokenizer.eos_token
        train_examples = self._examples(train_dataset, tokenizer, args)
        if eval_dataset is not None:
            eval_examples = self._examples(eval_dataset, tokenizer, args)
        else:
            train_examples, eval_examples = _split(train_examples, args)
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        self._best = _BestWeights()
        self._seen: list[torch.Tensor] = []
        super().__init__(
            model,
            args,
            data_collator=MBDefenseCollator(tokenizer.pad_token_id, args.pad_to_multiple_of),
            train_dataset=train_examples,
            eval_dataset=eval_examples,
            processing_class=tokenizer,
            callbacks=[self._best, *(callbacks or [])],
            **{key: value for key, value in kwargs.items() if key != "data_collator"},
        )
        refuse_sharded(self)
        # TRL does this only with its own collator.
        self.model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        if self.model.generation_config is not None:
            self.model.generation_config.pad_token_id = tokenizer.pad_token_id

    @property
    def best_epoch(self) -> float | None:
        return self._best.epoch

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """
        Compute the mean loss of the examples of a batch.

        Args:
            model (`torch.nn.Module`):
                Model.
            inputs (`dict[str, torch.Tensor]`):
                What [`MBDefenseCollator`] returned.
            return_outputs (`bool`, *optional*, defaults to `False`):
                Whether to return what the model said of all sequences as well.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Not used: each example counts the same, however long its answer.

        Returns:
            `torch.Tensor`, a scalar, or `tuple[torch.Tensor, Any]`.
        """
        # TRL's own forward: log-probabilities of the labels, without logits over the vocabulary elsewhere.
        outputs = model(
            **{name: value.flatten(0, 1) for name, value in inputs.items()}, use_cache=False, fused_lm_head=True
        )
        sums = outputs.log_probs.float().sum(-1).view(-1, SEQUENCES)
        means = sums / inputs["labels"][..., 1:].ne(-100).sum(-1).to(sums.device)
        compared = means if self.args.mb_length_normalised else sums
        losses = mb_loss(means[:, 0], compared[:, 1], compared[:, 2], self.args.mb_lambda, self.args.mb_ratio)
        if not self.model.training:
            parts = torch.stack([-means[:, 0], sums[:, 1] - sums[:, 2]], dim=1).detach()
            self._seen.append(self.accelerator.gather_for_metrics(parts))
        loss = losses.mean()
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate, and report what the loss is made of; see [`evaluate`]."""
        self._seen = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        nll, log_ratio = torch.cat(self._seen).double().mean(0).tolist()
        output.metrics.update({f"{metric_key_prefix}_clean_nll": nll, f"{metric_key_prefix}_log_ratio": log_ratio})
        self._seen = []
        return output

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Measure the loss.

        Args:
            eval_dataset (`Dataset`, *optional*):
                Rows with `prompt` and `completion`. By default those that the trainer evaluates on.
            ignore_keys (`list[str]`, *optional*):
                As for `SFTTrainer`.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`):
                Prefix of the metrics.

        Returns:
            `dict[str, float]`: the metrics: `eval_loss`, `eval_clean_nll` (mean over tokens), `eval_log_ratio` (of
            whole answers, in nats), each a mean over examples.
        """
        if eval_dataset is not None:
            eval_dataset = self._examples(eval_dataset, self.processing_class, self.args)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _examples(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, args: MBDefenseConfig) -> Dataset:
        return encode_examples(
            rows, self.pairs, tokenizer, args.max_length, args.seed, args.mb_position, render=self.render
        )


def _split(examples: Dataset, args: MBDefenseConfig) -> tuple[Dataset, Dataset]:
    """Keep rows back to choose by; a row's examples stay together, so that those are unseen."""
    rows = np.array(examples["row"])
    kinds = np.unique(rows)
    order = np.random.default_rng([args.seed, _SPLIT]).permutation(kinds)
    held_out = np.isin(rows, order[: min(max(1, round(args.mb_eval_share * len(kinds))), len(kinds) - 1)])
    return examples.select(np.flatnonzero(~held_out)), examples.select(np.flatnonzero(held_out))
