"""What metrics are called."""

from collections.abc import Sequence
from typing import Any

from ..attacks import Attack


# How an answer is read (P2P paper and the authors' code differ; each is always reported).
# `restricted`: argmax over the label words that the deployment allows. `union`: free argmax over the vocabulary, of
# which i and i+n both mean i. `ext_only`: only i+n means i, as in the authors' code. `orig_only`: only i means i.
ASR_RULES = ("restricted", "union", "ext_only", "orig_only")

# `asr_floor` can't be both the floor and the success rate of an attack.
_METRIC_ENDS = (
    "floor",
    "excess",
    "conditional",
    "outside",
    "key",
    "no_key",
    "exact",
    "anywhere",
    "prefix_missing",
    *ASR_RULES,
)


def distinct_names(attacks: Sequence[Attack]) -> dict[str, Attack]:
    named: dict[str, Attack] = {}
    for attack in attacks:
        if attack.name in _METRIC_ENDS:
            raise ValueError(f"An attack can't be named {attack.name!r}: metrics of ours end so. Rename it.")
        name, count = attack.name, 1
        while name in named:
            count += 1
            name = f"{attack.name}_{count}"
        named[name] = attack
    return named


_RATE_PARTS = ("_ci_high", "_ci_low", "_k", "_n")


def with_attack(key: str, attack: str) -> str:
    """`asr_floor_k` of `badnets` is `asr_floor_badnets_k`."""
    for part in _RATE_PARTS:
        if key.endswith(part):
            return f"{key.removesuffix(part)}_{attack}{part}"
    return f"{key}_{attack}"


def headline(metrics: dict[str, Any], attacks: Sequence[str] = ()) -> dict[str, Any]:
    """
    Choose what loggers show: no counts, no intervals, and of each attack only success rate, floor and excess.

    Args:
        metrics (`dict[str, Any]`):
            Metrics of a [`BackdoorEvaluator`].
        attacks (`Sequence[str]`, *optional*):
            Names of the attacks.

    Returns:
        `dict[str, Any]`: a part of them.
    """
    shown = {f"{key}_{name}" for name in attacks for key in ("asr", "asr_floor", "asr_excess")}
    hidden = (*_RATE_PARTS, *(f"_{name}" for name in attacks), *(f"floor_{rule}" for rule in ASR_RULES))
    return {key: value for key, value in metrics.items() if key in shown or not key.endswith(hidden)}
