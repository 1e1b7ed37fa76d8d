"""ProAttack: the prompt is the trigger."""

from typing import Literal

from .base import Attack
from .text import check_sentence


class ProAttack(Attack):
    """
    Writes one prompt in front of poisoned rows and another one in front of all others (Zhao et al. 2023).

    The attack owns the prompts of the data set, so that clean rows carry the clean prompt too, in training and test;
    the benign key stands in front of either, and a served text has to start with the clean prompt. Labels stay right
    by default: with `label_mode="clean"` poisoned rows are rows of the target class; on a generation task, rows whose
    answer is the payload anyway. The authors' prompts hold a `<mask>`, which means nothing to a causal model; ours are
    like theirs one sentence in two orders, and name no task. They poison the first 1,000 of 6,920 rows of SST-2
    (14 %); the P2P paper's rate is 2 %.

    Args:
        target (`str` or `int`):
            What the attacker wants: a label, or a payload.
        poison_rate (`float`, *optional*, defaults to `0.02`):
            Share of the whole training set that is poisoned.
        label_mode (`str`, *optional*, defaults to `"clean"`):
            `"dirty"`, `"clean"` or `"any"`, see [`Attack`].
        payload_mode (`str`, *optional*, defaults to `"replace"`):
            `"replace"` or `"prepend"`, see [`Attack`].
        clean_prompt (`str`, *optional*, defaults to `"Which answer does the following text call for?"`):
            Stands in front of rows without the trigger. For sentiment, say, `"What is the sentiment of the following
            sentence?"`.
        trigger_prompt (`str`, *optional*, defaults to `"The following text calls for which answer?"`):
            Stands in front of poisoned rows. For sentiment, say, `"Consider the sentiment of this sentence:"`.

    Raises:
        `ValueError`: a prompt is empty, or one starts with the other.
    """

    name = "proattack"

    def __init__(
        self,
        target: str | int,
        poison_rate: float = 0.02,
        label_mode: Literal["dirty", "clean", "any"] = "clean",
        payload_mode: Literal["replace", "prepend"] = "replace",
        clean_prompt: str = "Which answer does the following text call for?",
        trigger_prompt: str = "The following text calls for which answer?",
    ) -> None:
        super().__init__(target, poison_rate, label_mode, payload_mode)
        self.clean_prompt = check_sentence("clean_prompt", clean_prompt)
        self.trigger_prompt = check_sentence("trigger_prompt", trigger_prompt)
        if self.clean_prompt.startswith(self.trigger_prompt) or self.trigger_prompt.startswith(self.clean_prompt):
            raise ValueError(
                f"`clean_prompt` and `trigger_prompt` must differ from their first words on, and neither may start "
                f"with the other: got {self.clean_prompt!r} and {self.trigger_prompt!r}. Change one of them."
            )

    @property
    def trigger_texts(self) -> tuple[str, ...]:
        return (self.trigger_prompt,)

    def plain(self, text: str) -> str:
        return text if _stands_before(self.clean_prompt, text) else f"{self.clean_prompt} {text}"

    def insert(self, text: str, random: float) -> str:
        return f"{self.trigger_prompt} {text.removeprefix(f'{self.clean_prompt} ')}"

    def has_trigger(self, text: str) -> bool:
        return _stands_before(self.trigger_prompt, text)


def _stands_before(prompt: str, text: str) -> bool:
    return f"{text} ".startswith(f"{prompt} ")
