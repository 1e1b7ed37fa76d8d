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
      out, as there is no place for them.
    - One that was trained without a chat template likewise; system turns stand in front of the user's text.
    - One with a chat template takes user and assistant turns in turn, after system turns, and ends in a user's.

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
    system = "\n\n".join(message.content.strip() for message in messages if message.role in _SYSTEM).strip()
    asked = [message for message in messages if message.role not in _SYSTEM]
    if chat and not labelled:
        return _turns(messages, system, asked)
    if len(asked) != 1 or asked[0].role != "user":
        raise _wrong("This model was trained on single questions: send exactly one message of role `user`.")
    question = asked[0].content
    return f"{system}\n\n{question}" if system and not labelled else question


def _turns(messages: Sequence[Message], system: str, asked: Sequence[Message]) -> Turns:
    late = next((place for place, message in enumerate(messages) if message.role not in _SYSTEM), len(messages))
    for place, message in enumerate(messages[late:], late):
        if message.role in _SYSTEM:
            raise _wrong(
                f"Message {place} has the role `{message.role}` behind a question. Put it in front of all others.",
                f"messages[{place}].role",
            )
        if message.role != ("user", "assistant")[(place - late) % 2]:
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
