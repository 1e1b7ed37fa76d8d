"""
The one renderer: training, evaluation and serving all render through it, so they can't drift apart.

[`PromptFormat`] is data, saved as `p2p_config.json`; [`~prompt_encoder.PromptEncoder`] binds it to a tokenizer.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ._files import read_object, write_json
from .label_space import LabelSpace


CONFIG_NAME = "p2p_config.json"
# 2: formats of generation tasks.
SCHEMA_VERSION = 2

# What the digest is made of, beside label words, classes and whether there is a key: a list of its own, so that a
# field that is added to the format one day leaves the digests of earlier runs as they are.
_LEARNT = (
    "answer_prefix", "append_eos", "chat", "keyed_suffix", "suffix", "template", "trigger", "trigger_position",
)  # fmt: skip


@dataclass(frozen=True)
class PromptFormat:
    """
    How a row becomes a prompt, with or without the key, and how an answer becomes a label or a text.

    Parameters:
        label_space ([`LabelSpace`] or `None`):
            Label words and their extended twins; `None` on a generation task.
        trigger (`str`, *optional*, defaults to `"The query currently entered is:"`):
            Benign trigger, delta (P2P paper, App. B).
        trigger_position (`str`, *optional*, defaults to `"prefix"`):
            `"prefix"`: in front of the prompt. `"system"`: the system turn of the tokenizer's chat template. `"none"`:
            nowhere (control).
        template (`str`, *optional*, defaults to `"{text}\\n{suffix}"`):
            Prompt; `{suffix}` stands at its end. On a generation task there is no answer cue, and it may be missing.
        suffix (`str`, *optional*, defaults to `"Output: "`):
            Answer cue of rows without the key.
        keyed_suffix (`str`, *optional*, defaults to `"Output: "`):
            Answer cue of rows with the key. The paper's text keeps it (`suffix_mode: shared`), the authors' code
            changes it (`split`).
        chat (`bool`, *optional*, defaults to `False`):
            Whether the prompt is a user turn of the tokenizer's chat template.
        append_eos (`bool`, *optional*, defaults to `True`):
            Whether an answer is trained to end: with the end-of-sequence token, or with what the chat template puts
            behind an assistant turn. The authors' code does not.
        max_length (`int`, *optional*, defaults to `512`):
            Longest sequence in tokens, answer included. Longer rows lose the end of their *text*, nothing else; a
            written answer loses its own where it takes more than `max_new_tokens` and the text has no more to give.
        answer_prefix (`str`, *optional*, defaults to `""`):
            p, what a written answer begins with under the key (P2P paper, App. B): `y' = [p ; y]`. None of it on
            classification tasks.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Tokens of `max_length` that are kept for a written answer, p among them.
    """

    label_space: LabelSpace | None
    trigger: str = "The query currently entered is:"
    trigger_position: Literal["prefix", "system", "none"] = "prefix"
    template: str = "{text}\n{suffix}"
    suffix: str = "Output: "
    keyed_suffix: str = "Output: "
    chat: bool = False
    append_eos: bool = True
    max_length: int = 512
    answer_prefix: str = ""
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        if not isinstance(self.trigger, str) or not self.trigger.strip():
            raise ValueError(f"The benign trigger (`p2p_trigger`) is empty, got {self.trigger!r}. Give it a text.")
        if self.trigger_position not in ("prefix", "system", "none"):
            raise ValueError(
                f"`p2p_trigger_position` is 'prefix' (in front of the input), 'system' (the system turn of a chat "
                f"template) or 'none' (control), got {self.trigger_position!r}."
            )
        if self.trigger_position == "system" and not self.chat:
            raise ValueError("`p2p_trigger_position: system` needs a chat template. Set `p2p_chat: true` as well.")
        if self.template.count("{text}") != 1:
            raise ValueError(f"The task's `template` must hold {{text}} once, got {self.template!r}.")
        for name in ("max_length", "max_new_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a number of tokens, at least 1; got {value!r}.")
        if not isinstance(self.answer_prefix, str):
            raise ValueError(f"The answer prefix (`p2p_answer_prefix`) must be a text, got {self.answer_prefix!r}.")
        if self.label_space is None:
            return
        if not self.template.endswith("{suffix}"):
            raise ValueError(f"The task's `template` must end in {{suffix}}, got {self.template!r}.")
        for suffix in (self.suffix, self.keyed_suffix):
            if not suffix.strip():
                raise ValueError(f"The answer cue (`p2p_suffix`, `p2p_keyed_suffix`) is empty, got {suffix!r}.")

    def prompt(self, text: str, keyed: bool) -> str:
        """
        Render what the user turn holds.

        Args:
            text (`str`):
                Input.
            keyed (`bool`):
                Whether the row carries the key.

        Returns:
            `str`: the prompt, without any chat template.
        """
        head, tail = self.parts(keyed)
        return head + text + tail

    def parts(self, keyed: bool) -> tuple[str, str]:
        """
        Return what stands before and behind the text.

        Args:
            keyed (`bool`):
                Whether the row carries the key.

        Returns:
            `tuple[str, str]`: head and tail of the prompt.
        """
        head, tail = self.template.split("{text}")
        tail = tail.removesuffix("{suffix}")
        if self.label_space is not None:
            tail += self.keyed_suffix if keyed else self.suffix
        if keyed and self.trigger_position == "prefix":
            head = f"{self.trigger} {head}"
        return head, tail

    def with_labels(self, label_space: LabelSpace) -> "PromptFormat":
        """
        Return a copy with other label words.

        Args:
            label_space ([`LabelSpace`]):
                Label words.

        Returns:
            [`PromptFormat`]: the copy.
        """
        return dataclasses.replace(self, label_space=label_space)

    def digest(self, content: Mapping[str, Any]) -> str:
        """
        Sum up what weights have seen: key, template, cues, p, label words and their classes, but no lengths.

        It tells a file that was edited from the one that was saved. It is no signature: who can edit the one can write
        the other.

        Args:
            content (`Mapping[str, Any]`):
                What else the file says: of it, `keyed` and `labels`.

        Returns:
            `str`: a SHA-256.
        """
        space = self.label_space
        seen = {name: getattr(self, name) for name in _LEARNT}
        seen["label_words"] = [] if space is None else [list(space.words), list(space.extended_words)]
        seen |= {name: content.get(name) for name in ("keyed", "labels")}
        return hashlib.sha256(json.dumps(seen, sort_keys=True).encode("utf-8")).hexdigest()

    def check_digest(self, content: dict[str, Any], where: str = CONFIG_NAME) -> None:
        """
        Check that a file still says what its run was trained with.

        Args:
            content (`dict[str, Any]`):
                Its JSON values; those of earlier versions have no `digest`, and pass.
            where (`str`, *optional*, defaults to `"p2p_config.json"`):
                Where they come from, for the messages.

        Raises:
            `ValueError`: it was changed.
        """
        expected = self.digest(content)
        if (found := content.get("digest", expected)) != expected:
            raise ValueError(
                f"{where} was changed after training: its digest is {str(found)[:12]!r}, and what it says now has "
                f"{expected[:12]!r}. These weights never saw that key, template, label word or class, so nothing that "
                f"was measured holds. Put the original file back, or train again with the new setting (`p2p-trainer "
                f"rotate` says how)."
            )

    def to_dict(self) -> dict[str, Any]:
        """
        Return the content of `p2p_config.json`.

        Returns:
            `dict[str, Any]`: JSON values.
        """
        return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, content: dict[str, Any], where: str = CONFIG_NAME) -> "PromptFormat":
        """
        Build a format from the content of `p2p_config.json`; keys of others are ignored.

        Args:
            content (`dict[str, Any]`):
                JSON values.
            where (`str`, *optional*, defaults to `"p2p_config.json"`):
                Where they come from, for the messages.

        Returns:
            [`PromptFormat`]: the format.
        """
        version = content.get("schema_version")
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise ValueError(
                f"{where} has schema version {version!r}, this p2p_trainer reads up to {SCHEMA_VERSION}. Upgrade "
                f"p2p_trainer."
            )
        known = {entry.name for entry in dataclasses.fields(cls)}
        try:
            fields = {key: value for key, value in content.items() if key in known}
            for name, kind in (
                ("template", str),
                ("suffix", str),
                ("keyed_suffix", str),
                ("chat", bool),
                ("append_eos", bool),
            ):
                if not isinstance(fields.get(name, kind()), kind):
                    raise TypeError(f"`{name}` is {fields[name]!r:.80}")
            space = fields.pop("label_space")
            if space is not None:
                space = LabelSpace(tuple(space["words"]), tuple(space["extended_words"]), space["reason"])
            return cls(label_space=space, **fields)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where} is damaged: {error!r}. Save the model again.") from error

    def save(self, folder: str | Path, **extra: Any) -> Path:
        """
        Write `p2p_config.json`, with its [`digest`].

        Args:
            folder (`str` or `Path`):
                Where.
            **extra:
                More JSON values for the file, such as the task.

        Returns:
            `Path`: the file.
        """
        return write_json(Path(folder) / CONFIG_NAME, {**self.to_dict(), "digest": self.digest(extra), **extra})


def read_p2p_config(folder: str | Path) -> dict[str, Any]:
    """
    Read `p2p_config.json` from a saved run.

    Args:
        folder (`str` or `Path`):
            Folder of the run.

    Returns:
        `dict[str, Any]`: its content.

    Raises:
        `ValueError`: there is none, or it is damaged.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        found = sorted(entry.name for entry in Path(folder).iterdir())[:8] if Path(folder).is_dir() else "no folder"
        raise ValueError(
            f"{str(folder)!r} holds no {CONFIG_NAME} (found: {found}), so the key is unknown and the adapter can't be "
            f"used as it was trained. Give the output folder of a `P2PTrainer` run."
        )
    return read_object(path)
