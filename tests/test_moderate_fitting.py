"""ModDef: the generator of LoRA weights, low rank, and when training stops."""

import json
import math

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, PromptTuningConfig
from transformers import AutoModelForCausalLM

from p2p_trainer import Task
from p2p_trainer.defenses import Workbench, get_defense
from p2p_trainer.defenses.moderate_fitting import Plateau
from p2p_trainer.defenses.reparam_lora import Generator, GeneratorAdamW
from tests.conftest import make_rows
from tests.tiny_runs import TASK, adapter, config, lora, losses


IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])


def bench_of(model, folder, validation=True, peft_config="lora", **changes):
    rows = Dataset.from_list(make_rows(40))
    clean = Dataset.from_list(make_rows(20, seed=1)) if validation else None
    return Workbench(
        model,
        config(folder, **{"p2p_enabled": False, **changes}),
        TASK,
        rows,
        clean,
        peft_config=lora() if peft_config == "lora" else peft_config,
    )


def logits(model):
    training = model.training
    model.eval()
    with torch.no_grad():
        found = model(input_ids=IDS).logits
    model.train(training)
    return found


def hand_made(max_grad_norm=0.0, **kwargs):
    """One lora_A of two by three and one of one by two, one lora_B of two by two; a generator with known weights."""
    generator = Generator((8, 4), seed=3)
    with torch.no_grad():
        generator.inputs[1].copy_(torch.tensor([0.5, -1.0]))
    weights_a = [torch.nn.Parameter(torch.empty(2, 3)), torch.nn.Parameter(torch.empty(1, 2))]
    weights_b = [torch.nn.Parameter(torch.empty(2, 2))]
    return generator, weights_a, weights_b, GeneratorAdamW(generator, weights_a, weights_b, max_grad_norm, **kwargs)


def loss_of(a, other_a, b, x):
    return (b @ a @ x).square().sum() + (other_a.sum() * b[0, 1] - 1).square() + other_a[0, 1].exp()


def test_generated_weights_by_hand():
    generator = Generator((3, 2))
    with torch.no_grad():
        generator.inputs[0].copy_(torch.tensor([1.0, 2.0]))
        generator.first[0].copy_(torch.tensor([[0.5, 0.0], [0.0, -0.25]]))
        generator.second[0].copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 3.0]]))
    t = math.tanh(0.5)
    a, b = generator()
    torch.testing.assert_close(a, torch.tensor([t, -t, -t]))
    assert b.tolist() == [0.0, 0.0]


def test_generator_starts_by_its_seed_within_the_bounds_of_linear_layers():
    first, again, other = (
        Generator((500, 500), 2, 4, 1),
        Generator((500, 500), 2, 4, 1),
        Generator((500, 500), 2, 4, 2),
    )
    assert torch.equal(first()[0], again()[0]) and not torch.equal(first()[0], other()[0])
    # 2 + 4 * 2 + 500 * 4 per network.
    assert sum(map(torch.numel, first.parameters())) == 2 * 2010
    assert 0.45 < first.second[0].max() <= 0.5 and -0.5 <= first.second[0].min() < -0.45
    assert first.first[0].abs().max() <= 1 / math.sqrt(2) and 0 <= first.inputs[0].min() < first.inputs[0].max() < 1


def test_gradients_are_those_of_an_explicit_forward_also_when_accumulated():
    generator, (a, other_a), (b,), optimizer = hand_made()
    batches = torch.randn(3, 3, 1, generator=torch.Generator().manual_seed(0))
    for x in batches:
        loss_of(a, other_a, b, x).backward()
    optimizer.pull_back()
    pulled = [parameter.grad.clone() for parameter in generator.parameters()]
    flat_a, flat_b = generator()
    explicit = sum(loss_of(flat_a[:6].view(2, 3), flat_a[6:].view(1, 2), flat_b.view(2, 2), x) for x in batches)
    expected = torch.autograd.grad(explicit, list(generator.parameters()))
    for found, gradient in zip(pulled, expected, strict=True):
        torch.testing.assert_close(found, gradient)
        assert gradient.abs().max() > 1e-3


def test_weights_without_gradient_count_as_zero():
    generator, (a, other_a), (b,), optimizer = hand_made()
    other_a.sum().backward()
    optimizer.pull_back()
    rows = generator.second[0].grad
    assert rows[:6].abs().max() == 0 and rows[6:].abs().min() > 0 and generator.second[1].grad.abs().max() == 0


def test_step_is_adamw_on_the_generator_and_rewrites_the_weights():
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.01}
    generator, (a, other_a), (b,), optimizer = hand_made(**settings)
    reference = Generator((8, 4))
    reference.load_state_dict(generator.state_dict())
    plain = torch.optim.AdamW(reference.parameters(), **settings)
    x = torch.tensor([[1.0], [-2.0], [0.5]])
    for _ in range(3):
        for weight in (a, other_a, b):
            weight.grad = None
        loss_of(a, other_a, b, x).backward()
        optimizer.step()
        flat_a, flat_b = reference()
        plain.zero_grad()
        loss_of(flat_a[:6].view(2, 3), flat_a[6:].view(1, 2), flat_b.view(2, 2), x).backward()
        plain.step()
    flat_a, flat_b = reference()
    torch.testing.assert_close(torch.cat([a.view(-1), other_a.view(-1)]), flat_a)
    torch.testing.assert_close(b.view(-1), flat_b)


def test_the_generators_gradients_are_clipped():
    generator, (a, other_a), (b,), optimizer = hand_made(max_grad_norm=0.5, lr=0.1)
    (100 * loss_of(a, other_a, b, torch.ones(3, 1))).backward()
    optimizer.step()
    norm = torch.stack([parameter.grad.norm() for parameter in generator.parameters()]).norm()
    torch.testing.assert_close(norm, torch.tensor(0.5))


def test_model_starts_as_the_base_model_with_generated_weights(tiny_model, tmp_path):
    trainer = get_defense("moddef", patience=None).build(bench_of(tiny_model, tmp_path))
    torch.testing.assert_close(logits(trainer.model), logits(AutoModelForCausalLM.from_pretrained(tiny_model)))
    weights = adapter(trainer)
    a = torch.cat([weight.view(-1) for name, weight in weights.items() if "lora_A" in name])
    torch.testing.assert_close(a, trainer.optimizer.generator()[0].detach())
    assert a.abs().max() > 0 and not any(weight.any() for name, weight in weights.items() if "lora_B" in name)


def test_run_learns_and_its_adapter_loads_as_plain_lora(tiny_model, tmp_path):
    defense = get_defense("moddef", patience=None, epochs=4, learning_rate=0.05)
    bench = bench_of(tiny_model, tmp_path, validation=False, max_steps=3, save_strategy="epoch", max_grad_norm=0.5)
    trainer = defense.build(bench)
    optimizer = trainer.optimizer
    assert trainer.args.max_grad_norm == 0 and optimizer.max_grad_norm == 0.5 and bench.args.max_grad_norm == 0.5
    assert defense.train(trainer, bench) is trainer
    # Four epochs of 40 rows in batches of 8, not three steps.
    assert trainer.state.global_step == 20 and defense.found["epochs"] == 4.0
    assert sum(losses(trainer)[-5:]) < sum(losses(trainer)[:5]) - 0.5
    assert trainer.state.log_history[0]["learning_rate"] == 0.05
    # Two layers of r=4: A is (4, 32) for q and v; B is (32, 4) for q and (16, 4) for v.
    size_a, size_b = 2 * 2 * 4 * 32, 2 * (32 + 16) * 4
    assert defense.found["lora_parameters"] == size_a + size_b
    assert defense.found["trainable_parameters"] == 2 * (2 + 4) + 2 * (size_a + size_b)
    trainer.save_model()
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = logits(base)
    loaded = logits(PeftModel.from_pretrained(base, tmp_path))
    torch.testing.assert_close(loaded, logits(trainer.model))
    assert (loaded - before).abs().max() > 0.01
    weights = adapter(trainer)
    generated = torch.cat(optimizer.generator()).detach()
    ordered = [weight.view(-1) for kind in "AB" for name, weight in weights.items() if f"lora_{kind}" in name]
    torch.testing.assert_close(torch.cat(ordered), generated)
    assert list(tmp_path.glob("checkpoint-*")) == []


def test_accumulated_batches_train_as_one(tiny_model, tmp_path):
    runs = []
    for batch, accumulated in ((8, 1), (4, 2)):
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated, "max_steps": 4}
        bench = bench_of(tiny_model, tmp_path, **settings)
        defense = get_defense("moddef", patience=None)
        runs.append(adapter(defense.train(defense.build(bench), bench)))
    for name, weight in runs[0].items():
        torch.testing.assert_close(weight, runs[1][name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("rslora", "alpha"), [(False, 4), (True, 8)])
def test_rank_keeps_the_scaling(tiny_model, tmp_path, rslora, alpha):
    given = lora(r=8, lora_alpha=16, use_rslora=rslora)
    defense = get_defense("moddef", capacity="rank", rank=2, patience=None)
    trainer = defense.build(bench_of(tiny_model, tmp_path, peft_config=given))
    used = trainer.model.peft_config["default"]
    assert (used.r, used.lora_alpha) == (2, alpha) and (given.r, given.lora_alpha) == (8, 16)
    scale = 16 / math.sqrt(8) if rslora else 2.0
    scales = [module.scaling["default"] for module in trainer.model.modules() if hasattr(module, "lora_A")]
    assert len(scales) == 4 and scales == pytest.approx([scale] * 4)
    assert trainer.optimizer is None and trainer.args.max_grad_norm == 1.0
    # Two layers of r=2: 32 inputs each for q and v, 32 and 16 outputs.
    assert defense.found["trainable_parameters"] == defense.found["lora_parameters"] == 2 * 2 * (32 + 32 + 32 + 16)


@pytest.mark.parametrize(
    ("patience", "values", "stops"),
    [
        (1, [0.5, 0.7, 0.7], [False, False, True]),
        (1, [0.5, 0.4], [False, True]),
        (2, [0.5, 0.4, 0.6, 0.6, 0.5], [False, False, False, False, True]),
    ],
)
def test_plateau(patience, values, stops):
    plateau = Plateau(patience)
    assert [plateau.add(value) for value in values] == stops and plateau.values == values


@pytest.mark.parametrize("capacity", ["reparam", "rank"])
def test_run_stops_at_the_plateau(tiny_model, tmp_path, monkeypatch, capacity):
    accuracies, asked = [0.5, 0.8, 0.6, 0.8, 0.9], []

    def accuracy(self, trainer, texts, labels):
        asked.append((texts, labels))
        return accuracies[len(asked) - 1]

    monkeypatch.setattr(Workbench, "accuracy", accuracy)
    defense = get_defense("moddef", capacity=capacity, patience=2)
    bench = bench_of(tiny_model, tmp_path, num_train_epochs=5, save_strategy="epoch")
    trainer = defense.train(defense.build(bench), bench)
    assert trainer.state.global_step == 4 * 5 and defense.found["epochs"] == 4.0
    assert defense.found["validation_accuracy"] == [0.5, 0.8, 0.6, 0.8]
    clean = make_rows(20, seed=1)
    assert asked == [([row["text"] for row in clean], [row["label"] for row in clean])] * 4
    # The seconds of those passes are part of the training time already.
    assert defense.compute.preparation_s == 0
    assert defense.compute.preparation_passes == 80 and list(tmp_path.glob("checkpoint-*")) == []


def test_real_accuracies_are_measured(tiny_model, tmp_path):
    defense = get_defense("moddef", patience=3)
    bench = bench_of(tiny_model, tmp_path, num_train_epochs=2)
    trainer = defense.train(defense.build(bench), bench)
    clean = make_rows(20, seed=1)
    last = bench.accuracy(trainer, [row["text"] for row in clean], [row["label"] for row in clean])
    assert len(defense.found["validation_accuracy"]) == 2 and defense.found["validation_accuracy"][-1] == last


def test_what_can_be_resumed_and_what_needs_validation():
    kinds = [
        get_defense("moddef", capacity=kind, patience=steps) for kind in ("rank", "reparam") for steps in (None, 1)
    ]
    assert [kind.resumable for kind in kinds] == [True, False, False, False]
    assert [kind.needs_validation for kind in kinds] == [False, True, False, True]


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({}, {"peft_config": None}, "this run has no adapter"),
        (
            {"capacity": "rank"},
            {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)},
            "this run has PromptTuningConfig",
        ),
        ({}, {"validation": False}, "there are none"),
        ({}, {"fp16": True}, "`fp16`"),
        ({}, {"peft_config": lora(init_lora_weights="pissa")}, "`init_lora_weights: pissa`"),
        ({}, {"peft_config": lora(use_dora=True)}, "trains 4 other weights, such as .*lora_magnitude_vector"),
        ({"capacity": "rank"}, {"peft_config": lora(rank_pattern={"q_proj": 2})}, "`rank_pattern`"),
    ],
)
def test_what_cannot_work_is_refused(tiny_model, tmp_path, options, changes, message):
    with pytest.raises(ValueError, match=message):
        get_defense("moddef", **options).build(bench_of(tiny_model, tmp_path, **changes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": "tiny"}, "`capacity` of ModDef is 'tiny'"),
        ({"in_dim": 0}, "`in_dim` of ModDef is 0"),
        ({"mid_dim": True}, "`mid_dim` of ModDef is True"),
        ({"rank": 1.5}, "`rank` of ModDef is 1.5"),
        ({"patience": "1"}, "`patience` of ModDef is '1'"),
        ({"epochs": 0}, "`epochs` of ModDef is 0"),
        ({"learning_rate": "3e-4"}, "`learning_rate` of ModDef is '3e-4'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        get_defense("moddef", **options)


def test_settings_are_written_down():
    defense = get_defense("moddef", mid_dim=4, epochs=3)
    settings = json.loads(json.dumps(defense.config()))
    assert settings == {
        "name": "moddef", "capacity": "reparam", "in_dim": 2, "mid_dim": 4, "rank": 1, "epochs": 3,
        "learning_rate": None, "patience": 1,
    }  # fmt: skip
    assert get_defense(**settings).config() == settings


def test_generation_can_only_be_trained_to_the_end():
    with pytest.raises(ValueError, match="Set `patience: null`"):
        get_defense("moddef").check(Task(name="story"))
    get_defense("moddef", patience=None).check(Task(name="story"))
