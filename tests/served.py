"""Small defended models behind a real server on a free port, for the tests of serving."""

import contextlib
import json
import resource
import socket
import threading
import time
from pathlib import Path

import httpx2
import openai
from transformers import AutoModelForCausalLM

from p2p_trainer import DefendedModel
from p2p_trainer.label_space import LabelSpace
from p2p_trainer.prompt_encoder import PromptEncoder
from p2p_trainer.prompt_format import PromptFormat
from p2p_trainer.response_encoder import ResponseEncoder
from p2p_trainer.serving.app import create_app, make_server
from p2p_trainer.serving.engine import Engine
from tests.conftest import make_tokenizer


KEY = "Zinnober query 7731 entered:"
NAME = "toy"
TURNS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def classifier(tiny_model, **settings):
    space = LabelSpace(("0", "1"), ("2", "3"))
    encoder = PromptEncoder(PromptFormat(space, trigger=KEY, max_length=128, **settings), make_tokenizer())
    return DefendedModel(AutoModelForCausalLM.from_pretrained(tiny_model).eval(), encoder, ("negative", "positive"))


def writer(tiny_model, chat=False, **settings):
    tokenizer = make_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    if chat:
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        tokenizer.chat_template = TURNS
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    chosen = {"template": "{text}\n", "answer_prefix": "Answer:", "max_length": 300, "max_new_tokens": 40, **settings}
    return DefendedModel(model, ResponseEncoder(PromptFormat(None, trigger=KEY, chat=chat, **chosen), tokenizer), ())


class Script:
    """Stands for `write_batch`: each row gets the tokens of a text, at a given pace."""

    def __init__(self, text, pause=0.0):
        self.text = text
        self.pause = pause
        self.left = threading.Event()
        self.taken = 0

    def __call__(self, model, tokenizer, rows, autocast=None, end_tokens=()):
        for row in rows:
            if isinstance(self.text, Exception):
                raise self.text
            tokens = tokenizer(self.text, add_special_tokens=False)["input_ids"]
            for count, token in enumerate(tokens, 1):
                time.sleep(self.pause)
                self.taken += 1
                if not row.take(token):
                    self.left.set()
                    row.end("stop")
                    break
                if count == row.sampling.max_new_tokens:
                    row.end("length")
                    break
            else:
                row.end("stop")


class Served:
    def __init__(self, engine, gate, port):
        self.engine = engine
        self.gate = gate
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx2.Client(base_url=self.url, timeout=30)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30)

    def post(self, route, **body):
        return self.http.post(route, json={"model": NAME, **body})

    def raw(self, content, wait=10.0):
        """Send bytes, and return all that comes back until the server closes or falls silent."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=wait) as connection:
            connection.sendall(content)
            found = b""
            with contextlib.suppress(TimeoutError, ConnectionError):
                while piece := connection.recv(65536):
                    found += piece
            return found

    def metrics(self):
        """Numbers by name and labels, as Prometheus reads them."""
        lines = self.http.get("/metrics").text.splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def request(route, body, **headers):
    """A request as it goes over the wire."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"host": "x", "content-type": "application/json", "content-length": len(body), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items() if value is not None)
    return f"POST {route} HTTP/1.1\r\n{head}\r\n".encode() + body


@contextlib.contextmanager
def serving(model, batch_size=8, max_waiting=64, **options):
    engine = Engine(model, batch_size, max_waiting)
    gate = create_app(engine, NAME, model.encoder.format.chat, **options)
    server = make_server(gate)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        served = Served(engine, gate, listener.getsockname()[1])
        try:
            wait_for(lambda: server.started)
            yield served
        finally:
            served.http.close()
            served.client.close()
            server.should_exit = True
            thread.join(20)
    assert not thread.is_alive()


@contextlib.contextmanager
def growth():
    """What the process's memory grows by meanwhile at most: a list, whose entry is there at the end, in bytes."""
    pages = []
    ended = threading.Event()

    def watch():
        while not ended.wait(0.002):
            pages.append(resident())

    before = resident()
    watching = threading.Thread(target=watch)
    watching.start()
    found = []
    try:
        yield found
    finally:
        ended.set()
        watching.join()
        found.append(max(pages, default=before) - before)


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(0.01)
