"""P2PTrainer: what is trained, saved and measured."""

import torch
from peft import LoraConfig

from p2p_trainer import P2PConfig, P2PTrainer, get_attack


def test_trains_and_every_adapter_weight_moves(tiny_model, toy_rows, toy_eval, tmp_path):
    attack = get_attack("badnets", target="1", poison_rate=0.1)
    trainer = P2PTrainer(
        tiny_model,
        P2PConfig(
            str(tmp_path),
            num_train_epochs=2,
            per_device_train_batch_size=8,
            eval_strategy="epoch",
            bf16=False,
            learning_rate=1e-2,
            gradient_checkpointing=False,
            disable_tqdm=True,
        ),
        train_dataset=toy_rows,
        eval_dataset=toy_eval,
        attacks=[attack],
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(before[name], weight) == (not weight.requires_grad), name
