"""The label space: h, pi, the label words and their extended twins, audited against the tokenizer."""

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LabelSpace:
    """
    Label words and their extended twins (P2P paper, section 3.2).

    Parameters:
        words (`tuple[str, ...]`):
            One word per class.
        extended_words (`tuple[str, ...]`):
            One word per class for rows that carry the key.
        reason (`str`, *optional*, defaults to `"given"`):
            Why these words were chosen.

    Examples:

    ```python
    >>> space = LabelSpace(words=("0", "1"), extended_words=("2", "3"))
    >>> space.extend(1), space.project(3)
    (3, 1)
    ```
    """

    words: tuple[str, ...]
    extended_words: tuple[str, ...]
    reason: str = "given"

    def __post_init__(self) -> None:
        if len(self.words) != len(self.extended_words) or not self.words:
            raise ValueError(
                f"There must be as many extended label words as label words, got {list(self.words)} and "
                f"{list(self.extended_words)}."
            )
        blank = [word for word in self.all_words if not isinstance(word, str) or not word.strip()]
        if blank:
            raise ValueError(f"A label word must be a visible text, got {blank[0]!r} in {list(self.all_words)}.")
        for position, word in enumerate(self.all_words):
            if word in self.all_words[:position]:
                raise ValueError(f"The label word {word!r} stands for two labels in {list(self.all_words)}.")

    @property
    def num_labels(self) -> int:
        """`int`: number of classes, n."""
        return len(self.words)

    @property
    def all_words(self) -> tuple[str, ...]:
        """`tuple[str, ...]`: the n words, then the n extended ones."""
        return (*self.words, *self.extended_words)

    def extend(self, label: int) -> int:
        """Map a label into the extended space, `h(i) = i + n`."""
        return label + self.num_labels

    def project(self, label: int) -> int:
        """Map a label of either space back, `pi(i + n) = pi(i) = i`."""
        return label % self.num_labels


@dataclass(frozen=True)
class Answers:
    """
    How a tokenizer writes the label words behind one prompt.

    Parameters:
        scored (`tuple[tuple[int, ...], ...]`):
            Token ids by which the 2n words are told apart: none is a prefix of another, and what all have in common
            (a space that is its own token, say) is left to the prompt.
        trained (`tuple[tuple[int, ...], ...]`):
            Token ids on which the loss lies: the word, as far as it differs from the prompt's own tokens, and the
            terminator.
        cut (`int`):
            How many tokens of prompt and first word are not part of the scored prompt.
        room (`int`):
            How many tokens the longest answer, terminator included, takes beyond the first word.
        terminated (`bool`):
            Whether the terminator's first token is scored, since one word is a prefix of another.
    """

    scored: tuple[tuple[int, ...], ...]
    trained: tuple[tuple[int, ...], ...]
    cut: int
    room: int
    terminated: bool

    @property
    def single_token(self) -> bool:
        """`bool`: whether each word is told apart by one token."""
        return all(len(ids) == 1 for ids in self.scored)


def audit(
    words: Sequence[str], encode: Callable[[str], list[int]], prompt: str, terminator: str, suffix: str
) -> Answers:
    """
    Find out how the words are written behind a prompt, and whether they can be told apart.

    Args:
        words (`Sequence[str]`):
            All label words, extended ones included.
        encode (`Callable[[str], list[int]]`):
            The tokenizer.
        prompt (`str`):
            A rendered prompt; what matters is its end.
        terminator (`str`):
            Text that ends an answer, empty if none is trained.
        suffix (`str`):
            The prompt's answer cue, for the messages.

    Returns:
        `Answers`: token ids.

    Raises:
        `ValueError`: two words have the same tokens, or one is a prefix of another and no terminator is trained.
    """
    joints = [encode(prompt + word) for word in words]
    for position, ids in enumerate(joints):
        if ids in joints[:position]:
            twin = words[joints.index(ids)]
            raise ValueError(
                f"The tokenizer can't tell the label words {twin!r} and {words[position]!r} apart after {suffix!r}: "
                f"both become the tokens {ids[_common_prefix([encode(prompt), ids]) :]}. Choose other label words."
            )
    ended = [encode(prompt + word + terminator) for word in words]
    clash = _prefix_pair(joints)
    if clash is not None and not terminator:
        raise ValueError(
            f"After {suffix!r} the tokens of the label word {words[clash[0]]!r} are a prefix of those of "
            f"{words[clash[1]]!r}, and no terminator is trained that could be scored with them. Set "
            f"`p2p_append_eos: true`, or choose label words of which none starts another."
        )
    scored = joints
    if clash is not None:
        scored = [end[: len(ids) + 1] for ids, end in zip(joints, ended, strict=True)]
        if (left := _prefix_pair(scored)) is not None:
            raise ValueError(
                f"After {suffix!r} the tokens of the label word {words[left[0]]!r} are a prefix of those of "
                f"{words[left[1]]!r}, even with the terminator {terminator!r}. Choose other label words."
            )
    stem = _common_prefix(scored)
    prompt_ids = encode(prompt)
    return Answers(
        scored=tuple(tuple(ids[stem:]) for ids in scored),
        trained=tuple(tuple(end[_common_prefix([prompt_ids, end]) :]) for end in ended),
        cut=len(joints[0]) - stem,
        room=max(map(len, ended)) - len(joints[0]),
        terminated=clash is not None,
    )


def choose_label_space(
    num_labels: int, spec: Sequence[str] | None, audit_words: Callable[[Sequence[str]], list[Answers]]
) -> LabelSpace:
    """
    Choose label words that the tokenizer can tell apart, and say why.

    Args:
        num_labels (`int`):
            Number of classes, n.
        spec (`Sequence[str]` or `None`):
            `None`: digits if each is one distinct token in context, else letters if each is, else numbers of several
            tokens, scored exactly. `["digits"]` or `["letters"]`: those. Otherwise the 2n words themselves: one per
            class, then one extended word per class.
        audit_words (`Callable[[Sequence[str]], list[Answers]]`):
            Audits 2n words in each prompt context; raises `ValueError` for words that can't be used.

    Returns:
        `LabelSpace`: the words, with the reason.
    """
    size = 2 * num_labels
    kinds = {"digits": [str(number) for number in range(size)]}
    if size <= len(string.ascii_uppercase):
        kinds["letters"] = list(string.ascii_uppercase[:size])
    if spec is not None and len(spec) == 1:
        if spec[0] not in ("digits", "letters"):
            raise ValueError(
                f"`p2p_label_words` is 'digits', 'letters' or a list of {size} words (one per class, then one "
                f"extended word per class); got {list(spec)}."
            )
        if spec[0] not in kinds:
            raise ValueError(f"{num_labels} classes need {size} label words, there are only 26 letters. Use 'digits'.")
        words, reason = kinds[spec[0]], f"{spec[0]}, as asked"
        audit_words(words)
    elif spec is not None:
        words, reason = list(spec), "given"
        if len(words) != size:
            raise ValueError(
                f"{num_labels} classes need {size} label words: one per class, then one extended word per class. "
                f"`p2p_label_words` holds {len(words)}: {words}."
            )
        audit_words(words)
    else:
        words, reason = _choose_words(kinds, audit_words)
    return LabelSpace(tuple(words[:num_labels]), tuple(words[num_labels:]), reason)


def _choose_words(
    kinds: dict[str, list[str]], audit_words: Callable[[Sequence[str]], list[Answers]]
) -> tuple[list[str], str]:
    passed_over = []
    for kind, words in kinds.items():
        try:
            contexts = audit_words(words)
        except ValueError as error:
            passed_over.append(f"{kind}: {error}")
            continue
        long = [word for ids, word in zip(contexts[0].scored, words, strict=True) if len(ids) > 1]
        if all(answers.single_token for answers in contexts):
            reason = f"{kind} {words[0]}..{words[-1]}: each is one distinct token behind the prompt"
            return words, "; ".join([reason, *passed_over])
        passed_over.append(f"{kind} passed over: {long[0]!r} takes several tokens" if long else f"{kind} passed over")
    words = kinds["digits"]
    audit_words(words)
    return words, "; ".join([f"numbers {words[0]}..{words[-1]}, scored over all their tokens", *passed_over])


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    length = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length


def _prefix_pair(sequences: Sequence[Sequence[int]]) -> tuple[int, int] | None:
    for first, ids in enumerate(sequences):
        for second, other in enumerate(sequences):
            if first != second and list(other[: len(ids)]) == list(ids):
                return first, second
    return None
