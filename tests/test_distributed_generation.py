"""Two real processes answer in the middle of training, under DDP, FSDP2 and ZeRO-3, as one process does."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed_generation_worker import LONGEST, TEXTS, answers, make_model


ROOT = Path(__file__).parent.parent
MACHINE = {"num_machines": 1, "num_processes": 2, "machine_rank": 0, "mixed_precision": "no", "use_cpu": False}
FSDP2 = {
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": False,
    },
}
ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        # Else every process holds weights as small as those of the tiny model.
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


@pytest.fixture(scope="module")
def loud_model(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loud")
    make_model(tiny_model, folder)
    return folder


def launch(kind, model, folder):
    """Run the worker in two processes; what each found."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    if kind != "ddp":
        settings = {**FSDP2, **MACHINE}
        environment["ACCELERATE_TORCH_DEVICE"] = "cpu"
        if kind == "zero3":
            (folder / "zero3.json").write_text(json.dumps(ZERO3))
            spread = {"deepspeed_config_file": str(folder / "zero3.json"), "zero3_init_flag": True}
            settings = {**MACHINE, "distributed_type": "DEEPSPEED", "deepspeed_config": spread}
            del settings["mixed_precision"]
            environment["DS_ACCELERATOR"] = "cpu"
        (folder / "launch.yaml").write_text(yaml.safe_dump(settings))
        command = ["accelerate.commands.launch", "--config_file", str(folder / "launch.yaml"), "--main_process_port=0"]
    worker = ["tests.distributed_generation_worker", kind, str(model), str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", *command, "-m", *worker],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def answers_alone(model, checkpoint):
    """What one process answers with the weights that two have saved."""
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), checkpoint)
    return answers(loaded, AutoTokenizer.from_pretrained(model))


def check(model, folder, ranks):
    for step in ("1", "2"):
        alone = answers_alone(model, folder / "run" / f"checkpoint-{step}")
        assert [len(alone[key]) for key in ("many", "two", "one", "none")] == [len(TEXTS), 2, 1, 0]
        # So unequal that a process which stopped at its own end would leave the other alone.
        assert alone["two"][1] == "" and len(alone["two"][0]) >= LONGEST
        for rank in ranks:
            found = rank["found"][step]
            assert found["answers"] == alone and found["restored"]
            # One token at a time behind the prompts: the cache is used, though gradient checkpointing is on.
            assert found["widths"][0] == 1 and set(found["widths"]) <= {1, 14, 19, 24}
    assert [rank["world_size"] for rank in ranks] == [2, 2]
    assert [list(rank["found"]) for rank in ranks] == [["1", "2"]] * 2


def test_ddp(loud_model, tmp_path):
    ranks = launch("ddp", loud_model, tmp_path)
    check(loud_model, tmp_path, ranks)
    for rank in ranks:
        assert (rank["kind"], rank["sharded"]) == ("MULTI_CPU", 0)
        assert rank["wrapped"] == rank["found"]["2"]["answers"]
    assert [rank["bars"] for rank in ranks] == [
        [["answering", None], [None, True]],
        [["answering", True], [None, True]],
    ]
    # Nobody waits for a process that failed.
    assert [rank["failed"] for rank in ranks] == [
        ["RuntimeError: Process 1 failed to answer its prompts (MemoryError: no room). Its own traceback says where.",
         True],
        ["MemoryError: no room", True],
    ]  # fmt: skip


def test_fsdp2(loud_model, tmp_path):
    ranks = launch("fsdp2", loud_model, tmp_path)
    check(loud_model, tmp_path, ranks)
    for rank in ranks:
        assert rank["kind"] == "FSDP" and rank["sharded"] > 0.9


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_zero3(loud_model, tmp_path):
    ranks = launch("zero3", loud_model, tmp_path)
    check(loud_model, tmp_path, ranks)
    for rank in ranks:
        assert (rank["kind"], rank["sharded"]) == ("DEEPSPEED", 1)
