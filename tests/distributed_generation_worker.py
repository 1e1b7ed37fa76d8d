"""What each process of `test_distributed_generation.py` runs: train, and answer prompts in the middle of it."""

import faulthandler
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from p2p_trainer.evaluation import generation
from p2p_trainer.evaluation.generation import generate
from p2p_trainer.launch import let_gloo_finish
from tests.conftest import make_rows
from tests.tiny_runs import SETTINGS, lora


# Seconds after which a process that waits for another one says where it waits, and ends.
PATIENCE = 90
LONGEST = 12
TEXTS = [row["text"] for row in make_rows(9, seed=3)]


def make_model(source, folder):
    """Write the tiny model but louder, and with more end tokens: its answers have 0 to `LONGEST` tokens."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape, generator=noise))
        for name, weight in model.named_parameters():
            if "_proj" in name:
                weight *= 10
    model.config.tie_word_embeddings = False
    model.generation_config.eos_token_id = [90, 143, 206]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def answers(model, tokenizer):
    """Several rounds of which the last is short; one answer that ends first, beside one that ends last; and less."""
    asked = [tokenizer(f"Query: {text}\nAnswer:\n")["input_ids"] for text in TEXTS]
    return {
        "many": generate(model, tokenizer, asked, LONGEST, batch_size=2),
        "two": generate(model, tokenizer, [asked[1], asked[3]], LONGEST, batch_size=1),
        "one": generate(model, tokenizer, asked[:1], LONGEST, batch_size=1),
        "none": generate(model, tokenizer, [], LONGEST),
    }


class AnswerCallback(TrainerCallback):
    """Answers in the middle of training, as an evaluator does, and looks at the model before and after."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.found = {}

    def on_evaluate(self, args, state, control, model, **kwargs):
        widths = set()
        embeddings = model.get_input_embeddings()
        watch = embeddings.register_forward_hook(lambda module, given, output: widths.add(given[0].shape[1]))
        # As an adapter's frozen parts may be: in another mode than the whole.
        embeddings.training = not model.training
        before = state_of(model)
        found = answers(model, self.tokenizer)
        watch.remove()
        restored = state_of(model) == before
        embeddings.training = model.training
        self.found[state.global_step] = {"answers": found, "widths": sorted(widths), "restored": restored}


def state_of(model):
    modes = [module.training for module in model.modules()]
    return modes, model.generation_config.to_dict(), model.config.use_cache, vars(model).get("generate")


def bars(model, tokenizer):
    """Text of each progress bar, and whether it is hidden; `None` hides it from what is no terminal."""
    shown = []
    own = generation.tqdm
    generation.tqdm = lambda rounds, **given: shown.append([given["desc"], given["disable"]]) or rounds
    generate(model, tokenizer, [[7, 8]], 1, progress="answering")
    generate(model, tokenizer, [[7, 8]], 1)
    generation.tqdm = own
    return shown


def fails_on_one(model, tokenizer):
    """What each process sees if the model of the second one fails."""
    model.train()
    if dist.get_rank() == 1:
        model.generate = broken
    try:
        generate(model, tokenizer, [[7, 8], [8, 9]], LONGEST, batch_size=1)
    except (MemoryError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}", all(module.training for module in model.modules())
    finally:
        vars(model).pop("generate", None)


def broken(**given):
    raise MemoryError("no room")


def main(kind, model, folder):
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    if kind == "fsdp2":
        # accelerate shards on devices alone; on a CPU it would fall back to DDP without a word.
        PartialState._prepare_backend = lambda *given, **settings: ("gloo", DistributedType.MULTI_GPU)
    tokenizer = AutoTokenizer.from_pretrained(model)
    callback = AnswerCallback(tokenizer)
    rows = [{"prompt": row["text"], "completion": f" {row['label']}"} for row in make_rows(16)]
    settings = {
        "use_cpu": kind != "fsdp2",
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": True,
        "ddp_find_unused_parameters": False,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_only_model": True,
    }
    trainer = SFTTrainer(
        model,
        SFTConfig(str(folder / "run"), **{**SETTINGS, **settings}),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:4]),
        processing_class=tokenizer,
        peft_config=lora(),
        callbacks=[callback],
    )
    trainer.train()
    weights = list(trainer.model.parameters())
    found = {
        "world_size": trainer.args.world_size,
        "kind": trainer.accelerator.distributed_type.value,
        "sharded": sum(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in weights) / len(weights),
        "found": callback.found,
    }
    if kind == "ddp":
        found["wrapped"] = answers(trainer.model_wrapped, tokenizer)
        found["bars"] = bars(trainer.model, tokenizer)
        found["failed"] = fails_on_one(trainer.model, tokenizer)
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
    trainer.accelerator.end_training()
    let_gloo_finish()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
