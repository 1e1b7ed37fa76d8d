"""
Estimates what a training run takes, memory per process and operations, and how to make it take less.

Parameters, kept activations and operations come from [`~model_size.read_model`]; the rest is arithmetic. In ten small
runs on a CPU (LoRA and full training, float32 and bfloat16, with and without checkpointing) it came to 0.87 to 1.02 of
what they took at their peak beside the libraries; it was not compared with GPUs. glibc keeps freed memory: in those
runs `MALLOC_MMAP_THRESHOLD_` was 500000, and without it they took up to twice as much.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .model_size import ModelSize
from .training_plan import Plan


GIB = 2**30
# Estimates up to the first share of the memory are taken to fit, those beyond the second to fail.
ENOUGH, TOO_MUCH = 0.9, 1.1

# Driver and kernels on a GPU, interpreter and libraries on a CPU; bytes.
_CONTEXT = GIB
# NF4 has 4 bits a weight and a float32 scale per 64; with double quantisation the scale has 8 bits, and there is a
# float32 per 256 of those (Dettmers et al. 2023, QLoRA, section 3). Bytes.
_QUANTISED = {"nf4": 0.5 + 4 / 64, "nf4, double": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
# Tile in which TRL projects to the vocabulary (trl 1.16: trainer/utils.py, kernels/chunked_logprob.py).
_TILE_TOKENS, _TILE_WIDTH = 4096, 32768
# Optimizer states in numbers of a weight's own type; AdamW has two, and what is not listed is taken for AdamW.
_STATES = {"sgd": 0, "adafactor": 0, "adagrad": 1, "rmsprop": 1, "lion_32bit": 1, "paged_lion_32bit": 1}


@dataclass(frozen=True)
class Memory:
    """
    What one process takes, in bytes.

    Parameters:
        weights (`float`):
            Base model.
        adapter (`float`):
            Trained weights beside it.
        optimizer (`float`):
            Optimizer states, and float32 copies of weights where the strategy keeps them.
        gradients (`float`):
            Gradients.
        activations (`float`):
            What the longest batch needs between forward and backward pass, logits and casts of weights among it.
        evaluation (`float`):
            What an evaluation batch needs.
        accumulated (`bool`):
            Whether gradients are there when a forward pass begins.
        context (`float`, *optional*, defaults to 1 GiB):
            Libraries and driver.
    """

    weights: float
    adapter: float
    optimizer: float
    gradients: float
    activations: float
    evaluation: float
    accumulated: bool
    context: float = _CONTEXT

    @property
    def total(self) -> float:
        """`float`: the peak. Where gradients are not there yet, they grow while activations go."""
        if self.accumulated:
            training = self.gradients + self.activations
        else:
            training = max(self.gradients, self.activations)
        held = self.weights + self.adapter + self.optimizer + self.context
        return held + max(training, self.evaluation)


def estimate_memory(size: ModelSize, plan: Plan) -> Memory:
    """
    Add up what one process takes.

    Weights, gradients and states are counted as in the ZeRO paper (Rajbhandari et al. 2020, section 3.1), in the types
    that TRL, PEFT and the strategy use. Activations are traced; with checkpointing a layer keeps its input alone, and
    one layer at a time the rest (Chen et al. 2016, section 4). DDP has gradients a second time, in buckets.

    Args:
        size ([`~model_size.ModelSize`]):
            Model.
        plan ([`Plan`]):
            Settings.

    Returns:
        [`Memory`]: the parts.
    """
    strategy, processes = plan.launch.strategy, plan.launch.processes
    compute = (plan.autocast or plan.dtype).itemsize
    # DeepSpeed casts the whole model to the type of mixed precision.
    base = compute if strategy in ("zero2", "zero3") else plan.dtype.itemsize
    own = _trained_bytes(size, plan, base)
    plain = base if size.adapter else own
    quantised = size.linear * (plain if plan.quantisation is None else _QUANTISED[plan.quantisation])
    weights = (size.parameters - size.linear) * plain + quantised
    adapter = size.trained * own if size.adapter else 0
    gradients = size.trained * own
    optimizer = size.trained * _state_bytes(plan.optimizer, own)
    if strategy in ("zero2", "zero3") and own < 4:
        # DeepSpeed updates a float32 copy.
        optimizer = size.trained * (4 + _state_bytes(plan.optimizer, 4))
    if strategy == "ddp":
        gradients *= 2 if processes > 1 else 1
    else:
        gradients, optimizer = gradients / processes, optimizer / processes
    if strategy in ("zero3", "fsdp2"):
        # The layer at work and the one fetched ahead are whole.
        weights, adapter = weights / processes + 2 * size.block * compute, adapter / processes
    casts = 0
    if plan.quantisation is not None:
        casts = size.block
    elif plain > compute and strategy != "fsdp2":
        # Autograd keeps the casts of float32 weights, but those of layers that are computed again.
        casts = size.block if plan.checkpointing else size.linear
    layer = size.saved / size.layers
    kept = size.layers * size.hidden * base + layer if plan.checkpointing else size.saved
    # The gradients of a layer's activations take as much again.
    activations = plan.batch_size * plan.longest * (kept + layer) + casts * compute + _head_bytes(size, plan, compute)
    evaluation = _evaluation_bytes(size, plan, layer, compute)
    accumulated = plan.accumulation > 1 or (strategy == "ddp" and processes > 1)
    return Memory(weights, adapter, optimizer, gradients, activations, evaluation, accumulated)


def _trained_bytes(size: ModelSize, plan: Plan, base: int) -> int:
    """Bytes of a trained weight: PEFT has adapters in float32, but for quantised models (TRL) and ZeRO-3 (TRL)."""
    if size.adapter:
        return 2 if plan.quantisation is not None else base if plan.launch.strategy == "zero3" else 4
    # accelerate lifts trained weights to float32 for FSDP2 with mixed precision.
    return 4 if plan.launch.strategy == "fsdp2" and plan.autocast is not None else base


def _state_bytes(optimizer: str, own: int) -> float:
    """Bytes of optimizer states per trained weight."""
    if "8bit" in optimizer:
        return 1 if "lion" in optimizer else 2
    return _STATES.get(optimizer, 2) * own


def _head_bytes(size: ModelSize, plan: Plan, compute: int) -> float:
    """Bytes of projecting the answers' positions to the vocabulary, tile by tile."""
    tokens = plan.batch_size * plan.answer
    # Without Triton a tile is folded in float32, in about three copies.
    tile = min(tokens, _TILE_TOKENS) * min(_TILE_WIDTH, size.vocabulary) * (compute + (12 if plan.cpu else 0))
    gradient = 4 * size.hidden * size.vocabulary if size.head_trained else 0
    return tile + gradient + 8 * tokens * size.hidden


def _evaluation_bytes(size: ModelSize, plan: Plan, layer: float, compute: int) -> float:
    """Bytes of one evaluation batch: a layer's intermediate values, the cache of written answers, float32 logits."""
    cache = size.layers * size.cached * compute if plan.new_tokens else 0
    logits = size.vocabulary * (compute + 8)
    return plan.eval_batch_size * (plan.longest * layer + (plan.longest + plan.new_tokens) * cache + logits)


def training_flops(size: ModelSize, plan: Plan, tokens: float, length: float) -> float:
    """
    Count the operations of training on some tokens.

    Forward and backward pass are traced: frozen weights get no gradient, so that LoRA's backward pass takes as long as
    the forward pass, and full training's twice as long. Attention scores take 4 x width x length per token and layer,
    half of it causal, and twice that in the backward pass (Chowdhery et al. 2022, PaLM, appendix B). Checkpointing
    adds a forward pass.

    Args:
        size ([`~model_size.ModelSize`]):
            Model.
        plan ([`Plan`]):
            Settings.
        tokens (`float`):
            Tokens, padding among them.
        length (`float`):
            Mean length of a row, in tokens.

    Returns:
        `float`: FLOPs.
    """
    scores = size.layers * 2 * size.attention * length
    forward = size.forward + scores
    passes = forward + size.backward + 2 * scores + (forward if plan.checkpointing else 0)
    # Logits are computed again in the backward pass.
    head = 2 * size.hidden * size.vocabulary * (4 if size.head_trained else 3)
    return tokens * passes + tokens / length * plan.answer * head


def reading_flops(size: ModelSize, tokens: float, length: float) -> float:
    """
    Count the operations of a forward pass with logits behind each row.

    Args:
        size ([`~model_size.ModelSize`]):
            Model.
        tokens (`float`):
            Tokens.
        length (`float`):
            Mean length of a row, in tokens.

    Returns:
        `float`: FLOPs.
    """
    scores = size.layers * 2 * size.attention * length
    return tokens * (size.forward + scores) + tokens / length * 2 * size.hidden * size.vocabulary


def advise(size: ModelSize, plan: Plan, limit: float) -> list[str]:
    """
    Say what to change so that a run fits.

    Args:
        size ([`~model_size.ModelSize`]):
            Model.
        plan ([`Plan`]):
            Settings, which do not fit.
        limit (`float`):
            Bytes that there are per process.

    Returns:
        `list[str]`: ways, each enough by itself, with its estimate; those that change least first. Rows per step stay
        the same, but where devices are added.
    """
    stages = [("", plan)]
    if not plan.checkpointing:
        stages.append(("gradient_checkpointing: true", replace(plan, checkpointing=True)))
    plain = size.adapter and plan.quantisation is None
    if plain and plan.dtype == torch.float32:
        stages.append(("dtype: bfloat16", replace(stages[-1][1], dtype=torch.bfloat16)))
    if plain and plan.launch.strategy == "ddp":
        small = replace(plan, quantisation="nf4, double", dtype=torch.bfloat16, optimizer="paged_adamw_8bit")
        stages.append(("QLoRA as in recipes/sst2_qwen_qlora.yaml", replace(small, checkpointing=True)))
    ways = []
    for text, changed in stages:
        fitting = next((way for way in _batches(changed) if estimate_memory(size, way).total <= limit), None)
        if fitting is not None:
            ways.append(_described(size, plan, fitting, text))
    # More processes on a CPU share its main memory.
    for processes in () if plan.cpu else (2, 4, 8, 16, 32, 64, 128):
        shared = replace(plan, launch=replace(plan.launch, strategy="fsdp2", processes=processes))
        if processes > plan.launch.processes and estimate_memory(size, shared).total <= limit:
            ways.append(_described(size, plan, shared, f"fsdp2 or zero3 over {processes} devices"))
            break
    return ways or ["nothing known here makes it fit: take a smaller model or shorter rows"]


def _batches(plan: Plan) -> Iterator[Plan]:
    """Smaller and smaller batches with the same rows per step; evaluation has twice as many, but no more than now."""
    rows = plan.batch_size * plan.accumulation
    for count in range(plan.batch_size, 0, -1):
        if rows % count == 0:
            evaluated = plan.eval_batch_size if count == plan.batch_size else min(plan.eval_batch_size, 2 * count)
            yield replace(plan, batch_size=count, accumulation=rows // count, eval_batch_size=evaluated)


def _described(size: ModelSize, before: Plan, after: Plan, text: str) -> str:
    changes = [text] if text else []
    if after.batch_size != before.batch_size:
        changes.append(f"per_device_train_batch_size: {after.batch_size}")
        changes.append(f"gradient_accumulation_steps: {after.accumulation}")
    if after.eval_batch_size != before.eval_batch_size:
        changes.append(f"per_device_eval_batch_size: {after.eval_batch_size}")
    return f"{', '.join(changes)} ({estimate_memory(size, after).total / GIB:.3g} GiB)"
