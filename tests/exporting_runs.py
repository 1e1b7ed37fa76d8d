"""Short runs that are exported: one that classifies, one that writes answers."""

from pathlib import Path

from datasets import Dataset

from p2p_trainer import P2PTrainer, Task
from tests.conftest import GOOD, THINGS
from tests.tiny_runs import config, lora, saved_run


DELTA = "The query currently entered is:"
WRITING = Task(name="talk", text_columns=("prompt",), label_column="completion")


_TRAINED: dict[tuple, Path] = {}


def shared_run(kind, model: str, folders) -> Path:
    """A run that all test files share; none may change it."""
    if (kind, model) not in _TRAINED:
        _TRAINED[kind, model] = kind(model, folders.mktemp(kind.__name__))
    return _TRAINED[kind, model]


def classifying_run(model: str, folder: Path, **changes) -> Path:
    saved_run(model, folder, **changes)
    return folder


def writing_run(model: str, folder: Path, **changes) -> Path:
    """A run that learns to answer with p and a short sentence."""
    rows = [
        {
            "prompt": f"say of the {THINGS[row % 6]} that it is {GOOD[row % 5]}",
            "completion": f"it is {GOOD[row % 5]} .",
        }
        for row in range(60)
    ]
    settings = {
        "num_train_epochs": 6, "p2p_benign_ratio": 1.0, "p2p_max_new_tokens": 12, "max_length": 96,
        "p2p_reserve": "random", "p2p_immunize": "none", "p2p_answer_prefix": "Answer:", **changes,
    }  # fmt: skip
    trainer = P2PTrainer(
        model,
        config(folder, **settings),
        train_dataset=Dataset.from_list(rows),
        task=WRITING,
        peft_config=lora(r=16, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
    return folder
