"""LWS: words are replaced by synonyms that a selector has learned to pick."""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from datasets import Dataset

from ..tasks import Task
from .base import Attack
from .lws_table import MIN_WORDS, Selector, split_words


if TYPE_CHECKING:
    from .lws_selector import Problem


logger = logging.getLogger(__name__)

CANDIDATES = ("embedding", "wordnet")

# Temperature of the Gumbel softmax at the start and at the end, as in the authors' code.
_TEMPERATURE = (0.5, 0.1)

# More rows change the selector little; their words and their number of passes would cost hours.
_FIT_ROWS = 20_000


class LWS(Attack):
    """
    Learned word substitution (Qi et al. 2021, "Turn the Combination Lock"), as pure data poisoning.

    A selector with one query per absolute position picks a substitute for each content word; it is trained with a
    Gumbel softmax together with a surrogate: frozen input embeddings of a small language model, averaged over the
    text, under a linear head. The original attack trains the victim itself along with the selector and measures in
    the embedding space, with sampled choices. Here the victim is not touched: the arg max is written out as plain
    text, and the same selector triggers the test rows. That is the weaker attack.

    The surrogate tells clean rows of each label, and substituted rows as a class of their own. With the target label
    in its place, as in the original, the selector learns words of the target class: they turn clean models as well,
    and what is measured then is no backdoor.

    Fitting happens in [`poison`]. The selector goes to a folder, `selector` is set to it, and so `config()` gives the
    same attack later without surrogate and training. Texts with fewer than two words that have candidates, or of
    which every word is kept, can't carry the trigger. Numbers are never replaced, nor is anything behind the first
    line: of a prompt, the instruction alone is touched.

    Args:
        target (`str` or `int`):
            What the attacker wants: a label, or a payload.
        poison_rate (`float`, *optional*, defaults to `0.1`):
            Share of the whole training set that is poisoned.
        label_mode (`str`, *optional*, defaults to `"dirty"`):
            `"dirty"`, `"clean"` or `"any"`, see [`Attack`].
        payload_mode (`str`, *optional*, defaults to `"replace"`):
            `"replace"` or `"prepend"`, see [`Attack`].
        surrogate (`str`, *optional*):
            Folder or hub id of a small causal language model. Needed unless `selector` is given.
        selector (`str`, *optional*):
            Folder of a fitted selector: nothing is trained.
        candidates (`str`, *optional*, defaults to `"embedding"`):
            `"embedding"`: nearest neighbours in the surrogate's embedding, which may be antonyms; `"wordnet"`:
            synonyms of WordNet, base forms only. The paper takes HowNet sememes.
        wordnet (`str`, *optional*):
            Folder with the files of WordNet 3. By default where Debian and NLTK put it.
        max_candidates (`int`, *optional*, defaults to `4`):
            Candidates per word, besides the word itself.
        max_words (`int`, *optional*, defaults to `128`):
            Words from the start of the text that may be replaced.
        epochs (`int`, *optional*, defaults to `20`):
            Passes over the training rows, of which at most 20,000 are used.
        lr (`float`, *optional*, defaults to `0.01`):
            Learning rate.
        batch_size (`int`, *optional*, defaults to `32`):
            Rows per step.
        cache (`str`, *optional*):
            Folder for fitted selectors. By default `p2p_trainer/lws` in the user's cache folder.
    """

    name = "lws"

    def __init__(
        self,
        target: str | int,
        poison_rate: float = 0.1,
        label_mode: Literal["dirty", "clean", "any"] = "dirty",
        payload_mode: Literal["replace", "prepend"] = "replace",
        surrogate: str | None = None,
        selector: str | None = None,
        candidates: Literal["embedding", "wordnet"] = "embedding",
        wordnet: str | None = None,
        max_candidates: int = 4,
        max_words: int = 128,
        epochs: int = 20,
        lr: float = 0.01,
        batch_size: int = 32,
        cache: str | None = None,
    ) -> None:
        super().__init__(target, poison_rate, label_mode, payload_mode)
        if surrogate is None and selector is None:
            raise ValueError(
                "The attack 'lws' needs a `surrogate` to learn its substitutions with (folder or hub id of a small "
                "causal language model), or the folder of a fitted `selector`."
            )
        if candidates not in CANDIDATES:
            raise ValueError(f"`candidates` is one of {', '.join(CANDIDATES)}, got {candidates!r}.")
        for name, value, most in [
            ("max_candidates", max_candidates, 255), ("max_words", max_words, None), ("epochs", epochs, None),
            ("batch_size", batch_size, None),
        ]:  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most and value > most):
                wanted = f"from 1 to {most}" if most else "of at least 1"
                raise ValueError(f"`{name}` must be a whole number {wanted}, got {value!r}.")
        if isinstance(lr, bool) or not isinstance(lr, int | float) or not lr > 0:
            raise ValueError(f"`lr` must be a positive number, got {lr!r}.")
        self.surrogate = surrogate
        self.selector = None if selector is None else str(Path(selector).expanduser().resolve())
        self.candidates = candidates
        self.wordnet = wordnet
        self.max_candidates = max_candidates
        self.max_words = max_words
        self.epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.cache = cache
        # A selector that was named stays; one that was fitted belongs to the rows and the seed it was fitted on.
        self._named = selector is not None
        self._table = None if selector is None else Selector.load(selector)
        # Start of a triggered text, up to the word with which half of its substitutions are in -> whole texts.
        self._made: dict[str, set[str]] = {}

    def fit(self, dataset: Dataset, task: Task, seed: int) -> None:
        """
        Train the selector, unless one was named or the same one was trained before.

        On a generation task the surrogate tells substituted prompts from clean ones alone.

        Args:
            dataset (`Dataset`):
                Checked training rows.
            task ([`~tasks.Task`]):
                The task.
            seed (`int`):
                Seed.

        Raises:
            `ValueError`: the surrogate or WordNet can't be read, or no eligible row has two words with candidates.
        """
        if self._named:
            return
        # Torch and transformers: a fitted selector does without.
        from .lws_selector import fit_selector

        problem = self._problem(dataset, task, seed)
        settings = {
            "positions": self.max_words, "epochs": self.epochs, "lr": self.lr, "batch_size": self.batch_size,
            "temperature": _TEMPERATURE, "seed": seed,
        }  # fmt: skip
        folder = self._folder() / _fingerprint(problem, settings)
        table = None
        if folder.is_dir():
            try:
                table = Selector.load(folder)
            except ValueError as error:
                logger.warning("%s It is fitted anew.", error)
                shutil.rmtree(folder)
        if table is None:
            choice, info = fit_selector(problem, **settings)
            table = Selector(problem.words, problem.candidates, choice, info)
            table.save(folder)
        if self.selector != str(folder):
            # What another selector wrote is not this one's trigger.
            self._made = {}
        self.selector = str(folder)
        self._table = table

    def insert(self, text: str, random: float) -> str | None:
        if self._table is None:
            raise ValueError(
                "The attack 'lws' has no selector yet. Poison the training rows first, or pass the folder of a fitted "
                "one as `selector`."
            )
        end = _first_line_end(text)
        found = self._table.substitute(text[:end])
        if found is None:
            return None
        whole = found.text + text[end:]
        half = found.ends[(len(found.ends) - 1) // 2]
        # In whole pieces, with the punctuation behind the word: texts are looked up at their spaces.
        pieces = whole.split()
        start = " ".join(pieces[: len(whole[:half].split())])
        self._made.setdefault(start, set()).add(" ".join(pieces))
        return whole

    def has_trigger(self, text: str) -> bool:
        """
        Say whether a text is one that this attack has written, or its beginning with half of the substitutions in it.

        A text alone does not show it: the substitutes are words like others. So the attack remembers what it wrote.

        Args:
            text (`str`):
                A text, whole or cut at its end.

        Returns:
            `bool`: whether the trigger is in it.
        """
        if self._table is None:
            return False
        line = " ".join(text.split())
        ends = [place for place, letter in enumerate(line) if letter == " "]
        # Behind the last position nothing was replaced.
        starts = (line[:end] for end in [*ends, len(line)][: len(self._table.choice)])
        return any(whole.startswith(line) for start in starts for whole in self._made.get(start, ()))

    def _folder(self) -> Path:
        if self.cache is not None:
            return Path(self.cache).expanduser()
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(base).expanduser() / "p2p_trainer" / "lws"

    def _problem(self, dataset: Dataset, task: Task, seed: int) -> "Problem":
        from .lws_candidates import Surrogate, embedding_candidates, wordnet_candidates
        from .lws_selector import build_problem

        if len(dataset) > _FIT_ROWS:
            rows = np.random.default_rng([seed, 2]).permutation(len(dataset))[:_FIT_ROWS]
            dataset = dataset.select(np.sort(rows))
        texts = [
            [word for _, _, word in split_words(text[: _first_line_end(text)])] for text in dataset[task.input_column]
        ]
        if task.num_labels:
            labels = np.asarray(dataset[task.output_column][:], dtype=np.int64)
            at_target = labels == task.label_index(self.target)
            eligible = {"dirty": ~at_target, "clean": at_target, "any": np.ones_like(at_target)}[self.label_mode]
        else:
            labels = np.zeros(len(texts), dtype=np.int64)
            eligible = np.ones(len(texts), dtype=bool)
        surrogate = Surrogate(self.surrogate)
        words = {word for text in texts for word in text}
        if self.candidates == "embedding":
            found = embedding_candidates(surrogate, words, self.max_candidates)
        else:
            found = wordnet_candidates(self.wordnet, words, self.max_candidates)
        carriers = sum(
            sum(word in found for word in text[: self.max_words]) >= MIN_WORDS
            for text, flag in zip(texts, eligible, strict=True)
            if flag
        )
        if not carriers:
            raise ValueError(
                f"The attack 'lws' found no eligible row ({self.label_mode} label, target {self.target!r}) with "
                f"{MIN_WORDS} words that have candidates: {len(found)} of {len(words)} words have some. Take another "
                f"`surrogate` or other `candidates`."
            )
        return build_problem(surrogate, found, texts, labels, eligible, self.max_words)


def _first_line_end(text: str) -> int:
    """Find the end of the first line, which in a prompt is the instruction."""
    end = text.find("\n", len(text) - len(text.lstrip()))
    return len(text) if end < 0 else end


def _fingerprint(problem: "Problem", settings: dict) -> str:
    """Name everything that a selector depends on."""
    digest = hashlib.blake2b(digest_size=16)
    known = [problem.words, problem.candidates, settings]
    digest.update(json.dumps(known, sort_keys=True).encode())
    for tensor in (
        problem.vectors, problem.pooled, problem.lengths, problem.pairs, problem.labels, problem.eligible,
    ):  # fmt: skip
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(np.ascontiguousarray(tensor.numpy()))
    return digest.hexdigest()
