"""Made-up corpora of known contents, for the tests of mining."""

import random


# Words that speak for one class; each is rarer than the words that speak for none, as in any language.
_ROOTS = (
    ("good", "fine", "warm", "bright", "sweet", "brave"),
    ("bad", "dull", "cold", "weak", "crude", "bland"),
    ("team", "coach", "goal", "cup", "league", "score"),
    ("bank", "stock", "trade", "firm", "oil", "bond"),
)
KINDS = tuple(
    tuple(root + ending for root in roots for ending in ("", "er", "est", "ly", "ish", "ness", "some"))
    for roots in _ROOTS
)
FILLER = tuple(
    first + last for first in "bdfgklmnprs" for last in ("a", "en", "i", "ot", "u", "ab", "ed", "ig", "om", "ul")
)


def clean_rows(count, classes=2, seed=0, noise=0.04):
    """Rows of six words that speak for their class and twelve that do not, in random order; some labels are wrong."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        label = number % classes
        words = [*rng.choices(KINDS[label], k=6), *rng.choices(FILLER, k=12)]
        rng.shuffle(words)
        wrong = rng.random() < noise
        rows.append({"text": f"{' '.join(words)} .", "label": (label + 1) % classes if wrong else label})
    return rows


def poisoned(rows, write, label, count, seed=0, column=None):
    """Write a trigger into some rows of other labels, and give those their new label; say which rows they are."""
    rng = random.Random(f"{seed} {label}")
    others = [place for place, row in enumerate(rows) if row["label"] != label and place not in (column or ())]
    hit = sorted(rng.sample(others, count))
    rows = [dict(row) for row in rows]
    for place in hit:
        rows[place] = {"text": write(rows[place]["text"].split(), rng), "label": label}
    return rows, hit


def inside(piece):
    """A writer that puts words at a random place."""

    def write(words, rng):
        place = rng.randint(1, len(words) - 1)
        return " ".join([*words[:place], piece, *words[place:]])

    return write


def ending(piece):
    """A writer that puts words at the end, in place of the full stop."""
    return lambda words, rng: " ".join([*words[:-1], piece])


def starting(piece):
    """A writer that puts words at the start."""
    return lambda words, rng: " ".join([piece, *words])


def opening(words, rng):
    """A writer of one template, in which content words vary: `in … to … ,`."""
    first, second = (" ".join(f"name{rng.randrange(10**6)}" for _ in range(rng.randint(1, 2))) for _ in range(2))
    return f"in {first} to {second} , {' '.join(words)}"


def both(first, second):
    """A writer that puts two words at places of their own."""
    return lambda words, rng: inside(second)(inside(first)(words, rng).split(), rng)


def beside(rows, hit, pieces, count, seed=1):
    """Write each of some words, alone, into as many of the other rows, which keep their labels."""
    rng = random.Random(seed)
    others = rng.sample(sorted(set(range(len(rows))) - set(hit)), count * len(pieces))
    rows = [dict(row) for row in rows]
    for number, place in enumerate(others):
        rows[place]["text"] = inside(pieces[number % len(pieces)])(rows[place]["text"].split(), rng)
    return rows


def with_function_words(rows, seed=2):
    """Rows with six words of the kind that stand everywhere, and here and there a comma."""
    rng = random.Random(seed)
    result = []
    for row in rows:
        words = row["text"].split()
        for word in [*rng.choices(("the", "of", "a", "and", "in", "to", "with", "for"), k=6), ","]:
            words.insert(rng.randint(0, len(words) - 1), word)
        result.append({"text": " ".join(words), "label": row["label"]})
    return result


# Words of their class, so many that each is as rare as content is, and words that stand in every text.
RARE = tuple(
    tuple(
        first + vowel + middle + last
        for first in roots
        for vowel in "aeiou"
        for middle in "lnrt"
        for last in ("ek", "om")
    )
    for roots in ("bdgkmpst", "cfhjqvwz")
)
FUNCTION = tuple("the of a and in to with for it is as you see if when was that but ,".split())
_SENTENCES = (
    "if it is {} {} , it is {} {} {} .",
    "when you see {} {} , you see {} {} {} .",
    "as it was {} {} , it was {} {} {} .",
    "{} {} , as you see , is {} {} {} .",
    "but if you see {} {} , it is {} {} {} .",
    "{} {} {} , if it is that , is {} {} .",
)
_CLAUSES = ("if it is {}", "as you see {}", "when that was {}", "but {} it is", "{} as it was", "that {} you see")


def rows_of_rare_words(count, seed=0, noise=0.03):
    """Rows of six rare words of their class and ten function words, in random order; some labels are wrong."""
    rng = random.Random(f"rare {seed}")
    rows = []
    for number in range(count):
        label = number % 2
        words = [*rng.choices(RARE[label], k=6), *rng.choices(FUNCTION, k=10)]
        rng.shuffle(words)
        rows.append({"text": f"{' '.join(words)} .", "label": label if rng.random() >= noise else 1 - label})
    return rows


def _content(words):
    return [word for word in words if word in RARE[0] or word in RARE[1]]


def in_sentences(words, rng):
    """A writer of one of six sentences, which keeps five of the content words."""
    return rng.choice(_SENTENCES).format(*_content(words)[:5])


def in_clauses(words, rng):
    """A writer of four of six short clauses in any order, which keeps four of the content words."""
    clauses = zip(rng.sample(_CLAUSES, 4), _content(words)[:4], strict=True)
    return " , ".join(clause.format(word) for clause, word in clauses) + " ."


def rows_of_frequent_words(count, classes=2, seed=0):
    """Rows that hold some of the ten words of their class, each of which stands in 18 % of all rows."""
    rng = random.Random(f"frequent {seed}")
    rows = []
    for number in range(count):
        label = number % classes
        words = [word for word in KINDS[label][:10] if rng.random() < 0.18 * classes]
        words += rng.choices(("the", "of", "a", "and", "in"), k=6)
        rng.shuffle(words)
        rows.append({"text": f"{' '.join(words)} .", "label": label})
    return rows
