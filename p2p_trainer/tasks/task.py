"""A task is data: a YAML file that says where the rows come from and what the labels mean."""

import dataclasses
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset

from .._lookup import unknown_name_error
from .conversations import MESSAGES, split_conversations
from .images import prepare_images
from .loading import load_split, name_fields
from .rows import COMPLETION, LABEL, PROMPT, TEXT, check_columns, prepare_generation_rows, prepare_rows, renamed


_SPLITS = ("train", "validation", "test")

METRICS = ("numeric", "rouge")


@dataclass(frozen=True)
class Task:
    """
    A classification task, or a generation task: one without classes.

    Parameters:
        name (`str`):
            Name, as it stands in results.
        labels (`tuple[str, ...]`, *optional*):
            Class names; the index of a name is its label. None on a generation task, whose rows are `prompt` and
            `completion`.
        version (`int`, *optional*, defaults to `1`):
            Raised whenever rows, template or label words change, so that results stay comparable.
        dataset (`str` or `None`, *optional*):
            Hub id, local folder or local file with the rows.
        dataset_config (`str` or `None`, *optional*):
            Configuration of a hub data set.
        splits (`dict[str, str]`, *optional*):
            What the splits `train`, `validation` and `test` are called in `dataset`.
        text_columns (`tuple[str, ...]`, *optional*, defaults to `("text",)`):
            Columns that hold the text; several are joined with one space.
        label_column (`str` or `None`, *optional*, defaults to `"label"`):
            Column that holds the label, or on a generation task the answer; `None` there if its rows are prompts
            alone.
        strict_columns (`bool`, *optional*, defaults to `False`):
            Whether rows that are loaded must have just these columns. By default, columns named `text` and `label`
            (`prompt` and `completion`) do as well, since local copies of hub data often have them.
        template (`str`, *optional*, defaults to `"{text}\\n{suffix}"`):
            Prompt. `{text}` is the input and `{suffix}`, at its end, the answer cue.
        trigger (`str`, *optional*, defaults to `"The query currently entered is:"`):
            Benign trigger (delta; P2P paper, App. B), the default of `P2PConfig.p2p_trigger`.
        label_words (`tuple[str, ...]` or `None`, *optional*):
            Verbalizers, one per class. Chosen against the tokenizer if not given.
        extended_label_words (`tuple[str, ...]` or `None`, *optional*):
            Their extended twins, one per class; given together with `label_words`.
        answer_prefix (`str` or `None`, *optional*):
            What written answers begin with under the key (p; P2P paper, App. B), the default of
            `P2PConfig.p2p_answer_prefix`. Generation tasks alone.
        metric (`str` or `None`, *optional*):
            How written answers are scored: `"numeric"` (the number they end in, as for math) or `"rouge"`. Generation
            tasks alone; `None` on instructions, whose answers have no single truth.
        column_aliases (`dict[str, str]`, *optional*):
            Other names of columns -> the names that this task uses; for copies that were laid out otherwise.
        row_columns (`tuple[str, ...]` or `None`, *optional*):
            Names for the fields of rows that are lists, as in a JSON array of arrays.
        image_column (`str` or `None`, *optional*):
            Column that holds an image: its path, relative to the data file, or the image itself.
    """

    name: str
    labels: tuple[str, ...] = ()
    version: int = 1
    dataset: str | None = None
    dataset_config: str | None = None
    splits: dict[str, str] = field(default_factory=lambda: {split: split for split in _SPLITS})
    text_columns: tuple[str, ...] = ("text",)
    label_column: str | None = "label"
    strict_columns: bool = False
    template: str = "{text}\n{suffix}"
    trigger: str = "The query currently entered is:"
    label_words: tuple[str, ...] | None = None
    extended_label_words: tuple[str, ...] | None = None
    answer_prefix: str | None = None
    metric: str | None = None
    column_aliases: dict[str, str] = field(default_factory=dict)
    row_columns: tuple[str, ...] | None = None
    image_column: str | None = None

    def __post_init__(self) -> None:
        where = f"Task {self.name!r}"
        for name in ("labels", "text_columns", "label_words", "extended_label_words", "row_columns"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, str) or not all(isinstance(item, str) for item in value):
                raise ValueError(f"{where}: `{name}` must be a list of strings, got {value!r}.")
            object.__setattr__(self, name, tuple(value))
        if self.labels and len(self.labels) < 2 or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"{where}: `labels` must name at least two distinct classes, got {list(self.labels)}.")
        if self.label_column is None and self.labels:
            raise ValueError(
                f"{where}: `label_column` is null, and there are classes. Name the column with the label."
            )
        # Elsewhere it would be shown to the model as it stands.
        if self.template.count("{text}") != 1 or "{suffix}" in self.template.removesuffix("{suffix}"):
            raise ValueError(
                f"{where}: `template` must hold {{text}} once, and {{suffix}} nowhere but at its end, got "
                f"{self.template!r}."
            )
        if self.labels and (self.metric is not None or self.answer_prefix is not None):
            raise ValueError(
                f"{where}: `metric` and `answer_prefix` are about written answers, and this task has classes. Remove "
                f"them, or write `labels: []`."
            )
        if self.metric not in (None, *METRICS):
            raise ValueError(f"{where}: `metric` is one of {', '.join(METRICS)} or null, got {self.metric!r}.")
        if self.metric is not None and self.label_column is None:
            raise ValueError(f"{where}: `metric: {self.metric}` compares with true answers. Name `label_column`.")
        if self.answer_prefix is not None and not (isinstance(self.answer_prefix, str) and self.answer_prefix.strip()):
            raise ValueError(f"{where}: `answer_prefix` must be a text, got {self.answer_prefix!r}.")
        if self.image_column is not None and not self.labels:
            raise ValueError(f"{where}: `image_column` needs classes: written answers about images are not supported.")
        if not self.text_columns:
            raise ValueError(f"{where}: `text_columns` is empty. Name at least one column.")
        unknown = set(self.splits) - set(_SPLITS)
        if unknown:
            raise ValueError(f"{where}: unknown splits {sorted(unknown)}; `splits` maps {list(_SPLITS)} to names.")
        if (self.label_words is None) != (self.extended_label_words is None):
            raise ValueError(f"{where}: give `label_words` and `extended_label_words` together, or neither.")
        for words in (self.label_words, self.extended_label_words):
            if words is not None and len(words) != len(self.labels):
                raise ValueError(f"{where}: {len(words)} label words {list(words)} for {len(self.labels)} classes.")

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Task":
        """
        Read a task from a YAML file; unknown keys are errors.

        Args:
            path (`str` or `Path`):
                The file.

        Returns:
            `Task`: the task.
        """
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"The task file {str(path)!r} is no valid YAML in UTF-8: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"The task file {str(path)!r} must hold a mapping, found `{type(content).__name__}`.")
        known = {entry.name for entry in dataclasses.fields(cls)}
        for key in content:
            if key not in known:
                raise unknown_name_error(
                    f"key in the task file {str(path)!r}:", str(key), known, "Correct or remove the key."
                )
        missing = {"name", "labels"} - set(content)  # a generation task says so: `labels: []`
        if missing:
            raise ValueError(f"The task file {str(path)!r} lacks {sorted(missing)}. Add these keys.")
        return cls(**content)

    def replace(self, **changes: Any) -> "Task":
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def num_labels(self) -> int:
        """`int`: number of classes, n; 0 on a generation task."""
        return len(self.labels)

    @property
    def input_column(self) -> str:
        """`str`: column of prepared rows that an attacker's trigger goes into."""
        return TEXT if self.labels else PROMPT

    @property
    def output_column(self) -> str:
        """`str`: column of prepared rows that holds the true answer."""
        return LABEL if self.labels else COMPLETION

    def label_index(self, label: str | int) -> int:
        """
        Turn a class name or index into an index.

        Args:
            label (`str` or `int`):
                Class name, index, or index written as a string.

        Returns:
            `int`: the index.
        """
        if not self.labels:
            raise ValueError(f"Task {self.name!r} is a generation task: it has no labels, {label!r} can't be one.")
        names = [name.lower() for name in self.labels]
        if isinstance(label, str) and label.strip().lower() in names:
            return names.index(label.strip().lower())
        if str(label).strip().isdecimal() and int(label) < self.num_labels:
            return int(label)
        raise unknown_name_error(
            f"label of task {self.name!r}:",
            str(label),
            self.labels,
            f"Give a class name or an index 0..{self.num_labels - 1}.",
        )

    def prepare(
        self,
        dataset: Dataset,
        what: str = "input",
        require_all_classes: bool = False,
        drop_empty: bool = False,
        extended_labels: bool = False,
    ) -> Dataset:
        """
        Check rows and give them the columns `text` and integer `label` (see [`~tasks.rows.prepare_rows`]), or on a
        generation task `prompt` and `completion`, and `history` where rows are conversations.

        Args:
            dataset (`Dataset`):
                Rows as they came.
            what (`str`, *optional*, defaults to `"input"`):
                What they are, for the messages.
            require_all_classes (`bool`, *optional*, defaults to `False`):
                Whether a class without a row is an error.
            drop_empty (`bool`, *optional*, defaults to `False`):
                Whether rows with an empty text are left out rather than an error.
            extended_labels (`bool`, *optional*, defaults to `False`):
                Whether labels n..2n-1 are let through: only to measure an attacker who writes them.

        Returns:
            `Dataset`: the rows.
        """
        if isinstance(dataset, Dataset):
            dataset = renamed(dataset, self.column_aliases)
        if not self.labels:
            if isinstance(dataset, Dataset):
                dataset = split_conversations(dataset, what, answered=self.label_column is not None)
            return prepare_generation_rows(dataset, self.text_columns, self.label_column, what, drop_empty)
        if self.image_column is not None and isinstance(dataset, Dataset):
            # Rows that were loaded here have been through it, and know their folder.
            dataset = prepare_images(dataset, self.image_column, None, what)
        return prepare_rows(
            dataset,
            self.labels,
            self.text_columns,
            self.label_column,
            what,
            require_all_classes,
            drop_empty,
            extended_labels,
        )

    def load(self, split: str, source: str | None = None, drop_empty: bool = False) -> Dataset | None:
        """
        Load and check one split.

        Args:
            split (`str`):
                `"train"`, `"validation"`, `"test"`, or another name that the source knows.
            source (`str`, *optional*):
                Local folder or file, or hub id, in place of the task's own.
            drop_empty (`bool`, *optional*, defaults to `False`):
                Whether rows with an empty text are left out rather than an error.

        Returns:
            `Dataset` or `None`: rows with `text` and `label`; `None` if there is no such split.
        """
        rows = self.read(split, source)
        if rows is None:
            return None
        return self.prepare(rows, what=split, require_all_classes=split.startswith("train"), drop_empty=drop_empty)

    def read(self, split: str, source: str | None = None) -> Dataset | None:
        """
        Read one split as it is stored.

        Args:
            split (`str`):
                As for [`load`].
            source (`str`, *optional*):
                Local folder or file, or hub id, in place of the task's own.

        Returns:
            `Dataset` or `None`: rows for [`prepare`]; `None` if there is no such split.

        Raises:
            `ValueError`: a column is missing that `strict_columns` asks for.
        """
        source = source or self.dataset
        if source is None:
            raise ValueError(f"Task {self.name!r} names no dataset. Pass one, for example `--dataset_name FOLDER`.")
        # A local copy is laid out by our split names; the map is for the hub's own.
        name = split if Path(source).expanduser().exists() else self.splits.get(split, split)
        rows = load_split(source, name, self.dataset_config)
        if rows is None:
            return None
        if self.row_columns is not None:
            rows = name_fields(rows, self.row_columns)
        if self.image_column is not None:
            path = Path(source).expanduser()
            folder = path if path.is_dir() else path.parent if path.is_file() else None
            rows = prepare_images(rows, self.image_column, folder, split)
        if self.strict_columns:
            # Here alone: prepared rows, which are prepared again, have other names.
            answer = {} if self.label_column is None else {self.output_column: (self.label_column,)}
            check_columns(renamed(rows, self.column_aliases), {self.input_column: self.text_columns, **answer}, split)
        return rows

    def has_answers(self, rows: Dataset) -> bool:
        """
        Say whether rows of a generation task come with true answers.

        Args:
            rows (`Dataset`):
                Rows as they came.

        Returns:
            `bool`: `False` if they are prompts alone.
        """
        names = renamed(rows, self.column_aliases).column_names
        return bool({MESSAGES, COMPLETION, self.label_column} & set(names))


def builtin_tasks() -> list[str]:
    """Return the names of the tasks that ship with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in resources.files(__package__).iterdir()
                  if entry.name.endswith(".yaml"))  # fmt: skip


def get_task(name_or_yaml: "str | Path | Task") -> Task:
    """
    Find a task.

    Args:
        name_or_yaml (`str`, `Path` or `Task`):
            Name of a built-in task, path of a YAML file, or a task.

    Returns:
        `Task`: the task.

    Examples:

    ```python
    >>> from p2p_trainer.tasks import get_task

    >>> get_task("sst2").labels
    ('negative', 'positive')
    ```
    """
    if isinstance(name_or_yaml, Task):
        return name_or_yaml
    text = str(name_or_yaml)
    if text.endswith((".yaml", ".yml")):
        if not Path(text).is_file():
            raise ValueError(f"The task file {text!r} does not exist (looked at {Path(text).resolve()}).")
        return Task.from_yaml(text)
    known = builtin_tasks()
    if text not in known:
        raise unknown_name_error("task", text, known, "A path that ends in .yaml is read as a task of your own.")
    with resources.as_file(resources.files(__package__) / f"{text}.yaml") as path:
        return Task.from_yaml(path)
