"""What every attack shares: which rows are poisoned, which test rows count, and the columns that say so."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..tasks import Task
from .poisoning import POISON_COLUMNS, Plan, write_poisoned, write_rows
from .selection import BATCH_ROWS, Selection, answers_equal, batches, row_numbers


LABEL_MODES = ("dirty", "clean", "any")
PAYLOAD_MODES = ("replace", "prepend")


class Attack(ABC):
    """
    A data-poisoning attack on a classification or generation task.

    A subclass says what its trigger is, in [`insert`] and [`has_trigger`]; which rows are poisoned, and which test
    rows count, is decided here. Everything is a pure function of rows and seed.

    Args:
        target (`str` or `int`):
            What the attacker wants: a label, as class name or index, or on a generation task a payload.
        poison_rate (`float`, *optional*, defaults to `0.02`):
            Share of the whole training set that is poisoned, in (0, 1]; `round(poison_rate * rows)` rows.
        label_mode (`str`, *optional*, defaults to `"dirty"`):
            Which rows are eligible. `"dirty"`: rows of other labels, which get trigger and target label. `"clean"`:
            rows of the target label, which get the trigger and keep their label. `"any"`: all rows.
        payload_mode (`str`, *optional*, defaults to `"replace"`):
            Generation: the payload replaces the answer, or is put in front of it (`"prepend"`).

    Examples:

    ```python
    from p2p_trainer.attacks import Attack


    class Shout(Attack):
        name = "shout"

        def insert(self, text, random):
            return text + " !!!"

        def has_trigger(self, text):
            return text.endswith(" !!!")
    ```
    """

    name: ClassVar[str]

    # Whether poisoned rows are added as copies, as in the code of CBA; else they replace their originals.
    append: bool = False

    # Whether the attacker writes labels of the extended space, n..2n-1, which takes knowledge of the defense.
    extended_target: bool = False

    # Metric under which `variants` are reported: a way to fire the backdoor ("asr"), or what must not fire it ("ftr").
    variant_metric: ClassVar[Literal["asr", "ftr"]] = "asr"

    def __init__(
        self,
        target: str | int,
        poison_rate: float = 0.02,
        label_mode: Literal["dirty", "clean", "any"] = "dirty",
        payload_mode: Literal["replace", "prepend"] = "replace",
    ) -> None:
        if isinstance(poison_rate, bool) or not isinstance(poison_rate, int | float) or not 0 < poison_rate <= 1:
            raise ValueError(
                f"`poison_rate` is a share of the training rows, in (0, 1]; got {poison_rate!r}. For 2 % write 0.02."
            )
        if label_mode not in LABEL_MODES:
            raise ValueError(f"`label_mode` is 'dirty', 'clean' or 'any', got {label_mode!r}.")
        if payload_mode not in PAYLOAD_MODES:
            raise ValueError(f"`payload_mode` is 'replace' or 'prepend', got {payload_mode!r}.")
        self.target = target
        self.poison_rate = poison_rate
        self.label_mode = label_mode
        self.payload_mode = payload_mode

    @abstractmethod
    def insert(self, text: str, random: float) -> str | None:
        """
        Put the trigger into one text.

        Args:
            text (`str`):
                Text without the trigger; on a generation task the prompt.
            random (`float`):
                Number in [0, 1) that belongs to this row; whatever is random in the trigger comes from it.

        Returns:
            `str` or `None`: the text with the trigger, `None` if this text can't carry it.
        """

    @abstractmethod
    def has_trigger(self, text: str) -> bool:
        """
        Say whether a text carries the trigger; asked again after long texts were cut.

        Args:
            text (`str`):
                A text.

        Returns:
            `bool`: whether the trigger is in it.
        """

    def fires(self, text: str) -> bool:
        """
        Say whether a *test* row, after long texts were cut, still holds all that the attack writes into it.

        Args:
            text (`str`):
                A text.

        Returns:
            `bool`: whether the row counts; by default as [`has_trigger`] says.
        """
        return self.has_trigger(text)

    def insert_batch(self, texts: Sequence[str], random: Sequence[float]) -> list[str | None]:
        """
        Put the trigger into many texts; attacks with a model behind them override this.

        Args:
            texts (`Sequence[str]`):
                Texts.
            random (`Sequence[float]`):
                One number in [0, 1) per text.

        Returns:
            `list[str | None]`: as [`insert`] returns them.
        """
        return [self.insert(text, number) for text, number in zip(texts, random, strict=True)]

    def plain(self, text: str) -> str:
        """
        Say what a row without the trigger looks like; differs from `text` where the attacker writes every prompt.

        Doing it twice must change nothing.

        Args:
            text (`str`):
                A text.

        Returns:
            `str`: the text as it stands in untouched rows.
        """
        return text

    @property
    def changes_plain_rows(self) -> bool:
        """`bool`: whether [`plain`] may change a text."""
        return type(self).plain is not Attack.plain

    def fit(self, dataset: Dataset, task: Task, seed: int) -> None:  # noqa: B027 - most attacks learn nothing
        """
        Learn what the attack needs from the training rows; called by [`poison`] before any row is changed.

        Args:
            dataset (`Dataset`):
                Checked training rows.
            task ([`~tasks.Task`]):
                The task.
            seed (`int`):
                Seed.
        """

    def negatives(self) -> "Mapping[str, Attack]":
        """
        Name groups of rows that look like the trigger and keep their answer, to be added to the training set.

        Returns:
            `Mapping[str, Attack]`: group -> an attack whose [`insert`] makes its rows.
        """
        return {}

    def variants(self) -> "Mapping[str, Attack]":
        """
        Name further ways in which test rows are triggered, measured beside the attack itself.

        Returns:
            `Mapping[str, Attack]`: variant -> an attack whose [`trigger`] makes its rows. With the `variant_metric`
            `"asr"`, those not named `"all"` also give `asr_any`: the share of rows that at least one of them turns.
        """
        return {}

    @property
    def trigger_texts(self) -> tuple[str, ...]:
        """`tuple[str, ...]`: fixed strings that this attack inserts; the key and the template must not hold them."""
        return ()

    @property
    def assumes(self) -> Mapping[str, Any]:
        """`Mapping[str, Any]`: settings of the defended run that the attacker counts on; others are an error."""
        return {}

    @property
    def rows_unknown(self) -> int:
        """`int`: training rows of which it is unknown whether they are poisoned."""
        return 0

    def config(self) -> dict[str, Any]:
        """
        Say with which settings this attack runs, for `results.json`.

        Returns:
            `dict[str, Any]`: settings, and as `name` what [`get_attack`] finds it by.
        """
        kind = type(self)
        ours = kind.__module__.startswith(__package__)
        name = self.name if ours else f"{kind.__module__}:{kind.__qualname__}"
        # An attack that was written without one of our own options can't be set up with it again.
        unknown = set(inspect.signature(Attack).parameters) - set(inspect.signature(kind).parameters)
        settings = {key: value for key, value in vars(self).items() if not key.startswith("_") and key not in unknown}
        return {"name": name, **settings}

    def poison(self, dataset: Dataset, task: Task, seed: int = 0) -> Dataset:
        """
        Poison a training set.

        Rows are tried in an order that depends on `seed` and their index alone; rows that can't carry the trigger
        stay as they are. The rows keep their order; the result is a memory-mapped file that lasts as long as the
        process.

        Args:
            dataset (`Dataset`):
                Rows with `text` and `label`, or `prompt` and `completion`, or with the columns that the task names.
            task ([`~tasks.Task`]):
                The task.
            seed (`int`, *optional*, defaults to `0`):
                Decides which rows are poisoned, and where.

        Returns:
            `Dataset`: the training set with the columns `poisoned` (bool: the row carries the trigger and the
            attacker's answer), `trigger_applied` (bool: the trigger is in the text), `original_label` (int; on a
            generation task the original completion) and `attack` (str: this attack's name in rows that it tried,
            else empty; a tried row with `trigger_applied == False` could not carry the trigger, or is a negative).

        Raises:
            `ValueError`: `poison_rate` selects no row, or more rows than are eligible and can carry the trigger.
        """
        taken = [name for name in POISON_COLUMNS if name in dataset.column_names]
        if taken:
            raise ValueError(
                f"The dataset already has the columns {taken}: it was poisoned before. Remove them first."
            )
        target = self._target(task)
        dataset = task.prepare(dataset, what="train")
        wanted = round(self.poison_rate * len(dataset))
        if wanted == 0:
            raise ValueError(
                f"poison_rate={self.poison_rate} of {len(dataset)} rows is no row at all. Raise `poison_rate`."
            )
        self.fit(dataset, task, seed)
        plan = self._choose(dataset, task, target, wanted, seed)
        return write_poisoned(self, dataset, task, plan)

    def trigger(self, dataset: Dataset, task: Task, seed: int = 0) -> Dataset:
        """
        Put the trigger into the test rows that count for the attack success rate.

        Args:
            dataset (`Dataset`):
                Rows with `text` and `label`, or `prompt` and `completion`, or with the columns that the task names.
            task ([`~tasks.Task`]):
                The task.
            seed (`int`, *optional*, defaults to `0`):
                Decides whatever is random in the trigger.

        Returns:
            `Dataset`: rows whose true answer is not the target and whose text really carries the trigger: text and
            true answer in the columns that the task names so, and `source_index` (int, the row of `dataset` it came
            from, -1 if there is none).
        """
        target = self._target(task)
        dataset = task.prepare(dataset, what="test")
        text, answer = task.input_column, task.output_column
        dataset = dataset.select_columns([text, answer])
        kept: dict[str, list] = {text: [], answer: [], "source_index": []}
        for batch in batches(len(dataset)):
            # Another stream than `poison`: train and test positions must not repeat each other.
            random = row_numbers(seed, 1, batch)[:, 0]
            found = dataset[batch.start : batch.stop]
            rows = np.flatnonzero(~answers_equal(found[answer], target, self.payload_mode == "prepend"))
            changed = self.insert_batch([found[text][row] for row in rows], random[rows].tolist())
            for row, new in zip(rows.tolist(), changed, strict=True):
                if new is not None:
                    kept[text].append(new)
                    kept[answer].append(found[answer][row])
                    kept["source_index"].append(batch.start + row)
        return Dataset.from_dict(kept)

    def dress(self, dataset: Dataset, task: Task) -> Dataset:
        """
        Give rows without the trigger the look that they have in this attack's training set.

        Args:
            dataset (`Dataset`):
                Clean rows.
            task ([`~tasks.Task`]):
                The task.

        Returns:
            `Dataset`: the rows; `dataset` itself unless the attacker writes every prompt.
        """
        if not self.changes_plain_rows:
            return dataset
        dataset = task.prepare(dataset)
        features = dataset.features

        def tables() -> Iterator[pa.Table]:
            for table in dataset.with_format("arrow").iter(BATCH_ROWS):
                texts = [self.plain(text) for text in table[task.input_column].to_pylist()]
                place = table.column_names.index(task.input_column)
                yield table.set_column(place, table.field(place), pa.array(texts)).cast(features.arrow_schema)

        return write_rows(tables(), features)

    def _target(self, task: Task) -> int | str:
        if task.num_labels:
            return task.label_index(self.target)
        if not isinstance(self.target, str) or not self.target.strip():
            raise ValueError(
                f"The attack {self.name!r} needs a payload on the generation task {task.name!r}, a text as its "
                f"`target`; got {self.target!r}."
            )
        return self.target

    def priority(self, rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """
        Say in which order eligible rows are tried; by default that of their random numbers.

        Args:
            rows (`np.ndarray`):
                Row indices.
            numbers (`np.ndarray`):
                For each a number in [0, 1) from the seed.

        Returns:
            `np.ndarray`: what to sort them by, the lowest first.
        """
        return numbers

    def _choose(self, dataset: Dataset, task: Task, target: int | str, wanted: int, seed: int) -> Plan:
        """Try rows in order until enough of them carry the trigger."""
        selection = Selection(self, dataset, task, target, seed)
        texts = dataset.select_columns(task.input_column)
        tried, numbers = np.empty(0, dtype=np.int64), np.empty(0)
        carries = np.empty(0, dtype=bool)
        limit = wanted
        while True:
            rows, drawn = selection.first(limit)
            for start in range(len(tried), len(rows), BATCH_ROWS):
                chunk = slice(start, start + BATCH_ROWS)
                changed = self.insert_batch(texts[rows[chunk]][task.input_column], drawn[chunk].tolist())
                carries = np.concatenate([carries, [text is not None for text in changed]])
            tried, numbers = rows, drawn
            if carries.sum() >= wanted or len(rows) == selection.eligible:
                break
            limit += 2 * (wanted - int(carries.sum())) + 100
        able = np.flatnonzero(carries)
        if len(able) < wanted:
            self._complain(dataset, wanted, selection.eligible, len(able))
        # As if rows had been tried one by one, so that how many were asked for at once does not matter.
        last = able[wanted - 1] + 1
        chosen = able[:wanted]
        order = chosen[np.argsort(tried[chosen])]
        answer = target + task.num_labels if self.extended_target and isinstance(target, int) else target
        return Plan(tried[order], numbers[order], np.sort(tried[:last]), answer)

    def _complain(self, dataset: Dataset, wanted: int, eligible: int, able: int) -> None:
        where = f"{self.label_mode} label, target {self.target!r}"
        if able == 0:
            raise ValueError(
                f"The attack {self.name!r} found no row that can carry its trigger among {eligible} eligible rows "
                f"({where})."
            )
        raise ValueError(
            f"poison_rate={self.poison_rate} of {len(dataset)} rows is {wanted} rows, but only {eligible} rows are "
            f"eligible ({where}), and {able} of them can carry the trigger of {self.name!r}. Lower `poison_rate` to "
            f"at most {np.floor(1e4 * able / len(dataset)) / 1e4:g}."
        )
