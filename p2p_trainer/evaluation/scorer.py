"""Scores label words at the answer position: one forward pass per row, no generation."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from tqdm.auto import tqdm

from .._compat import attention_implementation
from ..label_space import Answers


@dataclass(frozen=True)
class Scores:
    """
    What a model says about rows.

    Parameters:
        log_probs (`np.ndarray` of shape `(rows, 2n)`, float32):
            Log-probability of each label word, summed over its tokens.
        free (`np.ndarray` of shape `(rows,)`, int64):
            Which of the 2n words the unrestricted argmax over the vocabulary spells, -1 for anything else.
    """

    log_probs: np.ndarray
    free: np.ndarray

    def take(self, rows: np.ndarray) -> "Scores":
        """Return the scores of some rows."""
        return Scores(self.log_probs[rows], self.free[rows])

    def deployed(self, keyed: bool) -> np.ndarray:
        """Return the log-probabilities of the n words that a deployment allows: the extended ones with the key."""
        n = self.log_probs.shape[1] // 2
        return self.log_probs[:, n:] if keyed else self.log_probs[:, :n]

    def probabilities(self, keyed: bool) -> np.ndarray:
        """Return the probability of each class among the deployed words; rows sum to 1."""
        words = self.deployed(keyed)
        weights = np.exp(words - words.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)


class LabelScorer:
    """
    Scores the label words behind prompts.

    Batches are formed over rows sorted by length, before they are shared out to processes: the result is the same for
    every number of processes, and every process runs the same number of forward passes, as sharded models need.

    Args:
        answers ([`~label_space.Answers`]):
            Token ids of the label words behind these prompts.
        pad_token_id (`int`):
            Padding token.
        batch_size (`int`, *optional*, defaults to `32`):
            Rows per forward pass.
    """

    def __init__(self, answers: Answers, pad_token_id: int, batch_size: int = 32) -> None:
        self.pad_token_id = pad_token_id
        self.batch_size = batch_size
        # A trie of the words. Its inner nodes are what the model has to read besides the prompt: node 0 is the prompt
        # itself, and with single-token words there is no other.
        paths: dict[tuple[int, ...], int] = {(): 0}
        for ids in answers.scored:
            for length in range(1, len(ids)):
                paths.setdefault(ids[:length], len(paths))
        self.paths = list(paths)
        self._steps = [[(paths[ids[:depth]], token) for depth, token in enumerate(ids)] for ids in answers.scored]

    def score(self, model: torch.nn.Module, prompts: Sequence[Sequence[int]], progress: str | None = None) -> Scores:
        """
        Score every prompt once.

        Args:
            model (`torch.nn.Module`):
                Causal language model, possibly wrapped; it is put into evaluation mode and back.
            prompts (`Sequence[Sequence[int]]`):
                Token ids.
            progress (`str`, *optional*):
                Text of a progress bar, shown on the main process's terminal.

        Returns:
            [`Scores`]: in the order of `prompts`, the same on every process.
        """
        device = next(model.parameters()).device
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        order = sorted(range(len(prompts)), key=lambda row: (-self.length(prompts[row]), row))
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        result = torch.zeros(len(prompts), len(self._steps) + 1, dtype=torch.float32, device=device)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                rounds = range(0, len(batches), world)
                hidden = progress is None or rank > 0
                for first in tqdm(rounds, desc=progress, disable=True if hidden else None, leave=False):
                    # A process without a batch of its own repeats the last one, and throws the result away.
                    batch = batches[min(first + rank, len(batches) - 1)]
                    scores = self._score_batch(model, [prompts[row] for row in batch], device)
                    if first + rank < len(batches):
                        result[torch.tensor(batch, device=device)] = scores
        finally:
            model.train(was_training)
        if world > 1:
            dist.all_reduce(result)
        array = result.cpu().numpy()
        return Scores(array[:, :-1], array[:, -1].astype(np.int64))

    def length(self, prompt: Sequence[int]) -> int:
        """
        Say how long a prompt is; a seam for prompts that hold more than tokens.

        Args:
            prompt (`Sequence[int]`):
                Token ids.

        Returns:
            `int`: tokens.
        """
        return len(prompt)

    def _score_batch(
        self, model: torch.nn.Module, prompts: Sequence[Sequence[int]], device: torch.device
    ) -> torch.Tensor:
        logits = self.logits(model, prompts, device)
        log_probs = logits.float().log_softmax(-1)
        top = logits.argmax(-1)
        scores = torch.stack([sum(log_probs[:, node, token] for node, token in steps) for steps in self._steps], dim=1)
        # Greedy decoding spells a word if and only if each of its tokens is the argmax where it is due.
        spelled = torch.stack(
            [torch.stack([top[:, node] == token for node, token in steps], dim=1).all(dim=1) for steps in self._steps],
            dim=1,
        )
        free = torch.where(spelled.any(dim=1), spelled.int().argmax(dim=1), -1)
        return torch.cat([scores, free[:, None].float()], dim=1)

    def logits(self, model: torch.nn.Module, prompts: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
        """
        Read prompts and the beginnings of words; a seam for prompts that hold more than tokens.

        Args:
            model (`torch.nn.Module`):
                Causal language model.
            prompts (`Sequence[Sequence[int]]`):
                Token ids.
            device (`torch.device`):
                Device of the model.

        Returns:
            `torch.Tensor` of shape `(prompts, paths, vocabulary)`: logits behind each prompt and each of `paths`.
        """
        if len(self.paths) == 1 or attention_implementation(model) == "sdpa":
            return self._tree_logits(model, prompts, device)
        return self._unrolled_logits(model, prompts, device)

    def _tree_logits(
        self, model: torch.nn.Module, prompts: Sequence[Sequence[int]], device: torch.device
    ) -> torch.Tensor:
        """Read prompt and trie in one pass: each node attends to the prompt and to its own path."""
        longest = max(map(len, prompts))
        nodes = len(self.paths) - 1
        ids = torch.full((len(prompts), longest + nodes), self.pad_token_id)
        mask = torch.zeros(len(prompts), longest + nodes, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            # Padding stands on the left, so that the answer position is the same in every row and `logits_to_keep`
            # can be a number, which every transformers version knows.
            ids[row, longest - len(prompt) : longest] = torch.tensor(prompt)
            mask[row, longest - len(prompt) : longest] = True
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        attention: torch.Tensor = mask.long()
        if nodes:
            depths = torch.tensor([len(path) for path in self.paths[1:]])
            ids[:, longest:] = torch.tensor([path[-1] for path in self.paths[1:]])
            lengths = mask.sum(-1, keepdim=True)
            positions[:, longest:] = lengths + depths - 1
            attention = self._tree_attention(mask, longest)
        return model(
            input_ids=ids.to(device),
            attention_mask=attention.to(device),
            position_ids=positions.to(device),
            logits_to_keep=nodes + 1,
            use_cache=False,
        ).logits

    def _tree_attention(self, mask: torch.Tensor, longest: int) -> torch.Tensor:
        size = mask.shape[1]
        attend = torch.ones(size, size, dtype=torch.bool).tril()
        attend[longest:, longest:] = False
        for node, path in enumerate(self.paths[1:]):
            for depth in range(1, len(path) + 1):
                attend[longest + node, longest + self.paths.index(path[:depth]) - 1] = True
        readable = mask.clone()
        readable[:, longest:] = True
        attention = attend[None] & readable[:, None, :]
        # A row of padding that attends to nothing would be NaN; it attends to itself.
        attention |= torch.eye(size, dtype=torch.bool)
        return attention[:, None]

    def _unrolled_logits(
        self, model: torch.nn.Module, prompts: Sequence[Sequence[int]], device: torch.device
    ) -> torch.Tensor:
        """Read prompt and path of one node after the other, for attention that takes no mask of our own."""
        columns = []
        for path in self.paths:
            longest = max(map(len, prompts)) + len(path)
            ids = torch.full((len(prompts), longest), self.pad_token_id)
            mask = torch.zeros(len(prompts), longest, dtype=torch.long)
            for row, prompt in enumerate(prompts):
                start = longest - len(prompt) - len(path)
                ids[row, start:] = torch.tensor([*prompt, *path])
                mask[row, start:] = 1
            columns.append(
                model(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    position_ids=(mask.cumsum(-1) - 1).clamp(min=0).to(device),
                    logits_to_keep=1,
                    use_cache=False,
                ).logits[:, -1]
            )
        return torch.stack(columns, dim=1)
