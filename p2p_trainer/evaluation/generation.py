"""Generated answers: greedy decoding in batches, on one process or many."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..prompt_renderer import pad_token_id


def generate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 16,
    progress: str | None = None,
    autocast: torch.dtype | None = None,
    end_tokens: Sequence[int] = (),
) -> list[str]:
    """
    Answer prompts greedily.

    Prompts that are the same are answered once. Batches are formed over prompts sorted by length, before they are
    shared out to processes, and padded on the left: answers depend on neither batch size nor number of processes, but
    for rounding where two tokens are equally likely. Of the model's own generation settings nothing but its end tokens
    is used: even an explicit `GenerationConfig` inherits all that it leaves open, such as a repetition penalty.

    Every process has to call it with the same prompts, and makes as many calls to the model's `generate`. Where FSDP2
    or ZeRO-3 spread the weights, a process whose answers have ended goes on until those of all have: each step gathers
    the weights from every process.

    Args:
        model (`torch.nn.Module`):
            Causal language model, possibly wrapped by DDP, FSDP2 or DeepSpeed; it is put into evaluation mode and
            back.
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
        end_tokens (`Sequence[int]`, *optional*):
            More tokens that end an answer, beside the model's own and the tokenizer's; a chat template may end its
            turns with another one.

    Returns:
        `list[str]`: answers without special tokens, in the order of `prompts`, the same on every process.

    Raises:
        `ValueError`: a prompt is empty, or does not fit into the model's context with its answer.
        `RuntimeError`: another process failed. With spread weights nobody can be told: the one that fails has to end,
            upon which its launcher ends the others.
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
    ends = list(dict.fromkeys([*own_end_tokens(inner, tokenizer), *end_tokens]))
    sharded = world > 1 and _is_sharded(model)
    # Weights that are spread out may lie in main memory, and are used on the device all the same.
    device = PartialState().device if sharded else next(inner.parameters()).device
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad_token_id(tokenizer),
    )
    answers: dict[int, list[int]] = {}
    failure: Exception | None = None
    try:
        with writing(model, settings, device, autocast):
            hidden = progress is None or rank > 0
            for first in tqdm(
                range(0, len(batches), world), desc=progress, disable=True if hidden else None, leave=False
            ):
                # A process without a batch of its own repeats the last one: sharded models need every process.
                batch = batches[min(first + rank, len(batches) - 1)]
                found = _answer_batch(inner, [unique[row] for row in batch], settings, ends, device, sharded)
                answers |= dict(zip(batch, found, strict=True))
    except Exception as error:
        # Where weights are spread, the others wait for them, and would take any other message for them.
        if world == 1 or sharded:
            raise
        failure = error
    if world > 1:
        answers = _shared(answers, failure, world)
    # Not before all have the tokens: what can't be decoded fails everywhere.
    texts = [
        tokenizer.decode(answers[row], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for row in range(len(unique))
    ]
    return [texts[row] for row in inverse]


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


def own_end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    List the tokens that end an answer.

    Args:
        model (`PreTrainedModel`):
            Language model, not wrapped by DDP or the like.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.

    Returns:
        `list[int]`: end tokens of the model's generation settings, and the tokenizer's; none if neither has any.
    """
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [] if own is None else [own] if isinstance(own, int) else list(own)
    if tokenizer.eos_token_id is not None:
        ends.append(tokenizer.eos_token_id)
    return list(dict.fromkeys(ends))


def pad_left(prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """
    Make a batch of prompts, padded on the left.

    Args:
        prompts (`Sequence[Sequence[int]]`):
            Token ids; at least one prompt.
        pad_token_id (`int`):
            What to pad with.
        device (`torch.device`):
            Where the batch goes.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids` and `attention_mask`, each of shape `(prompts, longest)`.
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@contextlib.contextmanager
def writing(
    model: torch.nn.Module, settings: GenerationConfig, device: torch.device, autocast: torch.dtype | None = None
) -> Iterator[None]:
    """
    Put a model into the state in which it writes, and back.

    It is in evaluation mode, without gradients, and its own generation settings, from which any that are given take
    what they leave open, are replaced.

    Args:
        model (`torch.nn.Module`):
            Causal language model, possibly wrapped.
        settings (`GenerationConfig`):
            Its settings meanwhile.
        device (`torch.device`):
            Where it runs.
        autocast (`torch.dtype`, *optional*):
            Precision of mixed-precision training.
    """
    mixed = contextlib.nullcontext() if autocast is None else torch.autocast(device.type, autocast)
    modes = [(module, module.training) for module in model.modules()]
    holders = [module for module in model.modules() if "generation_config" in vars(module)]
    own = [module.generation_config for module in holders]
    try:
        model.eval()
        for module in holders:
            module.generation_config = settings
        with torch.no_grad(), mixed:
            yield
    finally:
        for module, original in zip(holders, own, strict=True):
            module.generation_config = original
        for module, training in modes:
            module.training = training


def _answer_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    ends: Sequence[int],
    device: torch.device,
    sharded: bool,
) -> list[list[int]]:
    """Return the tokens of each answer, without its end."""
    inputs = pad_left(prompts, settings.pad_token_id, device)
    output = model.generate(
        **inputs,
        generation_config=settings,
        # Left open, transformers does not notice FSDP2 of accelerate's making (5.23), and takes a whole helper model
        # for a spread one where ZeRO-3 is on.
        synced_gpus=sharded,
    )
    # Behind its end an answer is padded, which need not be with a special token.
    return [
        row[: next((place for place, token in enumerate(row) if token in ends), len(row))]
        for row in output[:, inputs["input_ids"].shape[1] :].tolist()
    ]


def _shared(answers: dict[int, list[int]], failure: Exception | None, world: int) -> dict[int, list[int]]:
    """Exchange answers between processes, or what went wrong, so that none waits for one that failed."""
    shares: list[dict[int, list[int]] | str] = [{} for _ in range(world)]
    dist.all_gather_object(shares, answers if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for rank, share in enumerate(shares):
        if isinstance(share, str):
            raise RuntimeError(f"Process {rank} failed to answer its prompts ({share}). Its own traceback says where.")
    # A batch that was repeated may round otherwise elsewhere; the lowest process's answer counts for all.
    return {row: tokens for share in reversed(shares) for row, tokens in share.items()}


def _is_sharded(model: torch.nn.Module) -> bool:
    """Say whether no process holds all weights; those of ZeRO-3 carry a `ds_id`."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError("FSDP 1 can't answer prompts while it trains. Set `fsdp_version: 2`.")
    spread = any(isinstance(module, FSDPModule) for module in model.modules())
    return spread or any(hasattr(weight, "ds_id") for weight in model.parameters())


def _check_number(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` is a number of at least 1, got {value!r}.")
