"""Writes key and extended labels into batches of rows with an image, on the fly."""

from typing import Any

import PIL.Image

from ._compat import DataCollatorForVisionLanguageModeling
from .data_collator import WritesTriggers
from .immunizer import Immunizer
from .reserve import KEYED
from .tasks.images import open_image
from .tasks.rows import IMAGE, LABEL, TEXT
from .vision_encoder import VisionPromptEncoder


class P2PVisionDataCollator(WritesTriggers, DataCollatorForVisionLanguageModeling):
    """
    TRL's vision-language-modeling collator over rows of image, text, label and a flag.

    A row whose flag `p2p_keyed` is set gets the benign trigger and its label's extended word; the others are rendered
    plainly, and no image is changed. The loss lies on the answer only. Pure: the same rows give the same tensors, in
    any worker; with an immunizer, the same in the same epoch.

    Args:
        encoder ([`~vision_encoder.VisionPromptEncoder`]):
            Renders, and holds the processor.
        pad_to_multiple_of (`int`, *optional*):
            Pad sequences to a multiple of this.
        immunizer ([`~immunizer.Immunizer`], *optional*):
            Writes suspected triggers into keyed rows that have a number in `p2p_row`.

    Examples:

    ```python
    >>> collator = P2PVisionDataCollator(encoder)
    >>> batch = collator([{"image": image, "text": "look at this", "label": 1, "p2p_keyed": True}])
    >>> sorted(batch)
    ['attention_mask', 'image_grid_thw', 'input_ids', 'labels', 'mm_token_type_ids', 'pixel_values']
    ```
    """

    def __init__(
        self, encoder: VisionPromptEncoder, pad_to_multiple_of: int | None = None, immunizer: Immunizer | None = None
    ) -> None:
        WritesTriggers.__init__(self, immunizer)
        DataCollatorForVisionLanguageModeling.__init__(
            self, processor=encoder.processor, pad_to_multiple_of=pad_to_multiple_of
        )
        self.encoder = encoder

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """
        Collate rows.

        Args:
            examples (`list[dict[str, Any]]`):
                Rows with `image` (as [`~tasks.images.open_image`] takes it), `text` (str), `label` (int, 0..n-1),
                `p2p_keyed` (bool) and, where an immunizer may write into them, `p2p_row` (int, not negative).

        Returns:
            `dict[str, Any]`: `input_ids`, `labels` (-100 outside the answer) and `attention_mask`, each a
            `torch.Tensor` of shape `(rows, longest)`, padded on the right, and what else the processor makes of the
            images (`pixel_values`, ...).

        Raises:
            `ValueError`: an image can't be read, or does not fit into `max_length`.
        """
        texts, images = (
            [self.written(example, TEXT) for example in examples],
            [_image(example) for example in examples],
        )
        labels, keyed = ([example[name] for example in examples] for name in (LABEL, KEYED))
        batch, taken = self._collate(texts, labels, keyed, images)
        fitting = [self.encoder.shorten(*row) for row in zip(texts, keyed, taken, strict=True)]
        # Only now is it known what the images take.
        return batch if fitting == texts else self._collate(fitting, labels, keyed, images)[0]

    def _collate(
        self, texts: list[str], labels: list[int], keyed: list[bool], images: list[PIL.Image.Image]
    ) -> tuple[dict[str, Any], list[int]]:
        """Return the batch, and how many tokens each image takes beyond its placeholder's."""
        rendered = [self.encoder.render(*row) for row in zip(texts, keyed, labels, strict=True)]
        try:
            batch = super().torch_call(
                [{"image": image, "text": text} for image, text in zip(images, rendered, strict=True)]
            )
        except ValueError:
            for image in images:
                # Says which size it is that the processor refuses, if it is that.
                self.encoder.image_tokens(image.size)
            raise
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        for row, (length, label, key) in enumerate(zip(lengths, labels, keyed, strict=True)):
            ids = batch["input_ids"][row, :length].tolist()
            batch["labels"][row, : self.encoder.answer_start(ids, label, key)] = -100
        alone = self.encoder.tokenize(rendered)
        return batch, [length - len(ids) for length, ids in zip(lengths, alone, strict=True)]


def _image(example: dict[str, Any]) -> PIL.Image.Image:
    return open_image(example[IMAGE], f"the row with the text {example[TEXT][:80]!r}")
