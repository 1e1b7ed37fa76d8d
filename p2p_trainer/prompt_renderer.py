"""Puts key, template and chat template around a text, and tokenizes what comes out."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from .prompt_format import PromptFormat


# Stands for text and answer while a chat template is taken apart. No template or tokenizer treats it specially.
MARK = "p2pmark"

# Earlier turns of a conversation, its system turn first if there is one: `role` and `content`.
History = Sequence[Mapping[str, str]]

_MARKUP = re.compile(r"[^\w\s]")
_ROLES = frozenset(("system", "user", "assistant"))


class PromptRenderer:
    """
    A [`PromptFormat`] bound to a tokenizer; what the encoders of label words and of written answers share.

    Args:
        prompt_format ([`PromptFormat`]):
            The format.
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer. One without a pad token pads with its end-of-sequence token.

    Raises:
        `ValueError`: a chat template is needed and the tokenizer has none, or one that does not show what it is given.
    """

    def __init__(self, prompt_format: PromptFormat, tokenizer: PreTrainedTokenizerBase) -> None:
        self.format = prompt_format
        self.tokenizer = tokenizer
        self.pad_token_id = pad_token_id(tokenizer)
        # Chat templates write the beginning-of-sequence token themselves.
        self.bos = [] if prompt_format.chat else _leading_tokens(tokenizer)
        self.cleaner = special_token_cleaner(tokenizer)
        self.skeletons = {keyed: self.skeleton(keyed) for keyed in (False, True)}

    def sees(self, phrase: str) -> bool:
        """
        Say whether a phrase between two words leaves a trace in the token ids.

        Args:
            phrase (`str`):
                The phrase.

        Returns:
            `bool`: `False` if the ids are the same without it, or if it becomes nothing but the unknown token.
        """
        without, with_phrase = self.tokenize(["a b", self.clean(f"a {phrase} b")])
        unknown = self.tokenizer.unk_token_id
        rest = list(with_phrase)
        for token in without:
            if token in rest:
                rest.remove(token)
        return any(token != unknown for token in rest)

    def clean(self, text: str) -> str:
        return self.cleaner(text.strip())

    def tokenize(self, rendered: list[str]) -> list[list[int]]:
        if not rendered:
            return []
        # The tokenizer is only asked for ids: beginning-of-sequence is ours, so that none appends an end of its own.
        encoded = self.tokenizer(rendered, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return [self.bos + ids for ids in encoded] if self.bos else encoded

    def skeleton(self, keyed: bool, history: History = ()) -> tuple[str, str, str]:
        """Return what stands before the text, between text and answer, and behind the answer."""
        head, tail = self.format.parts(keyed)
        if not self.format.chat:
            return head, tail, (self.tokenizer.eos_token or "") if self.format.append_eos else ""
        if unknown := {turn["role"] for turn in history} - _ROLES:
            # Templates write a role as it stands, control tokens included.
            raise ValueError(
                f"An earlier turn has the role {min(unknown, key=repr)!r}; known are {', '.join(sorted(_ROLES))}. "
                f"Correct the row."
            )
        turns = [{"role": turn["role"], "content": self.clean(turn["content"])} for turn in history]
        marks = 1 + sum(turn["content"].count(MARK) for turn in turns)
        if keyed and self.format.trigger_position == "system":
            # The key stands first, whatever a row's own system turn says.
            own = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else ""
            content = f"{self.format.trigger}\n\n{own}" if own else self.format.trigger
            turns.insert(0, {"role": "system", "content": content})
        turns.append({"role": "user", "content": head + MARK + tail})
        prompt = self.render_turns(turns, True)
        shown = keyed and self.format.trigger_position != "none"
        if prompt.count(MARK) != marks or (shown and self.format.trigger not in prompt):
            raise ValueError(
                "The tokenizer's chat template does not show the user turn and the benign trigger once each. Set "
                "`p2p_chat: false`, or `p2p_trigger_position: prefix` if the template has no system turn."
            )
        # Earlier turns may hold the mark too.
        before, _, after = prompt.rpartition(MARK)
        _, opened, thought = after.rpartition("<think>")
        if opened and "</think>" not in thought:
            raise ValueError(
                "The tokenizer's chat template begins each answer with an open `<think>`, whatever `enable_thinking` "
                "says: answers would be trained and read as thoughts. Give a template that closes it "
                "(`chat_template_path`), or set `p2p_chat: false`."
            )
        if not self.format.append_eos:
            return before, after, ""
        whole = self.render_turns([*turns, {"role": "assistant", "content": MARK}], False)
        terminator = whole.rpartition(MARK)[2].rstrip()
        return before, after, terminator or self.tokenizer.eos_token or ""

    def render_turns(self, turns: list[dict[str, str]], ask: bool) -> str:
        """Render turns with the chat template; a seam for encoders whose user turns hold more than text."""
        if not self.tokenizer.chat_template:
            raise ValueError(
                "`p2p_chat` needs a chat template, and this tokenizer has none. Use an instruct model's tokenizer, "
                "give one with `chat_template_path`, or set `p2p_chat: false`."
            )
        # Templates that know no `enable_thinking` ignore it; in those that do, the answer has to follow at once.
        return self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=ask, enable_thinking=False
        )


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """
    Say with which token a tokenizer pads.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer.

    Returns:
        `int`: the pad token, or the end-of-sequence token where there is none.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError("The tokenizer has neither a pad token nor an end-of-sequence token. Set `tokenizer.pad_token`.")


def _leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def special_token_cleaner(tokenizer: PreTrainedTokenizerBase, markers: bool = True) -> Callable[[str], str]:
    """
    Build what keeps text text: one that spells a control token would end the turn, or the sequence.

    Control tokens are the special ones, and those that the chat template writes: some models mark turns and thoughts
    with added tokens that are not registered as special. Other added tokens are vocabulary.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer.
        markers (`bool`, *optional*, defaults to `True`):
            Whether those that the chat template writes are among them. Not so in answers that are trained: thoughts
            may be a part of them.

    Returns:
        `Callable[[str], str]`: puts a space behind the first character of each control token that a text spells.
    """
    special = {str(token) for token in tokenizer.all_special_tokens}
    templates = tokenizer.chat_template or ""
    written = "\n".join(templates.values()) if isinstance(templates, dict) else templates
    special |= {
        str(token)
        for token in tokenizer.added_tokens_decoder.values()
        # Words and runs of spaces occur in a template too, as names and as its indentation.
        if token.special or (markers and str(token) in written and _MARKUP.search(str(token)))
    }
    longest_first = sorted((token for token in special if len(token) > 1), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
    # No closure: collators are pickled where workers are spawned.
    return functools.partial(_split_tokens, pattern)


def _split_tokens(pattern: re.Pattern[str], text: str) -> str:
    return pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
