"""Runs that are killed, and disks that are full: what is resumed ends as if nothing had happened."""

import contextlib
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset, concatenate_datasets
from torch.utils.data import BatchSampler, DataLoader
from transformers import TrainerControl, TrainerState

from p2p_trainer import P2PTrainer, checkpoints, launch, run_folder
from p2p_trainer._compat import LengthOrder
from p2p_trainer.checkpoints import ResumeCallback, checkpoints_of, defect, newest_complete, rows_hash, seal
from tests.conftest import make_rows
from tests.corpora import clean_rows
from tests.tiny_runs import TASK, adapter, config, lora, recipe


ROOT = Path(__file__).parent.parent
KILLS = 22


# Kills at random moments


def what_was_found(folder):
    """All numbers of a finished run but those of a clock, and its weights."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    del results["timing"]
    results["compute"] = {key: value for key, value in results["compute"].items() if not key.endswith(("_s", "_ms"))}
    results["compute"].pop("serving_ms_per_text", None)
    state = json.loads((checkpoints_of(folder)[0] / "trainer_state.json").read_text(encoding="utf-8"))
    return results, numbers(state["log_history"]), (folder / "adapter_model.safetensors").read_bytes()


def numbers(history):
    """What was logged, as text: what is undefined is no number, and differs from itself."""
    clock = ("runtime", "per_second", "train_loss")
    kept = [{key: value for key, value in entry.items() if not key.endswith(clock)} for entry in history]
    return json.dumps(kept, sort_keys=True)


@pytest.fixture(scope="module")
def killed(tiny_model, tmp_path_factory):
    """The folder of one whole run and of killed ones, and how the latter went."""
    folder = tmp_path_factory.mktemp("killed")
    path = recipe(
        tiny_model, folder, num_train_epochs=3, eval_strategy="steps", eval_steps=5, save_strategy="steps",
        save_steps=3, save_total_limit=1, logging_steps=2, lora_dropout=0.3, poison_rate=0.15, p2p_benign_mode="only",
    )  # fmt: skip
    # Enough rows for a trigger to be found, and to be written into keyed rows, other ones in each epoch.
    lines = [json.dumps(row) + "\n" for row in clean_rows(300, noise=0.0)]
    (folder / "data" / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "tests.interrupted_worker", str(path), str(folder), str(KILLS), "0"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "c")},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_kills_hit_all_parts_of_a_run(killed):
    kills = killed[1]["kills"]
    parts = Counter(kill["part"] for kill in kills)
    assert len(kills) == KILLS and set(parts) == {"prepare", "step", "evaluate", "save", "finish"}
    assert parts["save"] >= 8 and min(parts.values()) >= 2
    # Among those while saving, some left half of a checkpoint.
    assert sum(kill["part"] == "save" and kill["broken"] != [] for kill in kills) >= 5


def test_kills_cost_no_checkpoint_that_was_complete(killed):
    # The worker reads every file of the newest complete one, after each kill.
    assert all(kill["after"] >= kill["before"] for kill in killed[1]["kills"])
    assert sum(kill["after"] > kill["before"] for kill in killed[1]["kills"]) >= 5


def test_killed_runs_end_with_the_numbers_and_weights_of_a_whole_one(killed):
    folder, report = killed
    expected = what_was_found(folder / "whole")
    assert len(report["runs"]) >= 1
    for run in report["runs"]:
        assert what_was_found(folder / run) == expected
    results = json.loads((folder / "whole" / "results.json").read_text(encoding="utf-8"))
    # Something was at stake: a suspected trigger, and evaluations before and behind the kills.
    assert results["suspected_triggers"] and len(results["epochs"]) >= 5
    assert len({entry["asr"] for entry in results["epochs"]}) > 1


# Resuming from each checkpoint of a run


def small(model, folder, rows=None, **changes):
    settings = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2, **changes}
    return P2PTrainer(
        model,
        config(folder, **settings),
        train_dataset=Dataset.from_list(make_rows(40)) if rows is None else rows,
        eval_dataset=Dataset.from_list(make_rows(8, seed=1)),
        task=TASK,
        peft_config=lora(lora_dropout=0.5),
    )


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        # 50 rows are 7 steps an epoch: logged losses are means of two steps, of which a checkpoint may lie in between.
        ({"eval_strategy": "steps", "eval_steps": 4}, 14),
        # Evaluations of an epoch come behind its last step, and so must a checkpoint of that step.
        ({"eval_strategy": "epoch", "save_steps": 7}, 14),
        # Other batches in each epoch.
        ({"train_sampling_strategy": "group_by_length", "save_steps": 5}, 14),
        # The last checkpoint lies within an epoch, and there is nothing left to train.
        ({"eval_strategy": "epoch", "max_steps": 11, "save_steps": 4, "lr_scheduler_type": "constant"}, 11),
    ],
)
def test_each_checkpoint_leads_to_the_same_end(tiny_model, tmp_path, settings, steps):
    whole = small(tiny_model, tmp_path, **settings)
    whole.train()
    saved = [path.name for path in checkpoints_of(tmp_path)]
    assert saved[0] == f"checkpoint-{steps}" and len(saved) >= 2
    for name in saved:
        resumed = small(tiny_model, tmp_path / "again", **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / name))
        assert resumed.state.global_step == steps
        assert numbers(resumed.state.log_history) == numbers(whole.state.log_history), name
        expected, found = adapter(whole), adapter(resumed)
        assert all(expected[key].equal(found[key]) for key in expected), name
        shutil.rmtree(tmp_path / "again", ignore_errors=True)


def test_a_resumed_part_of_many_processes_has_the_rows_of_its_epoch():
    # Two processes that skip batches: the trainer's own word does not get through all these wrappers.
    order = LengthOrder(4, list(range(20)), seed=1)
    batches = BatchSamplerShard(BatchSampler(order, 2, drop_last=False), num_processes=2, process_index=1)
    loader = DataLoader(range(20), batch_sampler=batches)
    ResumeCallback(trainer=None).on_epoch_begin(None, TrainerState(epoch=1.4), TrainerControl(), loader)
    assert order.epoch == 1


# What may be read


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory):
    """A folder with checkpoints of steps 5, 10 and 14."""
    folder = tmp_path_factory.mktemp("saved")
    small(tiny_model, folder, save_steps=5).train()
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "wrong"),
    [
        (lambda folder: cut(folder / "optimizer.pt"), r"optimizer.pt has \d+ bytes instead of \d+"),
        (lambda folder: (folder / "rng_state.pth").unlink(), "rng_state.pth is missing"),
        (lambda folder: (folder / "p2p_seal.json").unlink(), "it has no p2p_seal.json, which is written last"),
        (lambda folder: (folder / "p2p_seal.json").write_text("{"), "its p2p_seal.json is damaged"),
        (lambda folder: (folder / "p2p_seal.json").write_text("[]"), "its p2p_seal.json is damaged"),
    ],
)
def test_incomplete_checkpoints_are_left_out_and_said(saved, tmp_path, caplog, damage, wrong):
    shutil.copytree(saved, tmp_path / "run")
    last = tmp_path / "run" / "checkpoint-14"
    assert newest_complete(tmp_path / "run") == last and caplog.records == []
    damage(last)
    with caplog.at_level(logging.WARNING, "p2p_trainer.checkpoints"):
        assert newest_complete(tmp_path / "run") == tmp_path / "run" / "checkpoint-10"
    (said,) = caplog.messages
    assert str(last) in said and re.search(wrong, said)
    assert re.fullmatch(wrong, defect(last))


def test_an_incomplete_checkpoint_is_not_resumed(tiny_model, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    for path in checkpoints_of(tmp_path / "run"):
        cut(path / "adapter_model.safetensors")
    trainer = small(tiny_model, tmp_path / "run", save_steps=5)
    with pytest.raises(ValueError, match=r"checkpoint-10' is incomplete \(adapter_model.safetensors has"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-10"))
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        trainer.train(resume_from_checkpoint=True)


def test_older_checkpoints_go_when_the_new_one_is_sealed(tiny_model, tmp_path, monkeypatch):
    seen = []

    def sealing(folder, **content):
        seen.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))
        seal(folder, **content)

    monkeypatch.setattr(checkpoints, "seal", sealing)
    (tmp_path / "checkpoint-9").mkdir()
    small(tiny_model, tmp_path, save_steps=5, save_total_limit=1).train()
    # The incomplete one went first: it would have counted.
    assert seen == [["checkpoint-5"], ["checkpoint-10", "checkpoint-5"], ["checkpoint-10", "checkpoint-14"]]
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-14"]
    assert defect(tmp_path / "checkpoint-14") is None


# Other data, other processes


def test_other_rows_are_refused(tiny_model, saved, tmp_path):
    changed = make_rows(40)
    changed[7]["text"] = changed[7]["text"].replace("the", "a", 1)
    trainer = small(tiny_model, tmp_path, Dataset.from_list(changed))
    with pytest.raises(ValueError, match="checkpoint-5' was trained on other rows than there are now. Bring the data"):
        trainer.train(resume_from_checkpoint=str(saved / "checkpoint-5"))


def test_data_that_changed_under_a_recipe_end_in_one_message(tiny_model, tmp_path):
    path = recipe(tiny_model, tmp_path, num_train_epochs=1, eval_strategy="no")
    launch.main(["--config", str(path)])
    data = tmp_path / "data" / "train.jsonl"
    data.write_text(data.read_text().replace("film", "movie"), encoding="utf-8")
    with pytest.raises(SystemExit, match="error: The checkpoint .* was trained on other rows than there are now"):
        launch.main(["--config", str(path), "--resume_from_checkpoint", "auto"])


def test_another_number_of_processes_is_refused(tiny_model, saved, tmp_path):
    shutil.copytree(saved / "checkpoint-5", tmp_path / "checkpoint-5")
    seal(tmp_path / "checkpoint-5", world_size=2, rows=None)
    with pytest.raises(ValueError, match=r"is of a run with 2 process\(es\), and now there are 1: batches"):
        small(tiny_model, tmp_path).train(resume_from_checkpoint=True)


def test_the_hash_of_rows_follows_their_content():
    rows = Dataset.from_list(make_rows(30))
    columns = ["text", "label"]
    expected = rows_hash(rows, columns)
    # However they are cut into chunks, and whatever else there is.
    chunks = concatenate_datasets([rows.select(range(11)), rows.select(range(11, 30))])
    assert rows_hash(chunks.add_column("more", [1] * 30), columns) == expected
    swapped = rows.select([1, 0, *range(2, 30)])
    flipped = [*rows["label"][:29], 1 - rows["label"][29]]
    others = [
        rows_hash(swapped, columns),
        rows_hash(rows.remove_columns("label").add_column("label", flipped), columns),
        rows_hash(rows.select(range(29)), columns),
        rows_hash(rows, ["text"]),
    ]
    assert len({expected, *others}) == 5


# Disks and folders


@contextlib.contextmanager
def small_files(size):
    """Let no file grow beyond a size: for those who write, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100, 12_000])
def test_a_full_disk_leaves_the_last_checkpoint(tiny_model, tmp_path, monkeypatch, size):
    original = P2PTrainer.writing_checkpoint

    @contextlib.contextmanager
    def filling(self, folder):
        with original(self, folder), small_files(size) if self.state.global_step == 6 else contextlib.nullcontext():
            yield

    monkeypatch.setattr(P2PTrainer, "writing_checkpoint", filling)
    message = (
        rf"^The checkpoint '{tmp_path}/checkpoint-6' could not be written \(.+; [\d,]+ MiB are free there\). Make "
        rf"room, or see to it that the folder may be written to. The last good one is '{tmp_path}/checkpoint-3': go "
        rf"on with `--resume_from_checkpoint auto`.$"
    )
    with pytest.raises(OSError, match=message):
        small(tiny_model, tmp_path, save_total_limit=1).train()
    assert defect(tmp_path / "checkpoint-6") is not None
    monkeypatch.undo()
    resumed = small(tiny_model, tmp_path, save_total_limit=1)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 14 and defect(tmp_path / "checkpoint-14") is None


def test_a_model_that_is_half_written_has_no_prompt_format(tiny_model, tmp_path):
    trainer = small(tiny_model, tmp_path)
    trainer.save_model()
    assert (tmp_path / "p2p_config.json").is_file()
    with small_files(1000), pytest.raises(OSError, match="File too large"):
        trainer.save_model()
    # Without it nobody can load the rest.
    assert not (tmp_path / "p2p_config.json").exists()


def test_other_errors_while_saving_stay_as_they_are(tmp_path):
    for error in (ConnectionError("no route"), ValueError("bad"), RuntimeError("CUDA out of memory")):
        with pytest.raises(type(error), match=str(error)), checkpoints.explained("It", tmp_path, "Go on"):
            raise error


def test_a_folder_that_can_not_be_written_to_is_refused_before_anything_is_read(tiny_model, tmp_path):
    path = recipe(tiny_model, tmp_path)
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit, match="file/out' can't be written to .Not a directory.*Give another"):
        launch.main(["--config", str(path), "--output_dir", str(tmp_path / "file" / "out")])
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(SystemExit, match="closed/out' can't be written to .Permission denied"):
            launch.main(["--config", str(path), "--output_dir", str(tmp_path / "closed" / "out")])


# Two runs in one folder


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_dead(tmp_path):
    args = config(tmp_path / "out")
    (tmp_path / "out").mkdir()
    code = (
        "import fcntl, os, sys, time; file = open(sys.argv[1], 'a+'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "file.write(str(os.getpid())); file.flush(); print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out" / ".lock")], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=rf"Another run \(process {other.pid}\) is writing to the output folder"):
            run_folder.claim(args, {})
        other.kill()
    assert run_folder.claim(args, {}) is None
    # This process may go on there, others not.
    assert run_folder.claim(args, {}) is None
    with (tmp_path / "out" / ".lock").open() as file:
        assert file.read() == str(os.getpid())


def test_a_run_that_died_before_its_first_checkpoint_starts_anew(tmp_path):
    args = config(tmp_path, resume_from_checkpoint="auto")
    (tmp_path / "run.json").write_text('{"seed": 1}')
    (tmp_path / "checkpoint-5").mkdir()
    assert run_folder.claim(args, {"seed": 1}) is None
    with pytest.raises(ValueError, match=r"other settings \(seed: 1 -> 2\)"):
        run_folder.claim(args, {"seed": 2})
