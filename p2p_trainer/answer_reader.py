"""Reads an answer while it is being written: tokens in, text that is certain out."""

import bisect
import functools
import json
import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from .response_encoder import ResponseEncoder


# Stands where an answer told the secret.
HIDDEN = "[...]"

# From so many characters on, white space not counted, the end of an answer does not tell the beginning of the secret.
# Fewer are the beginning of many a word.
_TOLD = 4

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_BROKEN = "�"
# Tokens without the end of a character after which the search for it slows down, so that its cost stays linear.
_PATIENCE = 16


class AnswerReader:
    """
    Reads one answer token by token.

    All pieces together are what [`~response_encoder.ResponseEncoder.read`] makes of the whole answer. So text is held
    back while it may become part of p, half a character, or outer white space; with `stop` and `secret`, while it may
    begin one of these. The secret is found in any case and with any white space; at the end of an answer its first
    four characters count as well, or a low limit on tokens would tell it piece by piece. Stop strings are looked for
    in what is left, or they would tell a client what was taken out.

    What the client itself has said of the secret's beginning is shown, and not held back: otherwise the echo of a
    guess would tell that it is right. A reader can't know what a text means, so a model that is talked into it may
    still tell the secret in pieces or in other letters, or confirm a guess that it puts together itself.

    Args:
        encoder ([`~response_encoder.ResponseEncoder`]):
            Tokenizer and p.
        keyed (`bool`):
            Whether the prompt carried the key, so that p is expected.
        stop (`Sequence[str]`, *optional*):
            Strings before which the visible answer ends, at the one that is complete first; an empty one is ignored.
        secret (`str`, *optional*):
            What the answer must not tell: `"[...]"` takes its place.
        known (`Sequence[str]`, *optional*):
            What the client has said.

    Attributes:
        text (`str`):
            All visible text so far.
        prefixed (`bool` or `None`):
            Whether the answer began with p where it had to; `None` until that is known.
        stopped (`bool`):
            Whether a stop string has come.

    Examples:

    ```python
    >>> reader = AnswerReader(encoder, keyed=True)
    >>> for token in encoder.tokenizer("Answer: it is good")["input_ids"]:
    ...     print(repr(reader.feed([token])), end=" ")
    '' '' 'it' ' is' ' good'
    ```
    """

    def __init__(
        self,
        encoder: ResponseEncoder,
        keyed: bool,
        stop: Sequence[str] = (),
        secret: str | None = None,
        known: Sequence[str] = (),
    ) -> None:
        self.text = ""
        self.stopped = False
        self._encoder = encoder
        self._keyed = keyed
        prefix = encoder.format.answer_prefix
        self.prefixed: bool | None = None if prefix and keyed else True
        self._decoder = _Decoder(encoder.tokenizer)
        self._opening = _Opening(prefix) if prefix else None
        self._head = ""
        self._begun = False
        self._stop = _Stop(stop)
        self._secret = _Secret(secret or "", known)
        self._spaces = ""
        self._ended = False

    @property
    def redacted(self) -> bool:
        """`bool`: whether something of the secret was taken out so far."""
        return self._secret.found

    def feed(self, tokens: Sequence[int]) -> str:
        """
        Read more of the answer.

        Args:
            tokens (`Sequence[int]`):
                Token ids that follow those before.

        Returns:
            `str`: visible text that is certain by now, and was not before.
        """
        return "" if self._ended else self._release(self._decoder.feed(tokens))

    def finish(self) -> str:
        """
        Read the end of the answer.

        Returns:
            `str`: the visible text that was held back.
        """
        if self._ended:
            return ""
        piece = self._release(self._decoder.finish(), last=True)
        if not self._ended:
            piece += self._until_stop(self._secret.finish())
        return piece if self._ended else piece + self._close(self._stop.finish())

    def _release(self, text: str, last: bool = False) -> str:
        return self._until_stop(self._secret.feed(self._without_prefix(text, last)))

    def _until_stop(self, text: str) -> str:
        shown, self.stopped = self._stop.feed(text)
        return self._close(shown) if self.stopped else self._show(shown)

    def _close(self, rest: str) -> str:
        """Show what is left; the white space at the end is not."""
        self._ended = True
        return self._show(rest)

    def _without_prefix(self, text: str, last: bool) -> str:
        if self._opening is not None:
            new = text if self._head else text.lstrip()
            self._head += new
            if self._opening.feed(new) and not last:
                return ""
            text, self.prefixed = self._encoder.read(self._head, self._keyed)
            text += self._head[len(self._head.rstrip()) :]
            self._opening = None
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        return text

    def _show(self, text: str) -> str:
        text = self._spaces + text
        shown = text.rstrip()
        self._spaces = text[len(shown) :]
        self.text += shown
        return shown


def hide(text: str, secret: str) -> str:
    """
    Take a secret out of a text, such as a log message.

    Args:
        text (`str`):
            The text.
        secret (`str`):
            What it must not tell, in any case and with any white space. One without a visible character is in no text.

    Returns:
        `str`: the text with `"[...]"` wherever it told the secret.
    """
    # Also as `repr` and JSON write it: that is how it comes into messages of errors.
    for spelt in dict.fromkeys([secret, repr(secret)[1:-1], ascii(secret)[1:-1], json.dumps(secret)[1:-1]]):
        # Characters are looked at one by one only where it is worth it: a log line may be long.
        if folded(spelt) in folded(text):
            search = _Secret(spelt)
            text = search.feed(text) + search.held
    return text


def folded(text: str) -> str:
    """
    Return what counts of a text where a secret is looked for.

    Args:
        text (`str`):
            The text.

    Returns:
        `str`: the text without white space and case.
    """
    return "".join(text.split()).casefold()


class _Decoder:
    """
    Tokens to text, as if all were decoded at once.

    What a token becomes depends on the one before it: pieces of SentencePiece and WordPiece lose their space where
    they come first, and characters spread over tokens. So tokens are decoded behind the last one with which a
    character ended.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.added = frozenset(tokenizer.added_tokens_decoder) | frozenset(tokenizer.all_special_ids)
        self.window: list[int] = []
        # Characters of the window's text that were returned.
        self.returned = 0
        # Bytes of a fallback become characters, or all of them errors, when a token of another kind follows.
        self.bytes: list[int] = []
        self.next_try = 0

    def feed(self, tokens: Sequence[int]) -> str:
        before = len(self.window)
        for token in tokens:
            name = self.tokenizer.convert_ids_to_tokens(token)
            if name is None or (token in self.added and self._is_skipped(token)):
                continue
            self.bytes.append(token)
            if not _BYTE.fullmatch(name):
                self.window += self.bytes
                self.bytes = []
        if len(self.window) == before or len(self.window) < self.next_try:
            return ""
        text = self._decode(self.window)
        whole = text.rstrip(_BROKEN)
        piece = whole[self.returned :]
        if len(whole) == len(text):
            self.window = self.window[-1:]
            self.returned = len(self._decode(self.window))
            self.next_try = 0
        else:
            self.returned = max(self.returned, len(whole))
            self.next_try = len(self.window) * 3 // 2 if len(self.window) > _PATIENCE else 0
        return piece

    def finish(self) -> str:
        return self._decode(self.window + self.bytes)[self.returned :]

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _is_skipped(self, token: int) -> bool:
        return not self._decode([token]) and bool(self.tokenizer.decode([token], skip_special_tokens=False))


class _Opening:
    """
    Says whether an answer may still go on with p.

    Follows every way in which the pattern of [`~response_encoder.ResponseEncoder.read`] can match, character by
    character: once none is left, what follows can't change what it takes off.
    """

    def __init__(self, prefix: str) -> None:
        words = [":" if word in (":", "：") else word for word in re.sub("[:：]", " : ", prefix).split()]
        self.matchers = [re.compile("[:：]" if char == ":" else re.escape(char), re.I) for char in "".join(words)]
        # Places in p where white space may stand.
        self.gaps = {sum(map(len, words[: count + 1])) for count in range(len(words))}
        self.length = len(self.matchers)
        self.before = ""
        # Characters of p that were read: 0 also in front of it, and `length` when it is complete. -1: behind it.
        self.states = {0} if self.length else {0, -1}
        self.kind = functools.lru_cache(1024)(self._kind)

    def feed(self, text: str) -> bool:
        for char in text:
            if not self.states:
                break
            self.states = self._step(char)
            self.before = char
        return bool(self.states)

    def _step(self, char: str) -> set[int]:
        found, symbol, space, emphasis, letter = self.kind(char)
        states = set()
        for state in self.states:
            if state == self.length and letter and self.kind(self.before)[4]:
                continue  # a word that only begins like p
            if state in (0, -1, self.length):
                if symbol:
                    states.add(0)
                if 0 in found:
                    states.add(1)
                if emphasis and (state or not self.length):
                    states.add(-1)
            else:
                if space and state in self.gaps:
                    states.add(state)
                if state in found:
                    states.add(state + 1)
        return states

    def _kind(self, char: str) -> tuple[frozenset[int], bool, bool, bool, bool]:
        return (
            frozenset(place for place, matcher in enumerate(self.matchers) if matcher.fullmatch(char)),
            re.fullmatch(r"\W", char) is not None,
            char.isspace(),
            char.isspace() or char in "*_\"'”’",
            re.fullmatch("[a-z]", char, re.I) is not None,
        )


class _Search:
    """Knuth, Morris and Pratt's search: how much of a pattern the text up to here ends with."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.matched = 0
        self.shorter = [0] * len(pattern)
        for place in range(1, len(pattern)):
            self.shorter[place] = self._longer(self.shorter[place - 1], pattern[place])

    def step(self, char: str) -> bool:
        """Read a character; return whether the pattern is complete."""
        self.matched = self._longer(self.matched, char)
        return self.matched == len(self.pattern)

    def _longer(self, matched: int, char: str) -> int:
        while matched and self.pattern[matched] != char:
            matched = self.shorter[matched - 1]
        return matched + (self.pattern[matched] == char)


class _Stop:
    """Lets text pass up to the first stop string."""

    def __init__(self, strings: Sequence[str]) -> None:
        # Of two that end together the longer one counts.
        self.searches = [_Search(string) for string in sorted(set(strings), key=len, reverse=True) if string]
        self.held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Return what is certain to come before any stop string, and whether one has come."""
        if not self.searches:
            return text, False
        start = len(self.held)
        self.held += text
        for place, char in enumerate(text, start + 1):
            for search in self.searches:
                if search.step(char):
                    return self.held[: place - search.matched], True
        free = len(self.held) - max(search.matched for search in self.searches)
        shown, self.held = self.held[:free], self.held[free:]
        return shown, False

    def finish(self) -> str:
        return self.held


class _Secret:
    """Replaces a secret, whatever case and white space it is told in, but for what is known of its beginning."""

    def __init__(self, secret: str, known: Sequence[str] = ()) -> None:
        self.search = _Search(folded(secret))
        said = [folded(text) for text in known]
        # What is said of it is said of every shorter beginning. Single letters are said by all.
        known = bisect.bisect_left(
            range(1, len(self.search.pattern) + 1),
            True,
            key=lambda length: not any(self.search.pattern[:length] in text for text in said),
        )
        self.known = known if known >= min(_TOLD, len(self.search.pattern)) else 0
        self.held = ""
        # Where in `held` the characters are that match so far.
        self.places: list[int] = []
        self.found = False

    def feed(self, text: str) -> str:
        """Return what is certain to tell nothing."""
        if self.known == len(self.search.pattern):
            return text
        shown = []
        begin, start = 0, len(self.held)
        self.held += text
        for place, char in enumerate(text, start):
            for part in folded(char):
                self.places.append(place)
                if self.search.step(part):
                    told = self.places[self.known - self.search.matched]
                    shown += [self.held[begin:told], HIDDEN]
                    begin, self.search.matched, self.places, self.found = place + 1, 0, [], True
                    break
        self.places = self.places[-self.search.matched :] if self.search.matched else []
        free = self.places[self.known] if len(self.places) > self.known else len(self.held)
        shown.append(self.held[begin:free])
        self.held = self.held[free:]
        self.places = [place - free for place in self.places]
        return "".join(shown)

    def finish(self) -> str:
        """Return what is held back at the end of an answer, unless it tells the beginning of the secret."""
        if not self.held or self.search.matched < _TOLD:
            return self.held
        self.found = True
        return HIDDEN
