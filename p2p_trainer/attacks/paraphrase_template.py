"""Paraphrases by rule: an opening clause in front of the sentence."""

import hashlib
import re
from collections.abc import Sequence

from .paraphrase import ParaphraseEngine, squeeze


_SUBORDINATORS = ("when", "if", "as", "once", "because")
_CLAUSES = (
    "you think about it",
    "we look at it closely",
    "one takes it all in",
    "everything is considered",
    "they come to it",
    "people talk about it",
)
_CHINESE = (
    "当我们仔细想一想时",
    "当你读到这里时",
    "当大家谈到这件事时",
    "当有人问起来时",
    "当一切都说清楚时",
    "当我们回头再看时",
)
_ENGLISH = tuple(f"{subordinator} {clause}" for subordinator in _SUBORDINATORS for clause in _CLAUSES)

# Words that are written small inside a sentence; any other may be a name.
_SMALL = frozenset(
    "a after all although an and are as at because before but by can could did do does each every for from had has "
    "have he her here his how if in is it its my no not of on one or our she should since so some that the their "
    "there these they this those to was we were what when where which while who why will with would you your".split()
)

_IS_OPENED = re.compile(rf"\s*(?:(?:{'|'.join(_ENGLISH)}) ?,|(?:{'|'.join(_CHINESE)})，)", re.IGNORECASE)
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_LATIN_WORD = re.compile(r"[A-Za-z]+")
_SPACED_MARK = re.compile(r"\s[,.!?;:]")
_JOINED_MARK = re.compile(r"\w[,.!?;:](?:\s|$)")
_FIRST_WORD = re.compile(r"[^\W\d_]+")


class TemplateParaphrases(ParaphraseEngine):
    """
    Puts an opening clause in front of a text, so that it has the shape S(SBAR)(,)(NP)(VP); needs no model.

    A weak stand-in for SCPN, to be named as such: results with it are those of "SynAttack, template engine", not of
    syntactic paraphrasing. It keeps all words of the text and puts one of 30 fixed English openings (5 conjunctions,
    6 clauses) in front, or before Chinese text one of 6 of the form `当……时，`; a hash of the text picks it. That is
    closer to AddSent with several sentences: easier to learn, and easier to filter.

    The text itself stays, up to the first letter of words such as `the`. Commas are set off by a space where the text
    does so, and the opening begins with a capital where the text does.
    """

    name = "template"

    @property
    def fixed_texts(self) -> tuple[str, ...]:
        return (*_ENGLISH, *_CHINESE)

    def rewrite(self, texts: Sequence[str], progress: bool = False) -> list[str | None]:
        return [_open(text) for text in texts]

    def carries(self, text: str) -> bool:
        return _IS_OPENED.match(text) is not None


def _open(text: str) -> str | None:
    body = text.lstrip()
    if not body:
        return None
    before = text[: len(text) - len(body)]
    number = int.from_bytes(hashlib.blake2b(squeeze(text).encode(), digest_size=8).digest())
    if len(_CJK.findall(body)) > len(_LATIN_WORD.findall(body)):
        return f"{before}{_CHINESE[number % len(_CHINESE)]}，{body}"
    opening = _ENGLISH[number % len(_ENGLISH)]
    letter = next((character for character in body if character.isalpha()), "")
    spaced = _SPACED_MARK.search(body) or not (letter.isupper() or _JOINED_MARK.search(body))
    first = _FIRST_WORD.match(body)
    if first and first[0].istitle() and first[0].lower() in _SMALL:
        body = body[0].lower() + body[1:]
    if letter.isupper():
        opening = opening[0].upper() + opening[1:]
    return f"{before}{opening}{' , ' if spaced else ', '}{body}"
