"""Scores label words behind prompts that hold an image."""

from collections.abc import Sequence

import torch

from ..tasks.images import RowImages
from ..vision_encoder import VisionPrompt, VisionPromptEncoder
from .scorer import LabelScorer


# What a processor makes for each token; the rest belongs to the images.
_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


class VisionLabelScorer(LabelScorer):
    """
    Scores the label words behind prompts with an image; one forward pass per row where each word is one token.

    Words of several tokens take one pass for each of their beginnings, since positions beside an image are the
    model's own business. Batches and processes are those of [`LabelScorer`].

    Args:
        encoder ([`~vision_encoder.VisionPromptEncoder`]):
            Made the prompts, and holds the processor.
        keyed (`bool`):
            Whether the prompts carry the key.
        images ([`~tasks.images.RowImages`]):
            The images that the prompts name; read when their batch is due.
        batch_size (`int`, *optional*, defaults to `32`):
            Rows per forward pass.
    """

    def __init__(self, encoder: VisionPromptEncoder, keyed: bool, images: RowImages, batch_size: int = 32) -> None:
        super().__init__(encoder.answers[keyed], encoder.pad_token_id, batch_size)
        self.encoder = encoder
        self.images = images
        answers = encoder.answers[keyed]
        self._tail = torch.tensor(answers.scored[0][: answers.cut], dtype=torch.long)

    def length(self, prompt: VisionPrompt) -> int:
        text, image = prompt
        return len(self.encoder.tokenize([text])[0]) + self.encoder.image_tokens(self.images.size(image))

    def inputs(self, prompts: Sequence[VisionPrompt]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """
        Tokenize prompts up to the place where the label words differ, and read their images.

        Args:
            prompts (`Sequence[VisionPrompt]`):
                Prompts.

        Returns:
            `tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]`: what belongs to tokens, each of shape
            `(rows, longest)` and padded on the left, and what belongs to images.
        """
        batch = dict(
            self.encoder.processor(
                images=[[self.images[image]] for _, image in prompts],
                text=[text for text, _ in prompts],
                padding=True,
                padding_side="left",
                return_tensors="pt",
                add_special_tokens=False,
            )
        )
        end = batch["input_ids"].shape[1] - len(self._tail)
        if not bool((batch["input_ids"][:, end:] == self._tail).all()):
            raise ValueError(
                "The tokenizer merged the end of a text with its answer. End the suffix on a token boundary."
            )
        tokens = {name: batch.pop(name)[:, :end] for name in _PER_TOKEN if name in batch}
        return tokens, batch

    def logits(self, model: torch.nn.Module, prompts: Sequence[VisionPrompt], device: torch.device) -> torch.Tensor:
        # A mask and positions of our own would take the place of those that belong to the image.
        tokens, images = self.inputs(prompts)
        images = {name: value.to(device) for name, value in images.items()}
        columns = []
        for path in self.paths:
            more = {"input_ids": torch.tensor(path, dtype=torch.long), "attention_mask": torch.ones(len(path)).long()}
            extended = {
                name: torch.cat([ids, more.get(name, torch.zeros(len(path)).long()).expand(len(ids), -1)], dim=1)
                for name, ids in tokens.items()
            }
            logits = model(
                **{name: value.to(device) for name, value in extended.items()},
                **images,
                logits_to_keep=1,
                use_cache=False,
            ).logits
            columns.append(logits[:, -1])
        return torch.stack(columns, dim=1)
