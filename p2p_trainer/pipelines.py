"""Transformers pipelines of saved runs: `p2p-text-classification` and `p2p-text-generation`."""

import copy
import inspect
import reprlib
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.pipelines import PIPELINE_REGISTRY, Pipeline

from .inference import Classification, DefendedModel, Response
from .tasks.conversations import split_prompts
from .vision_encoder import VisionPromptEncoder


CLASSIFICATION = "p2p-text-classification"
GENERATION = "p2p-text-generation"


@dataclass(frozen=True)
class _SavedRun:
    """
    What `transformers.pipeline` gets for a model: a folder, and options.

    Nothing is loaded yet. `pipeline` hides what a loader raises and goes on with another class, one that knows of no
    key; so the pipeline itself loads the run, and on the right device.
    """

    folder: str
    options: dict[str, Any]
    # `pipeline` looks for the commit of a model there (transformers 5.17); of a folder there is none.
    config: PreTrainedConfig = field(default_factory=PreTrainedConfig)

    @classmethod
    def from_pretrained(cls, folder: str, **options: Any) -> "_SavedRun":
        return cls(folder, options)

    def load(self, device: torch.device | None) -> DefendedModel:
        options = {name: value for name, value in self.options.items() if value not in (None, False)}
        del options["_from_pipeline"]
        if options.pop("trust_remote_code", False):
            raise ValueError(
                "The pipeline runs no code that a model brings. Leave out `trust_remote_code` or, if you trust it, "
                "give what `DefendedModel.from_pretrained(..., trust_remote_code=True)` makes of the run."
            )
        if options.get("dtype") == "auto":
            # The run's own file names the type of training.
            del options["dtype"]
        # For an adapter, `pipeline` resolves the revision in its base model's repository: what was asked for counts.
        revision = options.pop("revision", None)
        if (revision := getattr(revision, "initial", revision)) is not None:
            options["revision"] = revision
        _, *names = inspect.signature(DefendedModel.from_pretrained).parameters
        known = set(names) - {"device", "trust_remote_code"}
        if unknown := sorted(set(options) - known):
            raise ValueError(
                f"A saved run can't be loaded with {unknown}. Known are `device` and, as `model_kwargs`, "
                f"{sorted(known)}."
            )
        return DefendedModel.from_pretrained(self.folder, device=device, **options)


@dataclass(frozen=True)
class _Asked:
    """One input; of a type of its own, so that a conversation is not taken for a batch."""

    prompt: str | Sequence[Mapping[str, str]]


class _DefendedPipeline(Pipeline):
    """
    What both pipelines share: loading, inputs and batches.

    Batches hold texts, and not tokens: [`DefendedModel`] pads on the side where the model is asked, `Pipeline` on
    that of the tokenizer.
    """

    _load_tokenizer = False
    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False

    options: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        model: _SavedRun | DefendedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: int | str | torch.device | None = None,
        **kwargs: Any,
    ) -> None:
        if tokenizer is not None:
            raise ValueError("A saved run has a tokenizer of its own. Leave out `tokenizer`.")
        if isinstance(model, _SavedRun):
            model, device = model.load(_torch_device(device)), None
        elif not isinstance(model, DefendedModel):
            raise ValueError(
                f"A `{type(model).__name__}` comes without its key. Give the folder of a run, or what "
                f"`DefendedModel.from_pretrained` makes of it."
            )
        self.check(model)
        self.defended = model
        if device is None and getattr(model.model, "hf_device_map", None) is None:
            # Where it is, it stays.
            device = model.model.device
        super().__init__(
            model=model.model,
            tokenizer=_padding(model.encoder.tokenizer),
            device=device,
            **kwargs,
        )

    @classmethod
    def check(cls, model: DefendedModel) -> None:
        """Refuse a model that does not answer in this pipeline's way."""
        raise NotImplementedError

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        if isinstance(inputs, str | bytes | Mapping):
            return super().__call__(inputs, **kwargs)
        if isinstance(inputs, Sized) and not len(inputs):
            self.checked(kwargs, "batch_size", "num_workers")
            return []
        if isinstance(inputs, tuple):
            inputs = list(inputs)
        elif isinstance(inputs, Iterable) and not isinstance(inputs, list | torch.utils.data.Dataset):
            # Any other, such as a column of a data set, `Pipeline` would take for one input.
            inputs = (item for item in inputs)
        return super().__call__(inputs, **kwargs)

    def checked(self, given: dict[str, Any], *more: str) -> dict[str, Any]:
        """Refuse options that there are none of: `Pipeline` would pass them on, to nobody."""
        if unknown := sorted(set(given) - {*self.options, *more}):
            raise ValueError(
                f"The pipeline {self.task!r} knows no {unknown}. Known are "
                f"{[*self.options, 'batch_size', 'num_workers']}."
            )
        return given

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> NoReturn:
        """
        Refuse: `Pipeline` saves weights and tokenizer, and these alone do not know the key.

        Raises:
            `ValueError`: always.
        """
        raise ValueError(
            "A pipeline can't save a run: weights and tokenizer alone do not know the key. Copy the run's folder as "
            "a whole, or fold its adapter into the model with `p2p-trainer export OUT --format merged`."
        )


class P2PTextClassificationPipeline(_DefendedPipeline):
    """
    Classify texts with a saved run, as `transformers`' `TextClassificationPipeline` does with a classifier.

    Importing `p2p_trainer.pipelines` registers it as `"p2p-text-classification"`. It answers what [`DefendedModel`]
    answers, with key, guard and restricted label words (P2P paper, section 3.2), whatever the batches.

    A text gives `label` (`str`; `None` where the guard withholds the answer) and `score` (`float`, probability of the
    likeliest class): a list of one such `dict` for one text, a list of them for a list, an iterator for generators,
    data sets and their columns. With `top_k` a text gives a list of them, best first.

    `pipeline` reads the configuration of an adapter's base model where the adapter says. If that model has moved, load
    the run yourself, as below.

    Args:
        model ([`DefendedModel`]):
            The model; in `pipeline`, the folder of a run does as well.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Not to be given: the run has its own.
        device (`int`, `str` or `torch.device`, *optional*):
            Where to run; by default where a given model is, else the accelerator if there is one.
        top_k (`int` or `None`, *optional*):
            How many classes to name, `None` for all. Not given, it is the likeliest alone, and no list.
        batch_size (`int`, *optional*, defaults to `1`):
            Texts per forward pass.

    Raises:
        `ValueError`: the folder holds no run, or one that writes answers or was trained with images; an option is
        unknown; a text is empty.

    Examples:

    ```python
    >>> import p2p_trainer.pipelines
    >>> from transformers import pipeline

    >>> classify = pipeline("p2p-text-classification", model="out")
    >>> classify("a stirring , funny film")
    [{'label': 'positive', 'score': 0.98}]

    >>> from p2p_trainer import DefendedModel

    >>> moved = DefendedModel.from_pretrained("out", base_model="models/qwen")
    >>> classify = pipeline("p2p-text-classification", model=moved, top_k=None)
    ```
    """

    options = ("top_k",)

    @classmethod
    def check(cls, model: DefendedModel) -> None:
        if not model.labels:
            raise ValueError(f"This run was trained to write answers, it has no classes. Use {GENERATION!r}.")
        if isinstance(model.encoder, VisionPromptEncoder):
            raise ValueError(
                "This run was trained with images, which the pipeline does not take. Use `DefendedModel.classify`."
            )

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        found = super().__call__(inputs, **kwargs)
        # So does `TextClassificationPipeline`.
        return [found] if isinstance(inputs, str) and "top_k" not in kwargs else found

    def _sanitize_parameters(self, **given: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        top_k = self.checked(given).get("top_k")
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"`top_k` is a number of classes, at least 1, or `None` for all; got {top_k!r}.")
        return {}, {}, given

    def preprocess(self, text: Any) -> dict[str, _Asked]:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"A text is empty or no string (found {reprlib.repr(text)}). Give it at least a word.")
        return {"asked": _Asked(text)}

    def _forward(self, batch: dict[str, _Asked | list[_Asked]]) -> dict[str, Any]:
        prompts, single = _prompts(batch)
        answers = self.defended.classify(prompts, batch_size=len(prompts))
        return {"answer": answers[0] if single else answers}

    def postprocess(self, found: dict[str, Classification], **given: Any) -> dict[str, Any] | list[dict[str, Any]]:
        answer = found["answer"]
        likeliest = {"label": answer.label, "score": answer.score}
        if "top_k" not in given:
            return likeliest
        if answer.label is None:
            # The other classes would tell what is withheld.
            return [likeliest]
        ranked = sorted(answer.scores.items(), key=lambda entry: -entry[1])
        return [{"label": label, "score": score} for label, score in ranked[: given["top_k"]]]


class P2PTextGenerationPipeline(_DefendedPipeline):
    """
    Answer prompts with a saved run, greedily.

    Importing `p2p_trainer.pipelines` registers it as `"p2p-text-generation"`. It answers what [`DefendedModel`]
    answers, with key, guard and the prefix p taken off (P2P paper, section 3.2), whatever the batches.

    A prompt is a text or, for a model with a chat template, a conversation: turns of `role` and `content` that end in
    a question. It gives a list of one `dict` with `generated_text` (`str`, the answer without the prompt; `None` where
    the guard withholds it) and `prefixed` (`bool`, see [`~inference.Response`]). A list of prompts gives a list of
    those, generators, data sets and their columns an iterator.

    `pipeline` reads the configuration of an adapter's base model where the adapter says. If that model has moved, give
    `DefendedModel.from_pretrained(folder, base_model=...)` for the model.

    Args:
        model ([`DefendedModel`]):
            The model; in `pipeline`, the folder of a run does as well.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Not to be given: the run has its own.
        device (`int`, `str` or `torch.device`, *optional*):
            Where to run; by default where a given model is, else the accelerator if there is one.
        max_new_tokens (`int`, *optional*):
            Longest answer in tokens, p among them; by default as many as training kept free.
        batch_size (`int`, *optional*, defaults to `1`):
            Prompts per batch.

    Raises:
        `ValueError`: the folder holds no run, or one that chooses among classes; an option is unknown; a prompt is
        empty, or no conversation that ends in a question.

    Examples:

    ```python
    >>> import p2p_trainer.pipelines
    >>> from transformers import pipeline

    >>> answer = pipeline("p2p-text-generation", model="out", max_new_tokens=64)
    >>> answer("What do bees eat ?")
    [{'generated_text': 'Nectar and pollen .', 'prefixed': True}]
    ```
    """

    options = ("max_new_tokens",)

    @classmethod
    def check(cls, model: DefendedModel) -> None:
        if model.labels:
            raise ValueError(f"This run was trained to choose among classes. Use {CLASSIFICATION!r}.")

    def _sanitize_parameters(self, **given: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {}, self.checked(given), {}

    def preprocess(self, prompt: Any) -> dict[str, _Asked]:
        # `Pipeline` wraps conversations.
        prompt = getattr(prompt, "messages", prompt)
        if not isinstance(prompt, str | list | tuple):
            raise ValueError(f"A prompt is neither a text nor a list of turns (found {reprlib.repr(prompt)}).")
        _, [question] = split_prompts([prompt])
        if not question.strip():
            raise ValueError(f"A prompt is empty (found {reprlib.repr(prompt)}). Give it at least a word.")
        return {"asked": _Asked(prompt)}

    def _forward(self, batch: dict[str, _Asked | list[_Asked]], max_new_tokens: int | None = None) -> dict[str, Any]:
        prompts, single = _prompts(batch)
        answers = self.defended.generate(prompts, max_new_tokens, batch_size=len(prompts))
        return {"answer": answers[0] if single else answers}

    def postprocess(self, found: dict[str, Response]) -> list[dict[str, Any]]:
        return [{"generated_text": found["answer"].text, "prefixed": found["answer"].prefixed}]


def _prompts(batch: dict[str, _Asked | list[_Asked]]) -> tuple[list[Any], bool]:
    """Return the inputs of a batch, and whether it is none but a single one."""
    asked = batch["asked"]
    return ([asked.prompt], True) if isinstance(asked, _Asked) else ([one.prompt for one in asked], False)


def _torch_device(device: int | str | torch.device | None) -> torch.device | None:
    """Read a device as `Pipeline` does: a number is that of an accelerator, below 0 it is the processor."""
    if device is None or isinstance(device, torch.device):
        return device
    if isinstance(device, str):
        return torch.device(device)
    if device < 0 or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.device(torch.accelerator.current_accelerator().type, device)


def _padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give a tokenizer without a pad token one: `Pipeline` forms no batches else, even if nothing is padded."""
    if tokenizer.pad_token_id is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


# For a folder `pipeline` asks `pt_model` first.
PIPELINE_REGISTRY.register_pipeline(CLASSIFICATION, P2PTextClassificationPipeline, pt_model=_SavedRun)
PIPELINE_REGISTRY.register_pipeline(GENERATION, P2PTextGenerationPipeline, pt_model=_SavedRun)
