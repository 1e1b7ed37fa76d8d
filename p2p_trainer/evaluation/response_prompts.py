"""The prompts of an evaluation of written answers: clean, triggered and probed, each answered once."""

import logging
from collections.abc import Callable, Mapping

import numpy as np
import torch.distributed as dist
from datasets import Dataset

from ..attacks import Attack
from ..attacks.selection import answers_equal
from ..prompt_renderer import History
from ..response_encoder import ResponseEncoder
from ..tasks import Task
from ..tasks.rows import COMPLETION, HISTORY, PROMPT
from .guard import Guard
from .judging import Judge
from .rates import Rate
from .response_rows import CLEAN, PromptGroup


logger = logging.getLogger(__name__)

Probe = tuple[str | Callable[[str], str], str]


class ResponsePrompts:
    """
    Groups of prompts, guarded and tokenized once for all the evaluations of a run.

    Args:
        dataset (`Dataset`):
            Checked clean rows.
        answered (`bool`):
            Whether their true answers are known.
        task ([`~tasks.Task`]):
            The task.
        encoder ([`~response_encoder.ResponseEncoder`]):
            Prompt format and tokenizer.
        keyed (`bool`):
            Whether the deployment adds the key.
        attacks (`Mapping[str, Attack]`):
            Attacks under their names in metrics.
        behaviours (`Mapping[str, Judge]`):
            The judge of each attack.
        probes (`Mapping[str, tuple[str or Callable[[str], str], str]]`):
            Defensive triggers.
        guard ([`~evaluation.Guard`] or `None`):
            What the deployment does to texts.
        seed (`int`):
            Seed of the test triggers.
    """

    def __init__(
        self,
        dataset: Dataset,
        answered: bool,
        task: Task,
        encoder: ResponseEncoder,
        keyed: bool,
        attacks: Mapping[str, Attack],
        behaviours: Mapping[str, Judge],
        probes: Mapping[str, Probe],
        guard: Guard | None,
        seed: int,
    ) -> None:
        self._task, self._encoder, self._keyed = task, encoder, keyed
        self.clean = list(dataset[PROMPT])
        # True answers of the clean rows, where they are known.
        self.answers = list(dataset[COMPLETION]) if answered else None
        histories: list[History] = (
            list(dataset[HISTORY]) if HISTORY in dataset.column_names else [()] * len(self.clean)
        )
        self._clean_histories = histories
        for key in {False, keyed}:
            encoder.verify(self.clean, self.answers, key, histories)
        groups = [PromptGroup(CLEAN, self.clean, np.arange(len(self.clean)))]
        groups += [self._triggered(name, attack, behaviours[name], dataset, seed) for name, attack in attacks.items()]
        groups += [self._probed(name, insert) for name, (insert, _) in probes.items()]
        self.groups = {group.name: group for group in groups}
        # Attack -> metric -> further ways to trigger it, measured beside it.
        self.variants = {
            name: {
                f"{attack.variant_metric}_{key}": self._triggered(
                    f"{name} ({key})", variant, behaviours[name], dataset, seed
                )
                for key, variant in attack.variants().items()
            }
            for name, attack in attacks.items()
        }
        groups += [group for variants in self.variants.values() for group in variants.values()]
        self.texts: list[str] = []
        for group in groups:
            group.rows = np.arange(len(self.texts), len(self.texts) + len(group.texts))
            self.texts += group.texts
        self.source = np.concatenate([group.source for group in groups])
        # What was asked, without trigger where there is a clean twin.
        self.asked = [self.clean[row] if row >= 0 else text for text, row in zip(self.texts, self.source, strict=True)]
        self.withheld = np.zeros(len(self.texts), dtype=bool)
        self.withholds = False
        read = self.texts if guard is None else self._guarded(guard)
        all_histories = [histories[row] if row >= 0 else () for row in self.source]
        self.ids = encoder.encode_prompts(read, keyed, all_histories)
        # The same weights, reached another way: without key and guard.
        self.ids_no_key = encoder.encode_prompts(self.texts, False, all_histories) if keyed else None
        cut = sum(
            fitting != text
            for text, fitting in zip(self.clean, encoder.fit(self.clean, keyed, histories), strict=True)
        )
        self.counts = {"rows": len(self.clean), "rows_cut": cut} | {
            f"{key}_{name}": count for name, group in self.groups.items() for key, count in group.counts.items()
        }

    def _triggered(self, name: str, attack: Attack, judge: Judge, dataset: Dataset, seed: int) -> PromptGroup:
        rows = attack.trigger(dataset, self._task, seed)
        texts, source = list(rows[PROMPT]), np.asarray(rows["source_index"], dtype=np.int64)
        group = PromptGroup(name, texts, source, attack)
        same = np.zeros(len(texts), dtype=bool)
        wanted = 0
        if self.answers is not None:
            asked = [self.clean[row] if row >= 0 else text for text, row in zip(texts, source, strict=True)]
            same = judge.judge(asked, list(rows[COMPLETION]))
            wanted = int(answers_equal(self.answers, attack.target, attack.payload_mode == "prepend").sum())
        histories = [self._clean_histories[row] if row >= 0 else () for row in source]
        whole = np.array([attack.fires(text) for text in self._encoder.fit(texts, self._keyed, histories)], dtype=bool)
        kept = np.flatnonzero(whole & ~same)
        group.counts = {
            "rows_target_answer": wanted + int(same.sum()),
            "rows_without_trigger": len(dataset) - wanted - len(np.unique(source[source >= 0])),
            "rows_trigger_cut_off": int(np.count_nonzero(~whole & ~same)),
            "rows_counted": len(kept),
        }
        return _checked(group, kept)

    def _probed(self, name: str, insert: str | Callable[[str], str]) -> PromptGroup:
        texts = [insert(text) if callable(insert) else f"{insert} {text}" for text in self.clean]
        whole = [
            self._encoder.keeps(text, probed, self._keyed, history)
            for text, probed, history in zip(self.clean, texts, self._clean_histories, strict=True)
        ]
        group = PromptGroup(name, texts, np.arange(len(texts)))
        group.counts = {"rows_trigger_cut_off": whole.count(False), "rows_counted": whole.count(True)}
        return _checked(group, np.flatnonzero(whole))

    def _guarded(self, guard: Guard) -> list[str]:
        """Ask the guard once about each distinct text."""
        places = {text: place for place, text in enumerate(dict.fromkeys(self.texts))}
        inverse = [places[text] for text in self.texts]
        changed, withheld = guard.inputs(list(places)), guard.withheld(list(places))
        if dist.is_initialized():
            # Nodes may round differently, and the batches must be the same everywhere.
            found = [changed, withheld]
            dist.broadcast_object_list(found, src=0)
            changed, withheld = found
        if withheld is not None:
            self.withheld, self.withholds = withheld[inverse], True
        read = [changed[place] for place in inverse]
        for group in self.groups.values():
            if group.attack is None:
                continue
            twin = group.source >= 0
            group.found = guard.inspect(
                [self.texts[row] for row in group.rows[twin]], [self.clean[row] for row in group.source[twin]]
            )
            if any(read[row] != self.texts[row] for row in group.rows):
                survives = np.array([group.attack.has_trigger(read[row]) for row in group.rows], dtype=bool)
                group.found |= Rate.of(survives).flat("trigger_survival")
        return read


def _checked(group: PromptGroup, kept: np.ndarray) -> PromptGroup:
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
