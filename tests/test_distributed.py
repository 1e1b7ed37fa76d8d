"""Two real processes on gloo train and measure what one process does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from p2p_trainer import DefendedModel
from tests.distributed_worker import measure, train
from tests.tiny_runs import losses, saved_run


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def ranks(tiny_model, tmp_path_factory):
    """What both processes found, and the folder they worked in."""
    folder = tmp_path_factory.mktemp("two")
    saved_run(tiny_model, folder / "saved", num_train_epochs=2, use_cpu=True)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "-m", "tests.distributed_worker", tiny_model, str(folder / "saved"), str(folder)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_there_were_two_processes(ranks):
    for rank in ranks[1]:
        assert (rank["world_size"], rank["backend"], rank["kind"]) == (2, "gloo", "MULTI_CPU")


def test_both_processes_have_the_same_numbers(ranks):
    first, second = ranks[1]
    assert first["rates"] == second["rates"] and first["measured"] == second["measured"]
    assert first["epochs"] == second["epochs"] and len(first["epochs"]) == 2
    assert first["rates"]["eval_ca_n"] == 23 and first["rates"]["eval_asr_badnets_n"] == 12
    assert first["counts"] == second["counts"] == {
        "rows_train": 96, "rows_suspected": 0, "rows_doubted": 0, "rows_reserved": 24, "rows_contradicted": 0,
        "rows_total": 120, "rows_cut": 0,
    }  # fmt: skip


def test_losses_are_those_of_one_process_with_the_double_batch(ranks, tiny_model, tmp_path):
    alone = train(tiny_model, tmp_path, batch_size=8)
    assert alone.args.world_size == 1 and len(losses(alone)) == 15
    assert ranks[1][0]["losses"] == pytest.approx(losses(alone), abs=1e-4)
    # The losses differ from step to step by far more than that.
    assert max(losses(alone)) - min(losses(alone)) > 0.01


def test_a_saved_model_has_the_numbers_that_one_process_measures(ranks):
    folder, (first, _) = ranks
    expected = measure(folder / "saved")
    assert expected["23 rows"].keys() == first["measured"]["23 rows"].keys()
    assert first["measured"] == json.loads(json.dumps(expected))
    assert expected["23 rows"]["ca_n"] == 23 and expected["3 rows"]["ca_n"] == 3


def test_one_process_wrote_the_run(ranks):
    folder, _ = ranks
    checkpoint = folder / "run" / "checkpoint-15"
    assert {"adapter_model.safetensors", "p2p_config.json"} <= {path.name for path in checkpoint.iterdir()}
    assert len(DefendedModel.from_pretrained(checkpoint).classify(["the film is good ."])) == 1
