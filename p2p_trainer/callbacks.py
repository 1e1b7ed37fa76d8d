"""From trainer events to the evaluator."""

from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .data_collator import P2PDataCollator
from .evaluation import BackdoorEvaluator, EvaluationReport
from .evaluation.names import headline


class BackdoorEvalCallback(TrainerCallback):
    """
    Measures clean accuracy and attack success rate whenever the trainer evaluates.

    The numbers get the prefix `eval_` (`eval_ca`, `eval_asr`, `eval_asr_floor`, `eval_asr_badnets`, ...). They reach
    the loggers, the dictionary that `evaluate` returns, and `metric_for_best_model`. [`P2PTrainer`] adds this callback
    itself; with another trainer, add it before callbacks that read the metrics, such as `EarlyStoppingCallback`.

    Args:
        evaluator ([`~evaluation.BackdoorEvaluator`], *optional*):
            What to measure; without one nothing is.
        trainer (`Trainer`, *optional*):
            Trainer through which the numbers are logged; without one they are only returned.
        prefix (`str`, *optional*, defaults to `"eval"`):
            Prefix of the metrics.

    Examples:

    ```python
    callback = BackdoorEvalCallback(evaluator)
    trainer = SFTTrainer(..., callbacks=[callback])
    callback.trainer = trainer
    ```
    """

    def __init__(
        self, evaluator: BackdoorEvaluator | None = None, trainer: Trainer | None = None, prefix: str = "eval"
    ) -> None:
        self.evaluator = evaluator
        self.trainer = trainer
        self.prefix = prefix
        self.report: EvaluationReport | None = None
        # What was measured last, and at which step of a training run; outside one, weights may change without a step.
        self._measured: tuple[BackdoorEvaluator, int] | None = None
        self._training = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training, self._measured = True, None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training = False

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        if self.evaluator is None:
            return
        # With several evaluation sets this event comes once for each; the weights are the same.
        now = (self.evaluator, state.global_step)
        if self.report is None or not self._training or self._measured != now:
            self.report = self.evaluator.evaluate(model)
            # TRL's `log` sorts by the model's mode; the evaluation that called us left it in evaluation mode.
            if self.trainer is not None:
                shown = headline(self.report.metrics, self.evaluator.attack_names)
                self.trainer.log({f"{self.prefix}_{key}": value for key, value in shown.items()})
            self._measured = now
        metrics.update({f"{self.prefix}_{key}": value for key, value in self.report.metrics.items()})


class EpochCallback(TrainerCallback):
    """
    Tells the collator which epoch it is, before that epoch's first batch is fetched.

    Args:
        collator ([`P2PDataCollator`]):
            The collator.
    """

    def __init__(self, collator: P2PDataCollator) -> None:
        self.collator = collator

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # In the middle of an epoch, where a checkpoint may stand, the number has a fraction.
        self.collator.set_epoch(int(state.epoch or 0))
