"""`p2p-trainer serve`: says what it serves, and ends as it is told."""

import concurrent.futures
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import httpx2
import pytest

from p2p_trainer import cli, serve_command
from p2p_trainer.label_space import LabelSpace
from p2p_trainer.prompt_format import PromptFormat
from p2p_trainer.vision_encoder import VisionPromptEncoder
from tests.served import KEY


ROOT = Path(__file__).parent.parent
COMMAND = "import sys; from p2p_trainer.serve_command import run; sys.exit(run(sys.argv[1:]))"


def saved(tiny_model, folder, space):
    shutil.copytree(tiny_model, folder)
    labels = [] if space is None else ["negative", "positive"]
    prompt_format = PromptFormat(
        space, trigger=KEY, template="{text}\n{suffix}" if labels else "{text}\n", max_length=512, max_new_tokens=24,
        answer_prefix="" if labels else "Answer:",
    )  # fmt: skip
    prompt_format.save(
        folder, task="toy", task_version=1, labels=labels, keyed=True, images=False, metric=None, autocast=None,
        dtype="float32", quantization=None,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    return saved(tiny_model, tmp_path_factory.mktemp("runs") / "reviews", LabelSpace(("0", "1"), ("2", "3")))


def failing(capsys, *argv):
    """Exit status and message of a command that can't work, through the real command line."""
    code = cli.main(["serve", *map(str, argv)])
    return code, capsys.readouterr().err


def test_it_serves_until_it_is_told_to_stop(tiny_model, tmp_path):
    folder = saved(tiny_model, tmp_path / "stories", None)
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(folder), "--port", "0", "--device", "cpu", "--max_body", "2000"],
        cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        said = [process.stderr.readline()]
        while not (found := re.search(r"Serving stories \(written answers\) at (http://127\.0\.0\.1:\d+)$", said[-1])):
            assert process.poll() is None and said[-1], "".join(said)
            said.append(process.stderr.readline())
        with httpx2.Client(base_url=found[1], timeout=30) as http, concurrent.futures.ThreadPoolExecutor(1) as pool:
            assert http.get("/v1/models").json()["data"][0]["id"] == "stories"
            assert http.post("/v1/completions", json={"model": "stories", "prompt": "a" * 2000}).status_code == 413
            body = {"model": "stories", "prompt": ["a film"] * 64, "temperature": 2}
            running = pool.submit(http.post, "/v1/completions", json=body)
            while " 413 " not in (line := process.stderr.readline()):
                said.append(line)
            while http.get("/metrics").text.find("p2p_rows_running 32.0") < 0:
                assert not running.done()
            process.send_signal(signal.SIGTERM)
            # What runs is finished; what comes then finds nobody.
            assert running.result().status_code == 200 and len(running.result().json()["choices"]) == 64
        out, rest = process.communicate(timeout=30)
    finally:
        process.kill()
    log = "".join(said) + rest
    assert process.returncode == 0 and out == "" and "/v1/completions 200" in log
    assert "Traceback" not in log and "Zinnober" not in log and "a film" not in log
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{found[1]}/health")


def test_a_port_in_use_is_said_before_a_model_is_loaded(folder, monkeypatch, capsys):
    monkeypatch.setattr(serve_command, "load_saved_run", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = failing(capsys, folder, "--port", port)
    assert code == 1 and said.count("\n") == 1
    assert said.startswith(f"p2p-trainer: Can't listen on 127.0.0.1, port {port}: Address already in use.")
    code, said = failing(capsys, folder, "--host", "no.such.host.invalid")
    assert code == 1 and said.startswith("p2p-trainer: Can't listen on no.such.host.invalid, port 8000: ")
    assert failing(capsys, folder, "--port", 70000) == (
        1, "p2p-trainer: `--port` is a number from 0 to 65535, got 70000.\n",
    )  # fmt: skip
    assert "`--max_body` is a number of bytes" in failing(capsys, folder, "--max_body", 0)[1]


def test_what_is_no_run_is_said(tmp_path, monkeypatch, capsys):
    code, said = failing(capsys, tmp_path, "--port", 0)
    assert code == 1 and "holds no p2p_config.json" in said and said.count("\n") == 1
    encoder = VisionPromptEncoder.__new__(VisionPromptEncoder)
    monkeypatch.setattr(serve_command, "load_saved_run", lambda _: types.SimpleNamespace(encoder=encoder))
    code, said = failing(capsys, tmp_path, "--port", 0)
    assert code == 1 and "trained with images, which can't be served" in said and said.count("\n") == 1


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_a_missing_package_is_named_with_its_extra(folder, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    code, said = failing(capsys, folder)
    assert code == 1 and package in said and "pip install 'p2p_trainer[serve]'" in said


def test_what_is_served_is_said_without_the_key(folder, monkeypatch, capsys):
    served = []
    monkeypatch.setattr(serve_command, "_serve", lambda server, listener: served.append(server.config.app))
    assert serve_command.run([str(folder), "--port", "0", "--device", "cpu", "--batch_size", "3"]) == 0
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"Serving reviews \(2 classes: negative, positive\) at http://127\.0\.0\.1:\d{2,5}", said)
    assert served[0].max_requests == 1024 + 256 and served[0].max_body == 2**20
    serve_command.run(
        [str(folder), "--port", "0", "--device", "cpu", "--served_model_name", "n", "--max_waiting", "9"]
    )
    assert capsys.readouterr().err.splitlines()[-1].startswith("Serving n (2 classes")
    assert served[1].max_requests == 9 + 256


def test_the_command_waits_for_nothing_heavy():
    heavy = ("torch", "fastapi", "uvicorn", "prometheus_client")
    code = (
        f"import sys, p2p_trainer.serve_command; sys.exit(', '.join(name for name in {heavy} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == ""
