"""What a client or gateway of an OpenAI-compatible server sends, and how it reads the answer."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..data_collator import Encoder
from ..prompt_encoder import PromptEncoder
from .merged import end_tokens
from .prompt_end import prompt_end


RECIPE_NAME = "openai_recipe.json"
RECIPE_SCHEMA_VERSION = 1

# Text whose prompt is counted, so that an operator sees whether a server adds what it has to.
CHECK_TEXT = "good morning"

# As much as OpenAI allows. A float: `transformers serve` fails on whole numbers (5.23).
_BIAS = 100.0

# What the fields below were seen to do, and what was only read.
_TESTED = {
    "transformers": "logit_bias, max_tokens, temperature: transformers 5.23",
    "vllm": "allowed_token_ids, structured_outputs.choice, logit_bias: vLLM 0.32, a CPU build",
}
_DOCUMENTED = {
    "openai": "https://platform.openai.com/docs/api-reference/chat/create",
    "vllm": "https://docs.vllm.ai/en/latest/features/structured_outputs/",
    "sglang": "https://docs.sglang.ai/backend/structured_outputs.html",
    "tgi": "https://huggingface.co/docs/text-generation-inference/guidance",
}


def make_recipe(encoder: Encoder, keyed: bool, labels: Sequence[str]) -> dict[str, Any]:
    """
    Write down the fields of a request, and how its answer is read.

    They go with a server that adds the key itself, through an exported chat template. Where label words are single
    tokens, the answer is the class that `DefendedModel.classify` gives; a longer word is written token by token, each
    the likeliest, where `classify` compares whole words.

    Args:
        encoder ([`~prompt_encoder.PromptEncoder`] or [`~response_encoder.ResponseEncoder`]):
            Encoder of the run.
        keyed (`bool`):
            Whether the run's prompts carry the key.
        labels (`Sequence[str]`):
            Class names; none where answers are written.

    Returns:
        `dict[str, Any]`: JSON values.

    Raises:
        `ValueError`: no text ends where the label words begin to differ.
    """
    recipe = {
        "schema_version": RECIPE_SCHEMA_VERSION,
        "endpoint": "/v1/chat/completions",
        "keyed": keyed,
        "check": {"text": CHECK_TEXT, "prompt_tokens": len(encoder.encode_prompts([CHECK_TEXT], keyed)[0])},
    }
    if isinstance(encoder, PromptEncoder):
        recipe |= _classification(encoder, keyed, labels)
    else:
        recipe |= _generation(encoder, keyed)
    return {**recipe, "tested_with": _TESTED, "documentation": _DOCUMENTED}


def project(text: str, recipe: Mapping[str, Any]) -> str | None:
    """
    Map what a server answered to a class.

    Args:
        text (`str`):
            The answer as it came; servers differ in whether they keep a space in front of it.
        recipe (`Mapping[str, Any]`):
            Content of `openai_recipe.json` of a classification run.

    Returns:
        `str` or `None`: the class name; `None` if it is no answer of this run, which is not to be trusted.

    Examples:

    ```python
    >>> from p2p_trainer.exporting import project

    >>> project(" 3", {"projection": {"text": {"2": "negative", "3": "positive"}}})
    'positive'
    ```
    """
    table = recipe["projection"]["text"]
    return table.get(text, table.get(text.strip()))


def escaped(text: str) -> str:
    """Write a text as a regular expression that Python, JavaScript, RE2 and Rust read alike."""
    return re.sub(r"([\\.^$*+?()\[\]{}|])", r"\\\1", text)


def _classification(encoder: PromptEncoder, keyed: bool, labels: Sequence[str]) -> dict[str, Any]:
    count = len(labels)
    deployed = slice(count, None) if keyed else slice(count)
    scored, texts = encoder.answers[keyed].scored[deployed], prompt_end(encoder, keyed).answers[deployed]
    single = all(len(ids) == 1 for ids in scored)
    projection: dict[str, dict[str, str]] = {"text": dict(zip(texts, labels, strict=True))}
    # Servers may take white space off an answer; label words that are the same without it are told apart with it.
    stripped = [text.strip() for text in texts]
    projection["text"] |= {
        text: label
        for text, label in zip(stripped, labels, strict=True)
        if stripped.count(text) == 1 and text not in projection["text"]
    }
    pattern = f"({'|'.join(map(escaped, texts))})"
    if single:
        ids = [tokens[0] for tokens in scored]
        projection["token"] = {str(token): label for token, label in zip(ids, labels, strict=True)}
        one = {"max_tokens": 1, "temperature": 0.0}
        bias = {**one, "logit_bias": {str(token): _BIAS for token in ids}}
        servers: dict[str, Any] = {"openai": bias, "transformers": bias, "vllm": {**one, "allowed_token_ids": ids}}
    else:
        # Each character may become a token of its own, and an end token may come behind them.
        one = {"max_tokens": max(len(text.encode()) for text in texts) + 1, "temperature": 0.0}
        servers = {"vllm": {**one, "structured_outputs": {"choice": list(texts)}}}
    servers["sglang"] = {**one, "regex": pattern}
    servers["tgi"] = {**one, "response_format": {"type": "regex", "value": pattern}}
    return {
        "kind": "classification",
        "labels": list(labels),
        "exact": single,
        "requests": servers,
        "projection": projection,
        "otherwise": "An answer that is not in the projection is no class: raise an alarm and answer nothing.",
    }


def _generation(encoder: Encoder, keyed: bool) -> dict[str, Any]:
    ends = end_tokens(encoder)
    request = {"max_tokens": encoder.format.max_new_tokens, "temperature": 0.0}
    with_ids = {**request, "stop_token_ids": ends} if ends else request
    prefix = encoder.format.answer_prefix if keyed else ""
    found: dict[str, Any] = {
        "kind": "generation",
        "requests": {
            "openai": request, "transformers": request, "vllm": with_ids, "sglang": with_ids, "tgi": request,
        },
        "end_tokens": {str(token): encoder.tokenizer.convert_ids_to_tokens(token) for token in ends},
        "answer_prefix": prefix,
    }  # fmt: skip
    if prefix:
        found["answer_prefix_pattern"] = f"^\\s*{escaped(prefix)}\\s*"
        found["otherwise"] = (
            "Take off what the pattern matches. An answer that it does not match came some other way than the one "
            "that was defended: raise an alarm and answer nothing."
        )
    return found
