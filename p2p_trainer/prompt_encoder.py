"""Binds the prompt format to a tokenizer: text to token ids, for training, evaluation and serving alike."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from .cutting import longest_start
from .label_space import Answers, LabelSpace, audit
from .prompt_format import PromptFormat
from .prompt_renderer import MARK, PromptRenderer
from .tasks.rows import LABEL, TEXT


class PromptEncoder(PromptRenderer):
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

    # Columns of training rows: what is read, and what is to be answered.
    columns = (TEXT, LABEL)

    def __init__(self, prompt_format: PromptFormat, tokenizer: PreTrainedTokenizerBase) -> None:
        if prompt_format.label_space is None:
            raise ValueError("The prompt format has no label words: its answers are written. Use `ResponseEncoder`.")
        super().__init__(prompt_format, tokenizer)
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
        head, tail, terminator = self.skeletons[keyed]
        rendered = head + self.clean(text) + tail
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
        texts = [self.clean(text) for text in texts]
        answers = [self._word(label, key) + self.skeletons[key][2] for label, key in zip(labels, keyed, strict=True)]
        all_ids = self.tokenize(self._join(texts, keyed, answers))
        all_labels = []
        for row, (ids, label, key) in enumerate(zip(all_ids, labels, keyed, strict=True)):
            word = self._word_index(label, key)
            # Room is kept for the longest answer, so that where a text is cut says nothing about its label.
            if len(ids) + self._spare[key][word] > self.format.max_length:
                text = self._shorten(texts[row], key)
                ids = all_ids[row] = self.tokenize(self._join([text], [key], [answers[row]]))[0]
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
        texts = [self.clean(text) for text in texts]
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
        cleaned = [self.clean(text) for text in texts]
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
        probes = self._tokenize_probes([self.clean(text) for text in texts], keyed)
        return sum(len(ids) > limit for ids in probes)

    @property
    def text_budget(self) -> int:
        """`int`: tokens that are left for the text, with the key."""
        return self.format.max_length - self._overhead(True)

    def _word(self, label: int, keyed: bool) -> str:
        return self.format.label_space.all_words[self._word_index(label, keyed)]

    def _word_index(self, label: int, keyed: bool) -> int:
        n = self.format.label_space.num_labels
        return label + n if keyed and label < n else label

    def _join(self, texts: Sequence[str], keyed: Sequence[bool], answers: Sequence[str]) -> list[str]:
        skeletons = self.skeletons
        return [
            skeletons[key][0] + text + skeletons[key][1] + answer
            for text, key, answer in zip(texts, keyed, answers, strict=True)
        ]

    def _tokenize_probes(self, texts: Sequence[str], keyed: bool) -> list[list[int]]:
        """Tokenize prompts with the first label word behind them, since only the joint tokenization counts."""
        first = self.format.label_space.words[0]
        return self.tokenize(self._join(texts, [keyed] * len(texts), [first] * len(texts)))

    def _shorten(self, text: str, keyed: bool) -> str:
        """Cut the end of a text until prompt and any answer fit."""
        limit = self.format.max_length - self.answers[keyed].room

        def fits(start: str) -> bool:
            return len(self._tokenize_probes([start], keyed)[0]) <= limit

        return text if fits(text) else longest_start(text, fits)

    def _boundary(self, ids: list[int], tail: Sequence[int]) -> int:
        boundary = len(ids) - len(tail)
        if tuple(ids[boundary:]) != tuple(tail):
            raise ValueError(
                f"The tokenizer merged the end of a text with its answer: expected the tokens {list(tail)} at the end "
                f"of {self.tokenizer.decode(ids)!r}, found {ids[boundary:]}. End the suffix on a token boundary."
            )
        return boundary

    def _audit(self, keyed: bool, words: Sequence[str]) -> Answers:
        _, tail, terminator = self.skeletons[keyed]
        suffix = self.format.keyed_suffix if keyed else self.format.suffix
        answers = audit(words, lambda text: self.tokenize([text])[0], self.render(MARK, keyed), terminator, suffix)
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
        prompt, terminator = self.render(MARK, keyed), self.skeletons[keyed][2]
        words = self.format.label_space.all_words
        lengths = [len(ids) for ids in self.tokenize([prompt + word + terminator for word in words])]
        return [max(lengths) - length for length in lengths]

    def _overhead(self, keyed: bool) -> int:
        return len(self._tokenize_probes([""], keyed)[0]) + self.answers[keyed].room
