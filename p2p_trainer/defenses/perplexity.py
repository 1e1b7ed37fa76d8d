"""Perplexity of texts under a causal language model, batched and masked."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..helper_models import check_causal_model, load_causal_model


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_REMEDY = "Name the folder of a small causal language model, with weights in safetensors, with the option `model`."

# Tokens per forward pass, padding included: the logits of long texts must not fill the memory.
_BATCH_TOKENS = 4096


class PerplexityModel:
    """
    Measures how odd a causal language model finds texts: exp of the mean negative log-likelihood of their tokens.

    The mean is over real tokens only, in float64; padding stands on the right and is masked. The first token is scored
    behind the tokenizer's BOS token, or its EOS token if it has no BOS; a tokenizer that has neither leaves the first
    token without a score. A text without any scored token has perplexity 1. Weights are held in float32, so that a
    result does not depend on its batch beyond rounding.

    The model is loaded when it is first needed, onto the accelerator if there is one; it is not pickled.

    Args:
        name (`str`):
            Folder or hub id of the model, with weights in safetensors.
        batch_size (`int`, *optional*, defaults to `32`):
            Most texts per forward pass; fewer where they are long.
    """

    def __init__(self, name: str, batch_size: int = 32) -> None:
        self.name = name
        self.batch_size = batch_size
        # Texts that the model has read so far.
        self.passes = 0
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_loaded": None}

    def check(self) -> None:
        """
        Look whether the model is there, without loading its weights.

        Raises:
            `ValueError`: configuration or tokenizer can't be loaded, or it is no causal language model.
        """
        check_causal_model("perplexity model", self.name, _REMEDY)

    def load(self) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """
        Load the model, unless it is loaded already.

        Returns:
            `tuple[PreTrainedModel, PreTrainedTokenizerBase]`: model, in evaluation mode, and tokenizer.

        Raises:
            `ValueError`: it can't be loaded.
        """
        if self._loaded is None:
            self._loaded = load_causal_model("perplexity model", self.name, _REMEDY, exact=True)
        return self._loaded

    def release(self) -> None:
        """Give back the memory of the model; it is loaded again when needed."""
        self._loaded = None

    @cached_property
    def context(self) -> list[int]:
        """`list[int]`: the token in front of every text, none if the tokenizer has no such token."""
        _, tokenizer = self.load()
        token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        return [] if token is None else [token]

    @property
    def max_tokens(self) -> int | None:
        """`int` or `None`: tokens that the model can read at once; `None` if its configuration sets no limit."""
        return getattr(self.load()[0].config.get_text_config(), "max_position_embeddings", None)

    def fits(self, text: str) -> bool:
        """
        Say whether the model can read a text in one piece.

        Args:
            text (`str`):
                Text.

        Returns:
            `bool`: whether it can.
        """
        return self.max_tokens is None or len(self._encode([text])[0]) <= self.max_tokens

    def perplexities(self, texts: Sequence[str]) -> np.ndarray:
        """
        Measure texts.

        Args:
            texts (`Sequence[str]`):
                Texts. Tokens beyond [`max_tokens`] are not read.

        Returns:
            `np.ndarray` of shape `(texts,)`, float64: perplexities.
        """
        rows = [row[: self.max_tokens] for row in self._encode(texts)] if texts else []
        losses = np.zeros(len(rows))
        # Of a single token nothing is scored.
        order = sorted((row for row in range(len(rows)) if len(rows[row]) > 1), key=lambda row: (len(rows[row]), row))
        for batch in self._batches(order, rows):
            losses[batch] = self._mean_nll([rows[row] for row in batch])
            self.passes += len(batch)
        return np.exp(losses)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        _, tokenizer = self.load()
        # Not verbose: the caller sees to texts that are too long.
        encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [self.context + ids for ids in encoded["input_ids"]]

    def _batches(self, order: Sequence[int], rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        batch: list[int] = []
        for row in order:
            # Sorted by length: this row would be the longest.
            if len(batch) == self.batch_size or (batch and (len(batch) + 1) * len(rows[row]) > _BATCH_TOKENS):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _mean_nll(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        import torch
        from torch.nn.functional import cross_entropy

        model, _ = self.load()
        width = max(map(len, rows))
        # Masked, so any token will do as padding.
        ids = torch.tensor([list(row) + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        device = next(model.parameters()).device
        ids = ids.to(device)
        # Serving may ask within the autocast of the task's model.
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            logits = model(input_ids=ids, attention_mask=mask.to(device), use_cache=False).logits
            losses = cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        scored = mask[:, 1:].numpy()
        losses = losses.view(len(rows), -1).cpu().numpy().astype(np.float64)
        return np.where(scored, losses, 0.0).sum(axis=1) / scored.sum(axis=1)
