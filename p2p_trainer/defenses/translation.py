"""Machine translation for back-translation, and the two looks of a text: joined and cased, or set apart and small."""

import copy
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from ..helper_models import missing_model


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_INSTALL = "Install what its tokenizer needs: `pip install 'p2p_trainer[translate]'`."

_SPACED_MARK = re.compile(r"\s[,.!?;:](?:\s|$)")
_JOINED_MARK = re.compile(r"\w[,.!?;:](?:\s|$)")

_JOINS = (
    (re.compile(r"``[ \t]*"), '"'),
    (re.compile(r"[ \t]*''"), '"'),
    (re.compile(r"-lrb-", re.IGNORECASE), "("),
    (re.compile(r"-rrb-", re.IGNORECASE), ")"),
    (re.compile(r"[ \t]+(n't|'(?:s|re|ve|ll|d|m))\b", re.IGNORECASE), r"\1"),
    (re.compile(r"[ \t]+([,.!?;:%]+)(?=[\s\"')]|$)"), r"\1"),
    (re.compile(r"\([ \t]+"), "("),
    (re.compile(r"[ \t]+\)"), ")"),
    (re.compile(r"\$[ \t]+(?=\d)"), "$"),
    (re.compile(r'(^|[ \t])"[ \t]+([^"]*?)[ \t]*"(?=[\s,.!?;:]|$)'), r'\1"\2"'),
)
_SENTENCE_START = re.compile(r"(^\W*|(?<!\.)[.!?][\"')]*[ \t]+[\"'(]*)([^\W\d_])")
_I = re.compile(r"\bi\b(?!\.)")

_CURLY = str.maketrans({"“": '"', "”": '"', "„": '"', "«": '"', "»": '"', "’": "'", "‘": "'", "…": "..."})
_SPLITS = (
    (re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))\b", re.IGNORECASE), r" \1"),
    (re.compile(r"(\.{3}|[!?]+|[,;:](?=[\s\"')]|$))"), r" \1 "),
    # A point that ends a sentence: no `Mr.`, no `J.`, not the last of three.
    (
        re.compile(
            r"(?<![. ])(?<!\b[Mm]r)(?<!\b[Mm]s)(?<!\b[Dd]r)(?<!\b[Ss]t)(?<!\b[Mm]rs)(?<!\b[A-Z])\."
            r"(?=[\"')]*(?:\s+[\"'(]*[A-Z]|\s*$))"
        ),
        " . ",
    ),
    (re.compile(r'(["()])'), r" \1 "),
)  # fmt: skip
_QUOTED = re.compile(r'" ([^"]*) "')


def is_tokenised(text: str) -> bool:
    """
    Say whether a text has its punctuation set apart by spaces, as SST-2 has.

    Args:
        text (`str`):
            A text.

    Returns:
        `bool`: whether it has; where it has none at all, whether it is all lower case.
    """
    return _SPACED_MARK.search(text) is not None or (text.islower() and not _JOINED_MARK.search(text))


def detokenise(text: str) -> str:
    """
    Put a space-tokenised text into the shape that people write and translation models read; by rule, line by line.

    Marks, contractions, brackets and paired quotes are joined to their words. A text without any capital gets them at
    the start of sentences and for `i`; names stay small. Any other text is returned as it is.

    Args:
        text (`str`):
            A text.

    Returns:
        `str`: the text.
    """
    if not is_tokenised(text):
        return text
    lines = text.split("\n")
    for pattern, new in _JOINS:
        lines = [pattern.sub(new, line) for line in lines]
    if text.islower():
        lines = [_SENTENCE_START.sub(lambda found: found[1] + found[2].upper(), line) for line in lines]
        lines = [_I.sub("I", line) for line in lines]
    return "\n".join(lines)


def restyle(text: str, like: str) -> str:
    """
    Put a text into the look of another: set apart if that one is, lower case if that one is; else it stays.

    Args:
        text (`str`):
            A text as people write it.
        like (`str`):
            The text whose look is wanted.

    Returns:
        `str`: the text.
    """
    if is_tokenised(like):
        text = "\n".join(_tokenise(line) for line in text.split("\n"))
        if "``" in like:
            text = _QUOTED.sub(r"`` \1 ''", text)
        if "-lrb-" in like.lower():
            text = text.replace("(", "-lrb-").replace(")", "-rrb-")
    return text.lower() if like.islower() else text


def _tokenise(line: str) -> str:
    line = line.translate(_CURLY)
    for pattern, new in _SPLITS:
        line = pattern.sub(new, line)
    return " ".join(line.split())


class MarianTranslator:
    """
    Translates lines in one direction with a MarianMT model: beam search, no sampling.

    Lines are sorted by length and padded behind a mask, so the batch size changes results by no more than rounding
    does; weights are read as float32 for the same reason. Except for the beams and the length, the model's own
    generation settings hold (its banned tokens, say).

    Args:
        model (`str`):
            Folder or hub id of an encoder-decoder translation model with safetensors weights.
        num_beams (`int`):
            Beams.
        max_new_tokens (`int`):
            Longest translation, in tokens; what does not end before has no translation.
        batch_size (`int`):
            Lines per forward pass.
    """

    def __init__(self, model: str, num_beams: int, max_new_tokens: int, batch_size: int) -> None:
        self.model = model
        self.num_beams = num_beams
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def check(self) -> None:
        """
        Look whether the model is there, without reading its weights.

        Raises:
            `ValueError`: it is not, is no translation model, lacks safetensors weights or what its tokenizer needs.
        """
        from transformers import AutoConfig, AutoTokenizer

        try:
            config = AutoConfig.from_pretrained(self.model)
            AutoTokenizer.from_pretrained(self.model)
        except Exception as error:  # a missing folder, library and network end in one message each, with the remedy
            raise self._error(error) from error
        if not config.is_encoder_decoder:
            raise ValueError(
                f"The translation model {self.model!r} is of the type {config.model_type!r}, which does not "
                f"translate. Name a MarianMT model, such as Helsinki-NLP/opus-mt-en-de."
            )
        folder = Path(self.model)
        if folder.is_dir() and not any(folder.glob("*.safetensors")):
            raise ValueError(
                f"The translation model {self.model!r} holds no *.safetensors file, and no others are read: they can "
                f"run code. If you trust it, convert it once with `MarianMTModel.from_pretrained(...)"
                f".save_pretrained(...)`."
            )

    def translate(self, lines: Sequence[str]) -> list[tuple[str | None, int]]:
        """
        Translate lines.

        Args:
            lines (`Sequence[str]`):
                Lines, none of them empty.

        Returns:
            `list[tuple[str | None, int]]`: for each its translation, `None` if the line is too long for the model or
            its translation did not end, and what it cost in passes: one for the encoder, and one for each beam and
            token of the translation. Padding and what a batch waits for its longest line are not counted.
        """
        found: list[tuple[str | None, int]] = [(None, 0)] * len(lines)
        if not lines:
            return found
        if self._loaded is None:
            self._loaded = self._load()
        model, tokenizer = self._loaded
        ids = [tokenizer(line)["input_ids"] for line in lines]
        room = getattr(model.config, "max_position_embeddings", None) or max(map(len, ids)) + self.max_new_tokens
        fitting = [row for row in range(len(lines)) if len(ids[row]) <= room]
        fitting.sort(key=lambda row: (len(ids[row]), lines[row]))
        starts = range(0, len(fitting), self.batch_size)
        for start in tqdm(starts, desc="translating", disable=None, leave=False):
            rows = fitting[start : start + self.batch_size]
            outputs = self._generate([ids[row] for row in rows], min(self.max_new_tokens, room))
            for row, output in zip(rows, outputs, strict=True):
                found[row] = output
        return found

    def release(self) -> None:
        """Give back the memory of the model; it is loaded again when needed."""
        self._loaded = None

    def _generate(self, sources: Sequence[Sequence[int]], limit: int) -> list[tuple[str | None, int]]:
        import torch

        model, tokenizer = self._loaded
        settings = copy.deepcopy(model.generation_config)
        settings.update(
            do_sample=False, num_beams=self.num_beams, num_return_sequences=1, max_length=None, max_new_tokens=limit
        )
        width = max(map(len, sources))
        ids = torch.tensor([[*source, *[settings.pad_token_id] * (width - len(source))] for source in sources])
        mask = torch.tensor([[1] * len(source) + [0] * (width - len(source)) for source in sources])
        # Serving may ask within the autocast of the task's model.
        with torch.inference_mode(), torch.autocast(model.device.type, enabled=False):
            output = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
            )
        ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
        # The first token only starts the decoder.
        return [self._finish(tokenizer, tokens[1:], ends, limit) for tokens in output.tolist()]

    def _finish(
        self, tokenizer: "PreTrainedTokenizerBase", tokens: list[int], ends: list[int], limit: int
    ) -> tuple[str | None, int]:
        steps = next((place + 1 for place, token in enumerate(tokens) if token in ends), limit)
        passes = 1 + self.num_beams * steps
        # Marian's settings force an end at the limit, so an end there is no sign of a whole translation.
        if steps >= limit:
            return None, passes
        text = tokenizer.decode(tokens[:steps], skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        return text or None, passes

    def _load(self) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        import torch
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.model)
            model = AutoModelForSeq2SeqLM.from_pretrained(self.model, dtype=torch.float32, use_safetensors=True)
        except Exception as error:  # as in `check`
            raise self._error(error) from error
        return model.to(accelerator or "cpu").eval(), tokenizer

    def _error(self, error: Exception) -> ValueError:
        if isinstance(error, ImportError) and importlib.util.find_spec("sentencepiece") is None:
            return ValueError(f"The translation model {self.model!r} needs the package `sentencepiece`. {_INSTALL}")
        return missing_model(
            "translation model",
            self.model,
            error,
            "Name the folder of a MarianMT model with the options `to` and `back` in `engine_options`, or use the "
            "engine 'precomputed' with translations made elsewhere.",
        )
