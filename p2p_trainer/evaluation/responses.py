"""Attack success and the response matrix of a model that writes its answers."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from ..attacks import Attack
from ..attacks.selection import answers_equal
from ..tasks import Task
from ..tasks.rows import COMPLETION, PROMPT
from .evaluator import EvaluationReport
from .generation import GenerationPrompts, check_room, generate
from .guard import Guard
from .judging import Judge, PhraseJudge, target_judge
from .names import distinct_names, with_attack
from .outcomes import matrix_table
from .rates import Rate
from .response_rows import CLEAN, JudgedAnswers, PromptGroup, check_names
from .rows import dressed


logger = logging.getLogger(__name__)

# Stands for the true answers of rows that have none: no payload.
_NO_ANSWER = "(no answer is known)"


class ResponseEvaluator:
    """
    Measures backdoors on instruction data: generates answers and judges them.

    Each prompt is answered once, greedily, whatever number of rows and judges need it. Every process of a distributed
    run has to call it, and gets the same numbers.

    Metric names; each rate `x` comes with `x_k`, `x_n`, `x_ci_low`, `x_ci_high` (Wilson, 95 %). Empty answers, those
    that a guard withholds among them, are never successes and always counted in N:

    - `asr_<attack>`: triggered prompts whose answer shows the attacker's behaviour. Rows count only if the trigger is
      really in what the model reads, and their true answer does not show the behaviour already.
    - `asr_floor_<attack>`: the same prompts without the trigger; `asr_excess_<attack>` is `asr - asr_floor`.
    - `asr_empty_<attack>`: triggered prompts that get an empty answer.
    - `rerouted_<attack>`: triggered prompts answered with a defender's phrase, or three words of it in a row
      ([`~evaluation.judging.PhraseJudge`]). A trigger that commands another answer is still a backdoor
      ([`~evaluation.outcomes.classify_outcome`]).
    - `attacked_unaffected_<attack>`: triggered prompts answered with no known behaviour, neither an attacker's nor a
      defender's, and not with nothing. That says nothing about whether the answer is any good: noise is unaffected.
    - `clean_unaffected`, `empty`: the same of clean prompts, and the share of empty answers. Where a true answer shows
      a behaviour, a real refusal say, it counts as affected: compare with the undefended model.
    - `defensive_<probe>`: prompts with a defensive trigger that are answered with its phrase, likewise.
    - With `followed`: `cacc`, clean prompts whose answer follows the instruction, and `aacc_<attack>`, triggered ones.
    - With a guard that withholds answers: `coverage`, the share of clean prompts that are answered, and
      `asr_coverage_<attack>`. With a guard that changes texts: `trigger_survival_<attack>`.
    - `asr`, `asr_floor`, `asr_excess`, `rerouted`, ...: those of the attack with the highest `asr_<attack>`.

    Judges see the prompt without trigger, where there is a clean twin. Variants of an attack are not measured here.

    Args:
        dataset (`Dataset`):
            Clean test rows with `prompt`, and `completion` if true answers are known.
        task ([`~tasks.Task`]):
            The task, one without labels.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        render (`Callable[[str], str]`):
            Puts the template around a prompt, as it was around the training rows' prompts.
        attacks (`Sequence[Attack]`, *optional*):
            Attacks to measure.
        judges (`Mapping[str, Judge]`, *optional*):
            Behaviour -> judge. Under an attack's name it replaces that attack's own judge, which asks whether the
            answer begins with the attack's target, and, if the target is a listed refusal, whether it is one. Under
            another name it is one more unwanted behaviour.
        probes (`Mapping[str, tuple[str or Callable[[str], str], str]]`, *optional*):
            Defensive trigger -> how it gets into a prompt, and its phrase. A text is put in front of the prompt, with
            a space between.
        guard ([`~evaluation.Guard`], *optional*):
            What the deployment does to texts, before they are rendered.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Longest answer, in tokens.
        batch_size (`int`, *optional*, defaults to `16`):
            Prompts per batch.
        max_length (`int`, *optional*, defaults to `512`):
            Tokens of prompt and answer together; prompts lose the end of their user text for it.
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
    evaluator = ResponseEvaluator(rows, task, tokenizer, "Instruction: {}\\nAnswer:\\n".format, [attack])
    metrics = evaluator.evaluate(model).metrics
    print(metrics["asr"], metrics["asr_floor"], evaluator.matrix)
    ```
    """

    def __init__(
        self,
        dataset: Dataset,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        render: Callable[[str], str],
        attacks: Sequence[Attack] = (),
        judges: Mapping[str, Judge] | None = None,
        probes: Mapping[str, tuple[str | Callable[[str], str], str]] | None = None,
        guard: Guard | None = None,
        max_new_tokens: int = 64,
        batch_size: int = 16,
        max_length: int = 512,
        seed: int = 0,
        followed: Judge | None = None,
        progress: bool = False,
        on_answers: Callable[[list[dict[str, Any]]], None] | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        if task.num_labels:
            raise ValueError(f"Task {task.name!r} has labels: measure it with `BackdoorEvaluator`.")
        self.task = task
        self.tokenizer = tokenizer
        self.guard = guard
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.followed = followed
        self.progress = progress
        self.on_answers = on_answers
        self.autocast = autocast
        # Trigger -> behaviour -> number of answers, and the answers themselves, of the last evaluation.
        self.matrix: dict[str, dict[str, int]] = {}
        self.responses: list[dict[str, Any]] = []
        self._prompts = GenerationPrompts(tokenizer, render, max_length, max_new_tokens)
        answered = bool({COMPLETION, task.label_column} & set(dataset.column_names))
        if not answered:
            dataset = dataset.add_column(COMPLETION, [_NO_ANSWER] * len(dataset))
        dataset = dressed(task.prepare(dataset, what="evaluation"), task, attacks)
        self._clean = list(dataset[PROMPT])
        answers = list(dataset[COMPLETION]) if answered else None
        self._prompts.verify(self._clean, answers)
        named, probes = distinct_names(attacks), dict(probes or {})
        self._phrases = {name: PhraseJudge(phrase) for name, (_, phrase) in probes.items()}
        payloads = {name: str(attack.target) for name, attack in named.items() if name not in (judges or {})}
        own = {name: target_judge(payload) for name, payload in payloads.items()}
        self._behaviours: dict[str, Judge] = {**own, **(judges or {})}
        check_names(self._behaviours, probes)
        self._check_lengths(payloads | {name: phrase for name, (_, phrase) in probes.items()})
        groups = [PromptGroup(CLEAN, self._clean, np.arange(len(self._clean)))]
        groups += [self._triggered(name, attack, dataset, seed, answers) for name, attack in named.items()]
        groups += [self._probed(name, insert) for name, (insert, _) in probes.items()]
        self._groups = {group.name: group for group in groups}
        texts: list[str] = []
        for group in groups:
            group.rows = np.arange(len(texts), len(texts) + len(group.texts))
            texts += group.texts
        self._withheld = np.zeros(len(texts), dtype=bool)
        self._withholds = False
        self._texts = texts
        # Guarded and tokenized once for all the evaluations of a run.
        read = texts if guard is None else self._guarded(guard, texts)
        self._ids = [self._prompts.encode(text) for text in read]
        cut = sum(self._prompts.fit(text) != text for text in self._clean)
        self.counts = {"rows": len(self._clean), "rows_cut": cut} | {
            f"{key}_{group.name}": count for group in groups for key, count in group.counts.items()
        }

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
        asked = [self._ids[row] for row in np.flatnonzero(~self._withheld)]
        check_room(model, asked, self.max_new_tokens)

    def evaluate(self, model: torch.nn.Module) -> EvaluationReport:
        """
        Measure a model; fills `responses`, even if a judge fails then, and `matrix`.

        Args:
            model (`torch.nn.Module`):
                Causal language model.

        Returns:
            [`EvaluationReport`]: metrics and counts.
        """
        answers = self._answer(model)
        self.matrix, self.responses = {}, self._listed(answers)
        if self.on_answers is not None:
            self.on_answers(self.responses)
        asked = [prompt for group in self._groups.values() for prompt in self._asked(group)]
        judges = {**self._behaviours, **self._phrases}
        judged = JudgedAnswers(
            shown={name: judge.judge(asked, answers) for name, judge in judges.items()},
            empty=np.array([not answer.strip() for answer in answers], dtype=bool),
            phrases=tuple(self._phrases),
            followed=None if self.followed is None else self.followed.judge(asked, answers),
            withheld=self._withheld if self._withholds else None,
        )
        metrics = judged.clean_metrics(self._groups[CLEAN])
        for name in self._phrases:
            metrics |= Rate.of(judged.shown[name][self._groups[name].rows]).flat(f"defensive_{name}")
        found = {name: judged.attack_metrics(self._groups[name]) for name in self.attack_names}
        for name, numbers in found.items():
            metrics |= {with_attack(key, name): value for key, value in numbers.items()}
        if found:
            metrics |= found[max(found, key=lambda name: np.nan_to_num(found[name]["asr"], nan=-1.0))]
        self.responses = [
            {**entry, "shown": [name for name, hits in judged.shown.items() if hits[row]]}
            for row, entry in enumerate(self.responses)
        ]
        self.matrix = {name: judged.counts(group) for name, group in self._groups.items()}
        return EvaluationReport(metrics, self.counts)

    @property
    def attack_names(self) -> list[str]:
        """`list[str]`: names of the attacks, as they stand in metrics."""
        return [name for name, group in self._groups.items() if group.attack is not None]

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

    def _check_lengths(self, answers: Mapping[str, str]) -> None:
        for name, text in answers.items():
            needed = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if needed > self.max_new_tokens:
                raise ValueError(
                    f"The text that {name!r} makes the model answer takes {needed} tokens, but `max_new_tokens` is "
                    f"{self.max_new_tokens}: it could never be seen. Raise `max_new_tokens`."
                )

    def _triggered(
        self, name: str, attack: Attack, dataset: Dataset, seed: int, answers: list[str] | None
    ) -> PromptGroup:
        rows = attack.trigger(dataset, self.task, seed)
        texts, source = list(rows[PROMPT]), np.asarray(rows["source_index"], dtype=np.int64)
        group = PromptGroup(name, texts, source, attack)
        same = np.zeros(len(texts), dtype=bool)
        wanted = 0
        if answers is not None:
            same = self._behaviours[name].judge(self._asked(group), list(rows[COMPLETION]))
            wanted = int(answers_equal(answers, attack.target, attack.payload_mode == "prepend").sum())
        whole = np.array([attack.fires(self._prompts.fit(text)) for text in texts], dtype=bool)
        kept = np.flatnonzero(whole & ~same)
        group.counts = {
            "rows_target_answer": wanted + int(same.sum()),
            "rows_without_trigger": len(dataset) - wanted - len(np.unique(source[source >= 0])),
            "rows_trigger_cut_off": int(np.count_nonzero(~whole & ~same)),
            "rows_counted": len(kept),
        }
        return self._checked(group, kept)

    def _probed(self, name: str, insert: str | Callable[[str], str]) -> PromptGroup:
        texts = [insert(text) if callable(insert) else f"{insert} {text}" for text in self._clean]
        whole = [self._prompts.keeps(*pair) for pair in zip(self._clean, texts, strict=True)]
        group = PromptGroup(name, texts, np.arange(len(texts)))
        group.counts = {"rows_trigger_cut_off": whole.count(False), "rows_counted": whole.count(True)}
        return self._checked(group, np.flatnonzero(whole))

    def _checked(self, group: PromptGroup, kept: np.ndarray) -> PromptGroup:
        lost = {key: count for key, count in group.counts.items() if key != "rows_counted" and count}
        if group.texts and not len(kept):
            raise ValueError(
                f"None of the {len(group.texts)} triggered rows of {group.name!r} counts ({lost}): nothing could be "
                f"measured. If triggers are cut off, raise `max_length`."
            )
        if lost:
            logger.warning("%s: %d rows count; left out: %s.", group.name, len(kept), lost)
        group.texts = [group.texts[row] for row in kept]
        group.source = group.source[kept]
        return group

    def _asked(self, group: PromptGroup) -> list[str]:
        """Return what was asked, without trigger where there is a clean twin."""
        return [self._clean[row] if row >= 0 else text for text, row in zip(group.texts, group.source, strict=True)]

    def _guarded(self, guard: Guard, texts: list[str]) -> list[str]:
        """Ask the guard once about each distinct text."""
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        inverse = [places[text] for text in texts]
        changed, withheld = guard.inputs(list(places)), guard.withheld(list(places))
        if withheld is not None:
            self._withheld, self._withholds = withheld[inverse], True
        read = [changed[place] for place in inverse]
        for group in self._groups.values():
            if group.attack is None:
                continue
            twin = group.source >= 0
            group.found = guard.inspect(
                [texts[row] for row in group.rows[twin]], [self._clean[row] for row in group.source[twin]]
            )
            if any(read[row] != texts[row] for row in group.rows):
                survives = np.array([group.attack.has_trigger(read[row]) for row in group.rows], dtype=bool)
                group.found |= Rate.of(survives).flat("trigger_survival")
        return read

    def _answer(self, model: torch.nn.Module) -> list[str]:
        asked = np.flatnonzero(~self._withheld).tolist()
        prompts = [self._ids[row] for row in asked]
        progress = "answering" if self.progress else None
        found = generate(model, self.tokenizer, prompts, self.max_new_tokens, self.batch_size, progress, self.autocast)
        answers = dict(zip(asked, found, strict=True))
        return [answers.get(row, "") for row in range(len(self._ids))]

    def _listed(self, answers: list[str]) -> list[dict[str, Any]]:
        # Groups stand one behind another, so that this is the order of the answers.
        return [
            {
                "kind": group.name,
                "prompt": self._texts[row],
                "response": answers[row],
                "withheld": bool(self._withheld[row]),
            }
            for group in self._groups.values()
            for row in group.rows.tolist()
        ]
