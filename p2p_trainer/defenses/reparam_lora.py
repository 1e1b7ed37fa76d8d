"""LoRA whose weights are not free: a tiny network generates all of them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch


class Generator(torch.nn.Module):
    """
    Two networks that generate the weights of all LoRA layers: one all lora_A, one all lora_B (Zhu et al. 2022).

    Each is a learned vector, a linear layer, tanh, and a linear layer with an output per weight; neither layer has a
    bias. As in the authors' code, vectors of lora_A start uniform in [0, 1), those of lora_B at 0, and so all lora_B
    start at 0: the model starts as the base model. Their layers start as PyTorch's linear layers do, uniform in
    +-1/sqrt(inputs), which makes lora_A larger at the start than LoRA's usual initialization.

    Args:
        sizes (`tuple[int, int]`):
            Number of weights in all lora_A, and in all lora_B.
        in_dim (`int`, *optional*, defaults to `2`):
            Size of the learned vectors.
        mid_dim (`int`, *optional*, defaults to `2`):
            Outputs of the first layers.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the initialization.
    """

    def __init__(self, sizes: tuple[int, int], in_dim: int = 2, mid_dim: int = 2, seed: int = 0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)

        def uniform(rows: int, columns: int) -> torch.nn.Parameter:
            bound = 1 / math.sqrt(columns)
            return torch.nn.Parameter((2 * torch.rand(rows, columns, generator=random) - 1) * bound)

        starts = torch.rand(in_dim, generator=random), torch.zeros(in_dim)
        self.inputs = torch.nn.ParameterList([torch.nn.Parameter(start) for start in starts])
        self.first = torch.nn.ParameterList([uniform(mid_dim, in_dim) for _ in sizes])
        self.second = torch.nn.ParameterList([uniform(size, mid_dim) for size in sizes])

    def forward(self) -> list[torch.Tensor]:
        """
        Generate the weights.

        Returns:
            `list[torch.Tensor]`: all weights of lora_A, and all of lora_B, each as one vector.
        """
        return [
            second @ torch.tanh(first @ start)
            for start, first, second in zip(self.inputs, self.first, self.second, strict=True)
        ]


class GeneratorAdamW(torch.optim.AdamW):
    """
    AdamW on a [`Generator`], fed with the gradients of the LoRA weights that it generates.

    A step pulls the gradients of the LoRA weights, accumulated over any number of batches and processes, back through
    the generator (a vector-Jacobian product, hence its exact gradients), updates the generator, and overwrites the
    LoRA weights with what it generates now. So the model stays an ordinary LoRA model, in training and when it is
    saved, and gradient checkpointing and DDP work as ever.

    Args:
        generator ([`Generator`]):
            The generator, on the device of the weights.
        weights_a (`Sequence[torch.nn.Parameter]`):
            Weights of lora_A; overwritten at once.
        weights_b (`Sequence[torch.nn.Parameter]`):
            Weights of lora_B; overwritten at once.
        max_grad_norm (`float`, *optional*, defaults to `0.0`):
            Norm to which the generator's gradients are clipped; 0 does not clip.
        **kwargs:
            Whatever else `torch.optim.AdamW` takes.
    """

    def __init__(
        self,
        generator: Generator,
        weights_a: Sequence[torch.nn.Parameter],
        weights_b: Sequence[torch.nn.Parameter],
        max_grad_norm: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(generator.parameters(), **kwargs)
        self.generator = generator
        self.weights = (list(weights_a), list(weights_b))
        self.max_grad_norm = max_grad_norm
        self.write()

    def pull_back(self) -> None:
        """Set the generator's gradients from those of the LoRA weights."""
        for parameter in self.generator.parameters():
            parameter.grad = None
        with torch.enable_grad():
            generated = self.generator()
        torch.autograd.backward(generated, [_gradients(weights) for weights in self.weights])

    def write(self) -> None:
        """Overwrite the LoRA weights with what the generator generates."""
        with torch.no_grad():
            for weights, generated in zip(self.weights, self.generator(), strict=True):
                pieces = generated.split([weight.numel() for weight in weights])
                for weight, piece in zip(weights, pieces, strict=True):
                    weight.copy_(piece.view_as(weight))

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """
        Update generator and LoRA weights.

        Args:
            closure (`Callable`, *optional*):
                As for any optimizer.

        Returns:
            `float` or `None`: loss of the closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.pull_back()
        if self.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.generator.parameters(), self.max_grad_norm)
        super().step()
        self.write()
        return loss


def _gradients(weights: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """Join gradients; a layer that no row went through has none."""
    found = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    return torch.cat([gradient.float().reshape(-1) for gradient in found])
