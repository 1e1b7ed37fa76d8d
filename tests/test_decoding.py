"""write_batch: settings of its own for each row, and no row that changes another."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, GPT2LMHeadModel

from p2p_trainer.decoding import Sampling, write_batch
from p2p_trainer.evaluation.generation import generate
from tests.conftest import make_rows
from tests.tiny_runs import lora


TEXTS = [row["text"] for row in make_rows(11)] + ["film"]


class Row:
    """Keeps what it takes, up to `last` tokens."""

    def __init__(self, ids, last=10**6, failing=False, **sampling):
        self.ids = ids
        self.sampling = Sampling(**{"max_new_tokens": 8, **sampling})
        self.last = last
        self.failing = failing
        self.tokens = []
        self.reasons = []

    def take(self, token):
        assert not self.reasons
        if self.failing:
            raise RuntimeError("client gone")
        self.tokens.append(token)
        return len(self.tokens) < self.last

    def end(self, reason):
        self.reasons.append(reason)


@pytest.fixture
def model(tiny_model):
    """The tiny model but louder: as it is, it repeats its last token."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape, generator=noise))
        for name, weight in model.named_parameters():
            if "_proj" in name:
                weight *= 10
    return model


@pytest.fixture
def prompts(tokenizer):
    return [tokenizer(f"Query: {text}\nAnswer:\n")["input_ids"] for text in TEXTS]


def write(model, tokenizer, rows, **options):
    write_batch(model, tokenizer, rows, **options)
    assert all(len(row.reasons) == 1 for row in rows)
    return [tokenizer.decode(row.tokens, skip_special_tokens=True) for row in rows]


class Fixed(torch.nn.Module):
    """A head that gives every next token the same scores."""

    def __init__(self, scores):
        super().__init__()
        self.scores = torch.tensor(scores)

    def forward(self, hidden):
        return self.scores.expand(*hidden.shape[:-1], -1)


def drawn(scores, count=200, **sampling):
    """How often each token is drawn in ten times as many draws."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(scores), n_positions=16, n_embd=4, n_layer=1, n_head=1))
    model.lm_head = Fixed(scores)
    model.generation_config.eos_token_id = None
    rows = [Row([1], max_new_tokens=10, seed=seed, **sampling) for seed in range(count)]
    write_batch(model, SimpleNamespace(eos_token_id=None, pad_token_id=0), rows)
    return Counter(token for row in rows for token in row.tokens)


def test_greedy_rows_are_what_generate_writes(model, tokenizer, prompts):
    expected = generate(model, tokenizer, prompts, 8)
    assert len(set(expected)) > 3
    assert write(model, tokenizer, [Row(ids) for ids in prompts]) == expected
    assert [write(model, tokenizer, [Row(ids)])[0] for ids in prompts[:3]] == expected[:3]
    # Between rows that are drawn as well.
    mixed = [Row(ids, temperature=5.0 * (place % 2), seed=place) for place, ids in enumerate(prompts)]
    texts = write(model, tokenizer, mixed)
    assert texts[::2] == expected[::2] and texts[1::2] != expected[1::2]
    assert {row.reasons[0] for row in mixed} == {"length"}
    write_batch(model, tokenizer, [])


def test_each_row_has_its_own_length(model, tokenizer, prompts):
    rows = [Row(ids, max_new_tokens=1 + place) for place, ids in enumerate(prompts)]
    texts = write(model, tokenizer, rows)
    assert [len(row.tokens) for row in rows] == list(range(1, 13)) and {row.reasons[0] for row in rows} == {"length"}
    assert texts == [generate(model, tokenizer, [ids], 1 + place)[0] for place, ids in enumerate(prompts)]


def test_a_row_that_leaves_does_not_disturb_the_others(model, tokenizer, prompts):
    expected = generate(model, tokenizer, prompts, 8)
    rows = [Row(ids, last=3 if place in (0, 5) else 99) for place, ids in enumerate(prompts)]
    texts = write(model, tokenizer, rows)
    for place, row in enumerate(rows):
        gone = place in (0, 5)
        assert len(row.tokens) == (3 if gone else 8) and row.reasons == ["stop" if gone else "length"]
        assert expected[place].startswith(texts[place]) if gone else texts[place] == expected[place]
    # Nobody is left: nothing more is computed.
    steps = []
    model.register_forward_hook(lambda *given: steps.append(1))
    write(model, tokenizer, [Row(prompts[0], last=2, max_new_tokens=400), Row(prompts[1], max_new_tokens=3)])
    assert len(steps) == 3


def test_rows_end_at_end_tokens_which_they_never_see(model, tokenizer, prompts):
    row = Row(prompts[0])
    write(model, tokenizer, [row])
    ids = row.tokens
    assert len(set(ids)) > 3 and ids.index(ids[3]) == 3
    for own, more in ((ids[3], ()), ([599, ids[3]], ()), (None, (ids[3],))):
        model.generation_config.eos_token_id = own
        rows = [Row(prompts[0]), Row(prompts[0], max_new_tokens=4), Row(prompts[0], max_new_tokens=3), Row(prompts[1])]
        texts = write(model, tokenizer, rows, end_tokens=more)
        assert [row.tokens for row in rows[:3]] == [ids[:3]] * 3
        assert [row.reasons[0] for row in rows[:3]] == ["stop", "stop", "length"]
        assert texts == generate(model, tokenizer, [prompts[0]] * 3 + [prompts[1]], 8, end_tokens=more)


def test_draws_depend_on_the_seed_and_not_on_the_batch(model, tokenizer, prompts):
    def row(seed, place=0, **changes):
        return Row(prompts[place], **{"temperature": 3.0, "top_p": 0.9, "seed": seed, **changes})

    alone = {seed: write(model, tokenizer, [row(seed)])[0] for seed in (0, 1, 2, -1, 2**63 - 2)}
    assert len(set(alone.values())) == 5
    batch = [row(2), row(7, 1, temperature=1.0, max_new_tokens=2), row(1), row(0, 2, temperature=0.0), row(0), row(1)]
    texts = write(model, tokenizer, batch)
    assert [texts[place] for place in (0, 2, 4, 5)] == [alone[2], alone[1], alone[0], alone[1]]
    torch.manual_seed(5)
    assert write(model, tokenizer, [row(1), row(-1)]) == [alone[1], alone[-1]]
    # Nor do they use up the generator that others draw from.
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(5))


def test_draws_have_the_shares_of_the_softmax():
    shares = [0.5, 0.25, 0.15, 0.1]
    scores = [math.log(share) for share in shares]
    found = drawn(scores, temperature=1.0)
    assert [found[token] / 2000 for token in range(4)] == pytest.approx(shares, abs=0.04)
    squared = [share**2 / sum(share**2 for share in shares) for share in shares]
    found = drawn(scores, temperature=0.5)
    assert [found[token] / 2000 for token in range(4)] == pytest.approx(squared, abs=0.04)


@pytest.mark.parametrize(
    "top_p, allowed",
    [(0.01, {2}), (0.45, {2}), (0.55, {2, 0}), (0.74, {2, 0}), (0.76, {2, 0, 3}), (1.0, {0, 1, 2, 3})],
)
def test_top_p_keeps_as_many_tokens_as_make_up_its_share(top_p, allowed):
    scores = [math.log(share) for share in (0.25, 0.1, 0.5, 0.15)]
    assert set(drawn(scores, 100, temperature=1.0, top_p=top_p)) == allowed
    # The share is that of the scores divided by the temperature: 0.41, 0.17, 0.17, 0.25 become nearly equal.
    assert len(drawn(scores, 100, temperature=1000.0, top_p=0.74)) == 3


@pytest.mark.parametrize("temperature", [0, 1e-300, 1e-9, 1e-4])
def test_no_temperature_is_too_low(temperature):
    for top_p in (0.5, 1.0):
        assert set(drawn([88.0, -88.0, 3e38, 88.0], 20, temperature=temperature, top_p=top_p)) == {2}


@pytest.mark.parametrize("temperature", [1e6, 1e300])
def test_no_temperature_is_too_high(temperature):
    found = drawn([1.0, -88.0, 3.0, -math.inf], temperature=temperature)
    assert set(found) == {0, 1, 2} and min(found.values()) > 500


def test_settings_of_the_model_do_not_count_and_come_back(model, tokenizer, prompts):
    rows = [Row(prompts[0]), Row(prompts[1], temperature=2.0)]
    expected = write(model, tokenizer, rows)
    own = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=5.0, suppress_tokens=rows[0].tokens)
    model.generation_config = own
    model.train()
    wrapped = get_peft_model(model, lora(lora_dropout=0.9)).train()
    for tried in (model, wrapped):
        assert write(tried, tokenizer, [Row(prompts[0]), Row(prompts[1], temperature=2.0)]) == expected
        assert model.generation_config is own and own.repetition_penalty == 5.0 and tried.training
        with pytest.raises(RuntimeError, match="client gone"):
            write_batch(tried, tokenizer, [Row(prompts[0]), Row(prompts[1], failing=True)])
        assert model.generation_config is own and tried.training and torch.is_grad_enabled()


def test_an_adapter_answers_in_the_precision_of_training(model, tokenizer, prompts):
    wrapped = get_peft_model(model, lora())
    seen = []
    module = next(module for name, module in wrapped.named_modules() if name.endswith("q_proj.base_layer"))
    module.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    expected = generate(wrapped, tokenizer, prompts, 8, autocast=torch.bfloat16)
    seen.clear()
    assert write(wrapped, tokenizer, [Row(ids) for ids in prompts], autocast=torch.bfloat16) == expected
    assert set(seen) == {torch.bfloat16} and not torch.is_autocast_enabled("cpu")


def test_rows_that_do_not_fit_together_are_written_one_after_the_other(tokenizer):
    torch.manual_seed(0)
    # Learned positions: there is none behind the last one, not even for a row that has ended.
    model = GPT2LMHeadModel(GPT2Config(vocab_size=600, n_positions=64, n_embd=16, n_layer=1, n_head=2)).eval()
    model.generation_config.eos_token_id = None
    sizes = [(60, 4), (4, 60), (30, 30), (2, 3)]
    rows = [Row(list(range(5, 5 + size)), max_new_tokens=longest) for size, longest in sizes]
    calls = []
    own = model.generate
    model.generate = lambda **given: calls.append(tuple(given["input_ids"].shape)) or own(**given)
    texts = write(model, tokenizer, rows)
    assert calls == [(2, 60), (1, 4), (1, 30)]
    assert [len(row.tokens) for row in rows] == [4, 60, 30, 3]
    assert texts == [generate(model, tokenizer, [row.ids], row.sampling.max_new_tokens)[0] for row in rows]


def test_what_can_not_be_written_is_refused(model, tokenizer):
    fine = Row([7])
    for row, message in (
        (Row([7] * 505), "505 tokens; with `max_new_tokens` 8 .* 512 positions"),
        (Row([]), "no token at all"),
        (Row([7], max_new_tokens=None), "has no `max_new_tokens`"),
    ):
        with pytest.raises(ValueError, match=message):
            write_batch(model, tokenizer, [fine, row])
    assert not fine.tokens and not fine.reasons


@pytest.mark.parametrize(
    "name, values",
    [
        ("max_new_tokens", (0, -1, True, 2.0, "3")),
        ("temperature", (-0.1, math.nan, math.inf, True, "1", None)),
        ("top_p", (0, 0.0, 1.01, -1, math.nan, True, None)),
        ("seed", (2**63, -(2**63) - 1, 1.0, True, None)),
    ],
)
def test_settings_outside_their_range_are_named(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"`{name}` is a"):
            Sampling(**{name: value})
    Sampling(None, 0, 1, -(2**63))
