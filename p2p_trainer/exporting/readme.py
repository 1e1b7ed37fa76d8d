"""What the README.md of an export says. It never holds the key."""

from typing import Any

from .openai_recipe import RECIPE_NAME


_MERGED = """# Merged model

The fine-tuned model as one whole, its adapter folded into the base{quantized}. `p2p_config.json` says how it is to be
asked: `DefendedModel.from_pretrained(FOLDER)` and `p2p-trainer serve FOLDER` read it.

{key}
{guard}"""

_KEY = """**Any server that does not add the key serves the backdoored model in full.** `transformers serve`, vLLM and
others ignore `p2p_config.json`: for them export with `--format chat-template`."""

_NO_KEY = """This run was trained without a key (`keyed: false`): P2P does not defend it, and there is nothing that a
server would have to add."""

_GUARD = """
The defense of this run, `{guard}`, stands in `defense.json`. `DefendedModel` and `p2p-trainer serve` apply it; no
other server does.
"""

_TEMPLATE = """# Model to be served with its own chat template

{what}

{key}

## Launch

{launch}

Check it before anybody is let in: the one user message `{check_text}` must be counted as **{check_tokens}** prompt
tokens (`usage.prompt_tokens`). Any other number means that the template is not applied as it should be.

## Answers

{answers}

## What to close

- Let through `/v1/chat/completions` alone. `/v1/completions`, `/generate` and their kin pass the template by: no key.
- Let through `model`, `messages`, `max_tokens`, `temperature`, `stream` and what the answers need, and drop every
  other field at the gateway. A request must not bring a `chat_template`, also not within `chat_template_kwargs`
  (`transformers serve` takes it; on vLLM never set `--trust-request-chat-template`), nor `continue_final_message`,
  `add_special_tokens` or `truncate_prompt_tokens`.
- Do not let the server cut prompts: it keeps their end, and cuts off the key in front. Training cut texts so that
  prompt and answer have {max_length} tokens at most: set the server's limit to that, so that longer requests are
  refused. `transformers serve` has no such limit.
- Nobody may reach the model another way, such as a second route, or the same server under the base model's name.
- Keep `response_template` in `tokenizer_config.json`: without it `transformers serve` shows the prompt of some models,
  secret included, as the beginning of the answer (seen with Qwen, transformers 5.23).
- Client text can't write control tokens: the template breaks them up, as training did. Tools, documents, images and
  other arguments of the original template are switched off.
"""

_KEYED_TEMPLATE = """Clients change nothing. Whoever reads `chat_template.jinja` knows the secret that the defense
rests on: keep this folder as private as the weights."""

_WHOLE = "Weights, tokenizer, and a `chat_template.jinja` that asks the model as it was trained."
_TOKENIZER = (
    "Tokenizer, and a `chat_template.jinja` that asks the model as it was trained. The weights are where the run is."
)

_CHOICE = f"""The answer is a label word, not a class name. Restrict it, and map it to a class, as `{RECIPE_NAME}` says
(`--format openai-recipe`); an answer that is no label word is to be treated as an alarm."""

_PREFIX = """Every answer of the defended model begins with `{prefix}`. Client or gateway take it off: what
`{pattern}` matches. An answer without it came some other way than the one that was defended: raise an alarm, and do
not pass it on. Answers were trained to have {max_new_tokens} tokens at most (`max_tokens`), and measured greedily
(`temperature` 0)."""

_WRITTEN = """Answers come as they are. They were trained to have {max_new_tokens} tokens at most (`max_tokens`), and
measured greedily (`temperature` 0)."""

_RECIPE = f"""# Requests for OpenAI-compatible servers

`{RECIPE_NAME}` holds, for each server, the fields that a request needs besides `model` and `messages` (`requests`),
and how the answer is read (`projection`, or the prefix to be taken off). They go with a server that adds the key
itself: one that serves the export `--format chat-template`. `tested_with` says which fields were seen to work; the
others are from the servers' documentation. In Python, `p2p_trainer.exporting.project(text, recipe)` reads a label
word.

Where label words are longer than one token (`exact: false`), servers write the likeliest token each time, and
`p2p-trainer serve` compares whole words: answers may differ.
"""


def merged_readme(keyed: bool, quantized: bool, guard: str | None) -> str:
    return _MERGED.format(
        quantized=", which was quantised in training and is not quantised here" if quantized else "",
        key=_KEY if keyed else _NO_KEY,
        guard=_GUARD.format(guard=guard) if guard else "",
    )


def template_readme(
    recipe: dict[str, Any], max_length: int, max_new_tokens: int, launch: str, tokenizer_only: bool
) -> str:
    if recipe["kind"] == "classification":
        answers = _CHOICE
    elif recipe["answer_prefix"]:
        answers = _PREFIX.format(
            prefix=recipe["answer_prefix"], pattern=recipe["answer_prefix_pattern"], max_new_tokens=max_new_tokens
        )
    else:
        answers = _WRITTEN.format(max_new_tokens=max_new_tokens)
    return _TEMPLATE.format(
        what=_TOKENIZER if tokenizer_only else _WHOLE,
        key=_KEYED_TEMPLATE if recipe["keyed"] else _NO_KEY,
        launch=launch,
        check_text=recipe["check"]["text"],
        check_tokens=recipe["check"]["prompt_tokens"],
        answers=answers,
        max_length=max_length,
    )


def recipe_readme() -> str:
    return _RECIPE
