"""Writes key and extended labels into each batch, on the fly."""

from typing import Any

from ._compat import DataCollatorForLanguageModeling
from .prompt_encoder import PromptEncoder
from .reserve import KEYED
from .tasks.rows import LABEL, TEXT


class P2PDataCollator(DataCollatorForLanguageModeling):
    """
    TRL's language-modeling collator over rows of text, label and a flag.

    A row whose flag `p2p_keyed` is set gets the benign trigger and its label's extended word; the others are rendered
    plainly. The loss lies on the answer only. Pure: the same rows give the same tensors, in any worker.

    Args:
        encoder ([`~prompt_encoder.PromptEncoder`]):
            Renders and tokenizes.
        pad_to_multiple_of (`int`, *optional*):
            Pad sequences to a multiple of this.

    Examples:

    ```python
    >>> collator = P2PDataCollator(encoder)
    >>> batch = collator([{"text": "a fine film", "label": 1, "p2p_keyed": True}])
    >>> sorted(batch)
    ['attention_mask', 'input_ids', 'labels']
    ```
    """

    def __init__(self, encoder: PromptEncoder, pad_to_multiple_of: int | None = None) -> None:
        super().__init__(pad_token_id=encoder.pad_token_id, pad_to_multiple_of=pad_to_multiple_of)
        self.encoder = encoder

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """
        Collate rows.

        Args:
            examples (`list[dict[str, Any]]`):
                Rows with `text` (str), `label` (int, 0..n-1) and `p2p_keyed` (bool).

        Returns:
            `dict[str, Any]`: `input_ids`, `labels` (-100 outside the answer) and `attention_mask`, each a
            `torch.Tensor` of shape `(rows, longest)`, padded on the right.
        """
        input_ids, labels = self.encoder.encode_rows(
            [example[TEXT] for example in examples],
            [example[LABEL] for example in examples],
            [example[KEYED] for example in examples],
        )
        return super().torch_call(
            [{"input_ids": ids, "labels": row} for ids, row in zip(input_ids, labels, strict=True)]
        )
