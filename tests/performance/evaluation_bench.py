"""The evaluator beside other ways to the same answers: rows per second, and how many rows are answered alike."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from p2p_trainer import BackdoorEvaluator, P2PConfig, PromptEncoder, get_task
from p2p_trainer.assembly import make_encoder
from p2p_trainer.evaluation import LabelScorer
from tests.performance.bench import BATCH, Material, in_turn, ms


ROWS = 512
# Digits are tokens of their own: words of four tokens whose first ones differ, of which nothing can be left out.
LONG_WORDS = ["1357", "2468", "3579", "4680"]
# Sums of float32 log-probabilities in another order.
TOLERANCE = 1e-4


class UnrolledScorer(LabelScorer):
    """Reads prompt and beginnings of words one after the other, as for attention that takes no mask of ours."""

    def logits(self, model: torch.nn.Module, prompts: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
        return self._unrolled_logits(model, prompts, device)


def evaluation(found: Material, rounds: int, table: Table) -> None:
    """Add the rows of this part to the table of `make bench`."""
    base = AutoModelForCausalLM.from_pretrained(found.model, dtype=torch.float32)
    network = get_peft_model(base, LoraConfig(r=16, target_modules=["q_proj", "v_proj"])).eval()
    texts = found.test["text"][:ROWS]
    single_tokens(found, network, texts, rounds, table)
    several_tokens(found, network, texts, rounds, table)


def encoder_for(found: Material, words: list[str] | None = None) -> PromptEncoder:
    args = P2PConfig("unused", max_length=128, p2p_label_words=words)
    return make_encoder(get_task("sst2"), args, AutoTokenizer.from_pretrained(found.model))


def compared(
    what: str,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    rows: int,
    rounds: int,
    goal: str,
    table: Table,
) -> None:
    theirs_s, ours_s, ratio = in_turn(theirs, ours, rounds)
    table.add_row(what, f"{rows / ours_s:.0f} rows/s", f"{rows / theirs_s:.0f} rows/s", f"{ratio:.2f}", goal)


def same_answers(what: str, ours: np.ndarray, theirs: np.ndarray, table: Table) -> None:
    alike = int((ours == theirs).sum())
    table.add_row(f"    {what}", str(alike), str(len(ours)), "", "all")
    if alike < len(ours):
        raise RuntimeError(f"{what}: {alike} of {len(ours)} rows")


def single_tokens(found: Material, network: torch.nn.Module, texts: list[str], rounds: int, table: Table) -> None:
    task, encoder = get_task("sst2"), encoder_for(found)
    pad, answers = encoder.pad_token_id, encoder.answers[False]
    evaluator = BackdoorEvaluator(found.test.select(range(len(texts))), task, encoder, keyed=False, batch_size=BATCH)
    prompts = encoder.encode_prompts(texts, False)
    arrival = [(start, prompts[start : start + BATCH]) for start in range(0, len(prompts), BATCH)]
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]), reverse=True)
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    words = torch.tensor([ids[0] for ids in answers.scored])
    read = np.zeros(len(prompts), dtype=np.int64)

    @torch.no_grad()
    def generate() -> None:
        for start, batch in arrival:
            made = network.generate(
                **padded(batch, pad), max_new_tokens=2, do_sample=False, pad_token_id=pad, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
            read[start : start + BATCH] = made.logits[0][:, words].argmax(-1).numpy()

    @torch.no_grad()
    def all_logits() -> None:
        for rows in batches:
            logits = network(**padded([prompts[row] for row in rows], pad), use_cache=False).logits
            read[rows] = logits[:, -1, words].argmax(-1).numpy()

    @torch.no_grad()
    def forwards() -> None:
        for rows in batches:
            network(**padded([prompts[row] for row in rows], pad), logits_to_keep=1, use_cache=False)

    def ours() -> object:
        return evaluator(network)

    one_row, scorer = LabelScorer(answers, pad, 1), LabelScorer(answers, pad, BATCH)
    seconds, bare, ratio = in_turn(ours, forwards, rounds)
    table.add_row("evaluator / its bare forward passes", ms(seconds), ms(bare), f"{ratio:.3f}", "<= 1.1")
    compared("evaluator / generate(max_new_tokens=2)", ours, generate, len(texts), rounds, ">= 1.7", table)
    expected = scorer.score(network, prompts)
    same_answers("answers alike", expected.log_probs.argmax(1), read, table)
    vocabulary = network.config.vocab_size
    compared(
        f"evaluator / logits of all positions (vocabulary {vocabulary})", ours, all_logits, len(texts), rounds, ">= 1",
        table,
    )  # fmt: skip
    same_answers("answers alike", expected.log_probs.argmax(1), read, table)
    single = one_row.score(network, prompts)
    compared(
        "evaluator / one row at a time", ours, lambda: one_row.score(network, prompts), len(texts), rounds, ">= 1",
        table,
    )  # fmt: skip
    same_answers("answers alike", expected.log_probs.argmax(1), single.log_probs.argmax(1), table)


def several_tokens(found: Material, network: torch.nn.Module, texts: list[str], rounds: int, table: Table) -> None:
    encoder = encoder_for(found, LONG_WORDS)
    answers, pad = encoder.answers[False], encoder.pad_token_id
    prompts = encoder.encode_prompts(texts[: ROWS // 4], False)
    tree, unrolled = LabelScorer(answers, pad, BATCH), UnrolledScorer(answers, pad, BATCH)
    lengths = sorted({len(ids) for ids in answers.scored})
    what = f"{len(answers.scored)} words of {' or '.join(map(str, lengths))} tokens"
    naive_scores = np.zeros((len(prompts), len(answers.scored)))

    def naive() -> None:
        naive_scores[:] = scored_naively(network, prompts, answers.scored, pad)

    expected = tree.score(network, prompts).log_probs
    for name, action in (
        ("one pass per word", naive),
        ("one pass per beginning of a word", lambda: unrolled.score(network, prompts)),
    ):
        compared(
            f"{what}: tree mask / {name}", lambda: tree.score(network, prompts), action, len(prompts), rounds, "> 1",
            table,
        )  # fmt: skip
        other = naive_scores if action is naive else unrolled.score(network, prompts).log_probs
        same_answers("answers alike", expected.argmax(1), other.argmax(1), table)
        largest = float(np.abs(expected - other).max())
        if largest > TOLERANCE:
            raise RuntimeError(f"{what}, {name}: log-probabilities differ by {largest}")


@torch.no_grad()
def scored_naively(
    network: torch.nn.Module, prompts: list[list[int]], words: Sequence[Sequence[int]], pad: int
) -> np.ndarray:
    """Sum the log-probabilities of each word's tokens, reading the whole prompt again for each word."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]), reverse=True)
    scores = np.zeros((len(prompts), len(words)))
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        for number, word in enumerate(words):
            inputs = padded([[*prompts[row], *word] for row in rows], pad)
            logits = network(**inputs, logits_to_keep=len(word) + 1, use_cache=False).logits[:, :-1]
            chosen = torch.tensor(word).expand(len(rows), -1)[..., None]
            scores[rows, number] = logits.float().log_softmax(-1).gather(-1, chosen).sum((1, 2)).numpy()
    return scores


def padded(batch: Sequence[Sequence[int]], pad: int) -> dict[str, torch.Tensor]:
    """Pad on the left, with the positions that the rows would have alone."""
    longest = max(map(len, batch))
    ids = torch.full((len(batch), longest), pad)
    mask = torch.zeros(len(batch), longest, dtype=torch.long)
    for row, prompt in enumerate(batch):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
