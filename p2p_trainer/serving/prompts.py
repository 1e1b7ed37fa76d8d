"""What a client says, as the model can be asked it."""

from collections.abc import Sequence

from .errors import ApiError
from .schemas import Message


Turns = list[dict[str, str]]

_SYSTEM = ("system", "developer")


def chat_prompt(messages: Sequence[Message], labelled: bool, chat: bool) -> str | Turns:
    """
    Turn a conversation into a prompt of the model, by the rules of the exported chat template.

    A model knows prompts of the kind that it was trained with, and its key stands in front of all of them:

    - One that chooses among classes was trained on texts. The conversation is one user turn; system turns are left
      out wherever they are, as there is no place for them.
    - One that was trained without a chat template likewise, but the texts of system turns stand in front of the
      user's.
    - One with a chat template takes user and assistant turns in turn, after system turns, and ends in a user's.

    System turns, where they count, come first; they become one, a blank line between their texts, and empty ones are
    left out. No other turn is empty.

    Args:
        messages (`Sequence[Message]`):
            The conversation.
        labelled (`bool`):
            Whether the model chooses among classes.
        chat (`bool`):
            Whether it was trained with a chat template.

    Returns:
        `str` or `list[dict[str, str]]`: a text, or turns of `role` and `content`.

    Raises:
        [`ApiError`]: the model knows no such conversation.
    """
    for place, message in enumerate(messages):
        if message.role not in _SYSTEM and not message.content.strip():
            raise _wrong(f"Message {place} is empty. Give it at least a word.", f"messages[{place}].content")
    asked = [message for message in messages if message.role not in _SYSTEM]
    system = "" if labelled else _system(messages)
    if chat and not labelled:
        return _turns(system, messages)
    if len(asked) != 1 or asked[0].role != "user":
        raise _wrong("This model was trained on single questions: send exactly one message of role `user`.")
    question = asked[0].content
    return f"{system}\n\n{question}" if system else question


def _system(messages: Sequence[Message]) -> str:
    first = _first(messages)
    for place, message in enumerate(messages[first:], first):
        if message.role in _SYSTEM:
            raise _wrong(
                f"Message {place} has the role `{message.role}` behind a question. Put it in front of all others.",
                f"messages[{place}].role",
            )
    texts = (message.content.strip() for message in messages[:first])
    return "\n\n".join(text for text in texts if text)


def _first(messages: Sequence[Message]) -> int:
    return next((place for place, message in enumerate(messages) if message.role not in _SYSTEM), len(messages))


def _turns(system: str, messages: Sequence[Message]) -> Turns:
    first = _first(messages)
    asked = messages[first:]
    for place, message in enumerate(asked, first):
        if message.role != ("user", "assistant")[(place - first) % 2]:
            raise _wrong(
                f"Message {place} has the role `{message.role}` out of turn: `user` comes first, and `assistant` "
                f"takes turns with it.",
                f"messages[{place}].role",
            )
    if not asked or asked[-1].role != "user":
        raise _wrong("The last message must be the user's: it is what gets an answer.")
    turns = [{"role": message.role, "content": message.content} for message in asked]
    return [{"role": "system", "content": system}, *turns] if system else turns


def _wrong(message: str, param: str = "messages") -> ApiError:
    return ApiError(400, message, param)
