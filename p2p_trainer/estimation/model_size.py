"""
What a model is made of, read without loading any weights.

The model is built on the `meta` device, where tensors have shapes and no content. A forward and a backward pass there
say what autograd keeps for the backward pass and how many operations each pass takes, whatever the architecture and
the adapter.
"""

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from peft import get_peft_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from trl import ModelConfig, get_peft_config

from ..assembly import mixed_precision
from ..config import P2PConfig


# Tokens of the pass. What is counted grows with them, but for attention scores, which the estimate adds by formula.
_TRACED_TOKENS = 64
_ATTENTION = "p2p_trainer_shapes_alone"


@dataclass(frozen=True)
class ModelSize:
    """
    What a model is made of; numbers of parameters, unless said otherwise.

    Parameters:
        parameters (`int`):
            Of the base model.
        linear (`int`):
            In weights of linear layers other than the head: those that quantisation converts.
        trained (`int`):
            That training changes: the adapter's, or all.
        adapter (`bool`):
            Whether the trained ones are added to the base model's.
        block (`int`):
            In the largest of the repeated layers.
        layers (`int`):
            Repeated layers.
        hidden (`int`):
            Width of the residual stream.
        vocabulary (`int`):
            Words.
        attention (`int`):
            Width of the queries of all heads.
        cached (`int`):
            Width of keys and values of all heads.
        head_trained (`bool`):
            Whether the head's weights get gradients.
        images (`bool`):
            Whether the model reads more than text; only its language model is traced.
        dtype (`torch.dtype`):
            Type that the weights are loaded in.
        saved (`float`, *optional*, defaults to `0.0`):
            Bytes that all layers keep per token for the backward pass.
        forward (`float`, *optional*, defaults to `0.0`):
            FLOPs per token of a forward pass, head and attention scores left out. 0 if the model can't be traced.
        backward (`float`, *optional*, defaults to `0.0`):
            Likewise, of a backward pass.
    """

    parameters: int
    linear: int
    trained: int
    adapter: bool
    block: int
    layers: int
    hidden: int
    vocabulary: int
    attention: int
    cached: int
    head_trained: bool
    images: bool
    dtype: torch.dtype
    saved: float = 0.0
    forward: float = 0.0
    backward: float = 0.0


def read_model(name: str, args: P2PConfig, model_args: ModelConfig) -> ModelSize:
    """
    Build a model and its adapter without weights, and count.

    Args:
        name (`str`):
            Hub id or local folder; only its configuration is read.
        args ([`P2PConfig`]):
            Training.
        model_args (`ModelConfig`):
            Model and adapter.

    Returns:
        [`ModelSize`]: what it is made of.

    Raises:
        `OSError` or `ValueError`: there is no configuration, none that transformers makes a language model of, or the
        adapter does not fit the model.
    """
    revision = model_args.model_revision
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
    try:
        with warnings.catch_warnings():
            # Training says what peft has to say.
            warnings.simplefilter("ignore")
            return _counted(config, args, model_args)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{name!r} has no configuration of a language model: {error}") from error


def _counted(config: PreTrainedConfig, args: P2PConfig, model_args: ModelConfig) -> ModelSize:
    text = config.get_text_config()
    named = model_args.dtype
    dtype = (config.dtype or torch.float32) if named in (None, "auto") else getattr(torch, named)
    AttentionInterface.register(_ATTENTION, _attention)
    with torch.device("meta"):
        model = _build(config, args.trust_remote_code).to(mixed_precision(args) or dtype)
        model.set_attn_implementation(_ATTENTION)
        head = model.get_output_embeddings()
        linear = [part for part in model.modules() if isinstance(part, torch.nn.Linear) and part is not head]
        decoder = model.get_decoder()
        blocks = max((part for part in decoder.modules() if isinstance(part, torch.nn.ModuleList)), key=_count)
        counts = {
            "parameters": _count(model),
            "linear": sum(part.weight.numel() for part in linear),
            "block": max(_count(block) for block in blocks),
        }
        peft_config = get_peft_config(model_args)
        whole = model if peft_config is None else get_peft_model(model, peft_config, low_cpu_mem_usage=True)
        heads = text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
        size = ModelSize(
            **counts,
            trained=sum(weight.numel() for weight in whole.parameters() if weight.requires_grad),
            adapter=peft_config is not None,
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            vocabulary=text.vocab_size,
            attention=heads * width,
            cached=2 * (getattr(text, "num_key_value_heads", None) or heads) * width,
            head_trained=any(weight.requires_grad for weight in model.get_output_embeddings().parameters()),
            images=text is not config,
            dtype=dtype,
        )
        try:
            return _traced(size, decoder)
        except (RuntimeError, NotImplementedError, TypeError):
            # Layers that look at values, such as some mixtures of experts.
            return size


def _build(config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """Build the class that TRL loads (trl 1.16, `create_model_from_path`)."""
    kind = getattr(transformers, str((config.architectures or [None])[0]), None)
    if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
        return kind(config)
    return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def _traced(size: ModelSize, decoder: torch.nn.Module) -> ModelSize:
    """Run forward and backward pass of the layers on shapes alone."""
    # Weights are kept anyway.
    seen = {_storage(weight) for weight in decoder.parameters()}
    kept: list[torch.UntypedStorage] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if _storage(tensor) not in seen:
            seen.add(_storage(tensor))
            # Held on to, so that no other takes its place.
            kept.append(tensor.untyped_storage())
        return tensor

    decoder.train()
    ids = torch.zeros(1, _TRACED_TOKENS, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with FlopCounterMode(display=False) as forward:
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
        with FlopCounterMode(display=False) as backward:
            hidden.sum().backward()
    return replace(
        size,
        saved=sum(storage.nbytes() for storage in kept) / _TRACED_TOKENS,
        forward=forward.get_total_flops() / _TRACED_TOKENS,
        backward=backward.get_total_flops() / _TRACED_TOKENS,
    )


class _Shapes(torch.autograd.Function):
    """Attention as fused kernels do it: kept are queries, keys, values and outputs, and no scores."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    return _Shapes.apply(query, key, value).transpose(1, 2).contiguous(), None


def _count(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _storage(tensor: torch.Tensor) -> int:
    return StorageWeakRef(tensor.untyped_storage()).cdata
