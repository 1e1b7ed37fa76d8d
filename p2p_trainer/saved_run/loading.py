"""Loads a saved run: weights, tokenizer and prompt format, and no code."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from peft import PeftModel
from transformers import AutoProcessor, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from .._compat import keep_weights_unpacked
from ..data_collator import Encoder
from ..prompt_encoder import PromptEncoder
from ..prompt_format import CONFIG_NAME, PromptFormat
from ..response_encoder import ResponseEncoder
from ..vision_encoder import VisionPromptEncoder
from .folder import find_run
from .quantization import choose_quantization
from .run_config import DTYPES, read_run
from .weights import load_weights


Found = TypeVar("Found")

# Seconds; a tokenizer of a quarter of a million words takes a few.
_PATIENCE = 120.0


@dataclass(frozen=True)
class SavedRun:
    """
    What a run's folder holds.

    Parameters:
        folder (`Path`):
            The folder.
        model (`PreTrainedModel` or `PeftModel`):
            The weights, in evaluation mode.
        encoder ([`~prompt_encoder.PromptEncoder`] or [`~response_encoder.ResponseEncoder`]):
            Prompt format and tokenizer.
        labels (`tuple[str, ...]`):
            Class names; none on a generation task.
        keyed (`bool`):
            Whether the key belongs to every input.
        autocast (`torch.dtype` or `None`):
            Type that matrix products ran in while training.
    """

    folder: Path
    model: PreTrainedModel | PeftModel
    encoder: Encoder
    labels: tuple[str, ...]
    keyed: bool
    autocast: torch.dtype | None


def load_run(
    name_or_path: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    quantization: str | BitsAndBytesConfig | None = None,
    base_model: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> SavedRun:
    """
    Load a saved run; the arguments are those of [`DefendedModel.from_pretrained`].

    Args:
        name_or_path (`str` or `Path`):
            Folder, or hub id.
        device (`str` or `torch.device`, *optional*):
            Where to run. By default the accelerator if there is one.
        dtype (`torch.dtype` or `str`, *optional*):
            Type of the weights, by default that of training.
        quantization (`str` or `BitsAndBytesConfig`, *optional*):
            How the weights of the base are held, by default as in training.
        base_model (`str`, *optional*):
            Base model of an adapter, if it has moved.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether models may bring code.
        revision (`str`, *optional*):
            Branch, tag or commit of a hub id.

    Returns:
        [`SavedRun`]: the run.

    Raises:
        `ValueError`: this is no run, one that this version can't read, or one whose parts do not fit.
    """
    folder = find_run(name_or_path, revision)
    config, prompt_format, labels = read_run(folder)
    images = config.get("images", False)
    encoder = load_encoder(folder, prompt_format, images, trust_remote_code)
    device = _device(device)
    autocast = DTYPES.get(config["autocast"])
    settings = choose_quantization(quantization, config.get("quantization"), autocast, str(folder / CONFIG_NAME))
    model = load_weights(
        folder, images, device, _dtype(dtype or config["dtype"]), settings, base_model, trust_remote_code
    )
    # As in training and its measurements.
    keep_weights_unpacked(model)
    rows = model.get_input_embeddings().weight.shape[0]
    if beyond := _unembedded(encoder, rows):
        raise ValueError(
            f"The tokenizer in {str(folder)!r} has tokens up to {max(beyond)}, and the model embeds {rows}: they do "
            f"not belong together. Name the base model of training with `base_model` (`--base_model MODEL`)."
        )
    return SavedRun(folder, model, encoder, labels, config["keyed"], autocast)


def _unembedded(encoder: Encoder, rows: int) -> list[int]:
    """Return the tokens beyond the rows of the embeddings that a prompt may hold."""
    tokenizer = encoder.tokenizer
    beyond = {token: text for text, token in tokenizer.get_vocab().items() if token >= rows}
    if not beyond or isinstance(encoder, VisionPromptEncoder):
        # Processors put tokens of their own into prompts.
        return list(beyond)
    space = encoder.format.label_space
    words = [encoder.format.answer_prefix] if space is None else space.all_words
    skeletons = [part for skeleton in encoder.skeletons.values() for part in skeleton]
    written = "\n".join([*skeletons, *words, str(tokenizer.chat_template)])
    added, own = tokenizer.added_tokens_decoder, {encoder.pad_token_id, tokenizer.unk_token_id, *encoder.bos}
    # Some models come with a token more than they embed, for images say; one that texts can't spell does no harm.
    return [
        token
        for token, text in beyond.items()
        if token in own or token not in added or encoder.cleaner(text) == text or text in written
    ]


def load_encoder(folder: Path, prompt_format: PromptFormat, images: bool, trust_remote_code: bool = False) -> Encoder:
    """
    Load tokenizer or processor of a run, and bind its prompt format to it.

    Args:
        folder (`Path`):
            The run.
        prompt_format ([`~prompt_format.PromptFormat`]):
            Its format.
        images (`bool`):
            Whether it was trained with images.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether it may bring code.

    Returns:
        [`~data_collator.Encoder`]: the encoder.

    Raises:
        `ValueError`: something in it can't be used, or takes for ever; a chat template is a program, though a caged
            one.
    """

    def load() -> Encoder:
        if images:
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
            return VisionPromptEncoder(prompt_format, processor)
        kind = ResponseEncoder if prompt_format.label_space is None else PromptEncoder
        return kind(prompt_format, AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code))

    return _within(_PATIENCE, folder, load)


def _within(seconds: float, folder: Path, load: Callable[[], Found]) -> Found:
    found: list[Found] = []
    failure: list[Exception] = []

    def work() -> None:
        try:
            found.append(load())
        except Exception as error:  # a file that is damaged, a template that reaches out of its cage
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True, name="p2p-tokenizer")
    thread.start()
    thread.join(seconds)
    if found:
        return found[0]
    if not failure:
        raise ValueError(
            f"Tokenizer and chat template in {str(folder)!r} were not ready after {seconds:.0f} s. Look at the chat "
            f"template: it may loop."
        )
    lines = str(failure[0]).strip().splitlines() or ["no details"]
    raise ValueError(
        f"Tokenizer, chat template or prompt format in {str(folder)!r} can't be used "
        f"({type(failure[0]).__name__}): {lines[0][:500]}"
    ) from failure[0]


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"Unknown `device` {device!r}. Give one such as 'cpu' or 'cuda:0'.") from error


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"Unknown `dtype` {dtype!r}. Known: {', '.join(DTYPES)}.")
    return DTYPES[dtype]
