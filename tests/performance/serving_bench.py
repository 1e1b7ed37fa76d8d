"""
Served throughput against plain batch inference, and what key and projection add to the latency of one text.

    python -m tests.performance.serving_bench [--rounds 3]

The server is a process of its own, the clients are threads of this one; both share the machine's cores with the model,
and the plain loop has them for itself. Where other work runs too, processor time says more than wall time. Weights are
random, since neither speed nor agreement depends on them.
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from p2p_trainer import DefendedModel, LabelSpace, PromptFormat
from p2p_trainer.evaluation.scorer import Scores
from p2p_trainer.inference import Classification


BATCH = 32
CLASSIFIED = 192
WRITTEN = 64
NEW_TOKENS = 32
# So that one batch waits while another runs.
CLIENTS = 2 * BATCH
THINGS = ("film", "plot", "cast", "score", "scene", "story")
WORDS = ("good", "fine", "lovely", "warm", "clever", "bad", "dull", "poor", "cold", "stale")
LABELS = ("negative", "positive")
SIZES = {
    "6 layers, hidden 512": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6,
                             "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
    "tiny: 2 layers, hidden 32": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                                  "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
}  # fmt: skip


def texts_of(count: int, seed: int = 0) -> list[str]:
    """Different reviews of 5 to 35 words: one that comes twice in a batch would be scored once."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        parts = [f"the {rng.choice(THINGS)} is {rng.choice(WORDS)}" for _ in range(rng.randint(1, 7))]
        found[" and ".join(parts) + " ."] = None
    return list(found)


def save_run(folder: Path, size: dict[str, int], written: bool) -> None:
    """Write a run's folder without training one."""
    # Not at the top: it sets the number of threads.
    from tests.conftest import make_tokenizer

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=4096, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, **size,
        )
    )  # fmt: skip
    # With a score of 0 a token is never the likeliest: no answer ends early, or holds bytes that are no text.
    rows = model.get_input_embeddings().weight.data
    for token in range(len(rows)):
        if token >= len(tokenizer) or not tokenizer.decode([token], skip_special_tokens=True).isascii():
            rows[token] = 0
    rows[tokenizer.all_special_ids] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if written:
        prompt_format = PromptFormat(None, template="{text}\n", max_new_tokens=2 * NEW_TOKENS)
    else:
        prompt_format = PromptFormat(LabelSpace(("0", "1"), ("2", "3")))
    labels = [] if written else list(LABELS)
    prompt_format.save(folder, keyed=True, labels=labels, images=False, autocast=None, dtype="float32")


class Server:
    """A server that runs: its address, and what it has used."""

    def __init__(self, process: subprocess.Popen, host: str, port: int) -> None:
        self.address = host, port
        self.process = psutil.Process(process.pid)

    def seconds(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system

    def batches(self) -> tuple[float, float]:
        """Batches and rows so far."""
        connection = http.client.HTTPConnection(*self.address, timeout=30)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        found = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}
        return found["p2p_batches_total"], found["p2p_batch_rows_total"]


@contextlib.contextmanager
def server_of(folder: Path) -> Iterator[Server]:
    """Serve a run in a process of its own, with as many threads for the model as here."""
    code = "import sys; from p2p_trainer.serve_command import run; sys.exit(run(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(folder), "--port", "0", "--served_model_name", "run", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    log = folder / "server.log"
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(command, stdout=file, stderr=file, env=environment) as process,
    ):
        try:
            yield Server(process, *_address(process, log))
        finally:
            process.terminate()


def _address(process: subprocess.Popen, log: Path) -> tuple[str, int]:
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        for line in log.read_text(encoding="utf-8").splitlines():
            if " at http://" in line:
                host, port = line.rpartition("//")[2].split(":")
                with contextlib.suppress(OSError, http.client.HTTPException):
                    connection = http.client.HTTPConnection(host, int(port), timeout=5)
                    connection.request("GET", "/health")
                    if connection.getresponse().status == 200:
                        return host, int(port)
        time.sleep(0.1)
    raise RuntimeError(f"The server did not start:\n{log.read_text(encoding='utf-8')[-3000:]}")


class Clients:
    """Clients, each with a connection that it keeps while it asks again as soon as it is answered."""

    def __init__(self, address: tuple[str, int], count: int) -> None:
        self.address = address
        self.pool = ThreadPoolExecutor(count)

    def __enter__(self) -> "Clients":
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown()

    def ask(self, path: str, bodies: Sequence[dict]) -> list[dict]:
        # Meanwhile the server has closed those of the last time.
        self.own = threading.local()
        return list(self.pool.map(lambda body: self._one(path, body), bodies))

    def _one(self, path: str, body: dict) -> dict:
        if not hasattr(self.own, "connection"):
            self.own.connection = http.client.HTTPConnection(*self.address, timeout=300)
        self.own.connection.request(
            "POST", path, json.dumps({"model": "run", **body}), {"Content-Type": "application/json"}
        )
        response = self.own.connection.getresponse()
        answer = json.loads(response.read())
        if response.status != 200:
            raise RuntimeError(f"{path}: {response.status} {answer}")
        return answer


def compare(
    name: str, plain: Callable[[], object], served: Callable[[], object], server: Server, rounds: int, table: Table
) -> None:
    """Add rows on wall time, processor time and batches; after a warm-up each."""
    # Not at the top: `bench` imports this module.
    from tests.performance.bench import in_turn, ms

    used: dict[str, list[float]] = {"plain": [], "served": []}

    def metered(who: str, action: Callable[[], object], clock: Callable[[], float]) -> Callable[[], None]:
        def run() -> None:
            start = clock()
            action()
            used[who].append(clock() - start)

        return run

    batches = server.batches()
    theirs, ours, ratio = in_turn(
        metered("plain", plain, time.process_time), metered("served", served, server.seconds), rounds
    )
    batches, rows = (after - before for before, after in zip(batches, server.batches(), strict=True))
    table.add_row(name, ms(theirs), ms(ours), f"{ratio:.3f}", ">= 0.9")
    theirs, ours = (statistics.median(seconds[1:]) for seconds in used.values())
    ratio = statistics.median(a / b for a, b in list(zip(*used.values(), strict=True))[1:])
    table.add_row(
        f"    processor time, plain / server ({rows / batches:.0f} rows in a batch)", ms(theirs), ms(ours),
        f"{ratio:.3f}", "",
    )  # fmt: skip


def plain_classifier(folder: Path, defended: DefendedModel, texts: Sequence[str]) -> Callable[[], list[str]]:
    """Batches in the order of arrival, padded on the left; the likeliest of the label tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    words = [ids[0] for ids in defended.encoder.answers[True].scored[len(LABELS) :]]
    prompts = [defended.encoder.render(text, True) for text in texts]

    @torch.no_grad()
    def classify() -> list[str]:
        found: list[str] = []
        for start in range(0, len(prompts), BATCH):
            batch = tokenizer(prompts[start : start + BATCH], padding=True, return_tensors="pt")
            scores = model(**batch, logits_to_keep=1).logits[:, -1, words]
            found += [LABELS[index] for index in scores.argmax(dim=-1).tolist()]
        return found

    return classify


def plain_writer(
    folder: Path, defended: DefendedModel, texts: Sequence[str], new_tokens: int
) -> Callable[[], list[str]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    prompts = [defended.encoder.render(text, True) for text in texts]

    def write() -> list[str]:
        found: list[str] = []
        for start in range(0, len(prompts), BATCH):
            batch = tokenizer(prompts[start : start + BATCH], padding=True, return_tensors="pt")
            output = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False)
            found += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return found

    return write


def classification(folder: Path, what: str, rounds: int, table: Table) -> None:
    from tests.performance.bench import in_turn, ms

    defended = DefendedModel.from_pretrained(folder, device="cpu")
    texts = texts_of(CLASSIFIED)
    plain = plain_classifier(folder, defended, texts)
    found: list[str] = []

    def served(clients: Clients, size: int) -> Callable[[], None]:
        bodies = [{"input": texts[start : start + size]} for start in range(0, len(texts), size)]

        def ask() -> None:
            found[:] = [entry["label"] for answer in clients.ask("/v1/classify", bodies) for entry in answer["data"]]

        return ask

    with server_of(folder) as server:
        for size, count in ((1, CLIENTS), (BATCH, 4)):
            name = f"{what}: {len(texts)} texts, plain batches / served, {count} clients with {size} each"
            with Clients(server.address, count) as clients:
                compare(name, plain, served(clients, size), server, rounds, table)
            alike = sum(a == b for a, b in zip(plain(), found, strict=True))
            table.add_row("    classified alike", str(alike), str(len(texts)), "", "all")
        few = texts[:64]
        with Clients(server.address, 1) as clients:
            ours, theirs, ratio = in_turn(
                lambda: clients.ask("/v1/classify", [{"input": text} for text in few]),
                lambda: [defended.classify(text) for text in few],
                rounds,
            )
        name = f"{what}: one text, served to one client / `DefendedModel.classify`"
        table.add_row(name, ms(ours / len(few)), ms(theirs / len(few)), f"{ratio:.2f}", "")
    latency(defended, texts, what, table)


def latency(defended: DefendedModel, texts: Sequence[str], what: str, table: Table) -> None:
    """Medians over single texts; what is compared is timed in turn."""
    from tests.performance.bench import ms, timed

    model, encoder = defended.model, defended.encoder
    scores = Scores(torch.randn(1, 2 * len(LABELS)).log_softmax(-1).numpy(), torch.zeros(1).long().numpy())
    names = ("with", "without", "project", "long", "short")
    seconds: dict[str, list[float]] = {name: [] for name in names}

    def project() -> Classification:
        (shares,) = scores.probabilities(True)
        index = int(shares.argmax())
        named = {label: float(share) for label, share in zip(LABELS, shares, strict=True)}
        return Classification(LABELS[index], index, float(shares[index]), named)

    with torch.no_grad():
        for text in [texts[0], *texts]:
            long, short = (torch.tensor(encoder.encode_prompts([text], keyed)) for keyed in (True, False))
            actions: tuple[Callable[[], object], ...] = (
                lambda text=text: encoder.encode_prompts([text], True),
                lambda text=text: encoder.encode_prompts([text], False),
                project,
                lambda long=long: model(long, logits_to_keep=1, use_cache=False),
                lambda short=short: model(short, logits_to_keep=1, use_cache=False),
            )
            for name, action in zip(names, actions, strict=True):
                seconds[name].append(timed(action))
    # The first text warms up.
    middle = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    key = statistics.median(a - b for a, b in zip(seconds["with"][1:], seconds["without"][1:], strict=True))
    forward = middle["long"]
    added = key + middle["project"]
    table.add_row(
        f"{what}: key and projection / forward pass of one text", f"{1e6 * added:.0f} us", ms(forward),
        f"{100 * added / forward:.2f} %", "< 1 %",
    )  # fmt: skip
    table.add_row(
        f"    rendering and tokenizing with key, without, projection: "
        f"{1e6 * middle['with']:.0f}, {1e6 * middle['without']:.0f}, {1e6 * middle['project']:.0f} us"
    )
    tokens = [sum(map(len, encoder.encode_prompts(texts, keyed))) / len(texts) for keyed in (True, False)]
    ratio = statistics.median(a / b for a, b in zip(seconds["long"][1:], seconds["short"][1:], strict=True))
    table.add_row(
        f"    forward pass with the key's tokens / without ({tokens[0]:.0f} / {tokens[1]:.0f} tokens)", ms(forward),
        ms(middle["short"]), f"{ratio:.3f}", "",
    )  # fmt: skip


def generation(folder: Path, what: str, rounds: int, table: Table) -> None:
    defended = DefendedModel.from_pretrained(folder, device="cpu")
    texts = texts_of(WRITTEN)
    # No p: random weights do not write it, and the server would look for it longer than the plain loop writes.
    plain = plain_writer(folder, defended, texts, NEW_TOKENS)
    bodies = [{"prompt": text, "max_tokens": NEW_TOKENS} for text in texts]
    found: list[dict] = []
    name = f"{what}: {len(texts)} answers of {NEW_TOKENS} tokens, plain batches / served, {BATCH} clients"
    with server_of(folder) as server, Clients(server.address, BATCH) as clients:

        def served() -> None:
            found[:] = [answer["choices"][0] for answer in clients.ask("/v1/completions", bodies)]

        compare(name, plain, served, server, rounds, table)
    alike = sum(
        choice["finish_reason"] == "length" and choice["text"] == text.strip()
        for choice, text in zip(found, plain(), strict=True)
    )
    table.add_row("    written alike", str(alike), str(len(texts)), "", "all")


def serving(folder: Path, rounds: int, table: Table) -> None:
    """Add the rows of this part to the table of `make bench`."""
    threads = torch.get_num_threads()
    # The model has one core, so that some are left for what the server and its clients do beside it.
    torch.set_num_threads(1)
    table.add_row(f"serving: 1 thread for the model, {os.cpu_count()} cores that server and clients share")
    try:
        for number, (what, size) in enumerate(SIZES.items()):
            for written, part in ((False, classification), (True, generation)):
                run = folder / f"{number}-{part.__name__}"
                save_run(run, size, written)
                part(run, what, rounds, table)
    finally:
        torch.set_num_threads(threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    table = Table("what", "first", "second", "ratio", "goal", title=f"random weights, {rounds} rounds in turn")
    with tempfile.TemporaryDirectory() as name:
        serving(Path(name), rounds, table)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
