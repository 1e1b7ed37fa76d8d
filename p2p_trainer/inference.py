"""A saved run, ready to answer: adds the key, maps the answer back."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from .attacks import Attack
from .data_collator import Encoder
from .decoding import Sampling
from .defenses import load_defense
from .evaluation import BackdoorEvaluator, Guard, LabelScorer, ResponseEvaluator
from .evaluation.generation import generate
from .evaluation.vision_scorer import VisionLabelScorer
from .prompt_encoder import PromptEncoder
from .response_encoder import ResponseEncoder
from .saved_run import Classification, Response, load_run
from .streaming import stream_answer
from .tasks import Task
from .tasks.conversations import split_prompts
from .tasks.images import RowImages
from .vision_encoder import VisionPromptEncoder


class DefendedModel:
    """
    A fine-tuned model with the prompt format that it was trained with.

    Whoever calls it never sees the key: texts go in, labels or answers come out. Only the label words of the
    deployment are compared (P2P paper, section 3.2), so every answer of a classification task is a class; from written
    answers the prefix p is taken off. What another defense does to texts and answers is done here as well; one that
    withholds answers gives `None`.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The weights.
        encoder ([`~prompt_encoder.PromptEncoder`] or [`~response_encoder.ResponseEncoder`]):
            Prompt format and tokenizer.
        labels (`Sequence[str]`):
            Class names; none on a generation task.
        keyed (`bool`, *optional*, defaults to `True`):
            Whether the key is added; `False` for a model that was trained without defense.
        autocast (`torch.dtype`, *optional*):
            Type that matrix products run in, as in training.
        guard ([`~evaluation.Guard`], *optional*):
            What another defense does to texts and answers.

    Examples:

    ```python
    >>> from p2p_trainer import DefendedModel

    >>> model = DefendedModel.from_pretrained("out")
    >>> model.classify(["a stirring , funny film"])[0].label
    'positive'
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        encoder: Encoder,
        labels: Sequence[str],
        keyed: bool = True,
        autocast: torch.dtype | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.model = model
        self.encoder = encoder
        self.labels = tuple(labels)
        self.keyed = keyed
        self.guard = guard
        self._autocast = autocast

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        quantization: str | BitsAndBytesConfig | None = None,
        base_model: str | None = None,
        defense: str | None = None,
        defense_options: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> "DefendedModel":
        """
        Load a saved run: an adapter on its base model, or a whole model.

        Only safetensors are read, and no code from the folder runs.

        Args:
            name_or_path (`str` or `Path`):
                Output folder or checkpoint of a [`P2PTrainer`] run, or its hub id.
            device (`str` or `torch.device`, *optional*):
                Where to run. By default the accelerator if there is one.
            dtype (`torch.dtype` or `str`, *optional*):
                Type of the weights, by default that of training. Matrix products run in the type that training used.
            quantization (`str` or `BitsAndBytesConfig`, *optional*):
                How bitsandbytes holds the base model: `"4bit"`, `"8bit"`, `"none"` or settings of your own. By default
                as in training, which is what the adapter was learnt on.
            base_model (`str`, *optional*):
                Base model of an adapter, if it is no longer where the adapter says.
            defense (`str`, *optional*):
                Import path `package.module:Class` of the run's defense, if it is not this package's: no code is run
                that only the folder names.
            defense_options (`dict[str, Any]`, *optional*):
                Options of the run's defense that have changed, such as where its language model is by now.
            trust_remote_code (`bool`, *optional*, defaults to `False`):
                Whether base model, tokenizer and run may bring code, as some architectures do. It runs as you.
            revision (`str`, *optional*):
                Branch, tag or commit of a hub id.

        Returns:
            [`DefendedModel`]: the model.

        Raises:
            `ValueError`: this is no run, or one that this version can't read, its weights do not fit, or its base
                model is gone.
        """
        run = load_run(name_or_path, device, dtype, quantization, base_model, trust_remote_code, revision)
        defended = cls(run.model, run.encoder, run.labels, run.keyed, run.autocast)
        guard = load_defense(run.folder, defense, **(defense_options or {}))
        if guard is not None:
            # What it needs, a language model say, may have moved.
            guard.check(Task(name="saved", labels=run.labels))
            with defended.autocast():
                guard.attach(run.model, run.encoder)
            defended.guard = guard
        return defended

    @property
    def config(self) -> PreTrainedConfig:
        """`PreTrainedConfig`: of the model; `transformers.pipeline` asks for it."""
        return self.model.config

    def classify(
        self,
        texts: str | Sequence[str],
        batch_size: int = 32,
        progress: bool = False,
        images: Sequence[str | Path | PIL.Image.Image] | None = None,
    ) -> list[Classification]:
        """
        Classify texts.

        Args:
            texts (`str` or `Sequence[str]`):
                Any number of texts; long ones are cut at their end, the key never is.
            batch_size (`int`, *optional*, defaults to `32`):
                Texts per forward pass.
            progress (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar.
            images (`Sequence[str | Path | PIL.Image.Image]`, *optional*):
                For a model that was trained with images: one per text, or its file.

        Returns:
            `list[Classification]`: one answer per text.
        """
        if not isinstance(self.encoder, PromptEncoder):
            raise ValueError("This model was trained to write answers, it has no classes. Use `generate`.")
        texts = _checked(texts)
        if not texts:
            return []
        guard = self.guard or Guard()
        beside = self._beside(texts, images)
        if beside:
            scorer = VisionLabelScorer(self.encoder, self.keyed, beside[1], batch_size)
        else:
            scorer = LabelScorer(self.encoder.answers[self.keyed], self.encoder.pad_token_id, batch_size)
        with self.autocast():
            read = self.encoder.encode_prompts(guard.inputs(texts), self.keyed, *beside)
            scores = guard.decode(scorer.score(self.model, read, "classifying" if progress else None))
            withheld = _withheld(guard, texts)
        shares = scores.probabilities(self.keyed)
        return [
            Classification(
                label=None if silent else self.labels[index],
                index=-1 if silent else index,
                score=float(row[index]),
                scores={label: float(share) for label, share in zip(self.labels, row, strict=True)},
            )
            for row, index, silent in zip(shares, shares.argmax(axis=1).tolist(), withheld, strict=True)
        ]

    def _beside(
        self, texts: Sequence[str], images: Sequence[str | Path | PIL.Image.Image] | None
    ) -> tuple[()] | tuple[range, RowImages]:
        if isinstance(self.encoder, VisionPromptEncoder) != (images is not None):
            if images is None:
                raise ValueError("This model was trained with images. Give one per text (`images`).")
            raise ValueError("This model was trained on texts alone. Leave out `images`.")
        if images is None:
            return ()
        if len(images) != len(texts):
            raise ValueError(f"There are {len(texts)} texts and {len(images)} images. Give one image per text.")
        stored = [
            image if isinstance(image, PIL.Image.Image) else {"path": str(image), "bytes": None} for image in images
        ]
        return range(len(texts)), RowImages(stored, "given")

    def generate(
        self,
        prompts: str | Sequence[Mapping[str, str]] | Sequence[str | Sequence[Mapping[str, str]]],
        max_new_tokens: int | None = None,
        batch_size: int = 16,
        progress: bool = False,
    ) -> list[Response]:
        """
        Answer prompts, greedily. A guard sees the last question of a conversation, and not its earlier turns.

        Args:
            prompts (`str`, `Sequence[Mapping[str, str]]` or `Sequence[str or Sequence[Mapping[str, str]]]`):
                One or more prompts, each a text or, for a model with a chat template, a conversation: turns of `role`
                and `content` that end in a question. Long ones lose the end of their question, never the key.
            max_new_tokens (`int`, *optional*):
                Longest answer in tokens, p among them; by default as many as training kept free.
            batch_size (`int`, *optional*, defaults to `16`):
                Prompts per batch.
            progress (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar.

        Returns:
            `list[Response]`: one answer per prompt; what is withheld is not written at all.

        Raises:
            `ValueError`: a prompt is none, or has too long a history; the message names its row.
        """
        prepared = self.prepare(prompts)
        asked = [row for row, ids in enumerate(prepared) if ids is not None]
        longest = self.encoder.format.max_new_tokens if max_new_tokens is None else max_new_tokens
        with self.autocast():
            written = generate(
                self.model, self.encoder.tokenizer, [prepared[row] for row in asked], longest, batch_size,
                "answering" if progress else None, self._autocast, self.encoder.end_tokens,
            )  # fmt: skip
        answers = {row: self.encoder.read(answer, self.keyed) for row, answer in zip(asked, written, strict=True)}
        return [Response(*answers.get(row, (None, True))) for row in range(len(prepared))]

    def stream(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[Response]:
        """
        Answer one prompt piece by piece. Closing the iterator ends the answer.

        Args:
            prompt (`str` or `Sequence[Mapping[str, str]]`):
                A text, or a conversation, as for [`generate`].
            max_new_tokens (`int`, *optional*):
                Longest answer in tokens, p among them; by default as many as training kept free.
            temperature (`float`, *optional*, defaults to `0.0`):
                0 takes the likeliest token, which is how the model was measured.
            top_p (`float`, *optional*, defaults to `1.0`):
                Of the likeliest tokens, as many are drawn from as make up this share of the probability.
            seed (`int`, *optional*, defaults to `0`):
                What draws depend on.

        Returns:
            `Iterator[Response]`: pieces of the answer, in their order; `prefixed` is known by the first. One with the
            text `None` if the answer is withheld.

        Raises:
            `ValueError`: the prompt can't be asked, or a setting is outside its range.
        """
        prepared = self.prepare(prompt)
        if len(prepared) != 1:
            raise ValueError(f"One answer is written piece by piece at a time, got {len(prepared)} prompts.")
        longest = self.encoder.format.max_new_tokens if max_new_tokens is None else max_new_tokens
        sampling = Sampling(longest, temperature, top_p, seed)
        return self._stream(prepared[0], sampling)

    def _stream(self, ids: list[int] | None, sampling: Sampling) -> Iterator[Response]:
        if ids is None:
            yield Response(None, True)
            return
        for text, prefixed in stream_answer(self.model, self.encoder, ids, sampling, self.keyed, self._autocast):
            yield Response(text, prefixed)

    def prepare(
        self, prompts: str | Sequence[Mapping[str, str]] | Sequence[str | Sequence[Mapping[str, str]]]
    ) -> list[list[int] | None]:
        """
        Render prompts as the model reads them: with the key, as a guard rewrites them, and cut.

        Args:
            prompts (`str`, `Sequence[Mapping[str, str]]` or `Sequence[str or Sequence[Mapping[str, str]]]`):
                As for [`generate`].

        Returns:
            `list[list[int] | None]`: token ids of each prompt, `None` where a guard withholds the answer.

        Raises:
            `ValueError`: the model writes no answers, a prompt is none, or has too long a history; the message names
            its row, and never holds the key.
        """
        if not isinstance(self.encoder, ResponseEncoder):
            raise ValueError("This model was trained to choose among classes. Use `classify`.")
        histories, texts = split_prompts(prompts)
        if not _checked(texts):
            return []
        guard = self.guard or Guard()
        with self.autocast():
            asked = [row for row, quiet in enumerate(_withheld(guard, texts)) if not quiet]
            inputs = guard.inputs([texts[row] for row in asked]) if asked else []
        ids = {row: self._ids(row, text, histories[row]) for row, text in zip(asked, inputs, strict=True)}
        return [ids.get(row) for row in range(len(texts))]

    def _ids(self, row: int, text: str, history: Sequence[Mapping[str, str]]) -> list[int]:
        try:
            return self.encoder.encode_prompts([text], self.keyed, [history])[0]
        except ValueError as error:
            remedy = "Of a saved model, leave out the oldest turns, or ask the last question alone."
            raise ValueError(f"Prompt {row} can't be asked: {error} {remedy}") from error

    def evaluator(
        self,
        dataset: Dataset,
        task: Task,
        attacks: Sequence[Attack] = (),
        asr_rule: str = "restricted",
        batch_size: int = 32,
        progress: bool = False,
    ) -> BackdoorEvaluator | ResponseEvaluator:
        """
        Set up a measurement of this model, key and guard included.

        Args:
            dataset (`Dataset`):
                Clean test rows.
            task ([`~tasks.Task`]):
                The task that they are rows of.
            attacks (`Sequence[Attack]`, *optional*):
                Attacks to measure.
            asr_rule (`str`, *optional*, defaults to `"restricted"`):
                Rule of the headline numbers, on a classification task.
            batch_size (`int`, *optional*, defaults to `32`):
                Rows per batch.
            progress (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar.

        Returns:
            [`~evaluation.BackdoorEvaluator`] or [`~evaluation.ResponseEvaluator`]: to be asked about `self.model`,
            within `self.autocast()`.
        """
        common = {"keyed": self.keyed, "batch_size": batch_size, "progress": progress, "guard": self.guard}
        if isinstance(self.encoder, ResponseEncoder):
            return ResponseEvaluator(dataset, task, self.encoder, attacks, autocast=self._autocast, **common)
        return BackdoorEvaluator(dataset, task, self.encoder, attacks, asr_rule=asr_rule, **common)

    def autocast(self) -> contextlib.AbstractContextManager:
        """
        Return the context in which the model was trained and evaluated.

        Returns:
            `AbstractContextManager`: autocast to the training type, or nothing.
        """
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(next(self.model.parameters()).device.type, dtype=self._autocast)


def _withheld(guard: Guard, texts: Sequence[str]) -> list[bool]:
    withheld = guard.withheld(texts)
    return [False] * len(texts) if withheld is None else withheld.tolist()


def _checked(texts: str | Sequence[str]) -> list[str]:
    texts = [texts] if isinstance(texts, str) else list(texts)
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"Text {row} is empty or no string (found {text!r}). Give each text at least a word.")
    return texts
