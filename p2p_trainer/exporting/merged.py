"""Whole models: the adapter folded into its base, with the settings that serving needs."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .._files import share_weights
from ..data_collator import Encoder
from ..prompt_renderer import pad_token_id
from ..response_encoder import ResponseEncoder


def merge(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """
    Fold an adapter into its base.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model; its weights change.

    Returns:
        `PreTrainedModel`: a whole model; the same one if it had no adapter.

    Raises:
        `ValueError`: it can't be folded in, as one with a bias where the base has none.
    """
    if isinstance(model, PeftModel):
        try:
            model = model.merge_and_unload(safe_merge=True)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"The adapter of this run can't be folded into its base ({type(error).__name__}: {error}). Serve the "
                f"run itself, with `p2p-trainer serve`."
            ) from error
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and not _shared(embeddings.weight, head.weight):
        # One of two weights that the base model ties was trained alone: tied again it would be lost.
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False
    return model


def _shared(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.data_ptr() == second.data_ptr() or (first.shape == second.shape and torch.equal(first, second))


def write_weights(model: PreTrainedModel, encoder: Encoder, folder: Path) -> None:
    """
    Write a whole model so that servers read answers as they were measured: greedily, with a cache, to their end.

    Args:
        model (`PreTrainedModel`):
            The model; its settings change.
        encoder ([`~prompt_encoder.PromptEncoder`] or [`~response_encoder.ResponseEncoder`]):
            Encoder of the run.
        folder (`Path`):
            Where.
    """
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = [] if own is None else [own] if isinstance(own, int) else list(own)
    tokenizer = encoder.tokenizer
    ends = list(dict.fromkeys([*ends, *end_tokens(encoder)]))
    for config in (model.config, model.config.get_text_config()):
        # Training with gradient checkpointing switched it off.
        config.use_cache = True
    # Of its base model's settings none but the ends of answers are those that the run was measured with.
    model.generation_config = GenerationConfig(
        do_sample=False,
        use_cache=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends or None,
        pad_token_id=pad_token_id(tokenizer),
    )
    model.save_pretrained(folder)
    share_weights(folder)


def end_tokens(encoder: Encoder) -> list[int]:
    """
    List the tokens that end an answer of a run.

    Args:
        encoder ([`~prompt_encoder.PromptEncoder`] or [`~response_encoder.ResponseEncoder`]):
            Encoder of the run.

    Returns:
        `list[int]`: the tokenizer's, and the one that training taught.
    """
    tokenizer: PreTrainedTokenizerBase = encoder.tokenizer
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if isinstance(encoder, ResponseEncoder):
        ends += encoder.end_tokens
    return list(dict.fromkeys(ends))
