"""Defenses with several runs or processes: what is given back between runs, and that all processes do the same."""

import gc
import weakref

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from p2p_trainer import P2PTrainer
from p2p_trainer.defenses import get_defense
from p2p_trainer.defenses.runs import drop_training_state, of_first_process
from tests.conftest import make_rows
from tests.test_bki import bench_of, poisoned_rows
from tests.test_onion import choose
from tests.tiny_runs import TASK, adapter, config, lora


def two_processes(monkeypatch, broadcast):
    """Make this process the second of two, to which `broadcast` brings what the first one found."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.broadcast_object_list", broadcast)


@pytest.mark.parametrize("bf16", [False, True])
def test_trainers_without_training_state_save_and_evaluate_as_before(tiny_model, tmp_path, bf16):
    trainer = P2PTrainer(
        tiny_model, config(tmp_path, bf16=bf16, use_cpu=True), train_dataset=Dataset.from_list(make_rows(16)),
        eval_dataset=Dataset.from_list(make_rows(8, seed=1)), task=TASK, peft_config=lora(),
    )  # fmt: skip
    trainer.train()
    before, weights, forward = trainer.evaluate(), adapter(trainer), trainer.model.forward
    state = [weakref.ref(trainer.optimizer), weakref.ref(trainer.lr_scheduler)]
    drop_training_state(trainer)
    gc.collect()
    assert [each() for each in state] == [None, None]
    after = trainer.evaluate()
    assert {name: after[name] for name in ("eval_loss", "eval_ca")} == {
        name: before[name] for name in ("eval_loss", "eval_ca")
    }
    trainer.save_model()
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved and all(torch.equal(saved[name], weights[name]) for name in saved)
    # No second mixed precision around the first.
    assert trainer.model.forward == forward


def test_a_process_alone_goes_by_what_it_found():
    value = [1]
    assert of_first_process(value) is value


def test_onion_chooses_by_the_scores_of_the_first_process(monkeypatch):
    # There, rounding made another word odd in the second text.
    theirs = [np.array([-1.0, -1.0, 30.0]), np.array([40.0, -1.0, -1.0]), np.array([-1.0, -1.0, -1.0, -1.0])]

    def broadcast(values, src):
        assert src == 0 and [len(row) for row in values[0]] == [3, 3, 4]
        values[0] = theirs

    two_processes(monkeypatch, broadcast)
    answers = {"b a odder": 1, "b b odd": 1, "b a a dull": 1, "b odd": 1, "b a": 0}
    defense, asked = choose(answers)
    assert asked[1:] == [["b odd"], ["b a"]] and defense.found["threshold"] == 30.0


def test_bki_drops_what_the_first_process_found(tiny_model, tmp_path, monkeypatch):
    rows = poisoned_rows()
    choice = np.zeros(80, dtype=bool), {"keywords": [{"word": "mn"}], "rows_scored": 7}
    choice[0][[0, 5]] = True

    def broadcast(values, src):
        assert src == 0 and len(values) == 1
        values[0] = choice

    defense, bench = get_defense("bki"), bench_of(tiny_model, tmp_path, rows, max_steps=1)
    first = defense.build(bench)
    monkeypatch.setattr(bench, "train", lambda trainer: None)
    first.state.global_step = 1
    # This process finds nothing.
    monkeypatch.setattr("p2p_trainer.defenses.bki.word_scores", lambda *args: [(["a"], np.zeros(1))] * 80)
    two_processes(monkeypatch, broadcast)
    kept = rows.select([row for row in range(80) if row not in (0, 5)])["text"][:]
    monkeypatch.setattr(bench, "trainer", lambda rows, **options: rows)
    assert defense.train(first, bench)["text"][:] == kept
    assert defense.found["rows_scored"] == 7 and defense.found["rows_removed"] == 2
