"""Generated answers: prompts as training reads them, and greedy decoding in batches."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from tqdm.auto import tqdm
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..prompt_encoder import pad_token_id, special_token_cleaner


logger = logging.getLogger(__name__)

# Rows on which the boundary between prompt and answer is checked, and what stands for an ordinary answer there.
_CHECKED = 64
_STAND_IN = "the"


class GenerationPrompts:
    """
    Turns user texts into the token ids that training showed the model.

    `SFTTrainer` tokenizes prompt and completion as one string, with the tokenizer's defaults, and lets the loss begin
    where that and the prompt alone diverge (trl 1.16, `tokenize_fn` in sft_trainer.py). So a prompt is rendered by the
    same function as the training rows, and tokenized in the same way; a template whose end merges with the answer is
    refused, since the model would be asked in a context that it never saw. User texts are not trusted: a control
    token that one spells is broken up ([`~prompt_encoder.special_token_cleaner`]), so that it stays text.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer.
        render (`Callable[[str], str]`):
            Puts the template around a user text; what rows had in their column `prompt` in training.
        max_length (`int`):
            Tokens that prompt and answer may take together.
        max_new_tokens (`int`):
            Tokens that are kept for the answer.

    Raises:
        `ValueError`: a number is out of range, or the template alone is too long.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        render: Callable[[str], str],
        max_length: int,
        max_new_tokens: int,
    ) -> None:
        _check_number("max_length", max_length)
        _check_number("max_new_tokens", max_new_tokens)
        self.tokenizer = tokenizer
        self.render = render
        self.limit = max_length - max_new_tokens
        self._clean = special_token_cleaner(tokenizer)
        needed = len(self._ids(""))
        if needed >= self.limit:
            raise ValueError(
                f"`max_length` {max_length} is too short: the template alone takes {needed} tokens, and "
                f"`max_new_tokens` {max_new_tokens} are kept for the answer. Raise `max_length`."
            )

    def encode(self, text: str) -> list[int]:
        """
        Render and tokenize one user text, without its end if it does not fit.

        Args:
            text (`str`):
                User text.

        Returns:
            `list[int]`: token ids, `limit` at most.
        """
        return self._ids(self.fit(text))

    def fit(self, text: str) -> str:
        """
        Cut the end of a user text, in proportion to its surplus tokens, until prompt and answer fit.

        Args:
            text (`str`):
                User text.

        Returns:
            `str`: the text as it came, if it fits.
        """
        while text and (surplus := len(self._ids(text)) - self.limit) > 0:
            per_token = len(text) / max(1, len(self.tokenizer(self._clean(text))["input_ids"]))
            text = text[: max(0, len(text) - max(1, int(surplus * per_token)))].rstrip()
        return text

    def keeps(self, text: str, changed: str) -> bool:
        """
        Say whether what was inserted into a text is still there after cutting.

        Args:
            text (`str`):
                User text.
            changed (`str`):
                The text with something inserted in one place.

        Returns:
            `bool`: whether the model reads all of it; `False` if nothing was inserted.
        """
        behind = 0
        while behind < min(len(text), len(changed)) and text[-1 - behind] == changed[-1 - behind]:
            behind += 1
        return changed != text and len(self.fit(changed)) >= len(changed) - behind

    def verify(self, texts: Sequence[str], completions: Sequence[str] | None) -> None:
        """
        Check, on up to 64 rows, that a prompt alone has the tokens that it has in front of an answer.

        The template is judged by a plain word behind it. A true answer may still merge with it, one that begins with
        a line break behind a template that ends with one, say; such answers are counted, and warned about once.

        Args:
            texts (`Sequence[str]`):
                User texts.
            completions (`Sequence[str]`, *optional*):
                Their true answers, if they are known.

        Raises:
            `ValueError`: the tokens differ in front of a plain word.
        """
        merged = []
        for row, text in enumerate(texts[:_CHECKED]):
            rendered = self._rendered(self.fit(text))
            ids = self.tokenizer(rendered)["input_ids"]
            joint = self.tokenizer(rendered + _STAND_IN)["input_ids"]
            if joint[: len(ids)] != ids:
                start = next(place for place, token in enumerate(ids) if joint[place : place + 1] != [token])
                raise ValueError(
                    f"Row {row}: the prompt alone ends with the tokens {self._tokens(ids[start:])}, but in front of "
                    f"an answer such as {_STAND_IN!r} it goes on as {self._tokens(joint[start : start + 4])}: the "
                    f"model would be asked in a context that training never showed. End the template on a token "
                    f"boundary, such as a newline, and let the tokenizer append no token of its own."
                )
            if completions is not None and self.tokenizer(rendered + completions[row])["input_ids"][: len(ids)] != ids:
                merged.append(row)
        if merged:
            logger.warning(
                "In %d of %d rows the true answer merges with the end of the template, as in row %d with %r: training "
                "shows these answers in another context than the one in which the model is asked.",
                len(merged), min(len(texts), _CHECKED), merged[0], completions[merged[0]][:40],
            )  # fmt: skip

    def _rendered(self, text: str) -> str:
        return self.render(self._clean(text))

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(self._rendered(text))["input_ids"]

    def _tokens(self, ids: Sequence[int]) -> list[str]:
        return self.tokenizer.convert_ids_to_tokens(list(ids))


def generate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 16,
    progress: str | None = None,
    autocast: torch.dtype | None = None,
) -> list[str]:
    """
    Answer prompts greedily.

    Prompts that are the same are answered once. Batches are formed over prompts sorted by length, before they are
    shared out to processes, and padded on the left: answers depend on neither batch size nor number of processes, but
    for rounding where two tokens are equally likely. Every process has to call it, and makes as many calls to the
    model's `generate`. Of the model's own generation settings nothing but its end tokens is used: even an explicit
    `GenerationConfig` inherits all that it leaves open, such as a repetition penalty.

    Args:
        model (`torch.nn.Module`):
            Causal language model, possibly wrapped; it is put into evaluation mode and back.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        prompts (`Sequence[Sequence[int]]`):
            Token ids; none may be empty.
        max_new_tokens (`int`):
            Longest answer, in tokens.
        batch_size (`int`, *optional*, defaults to `16`):
            Prompts per batch.
        progress (`str`, *optional*):
            Text of a progress bar, shown on the main process's terminal.
        autocast (`torch.dtype`, *optional*):
            Precision of mixed-precision training. `accelerate` wraps autocast around the model's `forward`, and an
            adapter's `generate` calls the model inside: without this it would answer in another precision than the
            one it was trained and validated in.

    Returns:
        `list[str]`: answers without special tokens, in the order of `prompts`, the same on every process.

    Raises:
        `ValueError`: a prompt is empty, or does not fit into the model's context with its answer.
    """
    _check_number("max_new_tokens", max_new_tokens)
    _check_number("batch_size", batch_size)
    places: dict[tuple[int, ...], int] = {}
    inverse = [places.setdefault(tuple(prompt), len(places)) for prompt in prompts]
    unique = list(places)
    inner = getattr(model, "module", model)
    check_room(inner, unique, max_new_tokens)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    order = sorted(range(len(unique)), key=lambda row: (-len(unique[row]), unique[row]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    ends = _end_tokens(inner, tokenizer)
    device = next(inner.parameters()).device
    mixed = contextlib.nullcontext() if autocast is None else torch.autocast(device.type, autocast)
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad_token_id(tokenizer),
    )
    answers: dict[int, str] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), mixed, _settings_of(inner, settings):
            hidden = progress is None or rank > 0
            for first in tqdm(
                range(0, len(batches), world), desc=progress, disable=True if hidden else None, leave=False
            ):
                # A process without a batch of its own repeats the last one: sharded models need every process.
                batch = batches[min(first + rank, len(batches) - 1)]
                texts = _answer_batch(inner, tokenizer, [unique[row] for row in batch], settings, ends)
                answers |= dict(zip(batch, texts, strict=True))
    finally:
        model.train(was_training)
    if world > 1:
        shares: list[dict[int, str]] = [{} for _ in range(world)]
        dist.all_gather_object(shares, answers)
        # A batch that was repeated may round otherwise elsewhere; the lowest process's answer counts for all.
        answers = {row: text for share in reversed(shares) for row, text in share.items()}
    return [answers[row] for row in inverse]


def check_room(
    model: torch.nn.Module | PretrainedConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    """
    Check that prompts and answers fit into a model's context.

    Args:
        model (`torch.nn.Module` or `PretrainedConfig`):
            Model, possibly wrapped, or its configuration. One that sets no limit fits everything.
        prompts (`Sequence[Sequence[int]]`):
            Token ids.
        max_new_tokens (`int`):
            Longest answer, in tokens.

    Raises:
        `ValueError`: a prompt is empty, or the longest does not fit with its answer.
    """
    if not all(prompts):
        raise ValueError("A prompt has no token at all: there is nothing to answer. Render it with a template.")
    longest = max(map(len, prompts), default=1)
    config = model
    if not isinstance(model, PretrainedConfig):
        config = getattr(getattr(model, "module", model), "config", None)
    text_config = config.get_text_config() if isinstance(config, PretrainedConfig) else None
    room = getattr(text_config, "max_position_embeddings", None)
    if room is not None and longest + max_new_tokens > room:
        raise ValueError(
            f"The longest prompt has {longest} tokens; with `max_new_tokens` {max_new_tokens} that is more than the "
            f"{room} positions of the model. Cut the prompts, or lower `max_new_tokens`."
        )


def _answer_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    ends: Sequence[int],
) -> list[str]:
    width = max(map(len, prompts))
    ids = torch.tensor([[settings.pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    device = next(model.parameters()).device
    output = model.generate(
        input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
    )  # fmt: skip
    texts = []
    for row in output[:, width:].tolist():
        # Behind its end an answer is padded, which need not be with a special token.
        end = next((place for place, token in enumerate(row) if token in ends), len(row))
        texts.append(tokenizer.decode(row[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return texts


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [] if own is None else [own] if isinstance(own, int) else list(own)
    if tokenizer.eos_token_id is not None:
        ends.append(tokenizer.eos_token_id)
    return list(dict.fromkeys(ends))


@contextlib.contextmanager
def _settings_of(model: torch.nn.Module, settings: GenerationConfig) -> Iterator[None]:
    """Replace the model's own generation settings, from which any that are given take what they leave open."""
    holders = [module for module in model.modules() if "generation_config" in vars(module)]
    own = [module.generation_config for module in holders]
    for module in holders:
        module.generation_config = settings
    try:
        yield
    finally:
        for module, original in zip(holders, own, strict=True):
            module.generation_config = original


def _check_number(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` is a number of at least 1, got {value!r}.")
