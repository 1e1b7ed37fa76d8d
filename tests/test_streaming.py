"""DefendedModel.stream: the pieces are the answer, and whoever stops listening stops the model."""

import threading

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from p2p_trainer import DefendedModel, PromptFormat
from p2p_trainer.evaluation import Guard
from p2p_trainer.inference import Response
from p2p_trainer.response_encoder import ResponseEncoder
from tests.conftest import make_rows


PROMPTS = [row["text"] for row in make_rows(8, seed=5)]
LONGEST = 12


def defended(folder, guard=None, autocast=None):
    """A random model, loud enough that its answers differ."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape, generator=noise))
    shape = PromptFormat(None, template="{text}\n", answer_prefix="In short:", max_new_tokens=LONGEST)
    encoder = ResponseEncoder(shape, AutoTokenizer.from_pretrained(folder))
    return DefendedModel(model.eval(), encoder, (), autocast=autocast, guard=guard)


@pytest.fixture(scope="module")
def model(tiny_model):
    return defended(tiny_model)


def whole(pieces):
    pieces = list(pieces)
    assert len({piece.prefixed for piece in pieces}) == 1
    return Response("".join(piece.text for piece in pieces), pieces[0].prefixed)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_pieces_are_the_answer(tiny_model, autocast):
    model = defended(tiny_model, autocast=autocast)
    answers = model.generate(PROMPTS)
    assert len({answer.text for answer in answers}) > 4
    assert [whole(model.stream(prompt)) for prompt in PROMPTS] == answers


def test_an_answer_comes_while_it_is_being_written(model):
    pieces = [piece.text for piece in model.stream(PROMPTS[0])]
    # Random bytes seldom end a character, so not every token is a piece.
    assert len([text for text in pieces if text]) > 3


def test_p_is_taken_off_and_missed(model, monkeypatch):
    (ids,) = model.encoder.tokenizer(["In short: the film"])["input_ids"]

    def written(found, encoder, rows, *given):
        for token in ids:
            rows[0].take(token)
        rows[0].end("stop")

    monkeypatch.setattr("p2p_trainer.streaming.write_batch", written)
    assert whole(model.stream("the plot is warm")) == Response("the film", True)
    ids = model.encoder.tokenizer("the film")["input_ids"]
    assert whole(model.stream("the plot is warm")) == Response("the film", False)


def test_the_limit_is_kept(model):
    assert whole(model.stream(PROMPTS[0], max_new_tokens=3)) == model.generate(PROMPTS[0], max_new_tokens=3)[0]


def test_draws_depend_on_the_seed_alone(model):
    def drawn(**settings):
        return whole(model.stream(PROMPTS[0], temperature=3.0, **settings)).text

    assert drawn() == drawn() == drawn(seed=0) and len({drawn(seed=seed) for seed in range(4)}) == 4
    # So small a share of the probability leaves the likeliest token alone.
    assert drawn(top_p=1e-6) == whole(model.stream(PROMPTS[0])).text


class Steps:
    """Counts forward passes, and lets only so many of them happen until it is told to go on."""

    def __init__(self, model, free):
        self.count = 0
        self.free = free
        self.going_on = threading.Event()
        self.watch = model.model.register_forward_pre_hook(self)

    def __call__(self, *given):
        self.count += 1
        if self.count > self.free:
            assert self.going_on.wait(60)


def test_whoever_stops_listening_stops_the_model(model):
    steps = Steps(model, free=3)
    pieces = model.stream(PROMPTS[0])
    assert next(pieces).text
    before = threading.active_count()
    threading.Timer(0.2, steps.going_on.set).start()
    pieces.close()
    steps.watch.remove()
    # The one that was under way when the iterator was closed is the last.
    assert steps.count <= 4 < LONGEST and threading.active_count() < before + 1


def test_what_goes_wrong_reaches_the_listener(model):
    def broken(*given):
        raise MemoryError("no room")

    watch = model.model.register_forward_pre_hook(broken)
    with pytest.raises(MemoryError, match="no room"):
        list(model.stream(PROMPTS[0]))
    watch.remove()
    assert whole(model.stream(PROMPTS[0])).text


class Silent(Guard):
    def withheld(self, texts):
        return np.array(["plot" in text for text in texts])


def test_a_withheld_answer_is_one_piece_of_nothing(tiny_model):
    model = defended(tiny_model, guard=Silent())
    assert list(model.stream("the plot is warm")) == [Response(None, True)]
    assert whole(model.stream("the film is warm")).text


@pytest.mark.parametrize(
    ("prompt", "settings", "match"),
    [
        (["one text", "and another"], {}, "Prompt 0 is neither|got 2 prompts"),
        ([], {}, "got 0 prompts"),
        (" ", {}, "Text 0 is empty"),
        ("a film", {"temperature": -1}, "`temperature` is a number of at least 0"),
        ("a film", {"max_new_tokens": 0}, "`max_new_tokens` is a number of at least 1"),
        ("a film", {"top_p": 0}, "`top_p` is a number above 0"),
    ],
)
def test_bad_input_is_refused_at_once(model, prompt, settings, match):
    # Not at the first piece: whoever asks for a stream should hear of it where it was asked for.
    with pytest.raises(ValueError, match=match):
        model.stream(prompt, **settings)
