"""What a model makes of prompts, as vectors."""

from collections.abc import Sequence

import numpy as np
import torch


def last_hidden_states(
    model: torch.nn.Module, prompts: Sequence[Sequence[int]], pad_token_id: int, batch_size: int = 64
) -> np.ndarray:
    """
    Read the hidden state from which the answer is predicted: last layer, last token of the prompt.

    The last layer is what the language-modelling head reads, behind the final normalization where a model has one.
    Batches are formed over prompts sorted by length, so they depend on the prompts alone. In a distributed run every
    process reads every prompt.

    Args:
        model (`torch.nn.Module`):
            Causal language model, possibly wrapped; it is put into evaluation mode and back.
        prompts (`Sequence[Sequence[int]]`):
            Token ids.
        pad_token_id (`int`):
            Padding token.
        batch_size (`int`, *optional*, defaults to `64`):
            Prompts per forward pass.

    Returns:
        `np.ndarray` of shape `(prompts, hidden size)`, float32: in the order of `prompts`.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))
    found: list[np.ndarray | None] = [None] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                states = _read(model, [prompts[row] for row in batch], pad_token_id, device)
                for row, state in zip(batch, states, strict=True):
                    found[row] = state
    finally:
        model.train(was_training)
    return np.stack(found) if found else np.empty((0, 0), dtype=np.float32)


def _read(
    model: torch.nn.Module, prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device
) -> np.ndarray:
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_token_id)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        # Padding stands on the left, so that the answer position is the same in every row.
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    seen: list[torch.Tensor] = []
    # `output_hidden_states` would keep the states of all layers and tokens. The whole model is called, and not its
    # decoder alone, so that adapters and autocast work as in any other call.
    decoder = getattr(model, "module", model).get_decoder()
    hook = decoder.register_forward_hook(lambda module, inputs, output: seen.append(output[0][:, -1].float().cpu()))
    try:
        model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0).to(device),
            logits_to_keep=1,
            use_cache=False,
        )
    finally:
        hook.remove()
    return seen[-1].numpy()
