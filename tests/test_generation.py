"""Generated answers: greedy, and the same in any batch."""

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig

from p2p_trainer.evaluation.generation import check_room, generate
from tests.conftest import make_rows
from tests.tiny_runs import lora


TEMPLATE = "Query: {}\nAnswer:\n".format
TEXTS = [row["text"] for row in make_rows(11)] + ["film"]


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
    return [tokenizer(TEMPLATE(text))["input_ids"] for text in TEXTS]


def one_by_one(model, tokenizer, prompt, length):
    """Greedy decoding by hand: no cache, no padding, no `generate`."""
    model.eval()
    ids = list(prompt)
    for _ in range(length):
        with torch.no_grad():
            token = model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_answers_are_those_of_greedy_decoding_without_padding(model, tokenizer, prompts):
    assert len({len(prompt) for prompt in prompts}) > 3
    ids = [one_by_one(model, tokenizer, prompt, 8) for prompt in prompts]
    by_hand = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert len(set(by_hand)) > 3
    for batch_size in (1, 5, 64):
        assert generate(model, tokenizer, prompts, 8, batch_size) == by_hand
    # Nor does it depend on what else is asked, or how often.
    assert generate(model, tokenizer, [prompts[3], prompts[0], prompts[3]], 8) == [by_hand[i] for i in (3, 0, 3)]


def test_settings_of_the_model_do_not_count(model, tokenizer, prompts):
    expected = generate(model, tokenizer, prompts, 8)
    own = model.generation_config
    first = [tokenizer(text)["input_ids"][0] for text in expected if text]
    own.update(do_sample=True, temperature=9.0, repetition_penalty=5.0, suppress_tokens=first, num_beams=2)
    sampled = model.generate(torch.tensor([prompts[0]]), max_new_tokens=8)
    assert tokenizer.decode(sampled[0, len(prompts[0]) :]) != expected[0]
    assert generate(model, tokenizer, prompts, 8) == generate(model, tokenizer, prompts, 8) == expected
    assert model.generation_config is own and own.repetition_penalty == 5.0
    # An adapter hands the settings of its base on.
    wrapped = get_peft_model(model, lora())
    assert generate(wrapped, tokenizer, prompts, 8) == expected
    assert wrapped.generation_config is own


def test_dropout_is_off_and_the_mode_restored(model, tokenizer, prompts):
    expected = generate(model, tokenizer, prompts, 8)
    wrapped = get_peft_model(model, lora(lora_dropout=0.9)).train()
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(0))
    changed = generate(wrapped, tokenizer, prompts, 8)
    assert changed != expected and changed == generate(wrapped, tokenizer, prompts, 8)
    assert wrapped.training
    assert generate(wrapped.eval(), tokenizer, prompts, 8) == changed and not wrapped.training
    with pytest.raises(IndexError):
        generate(wrapped.train(), tokenizer, [[10**6]], 8)
    assert wrapped.training


def test_answers_end_at_any_end_token_of_the_model(model, tokenizer, prompts):
    ids = one_by_one(model, tokenizer, prompts[0], 8)
    assert len(set(ids)) > 3
    for ends in (ids[2], [599, ids[2]]):
        model.generation_config.eos_token_id = ends
        assert generate(model, tokenizer, prompts[:1], 8) == [tokenizer.decode(ids[: ids.index(ids[2])])]
    # The other rows of a batch go on; behind its end an answer is not read, whatever it is padded with.
    model.generation_config.eos_token_id = ids[2]
    both = generate(model, tokenizer, prompts[:3], 8)
    assert both == [text for prompt in prompts[:3] for text in generate(model, tokenizer, [prompt], 8)]


def test_what_does_not_fit_is_refused(model, tokenizer):
    assert len(generate(model, tokenizer, [[7] * 508], 4)) == 1
    with pytest.raises(ValueError, match=r"509 tokens; with `max_new_tokens` 4 .* 512 positions"):
        generate(model, tokenizer, [[7], [7] * 509], 4)
    with pytest.raises(ValueError, match="no token at all"):
        generate(model, tokenizer, [[7], []], 4)
    for name, values in (("max_new_tokens", (0, 4)), ("batch_size", (4, True))):
        with pytest.raises(ValueError, match=f"`{name}` is a number of at least 1"):
            generate(model, tokenizer, [[7]], *values)
    assert generate(model, tokenizer, [], 4) == []


def test_room_is_checked_from_model_or_configuration(model):
    for given in (model, model.config, get_peft_model(model, lora()), torch.nn.DataParallel(model)):
        check_room(given, [[7] * 508], 4)
        with pytest.raises(ValueError, match="509 tokens"):
            check_room(given, [[7], [7] * 509], 4)
    for given in (BloomConfig(), torch.nn.Linear(1, 1)):  # one without positions, one without a configuration
        check_room(given, [[7] * 10**6], 4)


def test_an_adapter_answers_in_the_precision_of_training(model, tokenizer, prompts):
    wrapped = get_peft_model(model, lora())
    seen = []
    module = next(module for name, module in wrapped.named_modules() if name.endswith("q_proj.base_layer"))
    module.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    # What accelerate wraps is not what an adapter's `generate` calls.
    own = wrapped.forward
    wrapped.forward = torch.autocast("cpu", torch.bfloat16)(own)
    plain = generate(wrapped, tokenizer, prompts, 8)
    assert set(seen) == {torch.float32}
    seen.clear()
    mixed = generate(wrapped, tokenizer, prompts, 8, autocast=torch.bfloat16)
    assert set(seen) == {torch.bfloat16} and len(mixed) == len(plain)
    assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert generate(model, tokenizer, prompts, 8) == mixed


def test_processes_share_the_work_and_call_the_model_equally_often(model, tokenizer, prompts, monkeypatch):
    expected = generate(model, tokenizer, prompts, 4, 5)
    calls, shares = [], {}
    own = model.generate
    monkeypatch.setattr(model, "generate", lambda **given: calls.append(len(given["input_ids"])) or own(**given))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)

    def gather(found, share):
        shares[dist.get_rank()] = share
        found[:] = [shares.get(rank, {}) for rank in range(2)]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    with pytest.raises(KeyError):  # the other process's share is missing yet
        generate(model, tokenizer, prompts, 4, 5)
    assert calls == [5, 2]
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    assert generate(model, tokenizer, prompts, 4, 5) == expected
    # Twelve prompts are three batches: the second process repeats the last one.
    assert calls == [5, 2, 5, 2] and len(shares[0]) == 7 and len(shares[1]) == 7


def test_a_real_model_answers_the_same_in_any_batch(real_data):
    folder = real_data / "models/lab-lm"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(TEMPLATE(text))["input_ids"] for text in TEXTS]
    answers = generate(model, tokenizer, prompts, 16, batch_size=12)
    assert len(set(answers)) > 3
    assert answers == generate(model, tokenizer, prompts, 16, batch_size=1)
    by_hand = [one_by_one(model, tokenizer, prompt, 16) for prompt in prompts[:3]]
    assert answers[:3] == tokenizer.batch_decode(by_hand, skip_special_tokens=True)
