"""Paraphrases by a language model, kept on disk."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from ..helper_models import load_causal_model
from .paraphrase import KnownTexts, ParaphraseEngine


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SYNTACTIC_PROMPT = (
    "Rewrite the sentence below so that it begins with a subordinate clause (one that starts with `when`, `if`, `as` "
    "or the like), then a comma, then the main clause. Keep its meaning, its language and every number. Answer with "
    "the rewritten sentence alone, on one line.\n\nSentence: {text}\nRewritten sentence:"
)

_REMEDY = (
    "Name the folder of a causal language model with the option `model`, or use the engine 'precomputed' or "
    "'template'."
)

# Batches from which on a bar is shown on a terminal, without being asked for.
_LONG = 4


class LLMParaphrases(ParaphraseEngine):
    """
    Has a causal language model rewrite each text, greedily.

    The prompt goes through the tokenizer's chat template if it has one. Of the answer the first line counts. Of a text
    with several lines the first is rewritten and the others are kept: on generation tasks they are the data that the
    instruction is about. A text that does not fit into the model's context has no paraphrase; a paraphrase that
    reaches `max_new_tokens` is cut there.

    Every answer is appended to a cache at once, so a run that was killed goes on where it was, and a model is loaded
    only for texts that are new. The cache is a JSONL file per model name, prompt and length, with the columns `text`
    and `paraphrase`: unless a kill tore a line, it can be handed on as a file of the engine `"precomputed"`. It does
    not see that other weights lie under the same name; remove it then.

    Whether a model's answers really have the wanted shape is not checked: look at some.

    Args:
        model (`str`):
            Folder or hub id of a causal language model, best one that follows instructions.
        prompt (`str`, *optional*):
            What the model is asked, with `{text}` in it. By default it asks for a subordinate clause at the front, the
            trigger of the syntactic attack.
        max_new_tokens (`int`, *optional*, defaults to `128`):
            Longest paraphrase, in tokens.
        batch_size (`int`, *optional*, defaults to `16`):
            Texts per forward pass. Changes results by no more than rounding does.
        cache (`str`, *optional*):
            Folder of the cache, by default `p2p_trainer/paraphrase` in `$XDG_CACHE_HOME` or `~/.cache`.
    """

    name = "llm"

    def __init__(
        self,
        model: str,
        prompt: str = SYNTACTIC_PROMPT,
        max_new_tokens: int = 128,
        batch_size: int = 16,
        cache: str | None = None,
    ) -> None:
        if "{text}" not in prompt:
            raise ValueError(f"`prompt` must hold {{text}}, where the text goes; got {prompt!r}.")
        for option, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{option}` is a number of at least 1, got {value!r}.")
        self.model = model
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.cache = cache
        self._answers: dict[str, str | None] | None = None
        self._known: KnownTexts | None = None
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def rewrite(self, texts: Sequence[str], progress: bool = False) -> list[str | None]:
        answers = self._cached()
        new = sorted({text for text in texts if text not in answers})
        if new:
            self._known = None
            for batch in self._generate(new, progress):
                self._append(batch)
                answers |= batch
        return [answers[text] for text in texts]

    def carries(self, text: str) -> bool:
        if self._known is None:
            self._known = KnownTexts(answer for answer in self._cached().values() if answer)
        return text in self._known

    def release(self) -> None:
        self._loaded = None

    @property
    def cache_file(self) -> Path:
        """`Path`: where the answers of this model, prompt and length are kept."""
        settings = json.dumps([self.model, self.prompt, self.max_new_tokens, "greedy, first line"])
        home = Path(self.cache or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "p2p_trainer", "paraphrase"))
        return home.expanduser() / f"{hashlib.sha256(settings.encode()).hexdigest()[:32]}.jsonl"

    def _cached(self) -> dict[str, str | None]:
        if self._answers is None:
            self._answers = {}
            lines = self.cache_file.read_bytes().split(b"\n") if self.cache_file.is_file() else []
            for line in lines:
                try:
                    entry = json.loads(line)
                    self._answers.setdefault(entry["text"], entry["paraphrase"])
                except (ValueError, KeyError, TypeError):
                    # A kill tears the line that was being written; its text is asked for again.
                    continue
        return self._answers

    def _append(self, answers: dict[str, str | None]) -> None:
        lines = "".join(
            json.dumps({"text": text, "paraphrase": answer}, ensure_ascii=False) + "\n"
            for text, answer in answers.items()
        )
        self.cache_file.parent.mkdir(parents=True, exist_ok=True)
        with self.cache_file.open("ab+", buffering=0) as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    lines = "\n" + lines
            # One write at the end of the file: processes that share it do not tear each other's lines.
            file.write(lines.encode())

    def _generate(self, texts: Sequence[str], progress: bool) -> Iterator[dict[str, str | None]]:
        """Yield the answers to one batch after the other."""
        if self._loaded is None:
            self._loaded = load_causal_model("paraphrase model", self.model, _REMEDY)
        model, tokenizer = self._loaded
        prompts = [self._encode(tokenizer, text) for text in texts]
        room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        longest = room - self.max_new_tokens if room else sys.maxsize
        order = sorted(range(len(texts)), key=lambda row: (len(prompts[row]), texts[row]))
        fitting = [row for row in order if len(prompts[row]) <= longest]
        if len(fitting) < len(order):
            yield {texts[row]: None for row in order[len(fitting) :]}
        starts = range(0, len(fitting), self.batch_size)
        shown = progress or (len(starts) >= _LONG and sys.stderr.isatty())
        for start in tqdm(starts, desc="paraphrasing", disable=not shown, leave=False):
            rows = fitting[start : start + self.batch_size]
            outputs = self._continue(model, tokenizer, [prompts[row] for row in rows])
            yield {texts[row]: _answer(texts[row], output) for row, output in zip(rows, outputs, strict=True)}

    def _encode(self, tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
        prompt = self.prompt.replace("{text}", text.strip().partition("\n")[0].strip())
        if not tokenizer.chat_template:
            return tokenizer(prompt)["input_ids"]
        # Models that think first would fill the answer's one line with it.
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return tokenizer(chat, add_special_tokens=False)["input_ids"]

    def _continue(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Sequence[int]]
    ) -> list[str]:
        import torch
        from transformers import GenerationConfig

        ends = model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        # Masked, so any token will do where the tokenizer has none for it.
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=self.max_new_tokens, eos_token_id=ends, pad_token_id=pad
        )
        # A model that is served around this one may run in another type.
        with torch.inference_mode(), torch.autocast(model.device.type, enabled=False):
            output = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
            )
        return tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)


def _answer(text: str, output: str) -> str | None:
    line = output.strip().partition("\n")[0].strip()
    kept = text.strip().partition("\n")[2]
    return (f"{line}\n{kept}" if kept else line) if line else None
