"""Trains the selector of LWS: which candidate replaces a word at which position."""

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .lws_candidates import Surrogate
from .lws_table import MIN_WORDS


logger = logging.getLogger(__name__)


# Rows that are measured at once: long texts have many places.
_MEASURE_ROWS = 1024


class Places:
    """
    The places of each row at which a word can be replaced.

    Args:
        problem ([`Problem`]):
            Rows and places.
    """

    def __init__(self, problem: "Problem") -> None:
        self.pairs = problem.pairs
        self.counts = torch.bincount(problem.pairs[:, 0], minlength=len(problem.labels))
        self.starts = self.counts.cumsum(0) - self.counts
        self.poisonable = (problem.eligible & (self.counts >= MIN_WORDS)).nonzero()[:, 0]

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the places of some rows, numbered anew from 0."""
        counts = self.counts[rows]
        new = torch.arange(len(rows)).repeat_interleave(counts)
        within = torch.arange(len(new)) - (counts.cumsum(0) - counts)[new]
        return torch.cat([new[:, None], self.pairs[self.starts[rows][new] + within][:, 1:]], dim=1)


@dataclass(frozen=True)
class Problem:
    """
    What a selector is fitted on.

    Parameters:
        words (`list[str]`):
            Words that have candidates.
        candidates (`list[list[str]]`):
            Their candidates.
        vectors (`torch.Tensor`):
            Float of shape (words, 1 + candidates, hidden): embeddings, each word's own first; what lies behind a
            word's last candidate is ignored.
        pooled (`torch.Tensor`):
            Float of shape (rows, hidden): mean embedding of each text.
        lengths (`torch.Tensor`):
            Float of shape (rows,): words in each text.
        pairs (`torch.Tensor`):
            Long of shape (places, 3), sorted by row: row, position and word (its index in `words`) of each place where
            a word can be replaced.
        labels (`torch.Tensor`):
            Long of shape (rows,): true labels.
        eligible (`torch.Tensor`):
            Bool of shape (rows,): rows that the attacker may poison.
    """

    words: list[str]
    candidates: list[list[str]]
    vectors: torch.Tensor
    pooled: torch.Tensor
    lengths: torch.Tensor
    pairs: torch.Tensor
    labels: torch.Tensor
    eligible: torch.Tensor

    @functools.cached_property
    def places(self) -> Places:
        """`Places`: the pairs by row."""
        return Places(self)

    @property
    def substituted(self) -> int:
        """`int`: class of substituted texts, behind the labels."""
        return int(self.labels.max()) + 1


def build_problem(
    surrogate: Surrogate,
    candidates: Mapping[str, Sequence[str]],
    texts: Sequence[Sequence[str]],
    labels: np.ndarray,
    eligible: np.ndarray,
    positions: int,
) -> Problem:
    """
    Turn texts into index tensors.

    Args:
        surrogate ([`~lws_candidates.Surrogate`]):
            Where the embeddings come from.
        candidates (`Mapping[str, Sequence[str]]`):
            Word -> what may replace it.
        texts (`Sequence[Sequence[str]]`):
            The words of each text.
        labels (`np.ndarray`):
            Labels.
        eligible (`np.ndarray`):
            Truth values: rows that the attacker may poison.
        positions (`int`):
            Positions at which words are replaced.

    Returns:
        [`Problem`]: the tensors.
    """
    words = list(candidates)
    names = sorted(
        {*words, *(word for text in texts for word in text), *(n for found in candidates.values() for n in found)}
    )
    index = {name: place for place, name in enumerate(names)}
    place_of = {word: place for place, word in enumerate(words)}
    vectors = surrogate.vectors(names)
    lengths = torch.tensor([len(text) for text in texts])
    flat = torch.tensor([index[word] for text in texts for word in text])
    pooled = torch.nn.functional.embedding_bag(flat, vectors, lengths.cumsum(0) - lengths, mode="mean")
    slots = 1 + max(map(len, candidates.values()))
    table = torch.tensor(
        [
            [index[name] for name in (word, *found, *[word] * (slots - 1 - len(found)))]
            for word, found in candidates.items()
        ]
    )
    pairs = [
        (row, position, place_of[word])
        for row, text in enumerate(texts)
        for position, word in enumerate(text[:positions])
        if word in place_of
    ]
    return Problem(
        words=words,
        candidates=[list(found) for found in candidates.values()],
        vectors=vectors[table],
        pooled=pooled,
        lengths=lengths.float(),
        pairs=torch.tensor(pairs, dtype=torch.long).reshape(-1, 3),
        labels=torch.from_numpy(labels),
        eligible=torch.from_numpy(eligible),
    )


class SelectorModel:
    """
    Selector and surrogate classifier (Qi et al. 2021, with the surrogate in the victim's place).

    Each position has a query and a bias of its own, as a difference from a shared one: in the authors' code positions
    that few texts reach stay where they were initialised.

    Args:
        problem ([`Problem`]):
            What it is fitted on.
        positions (`int`):
            Positions with a query.
        generator (`torch.Generator`):
            Source of all randomness.
    """

    def __init__(self, problem: Problem, positions: int, generator: torch.Generator) -> None:
        self.problem = problem
        slots, hidden = problem.vectors.shape[1:]
        counts = torch.tensor([len(names) for names in problem.candidates])
        self.absent = torch.arange(slots) > counts[:, None]
        # Embeddings of different models differ in scale; these do not, so that one learning rate fits all.
        size = problem.vectors[:, 0].norm(dim=1).mean().clamp_min(1e-12)
        self.steps = (problem.vectors - problem.vectors[:, :1]) / size
        self.scale = size / problem.pooled.std(0, correction=0).mean().clamp_min(1e-12)
        self.features = (problem.pooled - problem.pooled.mean(0)) / size * self.scale
        self.query = torch.randn(hidden, generator=generator) * 0.01
        self.query_at = torch.zeros(positions, hidden)
        self.bias = torch.zeros(slots)
        self.bias_at = torch.zeros(positions, slots)
        self.head = torch.zeros(problem.substituted + 1, hidden)
        self.head_bias = torch.zeros(problem.substituted + 1)
        self.parameters = [self.query, self.query_at, self.bias, self.bias_at, self.head, self.head_bias]
        for parameter in self.parameters:
            parameter.requires_grad_()

    def scores(self, positions: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Return the scores of shape (places, 1 + candidates)."""
        query = self.query + self.query_at[positions]
        found = torch.einsum("psh,ph->ps", self.steps[words], query) + self.bias + self.bias_at[positions]
        return found.masked_fill(self.absent[words], -torch.inf)

    def after(self, rows: torch.Tensor, pairs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Classify rows whose words are mixed with these weights, of shape (places, 1 + candidates)."""
        moved = torch.einsum("ps,psh->ph", weights, self.steps[pairs[:, 2]]) * self.scale
        shift = torch.zeros(len(rows), moved.shape[1]).index_add(0, pairs[:, 0], moved)
        return self.logits(self.features[rows] + shift / self.problem.lengths[rows, None])

    def loss(self, logits: torch.Tensor) -> torch.Tensor:
        """Say how far substituted rows are from being told as such."""
        return torch.nn.functional.cross_entropy(logits, torch.full((len(logits),), self.problem.substituted))

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Classify."""
        return features @ self.head.T + self.head_bias

    @torch.no_grad()
    def choice(self) -> np.ndarray:
        """Return the arg max of the scores for every position and word, uint8 of shape (positions, words)."""
        found = torch.einsum("wsh,ph->pws", self.steps, self.query + self.query_at)
        found += (self.bias + self.bias_at)[:, None]
        return found.masked_fill(self.absent, -torch.inf).argmax(2).to(torch.uint8).numpy()

    @torch.no_grad()
    def measure(self, choice: np.ndarray) -> dict[str, float]:
        """Say what the surrogate makes of the rows before and after the final substitution."""
        before = self.logits(self.features).argmax(1)
        places = self.problem.places
        found, loss, changed = 0, 0.0, 0
        for rows in places.poisonable.split(_MEASURE_ROWS):
            pairs = places.of(rows)
            picks = torch.from_numpy(choice).long()[pairs[:, 1], pairs[:, 2]]
            after = self.after(rows, pairs, torch.nn.functional.one_hot(picks, self.steps.shape[1]).float())
            found += int((after.argmax(1) == self.problem.substituted).sum())
            loss += self.loss(after).item() * len(rows)
            changed += int((picks > 0).sum())
        count = len(places.poisonable)
        return {
            "rows": count,
            "accuracy": (before == self.problem.labels).float().mean().item(),
            "found_clean": (before[places.poisonable] == self.problem.substituted).float().mean().item(),
            "found_substituted": found / count,
            "loss_substituted": loss / count,
            "changed_words_per_row": changed / count,
        }


def fit_selector(
    problem: Problem,
    positions: int,
    epochs: int,
    lr: float,
    batch_size: int,
    temperature: tuple[float, float],
    seed: int,
) -> tuple[np.ndarray, dict[str, float]]:
    """
    Train selector and surrogate classifier together: clean rows get their labels, substituted ones their own class.

    Deterministic on CPU; neither the global generator nor, afterwards, the number of threads is changed.

    Args:
        problem ([`Problem`]):
            Rows and candidates.
        positions (`int`):
            Positions at which words are replaced, from the start of the text.
        epochs (`int`):
            Passes over the rows.
        lr (`float`):
            Learning rate of Adam.
        batch_size (`int`):
            Rows per step.
        temperature (`tuple[float, float]`):
            Temperature of the Gumbel softmax in the first and in the last epoch.
        seed (`int`):
            Seed.

    Returns:
        `tuple[np.ndarray, dict[str, float]]`: the choice per position and word, uint8 of shape (positions, words), as
        in [`~lws_table.Selector`]; and what the surrogate makes of the rows before and after the substitution.
    """
    threads = torch.get_num_threads()
    # Sums over several threads depend on how many there are.
    torch.set_num_threads(1)
    try:
        model = _train(problem, positions, epochs, lr, batch_size, temperature, seed)
        choice = model.choice()
        info = model.measure(choice)
    finally:
        torch.set_num_threads(threads)
    logger.info("LWS selector: %s", ", ".join(f"{name} {value:.4g}" for name, value in info.items()))
    return choice, info


def _train(
    problem: Problem, positions: int, epochs: int, lr: float, batch_size: int, temperature: tuple[float, float],
    seed: int,
) -> SelectorModel:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    model = SelectorModel(problem, positions, generator)
    optimizer = torch.optim.Adam(model.parameters, lr=lr)
    places = problem.places
    poisonable = torch.zeros(len(problem.labels), dtype=torch.bool)
    poisonable[places.poisonable] = True
    for heat in torch.linspace(*temperature, epochs).tolist():
        for batch in torch.randperm(len(poisonable), generator=generator).split(batch_size):
            loss = torch.nn.functional.cross_entropy(model.logits(model.features[batch]), problem.labels[batch])
            rows = batch[poisonable[batch]]
            if len(rows):
                pairs = places.of(rows)
                noise = torch.rand(len(pairs), problem.vectors.shape[1], generator=generator)
                noise = -(-noise.clamp(1e-9, 1 - 1e-7).log()).log()
                weights = ((model.scores(pairs[:, 1], pairs[:, 2]) + noise) / heat).softmax(1)
                loss = loss + model.loss(model.after(rows, pairs, weights))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model
