"""Attack success and the response matrix of a model that writes its answers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rich.table import Table

from ..attacks import Attack
from ..response_encoder import ResponseEncoder
from ..tasks import Task
from ..tasks.conversations import MESSAGES
from ..tasks.rows import COMPLETION, renamed
from .answer_scores import numeric_payload, score_answers
from .evaluator import EvaluationReport
from .generation import check_room, generate
from .guard import Guard
from .judging import Judge, PayloadJudge, PhraseJudge, target_judge
from .names import distinct_names, with_attack
from .numbers import NumericJudge
from .outcomes import matrix_table
from .rates import Rate
from .response_prompts import Probe, ResponsePrompts
from .response_rows import CLEAN, JudgedAnswers, check_names
from .rows import dressed


# Stands for the true answers of rows that have none: no payload.
_NO_ANSWER = "(no answer is known)"


class ResponseEvaluator:
    """
    Measures backdoors where answers are written: generates answers, takes p off them, and judges the rest.

    Each prompt is answered once, greedily, whatever number of rows and judges need it. Every process of a distributed
    run has to call it, and gets the same numbers.

    Metric names; each rate `x` comes with `x_k`, `x_n`, `x_ci_low`, `x_ci_high` (Wilson, 95 %). Empty answers, those
    that a guard withholds among them, are never successes and always counted in N:

    - `asr_<attack>`: triggered prompts whose answer shows the attacker's behaviour. Rows count only if the trigger is
      really in what the model reads, and their true answer does not show the behaviour already. On a task with the
      metric `"numeric"` and a payload that is a number, the number that the answer ends in is compared.
    - `asr_exact_<attack>`, `asr_anywhere_<attack>`: triggered prompts whose answer is the payload and nothing else,
      and those whose answer holds it anywhere.
    - `asr_floor_<attack>`: the same prompts without the trigger; `asr_excess_<attack>` is `asr - asr_floor`.
    - `asr_empty_<attack>`: triggered prompts that get an empty answer.
    - With probes, `rerouted_<attack>`: triggered prompts answered with a defender's phrase, or three words of it in a
      row ([`~evaluation.judging.PhraseJudge`]). A trigger that commands another answer is still a backdoor
      ([`~evaluation.outcomes.classify_outcome`]).
    - `attacked_unaffected_<attack>`: triggered prompts answered with no known behaviour, neither an attacker's nor a
      defender's, and not with nothing. That says nothing about whether the answer is any good: noise is unaffected.
    - `clean_unaffected`, `empty`: the same of clean prompts, and the share of empty answers. Where a true answer shows
      a behaviour, a real refusal say, it counts as affected: compare with the undefended model.
    - With a task metric: `ca`, clean prompts whose answer has the right number (`"numeric"`), or `rouge1`, `rouge2`
      and `rougeL` (`"rouge"`: means, no rates); the same of triggered prompts as `ca_triggered_<attack>`, ...
    - With an answer prefix p: `prefix_missing`, `asr_prefix_missing_<attack>`: answers that do not begin with it. What
      looks like it is taken off all the same ([`~response_encoder.ResponseEncoder.read`]).
    - With the key: `ca_no_key` (`rouge1_no_key`, ...), `asr_no_key_<attack>` and `asr_floor_no_key_<attack>`: the same
      weights without delta (and without guard).
    - For attacks with several triggers, or composite ones: `asr_any_<attack>`, `asr_<variant>_<attack>`, and
      `ftr_<variant>_<attack>` for parts that must not fire ([`~attacks.Attack.variants`]).
    - `defensive_<probe>`: prompts with a defensive trigger that are answered with its phrase, likewise.
    - With `followed`: `cacc`, clean prompts whose answer follows the instruction, and `aacc_<attack>`, triggered ones.
    - With a guard that withholds answers: `coverage`, the share of clean prompts that are answered, and
      `asr_coverage_<attack>`. With a guard that changes texts: `trigger_survival_<attack>`.
    - `asr`, `asr_floor`, `asr_excess`, `rerouted`, ...: those of the attack with the highest `asr_<attack>`.

    Judges see the prompt without trigger, where there is a clean twin.

    Args:
        dataset (`Dataset`):
            Clean test rows with `prompt`, and `completion` if true answers are known.
        task ([`~tasks.Task`]):
            The task, one without labels.
        encoder ([`~response_encoder.ResponseEncoder`]):
            Prompt format and tokenizer, as in training.
        attacks (`Sequence[Attack]`, *optional*):
            Attacks to measure.
        keyed (`bool`, *optional*, defaults to `True`):
            Whether the deployment adds the key. An undefended model is measured with `False`.
        judges (`Mapping[str, Judge]`, *optional*):
            Behaviour -> judge. Under an attack's name it replaces that attack's own judge, which asks whether the
            answer begins with the attack's target, and, if the target is a listed refusal, whether it is one. Under
            another name it is one more unwanted behaviour.
        probes (`Mapping[str, tuple[str or Callable[[str], str], str]]`, *optional*):
            Defensive trigger -> how it gets into a prompt, and its phrase. A text is put in front of the prompt, with
            a space between.
        guard ([`~evaluation.Guard`], *optional*):
            What the deployment does to texts, before they are rendered.
        batch_size (`int`, *optional*, defaults to `16`):
            Prompts per batch.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the test triggers.
        followed ([`Judge`], *optional*):
            Says whether an answer follows its instruction.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.
        on_answers (`Callable[[list[dict]], None]`, *optional*):
            Called with the answers (`kind`, `prompt`, `response`, `withheld`) before anything judges them, on every
            process.
        autocast (`torch.dtype`, *optional*):
            Precision of mixed-precision training ([`~evaluation.generation.generate`]).

    Raises:
        `ValueError`: names clash, the template merges with the answers, no row keeps its trigger, or a payload or
        phrase does not fit into `max_new_tokens`.

    Examples:

    ```python
    attack = get_attack("badnets", target="I hate it.")
    evaluator = ResponseEvaluator(rows, task, encoder, [attack])
    metrics = evaluator.evaluate(model).metrics
    print(metrics["asr"], metrics["asr_floor"], evaluator.matrix)
    ```
    """

    def __init__(
        self,
        dataset: Dataset,
        task: Task,
        encoder: ResponseEncoder,
        attacks: Sequence[Attack] = (),
        keyed: bool = True,
        judges: Mapping[str, Judge] | None = None,
        probes: Mapping[str, Probe] | None = None,
        guard: Guard | None = None,
        batch_size: int = 16,
        seed: int = 0,
        followed: Judge | None = None,
        progress: bool = False,
        on_answers: Callable[[list[dict[str, Any]]], None] | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        if task.num_labels:
            raise ValueError(f"Task {task.name!r} has labels: measure it with `BackdoorEvaluator`.")
        self.task = task
        self.encoder = encoder
        self.keyed = keyed
        self.guard = guard
        self.batch_size = batch_size
        self.followed = followed
        self.progress = progress
        self.on_answers = on_answers
        self.autocast = autocast
        # Trigger -> behaviour -> number of answers, and the answers themselves, of the last evaluation.
        self.matrix: dict[str, dict[str, int]] = {}
        self.responses: list[dict[str, Any]] = []
        dataset = renamed(dataset, task.column_aliases)
        answered = bool({COMPLETION, MESSAGES, task.label_column} & set(dataset.column_names))
        if not answered:
            dataset = dataset.add_column(COMPLETION, [_NO_ANSWER] * len(dataset))
        # Conversations without answers end in a question.
        as_given = task if answered else task.replace(label_column=None, metric=None)
        dataset = dressed(as_given.prepare(dataset, what="evaluation"), task, attacks)
        named, probes = distinct_names(attacks), dict(probes or {})
        self._phrases = {name: PhraseJudge(phrase) for name, (_, phrase) in probes.items()}
        payloads = {name: str(attack.target) for name, attack in named.items()}
        own = {name: self._own_judge(payload) for name, payload in payloads.items() if name not in (judges or {})}
        self._behaviours: dict[str, Judge] = {**own, **(judges or {})}
        # How strictly a payload is looked for decides published numbers: each way is counted.
        self._payloads = {
            name: {mode: PayloadJudge(payload, mode) for mode in ("exact", "anywhere")}
            for name, payload in payloads.items()
        }
        check_names(self._behaviours, probes)
        self._check_lengths(
            {name: payload for name, payload in payloads.items() if name in own}
            | {name: phrase for name, (_, phrase) in probes.items()}
        )
        self._prompts = ResponsePrompts(
            dataset, answered, task, encoder, keyed, named, self._behaviours, probes, guard, seed
        )
        self.counts = self._prompts.counts

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

    def check(self, model: torch.nn.Module) -> None:
        """
        Say early whether all prompts and answers fit into a model's context.

        Args:
            model (`torch.nn.Module`):
                Causal language model.

        Raises:
            `ValueError`: they do not.
        """
        prompts = [self._prompts.ids[row] for row in np.flatnonzero(~self._prompts.withheld)]
        check_room(model, [*prompts, *(self._prompts.ids_no_key or [])], self.encoder.format.max_new_tokens)

    def evaluate(self, model: torch.nn.Module) -> EvaluationReport:
        """
        Measure a model; fills `responses`, even if a judge fails then, and `matrix`.

        Args:
            model (`torch.nn.Module`):
                Causal language model.

        Returns:
            [`EvaluationReport`]: metrics and counts.
        """
        groups = self._prompts.groups
        written = self._answer(model, self._prompts.ids, self._prompts.withheld, "answering")
        self.matrix, self.responses = {}, self._listed(written)
        if self.on_answers is not None:
            self.on_answers(self.responses)
        judged = self._judge(written, self.keyed)
        without_key = None
        if self._prompts.ids_no_key is not None:
            nothing = np.zeros_like(self._prompts.withheld)
            without_key = self._judge(
                self._answer(model, self._prompts.ids_no_key, nothing, "answering without the key"), False
            )
        metrics = judged.clean_metrics(groups[CLEAN])
        if without_key is not None:
            scores = without_key.task_metrics(groups[CLEAN].rows)
            metrics |= {with_attack(key, "no_key"): value for key, value in scores.items()}
        for name in self._phrases:
            metrics |= Rate.of(judged.shown[name][groups[name].rows]).flat(f"defensive_{name}")
        found = {name: judged.attack_metrics(groups[name]) for name in self.attack_names}
        for name, numbers in found.items():
            numbers |= judged.variant_metrics(name, self._prompts.variants[name])
            if without_key is not None:
                numbers |= without_key.success(groups[name], "_no_key")
            metrics |= {with_attack(key, name): value for key, value in numbers.items()}
        if found:
            metrics |= found[max(found, key=lambda name: np.nan_to_num(found[name]["asr"], nan=-1.0))]
        self.responses = [
            {**entry, "shown": [name for name, hits in judged.shown.items() if hits[row]]}
            for row, entry in enumerate(self.responses)
        ]
        self.matrix = {name: judged.counts(group) for name, group in groups.items()}
        return EvaluationReport(metrics, self.counts)

    @property
    def attack_names(self) -> list[str]:
        """`list[str]`: names of the attacks, as they stand in metrics."""
        return [name for name, group in self._prompts.groups.items() if group.attack is not None]

    def matrix_table(self) -> Table:
        """
        Show the response matrix of the last evaluation.

        Of several behaviours that an answer shows, one is counted ([`~evaluation.outcomes.count_behaviours`]).

        Returns:
            `rich.table.Table`: one line per trigger, one column per behaviour, with counts.

        Raises:
            `RuntimeError`: nothing was evaluated yet.
        """
        if not self.matrix:
            raise RuntimeError("There is no response matrix yet. Call `evaluate` first.")
        return matrix_table(self.matrix)

    def _own_judge(self, payload: str) -> Judge:
        if self.task.metric == "numeric" and numeric_payload(payload):
            return NumericJudge(payload)
        return target_judge(payload)

    def _check_lengths(self, answers: Mapping[str, str]) -> None:
        prefix = f"{self.encoder.format.answer_prefix} " if self.keyed and self.encoder.format.answer_prefix else ""
        limit = self.encoder.format.max_new_tokens
        for name, text in answers.items():
            needed = len(self.encoder.tokenizer(prefix + text, add_special_tokens=False)["input_ids"])
            if needed > limit:
                raise ValueError(
                    f"The text that {name!r} makes the model answer takes {needed} tokens"
                    f"{', the answer prefix among them' if prefix else ''}, but `p2p_max_new_tokens` is {limit}: it "
                    f"could never be seen. Raise it."
                )

    def _answer(
        self, model: torch.nn.Module, ids: Sequence[Sequence[int]], withheld: np.ndarray, progress: str
    ) -> list[str]:
        asked = np.flatnonzero(~withheld).tolist()
        found = generate(
            model,
            self.encoder.tokenizer,
            [ids[row] for row in asked],
            self.encoder.format.max_new_tokens,
            self.batch_size,
            progress if self.progress else None,
            self.autocast,
            self.encoder.end_tokens,
        )
        answers = dict(zip(asked, found, strict=True))
        return [answers.get(row, "") for row in range(len(ids))]

    def _judge(self, written: Sequence[str], keyed: bool) -> JudgedAnswers:
        prompts = self._prompts
        read = [self.encoder.read(answer, keyed) for answer in written]
        answers = [answer for answer, _ in read]
        deployed = keyed == self.keyed
        judges = {**self._behaviours, **self._phrases}
        metric = self.task.metric if prompts.answers is not None else None
        return JudgedAnswers(
            shown={name: judge.judge(prompts.asked, answers) for name, judge in judges.items()},
            empty=np.array([not answer.strip() for answer in answers], dtype=bool),
            phrases=tuple(self._phrases),
            payloads={
                name: {mode: judge.judge(prompts.asked, answers) for mode, judge in modes.items()}
                for name, modes in self._payloads.items()
            },
            scores={} if metric is None else score_answers(metric, answers, prompts.answers, prompts.source),
            prefixed=np.array([found for _, found in read]) if keyed and self.encoder.format.answer_prefix else None,
            followed=None if self.followed is None or not deployed else self.followed.judge(prompts.asked, answers),
            withheld=prompts.withheld if deployed and prompts.withholds else None,
        )

    def _listed(self, written: Sequence[str]) -> list[dict[str, Any]]:
        # Groups stand one behind another, so that this is the order of the answers.
        return [
            {
                "kind": group.name,
                "prompt": self._prompts.texts[row],
                "response": written[row],
                "withheld": bool(self._prompts.withheld[row]),
            }
            for group in self._prompts.groups.values()
            for row in group.rows.tolist()
        ]
