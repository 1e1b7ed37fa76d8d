"""BackdoorEvalCallback: what it measures reaches the log, the caller and the choice of a checkpoint."""

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState
from trl import SFTTrainer

from p2p_trainer import BackdoorEvalCallback, BackdoorEvaluator, P2PTrainer, get_attack
from p2p_trainer.callbacks import EpochCallback
from p2p_trainer.evaluation import EvaluationReport
from p2p_trainer.immunizer import Immunizer
from tests.corpora import clean_rows, inside, poisoned
from tests.tiny_runs import TASK, adapter, config, lora, losses, plain_config


def test_evaluation_reaches_the_log_and_the_caller(tiny_model, toy_rows, toy_eval, tmp_path):
    named = toy_eval.map(lambda row: {"label": TASK.labels[row["label"]]}, features=None, remove_columns="label")
    trainer = P2PTrainer(
        tiny_model,
        config(tmp_path),
        train_dataset=toy_rows,
        eval_dataset=named,
        task=TASK,
        attacks=[get_attack("badnets", target="positive"), get_attack("addsent", target="positive")],
        peft_config=lora(),
    )
    metrics = trainer.evaluate()
    direct = BackdoorEvaluator(toy_eval, TASK, trainer.encoder, [get_attack("badnets", target="positive")])
    expected = direct(trainer.model)
    assert metrics["eval_ca"] == expected["ca"] and metrics["eval_ca_n"] == 40
    assert metrics["eval_asr_badnets"] == expected["asr"] and metrics["eval_asr_badnets_n"] == 20
    assert metrics["eval_asr"] == max(metrics["eval_asr_badnets"], metrics["eval_asr_addsent"])
    assert "eval_loss" in metrics
    (logged,) = [entry for entry in trainer.state.log_history if "eval_ca" in entry]
    # Other rows, other prefix: the numbers are theirs.
    half = trainer.evaluate(named.select(range(20)), metric_key_prefix="half")
    assert half["half_ca_n"] == 20 and half["half_asr_badnets_n"] == 10 and "half_loss" in half
    assert trainer.evaluate()["eval_ca_n"] == 40
    shown = {"eval_ca", "eval_asr", "eval_asr_floor", "eval_asr_excess", "eval_asr_addsent", "eval_asr_floor_badnets"}
    assert shown <= logged.keys() and not [key for key in logged if key.endswith(("_k", "_n", "_ci_low", "_ci_high"))]


def test_callback_serves_another_trainer_and_measures_once_per_step(tiny_model, toy_rows, toy_eval, tmp_path):
    calls = []
    encoder = P2PTrainer(tiny_model, config(tmp_path), train_dataset=toy_rows, task=TASK).encoder
    evaluator = BackdoorEvaluator(toy_eval, TASK, encoder)
    callback = BackdoorEvalCallback(evaluator)
    evaluator_evaluate = evaluator.evaluate
    evaluator.evaluate = lambda model: calls.append(model.training) or evaluator_evaluate(model)
    rows = Dataset.from_list([{"text": row["text"]} for row in toy_eval])
    trainer = SFTTrainer(
        tiny_model,
        plain_config(tmp_path, eval_strategy="steps", eval_steps=1, max_steps=2),
        train_dataset=rows,
        eval_dataset={"one": rows, "two": rows},
        callbacks=[callback],
    )
    callback.trainer = trainer
    trainer.train()
    assert len(calls) == 2
    assert len([entry for entry in trainer.state.log_history if "eval_ca" in entry]) == 2
    # Outside of training, weights may change without a step: measured anew each time.
    trainer.evaluate(rows)
    trainer.evaluate(rows)
    assert len(calls) == 4


def test_best_checkpoint_is_the_epoch_with_the_lowest_asr(tiny_model, toy_rows, toy_eval, tmp_path, monkeypatch):
    rates = iter([0.5, 0.25, 0.75, 0.0])
    evaluate = BackdoorEvaluator.evaluate

    def scripted(self, model):
        report = evaluate(self, model)
        return EvaluationReport({**report.metrics, "asr": next(rates)}, report.counts, report.confidence)

    monkeypatch.setattr(BackdoorEvaluator, "evaluate", scripted)
    trainer = P2PTrainer(
        tiny_model,
        config(
            tmp_path,
            num_train_epochs=4,
            eval_strategy="epoch",
            save_strategy="epoch",
            metric_for_best_model="eval_asr",
            greater_is_better=False,
            load_best_model_at_end=True,
        ),
        train_dataset=toy_rows,
        eval_dataset=toy_eval,
        task=TASK,
        attacks=[get_attack("badnets", target=1)],
        peft_config=lora(),
        # Stops after the first epoch that is no better: a user's callback sees our metrics.
        callbacks=[EarlyStoppingCallback(1)],
    )
    trainer.train()
    logged = [entry["eval_asr"] for entry in trainer.state.log_history if "eval_asr" in entry]
    assert logged == [0.5, 0.25, 0.75]
    assert trainer.state.best_metric == 0.25
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-26")
    best = load_file(tmp_path / "checkpoint-26" / "adapter_model.safetensors")
    weights = adapter(trainer)
    assert weights.keys() == best.keys() and all(torch.equal(best[name], weights[name]) for name in best)


@pytest.mark.parametrize(
    ("reached", "epoch"), [(None, 0), (0, 0), (8 / 13, 0), (1.0, 1), (1 + 12 / 13, 1), (2 + 1 / 3, 2)]
)
def test_the_collator_is_told_the_epoch(tmp_path, reached, epoch):
    told = []

    class Collator:
        def set_epoch(self, epoch):
            told.append(epoch)

    EpochCallback(Collator()).on_epoch_begin(config(tmp_path), TrainerState(epoch=reached), TrainerControl())
    assert told == [epoch] and type(told[0]) is int


def test_a_resumed_run_is_immunized_as_an_uninterrupted_one(tiny_model, tmp_path, monkeypatch):
    rows, _ = poisoned(clean_rows(200, noise=0.0), inside("cf"), 1, 30)
    epochs = []
    write = Immunizer.write

    def seen(self, text, row, epoch):
        epochs.append(epoch)
        return write(self, text, row, epoch)

    monkeypatch.setattr(Immunizer, "write", seen)

    def trainer(**changes):
        settings = config(
            tmp_path, num_train_epochs=2, per_device_train_batch_size=16, save_strategy="steps", save_steps=5,
            p2p_benign_mode="only", p2p_benign_ratio=0.5, **changes,
        )  # fmt: skip
        return P2PTrainer(
            tiny_model,
            settings,
            train_dataset=Dataset.from_list(rows),
            task=TASK,
            peft_config=lora(lora_dropout=0.5),
        )

    whole = trainer()
    assert whole.immunizer is not None and [str(found) for found in whole.screening.triggers] == ["cf"]
    whole.train()
    steps = whole.state.global_step // 2
    assert 6 <= steps <= 9 and len(losses(whole)) == 2 * steps
    assert set(epochs) == {0, 1} and epochs == sorted(epochs)
    # In the middle of the first epoch, and of the second.
    for checkpoint, first in ((5, 0), (10, 1)):
        epochs.clear()
        resumed = trainer()
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
        assert losses(resumed) == losses(whole)
        expected, found = adapter(whole), adapter(resumed)
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert min(epochs) == first and max(epochs) == 1
    plain = trainer(p2p_immunize="none")
    plain.train()
    assert losses(plain)[0] != losses(whole)[0]
