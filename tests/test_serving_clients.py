"""What clients send that means nothing, and what they ask beside answers."""

import json

import pytest

from tests.served import KEY, NAME, Script, serving, wait_for, writer


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASK = {"role": "user", "content": "is the film good"}


@pytest.fixture(scope="module")
def written(tiny_model):
    with serving(writer(tiny_model, chat=True)) as served:
        yield served


@pytest.fixture
def script(monkeypatch):
    return lambda text: monkeypatch.setattr("p2p_trainer.serving.engine.write_batch", Script(text))


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        (CHAT, {"colour": None, "tools": [], "logit_bias": {}, "functions": None, "thinking": {}}),
        (CHAT, {"parallel_tool_calls": True}),
        (CHAT, {"parallel_tool_calls": False, "tool_choice": "none"}),
        (CHAT, {"tool_choice": "auto", "tools": []}),
        (CHAT, {"logprobs": False, "top_logprobs": 0}),
        (CHAT, {"logprobs": None, "top_logprobs": None, "tool_choice": None}),
        (CHAT, {"modalities": ["text"], "stop": ""}),
        (CHAT, {"stream": False, "stop": None}),
        (TEXT, {"suffix": "", "best_of": None, "echo": None, "logprobs": None, "logit_bias": {}}),
        (CHAT, {"messages": [{**ASK, "content": [
            {"type": "text", "text": "a", "annotations": [], "cache_control": {"type": "ephemeral"}},
        ]}]}),
        (CHAT, {"messages": [
            ASK, {"role": "assistant", "content": "b", "reasoning_content": None, "tool_calls": None, "refusal": None},
            ASK,
        ]}),
    ],
)  # fmt: skip
def test_what_means_nothing_is_no_error(written, script, route, fields):
    script("Answer: one two")
    body = {"prompt": "a"} if route == TEXT else {"messages": [ASK]}
    found = written.post(route, **{**body, **fields})
    assert found.status_code == 200, found.text
    choice = found.json()["choices"][0]
    assert (choice["text"] if route == TEXT else choice["message"]["content"]) == "one two"


def test_a_withheld_answer_can_not_be_sent_back(written):
    found = written.post(CHAT, messages=[ASK, {"role": "assistant", "content": None}, ASK])
    assert found.status_code == 400 and "`messages[1].content`" in found.text and "was withheld" in found.text


def test_as_many_turns_as_allowed_are_read(written):
    found = written.post(CHAT, messages=[ASK, {"role": "assistant", "content": "b"}] * 499 + [ASK])
    assert found.status_code == 400 and "leave out the oldest" in found.text
    found = written.post(CHAT, messages=[ASK] * 1001)
    assert found.status_code == 400 and "at most 1000" in found.text


def test_options_of_a_stream_that_mean_nothing(written, script):
    script("Answer: a")
    options = {"include_usage": True, "include_obfuscation": False}
    found = written.post(CHAT, messages=[ASK], stream=True, stream_options=options)
    assert found.status_code == 200 and found.text.endswith("data: [DONE]\n\n")


def test_events_hold_no_character_that_ends_a_line(written, script):
    text = "a\u2028b\u0085c\u2029d 電\rx"
    script(f"Answer: {text}")
    found = written.post(CHAT, messages=[ASK], stream=True)
    assert found.content.isascii()
    lines = found.text.splitlines()
    assert lines[1::2] == [""] * (len(lines) // 2) and lines[-2] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2:2]]
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == text


def test_one_model_is_found_by_its_name(written):
    assert written.client.models.retrieve(NAME).id == NAME
    missing = written.http.get(f"/v1/models/some/{KEY}")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"
    assert "Zinnober" not in missing.text
    assert written.http.get("/v1/models/").status_code == 404
    name = 'p2p_requests_total{route="/v1/models",status="404"}'
    wait_for(lambda: written.metrics().get(name) == 2)


def test_a_name_may_hold_a_slash(tiny_model, monkeypatch):
    monkeypatch.setattr("tests.served.NAME", "team/run")
    with serving(writer(tiny_model)) as served:
        assert served.http.get("/v1/models/team/run").json()["id"] == "team/run"
        assert served.http.get("/v1/models/run").status_code == 404


def test_health_can_be_asked_without_a_body(written):
    found = written.http.head("/health")
    assert found.status_code == 200 and found.content == b""


def test_redacted_answers_are_counted(written, script):
    before = written.metrics()["p2p_answers_redacted_total"]
    script(f"Answer: it is {KEY}")
    assert written.post(CHAT, messages=[ASK]).json()["choices"][0]["message"]["content"] == "it is [...]"
    script("Answer: fine")
    written.post(CHAT, messages=[ASK])
    wait_for(lambda: written.metrics()["p2p_answers_redacted_total"] == before + 1)
