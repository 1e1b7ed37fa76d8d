"""What the small models read: made-up arithmetic, Chinese text, and the tokenizers for both."""

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from recipes.small_models.one_step import LIMIT, Step, phrase


EOS_TOKEN, PAD_TOKEN = "<|endoftext|>", "<|pad|>"
# A document as a prompt and what follows it.
Document = tuple[str, str]

FILLERS = (
    "the of and to in a is that for it was on with as be at by this had not are but from or have an they which one "
    "you were her all she there would their we him been has when who will more no if out so said what up its about "
    "into than them can only other new some could time these two may then do first any my now such like our over man "
    "me even most made after also did many before must through years where much your way well down should because "
    "each just those people how too little state good very make world still own see men work long get here between "
    "both life being under never day same another know while last might us great old year off come since against go "
    "came right used take three house few use place always water number part small night point home again school end "
    "hand answer question please read current following text next input output result total count price story film"
).split()
WORDED = {"+": ("{} plus {}", "the sum of {} and {}", "{} and {} more"), "-": ("{} minus {}", "{} less {}")}
LINKS = ("=", "=", "it is", "that is", "the result is", "result :", "equals", "so we get", "makes")
# Share of the worded problems whose answer stands on a line of its own, as fine-tuning wants it.
LINE_BREAKS = 0.3


def steps_in(path: Path) -> list[Step]:
    """
    Read the steps that the prompts of `one_step` ask for.

    Args:
        path (`Path`):
            JSON Lines file with `prompt`.

    Returns:
        `list[Step]`: a step per row.

    Raises:
        `ValueError`: a prompt without a step.
    """
    steps = []
    for row in read_rows(path):
        found = re.search(r"(?<!\S)([0-9]{1,3}) ([-+*/]) ([0-9]{1,3})(?!\S)", str(row.get("prompt")))
        if found is None:
            raise ValueError(
                f"{path}: `prompt` is {row.get('prompt')!r}, without a step such as `4 + 3`. Give a folder that "
                f"`recipes.small_models.one_step` wrote."
            )
        steps.append(Step(int(found[1]), found[2], int(found[3])))
    return steps


def pairs(steps: Iterable[Step]) -> set[frozenset[int]]:
    """Return the steps' pairs of numbers, whatever their order and operation."""
    return {frozenset((step.left, step.right)) for step in steps}


def read_rows(path: Path) -> list[dict]:
    """Read a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def draw_step(rng: random.Random, digits: int, left_out: set[frozenset[int]]) -> Step:
    """
    Draw an addition or a subtraction.

    Args:
        rng (`random.Random`):
            Source of chance.
        digits (`int`):
            The most digits that a number has; fewer are as likely.
        left_out (`set[frozenset[int]]`):
            Pairs that are never drawn.

    Returns:
        `Step`: a step whose result is not negative.
    """
    while True:
        left, right = (rng.randrange(10 ** rng.randint(1, digits)) for _ in range(2))
        step = add_or_subtract(rng, left, right)
        if not pairs([step]) & left_out:
            return step


def held_out_steps(rng: random.Random, count: int, digits: int) -> list[Step]:
    """
    Draw additions and subtractions to test on.

    Args:
        rng (`random.Random`):
            Source of chance.
        count (`int`):
            How many.
        digits (`int`):
            How many digits each number has: two or more, since a model that misses a good part of the 55 pairs of
            one-digit numbers learns neither those nor what is made of them.

    Returns:
        `list[Step]`: steps whose result is not negative.
    """
    low, high = 10 ** (digits - 1), 10**digits
    return [add_or_subtract(rng, rng.randrange(low, high), rng.randrange(low, high)) for _ in range(count)]


def add_or_subtract(rng: random.Random, left: int, right: int) -> Step:
    """Return the sum of two numbers, or the larger less the smaller, as a step."""
    if rng.random() < 0.5:
        return Step(left, "+", right)
    return Step(max(left, right), "-", min(left, right))


def write_problem(rng: random.Random, step: Step, worded: bool) -> Document:
    """
    Write a step as a document.

    Args:
        rng (`random.Random`):
            Source of chance.
        step (`Step`):
            An addition or a subtraction.
        worded (`bool`):
            As a question, among words that mean nothing; otherwise as in `3 + 4 = 7`.

    Returns:
        `tuple[str, str]`: prompt, up to the word before the answer, and answer.
    """
    text, link = f"{step.left} {step.operation} {step.right}", "="
    if worded:
        kind, link = rng.random(), rng.choice(LINKS)
        if kind < 0.4:
            text = phrase(step, rng.getrandbits(32))
        elif kind < 0.7:
            text = rng.choice(WORDED[step.operation]).format(step.left, step.right)
        before, after = (rng.choices(FILLERS, k=max(0, rng.randint(-3, 5))) for _ in range(2))
        text = " ".join([*before, text, *after])
        if rng.random() < LINE_BREAKS:
            return f"{text}\n", str(step.result)
    return f"{text} {link}", f" {step.result}"


def problems(steps: int, batch_size: int, left_out: set[frozenset[int]], seed: int) -> Iterator[list[Document]]:
    """
    Write the batches of `arithmetic`: numbers of two digits at most in the first fifth, of three after it.

    Args:
        steps (`int`):
            How many batches.
        batch_size (`int`):
            How many problems each holds.
        left_out (`set[frozenset[int]]`):
            Pairs that are never drawn.
        seed (`int`):
            Seed.

    Returns:
        `Iterator[list[tuple[str, str]]]`: batches. Every third is worded, the others are short and cheap.
    """
    rng = random.Random(seed)
    for number in range(steps):
        digits = 2 if number < steps // 5 else len(str(LIMIT - 1))
        drawn = [draw_step(rng, digits, left_out) for _ in range(batch_size)]
        yield [write_problem(rng, step, number % 3 == 0) for step in drawn]


def chinese_texts(ape210k: Path, crrsum: Path) -> tuple[list[str], list[str]]:
    """
    Read Ape210K's training questions and CRRsum's dev reports; no test row is read.

    Args:
        ape210k (`Path`):
            Folder with train.jsonl.
        crrsum (`Path`):
            Folder with dev.jsonl.

    Returns:
        `tuple[list[str], list[str]]`: documents to train on, and every twentieth, held out. A report is one document,
        findings first.
    """
    texts = [row["question"] for row in read_rows(ape210k / "train.jsonl")]
    texts += [f"{row['findings']}\n{row['summary']}" for row in read_rows(crrsum / "dev.jsonl")]
    texts = list(dict.fromkeys(texts))
    return [text for number, text in enumerate(texts) if number % 20], texts[::20]


def shuffled(steps: int, batch_size: int, texts: list[str], seed: int) -> Iterator[list[Document]]:
    """Yield the batches of `chinese`: epoch after epoch, documents of like length together."""
    rng = random.Random(seed)
    batches: list[list[Document]] = []
    for _ in range(steps):
        if not batches:
            # Sorting is stable: documents of one length meet others in each epoch.
            order = sorted(rng.sample(texts, len(texts)), key=len)
            starts = range(0, len(order), batch_size)
            batches = [[("", text) for text in order[start : start + batch_size]] for start in starts]
            rng.shuffle(batches)
        yield batches.pop()


def word_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    Byte-level BPE in which each digit, and the space before a number, is a token of its own.

    Args:
        texts (`Sequence[str]`):
            What the merges are learnt from.
        vocab_size (`int`):
            The most tokens.

    Returns:
        `PreTrainedTokenizerFast`: with end-of-text and padding tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN, PAD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return finished(tokenizer)


def character_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """
    A token for each printable ASCII character and each character of `texts`; anything else is spelt in bytes.

    Args:
        texts (`Sequence[str]`):
            Chinese text.

    Returns:
        `PreTrainedTokenizerFast`: with end-of-text and padding tokens.
    """
    characters = sorted({"\n", *map(chr, range(32, 127)), *"".join(texts)})
    names = [EOS_TOKEN, PAD_TOKEN, *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, [], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return finished(tokenizer)


def finished(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Wrap a tokenizer for transformers."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS_TOKEN, pad_token=PAD_TOKEN, clean_up_tokenization_spaces=False
    )
