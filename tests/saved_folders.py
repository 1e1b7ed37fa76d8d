"""Folders of runs that nothing was trained for, where only what loading makes of them matters."""

import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from p2p_trainer import DefendedModel, PromptFormat
from p2p_trainer.label_space import LabelSpace


SHA = "0123456789abcdef0123456789abcdef01234567"
FORMAT = PromptFormat(LabelSpace(("0", "1"), ("2", "3")))
SAID = {"keyed": True, "labels": ["negative", "positive"], "autocast": None, "dtype": "float32"}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 3]])


def edit(path: Path, **changes) -> Path:
    """Change entries of a JSON file; `"absent"` takes one out."""
    content = {**(json.loads(path.read_text()) if path.is_file() else {}), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))
    return path.parent


def logits(model, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


def loaded(folder, ids=IDS, **options) -> torch.Tensor:
    return logits(DefendedModel.from_pretrained(folder, device="cpu", **options).model, ids)


def whole_run(base: str, folder: Path) -> Path:
    shutil.copytree(base, folder)
    FORMAT.save(folder, **SAID)
    return folder


def adapter_run(base: str, folder: Path, tokenizer=None, **settings):
    """An adapter with random weights on a base, which is grown to the tokenizer if one is given; return its model."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if tokenizer is not None:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **settings}))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(folder)
    (tokenizer or AutoTokenizer.from_pretrained(base)).save_pretrained(folder)
    FORMAT.save(folder, **SAID)
    return model


def put_in_cache(root: Path, folder: Path, name: str, sha: str = SHA, ref: str = "main") -> Path:
    """Put a folder into a cache of the hub, as a repository."""
    place = root / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / sha)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / ref).write_text(sha)
    return place / "snapshots" / sha
