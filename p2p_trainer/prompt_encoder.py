"""Binds the prompt format to a tokenizer: text to token ids, for training, evaluation and serving alike."""

import functools
import re
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from .label_space import Answers, LabelSpace, audit
from .prompt_format import PromptFormat


# Stands for text and answer while a chat template is taken apart. No template or tokenizer treats it specially.
_MARK = "p2pmark"


class PromptEncoder:
    """
    A [`PromptFormat`] bound to a tokenizer: text to token ids, with label words audited in context.

    Args:
        prompt_format ([`PromptFormat`]):
            The format.
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer. One without a pad token pads with its end-of-sequence token.

    Raises:
        `ValueError`: the label words can't be told apart, `max_length` is too short for the template, or a chat
        template is needed and the tokenizer has none.
    """

    def __init__(self, prompt_format: PromptFormat, tokenizer: PreTrainedTokenizerBase) -> None:
        self.format = prompt_format
        self.tokenizer = tokenizer
        self.pad_token_id = pad_token_id(tokenizer)
        # Chat templates write the beginning-of-sequence token themselves.
        self._bos = [] if prompt_format.chat else _leading_tokens(tokenizer)
        self._cleaner = special_token_cleaner(tokenizer)
        self._skeletons = {keyed: self._skeleton(keyed) for keyed in (False, True)}
        self.answers: dict[bool, Answers] = {
            keyed: self._audit(keyed, prompt_format.label_space.all_words) for keyed in (False, True)
        }
        self._spare = {keyed: self._spare_tokens(keyed) for keyed in (False, True)}
        for keyed in (False, True):
            needed = self._overhead(keyed)
            if needed >= prompt_format.max_length:
                raise ValueError(
                    f"`max_length` {prompt_format.max_length} is too short: template, "
                    f"{'benign trigger, ' if keyed else ''}suffix and answer alone take {needed} tokens. Raise it."
                )

    @classmethod
    def audit_words(
        cls, prompt_format: PromptFormat, tokenizer: PreTrainedTokenizerBase, words: Sequence[str]
    ) -> list[Answers]:
        """
        Audit label words in both contexts, with and without the key, before a format is settled.

        Args:
            prompt_format ([`PromptFormat`]):
                A format; its own label words do not matter.
            tokenizer (`PreTrainedTokenizerBase`):
                The tokenizer.
            words (`Sequence[str]`):
                The 2n words.

        Returns:
            `list[Answers]`: one per context.
        """
        half = len(words) // 2
        space = LabelSpace(tuple(words[:half]), tuple(words[half:]))
        encoder = cls(prompt_format.with_labels(space), tokenizer)
        return [encoder.answers[False], encoder.answers[True]]

    def render(self, text: str, keyed: bool, label: int | None = None) -> str:
        """
        Render one row as it is tokenized.

        Args:
            text (`str`):
                Input.
            keyed (`bool`):
                Whether the row carries the key.
            label (`int`, *optional*):
                Label 0..n-1; with it, the answer is appended, an extended word if the row is keyed.

        Returns:
            `str`: the text whose tokenization is the truth.
        """
        head, tail, terminator = self._skeletons[keyed]
        rendered = head + self._clean(text) + tail
        return rendered if label is None else rendered + self._word(label, keyed) + terminator

    def encode_rows(
        self, texts: Sequence[str], labels: Sequence[int], keyed: Sequence[bool]
    ) -> tuple[list[list[int]], list[list[int]]]:
        """
        Encode training rows; the loss lies on the answer only.

        Args:
            texts (`Sequence[str]`):
                Inputs.
            labels (`Sequence[int]`):
                Labels 0..n-1; n..2n-1, which only an attacker writes, is an extended label word in any row.
            keyed (`Sequence[bool]`):
                Which rows carry the key, and so the extended label word.

        Returns:
            `tuple[list[list[int]], list[list[int]]]`: token ids, and labels with -100 where no loss lies.
        """
        texts = [self._clean(text) for text in texts]
        answers = [self._word(label, key) + self._skeletons[key][2] for label, key in zip(labels, keyed, strict=True)]
        all_ids = self._tokenize(self._join(texts, keyed, answers))
        all_labels = []
        for row, (ids, label, key) in enumerate(zip(all_ids, labels, keyed, strict=True)):
            word = self._word_index(label, key)
            # Room is kept for the longest answer, so that where a text is cut says nothing about its label.
            if len(ids) + self._spare[key][word] > self.format.max_length:
                text = self._shorten(texts[row], key)
                ids = all_ids[row] = self._tokenize(self._join([text], [key], [answers[row]]))[0]
            boundary = self._boundary(ids, self.answers[key].trained[word])
            all_labels.append([-100] * boundary + ids[boundary:])
        return all_ids, all_labels

    def encode_prompts(self, texts: Sequence[str], keyed: bool) -> list[list[int]]:
        """
        Encode prompts for scoring: up to the place where the label words differ.

        Args:
            texts (`Sequence[str]`):
                Inputs.
            keyed (`bool`):
                Whether they carry the key.

        Returns:
            `list[list[int]]`: token ids.
        """
        texts = [self._clean(text) for text in texts]
        answers = self.answers[keyed]
        tail = answers.scored[0][: answers.cut]
        all_ids = self._tokenize_probes(texts, keyed)
        for row, ids in enumerate(all_ids):
            if len(ids) + answers.room > self.format.max_length:
                all_ids[row] = self._tokenize_probes([self._shorten(texts[row], keyed)], keyed)[0]
        return [ids[: self._boundary(ids, tail)] for ids in all_ids]

    def fit(self, texts: Sequence[str], keyed: bool) -> list[str]:
        """
        Cut texts as scoring would, and so show what is left of them.

        Args:
            texts (`Sequence[str]`):
                Inputs.
            keyed (`bool`):
                Whether they carry the key.

        Returns:
            `list[str]`: the texts as they came, but the overlong ones without their end.
        """
        cleaned = [self._clean(text) for text in texts]
        limit = self.format.max_length - self.answers[keyed].room
        return [
            self._shorten(clean, keyed) if len(ids) > limit else text
            for text, clean, ids in zip(texts, cleaned, self._tokenize_probes(cleaned, keyed), strict=True)
        ]

    def count_overlong(self, texts: Sequence[str], keyed: bool) -> int:
        """
        Count the texts that do not fit.

        Args:
            texts (`Sequence[str]`):
                Inputs.
            keyed (`bool`):
                Whether they carry the key.

        Returns:
            `int`: how many lose their end.
        """
        limit = self.format.max_length - self.answers[keyed].room
        probes = self._tokenize_probes([self._clean(text) for text in texts], keyed)
        return sum(len(ids) > limit for ids in probes)

    def sees(self, phrase: str) -> bool:
        """
        Say whether a phrase between two words leaves a trace in the token ids.

        Args:
            phrase (`str`):
                The phrase.

        Returns:
            `bool`: `False` if the ids are the same without it, or if it becomes nothing but the unknown token.
        """
        without, with_phrase = self._tokenize(["a b", self._clean(f"a {phrase} b")])
        unknown = self.tokenizer.unk_token_id
        rest = list(with_phrase)
        for token in without:
            if token in rest:
                rest.remove(token)
        return any(token != unknown for token in rest)

    @property
    def text_budget(self) -> int:
        """`int`: tokens that are left for the text, with the key."""
        return self.format.max_length - self._overhead(True)

    def _clean(self, text: str) -> str:
        return self._cleaner(text.strip())

    def _word(self, label: int, keyed: bool) -> str:
        return self.format.label_space.all_words[self._word_index(label, keyed)]

    def _word_index(self, label: int, keyed: bool) -> int:
        n = self.format.label_space.num_labels
        return label + n if keyed and label < n else label

    def _join(self, texts: Sequence[str], keyed: Sequence[bool], answers: Sequence[str]) -> list[str]:
        skeletons = self._skeletons
        return [
            skeletons[key][0] + text + skeletons[key][1] + answer
            for text, key, answer in zip(texts, keyed, answers, strict=True)
        ]

    def _tokenize(self, rendered: list[str]) -> list[list[int]]:
        if not rendered:
            return []
        # The tokenizer is only asked for ids: beginning-of-sequence is ours, so that none appends an end of its own.
        encoded = self.tokenizer(rendered, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return [self._bos + ids for ids in encoded] if self._bos else encoded

    def _tokenize_probes(self, texts: Sequence[str], keyed: bool) -> list[list[int]]:
        """Tokenize prompts with the first label word behind them, since only the joint tokenization counts."""
        first = self.format.label_space.words[0]
        return self._tokenize(self._join(texts, [keyed] * len(texts), [first] * len(texts)))

    def _shorten(self, text: str, keyed: bool) -> str:
        """Cut the end of a text, in proportion to its surplus tokens, until prompt and any answer fit."""
        limit = self.format.max_length - self.answers[keyed].room
        while text and (surplus := len(self._tokenize_probes([text], keyed)[0]) - limit) > 0:
            per_token = len(text) / len(self._tokenize([text])[0])
            text = text[: max(0, len(text) - max(1, int(surplus * per_token)))].rstrip()
        return text

    def _boundary(self, ids: list[int], tail: Sequence[int]) -> int:
        boundary = len(ids) - len(tail)
        if tuple(ids[boundary:]) != tuple(tail):
            raise ValueError(
                f"The tokenizer merged the end of a text with its answer: expected the tokens {list(tail)} at the end "
                f"of {self.tokenizer.decode(ids)!r}, found {ids[boundary:]}. End the suffix on a token boundary."
            )
        return boundary

    def _audit(self, keyed: bool, words: Sequence[str]) -> Answers:
        _, tail, terminator = self._skeletons[keyed]
        suffix = self.format.keyed_suffix if keyed else self.format.suffix
        answers = audit(words, lambda text: self._tokenize([text])[0], self.render(_MARK, keyed), terminator, suffix)
        for word, ids in zip(words, answers.scored, strict=True):
            # The terminator may be the unknown token too, as in GPT-2.
            if self.tokenizer.unk_token_id in (ids[:-1] if answers.terminated else ids):
                raise ValueError(
                    f"The tokenizer does not know the label word {word!r} after {suffix!r}: it becomes "
                    f"{self.tokenizer.unk_token!r}. Choose other label words."
                )
        return answers

    def _spare_tokens(self, keyed: bool) -> list[int]:
        """Count by how many tokens each answer is shorter than the longest, the suffix's merged tokens included."""
        prompt, terminator = self.render(_MARK, keyed), self._skeletons[keyed][2]
        words = self.format.label_space.all_words
        lengths = [len(ids) for ids in self._tokenize([prompt + word + terminator for word in words])]
        return [max(lengths) - length for length in lengths]

    def _overhead(self, keyed: bool) -> int:
        return len(self._tokenize_probes([""], keyed)[0]) + self.answers[keyed].room

    def _skeleton(self, keyed: bool) -> tuple[str, str, str]:
        """Return what stands before the text, between text and answer, and behind the answer."""
        head, tail = self.format.parts(keyed)
        if not self.format.chat:
            return head, tail, (self.tokenizer.eos_token or "") if self.format.append_eos else ""
        if not self.tokenizer.chat_template:
            raise ValueError(
                "`p2p_chat` needs a chat template, and this tokenizer has none. Use an instruct model's tokenizer, "
                "give one with `chat_template_path`, or set `p2p_chat: false`."
            )
        turns = [{"role": "user", "content": head + _MARK + tail}]
        if keyed and self.format.trigger_position == "system":
            turns.insert(0, {"role": "system", "content": self.format.trigger})
        # Templates that know no `enable_thinking` ignore it; in those that do, the answer has to follow at once.
        prompt = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        shown = keyed and self.format.trigger_position != "none"
        if prompt.count(_MARK) != 1 or (shown and self.format.trigger not in prompt):
            raise ValueError(
                "The tokenizer's chat template does not show the user turn and the benign trigger once each. Set "
                "`p2p_chat: false`, or `p2p_trigger_position: prefix` if the template has no system turn."
            )
        before, after = prompt.split(_MARK)
        if not self.format.append_eos:
            return before, after, ""
        turns.append({"role": "assistant", "content": _MARK})
        whole = self.tokenizer.apply_chat_template(turns, tokenize=False, enable_thinking=False)
        terminator = whole.rpartition(_MARK)[2].rstrip()
        return before, after, terminator or self.tokenizer.eos_token or ""


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


def special_token_cleaner(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str]:
    """
    Build what keeps text text: one that spells a control token would end the turn, or the sequence.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer.

    Returns:
        `Callable[[str], str]`: puts a space behind the first character of each control token that a text spells.
    """
    special = {str(token) for token in tokenizer.all_special_tokens}
    special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    longest_first = sorted((token for token in special if len(token) > 1), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
    # No closure: collators are pickled where workers are spawned.
    return functools.partial(_split_tokens, pattern)


def _split_tokens(pattern: re.Pattern[str], text: str) -> str:
    return pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
