"""The benchmark for GPUs: its counts by hand, and a run of its tiny model on whatever is here."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from p2p_trainer import get_task
from p2p_trainer.assembly import make_encoder
from tests.performance import gpu_bench


def test_flops_of_qwen3_8b_by_hand():
    # 36 layers: q and o 4096 x 4096, k and v 4096 x 1024, three of 4096 x 12288; LoRA of 16 on q and v.
    frozen = 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288)
    assert frozen == 6_945_767_424
    adapter = 36 * 16 * (4096 + 4096 + 4096 + 1024)
    scores = 6 * 36 * 4096 * 128
    head = 2 * 4 * 4096 * 151_936
    found = gpu_bench.flops(gpu_bench.config_of("8b"), rows=32, tokens=4096, length=128)
    assert found == 4096 * (4 * frozen + 6 * adapter + scores) + 32 * head


def test_flops_are_those_that_a_pass_takes():
    config = gpu_bench.config_of("tiny")
    model = gpu_bench.build(config, "eager").float()
    network = gpu_bench.get_peft_model(model, gpu_bench.LoraConfig(**gpu_bench.LORA))
    ids = torch.arange(2 * 64).reshape(2, 64)
    with FlopCounterMode(display=False) as counter:
        network(input_ids=ids, logits_to_keep=gpu_bench.ANSWER).logits.sum().backward()
    # Eager attention computes the masked half of the scores as well.
    scores = 6 * config.num_hidden_layers * 64 * 64 * ids.numel()
    # Below the lowest layer nothing is trained: no gradients of its input, through frozen q, k and v and through the
    # adapter of q and v, and none of its keys.
    lowest = ids.numel() * (2 * 64 * (64 + 32 + 32) + 2 * 64 * 16 * 2 + 2 * 64 * 64)
    counted = gpu_bench.flops(config, rows=2, tokens=ids.numel(), length=64) + scores - lowest
    assert counter.get_total_flops() == counted


def test_both_trainers_get_the_same_rows_as_the_loop(tmp_path):
    work = gpu_bench.work_of(steps=3, batch=4, max_length=128, words=None, folder=str(tmp_path))
    assert len(work.rows) == 9 and len(work.tokenized) == 11
    args = gpu_bench.p2p_config(str(tmp_path), max_length=128)
    encoder = make_encoder(get_task("sst2"), args, work.tokenizer)
    ids, labels = encoder.encode_rows(work.rows["text"][:], work.rows["label"][:], [False] * 9)
    assert work.tokenized["input_ids"][:9] == ids and work.tokenized["labels"][:9] == labels
    assert all(sum(label != -100 for label in row) == gpu_bench.ANSWER for row in work.tokenized["labels"][:])
    batch = gpu_bench.padded(work, [0, 1])
    assert batch["input_ids"].shape == (2, 128)
    assert batch["attention_mask"].sum(1).tolist() == [len(ids[0]), len(ids[1])]
    assert batch["labels"][0, : len(ids[0])].tolist() == labels[0] and batch["labels"][0, -1] == -100


def test_the_tiny_model_runs_here(capsys):
    gpu_bench.main(["--model", "tiny", "--steps", "2"])
    shown = capsys.readouterr().out
    assert torch.cuda.is_available() or "no GPU here" in shown
    lines = [[part.strip() for part in line.strip("│").split("│")] for line in shown.splitlines() if "│" in line]
    measured = {line[0]: line for line in lines if line[1].endswith("ms")}
    assert list(measured) == list(gpu_bench.CONTENDERS)
    for name, line in measured.items():
        tokens, real = int(line[2]), int(line[3])
        assert 0 < real < tokens, name
    # The loop pads each row to 128 tokens, the trainers to the longest of a batch.
    loop, sft = (measured[name] for name in ("hand-written loop", "SFTTrainer"))
    assert loop[4] == "1.00"
    assert int(loop[2]) / int(loop[3]) > 1.5 * int(sft[2]) / int(sft[3])
