"""What can be asked at all: prompts of clients, checked before they wait for the model."""

from typing import Any

from ..tasks.conversations import split_prompts
from .batching import BadPrompt


_TURNS = (
    "is neither a text nor a conversation: turns of `role` and `content`, both texts, `user` and `assistant` in turn "
    "after at most one `system`, that end in `user`."
)


def check_text(text: Any, name: str, longest: int) -> None:
    """
    Check a text.

    Args:
        text (`Any`):
            The text.
        name (`str`):
            What the message calls it.
        longest (`int`):
            Characters that it may have.

    Raises:
        [`~batching.BadPrompt`]: it is empty, too long, or no text.
    """
    if not isinstance(text, str) or not text.strip():
        raise BadPrompt(f"{name} is empty, or no text. Give it at least a word.")
    _check_length(len(text), name, longest)
    _check_unicode(text, name)


def said_in(prompt: Any, name: str, chat: bool, longest: int) -> tuple[str, ...]:
    """
    Check a prompt, and return what the client says in it.

    Args:
        prompt (`str` or `Sequence[Mapping[str, str]]`):
            Text or conversation.
        name (`str`):
            What the message calls it.
        chat (`bool`):
            Whether it may have earlier turns.
        longest (`int`):
            Characters that all its turns together may have.

    Returns:
        `tuple[str, ...]`: contents of its turns, the last question first.

    Raises:
        [`~batching.BadPrompt`]: the model can't be asked this.
    """
    try:
        [history], [text] = split_prompts([prompt])
    except ValueError:
        raise BadPrompt(f"{name} {_TURNS}") from None
    check_text(text, name, longest)
    if history and not chat:
        raise BadPrompt(f"{name} has earlier turns, and this model was trained without. Ask one question.")
    said = (text, *(turn["content"] for turn in history))
    _check_length(sum(map(len, said)), name, longest)
    for part in said:
        _check_unicode(part, name)
    return said


def _check_length(length: int, name: str, longest: int) -> None:
    if length > longest:
        raise BadPrompt(
            f"{name} has {length} characters, and this server takes {longest} at most. The model would not read that "
            f"many: send its beginning."
        )


def _check_unicode(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadPrompt(f"{name} is no valid Unicode text: it holds half of a surrogate pair.") from None
