"""PSIM: its threshold, its random labels, and an auxiliary adapter that leaves the model alone."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import IA3Config, PeftModel
from safetensors.torch import load_file, save_file

from p2p_trainer import DefendedModel, Task
from p2p_trainer.attacks import get_attack
from p2p_trainer.defenses import Workbench, get_defense, load_defense, psim
from p2p_trainer.defenses.psim import PSIM, confidence, confidence_threshold, random_labels
from p2p_trainer.evaluation import BackdoorEvaluator, LabelScorer, Scores
from tests.conftest import make_rows
from tests.tiny_runs import TASK, config, lora


BADNETS = get_attack("badnets", target="positive", poison_rate=0.1)
FILE = "psim/adapter_model.safetensors"


def scores_of(*probabilities):
    """Scores whose first words have these probabilities; the extended words must not matter."""
    rows = np.log(np.array(probabilities, dtype=np.float32))
    return Scores(np.concatenate([rows, np.full_like(rows, -0.01)], axis=1), np.zeros(len(rows), dtype=np.int64))


def make_bench(model, folder, peft_config=None, **changes):
    rows = BADNETS.poison(Dataset.from_list(make_rows(80)), TASK)
    args = config(folder, **{"logging_steps": 100, "report_to": [], **changes})
    PSIM().configure(args)
    validation = Dataset.from_list(make_rows(20, seed=3))
    return Workbench(model, args, TASK, rows, validation, attacks=[BADNETS], peft_config=peft_config)


def logits(model):
    ids = torch.tensor([[5, 9, 300, 41, 7], [8, 8, 120, 3, 2]])
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """A run of an adapter: bench, trainer, defense, what the model said before the auxiliary came, saved folder."""
    folder = tmp_path_factory.mktemp("psim")
    bench = make_bench(tiny_model, folder, lora(r=4, target_modules="all-linear"))
    defense = get_defense("psim", withhold_budget=0.25, learning_rate=1e-2, rank=2)
    trainer = defense.build(bench)
    kept, before = bench.train, {}

    def watched(trained):
        # The first call trains the model, the second the auxiliary adapter, and is the only thing in between.
        kept(trained)
        if not before:
            before["logits"] = logits(trained.model)
            before["names"] = [(name, weight.requires_grad) for name, weight in trained.model.named_parameters()]

    bench.train = watched
    defense.train(trainer, bench)
    bench.train = kept
    trainer.guard = defense.guard
    trainer.save_model()
    return bench, trainer, defense, before, folder


@pytest.mark.parametrize(
    ("confidences", "budget", "threshold"),
    [
        ([0.5, 0.9, 0.7, 0.6], 0.0, 0.9),
        ([0.5, 0.9, 0.7, 0.6], 0.24, 0.9),
        ([0.5, 0.9, 0.7, 0.6], 0.25, 0.7),
        ([0.5, 0.9, 0.7, 0.6], 0.5, 0.6),
        ([0.5, 0.9, 0.7, 0.6], 0.99, 0.5),
        # Ties: one of the three 0.9 may go, so none can.
        ([0.9, 0.5, 0.9, 0.9], 0.25, 0.9),
        ([0.9, 0.5, 0.9, 0.9], 0.75, 0.5),
        ([1.0, 1.0], 0.5, 1.0),
        # 0.29 * 100 is 28.999...: 29 rows may go all the same.
        ([row / 128 for row in range(100)], 0.29, 70 / 128),
    ],
)
def test_threshold_by_hand(confidences, budget, threshold):
    values = np.array(confidences, dtype=np.float32)
    found = confidence_threshold(values, budget)
    assert found == pytest.approx(threshold)
    assert np.mean(values > found) <= budget
    lower = values[values < np.float32(found)]
    assert not len(lower) or np.mean(values > lower.max()) > budget


def test_confidence_is_the_highest_probability_among_the_plain_words():
    found = confidence(scores_of([0.3, 0.1], [0.2, 0.2], [0.01, 0.09]))
    assert found.tolist() == pytest.approx([0.75, 0.5, 0.9])


def test_random_labels_depend_on_seed_and_row_alone():
    found = random_labels(40_000, 4, seed=3)
    assert found.dtype == np.int64 and set(found.tolist()) == {0, 1, 2, 3}
    # Four standard deviations of a share of 1/4.
    assert np.abs(np.bincount(found) / 40_000 - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / 40_000)
    assert np.array_equal(found[:100], random_labels(100, 4, seed=3))
    assert not np.array_equal(found[:100], random_labels(100, 4, seed=4))
    truth = np.arange(40_000) % 4
    assert abs(np.mean(found == truth) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 40_000)


def test_auxiliary_is_trained_on_the_same_texts_with_random_labels(tiny_model, tmp_path, monkeypatch):
    bench = make_bench(tiny_model, tmp_path, lora())
    seen = []
    kept = bench.trainer
    monkeypatch.setattr(bench, "trainer", lambda **options: seen.append(options) or kept(**options))
    monkeypatch.setattr(bench, "train", lambda trainer: None)
    texts = bench.validation["text"][:]
    confidences = confidence(bench.score(kept(), texts))
    threshold = float(np.sort(confidences)[6] + np.sort(confidences)[7]) / 2
    defense = PSIM(threshold=threshold, epochs=2.0, learning_rate=3e-4)
    defense.train(defense.build(bench), bench)
    main, auxiliary = seen
    assert "rows" not in main and "learning_rate" not in main
    assert auxiliary["rows"]["text"][:] == bench.rows["text"][:]
    assert auxiliary["rows"]["label"][:] == random_labels(80, 2, bench.args.seed).tolist()
    assert auxiliary["learning_rate"] == 3e-4 and auxiliary["num_train_epochs"] == 2.0
    # Untrained, the second adapter changes nothing: its model is the first one's.
    assert defense.found["threshold"] == threshold and defense.found["validation_coverage"] == 7 / 20


def test_only_the_auxiliary_adapter_is_trained_and_the_model_is_left_as_it_was(run):
    bench, trainer, defense, before, _ = run
    assert torch.equal(logits(trainer.model), before["logits"])
    assert [(name, weight.requires_grad) for name, weight in trainer.model.named_parameters()] == before["names"]
    assert list(trainer.model.peft_config) == ["default"] and trainer.model.active_adapters == ["default"]
    # Two runs over the same rows; one validation row each.
    assert bench.row_passes == 160
    assert defense.compute.preparation_passes == 20 and defense.compute.preparation_s > 0
    learnt = load_file(bench.args.output_dir + "/" + FILE)
    # Two layers of seven matrices, an A and a B each; B starts at zero.
    assert len(learnt) == 28 and all(learnt[key].abs().max() > 0 for key in learnt)
    assert {min(weight.shape) for weight in learnt.values()} == {2}


def test_threshold_keeps_to_the_budget_and_is_reported(run):
    bench, trainer, defense, _, folder = run
    held = defense.screen(bench.validation["text"][:])
    assert held.dtype == bool and held.sum() <= 5
    assert defense.found["validation_coverage"] == pytest.approx(1 - held.mean())
    assert defense.found["auxiliary_epochs"] == 1.0
    saved = json.loads((folder / "defense.json").read_text())
    assert saved["state"] == {"threshold": defense.found["threshold"]} == defense.state()
    assert saved["defense"] == {
        "name": "psim", "rank": 2, "epochs": 1.0, "learning_rate": 1e-2, "threshold": None, "withhold_budget": 0.25,
    }  # fmt: skip


def test_screen_reads_the_auxiliary_and_counts(run, monkeypatch):
    _, trainer, defense, _, _ = run
    seen = []

    def score(self, model, prompts, progress=None):
        seen.append((model.active_adapters, [trainer.encoder.tokenizer.decode(ids) for ids in prompts]))
        return scores_of([0.2, 0.2], [0.3, 0.1], [0.25, 0.75], [0.1, 0.3])

    monkeypatch.setattr(LabelScorer, "score", score)
    monkeypatch.setattr(defense, "_limit", 0.75)
    passes = defense.compute.serving_passes
    assert defense.screen(["a", "b", "c", "d"]).tolist() == [False, False, False, False]
    monkeypatch.setattr(defense, "_limit", 0.74)
    assert defense.screen(["a", "b", "c", "d"]).tolist() == [False, True, True, True]
    assert defense.compute.serving_passes == passes + 8
    assert seen[0] == (["default", "psim"], [f"{text}\nOutput: " for text in "abcd"])
    assert trainer.model.active_adapters == ["default"]


def test_screening_does_not_move_the_global_generator_or_depend_on_company(run):
    bench, _, defense, _, _ = run
    texts = BADNETS.trigger(bench.validation, TASK, 0)["text"][:6] + bench.validation["text"][:10]
    state = torch.random.get_rng_state()
    together = defense.screen(texts)
    assert torch.equal(torch.random.get_rng_state(), state)
    apart = np.concatenate([defense.screen([text]) for text in texts])
    # The row that set the threshold may fall on either side of it by rounding.
    assert np.count_nonzero(together != apart) <= 1


def test_saved_run_withholds_the_same_answers(run):
    bench, trainer, defense, before, folder = run
    texts = [row["text"] for row in make_rows(60, seed=5)]
    expected = defense.screen(texts)
    assert 0 < expected.sum() < 60
    loaded = load_defense(folder)
    assert isinstance(loaded, PSIM) and not loaded.ready and loaded.guard is None
    with pytest.raises(RuntimeError, match="call `attach\\(model, encoder\\)`"):
        loaded.screen(texts)
    served = DefendedModel.from_pretrained(folder, device="cpu")
    assert isinstance(served.model, PeftModel) and served.guard.ready
    assert np.array_equal(served.guard.screen(texts), expected)
    assert [answer.label is None for answer in served.classify(texts)] == expected.tolist()
    assert torch.equal(logits(served.model), before["logits"])
    # A checkpoint that is written again from what was loaded holds the same.
    served.guard.save(folder / "again")
    again, first = load_file(folder / "again" / FILE), load_file(folder / FILE)
    assert set(again) == set(first) and all(torch.equal(again[key], first[key]) for key in first)


def test_evaluation_counts_withheld_rows(run, toy_eval):
    _, trainer, defense, _, _ = run
    report = BackdoorEvaluator(toy_eval, TASK, trainer.encoder, [BADNETS], keyed=False, guard=defense)(trainer.model)
    held = defense.screen(toy_eval["text"][:])
    assert report["coverage"] == pytest.approx(1 - held.mean())
    assert report["ca_k"] == report["ca_answered_k"] and report["ca_n"] == 40
    triggered = BADNETS.trigger(toy_eval, TASK, 0)["text"][:]
    held = defense.screen(triggered)
    assert report["asr_coverage_badnets"] == pytest.approx(1 - held.mean())
    assert report["asr_coverage_badnets_k"] == len(triggered) - held.sum()


def test_model_without_adapter_is_wrapped_for_a_while_only(tiny_model, tmp_path):
    bench = make_bench(tiny_model, tmp_path, learning_rate=1e-3)
    defense = PSIM(withhold_budget=0.25, learning_rate=1e-2)
    trainer = defense.build(bench)
    kept, before = bench.train, []
    bench.train = lambda trained: (kept(trained), before.append(logits(trained.model)))
    defense.train(trainer, bench)
    assert not isinstance(trainer.model, PeftModel) and torch.equal(logits(trainer.model), before[0])
    assert not torch.equal(before[0], before[1])
    assert not any("lora" in name for name, _ in trainer.model.named_parameters())
    assert all(weight.requires_grad for weight in trainer.model.parameters())
    texts = [row["text"] for row in make_rows(60, seed=5)]
    expected = defense.screen(texts)
    trainer.guard = defense.guard
    trainer.save_model()
    assert not (tmp_path / "adapter_config.json").exists()
    served = DefendedModel.from_pretrained(tmp_path, device="cpu")
    assert np.array_equal(served.guard.screen(texts), expected) and torch.equal(logits(served.model), before[0])


def test_threshold_is_chosen_with_the_very_model_that_screens(tiny_model, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(psim, "confidence", lambda scores: seen.append(confidence(scores)) or seen[-1])
    bench = make_bench(tiny_model, tmp_path, lora(), model_init_kwargs={"dtype": "bfloat16"})
    defense = PSIM(learning_rate=1e-2)
    trainer = defense.train(defense.build(bench), bench)
    assert trainer.model.dtype == torch.bfloat16
    # Its weights are float32, also on top of others: in bfloat16 the probabilities would differ.
    assert {weight.dtype for weight in defense._weights.values()} == {torch.float32}
    defense.screen(bench.validation["text"][:])
    assert len(seen) == 2 and np.array_equal(seen[0], seen[1])


def test_damaged_or_foreign_adapters_are_named(run, tmp_path):
    _, trainer, _, _, folder = run
    with pytest.raises(ValueError, match="lacks the auxiliary adapter of PSIM, psim/adapter_model.safetensors"):
        PSIM().restore({"threshold": 0.8}, tmp_path)
    for threshold in (None, "0.8", 0, 1.5, True):
        with pytest.raises(ValueError, match="has the threshold"):
            PSIM().restore({"threshold": threshold}, folder)
    (tmp_path / "psim").mkdir()
    weights = load_file(folder / FILE)
    save_file(dict(list(weights.items())[:-1]), tmp_path / FILE)
    for rank, message in ((2, "1 weights have no counterpart"), (3, "size mismatch")):
        defense = PSIM(rank=rank)
        defense.restore({"threshold": 0.8}, tmp_path)
        with pytest.raises(ValueError, match=f"does not fit the model: .*{message}"):
            defense.attach(trainer.model, trainer.encoder)
        assert list(trainer.model.peft_config) == ["default"] and not defense.ready
    (tmp_path / FILE).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="does not fit the model: .*header"):
        defense.attach(trainer.model, trainer.encoder)


def test_what_can_not_work_is_refused_before_training(tiny_model, tmp_path):
    four = Task(name="four", labels=("a", "b", "c", "d"))
    with pytest.raises(ValueError, match="`threshold` 0.25 would withhold nearly every answer: with the 4 classes"):
        PSIM(threshold=0.25).check(four)
    PSIM(threshold=0.26).check(four)
    with pytest.raises(ValueError, match="no classes: PSIM reads the confidence in classes"):
        PSIM().check(Task(name="summary"))
    bench = make_bench(tiny_model, tmp_path, lora())
    bench.validation = None
    assert PSIM().needs_validation and not PSIM(threshold=0.7).needs_validation
    with pytest.raises(ValueError, match="chooses its threshold on clean validation rows"):
        PSIM().build(bench)
    assert PSIM(threshold=0.7).build(bench).guard is None
    bench.peft_config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="LoRA adapter on top of the run's own, which is IA3"):
        PSIM(threshold=0.7).build(bench)


@pytest.mark.parametrize(
    "options",
    [{"rank": 0}, {"rank": 4.0}, {"rank": True}, {"epochs": 0}, {"epochs": "1"}, {"learning_rate": "2e-4"},
     {"learning_rate": float("inf")}, {"threshold": 1}, {"threshold": 0}, {"threshold": "0.7"},
     {"withhold_budget": 1}, {"withhold_budget": -0.1}, {"withhold_budget": None}],
)  # fmt: skip
def test_wrong_options_are_named(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` is "):
        PSIM(**options)
