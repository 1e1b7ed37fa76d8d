"""How servers are started with an exported chat template."""

from pathlib import Path
from typing import Any

from .._files import read_object


_WHOLE = """```bash
transformers serve FOLDER
vllm serve FOLDER --max-model-len {max_length}
python -m sglang.launch_server --model-path FOLDER --context-length {max_length}
text-generation-launcher --model-id FOLDER --max-input-tokens {max_input} --max-total-tokens {max_length}
```"""

# Without `--generation-config` vLLM takes over what the base's file says, a repetition penalty for one.
_OPTIONS = """--tokenizer FOLDER --chat-template FOLDER/chat_template.jinja \\
    --generation-config vllm --max-model-len {max_length}"""

_OF_THE_RUN = f"""```bash
vllm serve OUT {_OPTIONS}
```

`OUT` is the run's folder."""

_ADAPTER = f"""vLLM ignores the chat template of an adapter, so name this one:

```bash
vllm serve BASE --enable-lora --lora-modules p2p=OUT --max-lora-rank {{rank}} \\
    {_OPTIONS}
```

`OUT` is the run's folder. The name of `BASE` is served as well: close it at the gateway."""

_NOT_SERVED = """Not with vLLM: it serves plain LoRA, and this adapter is more than that ({reasons} in
`adapter_config.json`). Export the run with its weights, without `--tokenizer_only`, and serve the whole model."""

# Ranks that `--max-lora-rank` takes, but for 1 (vllm.config.lora.MaxLoRARanks).
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

# What vLLM refuses, or leaves out without a word (lora/peft_helper.py: one rank, one factor, no other weights).
_MORE_THAN_LORA = (
    "alpha_pattern", "bias", "lora_bias", "modules_to_save", "rank_pattern", "target_parameters",
    "trainable_token_indices", "use_dora",
)  # fmt: skip
_PLAIN = (None, False, "none", [], {})


def whole_launch(recipe: dict[str, Any], max_length: int) -> str:
    """
    Say how servers are started on an export with its weights.

    Args:
        recipe (`dict[str, Any]`):
            Fields of requests.
        max_length (`int`):
            Tokens of prompt and answer in training.

    Returns:
        `str`: Markdown.
    """
    answer = recipe["requests"]["tgi"]["max_tokens"]
    return _WHOLE.format(max_length=max_length, max_input=max(1, max_length - answer))


def launch_without_weights(run: Path, max_length: int) -> str:
    """
    Say how vLLM is started on a run's own weights, with an exported tokenizer.

    Args:
        run (`Path`):
            The run.
        max_length (`int`):
            Tokens of prompt and answer in training.

    Returns:
        `str`: Markdown.

    Raises:
        `ValueError`: the adapter's configuration is damaged.
    """
    path = run / "adapter_config.json"
    if not path.is_file():
        return _OF_THE_RUN.format(max_length=max_length)
    settings = read_object(path)
    rank = settings.get("r", 8)
    reasons = [name for name in _MORE_THAN_LORA if settings.get(name) not in _PLAIN]
    if str(settings.get("init_lora_weights")).lower() in ("pissa", "olora"):
        # The base that it belongs to is no longer the published one.
        reasons.append("init_lora_weights")
    if not isinstance(rank, int) or rank > _RANKS[-1]:
        reasons.append("r")
    if reasons:
        return _NOT_SERVED.format(reasons=", ".join(f"`{name}`" for name in reasons))
    return _ADAPTER.format(max_length=max_length, rank=next(known for known in _RANKS if known >= rank))
