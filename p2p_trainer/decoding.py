"""Answers of a batch whose rows have settings of their own, each handed on token by token."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from .evaluation.generation import check_room, own_end_tokens, pad_left, writing
from .prompt_renderer import pad_token_id


# Scores are divided by the temperature: below there is one token left to choose from, above all are as likely, and
# far outside floats overflow.
_TEMPERATURES = (1e-4, 1e6)


@dataclass(frozen=True)
class Sampling:
    """
    How one answer is written.

    Parameters:
        max_new_tokens (`int`, *optional*):
            Longest answer, in tokens; `None` leaves it to whoever asks the model.
        temperature (`float`, *optional*, defaults to `0.0`):
            What scores are divided by; 0 takes the likeliest token.
        top_p (`float`, *optional*, defaults to `1.0`):
            Of the likeliest tokens, as many are drawn from as make up this share of the probability.
        seed (`int`, *optional*, defaults to `0`):
            Draws depend on it, and on nothing else. 64 bits, signed, of which a CPU uses the lower 32.

    Raises:
        `ValueError`: a value is outside its range.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        longest = self.max_new_tokens
        if longest is not None and (not _is_whole(longest) or longest < 1):
            raise ValueError(f"`max_new_tokens` is a number of at least 1, or none; got {longest!r}.")
        if not _is_number(self.temperature) or self.temperature < 0:
            raise ValueError(f"`temperature` is a number of at least 0, got {self.temperature!r}.")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` is a number above 0, and 1 at most; got {self.top_p!r}.")
        if not _is_whole(self.seed) or not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"`seed` is a whole number of 64 bits, got {self.seed!r}.")


class RowWriter(Protocol):
    """
    One row of a batch: what is asked, and where the answer goes.

    Parameters:
        ids (`Sequence[int]`):
            Token ids of the prompt.
        sampling ([`Sampling`]):
            How the answer is written.
    """

    ids: Sequence[int]
    sampling: Sampling

    def take(self, token: int) -> bool:
        """
        Take the next token of the answer.

        Args:
            token (`int`):
                The token, never an end token.

        Returns:
            `bool`: whether the row goes on; if not, it ends with the reason `"stop"`.
        """
        ...

    def end(self, reason: Literal["stop", "length"]) -> None:
        """
        Learn that the answer has ended; called once, and last.

        Args:
            reason (`str`):
                `"length"` if `max_new_tokens` was reached, else `"stop"`.
        """
        ...


def write_batch(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[RowWriter],
    autocast: torch.dtype | None = None,
    end_tokens: Sequence[int] = (),
) -> None:
    """
    Write the answers of a batch.

    A row's answer depends on its prompt and its settings alone, but for rounding where two tokens are nearly as
    likely: with temperature 0 it is what [`~evaluation.generation.generate`] writes, otherwise each row draws from a
    generator of its own. Draws are the same on devices of one kind. Of the model's own generation settings nothing but
    its end tokens is used.

    The batch ends when its last row has. It is one call of the model's `generate`, or, where a long prompt and a long
    answer of two rows would together exceed the model's context, several, one after the other.

    Args:
        model (`torch.nn.Module`):
            Causal language model, possibly wrapped; it is put into evaluation mode and back.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        rows (`Sequence[RowWriter]`):
            What to answer. What their methods raise ends the whole batch, and comes out here.
        autocast (`torch.dtype`, *optional*):
            Precision of mixed-precision training.
        end_tokens (`Sequence[int]`, *optional*):
            More tokens that end an answer, beside the model's own and the tokenizer's.

    Raises:
        `ValueError`: a row has an empty prompt or no `max_new_tokens`, or does not fit into the model's context.
    """
    inner = getattr(model, "module", model)
    for row in rows:
        if row.sampling.max_new_tokens is None:
            raise ValueError("A row has no `max_new_tokens`. Give it one.")
        check_room(inner, [row.ids], row.sampling.max_new_tokens)
    ends = list(dict.fromkeys([*own_end_tokens(inner, tokenizer), *end_tokens]))
    device = next(inner.parameters()).device
    for batch in _fitting(inner, rows):
        settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            use_cache=True,
            max_new_tokens=_longest(batch),
            eos_token_id=ends or None,
            pad_token_id=pad_token_id(tokenizer),
        )
        taking = _Taking(batch, ends)
        with writing(model, settings, device, autocast):
            inner.generate(
                **pad_left([row.ids for row in batch], settings.pad_token_id, device),
                generation_config=settings,
                logits_processor=LogitsProcessorList([_Drawing(batch, taking, device)]),
                stopping_criteria=StoppingCriteriaList([taking]),
                synced_gpus=False,
            )


class _Taking(StoppingCriteria):
    """Hands each new token to its row, and ends rows."""

    def __init__(self, rows: Sequence[RowWriter], ends: Sequence[int]) -> None:
        self.rows = rows
        self.ends = frozenset(ends)
        self.count = 0
        self.ended = [False] * len(rows)

    def __call__(
        self, input_ids: torch.LongTensor, scores: tuple[torch.Tensor] | None, **kwargs: Any
    ) -> torch.BoolTensor:
        self.count += 1
        for place, token in enumerate(input_ids[:, -1].tolist()):
            # What has ended is padded.
            if not self.ended[place]:
                self.ended[place] = self._take(self.rows[place], token)
        return torch.tensor(self.ended, device=input_ids.device)

    def _take(self, row: RowWriter, token: int) -> bool:
        if token in self.ends or not row.take(token):
            row.end("stop")
            return True
        if self.count == row.sampling.max_new_tokens:
            row.end("length")
            return True
        return False


class _Drawing(LogitsProcessor):
    """
    Draws a token for each row with a temperature.

    The likeliest token of scores with Gumbel noise is a draw from their softmax. So `generate` decodes greedily, which
    leaves the other rows as they are, and the noise of a row can come from a generator of its own.
    """

    def __init__(self, rows: Sequence[RowWriter], taking: _Taking, device: torch.device) -> None:
        self.taking = taking
        self.generators: dict[int, torch.Generator] = {}
        groups: dict[tuple[float, float], list[int]] = {}
        for place, row in enumerate(rows):
            sampling = row.sampling
            if sampling.temperature > 0:
                self.generators[place] = torch.Generator(device).manual_seed(sampling.seed)
                groups.setdefault((sampling.temperature, sampling.top_p), []).append(place)
        self.groups = [(places, _warpers(*setting)) for setting, places in groups.items()]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        for group, warpers in self.groups:
            places = [place for place in group if not self.taking.ended[place]]
            if not places:
                continue
            own = warpers(input_ids[places], scores[places])
            noise = torch.stack(
                [torch.empty_like(own[0]).exponential_(generator=self.generators[place]) for place in places]
            )
            # -log(noise) is Gumbel distributed; a draw of 0 would be infinite, and beat what is ruled out.
            scores[places] = own - noise.clamp_min(torch.finfo(noise.dtype).tiny).log()
        return scores


def _warpers(temperature: float, top_p: float) -> LogitsProcessorList:
    coldest, hottest = _TEMPERATURES
    warpers = LogitsProcessorList([TemperatureLogitsWarper(min(max(float(temperature), coldest), hottest))])
    if top_p < 1:
        warpers.append(TopPLogitsWarper(float(top_p)))
    return warpers


def _fitting(model: torch.nn.Module, rows: Sequence[RowWriter]) -> list[list[RowWriter]]:
    """
    Share rows out to batches that fit into the model's context.

    A row that has ended is padded until all have: past its last position a model fails, or changes its frequencies.
    """
    batches: list[list[RowWriter]] = []
    for row in rows:
        for batch in batches:
            joint = [*batch, row]
            try:
                check_room(model, [other.ids for other in joint], _longest(joint))
            except ValueError:
                continue
            batch.append(row)
            break
        else:
            batches.append([row])
    return batches


def _longest(rows: Sequence[RowWriter]) -> int:
    return max(row.sampling.max_new_tokens or 0 for row in rows)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))
