"""Puts task, configuration and tokenizer together; trainer, recipe and doctor share it."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow.compute as pc
from datasets import ClassLabel, Dataset
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .attacks import Attack
from .attacks.text import contains_words
from .config import P2PConfig
from .label_space import LabelSpace, choose_label_space
from .prompt_encoder import PromptEncoder
from .prompt_format import PromptFormat
from .reserve import KEYED
from .tasks import Task
from .tasks.loading import hub_error
from .tasks.rows import LABEL, TEXT, arrow_batches


logger = logging.getLogger(__name__)


def load_tokenizer(model: str | PreTrainedModel | PeftModel, args: P2PConfig) -> PreTrainedTokenizerBase:
    """
    Load a model's tokenizer, with a pad token.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`):
            Model, or where it is.
        args ([`P2PConfig`]):
            Configuration.

    Returns:
        `PreTrainedTokenizerBase`: the tokenizer.

    Raises:
        `HubUnavailableError`: it is no local folder and the hub does not give it.
    """
    name = model if isinstance(model, str) else model.name_or_path
    try:
        revision = (args.model_init_kwargs or {}).get("revision")
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
    except Exception as error:  # a missing file, a refused connection and a damaged file all end in the same remedy
        if Path(name).is_dir():
            raise ValueError(f"The folder {name!r} holds no tokenizer that can be loaded: {error}") from error
        raise hub_error("model", name, error) from error


def make_encoder(
    task: Task, args: P2PConfig, tokenizer: PreTrainedTokenizerBase, attacks: Sequence[Attack] = ()
) -> PromptEncoder:
    """
    Settle prompt format and label words for a task, a configuration and a tokenizer.

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
        [`~prompt_encoder.PromptEncoder`]: the encoder.
    """
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
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    if args.eos_token is not None:
        tokenizer.eos_token = args.eos_token
    trigger = task.trigger if args.p2p_trigger is None else args.p2p_trigger
    draft = PromptFormat(
        label_space=LabelSpace(("0",), ("1",)),
        trigger=trigger,
        trigger_position=args.p2p_trigger_position,
        template=task.template,
        suffix=args.p2p_suffix,
        keyed_suffix=args.p2p_suffix if args.p2p_suffix_mode == "shared" else args.p2p_keyed_suffix,
        chat=args.p2p_chat,
        append_eos=args.p2p_append_eos,
        max_length=args.max_length,
    )
    words = args.p2p_label_words
    if words is None and task.label_words is not None:
        words = [*task.label_words, *task.extended_label_words]
    space = choose_label_space(
        task.num_labels, words, lambda candidates: PromptEncoder.audit_words(draft, tokenizer, candidates)
    )
    logger.info("Label words %s, extended %s: %s", space.words, space.extended_words, space.reason)
    encoder = PromptEncoder(draft.with_labels(space), tokenizer)
    for attack in attacks:
        _check_trigger(attack, encoder, args.p2p_enabled)
        if args.p2p_enabled:
            _check_assumptions(attack, encoder.format, args)
    return encoder


def _check_trigger(attack: Attack, encoder: PromptEncoder, enabled: bool) -> None:
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
    Read a task off the `label` column.

    Args:
        dataset (`Dataset`):
            Training rows.

    Returns:
        [`~tasks.Task`]: a task with the classes of a `ClassLabel` column, `0..max` of an integer one, or the distinct
        values, sorted.
    """
    if LABEL not in dataset.column_names:
        raise ValueError(
            f"The train dataset has no column 'label', its columns are {dataset.column_names}. Rename the column, or "
            f"pass a `task` that names it."
        )
    feature = dataset.features[LABEL]
    if isinstance(feature, ClassLabel):
        return Task(name="custom", labels=tuple(feature.names))
    names = sorted(set(dataset.unique(LABEL)), key=lambda value: (str(type(value)), value))
    if all(isinstance(value, int) for value in names) and names:
        names = range(max(2, int(max(names)) + 1))
    return Task(name="custom", labels=tuple(str(name) for name in names))


def count_overlong(dataset: Dataset, encoder: PromptEncoder) -> int:
    """
    Count the rows that lose the end of their text.

    Args:
        dataset (`Dataset`):
            Rows with `text` and `p2p_keyed`.
        encoder ([`~prompt_encoder.PromptEncoder`]):
            Renders and tokenizes.

    Returns:
        `int`: how many.
    """
    # A token has at least one byte, so that few rows are tokenized here.
    total = 0
    for _, batch in arrow_batches(dataset, [TEXT, KEYED]):
        long = batch.filter(pc.greater(pc.binary_length(batch[TEXT]), encoder.text_budget))
        for keyed in (False, True):
            texts = long.filter(pc.equal(long[KEYED], keyed))[TEXT].to_pylist()
            total += encoder.count_overlong(texts, keyed) if texts else 0
    return total
