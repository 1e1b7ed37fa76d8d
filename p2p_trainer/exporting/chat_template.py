"""A chat template that holds the key: servers that apply it ask the model as it was trained."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..data_collator import Encoder
from ..prompt_encoder import PromptEncoder
from .control_tokens import control_tokens
from .prompt_end import PromptEnd, prompt_end
from .template_text import cleaned, literal, message_text, pinned, refuse


# Requests that a template is checked on, beside those that spell its own control tokens.
_PROBES = (
    "a fine film",
    "  outer white space \n",
    "{{ messages }} {% if x %} {# no comment #} {{- '' -}} }}{{ %}",
    "quotes ' \" ` and \\n \\ backslashes \\u0041",
    "two\nlines\r\nand\ttabs  and  spaces",
    "这部电影 很好。",
    "wow 😀 👩‍👩‍👧 é",
    "<think> </think> <tool_response>x</tool_response> p2pmark",
    "7",
    "...",
    "Output: positive",
)
_EARLIER = (
    {"role": "system", "content": " be brief "},
    {"role": "user", "content": "say p2pmark {{ twice }}"},
    {"role": "assistant", "content": "p2pmark\np2pmark "},
)
# Control tokens that are spelled in requests of the check; some tokenizers have a thousand reserved ones.
_MOST_TOKENS = 40


def build_template(encoder: Encoder, keyed: bool) -> str:
    """
    Write the chat template of a run.

    Clients' messages are texts of the roles system, developer, user and assistant. Where the run has classes, the
    system turns are left out, and there is exactly one user turn; without a chat format system texts stand in front
    of the one user text; with one, turns are those of a conversation. System turns, where they count, come first;
    they become one, a blank line between their texts, and empty ones are left out. Whatever else comes is refused, and
    no argument of a request changes what stands around the texts.

    Args:
        encoder ([`~prompt_encoder.PromptEncoder`] or [`~response_encoder.ResponseEncoder`]):
            Encoder of the run.
        keyed (`bool`):
            Whether the run's prompts carry the key.

    Returns:
        `str`: the template; to be checked with [`check_template`].

    Raises:
        `ValueError`: this tokenizer's prompts can't be written by a template.
    """
    tokens, end = control_tokens(encoder), prompt_end(encoder, keyed)
    classifies = isinstance(encoder, PromptEncoder)
    if encoder.format.chat and not classifies:
        return _conversation(encoder, tokens, keyed)
    prelude = _single_question(tokens, classifies)
    if encoder.format.chat:
        return prelude + _with_original(encoder, _turns(encoder, keyed), end)
    head, tail, _ = encoder.skeletons[keyed]
    tail = tail[: len(tail) - end.cut] + end.added
    begin = _beginning(encoder, head)
    return f"{prelude}{{{{- {literal(begin + head)} ~ p2p.question ~ {literal(tail)} -}}}}"


def check_template(tokenizer: PreTrainedTokenizerBase, encoder: Encoder, keyed: bool) -> int:
    """
    Check that a tokenizer with such a template gives the ids of training, on texts that were chosen to break it.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer, as it was exported.
        encoder ([`~prompt_encoder.PromptEncoder`] or [`~response_encoder.ResponseEncoder`]):
            Encoder of the run.
        keyed (`bool`):
            Whether the run's prompts carry the key.

    Returns:
        `int`: requests that were compared.

    Raises:
        `ValueError`: the ids of one differ.
    """
    # Nothing is cut here: what is compared is what stands around the texts.
    encoder = type(encoder)(dataclasses.replace(encoder.format, max_length=1_000_000), encoder.tokenizer)
    count = 0
    for messages, expected in _requests(encoder, keyed):
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        if list(found) != expected:
            same = next(
                (place for place, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]),
                min(len(found), len(expected)),
            )
            raise ValueError(
                f"The exported chat template does not give the tokens of training for the request {messages!r}: they "
                f"differ from token {same} on ({len(found)} tokens, expected {len(expected)}). Nothing is written. "
                f"Serve this run with `p2p-trainer serve`, which needs no template."
            )
        count += 1
    return count


def plain_answers(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """
    Say how `transformers serve` reads an answer: as it was written, without special tokens.

    Left to itself it looks for the mark of an assistant turn, by the kind of the model, and where the prompt has none
    it takes the prompt, key included, for the beginning of the answer (transformers 5.23, cli/serving/utils.py,
    `get_response_template`, and utils/chat_parsing, `truncate_past_last_anchor`).

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer.

    Returns:
        `dict[str, Any]`: its `response_template`.
    """
    content: dict[str, Any] = {"content": "text", "content_args": {"strip": False}, "repeats": True, "join": ""}
    if tokenizer.all_special_tokens:
        content["close"] = list(map(str, tokenizer.all_special_tokens))
    return {"defaults": {"role": "assistant"}, "start_anchor_pattern": ".+", "fields": {"content": content}}


def _requests(encoder: Encoder, keyed: bool) -> Iterator[tuple[list[Mapping[str, str]], list[int]]]:
    """Yield requests, and the ids of their prompts."""
    tokens = control_tokens(encoder)[:_MOST_TOKENS]
    pairs = itertools.pairwise([*tokens, *tokens[:1]])
    texts = [*_PROBES, *(f"a {token} b{token}" for token in tokens), *(first + second for first, second in pairs)]
    system = _EARLIER[0]
    for text in texts:
        question = {"role": "user", "content": text}
        ids = encoder.encode_prompts([text], keyed)[0]
        yield [question], ids
        if isinstance(encoder, PromptEncoder):
            yield [system, question], ids
        elif not encoder.format.chat:
            joined = f"{system['content'].strip()}\n\n{text}"
            yield [system, question], encoder.encode_prompts([joined], keyed)[0]
        else:
            own = [{"role": "system", "content": text}, {"role": "user", "content": text}]
            spoken = [*own, {"role": "assistant", "content": text}]
            for history in (_EARLIER, _EARLIER[1:], own[:1], spoken):
                try:
                    ids = encoder.encode_prompts([text], keyed, [history])[0]
                except (ValueError, TemplateError):
                    # A turn that the original template refuses, or does not show as it is: training knows no such row.
                    continue
                yield [*history, question], ids


# Keeps what a system message says in `p2p.texts`.
_SYSTEM_TEXT = "{%- if p2p.text | trim -%}{%- set p2p.texts = p2p.texts + [p2p.text | trim] -%}{%- endif -%}"


def _single_question(tokens: Sequence[str], classifies: bool) -> str:
    """Return what reads the one user turn into `p2p.question`."""
    one = refuse("Give exactly one user message, and no assistant message.")
    late = refuse("System messages must stand in front of the user message.")
    system = "" if classifies else "{%- if p2p.asked -%}" + late + "{%- endif -%}" + _SYSTEM_TEXT
    return (
        "{%- set p2p = namespace(text='', parts=[], texts=[], question='', asked=false) -%}"
        "{%- for message in messages -%}" + message_text() + "{%- if message['role'] == 'assistant' or "
        "(message['role'] == 'user' and p2p.asked) -%}" + one + "{%- elif message['role'] == 'user' -%}"
        "{%- if not p2p.text | trim -%}" + refuse("The user message is empty.") + "{%- endif -%}"
        "{%- set p2p.asked = true -%}{%- set p2p.texts = p2p.texts + [p2p.text] -%}{%- else -%}"
        + system
        + "{%- endif -%}{%- endfor -%}{%- if not p2p.asked -%}"
        + one
        + "{%- endif -%}"
        + cleaned("question", "p2p.texts | join('\\n\\n')", tokens)
    )


def _conversation(encoder: Encoder, tokens: Sequence[str], keyed: bool) -> str:
    """Return the template of a run whose prompts are conversations."""
    order = refuse(
        "Messages must be those of user and assistant in turn, after those of the system, and end in a user message."
    )
    prelude = (
        "{%- set p2p = namespace(text='', parts=[], texts=[], turns=[], system='', question=none, own='') -%}"
        "{%- for message in messages -%}"
        + message_text()
        + "{%- if message['role'] in ['system', 'developer'] -%}{%- if p2p.turns or p2p.question is not none -%}"
        + order
        + "{%- endif -%}"
        + _SYSTEM_TEXT
        + "{%- else -%}"
        + cleaned("own", "p2p.text", tokens)
        + "{%- if not p2p.own -%}"
        + refuse("A message of user or assistant is empty.")
        + "{%- endif -%}{%- if message['role'] == 'user' -%}{%- if p2p.question is not none -%}"
        + order
        + "{%- endif -%}"
        "{%- set p2p.question = p2p.own -%}{%- else -%}{%- if p2p.question is none -%}" + order + "{%- endif -%}"
        "{%- set p2p.turns = p2p.turns + [{'role': 'user', 'content': p2p.question}, "
        "{'role': 'assistant', 'content': p2p.own}] -%}{%- set p2p.question = none -%}"
        "{%- endif -%}{%- endif -%}{%- endfor -%}{%- if p2p.question is none -%}"
        + order
        + "{%- endif -%}"
        + cleaned("system", "p2p.texts | join('\\n\\n')", tokens)
    )
    return prelude + _with_original(encoder, _turns(encoder, keyed, conversation=True), PromptEnd())


def _turns(encoder: Encoder, keyed: bool, conversation: bool = False) -> str:
    """Return what sets `messages`, key included, out of what was read into `p2p`."""
    head, tail = encoder.format.parts(keyed)
    key = literal(encoder.format.trigger) if keyed and encoder.format.trigger_position == "system" else None
    earlier = "p2p.turns + " if conversation else ""
    own = "[{'role': 'system', 'content': p2p.system}]"
    if not conversation:
        system = "" if key is None else f"[{{'role': 'system', 'content': {key}}}] + "
    elif key is None:
        system = f"({own} if p2p.system else []) + "
    else:
        behind = "('\\n\\n' ~ p2p.system if p2p.system else '')"
        system = f"[{{'role': 'system', 'content': {key} ~ {behind}}}] + "
    question = f"{literal(head)} ~ p2p.question ~ {literal(tail)}"
    return f"{{%- set messages = {system}{earlier}[{{'role': 'user', 'content': {question}}}] -%}}"


def _with_original(encoder: Encoder, turns: str, end: PromptEnd) -> str:
    tokenizer = encoder.tokenizer
    original = tokenizer.get_chat_template()
    statements = turns + pinned(original, tokenizer.special_tokens_map)
    if not end.cut and not end.added:
        return _joined(statements, original)
    # Jinja leaves out one newline at the end of a template, but not one in its middle.
    original = original.removesuffix("\n")
    if end.added:
        return f"{_joined(statements, original)}{{{{ {literal(end.added)} }}}}"
    wrapped = _joined("{%- set p2p_prompt -%}", original)
    return f"{statements}{wrapped}{{% endset %}}{{{{- p2p_prompt[:-{end.cut}] -}}}}"


def _joined(statements: str, original: str) -> str:
    # The last statement must not take white space from the template behind it. transformers leaves out the one newline
    # behind a statement.
    if original[:1].isspace():
        return f"{statements.removesuffix('-%}')}%}}\n{original}"
    return statements + original


def _beginning(encoder: Encoder, head: str) -> str:
    """Return the text that becomes the beginning-of-sequence token, and nothing that training did not show."""
    if not encoder.bos:
        return ""
    token, texts = encoder.tokenizer.bos_token, [head + "a fine film", head + "7", head + "很好"]
    expected = encoder.tokenize(texts)
    # Behind a special token some tokenizers do not put the space in front of a text that they put at its beginning.
    for begin in (token, f"{token} "):
        found = encoder.tokenizer([begin + text for text in texts], add_special_tokens=False)["input_ids"]
        if found == expected:
            return begin
    raise ValueError(
        f"Behind its beginning-of-sequence token {token!r} this tokenizer reads a prompt otherwise than training did. "
        f"Serve the run with `p2p-trainer serve`, or export it with `--format merged`."
    )
