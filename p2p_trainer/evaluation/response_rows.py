"""Prompts that go together, and what the judges said of their answers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ..attacks import Attack
from .names import with_attack
from .outcomes import EMPTY, OTHER, count_behaviours
from .rates import Rate


CLEAN = "clean"

# `asr_empty` can't be both a share of empty answers and the success rate of an attack.
_RESERVED = (CLEAN, EMPTY, OTHER, "coverage")


@dataclass
class PromptGroup:
    """
    Clean, triggered or probed prompts, and the clean rows they came from.

    Args:
        name (`str`):
            `CLEAN`, or the name of the attack or of the defensive trigger.
        texts (`list[str]`):
            The prompts.
        source (`np.ndarray` of shape `(texts,)`, int64):
            Clean row of each, -1 if it has none.
        attack ([`~attacks.Attack`], *optional*):
            The attack.
        rows (`np.ndarray` of shape `(texts,)`, int64, *optional*):
            Place of each among the prompts of all groups.
        counts (`dict[str, int]`, *optional*):
            Rows that count, and rows that are left out.
        found (`dict[str, float]`, *optional*):
            What the guard makes of them.
    """

    name: str
    texts: list[str]
    source: np.ndarray
    attack: Attack | None = None
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    counts: dict[str, int] = field(default_factory=dict)
    found: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class JudgedAnswers:
    """
    What the judges said of the answers to the prompts of all groups.

    Args:
        shown (`dict[str, np.ndarray]`):
            Behaviour, an attacker's or a defender's -> which answers show it.
        empty (`np.ndarray`):
            Which are empty.
        phrases (`tuple[str, ...]`):
            Behaviours that are a defender's.
        payloads (`dict[str, dict[str, np.ndarray]]`, *optional*):
            Attack -> way of looking for its payload -> which answers have it.
        scores (`dict[str, np.ndarray]`, *optional*):
            Task metric -> score of each answer, bool for a rate.
        prefixed (`np.ndarray`, *optional*):
            Which began with p; `None` if none is expected.
        followed (`np.ndarray`, *optional*):
            Which follow their instruction.
        withheld (`np.ndarray`, *optional*):
            Which a guard withholds; `None` if there is no guard that does.
    """

    shown: dict[str, np.ndarray]
    empty: np.ndarray
    phrases: tuple[str, ...] = ()
    payloads: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    prefixed: np.ndarray | None = None
    followed: np.ndarray | None = None
    withheld: np.ndarray | None = None

    @property
    def defensive(self) -> np.ndarray:
        """`np.ndarray`, bool: which answers have a defender's phrase."""
        return self._any(self.phrases)

    @property
    def unaffected(self) -> np.ndarray:
        """`np.ndarray`, bool: which answers show no behaviour and are not empty."""
        return ~self.empty & ~self._any(self.shown)

    def clean_metrics(self, group: PromptGroup) -> dict[str, float]:
        """
        Count what became of clean prompts.

        Args:
            group ([`PromptGroup`]):
                The clean prompts.

        Returns:
            `dict[str, float]`: metrics, named as in [`~evaluation.responses.ResponseEvaluator`].
        """
        metrics = self.task_metrics(group.rows)
        metrics |= Rate.of(self.unaffected[group.rows]).flat("clean_unaffected")
        metrics |= Rate.of(self.empty[group.rows]).flat("empty")
        metrics |= self._missing(group, "prefix_missing")
        return metrics | self._optional(group, "coverage", "cacc")

    def task_metrics(self, rows: np.ndarray) -> dict[str, float]:
        """
        Score answers by the task's metric.

        Args:
            rows (`np.ndarray`, int64):
                Which answers.

        Returns:
            `dict[str, float]`: rates with their counts, means without.
        """
        metrics: dict[str, float] = {}
        for name, scores in self.scores.items():
            if scores.dtype == bool:
                metrics |= Rate.of(scores[rows]).flat(name)
            else:
                metrics[name] = float(scores[rows].mean()) if len(rows) else float("nan")
        return metrics

    def attack_metrics(self, group: PromptGroup) -> dict[str, float]:
        """
        Count what became of the prompts with one attack's trigger.

        Args:
            group ([`PromptGroup`]):
                The triggered prompts.

        Returns:
            `dict[str, float]`: metrics, without the attack's name in theirs.
        """
        twin = group.source >= 0
        metrics = self.success(group)
        metrics["asr_excess"] = Rate.of(self.shown[group.name][group.rows[twin]]).value - metrics["asr_floor"]
        for mode, hits in self.payloads.get(group.name, {}).items():
            metrics |= Rate.of(hits[group.rows]).flat(f"asr_{mode}")
        metrics |= self._missing(group, "asr_prefix_missing")
        for name, value in self.task_metrics(group.rows[twin]).items():
            metrics[with_attack(name, "triggered")] = value
        metrics |= Rate.of(self.empty[group.rows]).flat("asr_empty")
        if self.phrases:
            metrics |= Rate.of(self.defensive[group.rows]).flat("rerouted")
        metrics |= Rate.of(self.unaffected[group.rows]).flat("attacked_unaffected")
        return metrics | self._optional(group, "asr_coverage", "aacc") | group.found

    def success(self, group: PromptGroup, ending: str = "") -> dict[str, float]:
        """
        Count an attack's successes, with its trigger and without.

        Args:
            group ([`PromptGroup`]):
                The triggered prompts.
            ending (`str`, *optional*, defaults to `""`):
                End of the metrics' names.

        Returns:
            `dict[str, float]`: attack success rate and floor.
        """
        hits = self.shown[group.name]
        # Clean prompts are the first ones: their row is their place.
        floor = Rate.of(hits[group.source[group.source >= 0]])
        return Rate.of(hits[group.rows]).flat(f"asr{ending}") | floor.flat(f"asr_floor{ending}")

    def variant_metrics(self, name: str, variants: Mapping[str, PromptGroup]) -> dict[str, float]:
        """
        Count the successes of further ways to trigger an attack.

        Args:
            name (`str`):
                Name of the attack.
            variants (`Mapping[str, PromptGroup]`):
                Metric -> prompts.

        Returns:
            `dict[str, float]`: a rate for each, and `asr_any`: the share of rows that one of several triggers turns.
        """
        metrics: dict[str, float] = {}
        for key, group in variants.items():
            metrics |= Rate.of(self.shown[name][group.rows]).flat(key)
        single = [group for key, group in variants.items() if key.startswith("asr_") and key != "asr_all"]
        if len(single) > 1:
            tried = np.unique(np.concatenate([group.source for group in single]))
            turned = np.concatenate([group.source[self.shown[name][group.rows]] for group in single])
            metrics |= Rate.of(np.isin(tried, turned)).flat("asr_any")
        return metrics

    def counts(self, group: PromptGroup) -> dict[str, int]:
        """
        Count each answer once ([`~evaluation.outcomes.count_behaviours`]).

        Args:
            group ([`PromptGroup`]):
                Prompts.

        Returns:
            `dict[str, int]`: behaviour -> number of answers.
        """
        shown = {name: hits[group.rows] for name, hits in self.shown.items()}
        return count_behaviours(shown, self.empty[group.rows], group.name)

    def _any(self, names: Iterable[str]) -> np.ndarray:
        return np.any([np.zeros_like(self.empty), *(self.shown[name] for name in names)], axis=0)

    def _missing(self, group: PromptGroup, name: str) -> dict[str, float]:
        if self.prefixed is None:
            return {}
        # An answer that nobody sees lacks nothing.
        seen = group.rows if self.withheld is None else group.rows[~self.withheld[group.rows]]
        return Rate.of(~self.prefixed[seen]).flat(name)

    def _optional(self, group: PromptGroup, coverage: str, accuracy: str) -> dict[str, float]:
        metrics = {} if self.withheld is None else Rate.of(~self.withheld[group.rows]).flat(coverage)
        return metrics if self.followed is None else metrics | Rate.of(self.followed[group.rows]).flat(accuracy)


def check_names(behaviours: Iterable[str], probes: Iterable[str]) -> None:
    """
    Check that results can be told apart by their names.

    Args:
        behaviours (`Iterable[str]`):
            Names of attacks and of other unwanted behaviours.
        probes (`Iterable[str]`):
            Names of defensive triggers.

    Raises:
        `ValueError`: a name is one of ours, or stands for both.
    """
    for name in (*behaviours, *probes):
        if name in _RESERVED:
            raise ValueError(f"No attack, behaviour or trigger can be named {name!r}: results of ours are. Rename it.")
    if clash := sorted(set(behaviours) & set(probes)):
        raise ValueError(f"The names {clash} stand for an attacker's behaviour and a defensive trigger. Rename one.")
