"""Finds the place in a rendered prompt from which on label words differ."""

import os
from dataclasses import dataclass

from ..prompt_encoder import PromptEncoder
from ..prompt_renderer import PromptRenderer


# How far from the end of the prompt the place may lie.
_FARTHEST = 64
_TEXTS = ("a fine film", "7", "很好。", "wow 😀 !", '"quoted"', "two\nlines", "ends in a colon:")


@dataclass(frozen=True)
class PromptEnd:
    """
    Where a prompt ends that is to be answered with a label word.

    Parameters:
        cut (`int`):
            Characters that the prompt loses at its end: where a tokenizer joins a space with the word behind it, the
            prompt ends in front of that space.
        added (`str`):
            What it gets behind its end: what all label words begin with.
        answers (`tuple[str, ...]`):
            What is left to be written, for each of the 2n label words.
    """

    cut: int = 0
    added: str = ""
    answers: tuple[str, ...] = ()


def prompt_end(encoder: PromptRenderer, keyed: bool) -> PromptEnd:
    """
    Find the end of prompts as a place in their text; ids are those of `encode_prompts`.

    Args:
        encoder ([`~prompt_renderer.PromptRenderer`]):
            Encoder of the run; where answers are written, prompts end where they end.
        keyed (`bool`):
            Whether prompts carry the key.

    Returns:
        [`PromptEnd`]: the place.

    Raises:
        `ValueError`: no place in the text is where the tokens differ.
    """
    if not isinstance(encoder, PromptEncoder):
        return PromptEnd()
    words = encoder.format.label_space.all_words
    before, after, _ = encoder.skeletons[keyed]
    whole = after + os.path.commonprefix(words)
    expected = encoder.encode_prompts(_TEXTS, keyed)
    for length in range(len(whole), max(-1, len(whole) - _FARTHEST), -1):
        tail = whole[:length]
        found = encoder.tokenize([before + encoder.clean(text) + tail for text in _TEXTS])
        if found == expected:
            return PromptEnd(
                cut=max(0, len(after) - length),
                added=tail[len(after) :],
                answers=tuple((after + word)[length:] for word in words),
            )
    raise ValueError(
        "The label words of this run differ from a place on that lies within a character or a token of the prompt: no "
        "text ends there, so other servers can't be asked as training did. Serve the run with `p2p-trainer serve`."
    )
