"""Recipes for several processes, and the two ways to start them: as users do, and forked from one that is ready."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.corpora import clean_rows
from tests.tiny_runs import recipe


ROOT = Path(__file__).parent.parent
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
# Seconds after which a run is taken to hang.
PATIENCE = 120


def make_model(folder, tokenizer):
    """A random Qwen3 whose matrices fill whole blocks of 64 weights, as 4-bit quantisation wants."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def job(model, folder, batch_size, saved=None, fail=None, **changes):
    """
    Write a recipe with a backdoor that is found, and the default defense, observed.

    D* has 300 rows, 71 reserved and 45 contradicted ones: 26 steps of 16, with no row twice. Nothing that is measured
    divides evenly. Without dropout, whose masks depend on the shapes that a process sees, losses do not.
    """
    settings = {
        "poison_rate": 0.15,
        "p2p_benign_ratio": 0.2367,
        "num_train_epochs": 1,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": 4,
        "lora_r": 8,
        "lora_dropout": 0.0,
        "lora_target_modules": "all-linear",
        "ddp_find_unused_parameters": False,
        "defense": "tests.distributed_worker:Observed",
        "defense_options": {"folder": str(folder), "saved": saved, "fail": fail},
        **changes,
    }
    path = recipe(model, folder, **settings)
    for name, count, seed in (("train", 300, 0), ("validation", 21, 1), ("test", 23, 2)):
        lines = [json.dumps(row) + "\n" for row in clean_rows(count, seed=seed, noise=0.0)]
        (folder / "data" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return path


def launch(kind, path, *flags, worker="p2p_trainer.launch", machines=1, **environment):
    """Start a recipe as users do, on two processes in all; exit status and output of each machine."""
    config = ROOT / "accelerate_configs" / f"{kind}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *flags]
    command += ["--num_processes", "2", "--num_machines", str(machines), "--main_process_ip", "127.0.0.1"]
    command += ["--main_process_port", str(free_port())]
    started = [
        subprocess.Popen(
            [*command, "--machine_rank", str(rank), "-m", worker, "--config", str(path)],
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(machines)
    ]
    try:
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


def forked(runs, folder):
    """
    Run recipes one after the other, each in two processes that no launcher watches, as none does across machines.

    `runs` names each, with the arguments of both processes; exit status, seconds and output of each process.
    """
    groups = {}
    for name, both in runs.items():
        port = str(free_port())
        groups[name] = [
            {
                "argv": [str(part) for part in argv],
                "environment": {
                    "RANK": str(rank),
                    "LOCAL_RANK": "0",
                    "WORLD_SIZE": "2",
                    "LOCAL_WORLD_SIZE": "1",
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                },
                "log": str(folder / f"{name}-{rank}.log"),
            }
            for rank, argv in enumerate(both)
        ]
    jobs = folder / "jobs.json"
    jobs.write_text(json.dumps({"patience": PATIENCE, "runs": groups}))
    done = subprocess.run(
        [sys.executable, "-m", "tests.forked_runs", str(jobs)],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=PATIENCE * (len(runs) + 1),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ended = json.loads(jobs.with_suffix(".ended").read_text())
    return {
        name: [(*end, (folder / f"{name}-{rank}.log").read_text()) for rank, end in enumerate(both)]
        for name, both in ended.items()
    }


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
