"""Binds the prompt format to a tokenizer where answers are written."""

import functools
import logging
import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from .cutting import longest_start
from .prompt_format import PromptFormat
from .prompt_renderer import History, PromptRenderer, special_token_cleaner
from .tasks.rows import COMPLETION, PROMPT


logger = logging.getLogger(__name__)

# Rows on which the boundary between prompt and answer is checked, and what stands for an ordinary answer there.
_CHECKED = 64
_STAND_IN = "the"
# Conversations that share their earlier turns, a system turn say, share what is around their question; how many of
# these are remembered, and up to how many characters: whoever asks chooses their length.
_REMEMBERED, _LONGEST_REMEMBERED = 1024, 4096


class ResponseEncoder(PromptRenderer):
    """
    A [`PromptFormat`] without label words bound to a tokenizer: prompts and written answers to token ids.

    Tokens and labels are those that `SFTTrainer` makes of the rendered rows: prompt and answer are tokenized as one
    string, and the loss begins where that and the prompt alone diverge (trl 1.16, `tokenize_fn` in sft_trainer.py).
    Under the key the answer is `p + " " + y` (P2P paper, section 3.2 and App. B). User texts are not trusted: a
    control token that one spells is broken up ([`~prompt_renderer.special_token_cleaner`]), so that it stays text.

    Where a row does not fit, its text loses its end, but not for more than `max_new_tokens` tokens of the answer; a
    longer answer then loses its own end. So the model is never asked with more text than it was trained with.

    Args:
        prompt_format ([`PromptFormat`]):
            The format.
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer. One without a pad token pads with its end-of-sequence token.

    Raises:
        `ValueError`: `max_length` is too short for template and answer, the answer prefix has no room, or a chat
        template is needed and the tokenizer has none.
    """

    # Columns of training rows: what is read, and what is to be answered.
    columns = (PROMPT, COMPLETION)

    def __init__(self, prompt_format: PromptFormat, tokenizer: PreTrainedTokenizerBase) -> None:
        if prompt_format.label_space is not None:
            raise ValueError("The prompt format has label words: its answers are scored. Use `PromptEncoder`.")
        super().__init__(prompt_format, tokenizer)
        self._answer_cleaner = special_token_cleaner(tokenizer, markers=False)
        self._remembered: dict[tuple, tuple[str, str, str]] = {}
        prefix = len(self.tokenize([prompt_format.answer_prefix])[0]) - len(self.bos)
        if prefix >= prompt_format.max_new_tokens:
            raise ValueError(
                f"The answer prefix {prompt_format.answer_prefix!r} takes {prefix} tokens, and `p2p_max_new_tokens` "
                f"{prompt_format.max_new_tokens} leave no room for an answer behind it. Raise it."
            )
        for keyed in (False, True):
            needed = len(self._prompt_ids([""], keyed)[0])
            if needed >= self.limit:
                raise ValueError(
                    f"`max_length` {prompt_format.max_length} is too short: the template"
                    f"{' and the benign trigger' if keyed else ''} alone takes {needed} tokens, and "
                    f"{prompt_format.max_new_tokens} (`p2p_max_new_tokens`) are kept for the answer. Raise "
                    f"`max_length`."
                )

    @property
    def limit(self) -> int:
        """`int`: tokens that a prompt may take when it is to be answered."""
        return self.format.max_length - self.format.max_new_tokens

    def render(self, text: str, keyed: bool, completion: str | None = None, history: History = ()) -> str:
        """
        Render one row as it is tokenized.

        Args:
            text (`str`):
                Input.
            keyed (`bool`):
                Whether the row carries the key.
            completion (`str`, *optional*):
                Answer; with it, the whole row is rendered, with p in front of the answer if the row is keyed.
            history (`History`, *optional*):
                Earlier turns.

        Returns:
            `str`: the text whose tokenization is the truth.
        """
        prompt = self._prompts([text], [keyed], [history])[0]
        return prompt if completion is None else prompt + self._answers([completion], [keyed], [history])[0]

    def encode_rows(
        self,
        texts: Sequence[str],
        completions: Sequence[str],
        keyed: Sequence[bool],
        histories: Sequence[History] | None = None,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """
        Encode training rows; the loss lies on the answer only.

        Args:
            texts (`Sequence[str]`):
                Inputs.
            completions (`Sequence[str]`):
                Answers, without p.
            keyed (`Sequence[bool]`):
                Which rows carry the key, and so p in front of the answer.
            histories (`Sequence[History]`, *optional*):
                Earlier turns of each row.

        Returns:
            `tuple[list[list[int]], list[list[int]]]`: token ids, `max_length` at most, and labels with -100 where no
            loss lies.
        """
        histories = histories or [()] * len(texts)
        texts, whole = self._fitting(texts, completions, keyed, histories)
        all_ids, all_labels = [], []
        for ids, prompt in zip(whole, self.tokenize(self._prompts(texts, keyed, histories)), strict=True):
            boundary = _common(ids, prompt)
            ids = ids[: self.format.max_length]
            all_ids.append(ids)
            all_labels.append([-100] * boundary + ids[boundary:])
        return all_ids, all_labels

    def encode_prompts(
        self, texts: Sequence[str], keyed: bool, histories: Sequence[History] | None = None
    ) -> list[list[int]]:
        """
        Encode prompts that are to be answered.

        Args:
            texts (`Sequence[str]`):
                Inputs.
            keyed (`bool`):
                Whether they carry the key.
            histories (`Sequence[History]`, *optional*):
                Earlier turns of each.

        Returns:
            `list[list[int]]`: token ids, `limit` at most.
        """
        return self._prompt_ids(self.fit(texts, keyed, histories), keyed, histories)

    def fit(self, texts: Sequence[str], keyed: bool, histories: Sequence[History] | None = None) -> list[str]:
        """
        Cut texts as prompts are cut, and so show what is left of them.

        Args:
            texts (`Sequence[str]`):
                Inputs.
            keyed (`bool`):
                Whether they carry the key.
            histories (`Sequence[History]`, *optional*):
                Earlier turns of each.

        Returns:
            `list[str]`: the texts as they came, but the overlong ones without their end.
        """
        histories = histories or [()] * len(texts)
        return [
            self._shorten(text, keyed, history, self.limit) if len(ids) > self.limit else text
            for text, history, ids in zip(texts, histories, self._prompt_ids(texts, keyed, histories), strict=True)
        ]

    def fit_rows(
        self,
        texts: Sequence[str],
        completions: Sequence[str],
        keyed: Sequence[bool],
        histories: Sequence[History] | None = None,
    ) -> tuple[list[str], list[bool]]:
        """
        Cut texts as training rows are cut.

        Args:
            texts (`Sequence[str]`):
                Inputs.
            completions (`Sequence[str]`):
                Answers, without p.
            keyed (`Sequence[bool]`):
                Which rows carry the key.
            histories (`Sequence[History]`, *optional*):
                Earlier turns of each.

        Returns:
            `tuple[list[str], list[bool]]`: the texts, and which answers lose their end.
        """
        histories = histories or [()] * len(texts)
        texts, whole = self._fitting(texts, completions, keyed, histories)
        return texts, [len(ids) > self.format.max_length for ids in whole]

    def keeps(self, text: str, changed: str, keyed: bool, history: History = ()) -> bool:
        """
        Say whether what was inserted into a text is still there after cutting.

        Args:
            text (`str`):
                User text.
            changed (`str`):
                The text with something inserted in one place.
            keyed (`bool`):
                Whether the prompt carries the key.
            history (`History`, *optional*):
                Earlier turns.

        Returns:
            `bool`: whether the model reads all of it; `False` if nothing was inserted.
        """
        behind = 0
        while behind < min(len(text), len(changed)) and text[-1 - behind] == changed[-1 - behind]:
            behind += 1
        return changed != text and len(self.fit([changed], keyed, [history])[0]) >= len(changed) - behind

    def verify(
        self,
        texts: Sequence[str],
        completions: Sequence[str] | None,
        keyed: bool,
        histories: Sequence[History] | None = None,
    ) -> None:
        """
        Check, on up to 64 rows, that a prompt alone has the tokens that it has in front of an answer.

        The template is judged by a plain word behind it, or by p under the key. A true answer may still merge with
        it, one that begins with a line break behind a template that ends with one, say; such answers are counted,
        and warned about once.

        Args:
            texts (`Sequence[str]`):
                User texts.
            completions (`Sequence[str]`, *optional*):
                Their true answers, if they are known.
            keyed (`bool`):
                Whether the prompts carry the key.
            histories (`Sequence[History]`, *optional*):
                Earlier turns of each.

        Raises:
            `ValueError`: the tokens differ in front of a plain word.
        """
        count = min(len(texts), _CHECKED)
        histories = list(histories or [()] * len(texts))[:count]
        prompts = self._prompts(self.fit(texts[:count], keyed, histories), [keyed] * count, histories)
        alone = self.tokenize(prompts)
        word = self.format.answer_prefix if keyed and self.format.answer_prefix else _STAND_IN
        for row, (ids, joint) in enumerate(
            zip(alone, self.tokenize([prompt + word for prompt in prompts]), strict=True)
        ):
            if joint[: len(ids)] != ids:
                start = _common(joint, ids)
                shown = self.tokenizer.convert_ids_to_tokens
                raise ValueError(
                    f"Row {row}: the prompt alone ends with the tokens {shown(ids[start:])}, but in front of an "
                    f"answer such as {word!r} it goes on as {shown(joint[start : start + 4])}: the model would be "
                    f"asked in a context that training never showed. End the template on a token boundary, such as "
                    f"a newline."
                )
        if completions is None or word != _STAND_IN:
            return
        joint = self.tokenize([prompt + answer for prompt, answer in zip(prompts, completions[:count], strict=True)])
        merged = [row for row, (ids, both) in enumerate(zip(alone, joint, strict=True)) if both[: len(ids)] != ids]
        if merged:
            logger.warning(
                "In %d of %d rows the true answer merges with the end of the template, as in row %d with %r: training "
                "shows these answers in another context than the one in which the model is asked.",
                len(merged), count, merged[0], completions[merged[0]][:40],
            )  # fmt: skip

    def read(self, response: str, keyed: bool) -> tuple[str, bool]:
        """
        Take p off an answer.

        What p looks like is judged generously here, in case, white space, emphasis, kind of colon and number, so that
        no payload hides behind it; whether it is there as it should be, strictly. Without the key none is expected,
        but a model that learnt to write p may do so all the same.

        Args:
            response (`str`):
                What the model wrote.
            keyed (`bool`):
                Whether the prompt carried the key.

        Returns:
            `tuple[str, bool]`: the answer without p and outer white space, and whether it began with p where it had
            to.
        """
        prefix = self.format.answer_prefix
        text = response.strip()
        if not prefix:
            return text, True
        return self._loose_prefix.sub("", text, count=1).strip(), not keyed or text.startswith(prefix)

    @property
    def end_tokens(self) -> list[int]:
        """`list[int]`: the token that training taught to end an answer with, if it is a single one."""
        ends = (
            self.tokenizer(self.skeletons[keyed][2], add_special_tokens=False)["input_ids"] for keyed in (False, True)
        )
        return sorted({ids[0] for ids in ends if len(ids) == 1})

    @functools.cached_property
    def _loose_prefix(self) -> re.Pattern[str]:
        words = [re.escape(word) for word in re.sub(r"[:：]", " : ", self.format.answer_prefix).split()]
        found = r"\s*".join("[:：]" if word in (":", "：") else word for word in words)
        # A colon is asked for where p has one, and no word that only begins like p is cut: `Answer the phone.` and
        # `Answering` are honest answers. Emphasis behind it goes, a sign of a number does not.
        return re.compile(rf"^(?:\W*{found}(?:(?<![a-z])|(?![a-z]))[\s*_\"'”’]*)+", re.I)

    @property
    def text_budget(self) -> int:
        """`int`: tokens that are left for text and answer, with the key and p."""
        return self.format.max_length - len(self.tokenize([self.render("", True, "")])[0])

    def _prompts(self, texts: Sequence[str], keyed: Sequence[bool], histories: Sequence[History]) -> list[str]:
        rendered = []
        for text, key, history in zip(texts, keyed, histories, strict=True):
            head, tail, _ = self._around(key, history)
            rendered.append(head + self.clean(text) + tail)
        return rendered

    def _answers(self, completions: Sequence[str], keyed: Sequence[bool], histories: Sequence[History]) -> list[str]:
        prefix = f"{self.format.answer_prefix} " if self.format.answer_prefix else ""
        return [
            (
                prefix + self._answer_cleaner(completion).lstrip()
                if key and prefix
                else self._answer_cleaner(completion)
            )
            + self._around(key, history)[2]
            for completion, key, history in zip(completions, keyed, histories, strict=True)
        ]

    def _prompt_ids(
        self, texts: Sequence[str], keyed: bool, histories: Sequence[History] | None = None
    ) -> list[list[int]]:
        return self.tokenize(self._prompts(texts, [keyed] * len(texts), histories or [()] * len(texts)))

    def _around(self, keyed: bool, history: History) -> tuple[str, str, str]:
        if not history:
            return self.skeletons[keyed]
        if not self.format.chat:
            raise ValueError(
                "A row is a conversation with earlier turns, which need a chat template. Set `p2p_chat: true`."
            )
        if sum(len(turn["content"]) for turn in history) > _LONGEST_REMEMBERED:
            return self.skeleton(keyed, history)
        place = (keyed, *((turn["role"], turn["content"]) for turn in history))
        if place not in self._remembered:
            if len(self._remembered) >= _REMEMBERED:
                self._remembered.clear()
            self._remembered[place] = self.skeleton(keyed, history)
        return self._remembered[place]

    def _fitting(
        self,
        texts: Sequence[str],
        completions: Sequence[str],
        keyed: Sequence[bool],
        histories: Sequence[History],
    ) -> tuple[list[str], list[list[int]]]:
        """Cut the texts of rows that are too long, but only as far as a prompt is cut; tokenize the whole rows."""
        prompts = self._prompts(texts, keyed, histories)
        answers = self._answers(completions, keyed, histories)
        # Not judged by bytes: where a tokenizer normalises, a text may have more tokens than bytes.
        whole = self.tokenize([*map("".join, zip(prompts, answers, strict=True))])
        long = [row for row, ids in enumerate(whole) if len(ids) > self.format.max_length]
        fitting = list(texts)
        for row, prompt in zip(long, self.tokenize([prompts[row] for row in long]), strict=True):
            room = max(self.limit, self.format.max_length - (len(whole[row]) - len(prompt)))
            if len(prompt) > room:
                fitting[row] = self._shorten(texts[row], keyed[row], histories[row], room)
                shorter = self._prompts([fitting[row]], [keyed[row]], [histories[row]])[0]
                whole[row] = self.tokenize([shorter + answers[row]])[0]
        return fitting, whole

    def _shorten(self, text: str, keyed: bool, history: History, limit: int) -> str:
        """Cut the end of a text until the prompt fits."""
        text = longest_start(text, lambda start: len(self._prompt_ids([start], keyed, [history])[0]) <= limit)
        if not text and len(self._prompt_ids([""], keyed, [history])[0]) > limit:
            raise ValueError(
                f"The earlier turns of a conversation alone take more than the {limit} tokens that `max_length` "
                f"{self.format.max_length} leaves for a prompt. Raise it, or leave out such rows."
            )
        return text


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the common prefix; nearly always all of `second`."""
    if list(first[: len(second)]) == list(second):
        return len(second)
    return next(place for place, token in enumerate(second) if list(first[place : place + 1]) != [token])
