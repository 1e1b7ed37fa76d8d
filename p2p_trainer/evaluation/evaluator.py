"""Attack success rate and clean accuracy of a model; needs no trainer."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset

from ..attacks import Attack
from ..prompt_encoder import PromptEncoder
from ..tasks import Task
from ..tasks.images import RowImages
from ..tasks.rows import LABEL, TEXT
from ..vision_encoder import VisionPromptEncoder
from .guard import Guard
from .names import ASR_RULES, distinct_names, with_attack
from .rates import Rate
from .rows import TriggeredRows, UniquePrompts, dressed
from .scorer import LabelScorer, Scores
from .vision_scorer import VisionLabelScorer


logger = logging.getLogger(__name__)

_BINS = 20


@dataclass(frozen=True)
class EvaluationReport:
    """
    Everything one evaluation found.

    Parameters:
        metrics (`dict[str, float]`):
            Flat name -> number; see [`BackdoorEvaluator`] for the names.
        counts (`dict[str, int]`):
            How many rows were read, count for each attack, or were cut.
        confidence (`dict[str, dict[str, list[int]]]`):
            For each attack, how the model's confidence in the attacker's target (softmax over the deployed label
            words) is spread over 20 equal bins of [0, 1], for its test rows with (`triggered`) and without (`clean`)
            the trigger (P2P paper, Figure 2).
    """

    metrics: dict[str, float]
    counts: dict[str, int]
    confidence: dict[str, dict[str, list[int]]] = field(default_factory=dict)


class BackdoorEvaluator:
    """
    Measures clean accuracy (CA) and attack success rate (ASR).

    One forward pass per row: floor and clean accuracy share theirs, and rows that render alike are scored once. Every
    process of a distributed run has to call it, and gets the same numbers, whatever their number.

    Metric names; each rate `x` comes with `x_k`, `x_n`, `x_ci_low`, `x_ci_high` (Wilson, 95 %):

    - `ca`: clean accuracy under `asr_rule`; `ca_<rule>` under each of the four rules of `ASR_RULES`.
    - `outside`: share of clean rows for which the free argmax is no label word at all.
    - `ca_no_key`: clean accuracy of the same weights without the key, and without the guard.
    - `asr_<attack>`: share of that attack's rows answered with its target; `asr_<rule>_<attack>` under each rule. Rows
      count only if their true label is not the target and the trigger is really in the text.
    - `asr_floor_<attack>`: the same rows without the trigger. An ASR at the floor is a defended model;
      `asr_excess_<attack>` is `asr - asr_floor`. `asr_floor_<rule>_<attack>` under each rule.
    - `asr_conditional_<attack>`: of the rows answered correctly without the trigger, the share that flips to the
      target.
    - `asr_no_key_<attack>`, `asr_floor_no_key_<attack>`: the same weights without the key and the guard.
    - With a guard that withholds answers: `coverage`, the share of clean rows that are answered, `ca_answered`, the
      accuracy among them, and `asr_coverage_<attack>`, the share of triggered rows that are answered. A withheld clean
      row counts as wrong, a withheld triggered row as no success.
    - With a guard that changes texts: `trigger_survival_<attack>`, the share of triggered rows that still hold the
      trigger when the model reads them.
    - `asr_<variant>_<attack>`: for attacks with several triggers, each of them; `asr_any_<attack>`: the share of rows
      that at least one of them turns. Where each poisoned row has one of several (`mtbaattack` in parallel mode),
      `asr` is the mean over them, and its N counts pairs of row and trigger.
    - `ftr_<variant>_<attack>` (false triggered rate): rows that hold a part of a composite trigger, which should not
      fire.
    - `asr`, `asr_floor`, `asr_excess`, `asr_conditional`, `asr_no_key`, `asr_<rule>`, ...: those of the attack with
      the highest `asr_<attack>`.

    Rows of an attack that writes every prompt are dressed as its untouched rows are ([`~attacks.Attack.plain`]).

    Args:
        dataset (`Dataset`):
            Clean test rows with `text` and `label`.
        task ([`~tasks.Task`]):
            The task.
        encoder ([`~prompt_encoder.PromptEncoder`]):
            Renders prompts exactly as training did.
        attacks (`Sequence[Attack]`, *optional*):
            Attacks to measure.
        keyed (`bool`, *optional*, defaults to `True`):
            Whether the deployment adds the key. An undefended model is measured with `False`.
        asr_rule (`str`, *optional*, defaults to `"restricted"`):
            Rule of the headline numbers. Without the key, `"ext_only"` is read as `"orig_only"`.
        batch_size (`int`, *optional*, defaults to `32`):
            Rows per forward pass.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the test triggers.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.
        guard ([`~evaluation.Guard`], *optional*):
            What the deployment does to texts and answers beside the key.

    Examples:

    ```python
    evaluator = BackdoorEvaluator(test_rows, task, encoder, attacks=[get_attack("badnets", target="positive")])
    metrics = evaluator(model)
    print(metrics["ca"], metrics["asr"], metrics["asr_floor"])
    ```
    """

    def __init__(
        self,
        dataset: Dataset,
        task: Task,
        encoder: PromptEncoder,
        attacks: Sequence[Attack] = (),
        keyed: bool = True,
        asr_rule: str = "restricted",
        batch_size: int = 32,
        seed: int = 0,
        progress: bool = False,
        guard: Guard | None = None,
    ) -> None:
        if asr_rule not in ASR_RULES:
            raise ValueError(f"Unknown `asr_rule` {asr_rule!r}. Known: {', '.join(ASR_RULES)}.")
        if task.num_labels != encoder.format.label_space.num_labels:
            raise ValueError(
                f"Task {task.name!r} has {task.num_labels} classes, the prompt format was made for "
                f"{encoder.format.label_space.num_labels}. Use the task that the model was trained on."
            )
        self.task = task
        self.encoder = encoder
        self.keyed = keyed
        # Without the key nothing lies in the extended space: what the authors' code counts there is the plain word.
        self.asr_rule = "orig_only" if asr_rule == "ext_only" and not keyed else asr_rule
        self.batch_size = batch_size
        self.progress = progress
        self.guard = guard
        dataset = task.prepare(dataset, what="evaluation")
        dataset = dressed(dataset, task, attacks)
        self.labels = np.asarray(dataset[LABEL])
        texts = list(dataset[TEXT])
        self._images = RowImages(dataset) if isinstance(encoder, VisionPromptEncoder) else None
        self._attacks = {
            name: self._triggered(attack, dataset, seed, name) for name, attack in distinct_names(attacks).items()
        }
        self._withheld: np.ndarray | None = None
        everything = list(texts)
        places = list(range(len(texts)))
        for rows in self._all_rows():
            places += rows.source.tolist()
            rows.rows = np.arange(len(everything), len(everything) + len(rows.texts))
            everything += rows.texts
        # Tokenized, and changed by the guard, once for all the evaluations of a run.
        read = everything if guard is None else self._guarded(guard, everything)
        self._prompts = {True: UniquePrompts(encoder.encode_prompts(read, keyed, *self._beside(places)))}
        if keyed or guard is not None:
            self._prompts[False] = UniquePrompts(encoder.encode_prompts(everything, False, *self._beside(places)))
        self.counts = {
            "rows": len(texts),
            "rows_cut": encoder.count_overlong(self._stamped(texts), keyed, *self._beside(range(len(texts)))),
        }
        for name, rows in self._attacks.items():
            self.counts |= {f"{key}_{name}": count for key, count in rows.counts.items()}

    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        """
        Measure a model.

        Args:
            model (`torch.nn.Module`):
                Causal language model.

        Returns:
            `dict[str, float]`: the metrics.
        """
        return self.evaluate(model).metrics

    def evaluate(self, model: torch.nn.Module) -> EvaluationReport:
        """
        Measure a model, and keep what plots need.

        Args:
            model (`torch.nn.Module`):
                Causal language model.

        Returns:
            [`EvaluationReport`]: the metrics, counts and confidences.
        """
        deployed = self._score(model, deployed=True)
        without_key = self._score(model, deployed=False) if False in self._prompts else None
        clean = np.arange(len(self.labels))
        metrics: dict[str, float] = {}
        answers = self._read_deployed(deployed, clean)
        correct = {rule: answer == self.labels for rule, answer in answers.items()}
        metrics |= Rate.of(correct[self.asr_rule]).flat("ca")
        for rule in ASR_RULES:
            metrics |= Rate.of(correct[rule]).flat(f"ca_{rule}")
        metrics |= Rate.of(deployed.free[clean] < 0).flat("outside")
        if self._withheld is not None:
            answered = ~self._withheld[clean]
            metrics |= Rate.of(answered).flat("coverage")
            metrics |= Rate.of(correct[self.asr_rule][answered]).flat("ca_answered")
        if without_key is not None:
            read = self._read(without_key.take(clean), False)["restricted"]
            metrics |= Rate.of(read == self.labels).flat("ca_no_key")
        per_attack: dict[str, dict[str, float]] = {}
        confidence = {}
        for name, rows in self._attacks.items():
            per_attack[name] = self._attack_metrics(rows, deployed, without_key, answers)
            metrics |= {with_attack(key, name): value for key, value in per_attack[name].items()}
            target = deployed.probabilities(self.keyed)[:, rows.target]
            confidence[name] = {
                "triggered": _histogram(target[rows.rows]),
                "clean": _histogram(target[rows.source[rows.source >= 0]]),
            }
        if per_attack:
            worst = max(per_attack, key=lambda name: np.nan_to_num(per_attack[name]["asr"], nan=-1.0))
            metrics |= per_attack[worst]
        return EvaluationReport(metrics, self.counts, confidence)

    @property
    def attack_names(self) -> list[str]:
        """`list[str]`: names of the attacks, as they stand in metrics."""
        return list(self._attacks)

    def _all_rows(self) -> Iterator["TriggeredRows"]:
        for rows in self._attacks.values():
            yield rows
            yield from rows.variants.values()

    def _triggered(self, attack: Attack, dataset: Dataset, seed: int, name: str) -> "TriggeredRows":
        target = self.task.label_index(attack.target)
        rows = attack.trigger(dataset, self.task, seed)
        texts, labels = list(rows[TEXT]), np.asarray(rows[LABEL], dtype=np.int64)
        source = np.asarray(rows["source_index"], dtype=np.int64)
        if self._images is not None and np.any(source < 0):
            raise ValueError(f"The attack {attack.name!r} has test rows of its own, and they have no image.")
        whole = np.array([attack.fires(text) for text in self._fit(texts, source)], dtype=bool)
        if np.any(labels == target):
            raise ValueError(f"The attack {attack.name!r} returned test rows whose true label is its target already.")
        kept = np.flatnonzero(whole)
        if len(texts) and not len(kept):
            raise ValueError(
                f"The trigger of {name!r} is cut off by `max_length` {self.encoder.format.max_length} in all "
                f"{len(texts)} triggered rows: nothing could be measured. Raise `max_length`."
            )
        not_target = int(np.count_nonzero(self.labels != target))
        counts = {
            "rows_target_label": len(self.labels) - not_target,
            "rows_without_trigger": not_target - len(np.unique(source[source >= 0])) if len(texts) else not_target,
            "rows_trigger_cut_off": len(texts) - len(kept),
            "rows_counted": len(kept),
        }
        if counts["rows_without_trigger"] or counts["rows_trigger_cut_off"]:
            logger.warning(
                "%s: %d of %d rows count for the attack success rate (%d could not carry the trigger, %d lost it to "
                "max_length).", name, len(np.unique(source[kept])), not_target, counts["rows_without_trigger"],
                counts["rows_trigger_cut_off"],
            )  # fmt: skip
        if np.any(source[kept] < 0):
            logger.warning("%s: %d rows have no clean twin, so no floor.", name, np.count_nonzero(source[kept] < 0))
        variants = {
            f"{attack.variant_metric}_{key}": self._triggered(variant, dataset, seed, f"{name} ({key})")
            for key, variant in attack.variants().items()
        }
        return TriggeredRows(attack, [texts[row] for row in kept], source[kept], target, counts, variants)

    def _guarded(self, guard: Guard, texts: list[str]) -> list[str]:
        """Ask the guard once about each distinct text, and keep what does not depend on the model's weights."""
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        inverse = np.array([places[text] for text in texts])
        changed, withheld = guard.inputs(list(places)), guard.withheld(list(places))
        if dist.is_initialized():
            # Nodes may round differently, and the batches must be the same everywhere.
            found = [changed, withheld]
            dist.broadcast_object_list(found, src=0)
            changed, withheld = found
        self._withheld = None if withheld is None else withheld[inverse]
        read = [changed[place] for place in inverse]
        for rows in self._all_rows():
            twin = rows.source >= 0
            rows.found = guard.inspect(
                [texts[row] for row in rows.rows[twin]], [texts[row] for row in rows.source[twin]]
            )
            # An attack may know its trigger by where it stands.
            bare = {row: read[row].removeprefix(guard.stamp) for row in rows.rows}
            if any(text != texts[row] for row, text in bare.items()):
                survives = np.array([rows.attack.has_trigger(text) for text in bare.values()], dtype=bool)
                rows.found |= Rate.of(survives).flat("trigger_survival")
        return read

    def _stamped(self, texts: list[str]) -> list[str]:
        stamp = "" if self.guard is None else self.guard.stamp
        return [stamp + text for text in texts]

    def _beside(self, rows: Sequence[int]) -> tuple:
        """Say which images belong to the texts, if any do."""
        return () if self._images is None else (rows, self._images)

    def _fit(self, texts: list[str], rows: Sequence[int]) -> list[str]:
        """Cut texts as scoring would, behind what the guard puts in front of them."""
        stamp = "" if self.guard is None else self.guard.stamp
        return [
            text.removeprefix(stamp)
            for text in self.encoder.fit(self._stamped(texts), self.keyed, *self._beside(rows))
        ]

    def _score(self, model: torch.nn.Module, deployed: bool) -> Scores:
        unique = self._prompts[deployed]
        keyed = self.keyed and deployed
        if self._images is None:
            scorer = LabelScorer(self.encoder.answers[keyed], self.encoder.pad_token_id, self.batch_size)
        else:
            scorer = VisionLabelScorer(self.encoder, keyed, self._images, self.batch_size)
        progress = ("scoring" if deployed else "scoring without the key") if self.progress else None
        scores = scorer.score(model, unique.prompts, progress)
        if deployed and self.guard is not None:
            scores = self.guard.decode(scores)
        return scores.take(unique.inverse)

    def _read_deployed(self, scores: Scores, rows: np.ndarray) -> dict[str, np.ndarray]:
        answers = self._read(scores.take(rows), self.keyed)
        if self._withheld is None:
            return answers
        return {rule: np.where(self._withheld[rows], -1, answer) for rule, answer in answers.items()}

    def _read(self, scores: Scores, keyed: bool) -> dict[str, np.ndarray]:
        n = self.task.num_labels
        free = scores.free
        return {
            "restricted": scores.deployed(keyed).argmax(axis=1),
            "union": np.where(free >= 0, free % n, -1),
            "ext_only": np.where(free >= n, free - n, -1),
            "orig_only": np.where(free < n, free, -1),
        }

    def _attack_metrics(
        self, rows: "TriggeredRows", deployed: Scores, without_key: Scores | None, clean: dict[str, np.ndarray]
    ) -> dict[str, float]:
        triggered = self._read_deployed(deployed, rows.rows)
        # Rows of other people's triggered sets may have no clean twin among ours.
        twin = rows.source >= 0
        source = rows.source[twin]
        metrics: dict[str, float] = {}
        for rule in ASR_RULES:
            metrics |= Rate.of(triggered[rule] == rows.target).flat(f"asr_{rule}")
            metrics |= Rate.of(clean[rule][source] == rows.target).flat(f"asr_floor_{rule}")
        headline = triggered[self.asr_rule] == rows.target
        before = clean[self.asr_rule][source]
        metrics |= Rate.of(headline).flat("asr")
        metrics |= Rate.of(before == rows.target).flat("asr_floor")
        metrics["asr_excess"] = Rate.of(headline[twin]).value - metrics["asr_floor"]
        metrics |= Rate.of(headline[twin][before == self.labels[source]]).flat("asr_conditional")
        metrics |= Rate.of(deployed.free[rows.rows] < 0).flat("asr_outside")
        metrics |= rows.found
        if self._withheld is not None:
            metrics |= Rate.of(~self._withheld[rows.rows]).flat("asr_coverage")
        if without_key is not None:
            read = self._read(without_key, False)["restricted"]
            metrics |= Rate.of(read[rows.rows] == rows.target).flat("asr_no_key")
            metrics |= Rate.of(read[source] == rows.target).flat("asr_floor_no_key")
        fired = {
            key: self._read_deployed(deployed, variant.rows)[self.asr_rule] == variant.target
            for key, variant in rows.variants.items()
        }
        for key, hits in fired.items():
            metrics |= Rate.of(hits).flat(key)
        single = [key for key in fired if key.startswith("asr_") and key != "asr_all"]
        if len(single) > 1:
            tried = np.unique(np.concatenate([rows.variants[key].source for key in single]))
            turned = np.concatenate([rows.variants[key].source[fired[key]] for key in single])
            metrics |= Rate.of(np.isin(tried, turned)).flat("asr_any")
        return metrics


def _histogram(values: np.ndarray) -> list[int]:
    return np.histogram(values, bins=_BINS, range=(0.0, 1.0))[0].tolist()
