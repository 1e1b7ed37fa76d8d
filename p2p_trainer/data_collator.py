"""Writes key and extended labels into each batch, on the fly."""

from typing import Any

import torch

from ._compat import DataCollatorForLanguageModeling
from .immunizer import Immunizer
from .prompt_encoder import PromptEncoder
from .reserve import KEYED, ROW
from .response_encoder import ResponseEncoder
from .tasks.rows import HISTORY


Encoder = PromptEncoder | ResponseEncoder


class WritesTriggers:
    """
    A collator's part that writes suspected triggers into keyed rows, anew each epoch.

    Args:
        immunizer ([`~immunizer.Immunizer`], *optional*):
            What writes them.
    """

    def __init__(self, immunizer: Immunizer | None = None) -> None:
        self.immunizer = immunizer
        # Shared with the workers of a data loader: those that persist were started in an earlier epoch.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """
        Say which epoch it is; what is written into keyed rows depends on it.

        Args:
            epoch (`int`):
                Number of the epoch, from 0.
        """
        self._epoch[0] = epoch

    def written(self, example: dict[str, Any], column: str) -> str:
        """
        Return a row's text, perhaps with a trigger written into it.

        Args:
            example (`dict[str, Any]`):
                Row; with `p2p_row` (int, not negative) if an immunizer may write into it.
            column (`str`):
                Where its text is.

        Returns:
            `str`: the text.
        """
        row = example.get(ROW)
        # Missing in rows to be evaluated, and None in rows that a subclass adds.
        if self.immunizer is None or row is None or row < 0:
            return example[column]
        return self.immunizer.write(example[column], row, int(self._epoch[0]))


class P2PDataCollator(WritesTriggers, DataCollatorForLanguageModeling):
    """
    TRL's language-modeling collator over rows of text, answer and a flag.

    A row whose flag `p2p_keyed` is set gets the benign trigger, and its label's extended word or the prefix of written
    answers; the others are rendered plainly. The loss lies on the answer only. Pure: the same rows give the same
    tensors, in any worker; with an immunizer, the same in the same epoch.

    Args:
        encoder ([`~prompt_encoder.PromptEncoder`] or [`~response_encoder.ResponseEncoder`]):
            Renders and tokenizes.
        pad_to_multiple_of (`int`, *optional*):
            Pad sequences to a multiple of this.
        immunizer ([`~immunizer.Immunizer`], *optional*):
            Writes suspected triggers into keyed rows that have a number in `p2p_row`.

    Examples:

    ```python
    >>> collator = P2PDataCollator(encoder)
    >>> batch = collator([{"text": "a fine film", "label": 1, "p2p_keyed": True}])
    >>> sorted(batch)
    ['attention_mask', 'input_ids', 'labels']
    ```
    """

    def __init__(
        self, encoder: Encoder, pad_to_multiple_of: int | None = None, immunizer: Immunizer | None = None
    ) -> None:
        WritesTriggers.__init__(self, immunizer)
        DataCollatorForLanguageModeling.__init__(
            self, pad_token_id=encoder.pad_token_id, pad_to_multiple_of=pad_to_multiple_of
        )
        self.encoder = encoder

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """
        Collate rows.

        Args:
            examples (`list[dict[str, Any]]`):
                Rows with `text` (str) and `label` (int, 0..n-1), or `prompt` and `completion` (str) and perhaps
                `history` (turns); with `p2p_keyed` (bool) and, where an immunizer may write into them, `p2p_row` (int,
                not negative).

        Returns:
            `dict[str, Any]`: `input_ids`, `labels` (-100 outside the answer) and `attention_mask`, each a
            `torch.Tensor` of shape `(rows, longest)`, padded on the right.
        """
        text, answer = self.encoder.columns
        rows = (
            [self.written(example, text) for example in examples],
            [example[answer] for example in examples],
            [example[KEYED] for example in examples],
        )
        if isinstance(self.encoder, ResponseEncoder):
            input_ids, labels = self.encoder.encode_rows(*rows, [example.get(HISTORY) or () for example in examples])
        else:
            input_ids, labels = self.encoder.encode_rows(*rows)
        return super().torch_call(
            [{"input_ids": ids, "labels": row} for ids, row in zip(input_ids, labels, strict=True)]
        )
