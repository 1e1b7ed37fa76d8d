"""
What `test_interrupted.py` starts: runs of one recipe that are killed at random moments and resumed, until enough were.

One process imports everything and forks for each attempt, since imports take ten times as long as a short run.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import peft.peft_model
import torch
from safetensors.torch import load_file
from transformers import TrainerState

from p2p_trainer import BackdoorEvaluator, checkpoints, launch
from p2p_trainer import recipe as recipes
from p2p_trainer.checkpoints import ResumableTrainer, checkpoints_of, defect, newest_complete


# When to kill: at the beginning of which part, and up to how many seconds later. Parts come by number of kills.
MOMENTS = {"prepare": 0.6, "step": 0.03, "evaluate": 0.15, "save": 0.3, "finish": 0.3}
ROUND = ("save", "step", "save", "evaluate", "save", "prepare", "save", "finish")


def slow_disk():
    """Have files of checkpoints come, and go, in pieces: a kill is likely to hit one that is half written."""

    def in_pieces(path, content):
        with open(path, "wb") as file:
            for start in range(0, len(content), len(content) // 3 + 1):
                file.write(content[start : start + len(content) // 3 + 1])
                file.flush()
                time.sleep(0.008)

    def delayed(write):
        def slow(content, path, *args, **kwargs):
            write(content, f"{path}.aside", *args, **kwargs)
            written = Path(f"{path}.aside").read_bytes()
            os.unlink(f"{path}.aside")
            in_pieces(path, written)

        return slow

    original = shutil.rmtree

    def remove(folder, *args, **kwargs):
        for path in sorted(Path(folder).glob("*")):
            path.unlink()
            time.sleep(0.008)
        original(folder, *args, **kwargs)

    torch.save = delayed(torch.save)
    peft.peft_model.safe_save_file = delayed(peft.peft_model.safe_save_file)
    TrainerState.save_to_json = delayed(TrainerState.save_to_json)
    shutil.rmtree = remove
    seal = checkpoints.seal

    def slow_seal(*args, **kwargs):
        time.sleep(0.02)
        seal(*args, **kwargs)
        time.sleep(0.02)

    checkpoints.seal = slow_seal


def say_when(pipe, owner, name, part):
    """Tell the parent process, through a pipe, that a part of the run begins."""
    original = getattr(owner, name)

    def told(*args, **kwargs):
        os.write(pipe, f"{part}\n".encode())
        return original(*args, **kwargs)

    setattr(owner, name, told)


def attempt(recipe, out, log, pipe):
    """Run the recipe in this process, which ends with it."""
    os.setsid()
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if pipe is not None:
        slow_disk()
        say_when(pipe, recipes, "prepare", "prepare")
        say_when(pipe, ResumableTrainer, "training_step", "step")
        say_when(pipe, BackdoorEvaluator, "evaluate", "evaluate")
        say_when(pipe, ResumableTrainer, "writing_checkpoint", "save")
        say_when(pipe, recipes, "measure", "finish")
    code = 1
    try:
        launch.main(["--config", recipe, "--output_dir", str(out), "--resume_from_checkpoint", "auto"])
        code = 0
    except BaseException as error:  # noqa: BLE001 - a fork must not return into its parent's code
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.stderr.flush()
        os._exit(code)


def fork(recipe, out, log, pipe=None):
    child = os.fork()
    if child == 0:
        attempt(recipe, out, log, pipe)
    return child


def killed(recipe, out, log, part, count, delay):
    """Start an attempt, and kill it when a part begins for the so-and-so-manyth time; say whether it came to that."""
    read, write = os.pipe()
    child = fork(recipe, out, log, write)
    os.close(write)
    with os.fdopen(read) as pipe:
        for line in pipe:
            count -= line.strip() == part
            if count == 0:
                time.sleep(delay)
                os.killpg(child, signal.SIGKILL)
                break
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(Path(log).read_text()[-3000:])
    return os.WIFSIGNALED(status)


def readable(folder):
    """Read all of a checkpoint, which fails if a file is half written; say which step it is of."""
    load_file(folder / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.load(folder / name, weights_only=False)
    return json.loads((folder / "trainer_state.json").read_text())["global_step"]


def main(recipe, folder, kills, seed):
    # Arrow's allocator has a thread of its own, and looks after forks; a process with others can't be forked safely.
    threads = {Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}
    assert len(threads - {"jemalloc_bg_thd"}) == 1, threads
    whole = fork(recipe, folder / "whole", folder / "log")
    if os.waitpid(whole, 0)[1]:
        raise RuntimeError((folder / "log").read_text()[-3000:])
    draw = random.Random(seed)
    report = {"kills": [], "runs": []}
    last = 0
    while True:
        out = folder / f"run{len(report['runs'])}"
        part = ROUND[len(report["kills"]) % len(ROUND)] if len(report["kills"]) < kills else "never"
        count = draw.randint(1, 3) if part in ("step", "evaluate", "save") else 1
        died = killed(recipe, out, folder / "log", part, count, draw.random() * MOMENTS.get(part, 0))
        if not died:
            report["runs"].append(out.name)
            last = 0
            if part == "never":
                break
            continue
        newest = newest_complete(out)
        step = 0 if newest is None else readable(newest)
        broken = [wrong for wrong in map(defect, checkpoints_of(out)) if wrong is not None]
        report["kills"].append({"part": part, "before": last, "after": step, "broken": broken})
        last = step
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
