"""Fine-tuning of language models on data that may be poisoned, with the backdoor defused."""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .attacks import Attack, get_attack
    from .callbacks import BackdoorEvalCallback
    from .config import P2PConfig, P2PScriptArguments
    from .data_collator import P2PDataCollator
    from .defenses import Defense, get_defense
    from .evaluation import BackdoorEvaluator
    from .inference import DefendedModel
    from .label_space import LabelSpace
    from .pipelines import P2PTextClassificationPipeline, P2PTextGenerationPipeline
    from .prompt_encoder import PromptEncoder
    from .prompt_format import PromptFormat
    from .reserve import ReserveStrategy
    from .tasks import Task, get_task
    from .trainer import P2PTrainer

_HOMES = {
    "Attack": "attacks",
    "BackdoorEvalCallback": "callbacks",
    "BackdoorEvaluator": "evaluation",
    "DefendedModel": "inference",
    "Defense": "defenses",
    "LabelSpace": "label_space",
    "P2PConfig": "config",
    "P2PDataCollator": "data_collator",
    "P2PScriptArguments": "config",
    "P2PTextClassificationPipeline": "pipelines",
    "P2PTextGenerationPipeline": "pipelines",
    "P2PTrainer": "trainer",
    "PromptEncoder": "prompt_encoder",
    "PromptFormat": "prompt_format",
    "ReserveStrategy": "reserve",
    "Task": "tasks",
    "get_attack": "attacks",
    "get_defense": "defenses",
    "get_task": "tasks",
}

__all__ = [
    "Attack",
    "BackdoorEvalCallback",
    "BackdoorEvaluator",
    "DefendedModel",
    "Defense",
    "LabelSpace",
    "P2PConfig",
    "P2PDataCollator",
    "P2PScriptArguments",
    "P2PTextClassificationPipeline",
    "P2PTextGenerationPipeline",
    "P2PTrainer",
    "PromptEncoder",
    "PromptFormat",
    "ReserveStrategy",
    "Task",
    "get_attack",
    "get_defense",
    "get_task",
]


def __getattr__(name: str) -> Any:
    # Imported when first used: `import p2p_trainer` must not wait for torch and transformers.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
