"""LabelScorer: the same numbers as reading every word behind every prompt, one by one and without padding."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

from p2p_trainer import LabelSpace, PromptEncoder, PromptFormat
from p2p_trainer.evaluation import LabelScorer
from tests.conftest import make_rows


# One token each; two tokens of which all share the first; words that start others, told apart by their end; a mix.
SPACES = {
    "digits": LabelSpace(("0", "1"), ("2", "3")),
    "same first token": LabelSpace(("10", "11"), ("12", "13")),
    "prefixes": LabelSpace(("1", "10"), ("100", "2")),
    "words": LabelSpace(("goodness", "good"), ("badly", "bad")),
}
TEXTS = [row["text"] for row in make_rows(11)] + ["film"]


def load(folder, attention):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32).eval()


def one_by_one(model, prompt, word):
    """Sum of the log-probabilities of a word's tokens, from one plain forward pass."""
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([[*prompt, *word]])).logits[0].log_softmax(-1)
    return sum(log_probs[len(prompt) - 1 + place, token].item() for place, token in enumerate(word))


def favour(model, paths, seed):
    """Make tokens likely that follow each other in a label word, so that greedy answers spell some."""
    table = torch.zeros(model.config.vocab_size, model.config.vocab_size)
    noise = torch.Generator().manual_seed(seed)
    for path in paths:
        for token, following in itertools.pairwise(path):
            table[token, following] = 8 + torch.randn((), generator=noise)
    read = []

    def remember(module, arguments, keywords):
        read.append(keywords["input_ids"])

    def add(module, inputs, output):
        return output + table[read[-1][:, -output.shape[1] :]]

    model.register_forward_pre_hook(remember, with_kwargs=True)
    model.lm_head.register_forward_hook(add)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SPACES)
def test_scores_are_those_of_single_passes(tiny_model, tokenizer, name, attention):
    encoder = PromptEncoder(PromptFormat(SPACES[name]), tokenizer)
    model = load(tiny_model, attention)
    prompts = encoder.encode_prompts(TEXTS, keyed=True)
    assert len({len(prompt) for prompt in prompts}) > 3
    answers = encoder.answers[True]
    assert answers.single_token == (name in ("digits", "same first token"))
    expected = [[one_by_one(model, prompt, word) for word in answers.scored] for prompt in prompts]
    for batch_size in (1, 3, 32):
        scores = LabelScorer(answers, encoder.pad_token_id, batch_size).score(model, prompts)
        assert scores.log_probs.shape == (12, 4)
        assert scores.log_probs == pytest.approx(torch.tensor(expected).numpy(), abs=2e-5)


def test_probabilities_of_words_with_their_end_count_the_end(tiny_model, tokenizer):
    # "1" starts "10": "1" alone means "1" and the end of the answer.
    encoder = PromptEncoder(PromptFormat(SPACES["prefixes"]), tokenizer)
    answers = encoder.answers[False]
    end, one, zero = tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["1", "0"])
    assert answers.terminated
    assert answers.scored[:3] == ((one, end), (one, zero, end), (one, zero, zero, end))
    model = load(tiny_model, "sdpa")
    prompt = encoder.encode_prompts(["a fine film"], keyed=False)[0]
    with torch.no_grad():
        probabilities = model(input_ids=torch.tensor([[*prompt, one]])).logits[0].softmax(-1)
    by_hand = probabilities[-2, one] * probabilities[-1, end]
    scores = LabelScorer(answers, encoder.pad_token_id).score(model, [prompt])
    assert scores.log_probs[0, 0] == pytest.approx(by_hand.log().item(), abs=1e-5)


@pytest.mark.parametrize("name", SPACES)
def test_free_answer_is_what_greedy_generation_spells(tiny_model, tokenizer, name):
    encoder = PromptEncoder(PromptFormat(SPACES[name]), tokenizer)
    answers = encoder.answers[False]
    longest = max(map(len, answers.scored))
    prompts = encoder.encode_prompts(TEXTS[-4:], keyed=False)
    paths = [(prompts[0][-1], *word) for word in answers.scored]
    found = set()
    for seed in range(8):
        model = load(tiny_model, "sdpa")
        # The end of a word is one of its tokens, not the end of the comparison.
        model.generation_config.eos_token_id = None
        if seed:
            favour(model, paths, seed)
        free = LabelScorer(answers, encoder.pad_token_id, 3).score(model, prompts).free.tolist()
        for prompt, answer in zip(prompts, free, strict=True):
            ids = torch.tensor([prompt])
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=longest, do_sample=False
            )
            spelled = tuple(output[0, len(prompt) :].tolist())
            matches = [index for index, word in enumerate(answers.scored) if spelled[: len(word)] == word]
            assert matches == ([] if answer == -1 else [answer])
        found |= set(free)
    assert len(found) > 2


def test_padding_changes_nothing(tiny_model, tokenizer):
    encoder = PromptEncoder(PromptFormat(SPACES["digits"]), tokenizer)
    model = load(tiny_model, "sdpa")
    short, long = encoder.encode_prompts(["film", " ".join(TEXTS)], keyed=True)
    scorer = LabelScorer(encoder.answers[True], encoder.pad_token_id)
    alone, beside = scorer.score(model, [short]), scorer.score(model, [short, long])
    assert len(long) > 4 * len(short)
    assert beside.log_probs[0] == pytest.approx(alone.log_probs[0], abs=1e-5)
    # Nor does the token that is used for it.
    other = LabelScorer(encoder.answers[True], 7).score(model, [short, long])
    assert other.log_probs == pytest.approx(beside.log_probs, abs=1e-6)


def test_no_prompts_give_no_scores(tiny_model, tokenizer):
    encoder = PromptEncoder(PromptFormat(SPACES["digits"]), tokenizer)
    scores = LabelScorer(encoder.answers[True], encoder.pad_token_id).score(load(tiny_model, "sdpa"), [])
    assert scores.log_probs.shape == (0, 4) and scores.free.shape == (0,)


@pytest.mark.parametrize("training", [True, False])
def test_mode_of_the_model_is_restored(tiny_model, tokenizer, training):
    encoder = PromptEncoder(PromptFormat(SPACES["digits"]), tokenizer)
    scorer = LabelScorer(encoder.answers[True], encoder.pad_token_id)
    model = load(tiny_model, "sdpa").train(training)
    scorer.score(model, [[1, 2]])
    assert model.training is training
    with pytest.raises(IndexError):
        scorer.score(model, [[10**6]])
    assert model.training is training
