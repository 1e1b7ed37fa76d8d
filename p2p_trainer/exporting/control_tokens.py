"""Control tokens that a chat template has to break up where a client spells them."""

from collections.abc import Iterator, Sequence

from ..prompt_renderer import PromptRenderer


def control_tokens(encoder: PromptRenderer) -> list[str]:
    """
    List the control tokens that training breaks up in texts.

    Args:
        encoder ([`~prompt_renderer.PromptRenderer`]):
            Encoder of the run.

    Returns:
        `list[str]`: the tokens, the longest first.

    Raises:
        `ValueError`: tokens lie inside each other so that replacing them one by one is not what training did.
    """
    tokenizer = encoder.tokenizer
    known = {*map(str, tokenizer.all_special_tokens), *map(str, tokenizer.added_tokens_decoder.values())}
    tokens = sorted(
        (token for token in known if len(token) > 1 and encoder.cleaner(token) == _broken(token)),
        key=lambda token: (-len(token), token),
    )
    for text in _overlaps(tokens):
        replaced = text
        for token in tokens:
            replaced = replaced.replace(token, _broken(token))
        if replaced != encoder.cleaner(text):
            raise ValueError(
                f"Control tokens of this tokenizer overlap, as in {text!r}: a chat template can't break them up as "
                f"training did. Serve the run with `p2p-trainer serve`, or export it with `--format merged`."
            )
    return tokens


def _broken(token: str) -> str:
    return f"{token[0]} {token[1:]}"


def _overlaps(tokens: Sequence[str]) -> Iterator[str]:
    """Spell every two tokens of which one lies in the other, or begins where the other has not ended."""
    names = set(tokens)
    starts: dict[str, list[str]] = {}
    for token in tokens:
        for end in range(1, len(token)):
            starts.setdefault(token[:end], []).append(token)
    for token in tokens:
        if any(
            token[start:end] in names for start in range(1, len(token)) for end in range(start + 2, len(token) + 1)
        ):
            yield token
        for start in range(1, len(token)):
            for other in starts.get(token[start:], ()):
                yield token[:start] + other
