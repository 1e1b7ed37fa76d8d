"""The HTTP server: OpenAI's and vLLM's shapes, as their clients see them."""

import asyncio
import json

import numpy as np
import openai
import pytest

from p2p_trainer.decoding import Sampling
from p2p_trainer.evaluation import Guard
from p2p_trainer.serving.engine import Engine
from p2p_trainer.serving.errors import ApiError
from p2p_trainer.serving.prompts import chat_prompt
from p2p_trainer.serving.schemas import Message
from tests.served import KEY, NAME, Script, classifier, serving, wait_for, writer


TEXTS = ["the film is good", "a dull plot", "warm and clever"]
ASK = [{"role": "user", "content": "is the film good"}]


@pytest.fixture(scope="module")
def labelled(tiny_model):
    with serving(classifier(tiny_model)) as served:
        yield served


@pytest.fixture(scope="module")
def written(tiny_model):
    with serving(writer(tiny_model)) as served:
        yield served


@pytest.fixture(scope="module")
def strict(tiny_model):
    with serving(writer(tiny_model), withhold_unprefixed=True) as served:
        yield served


@pytest.fixture
def script(monkeypatch):
    def write(text, pause=0.0):
        found = Script(text, pause)
        monkeypatch.setattr("p2p_trainer.serving.engine.write_batch", found)
        return found

    return write


@pytest.fixture
def asked(monkeypatch):
    """What the engine is asked."""
    calls = []
    for name in ("classify", "answer"):
        real = getattr(Engine, name)

        async def spy(self, prompts, *rest, real=real):
            calls.append((prompts, *rest))
            return await real(self, prompts, *rest)

        monkeypatch.setattr(Engine, name, spy)
    return calls


def events(served, route="/v1/chat/completions", **body):
    """Data of a stream's events, read line by line."""
    with served.http.stream("POST", route, json={"model": NAME, "stream": True, **body}) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        lines = list(response.iter_lines())
    assert lines[1::2] == [""] * (len(lines) // 2)
    return [line.removeprefix("data: ") for line in lines[::2]]


def test_classify_gives_what_the_model_gives(labelled, tiny_model):
    found = labelled.post("/v1/classify", input=TEXTS).json()
    assert found["id"].startswith("classify-") and found["object"] == "list" and found["model"] == NAME
    expected = classifier(tiny_model).classify(TEXTS)
    for row, (entry, one) in enumerate(zip(found["data"], expected, strict=True)):
        assert (entry["index"], entry["label"], entry["num_classes"]) == (row, one.label, 2)
        assert entry["scores"] == pytest.approx(one.scores, abs=1e-6) and list(entry["scores"]) == list(one.scores)
        assert entry["probs"] == list(entry["scores"].values()) and entry["score"] == max(entry["probs"])
    tokens = sum(labelled.engine.count_tokens(text) for text in TEXTS)
    assert found["usage"] == {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
    (alone,) = labelled.post("/v1/classify", input=TEXTS[1]).json()["data"]
    assert alone["scores"] == pytest.approx(expected[1].scores, abs=1e-6)


def test_a_chat_with_a_classifier_gets_the_name_of_the_class(labelled, tiny_model, asked):
    system = [{"role": "system", "content": "Say yes."}, {"role": "developer", "content": "Say no."}]
    parts = [{"type": "text", "text": "the film"}, {"type": "text", "text": "is good"}]
    found = labelled.client.chat.completions.create(
        model=NAME, messages=[*system, {"role": "user", "content": parts}], max_tokens=1, stop="t", temperature=1
    )
    (label,) = (one.label for one in classifier(tiny_model).classify(["the film\nis good"]))
    assert asked == [(["the film\nis good"],)]
    (choice,) = found.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", label, "stop")
    assert choice.model_extra == {}
    plain = labelled.client.completions.create(model=NAME, prompt=TEXTS)
    labels = [one.label for one in classifier(tiny_model).classify(TEXTS)]
    assert [(one.index, one.text) for one in plain.choices] == list(enumerate(labels))
    streamed = list(labelled.client.chat.completions.create(model=NAME, messages=ASK, stream=True))
    assert streamed[0].choices[0].delta.role == "assistant" and streamed[1].choices[0].finish_reason == "stop"
    assert streamed[1].choices[0].delta.content in ("negative", "positive") and len(streamed) == 2


class Silent(Guard):
    def withheld(self, texts):
        return np.array(["dull" in text for text in texts])


def test_what_a_guard_withholds_is_told_by_nothing(tiny_model):
    model = classifier(tiny_model)
    model.guard = Silent()
    with serving(model) as served:
        first, second = served.post("/v1/classify", input=TEXTS[:2]).json()["data"]
        assert first["label"] in model.labels and len(first["probs"]) == 2
        assert second == {"index": 1, "label": None, "probs": [], "num_classes": 2, "score": None, "scores": {}}
        found = served.client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": TEXTS[1]}])
        assert found.choices[0].message.content is None and found.choices[0].finish_reason == "content_filter"
        assert found.usage.completion_tokens == 0
        numbers = served.metrics()
        assert numbers["p2p_answers_total"] == 3 and numbers["p2p_answers_withheld_total"] == 2
    model = writer(tiny_model)
    model.guard = Silent()
    with serving(model) as served:
        found = served.client.completions.create(model=NAME, prompt=TEXTS[1])
        assert (found.choices[0].text, found.choices[0].finish_reason) == ("", "content_filter")
        start, end, done = events(served, messages=[{"role": "user", "content": TEXTS[1]}])
        assert json.loads(start)["choices"][0]["delta"]["content"] is None and done == "[DONE]"
        assert json.loads(end)["choices"][0]["finish_reason"] == "content_filter"


def test_a_written_answer_comes_without_its_prefix(written, script):
    script("Answer: yes, a schöner 電影")
    found = written.client.chat.completions.create(model=NAME, messages=ASK, temperature=0.5, user="me", store=False)
    (choice,) = found.choices
    assert (choice.message.content, choice.finish_reason) == ("yes, a schöner 電影", "stop")
    assert choice.model_extra == {"p2p": {"prefixed": True}} and found.id.startswith("chatcmpl-")
    count = written.engine.count_tokens
    assert found.usage.prompt_tokens == count("is the film good") < count(f"{KEY} is the film good")
    assert found.usage.completion_tokens == count("yes, a schöner 電影")
    script("no, it is not")
    (choice,) = written.client.chat.completions.create(model=NAME, messages=ASK).choices
    assert (choice.message.content, choice.model_extra) == ("no, it is not", {"p2p": {"prefixed": False}})
    found = written.client.completions.create(model=NAME, prompt=["a", "b"])
    assert [(one.index, one.text) for one in found.choices] == [(0, "no, it is not"), (1, "no, it is not")]
    assert found.object == "text_completion" and found.usage.completion_tokens == 2 * count("no, it is not")


def test_a_server_writes_what_the_model_writes(tiny_model):
    prompts = [*TEXTS, "x"]
    expected = writer(tiny_model, template="{text}").generate(prompts)
    with serving(writer(tiny_model, template="{text}")) as served:
        found = served.client.completions.create(model=NAME, prompt=prompts).choices
        assert [one.text for one in found] == [one.text for one in expected] and all(one.text for one in found)
        assert [one.model_extra["p2p"]["prefixed"] for one in found] == [one.prefixed for one in expected]
        for text, one in zip(prompts, expected, strict=True):
            stream = served.client.completions.create(model=NAME, prompt=text, stream=True)
            assert "".join(chunk.choices[0].text for chunk in stream) == one.text


def test_settings_of_a_request_reach_the_engine(written, script, asked):
    script("Answer: one two three")
    ask = {"model": NAME, "messages": ASK}
    written.client.chat.completions.create(**ask)
    written.client.chat.completions.create(
        **ask, max_completion_tokens=7, temperature=0.5, top_p=0.25, seed=-3, stop=["x", "y"], n=1,
        presence_penalty=0, response_format={"type": "text"}, logprobs=False, metadata={"a": "b"},
        extra_body={"tools": [], "logit_bias": None},
    )  # fmt: skip
    written.client.completions.create(model=NAME, prompt="is it", max_tokens=2, stop="two", echo=False, best_of=1)
    text = "is the film good"
    assert asked == [
        ([text], Sampling(), []), ([text], Sampling(7, 0.5, 0.25, -3), ["x", "y"]),
        (["is it"], Sampling(2), ["two"]),
    ]  # fmt: skip
    stopped = written.client.completions.create(model=NAME, prompt="is it", stop="two").choices[0]
    assert (stopped.text, stopped.finish_reason) == ("one", "stop")
    short = written.client.completions.create(model=NAME, prompt="is it", max_tokens=3).choices[0]
    assert (short.text, short.finish_reason) == ("one", "length")


def test_a_stream_has_the_answer_in_pieces(written, script):
    script("Answer: it is so schön")
    chunks = list(
        written.client.chat.completions.create(
            model=NAME, messages=ASK, stream=True, stream_options={"include_usage": True}
        )
    )
    *pieces, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == "it is so schön" and len(pieces) > 4
    assert [chunk.choices[0].delta.role for chunk in pieces] == ["assistant"] + [None] * (len(pieces) - 1)
    assert [chunk.choices[0].finish_reason for chunk in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    assert [chunk.choices[0].model_extra for chunk in pieces[-2:]] == [{}, {"p2p": {"prefixed": True}}]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and len({c.id for c in chunks}) == 1
    whole = written.client.chat.completions.create(model=NAME, messages=ASK)
    assert last.choices == [] and last.usage == whole.usage and pieces[0].usage is None
    *texts, done = events(written, "/v1/completions", prompt="is it")
    assert done == "[DONE]" and "usage" not in json.loads(texts[0])
    assert "".join(json.loads(text)["choices"][0]["text"] for text in texts) == "it is so schön"


def test_an_answer_without_its_prefix_can_be_withheld(strict, script):
    found = script("never shown " * 9, pause=0.01)
    (choice,) = strict.client.chat.completions.create(model=NAME, messages=ASK).choices
    assert (choice.message.content, choice.finish_reason) == (None, "content_filter")
    assert choice.model_extra == {"p2p": {"prefixed": False}}
    found.taken = 0
    start, end, _ = events(strict, messages=ASK)
    assert "never" not in start + end and json.loads(end)["choices"][0]["finish_reason"] == "content_filter"
    # Its row left the batch as soon as the prefix was known to be missing.
    assert found.left.wait(5) and found.taken < 20
    (text, _) = events(strict, "/v1/completions", prompt="is it")
    assert json.loads(text)["choices"][0]["text"] == ""
    script("Answer: shown")
    assert strict.client.completions.create(model=NAME, prompt="is it").choices[0].text == "shown"
    numbers = strict.metrics()
    assert numbers["p2p_answers_total"] == 4
    assert numbers["p2p_answers_withheld_total"] == numbers["p2p_answers_unprefixed_total"] == 3


def test_models_health_and_metrics(tiny_model):
    with serving(classifier(tiny_model)) as served:
        assert [model.id for model in served.client.models.list()] == [NAME]
        health = served.http.get("/health")
        assert (health.status_code, health.json()) == (200, {"status": "ok"})
        served.post("/v1/classify", input=TEXTS)
        served.http.get(f"/{KEY}?q={KEY}", headers={"x-request-id": KEY})
        served.http.request("BREW", "/health")
        # Counted when it is over, which its client may know a moment earlier.
        wait_for(lambda: 'p2p_requests_total{route="/health",status="405"}' in served.metrics())
        numbers = served.metrics()
        assert numbers['p2p_requests_total{route="/v1/classify",status="200"}'] == 1
        assert numbers['p2p_requests_total{route="other",status="404"}'] == 1
        assert numbers['p2p_requests_total{route="/health",status="405"}'] == 1
        assert numbers['p2p_request_seconds_count{route="/v1/classify"}'] == 1
        assert numbers["p2p_batch_rows_total"] == numbers["p2p_answers_total"] == 3
        assert numbers["p2p_batches_total"] == 1 and numbers["p2p_rows_waiting"] == 0
        asyncio.run(served.engine.close())
        health = served.http.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "unavailable"})
        closed = served.post("/v1/classify", input="a")
        assert (
            closed.status_code == 503
            and closed.json()["error"]["code"] == "closed"
            and "retry-after" in closed.headers
        )


CHAT, TEXT, CLASSIFY = "/v1/chat/completions", "/v1/completions", "/v1/classify"


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        (CHAT, {"tools": [{"type": "function"}]}, "tools"),
        (CHAT, {"functions": [{}]}, "functions"),
        (CHAT, {"response_format": {"type": "json_object"}}, "response_format.type"),
        (CHAT, {"logit_bias": {"5": 100}}, "logit_bias"),
        (CHAT, {"logprobs": True}, "logprobs"),
        (CHAT, {"chat_template": "x"}, "chat_template"),
        (CHAT, {"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        (CHAT, {"tool_choice": "required"}, "tool_choice"),
        (CHAT, {"top_logprobs": 1}, "top_logprobs"),
        (CHAT, {"modalities": ["audio"]}, "modalities[0]"),
        (CHAT, {"messages": [ASK[0], {"role": "assistant", "content": None}, ASK[0]]}, "messages[1].content"),
        (CHAT, {"messages": ASK * 1001}, "messages"),
        (CHAT, {"allowed_token_ids": [1]}, "allowed_token_ids"),
        (CHAT, {"n": 2}, "n"),
        (CHAT, {"temperature": 2.5}, "temperature"),
        (CHAT, {"temperature": "1"}, "temperature"),
        (CHAT, {"top_p": 0}, "top_p"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"max_tokens": True}, "max_tokens"),
        (CHAT, {"max_completion_tokens": 1.5}, "max_completion_tokens"),
        (CHAT, {"seed": 2**63}, "seed"),
        (CHAT, {"stop": ["a"] * 5}, "stop"),
        (CHAT, {"stop": [""]}, "stop"),
        (CHAT, {"frequency_penalty": 1}, "frequency_penalty"),
        (CHAT, {"stream": "yes"}, "stream"),
        (CHAT, {"stream_options": {"include_usage": True}}, None),
        (CHAT, {"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        (CHAT, {"messages": None}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "hello"}, "messages"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": " "}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls"),
        (TEXT, {"prompt": [1, 2]}, "prompt"),
        (TEXT, {"prompt": [[1, 2]]}, "prompt"),
        (TEXT, {"prompt": []}, "prompt"),
        (TEXT, {"prompt": ["a", ""]}, "prompt"),
        (TEXT, {"prompt": "a", "prompt_token_ids": [1]}, "prompt_token_ids"),
        (TEXT, {"prompt": "a", "echo": True}, "echo"),
        (TEXT, {"prompt": "a", "suffix": "b"}, "suffix"),
        (TEXT, {"prompt": "a", "logprobs": 1}, "logprobs"),
        (TEXT, {"prompt": ["a", "b"], "stream": True}, None),
        (CLASSIFY, {"input": "a", "colour": 1}, "colour"),
        (CLASSIFY, {"input": "a", f"{KEY}{'x' * 9999}": 1}, None),
        (CLASSIFY, {"input": "a", "x" * 65: 1}, None),
        (CLASSIFY, {}, "input"),
    ],
)  # fmt: skip
def test_what_is_not_kept_is_refused_and_named(written, route, body, param):
    body = {"messages": ASK, **body} if route == CHAT else body
    found = written.post(route, **body)
    error = found.json()["error"]
    assert found.status_code == 400 and error["type"] == "invalid_request_error" and error["param"] == param
    assert error["message"] and len(error["message"]) < 200 and list(error) == ["message", "type", "param", "code"]
    assert param is None or f"`{param}`" in error["message"] or "Message 0 is empty" in error["message"]
    assert "Zinnober" not in found.text and "xxx" not in found.text


def test_errors_are_those_that_the_client_knows(written, labelled, script):
    with pytest.raises(openai.NotFoundError) as missing:
        written.client.chat.completions.create(model="gpt-4", messages=ASK)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    assert "'toy'" in missing.value.message and "gpt-4" not in missing.value.message
    with pytest.raises(openai.BadRequestError, match="colour") as refused:
        written.client.completions.create(model=NAME, prompt="a", extra_body={"colour": 1})
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", "colour")
    assert written.post("/v1/classify", input="a").json()["error"]["message"].startswith("This model writes")
    first = written.client.models.with_raw_response.list().headers["x-request-id"]
    second = written.client.models.with_raw_response.list().headers["x-request-id"]
    assert first.startswith("req_") and len(first) == len(second) == 36 and first != second
    script(RuntimeError(f"{KEY} and more"))
    for ask in (
        lambda: written.client.completions.create(model=NAME, prompt="a"),
        lambda: written.client.completions.create(model=NAME, prompt="a", stream=True),
    ):
        with pytest.raises(openai.InternalServerError) as failed:
            ask()
        assert failed.value.status_code == 500 and failed.value.code == "internal_error"
        assert failed.value.response.headers["x-request-id"] in failed.value.message
    script("Answer: fine again")
    assert written.client.completions.create(model=NAME, prompt="a").choices[0].text == "fine again"
    with pytest.raises(openai.BadRequestError, match="17 prompts, and may have 16 at most"):
        written.client.completions.create(model=NAME, prompt=["a"] * 17)


def test_a_failure_in_mid_stream_is_the_streams_last_event(written, monkeypatch):
    def fail(model, tokenizer, rows, autocast=None, end_tokens=()):
        for token in tokenizer("Answer: begun and")["input_ids"]:
            rows[0].take(token)
        raise RuntimeError(KEY)

    monkeypatch.setattr("p2p_trainer.serving.engine.write_batch", fail)
    *pieces, error, done = events(written, messages=ASK)
    assert "begun" in "".join(json.loads(piece)["choices"][0]["delta"].get("content", "") for piece in pieces)
    assert json.loads(error)["error"]["code"] == "internal_error" and done == "[DONE]"
    with pytest.raises(openai.APIError, match="Internal error"):
        list(written.client.chat.completions.create(model=NAME, messages=ASK, stream=True))


def turns(*parts):
    return [Message(role=role, content=content) for role, content in parts]


def test_a_conversation_becomes_what_the_model_was_trained_on():
    talk = turns(("system", " Be brief. "), ("developer", "Be kind."), ("user", "hi"))
    assert chat_prompt(talk, labelled=True, chat=True) == chat_prompt(talk, labelled=True, chat=False) == "hi"
    assert chat_prompt(talk, labelled=False, chat=False) == "Be brief.\n\nBe kind.\n\nhi"
    assert chat_prompt(talk, labelled=False, chat=True) == [
        {"role": "system", "content": "Be brief.\n\nBe kind."}, {"role": "user", "content": "hi"},
    ]  # fmt: skip
    longer = turns(("user", "a"), ("assistant", "b"), ("user", "c"))
    assert [turn["role"] for turn in chat_prompt(longer, False, True)] == ["user", "assistant", "user"]
    late = turns(("user", "hi"), ("system", "Be brief."))
    assert chat_prompt(late, labelled=True, chat=True) == "hi"


@pytest.mark.parametrize(
    ("parts", "labelled", "chat", "param"),
    [
        ([("user", "a"), ("system", "b")], False, True, "messages[1].role"),
        ([("user", "a"), ("system", "b")], False, False, "messages[1].role"),
        ([("user", "a"), ("user", "b")], False, True, "messages[1].role"),
        ([("assistant", "a"), ("user", "b")], False, True, "messages[0].role"),
        ([("user", "a"), ("assistant", "b")], False, True, "messages"),
        ([("system", "a")], False, True, "messages"),
        ([("user", "a"), ("assistant", " "), ("user", "c")], False, True, "messages[1].content"),
        ([("user", "a"), ("assistant", "b"), ("user", "c")], False, False, "messages"),
        ([("user", "a"), ("user", "b")], True, False, "messages"),
        ([("assistant", "a")], True, False, "messages"),
        ([("system", "a")], True, True, "messages"),
    ],
)  # fmt: skip
def test_other_conversations_are_refused(parts, labelled, chat, param):
    with pytest.raises(ApiError) as refused:
        chat_prompt(turns(*parts), labelled, chat)
    assert (refused.value.status, refused.value.param) == (400, param)
