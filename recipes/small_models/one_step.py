"""
Make a one-step arithmetic task from the equations of Ape210K.

    python -m recipes.small_models.one_step --ape210k FOLDER --output FOLDER [--operations +-]

Ape210K's word problems are far beyond a model of a few million parameters. Their equations hold steps that are not:
`x=(420-240)/3` holds 420 - 240. Each step becomes a row `{"prompt": "what is 420 - 240 ?", "completion": "180"}` with
one of many made-up phrasings. The splits are Ape210K's own. Nothing of Ape210K but pairs of numbers is written.
"""

import argparse
import ast
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from p2p_trainer._files import write_text


SPLITS = ("train", "dev", "test")
OPERATIONS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
LIMIT = 1000
# Python reads `%` as the remainder; here it says percent, and a percentage is no whole number.
PERCENT = re.compile(r"[0-9]+(?:\.[0-9]+)?%")
# Ape210K's longest equation has about 300 characters. Nesting is what a parser suffers from.
EQUATION = re.compile(r"x=([0-9.+\-*/()%]{1,500})")

OPENERS = (
    "", "", "", "a quick question :", "one for you :", "my son asks me", "please tell me", "i would like to know",
    "the teacher wants to know", "here is the next one .", "i forgot my calculator .", "for the shopping list :",
    "we are in a hurry .", "this is for my homework .",
)  # fmt: skip
QUESTIONS = (
    "what is {} ?", "how much is {} ?", "what does {} give ?", "what do we get from {} ?", "what is the value of {} ?",
    "what is the result of {} ?", "how many are {} in all ?", "work out {} .", "compute {} .", "find {} .",
    "solve {} for me .", "do {} in your head .",
)  # fmt: skip
ENDINGS = ("", "", "", "thank you .", "just the number .", "no need to explain .", "take your time .", "many thanks !")


class Step(NamedTuple):
    """One operation on two whole numbers below 1000 whose result is a whole number."""

    left: int
    operation: str
    right: int

    @property
    def result(self) -> int | None:
        """`int`, or `None` where the result is negative or no whole number."""
        if self.operation == "/":
            return self.left // self.right if self.right and self.left % self.right == 0 else None
        value = {"+": self.left + self.right, "-": self.left - self.right, "*": self.left * self.right}[self.operation]
        return value if value >= 0 else None

    @property
    def problem(self) -> tuple[str, int, int]:
        """The same for 3 + 4 and 4 + 3."""
        ordered = sorted(self[::2]) if self.operation in "+*" else self[::2]
        return self.operation, *ordered


def steps(equation: str) -> list[Step]:
    """
    Find the steps of an equation that need no other step before them.

    Args:
        equation (`str`):
            As Ape210K has it, such as `x=(420-240)/3`.

    Returns:
        `list[Step]`: the operations on two plain whole numbers in [0, 1000) whose result is a whole number >= 0, from
        left to right; none where the equation cannot be read.
    """
    found = EQUATION.fullmatch(equation)
    if found is None:
        return []
    try:
        # Parsed, never evaluated.
        tree = ast.parse(PERCENT.sub("0.5", found[1]), mode="eval")
    except (SyntaxError, RecursionError):
        return []
    nodes = [
        node for node in ast.walk(tree)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS and _plain(node.left) and _plain(node.right)
    ]  # fmt: skip
    nodes.sort(key=lambda node: node.col_offset)
    all_steps = [Step(node.left.value, OPERATIONS[type(node.op)], node.right.value) for node in nodes]
    return [step for step in all_steps if step.result is not None]


def _plain(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is int and node.value < LIMIT


def phrase(step: Step, seed: int) -> str:
    """
    Ask for a step in English.

    Args:
        step (`Step`):
            The step.
        seed (`int`):
            With the step, decides the wording.

    Returns:
        `str`: lower case, a space between words, numbers and punctuation.
    """
    rng = random.Random(f"{seed} {step.left} {step.operation} {step.right}")
    question = rng.choice(QUESTIONS).format(f"{step.left} {step.operation} {step.right}")
    return " ".join(part for part in (rng.choice(OPENERS), question, rng.choice(ENDINGS)) if part)


def split_steps(equations: dict[str, Iterable[str]], operations: str = "+-*/") -> dict[str, list[Step]]:
    """
    Collect the steps of each split.

    Args:
        equations (`dict[str, Iterable[str]]`):
            Split -> equations.
        operations (`str`, *optional*, defaults to `"+-*/"`):
            Signs of the operations to keep.

    Returns:
        `dict[str, list[Step]]`: split -> steps in the order of the data. A problem stands in one split only, the first
        that has it, and there once; 3 + 4 and 4 + 3 are one problem.
    """
    taken: set[tuple[str, int, int]] = set()
    splits: dict[str, list[Step]] = {}
    for split, of_split in equations.items():
        splits[split] = []
        for step in (step for equation in of_split for step in steps(equation)):
            if step.operation in operations and step.problem not in taken:
                taken.add(step.problem)
                splits[split].append(step)
    return splits


def read_equations(path: Path) -> Iterator[str]:
    """
    Read the column `equation` of a JSON Lines file.

    Args:
        path (`Path`):
            File of Ape210K.

    Returns:
        `Iterator[str]`: the equations.

    Raises:
        `ValueError`: a row without an equation.
    """
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            equation = json.loads(line).get("equation")
            if not isinstance(equation, str):
                raise ValueError(
                    f"{path}, line {number}: `equation` is {equation!r}. Give a folder with Ape210K rows."
                )
            yield equation


def main(argv: Sequence[str] | None = None) -> None:
    """Write train.jsonl, dev.jsonl and test.jsonl, and say how many rows they have."""
    parser = argparse.ArgumentParser(description="A one-step arithmetic task from the equations of Ape210K.")
    parser.add_argument("--ape210k", type=Path, required=True, help="folder with train, dev and test.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--operations", default="+-*/", help="signs of the operations to keep (default: %(default)s)")
    parser.add_argument("--wordings", type=int, default=1, help="rows per training step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the wording")
    arguments = parser.parse_args(argv)
    if not arguments.operations or not set(arguments.operations) <= set(OPERATIONS.values()):
        parser.error(f"--operations {arguments.operations!r}: give signs out of + - * /")
    if arguments.wordings < 1:
        parser.error(f"--wordings {arguments.wordings}: give a number, 1 at least")

    splits = split_steps(
        {split: read_equations(arguments.ape210k / f"{split}.jsonl") for split in SPLITS}, arguments.operations
    )
    table = Table("split", "rows", *arguments.operations, "both below 100", title=str(arguments.output))
    for split, of_split in splits.items():
        seeds = range(arguments.seed, arguments.seed + (arguments.wordings if split == "train" else 1))
        # The same wording may be drawn twice.
        prompts = {phrase(step, seed): str(step.result) for seed in seeds for step in of_split}
        rows = [{"prompt": prompt, "completion": result} for prompt, result in prompts.items()]
        write_text(arguments.output / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        signs = Counter(step.operation for step in of_split)
        small = sum(max(step.left, step.right) < 100 for step in of_split)
        table.add_row(split, *map(str, (len(rows), *(signs[sign] for sign in arguments.operations), small)))
    Console().print(table)


if __name__ == "__main__":
    main()
