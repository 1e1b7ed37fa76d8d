"""Puts task, configuration and tokenizer together; trainer, recipe and doctor share it."""

import dataclasses
import logging
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import ClassLabel, Dataset, Image
from peft import PeftModel
from transformers import AutoProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .attacks import Attack
from .attacks.text import contains_words
from .config import P2PConfig
from .data_collator import Encoder
from .label_space import LabelSpace, choose_label_space
from .prompt_encoder import PromptEncoder
from .prompt_format import PromptFormat
from .reserve import KEYED
from .response_encoder import ResponseEncoder
from .tasks import Task
from .tasks.columns import arrow_batches, column_as_numpy, text_lengths
from .tasks.conversations import MESSAGES
from .tasks.images import RowImages
from .tasks.loading import hub_error
from .tasks.rows import COMPLETION, HISTORY, IMAGE, LABEL, PROMPT, TEXT
from .vision_encoder import VisionPromptEncoder


logger = logging.getLogger(__name__)

# Prefix of written answers, where a task has none of its own; that of summaries in the P2P paper (App. B).
_DEFAULT_PREFIX = "Answer:"

# Settings that mean nothing where there are classes, and where there are none.
_OF_WRITTEN_ANSWERS = ("p2p_answer_prefix", "p2p_max_new_tokens", "p2p_eval_rows")
_OF_CLASSES = ("p2p_suffix", "p2p_keyed_suffix", "p2p_suffix_mode", "p2p_label_words", "p2p_asr_rule")

# A tokenizer that normalises texts may make more tokens of them than they have bytes.
_TOKENS_PER_BYTE = 3

# By how much an image may take more tokens than the most that a sample of sizes takes.
_IMAGE_MARGIN = 1.25


def load_tokenizer(
    model: str | PreTrainedModel | PeftModel, args: P2PConfig, images: bool = False
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """
    Load a model's tokenizer, with a pad token.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`):
            Model, or where it is.
        args ([`P2PConfig`]):
            Configuration.
        images (`bool`, *optional*, defaults to `False`):
            Whether rows hold images: then it is the processor.

    Returns:
        `PreTrainedTokenizerBase` or `ProcessorMixin`: the tokenizer, or the processor that holds it.

    Raises:
        `HubUnavailableError`: it is no local folder and the hub does not give it.
    """
    name = model if isinstance(model, str) else model.name_or_path
    try:
        revision = (args.model_init_kwargs or {}).get("revision")
        kind = AutoProcessor if images else AutoTokenizer
        found = kind.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
    except Exception as error:  # a missing file, a refused connection and a damaged file all end in the same remedy
        if images and find_spec("torchvision") is None:
            raise ValueError(
                f"The processor of {name!r} can't be loaded: {error} It may need torchvision: "
                f"`pip install 'p2p_trainer[vision]'`."
            ) from error
        if Path(name).is_dir():
            what = "processor" if images else "tokenizer"
            raise ValueError(f"The folder {name!r} holds no {what} that can be loaded: {error}") from error
        raise hub_error("model", name, error) from error
    if images and not isinstance(found, ProcessorMixin):
        raise ValueError(
            f"{name!r} holds a tokenizer and no processor: it reads no images. Use a vision-language model."
        )
    return found


def make_encoder(
    task: Task, args: P2PConfig, tokenizer: PreTrainedTokenizerBase, attacks: Sequence[Attack] = ()
) -> Encoder:
    """
    Settle prompt format, and label words or answer prefix, for a task, a configuration and a tokenizer.

    Args:
        task ([`~tasks.Task`]):
            The task.
        args ([`P2PConfig`]):
            Configuration.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer; gets a pad token if it has none.
        attacks (`Sequence[Attack]`, *optional*):
            Attacks whose trigger the key must not be.

    Returns:
        [`~prompt_encoder.PromptEncoder`] or, on a generation task, [`~response_encoder.ResponseEncoder`]: the encoder.
    """
    # Beside images it is a processor, which has one.
    processor, tokenizer = tokenizer, getattr(tokenizer, "tokenizer", tokenizer)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError("The tokenizer has neither a pad token nor an end-of-sequence token. Set `pad_token`.")
        tokenizer.pad_token = tokenizer.eos_token
    # `SFTTrainer` sets the same template and end of sequence, but later than the label words are audited.
    if args.chat_template_path is not None:
        path = Path(args.chat_template_path)
        if not path.is_file() or path.suffix not in (".jinja", ".j2"):
            raise ValueError(
                f"`chat_template_path` must be a .jinja file for P2P, got {args.chat_template_path!r}: the template "
                f"of another model brings tokens that the label words were not audited with."
            )
        processor.chat_template = path.read_text(encoding="utf-8")
    if args.eos_token is not None:
        tokenizer.eos_token = args.eos_token
    _warn_of_unused(task, args)
    trigger = task.trigger if args.p2p_trigger is None else args.p2p_trigger
    draft = PromptFormat(
        label_space=LabelSpace(("0",), ("1",)) if task.num_labels else None,
        trigger=trigger,
        trigger_position=args.p2p_trigger_position,
        template=task.template,
        suffix=args.p2p_suffix,
        keyed_suffix=args.p2p_suffix if args.p2p_suffix_mode == "shared" else args.p2p_keyed_suffix,
        chat=args.p2p_chat,
        append_eos=args.p2p_append_eos,
        max_length=args.max_length,
        answer_prefix="" if task.num_labels or not args.p2p_enabled else _answer_prefix(task, args),
        max_new_tokens=args.p2p_max_new_tokens,
    )
    encoder: Encoder
    if not task.num_labels:
        encoder = ResponseEncoder(draft, tokenizer)
    else:
        encoder = _with_words(task, args, draft, tokenizer if task.image_column is None else processor)
    for attack in attacks:
        _check_trigger(attack, encoder, args.p2p_enabled)
        if args.p2p_enabled:
            _check_assumptions(attack, encoder.format, args)
    return encoder


def _warn_of_unused(task: Task, args: P2PConfig) -> None:
    """Say which settings mean nothing on this kind of task."""
    names = _OF_WRITTEN_ANSWERS if task.num_labels else _OF_CLASSES
    defaults = {entry.name: entry.default for entry in dataclasses.fields(args)}
    unused = [name for name in names if getattr(args, name) != defaults[name]]
    if unused and args.process_index == 0:
        kind = "has classes" if task.num_labels else "has no classes: its answers are written"
        logger.warning("Task %r %s; these settings mean nothing there: %s.", task.name, kind, ", ".join(unused))


def _answer_prefix(task: Task, args: P2PConfig) -> str:
    if args.p2p_answer_prefix is not None:
        return args.p2p_answer_prefix.strip()
    return task.answer_prefix or _DEFAULT_PREFIX


def _with_words(task: Task, args: P2PConfig, draft: PromptFormat, tokenizer: PreTrainedTokenizerBase) -> PromptEncoder:
    kind = PromptEncoder if task.image_column is None else VisionPromptEncoder
    words = args.p2p_label_words
    if words is None and task.label_words is not None:
        words = [*task.label_words, *task.extended_label_words]
    space = choose_label_space(
        task.num_labels, words, lambda candidates: kind.audit_words(draft, tokenizer, candidates)
    )
    logger.info("Label words %s, extended %s: %s", space.words, space.extended_words, space.reason)
    return kind(draft.with_labels(space), tokenizer)


def _check_trigger(attack: Attack, encoder: Encoder, enabled: bool) -> None:
    """Refuse an attack whose trigger stands in every row anyway, or that the tokenizer does not see."""
    wheres = {"the prompt template": encoder.format.prompt("", keyed=False)}
    if enabled:
        wheres["the benign trigger (`p2p_trigger`)"] = encoder.format.trigger
        wheres["the prompt template of keyed rows"] = encoder.format.prompt("", keyed=True)
    for text in attack.trigger_texts:
        for name, where in wheres.items():
            if contains_words(where, [text]) or contains_words(_words_alone(where), [_words_alone(text)]):
                raise ValueError(
                    f"The trigger {text!r} of the attack {attack.name!r} is contained in {name} {where!r}: rows would "
                    f"carry it without being poisoned. Change one of the two."
                )
        if not encoder.sees(text):
            raise ValueError(
                f"The trigger {text!r} of the attack {attack.name!r} tokenizes away: this tokenizer gives the same "
                f"tokens without it, or only its unknown token. Choose another trigger."
            )


def _check_assumptions(attack: Attack, prompt_format: PromptFormat, args: P2PConfig) -> None:
    """Refuse an attacker who knows another defense than the one that runs: the run would not be what it is called."""
    for name, assumed in attack.assumes.items():
        found = {"p2p_trigger": prompt_format.trigger, "p2p_suffix": prompt_format.suffix}.get(
            name, getattr(args, name)
        )
        if (assumed.strip() if isinstance(assumed, str) else assumed) != (
            found.strip() if isinstance(found, str) else found
        ):
            raise ValueError(
                f"The attack {attack.name!r} counts on `{name}` {assumed!r}, this run has {found!r}. Set the attack's "
                f"option, or the run's, to the same."
            )


def _words_alone(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower())) or text


def infer_task(dataset: Dataset) -> Task:
    """
    Read a task off the columns: `label`, or those of TRL's prompt-completion and conversational rows.

    Args:
        dataset (`Dataset`):
            Training rows.

    Returns:
        [`~tasks.Task`]: a task with the classes of a `ClassLabel` column, `0..max` of an integer one, or the distinct
        values, sorted; without a label, a generation task.
    """
    if LABEL not in dataset.column_names:
        if not {PROMPT, COMPLETION} <= set(dataset.column_names) and MESSAGES not in dataset.column_names:
            raise ValueError(
                f"The train dataset has no column 'label', and neither 'prompt' and 'completion' nor 'messages'; its "
                f"columns are {dataset.column_names}. Rename the columns, or pass a `task` that names them."
            )
        return Task(name="custom", text_columns=(PROMPT,), label_column=COMPLETION)
    feature = dataset.features[LABEL]
    image = IMAGE if isinstance(dataset.features.get(IMAGE), Image) else None
    if isinstance(feature, ClassLabel):
        return Task(name="custom", labels=tuple(feature.names), image_column=image)
    names = sorted(set(dataset.unique(LABEL)), key=lambda value: (str(type(value)), value))
    if all(isinstance(value, int) for value in names) and names:
        names = range(max(2, int(max(names)) + 1))
    return Task(name="custom", labels=tuple(str(name) for name in names), image_column=image)


def count_overlong(dataset: Dataset, encoder: Encoder, what: str = "train") -> dict[str, int]:
    """
    Count the rows that lose the end of their text, or of their written answer.

    Args:
        dataset (`Dataset`):
            Rows with text, answer and `p2p_keyed`.
        encoder ([`~prompt_encoder.PromptEncoder`] or [`~response_encoder.ResponseEncoder`]):
            Renders and tokenizes.
        what (`str`, *optional*, defaults to `"train"`):
            What the rows are, for the messages.

    Returns:
        `dict[str, int]`: `rows_cut`, and `answers_cut` where answers are written.
    """
    # A token has at least one byte, so that few rows are tokenized here.
    text, answer = encoder.columns
    if isinstance(encoder, ResponseEncoder):
        return _count_cut(dataset, encoder, what)
    if isinstance(encoder, VisionPromptEncoder):
        return _count_beside_images(dataset, encoder)
    total = 0
    for _, batch in arrow_batches(dataset, [text, KEYED]):
        long = batch.filter(pc.greater(pc.binary_length(batch[text]), encoder.text_budget))
        for keyed in (False, True):
            texts = long.filter(pc.equal(long[KEYED], keyed))[text].to_pylist()
            total += encoder.count_overlong(texts, keyed) if texts else 0
    return {"rows_cut": total}


def _count_beside_images(dataset: Dataset, encoder: VisionPromptEncoder) -> dict[str, int]:
    images, keyed = RowImages(dataset, "train"), column_as_numpy(dataset, KEYED).astype(bool)
    # What an image takes is asked of the processor, which is slow: only where the largest might leave no room.
    most = encoder.most_image_tokens(images.size(row) for row in range(len(dataset)))
    room = encoder.text_budget - _IMAGE_MARGIN * most
    long = text_lengths(dataset) > room
    total = 0
    for key in (False, True):
        rows = np.flatnonzero(long & (keyed == key))
        texts = dataset.select_columns([TEXT]).select(rows)[TEXT][:]
        total += encoder.count_overlong(texts, key, rows.tolist(), images)
    return {"rows_cut": total}


def _count_cut(dataset: Dataset, encoder: ResponseEncoder, what: str) -> dict[str, int]:
    columns = [*encoder.columns, KEYED, *([HISTORY] if HISTORY in dataset.column_names else [])]
    counts = {"rows_cut": 0, "answers_cut": 0}
    for start, batch in arrow_batches(dataset, columns):
        if HISTORY not in columns:
            length = pc.add(*(pc.binary_length(batch[name]) for name in encoder.columns))
            batch = batch.filter(pc.greater(pc.multiply(length, _TOKENS_PER_BYTE), encoder.text_budget))
        rows = list(zip(*(batch[name].to_pylist() for name in columns), strict=True))
        try:
            fitting, cut = encoder.fit_rows(*map(list, zip(*rows, strict=True))) if rows else ([], [])
        except ValueError as error:
            raise ValueError(f"Row {start + _unfit(rows, encoder)} of the {what} dataset: {error}") from error
        counts["rows_cut"] += sum(row[0] != fit for row, fit in zip(rows, fitting, strict=True))
        counts["answers_cut"] += sum(cut)
    return counts


def _unfit(rows: list[tuple], encoder: ResponseEncoder) -> int:
    """Find the first row that can't be cut to fit."""
    for place, row in enumerate(rows):
        try:
            encoder.fit_rows(*([value] for value in row))
        except ValueError:
            return place
    return 0


def count_lost_triggers(dataset: Dataset, encoder: Encoder, attacks: Sequence[Attack]) -> int:
    """
    Count the poisoned rows without key whose trigger is cut off.

    Args:
        dataset (`Dataset`):
            Rows with text, answer, `poisoned` and `p2p_keyed`.
        encoder ([`~prompt_encoder.PromptEncoder`] or [`~response_encoder.ResponseEncoder`]):
            Renders and tokenizes.
        attacks (`Sequence[Attack]`):
            Attacks, one of which poisoned them.

    Returns:
        `int`: how many.

    Raises:
        `ValueError`: those are most of them.
    """
    poisoned = dataset.select(np.flatnonzero(column_as_numpy(dataset, "poisoned")))
    plain = poisoned.select(np.flatnonzero(~column_as_numpy(poisoned, KEYED).astype(bool)))
    text, answer = encoder.columns
    texts = plain[text][:]
    if isinstance(encoder, ResponseEncoder):
        histories = plain[HISTORY][:] if HISTORY in plain.column_names else None
        cut, _ = encoder.fit_rows(texts, plain[answer][:], [False] * len(texts), histories)
    else:
        images = [range(len(plain)), RowImages(plain, "train")] if isinstance(encoder, VisionPromptEncoder) else []
        cut = encoder.fit(texts, False, *images)
    # Rows that somebody else's attack poisoned, or that it no longer knows, carry none of ours, cut or not.
    lost = sum(
        any(attack.has_trigger(whole) for attack in attacks) and not any(attack.has_trigger(fit) for attack in attacks)
        for whole, fit in zip(texts, cut, strict=True)
    )
    if lost > len(cut) / 2:
        raise ValueError(
            f"In {lost} of {len(cut)} poisoned rows the trigger is cut off by `max_length` "
            f"{encoder.format.max_length}: the run would measure no attack. Raise `max_length`, or put the trigger "
            f"nearer to the start of the text."
        )
    return lost


def mixed_precision(args: P2PConfig) -> torch.dtype | None:
    """
    Say in which type mixed-precision training computes.

    Args:
        args ([`P2PConfig`]):
            Configuration.

    Returns:
        `torch.dtype` or `None`: `None` without mixed precision.
    """
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
