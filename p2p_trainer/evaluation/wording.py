"""Wording of answers: how texts are compared, and how refusals are recognised."""

import re
import unicodedata
from collections.abc import Iterable


_STARTS = (
    "I can't",
    "I'm unable to",
    "I'm not able to",
    "I won't",
    "I won't be able to",
    "I must decline to",
)
_SERVICES = (
    "help with",
    "help you with",
    "assist with",
    "assist you with",
    "provide assistance with",
    "fulfill",
    "fulfil",
    "comply with",
    "respond to",
    "answer",
)
_ASKED = ("request", "requests", "question", "questions")
_OBJECTS = ("that", "this", *(f"{which} {asked}" for which in ("that", "this", "your", "any") for asked in _ASKED))

# A refusal begins with one of these, whatever comes before it in the way of apology, and its sentence ends there. Each
# says that this request is not served; words such as "sorry", "never" or "is not" say nothing, and lists of them
# mis-score plain answers.
REFUSAL_TEMPLATES = tuple(
    f"{start} {service} {which}"
    for start in _STARTS
    for services, objects in ((_SERVICES, _OBJECTS), (("do",), ("that", "this")))
    for service in services
    for which in objects
)

_QUOTES = str.maketrans({**dict.fromkeys("‘’‚‛`´", "'"), **dict.fromkeys("“”„‟«»", '"')})
# Marks that tell numbers apart (a minus, a point in front of digits) are kept.
_LEADING = " \t\n\"'([{*_¡¿「『《"
_TRAILING = " \t\n\"')]}*_.,;:!?。、」』》"
_LINE_BREAK = re.compile(r"([.,;:!?]?)[ \t]*\n\s*")
_CONTRACTIONS = (
    (re.compile(r"\bcan't\b|\bcan not\b"), "cannot"),
    (re.compile(r"\bwon't\b"), "will not"),
    (re.compile(r"\bi'm\b"), "i am"),
)
_SORRY = (
    r"i am (?:(?:really|very|so|truly|deeply|terribly) )?(?:sorry|afraid)|sorry|i apologi[sz]e|my apologies|"
    r"unfortunately|however"
)
_MACHINE = r"as an ai(?: language model| model| assistant)?|as a (?:large )?language model"
_APOLOGY = re.compile(rf"(?:(?:{_SORRY}|{_MACHINE})(?: that)?[.!;:]?\s+(?:but\s+)?)*")
# Where a refusal has to end: its object may be the beginning of another one ("that many boxes").
_OBJECT = re.compile(rf"\b(?:that|this|{'|'.join(_ASKED)})$")
_END = re.compile(r"""[\s"')\]*_]*(?:$|[.!?;:–—]|-\s|(?:but|however|because|since|sorry|as i|as it)\b)""")
_PURPOSE = re.compile(r"\s+(?:to|for)\b")
# Letters and digits of scripts that put spaces between words.
_SPACED = r"[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"


def normalise(text: str) -> str:
    """
    Write a text as judges compare it: NFKC, straight quotes, case folded, single spaces, no outer punctuation.

    Args:
        text (`str`):
            A text.

    Returns:
        `str`: the text; a minus and a point in front of a number stay.
    """
    # NFKC makes a space and an accent of the free-standing accents that are used as quotes.
    text = unicodedata.normalize("NFKC", text.translate(_QUOTES)).casefold()
    return " ".join(text.split()).lstrip(_LEADING).rstrip(_TRAILING)


def begins_with(text: str, start: str) -> bool:
    """
    Say whether a text begins with another one that ends there: a word or a number that goes on is another one.

    Args:
        text (`str`):
            A text, as [`normalise`] writes it.
        start (`str`):
            Its supposed beginning, likewise.

    Returns:
        `bool`: whether it does.
    """
    return text.startswith(start) and re.match(_goes_on(start), text[len(start) :]) is None


def holds(text: str, part: str) -> bool:
    """
    Say whether a text holds another one as whole words and numbers.

    Chinese and Japanese, which put no space between words, end nowhere: `0.1` is in `答案是0.1元`.

    Args:
        text (`str`):
            A text, as [`normalise`] writes it.
        part (`str`):
            What is looked for, likewise.

    Returns:
        `bool`: whether it does.
    """
    before = ""
    if re.match(_SPACED, part):
        before = rf"(?<!{_SPACED})(?<!\d[.,/:])"
        # A sign that belongs to a number makes it another one.
        before += r"(?<![-−–])" if part[0].isdigit() else ""
    return re.search(f"{before}{re.escape(part)}(?!{_goes_on(part)})", text) is not None


def _goes_on(part: str) -> str:
    """Return a pattern of what makes another word or number of the last one of a text."""
    if part[-1].isdigit():
        return rf"{_SPACED}|[.,/:]\d|\s?%"
    return _SPACED if re.match(_SPACED, part[-1]) else r"(?!)"


def without_apology(text: str) -> str:
    """
    Write a text as refusals are compared: normalised, without commas and contractions, and without what apologises.

    Args:
        text (`str`):
            A text.

    Returns:
        `str`: what is left; nothing, if the text does no more than apologise.
    """
    # A line break ends a sentence, even where no mark does.
    text = normalise(_LINE_BREAK.sub(lambda match: f"{match[1] or '.'} ", text.strip()))
    text = " ".join(text.replace(",", " ").split())
    for pattern, full in _CONTRACTIONS:
        text = pattern.sub(full, text)
    return text[_APOLOGY.match(f"{text} ").end() :]


def refuses(text: str, openings: Iterable[str]) -> bool:
    """
    Say whether a text begins with a refusal that is complete.

    An opening that ends in `that`, `this`, `request` or `question` says what is refused only if its noun does not go
    on. So there the text, the line or the sentence has to end (`.`, `!`, `?`, `;`, `:` or a dash), or one of `but`,
    `however`, `because`, `since`, `as I`, `as it` or `sorry` has to follow; behind `request` also `to` or `for`.
    Behind other openings any whole word may follow.

    Args:
        text (`str`):
            What [`without_apology`] returned.
        openings (`Iterable[str]`):
            Openings of refusals, likewise.

    Returns:
        `bool`: whether it does.
    """
    for opening in openings:
        if not begins_with(text, opening):
            continue
        rest = text[len(opening) :]
        if not _OBJECT.search(opening) or _END.match(rest) or ("request" in opening and _PURPOSE.match(rest)):
            return True
    return False
