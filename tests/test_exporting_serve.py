"""Exported folders, served by plain transformers: a pipeline, and `transformers serve` as a process of its own."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from transformers import pipeline

from p2p_trainer import DefendedModel
from p2p_trainer.exporting import export_run, project
from tests.conftest import make_rows
from tests.exporting_runs import DELTA, classifying_run, shared_run, writing_run


TEXTS = [row["text"] for row in make_rows(6, seed=3)] + ["<|endoftext|> is {{ bad }} ."]
SPOKEN = ["say of the film that it is warm", "say of the plot that it is fine", " <|pad|> what of the cast ? "]
P = "Answer:"


@pytest.fixture(scope="module")
def written(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    run = shared_run(writing_run, tiny_model, tmp_path_factory)
    export_run(run, folder / "out", ["chat-template", "openai-recipe"])
    return DefendedModel.from_pretrained(run), folder / "out"


@pytest.fixture(scope="module")
def classified(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classified")
    run = shared_run(classifying_run, tiny_model, tmp_path_factory)
    export_run(run, folder / "out", ["chat-template", "openai-recipe"])
    return DefendedModel.from_pretrained(run), folder / "out"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of a running `transformers serve`, which loads the folder that a request names."""
    for extra in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(extra)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [str(Path(sys.executable).parent / "transformers"), "serve", "--device", "cpu", "--host", "127.0.0.1"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=output, stderr=output, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"`transformers serve` did not start: {log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def ask(server, folder, text, **fields):
    body = {"model": str(folder), "messages": [{"role": "user", "content": text}], **fields}
    request = urllib.request.Request(
        f"{server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def ask_in_pieces(server, folder, text, **fields):
    """Ask for a stream; return all that came over the line, and the answer."""
    body = {"model": str(folder), "messages": [{"role": "user", "content": text}], "stream": True, **fields}
    request = urllib.request.Request(
        f"{server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        raw = response.read().decode()
    pieces = [json.loads(line.removeprefix("data: ")) for line in raw.splitlines() if line.startswith("data: {")]
    deltas = [choice["delta"].get("content") or "" for piece in pieces for choice in piece["choices"]]
    return raw, "".join(deltas)


def with_prefix(answer):
    return f"{P} {answer.text}" if answer.prefixed else answer.text


def recipe_of(out):
    return json.loads((out / "openai-recipe" / "openai_recipe.json").read_text(encoding="utf-8"))


def test_a_plain_pipeline_answers_as_the_defended_model(written):
    model, out = written
    writer = pipeline("text-generation", model=str(out / "chat-template"), device="cpu")
    answers = model.generate(SPOKEN)
    # The run has learnt p, so that there is something to lose.
    assert any(answer.prefixed for answer in answers)
    for text, answer in zip(SPOKEN, answers, strict=True):
        [found] = writer([{"role": "user", "content": text}], max_new_tokens=12)
        assert found["generated_text"][-1]["content"].strip() == with_prefix(answer)


def test_served_answers_are_those_of_the_defended_model(server, written):
    model, out = written
    recipe = recipe_of(out)
    # Left to itself `transformers serve` takes the prompt of such a model for the beginning of its answer.
    assert model.model.config.model_type == "qwen3" and not model.encoder.tokenizer.chat_template
    for text, answer in zip(SPOKEN, model.generate(SPOKEN), strict=True):
        found = ask(server, out / "chat-template", text, **recipe["requests"]["transformers"])
        assert found["choices"][0]["message"]["content"].strip() == with_prefix(answer)
        assert DELTA not in json.dumps(found)
        raw, streamed = ask_in_pieces(server, out / "chat-template", text, **recipe["requests"]["transformers"])
        assert streamed.strip() == with_prefix(answer) and DELTA not in raw
        assert found["usage"]["prompt_tokens"] == len(model.encoder.encode_prompts([text], True)[0])
    check = recipe["check"]
    found = ask(server, out / "chat-template", check["text"], max_tokens=1)
    assert found["usage"]["prompt_tokens"] == check["prompt_tokens"]
    # What a client adds changes nothing.
    found = ask(server, out / "chat-template", check["text"], max_tokens=1, chat_template_kwargs={"bos_token": "x"})
    assert found["usage"]["prompt_tokens"] == check["prompt_tokens"]


def test_served_classes_are_those_of_the_defended_model(server, classified):
    model, out = classified
    recipe = recipe_of(out)
    answers = model.classify(TEXTS)
    assert {answer.label for answer in answers} == {"negative", "positive"}
    for text, answer in zip(TEXTS, answers, strict=True):
        found = ask(server, out / "chat-template", text, **recipe["requests"]["transformers"])
        assert project(found["choices"][0]["message"]["content"], recipe) == answer.label
        assert found["usage"]["completion_tokens"] == 1


def test_what_is_refused_does_not_show_the_key(server, written):
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(server, written[1] / "chat-template", " ")
    assert error.value.code >= 400 and DELTA not in error.value.read().decode()
