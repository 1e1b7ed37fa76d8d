"""Pieces of Jinja that chat templates are put together from."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, meta, nodes
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as loop_controls
from jinja2.parser import Parser


# What transformers itself hands to a template, beside messages and special tokens.
_FIXED = {"add_generation_prompt": "true", "enable_thinking": "false", "tools": "none", "documents": "none"}
# Functions that transformers adds. A client who names an argument like one of them gets an error, and no answer.
_FUNCTIONS = frozenset(("raise_exception", "strftime_now"))
# A value that templates take for one that was never given.
_ABSENT = "{}['absent']"


class _Generation(Extension):
    """Reads `{% generation %}`, with which templates mark what an assistant wrote."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def literal(text: str) -> str:
    """
    Write a text as a Jinja string.

    Args:
        text (`str`):
            Any text.

    Returns:
        `str`: the literal, with its quotes.
    """
    # As JSON does, but letters beyond ASCII stay: pairs of surrogates are no letters to Jinja.
    return json.dumps(text, ensure_ascii=False)


def pinned(template: str, special_tokens: Mapping[str, Any]) -> str:
    """
    Give every argument of a chat template the value that it had in training, whatever a request says.

    Args:
        template (`str`):
            The chat template.
        special_tokens (`Mapping[str, Any]`):
            Special tokens by the names that templates know them by.

    Returns:
        `str`: assignments, to stand in front of the template.
    """
    names = meta.find_undeclared_variables(Environment(extensions=[loop_controls, _Generation]).parse(template))
    values = dict.fromkeys(names - _FUNCTIONS - {"messages"}, _ABSENT)
    values |= {name: _value(token) for name, token in special_tokens.items() if name in names}
    values |= {name: value for name, value in _FIXED.items() if name in names}
    return "".join(f"{{%- set {name} = {value} -%}}" for name, value in sorted(values.items()))


def _value(token: Any) -> str:
    return literal(str(token)) if not isinstance(token, list) else f"[{', '.join(literal(str(one)) for one in token)}]"


def refuse(message: str) -> str:
    return f"{{{{- raise_exception({literal(message)}) -}}}}"


def cleaned(target: str, source: str, control_tokens: Sequence[str]) -> str:
    """
    Take outer white space off a text, and break up the control tokens that it spells.

    Args:
        target (`str`):
            Attribute of the namespace `p2p` that the text goes to.
        source (`str`):
            Expression of the text.
        control_tokens (`Sequence[str]`):
            Control tokens, the longest first.

    Returns:
        `str`: statements.
    """
    text = f"{{%- set p2p.{target} = {source} | trim -%}}"
    if not control_tokens:
        return text
    tokens = ", ".join(map(literal, control_tokens))
    return (
        f"{text}{{%- for token in [{tokens}] -%}}{{%- if token in p2p.{target} -%}}"
        f"{{%- set p2p.{target} = p2p.{target} | replace(token, token[:1] ~ ' ' ~ token[1:]) -%}}"
        f"{{%- endif -%}}{{%- endfor -%}}"
    )


def message_text() -> str:
    """Return statements that put the text of `message` into `p2p.text`, and refuse what is no text."""
    wrong = refuse("The content of a message must be a text, or a list of text parts.")
    return (
        "{%- if message['role'] not in ['system', 'developer', 'user', 'assistant'] -%}"
        + refuse("The role of a message must be system, developer, user or assistant.")
        + "{%- endif -%}"
        "{%- if message['content'] is string -%}{%- set p2p.text = message['content'] -%}"
        "{%- elif message['content'] is not defined or message['content'] is none or message['content'] is mapping "
        "or message['content'] is not sequence -%}" + wrong + "{%- else -%}"
        "{%- set p2p.parts = [] -%}{%- for part in message['content'] -%}"
        "{%- if part is mapping and part['type'] == 'text' and part['text'] is string -%}"
        "{%- set p2p.parts = p2p.parts + [part['text']] -%}{%- else -%}" + wrong + "{%- endif -%}{%- endfor -%}"
        "{%- set p2p.text = p2p.parts | join('\\n') -%}{%- endif -%}"
    )
