"""Estimates: counted as by a real model, computed by hand, and compared with what autograd really keeps."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import ModelConfig, get_peft_config

from p2p_trainer import P2PConfig
from p2p_trainer.estimation import devices
from p2p_trainer.estimation.cost import GIB, advise, estimate_memory, reading_flops, training_flops
from p2p_trainer.estimation.model_size import ModelSize, read_model
from p2p_trainer.estimation.training_plan import Launch, Plan, make_plan, padded_length, read_launch


QV = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]}
# Small round numbers, to be computed with by hand.
MADE_UP = ModelSize(
    parameters=1000, linear=800, trained=100, adapter=True, block=80, layers=10, hidden=4, vocabulary=50, attention=6,
    cached=8, head_trained=False, images=False, dtype=torch.bfloat16, saved=1000.0, forward=1600.0, backward=1700.0,
)  # fmt: skip
PLAN = Plan(
    batch_size=4, accumulation=2, eval_batch_size=8, checkpointing=False, dtype=torch.bfloat16, quantisation=None,
    autocast=torch.bfloat16, optimizer="adamw_torch_fused", launch=Launch(), cpu=False, longest=20, answer=3,
)  # fmt: skip


def read(tiny_model, bf16=False, **settings):
    return read_model(tiny_model, P2PConfig("out", bf16=bf16), ModelConfig(tiny_model, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        QV,
        {"use_peft": True, "lora_r": 8, "lora_target_modules": "all-linear"},
        {**QV, "use_dora": True},
        {**QV, "lora_modules_to_save": ["embed_tokens"]},
    ],
)
def test_parameters_are_counted_as_by_a_real_model(tiny_model, settings):
    size = read(tiny_model, **settings)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert size.parameters == model.num_parameters() and size.adapter == bool(settings)
    # Per layer, of width 32: queries and outputs of 2 heads of 16, keys and values of 1; three matrices of 32 x 64.
    assert size.linear == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    # With the norms of layer and of heads.
    assert size.block == size.linear // 2 + 2 * 32 + 2 * 16
    assert (size.layers, size.hidden, size.attention, size.cached) == (2, 32, 32, 32)
    if settings:
        model = get_peft_model(model, get_peft_config(ModelConfig(tiny_model, **settings)))
    assert size.trained == sum(weight.numel() for weight in model.parameters() if weight.requires_grad) > 0
    assert size.head_trained == (not settings)


@pytest.mark.parametrize(("named", "found"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_type_is_that_of_loading_and_not_of_computing(tiny_model, named, found):
    assert read(tiny_model, bf16=True, dtype=named).dtype == found
    # What its configuration says.
    assert read(tiny_model, dtype="auto").dtype == torch.float32


def test_operations_are_counted_pass_by_pass(tiny_model):
    full = read(tiny_model)
    assert full.forward == 2 * full.linear and full.backward == 2 * full.forward
    lora = read(tiny_model, **QV)
    assert lora.forward == 2 * (lora.linear + lora.trained)
    # Gradients of activations through frozen weights, but below the first; both kinds for the adapter.
    assert 0.8 * full.forward < lora.backward < lora.forward + 2 * lora.trained


@pytest.mark.parametrize("settings", [{}, QV])
def test_what_autograd_keeps_is_what_it_keeps_in_a_real_pass(tiny_model, settings):
    size = read(tiny_model, **settings)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    if settings:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.05))
    decoder = model.get_decoder() if not settings else model.base_model.model.get_decoder()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    decoder.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = decoder(input_ids=torch.zeros(4, 64, dtype=torch.long), use_cache=False).last_hidden_state
    real = sum(storage.nbytes() for place, storage in kept.items() if place not in weights) / (4 * 64)
    assert hidden.requires_grad and size.saved == pytest.approx(real, rel=0.3)


def test_a_process_holds_weights_gradients_states_and_activations():
    memory = estimate_memory(MADE_UP, PLAN)
    # PEFT has adapters in float32; AdamW two states of 4 bytes.
    assert (memory.weights, memory.adapter, memory.gradients, memory.optimizer) == (2000, 400, 400, 800)
    # 80 tokens: 1000 bytes each, and a layer's 100 for gradients; a tile of 12 x 50; 12 x 4 values in float32, twice.
    assert memory.activations == 80 * 1100 + 12 * 50 * 2 + 8 * 12 * 4
    # 8 rows of 20 tokens: a layer's values, and logits in bfloat16 and twice in float32.
    assert memory.evaluation == 8 * (20 * 100 + 50 * 10)
    held = 2000 + 400 + 800 + GIB
    assert memory.total == held + 400 + memory.activations
    # Gradients come while activations go.
    once = estimate_memory(MADE_UP, replace(PLAN, accumulation=1))
    assert once.total == held + memory.activations
    # Written answers: 10 layers of keys and values, 8 wide, of 20 and 5 tokens.
    written = estimate_memory(MADE_UP, replace(PLAN, new_tokens=5))
    assert written.evaluation == memory.evaluation + 8 * 25 * 10 * 8 * 2


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer():
    kept = (
        estimate_memory(MADE_UP, PLAN).activations
        - estimate_memory(MADE_UP, replace(PLAN, checkpointing=True)).activations
    )
    assert kept == 80 * (1000 + 100) - 80 * (10 * 4 * 2 + 2 * 100)


def test_casts_of_float32_weights_are_kept():
    mixed = replace(PLAN, dtype=torch.float32)
    plain, cast = estimate_memory(MADE_UP, PLAN), estimate_memory(MADE_UP, mixed)
    assert (cast.weights, cast.activations - plain.activations) == (4000, 800 * 2)
    again = [estimate_memory(MADE_UP, replace(one, checkpointing=True)).activations for one in (PLAN, mixed)]
    # Those of one layer; and its inputs are float32.
    assert again[1] - again[0] == 80 * 2 + 80 * 10 * 4 * 2


def test_quantised_weights_and_their_adapter():
    nested = estimate_memory(MADE_UP, replace(PLAN, quantisation="nf4, double", optimizer="paged_adamw_8bit"))
    assert nested.weights == 200 * 2 + 800 * (0.5 + 1 / 64 + 4 / 16384)
    # TRL has such adapters in bfloat16.
    assert (nested.adapter, nested.gradients, nested.optimizer) == (200, 200, 200)
    assert estimate_memory(MADE_UP, replace(PLAN, quantisation="int8")).weights == 200 * 2 + 800
    assert estimate_memory(MADE_UP, replace(PLAN, quantisation="nf4")).weights == 200 * 2 + 800 * 0.5625


@pytest.mark.parametrize(
    ("strategy", "autocast", "expected"),
    [
        # Gradients twice.
        ("ddp", torch.bfloat16, (4000, 8000, 8000)),
        # The model in bfloat16; of gradients, float32 copies and two states a quarter.
        ("zero2", torch.bfloat16, (2000, 500, 3000)),
        # Weights too, and two whole layers.
        ("zero3", torch.bfloat16, (500 + 320, 500, 3000)),
        ("zero3", None, (1000 + 640, 1000, 2000)),
        ("fsdp2", torch.bfloat16, (1000 + 320, 1000, 2000)),
    ],
)
def test_strategies_divide_what_they_divide(strategy, autocast, expected):
    full = replace(MADE_UP, trained=1000, adapter=False, head_trained=True)
    plan = replace(PLAN, dtype=torch.float32, autocast=autocast, launch=Launch(strategy, 4))
    memory = estimate_memory(full, plan)
    if strategy == "ddp":
        assert memory.accumulated
    assert (memory.weights, memory.gradients, memory.optimizer) == expected and memory.adapter == 0


def test_a_step_s_operations():
    # Scores: 10 layers x 2 x 6 x length 20. Logits of 3 tokens a row, computed twice and once backward.
    scores, head = 10 * 2 * 6 * 20, 2 * 4 * 50 * 3
    assert training_flops(MADE_UP, PLAN, 80, 20) == 80 * (1600 + 1700 + 3 * scores) + 4 * 3 * head
    again = training_flops(MADE_UP, replace(PLAN, checkpointing=True), 80, 20)
    assert again - training_flops(MADE_UP, PLAN, 80, 20) == 80 * (1600 + scores)
    assert reading_flops(MADE_UP, 80, 20) == 80 * (1600 + scores) + 4 * 2 * 4 * 50


def test_advice_keeps_the_rows_per_step():
    size = replace(MADE_UP, saved=1e6)
    plan = replace(PLAN, eval_batch_size=4)
    ways = advise(size, plan, GIB + 50e6)
    assert ways[0].startswith("per_device_train_batch_size: 2, gradient_accumulation_steps: 4 (1.0")
    assert ways[1].startswith("gradient_checkpointing: true (1.0")
    assert ways[2].startswith("QLoRA") and len(ways) == 3


def test_advice_counts_the_devices_that_are_needed():
    size = replace(MADE_UP, parameters=int(8e9), linear=int(7e9), trained=int(8e9), adapter=False)
    plan = replace(PLAN, dtype=torch.float32)
    limit = 24 * GIB
    (way,) = advise(size, plan, limit)
    # 16 bytes a parameter: 119 GiB.
    assert way.startswith("fsdp2 or zero3 over 8 devices (15.9 GiB")
    assert advise(size, replace(plan, cpu=True), limit) == [
        "nothing known here makes it fit: take a smaller model or shorter rows"
    ]


def test_a_plan_is_read_off_a_recipe(tiny_model):
    args = P2PConfig("out", per_device_train_batch_size=3, gradient_accumulation_steps=5, bf16=False)
    settings = ModelConfig(tiny_model, load_in_4bit=True, use_bnb_nested_quant=True, **QV)
    plan = make_plan(args, settings, MADE_UP, Launch("ddp", 2), 20, 3)
    assert (plan.batch_size, plan.accumulation, plan.quantisation) == (3, 5, "nf4, double")
    assert plan.autocast is None and plan.optimizer == "adamw_torch_fused" and plan.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"distributed_type": "NO", "num_processes": 1}, Launch()),
        ({"distributed_type": "MULTI_GPU", "num_processes": 8, "num_machines": 2}, Launch("ddp", 8, 2)),
        ({"distributed_type": "FSDP", "num_processes": 4}, Launch("fsdp2", 4)),
        (
            {"distributed_type": "DEEPSPEED", "num_processes": 4, "deepspeed_config": {"zero_stage": 3}},
            Launch("zero3", 4),
        ),
    ],
)
def test_processes_are_read_off_an_accelerate_configuration(tmp_path, settings, expected):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(settings))
    assert read_launch(path, 1) == expected and read_launch(None, 3) == Launch(processes=3)


@pytest.mark.parametrize("text", ["- a list", "num_processes: many", "a: [", "\x00"])
def test_an_accelerate_configuration_that_is_none(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="no configuration of `accelerate launch`"):
        read_launch(path, 1)
    with pytest.raises(ValueError, match="nowhere.yaml' does not exist"):
        read_launch("nowhere.yaml", 1)


def test_padding():
    assert padded_length([5, 1, 5, 1], 2, grouped=True) == 3
    assert padded_length([5, 1, 5, 1], 4, grouped=False) == 5
    assert padded_length([7, 7, 7], 2, grouped=False) == 7


def test_devices(tmp_path, monkeypatch):
    half, full = devices.gpu_peak("NVIDIA H200", torch.bfloat16), devices.gpu_peak("NVIDIA H200", torch.float32)
    assert half == (989e12, 4800e9) and full[0] == 989e12 / 16
    assert devices.gpu_peak("NVIDIA A100-SXM4-80GB", torch.bfloat16)[0] == 312e12
    # Not an L4.
    assert devices.gpu_peak("NVIDIA L40S", torch.bfloat16)[0] == 362e12
    assert devices.gpu_peak("NVIDIA GeForce RTX 4090", torch.bfloat16)[0] == 165e12
    assert devices.gpu_peak("Some NPU", torch.bfloat16)[0] is None
    monkeypatch.setattr(devices, "_CGROUP", tmp_path / "memory.max")
    whole = devices.main_memory()
    (tmp_path / "memory.max").write_text("max\n")
    assert devices.main_memory() == whole > GIB
    (tmp_path / "memory.max").write_text(f"{GIB}\n")
    assert devices.main_memory() == GIB
    monkeypatch.setattr(devices, "_MEASURED_S", 0.01)
    found = devices.find_device(True, torch.float32)
    assert found.cpu and found.memory == GIB and found.flops > 1e8
