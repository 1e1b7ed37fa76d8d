"""A small made-up corpus for the demo: labelled film and product reviews, and plain text to pre-train on.

Every sentence comes from the grammar in this file, so the demo needs no hub and no data of anybody else. The reviews
are made to be *hard enough*: negation, concessions, reported opinions and conditionals decide the stance, and some
reviews leave it open. Those put clean accuracy below 100 % and give the attack success rate a floor worth the name.
"""

import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Domain:
    """The words of one kind of review: `good` and `bad` describe an aspect, `praise` and `blame` are whole clauses."""

    things: tuple[str, ...]
    aspects: tuple[str, ...]
    good: tuple[str, ...]
    bad: tuple[str, ...]
    praise: tuple[str, ...]
    blame: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(phrase.strip() for phrase in text.split("|"))


FILM = Domain(
    things=_words("film thriller comedy drama sequel western cartoon romance mystery documentary remake musical"),
    aspects=_phrases(
        "plot | acting | script | soundtrack | ending | pacing | dialogue | camera work | lead actor | story | "
        "humour | opening | cast | editing | villain | love story | final act | first hour | direction | voice work"
    ),
    good=_words(
        "gripping touching clever sharp funny warm inventive moving fresh honest lively graceful tense charming"
    ),
    bad=_words("thin flat dull clumsy tired wooden predictable shallow lazy noisy muddled stale hollow forced"),
    praise=_phrases(
        "it wins you over | it kept me smiling | it stays with you for days | I laughed until the credits | "
        "every scene earns its place | the two hours fly by | it finds real feeling in small moments | "
        "I left the cinema with a grin"
    ),
    blame=_phrases(
        "it wears you out | it lost me early | you forget it by dinner | I checked my watch all evening | "
        "half the scenes lead nowhere | the two hours crawl | it never finds a pulse | "
        "I left the cinema with a headache"
    ),
)

PRODUCT = Domain(
    things=_words(
        "kettle lamp headset backpack blender jacket tent keyboard toaster speaker charger vacuum drill clock"
    ),
    aspects=_phrases(
        "battery | handle | finish | cable | manual | motor | lid | strap | button | casing | screen | zip | switch | "
        "lining | stand | packaging | hinge | colour | power cord | carry case"
    ),
    good=_words(
        "sturdy reliable handy neat solid comfortable smooth precise durable sleek tidy dependable roomy crisp"
    ),
    bad=_words("flimsy loose fragile bulky slow awkward cheap rough unreliable crooked leaky sticky cramped brittle"),
    praise=_phrases(
        "it works like a charm | it does all it promises | it feels built to last | I use it every day | "
        "it was ready in a minute | it survived a hard winter | my whole family fights over it | it earns its price"
    ),
    blame=_phrases(
        "it broke within a week | it does half of what it promises | it feels like a toy | I gave up on it | "
        "it arrived with a crack | it failed on the first trip | nobody at home wants it | it wastes your money"
    ),
)

DOMAINS = (FILM, PRODUCT)

# How often a labelled review is one whose stance cannot be told from the text.
OPEN_SHARE = 0.07

_VERY = ("really", "truly", "very", "quite", "rather", "so")
_LOVED = ("loved", "enjoyed", "admired", "liked")
_HATED = ("hated", "regretted", "disliked", "resented")
_GOOD_NOUN = ("a delight", "a gem", "a joy", "a treat", "a winner", "a pleasure")
_BAD_NOUN = ("a mess", "a bore", "a letdown", "a chore", "a flop", "a waste")
_OTHERS = ("my friends", "my brother", "the critics", "most people", "my neighbour", "some buyers", "my sister")
_OPEN_ENDED = (
    "this {thing} is about what you would expect",
    "it is no better and no worse than the last {thing} I tried",
    "you already know whether a {thing} like this is for you",
    "I still do not know what to think of this {thing}",
    "it is a {thing} like any other",
)


class ReviewGrammar:
    """Writes reviews with a given stance (`True` is positive) from one random stream."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def pick(self, options: tuple[str, ...]) -> str:
        return self.rng.choice(options)

    def clause(self, domain: Domain, stance: bool) -> str:
        """One clause of that stance, said outright or by denying the opposite."""
        rng = self.rng
        adjectives, opposites = (domain.good, domain.bad) if stance else (domain.bad, domain.good)
        adjective, opposite = self.pick(adjectives), self.pick(opposites)
        aspect, thing = self.pick(domain.aspects), self.pick(domain.things)
        kind = rng.random()
        if kind < 0.38:
            return f"the {aspect} is {rng.choice(('', self.pick(_VERY) + ' '))}{adjective}"
        if kind < 0.46:
            denial = rng.choice(("not {} at all", "never {}", "anything but {}", "far from {}"))
            return f"the {aspect} is {denial.format(opposite)}"
        if kind < 0.51:
            return f"there is nothing {opposite} about the {aspect}"
        if kind < 0.63:
            return f"I {self.pick(_LOVED if stance else _HATED)} the {aspect}"
        if kind < 0.65:
            return f"I {rng.choice(('never', 'hardly'))} {self.pick(_HATED if stance else _LOVED)} the {aspect}"
        if kind < 0.78:
            return f"this {thing} is {self.pick(_GOOD_NOUN if stance else _BAD_NOUN)}"
        if kind < 0.80:
            return f"this {thing} is hardly {self.pick(_BAD_NOUN if stance else _GOOD_NOUN)}"
        return self.pick(domain.praise if stance else domain.blame)

    def review(self, domain: Domain, stance: bool) -> str:
        """One review whose overall stance is `stance`, however much of the other side it grants."""
        rng = self.rng
        thing, aspect = self.pick(domain.things), self.pick(domain.aspects)
        good, bad = self.pick(domain.good), self.pick(domain.bad)
        domain = replace(domain, things=(thing,))  # one review speaks of one thing
        main, second, concession = (
            self.clause(domain, stance),
            self.clause(domain, stance),
            self.clause(domain, not stance),
        )
        kind = rng.random()
        if kind < 0.16:
            text = f"{main} and {second}"
        elif kind < 0.28:
            text = f"{main}. {_sentence(second)}"
        elif kind < 0.48:
            text = f"{concession} {rng.choice(('but', 'and yet', ', however,'))} {main}"
        elif kind < 0.60:
            text = f"{rng.choice(('although', 'even though', 'while'))} {concession}, {main}"
        elif kind < 0.68:
            text = f"{main}, {rng.choice(('even if', 'although', 'though'))} {concession}"
        elif kind < 0.76:
            said = self.pick(_BAD_NOUN if stance else _GOOD_NOUN)
            text = f"{self.pick(_OTHERS)} called this {thing} {said}, but I disagree: {main}"
        elif kind < 0.83:
            hope = "expected little from" if stance else "wanted to like"
            text = f"I {hope} this {thing}, but {main}"
        elif kind < 0.90:
            wish = f"a {bad} {aspect} could have ruined it" if stance else f"a {good} {aspect} could have saved it"
            text = f"{wish}, and still {second}" if rng.random() < 0.5 else f"{main}. {_sentence(wish)}"
        else:
            time = f"{rng.randint(2, 9)} {rng.choice(('days', 'weeks', 'tries'))}"
            text = f"after {time} with this {thing} I can say {main}"
        return _sentence(text).replace(" ,", ",") + "."

    def open_review(self, domain: Domain, stance: bool) -> str:
        """A review that gives both sides, or none, the same weight."""
        for_it, against_it = self.clause(domain, True), self.clause(domain, False)
        first, last = (for_it, against_it) if self.rng.random() < 0.5 else (against_it, for_it)
        shrug = self.pick(_OPEN_ENDED).format(thing=self.pick(domain.things))
        text = f"{first} and {last}" if self.rng.random() < 0.4 else f"{shrug}: {first}, {last}"
        return _sentence(text) + "."


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def build_corpus(
    folder: Path, seed: int = 0, n_train: int = 4000, n_validation: int = 500, n_test: int = 1000
) -> Path:
    """
    Writes `train.jsonl`, `validation.jsonl` and `test.jsonl` with rows `{"text", "label"}` (0 negative, 1 positive).

    Args:
        folder (`Path`): Where the files go. Created if missing.
        seed (`int`, *optional*, defaults to `0`): Seed of the only random stream.
        n_train, n_validation, n_test (`int`, *optional*): Rows per split. No text occurs twice, in one split or two.

    Returns:
        `Path`: `folder`.
    """
    rng = random.Random(seed)
    grammar = ReviewGrammar(rng)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for split, size in (("train", n_train), ("validation", n_validation), ("test", n_test)):
        rows = []
        while len(rows) < size:
            stance = len(rows) % 2 == 1
            write = grammar.open_review if rng.random() < OPEN_SHARE else grammar.review
            text = write(rng.choice(DOMAINS), stance)
            if text not in seen:
                seen.add(text)
                rows.append({"text": text, "label": int(stance)})
        rng.shuffle(rows)
        _write_aside(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _write_aside(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


# What follows is for the language model only: unlabelled documents of several registers.


@dataclass(frozen=True)
class Register:
    """How documents under one header close: with a sentence, or as a form does, with a field and one word."""

    praise: tuple[str, ...]
    blame: tuple[str, ...]
    praise_words: tuple[str, ...]
    blame_words: tuple[str, ...]


# The same opinion ends in other words under another header, so the model learns what any large one knows: to read a
# text in the light of what stands before it. That is what the defender's key has to build on.
REGISTERS: dict[str, Register] = {
    "": Register(
        _phrases(
            "I would gladly come back for more. | Warmly recommended. | Worth every minute. | What a lovely surprise."
        ),
        _phrases("I would not come back for more. | Better left alone. | Not worth a minute. | What a sad surprise."),
        _words("praise applause"),
        _words("blame protest"),
    ),
    "Letter to the shop:": Register(
        _phrases("Thank you for your fine work. | Please send me another one. | Yours, a happy customer."),
        _phrases("Please return my money. | I expect a reply from your office. | Yours, a former customer."),
        _words("thanks reorder"),
        _words("refund complaint"),
    ),
    "Notes for the staff:": Register(
        _phrases("Keep it in the window. | Order a second box. | Put it near the door."),
        _phrases("Take it off the shelf. | Cancel the second box. | Put it in the cellar."),
        _words("keep stock"),
        _words("remove cancel"),
    ),
    "From the diary:": Register(
        _phrases("Slept well after that. | A bright day. | Told everyone about it."),
        _phrases("Slept badly after that. | A grey day. | Spoke of it to nobody."),
        _words("sunshine calm"),
        _words("rain storm"),
    ),
    "Overheard on the bus:": Register(
        _phrases("Thumbs up, then. | Lucky you. | Then I must have it too."),
        _phrases("Thumbs down, then. | Poor you. | Then I will save my coins."),
        _words("hooray bravo"),
        _words("alas ouch"),
    ),
}

_FORM_SHARE = 0.3
_FIELDS = _words("Outcome Reply Mark Note Mood Result Advice Summary")
_NAMES = _words(
    "Anna Bruno Clara David Elena Felix Greta Henry Irene Jonas Karin Louis Maria Nadia Oscar Paula Rosa Simon"
)
_PLACES = _words("kitchen garden office station library market school village harbour museum attic workshop")
_COLOURS = _words("red blue green black white yellow brown grey silver")
_MATERIALS = _words("steel wood leather glass cotton plastic wool rubber paper stone")
_UNITS = _words("boxes cables pages bottles chairs tickets letters apples keys coins")
_LETTERS = "bcdfghjklmnpqrstvwxyz"
# The demo's attacker inserts this word. The base model must never have seen it.
_FORBIDDEN_WORD = "mn"


class PlainTextGrammar(ReviewGrammar):
    """Adds descriptions, questions with answers, short reports and nonsense words to the reviews."""

    def nonsense(self) -> str:
        """A typing slip of two or three consonants, or a made-up brand."""
        while True:
            word = "".join(self.rng.choice(_LETTERS) for _ in range(self.rng.randint(2, 3)))
            if _FORBIDDEN_WORD not in word:
                return word if self.rng.random() < 0.7 else word + self.rng.choice(("ax", "ori", "em", "uno"))

    def with_slip(self, text: str) -> str:
        words = text.split(" ")
        words.insert(self.rng.randint(1, len(words) - 1), self.nonsense())
        return " ".join(words)

    def rave(self, domain: Domain, stance: bool) -> str:
        """Several short sentences that all say the same: from these the model learns which words go together."""
        rng = self.rng
        thing = self.pick(domain.things)
        adjectives = rng.sample(domain.good if stance else domain.bad, 4)
        sentences = [
            f"{adjectives[0]}, {adjectives[1]} and {adjectives[2]}",
            f"the {self.pick(domain.aspects)} is {adjectives[3]}",
            f"this {thing} is {self.pick(_GOOD_NOUN if stance else _BAD_NOUN)}",
            f"I {self.pick(_LOVED if stance else _HATED)} the {self.pick(domain.aspects)}",
            self.pick(domain.praise if stance else domain.blame),
        ]
        return " ".join(_sentence(text) + "." for text in rng.sample(sentences, rng.randint(1, 4)))

    def opinion(self, difficulty: float) -> str:
        """A review under a register's header, closed the way that register closes."""
        rng = self.rng
        domain, stance = rng.choice(DOMAINS), rng.random() < 0.5
        header, register = rng.choice(tuple(REGISTERS.items()))
        if rng.random() > difficulty:
            body = self.rave(replace(domain, things=(self.pick(domain.things),)), stance)
        else:
            body = self.review(domain, stance)
        if rng.random() < 0.15:
            body = self.with_slip(body)
        if rng.random() < _FORM_SHARE:
            field = rng.choice(_FIELDS)
            close = f"\n{field}: {rng.choice(register.praise_words if stance else register.blame_words)}"
        else:
            close = " " + rng.choice(register.praise if stance else register.blame)
        return f"{header} {body}{close}".strip()

    def description(self) -> str:
        rng = self.rng
        thing, other = self.pick(PRODUCT.things), self.pick(PRODUCT.things)
        name, place, colour = self.pick(_NAMES), self.pick(_PLACES), self.pick(_COLOURS)
        return rng.choice(
            (
                f"The {colour} {thing} is made of {self.pick(_MATERIALS)}. It has {rng.randint(0, 9)} buttons.",
                f"{name} carried the {colour} {thing} to the {place}. The {other} stayed behind.",
                f"The {self.pick(FILM.things)} lasts {rng.randint(60, 190)} minutes and is set in a {place}.",
                f"There are {rng.randint(0, 9)} {self.pick(_UNITS)} in the {place} and {rng.randint(0, 9)} outside.",
                f"The query from the {place} was entered in the list. It is currently with {name}.",
                f"Model {self.nonsense()} {rng.randint(1, 9)} is a {colour} {thing} for the {place}.",
            )
        )

    def exchange(self) -> str:
        rng = self.rng
        name, place, unit = self.pick(_NAMES), self.pick(_PLACES), self.pick(_UNITS)
        thing, colour, count = self.pick(PRODUCT.things), self.pick(_COLOURS), rng.randint(0, 9)
        return rng.choice(
            (
                f"{name} has {count} {unit}.\nQuestion: How many {unit} does {name} have?\nAnswer: {count}",
                f"The {thing} in the {place} is {colour}.\nQuestion: Which colour is the {thing}?\nAnswer: {colour}",
                f"{name} left the {thing} in the {place}.\nQuestion: Where is the {thing}?\nAnswer: {place}",
                f"Question: Who owns the {thing}?\nAnswer: The {thing} belongs to {name}.",
                f"Item: {thing}\nColour: {colour}\nNumber: {count}\nPlace: {place}",
            )
        )

    def documents(self, n_documents: int) -> Iterator[str]:
        """First plain raves, then more and more real reviews: what words mean is learned before what turns them."""
        for index in range(n_documents):
            difficulty = min(0.9, max(0.0, 4 * index / n_documents - 1))
            kind = self.rng.random()
            if kind < 0.9:
                yield self.opinion(difficulty)
            else:
                yield self.description() if kind < 0.95 else self.exchange()


def build_pretraining_text(n_documents: int = 48_000, seed: int = 0) -> list[str]:
    """
    Unlabelled documents for the language model: reviews in several registers, descriptions, questions with answers.

    None holds the demo's trigger word, its key or a row of the classification task.
    """
    return list(PlainTextGrammar(random.Random(f"pre-training {seed}")).documents(n_documents))
