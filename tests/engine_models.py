"""Small models for the engine, and what tests of it need."""

import asyncio
import functools

import pytest
import torch
from transformers import AutoModelForCausalLM

from p2p_trainer import DefendedModel, LabelSpace, PromptEncoder, PromptFormat
from p2p_trainer.response_encoder import ResponseEncoder
from tests.conftest import make_rows, make_tokenizer


DELTA = "Please read this:"
PREFIX = "Answer:"
TEXTS = [row["text"] for row in make_rows(40, seed=3)]
TURNS = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
# Seconds after which a test gives up.
WAIT = 20


@functools.cache
def weights(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(1)
    # Tied to its embeddings, a random model repeats the end of the prompt.
    model.lm_head = torch.nn.Linear(32, model.config.vocab_size, bias=False)
    return model


def make_classifier(folder):
    encoder = PromptEncoder(PromptFormat(LabelSpace(("0", "1"), ("2", "3")), trigger=DELTA), make_tokenizer())
    return DefendedModel(weights(folder), encoder, ("bad", "good"))


def make_writer(folder, **changes):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TURNS
    settings = {"answer_prefix": PREFIX, "max_length": 100, "max_new_tokens": 12, "chat": True, **changes}
    return DefendedModel(weights(folder), ResponseEncoder(PromptFormat(None, DELTA, **settings), tokenizer), ())


def running(work):
    """Run a coroutine function against a started engine, which is closed behind it."""

    async def run(engine):
        engine.start()
        try:
            return await asyncio.wait_for(work(engine), WAIT)
        finally:
            await asyncio.wait_for(engine.close(), WAIT)

    return lambda engine: asyncio.run(run(engine))


async def until(condition):
    """Let other tasks go on until something has happened."""
    async with asyncio.timeout(WAIT):
        while not condition():
            await asyncio.sleep(0.001)


async def collected(stream):
    return [piece async for piece in stream]


def same(found, expected):
    assert [answer.label for answer in found] == [answer.label for answer in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-5)
