"""Two processes on gloo, started as users do, train, measure and write what one process does."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from p2p_trainer import DefendedModel
from p2p_trainer import launch as launching
from p2p_trainer.evaluation import LabelScorer
from tests.distributed_worker import measure
from tests.launching import job, launch, make_model
from tests.tiny_runs import saved_run


QLORA = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "use_bnb_nested_quant": True,
    "optim": "paged_adamw_8bit",
    "dtype": "float32",
    "learning_rate": 1e-3,
}
# Sums of a batch in another order: float32 has seven digits, and a loss of 5 keeps six of them over 26 steps.
ROUNDING = 1e-4
# TRL trains the adapter of quantised weights in bfloat16, of three digits. Half the batch makes a difference of 0.05.
COARSE = 2e-3
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)


class Run:
    """What a recipe left behind, in its folder `out` and in the notes of its processes."""

    def __init__(self, folder):
        self.folder = folder
        self.results = json.loads((folder / "out" / "results.json").read_text())
        # Each has the same rows in a folder of its own.
        del self.results["protocol"]["dataset"]
        self.ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]
        self.adapter = load_file(folder / "out" / "adapter_model.safetensors")
        self.files = {path.relative_to(folder / "out").as_posix() for path in (folder / "out").rglob("*")}

    def is_like(self, alone, rounding=ROUNDING):
        """Compare with the run of one process."""
        first, second = self.ranks
        assert [rank["world_size"] for rank in self.ranks] == [2, 2] and first["backend"] == "gloo"
        # The same rows, reserved, poisoned and keyed, on each.
        assert first["rows"] == second["rows"] == alone.ranks[0]["rows"]
        assert first["counts"] == second["counts"] == alone.ranks[0]["counts"]
        assert len(first["losses"]) == 26 and first["losses"] == pytest.approx(alone.ranks[0]["losses"], abs=rounding)
        assert first["epochs"] == second["epochs"] == alone.ranks[0]["epochs"] and len(first["epochs"]) == 1
        for part in ("metrics", "counts", "confidence", "epochs", "protocol", "suspected_triggers"):
            assert self.results[part] == alone.results[part], part
        assert self.adapter.keys() == alone.adapter.keys()
        for name, weight in alone.adapter.items():
            torch.testing.assert_close(self.adapter[name], weight, atol=rounding, rtol=0)

    def was_written_once(self, alone, optimizer=("optimizer.pt",)):
        """The files of one process, and what each keeps of its own; nothing half-written, none by the second."""
        ours = alone.files - {"checkpoint-26/rng_state.pth", "checkpoint-26/optimizer.pt"}
        states = ["rng_state_0.pth", "rng_state_1.pth", *optimizer]
        more = {f"checkpoint-26/{name}" for name in states}
        assert self.files == ours | more
        wrote = {path.name: path.read_text().splitlines() for path in self.folder.glob("wrote-*.txt")}
        assert any(".results.json." in name for name in wrote["wrote-0.txt"])
        assert set(wrote.get("wrote-1.txt", [])) <= more


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    make_model(folder / "model", tokenizer)
    return folder


def run_alone(folder, name, **changes):
    """Run the recipe in this process, with the batch of two; how near the nearest answer is to another one."""
    gaps = []
    own, logits = LabelScorer.score, LabelScorer.logits

    def score(self, *given, **settings):
        scores = own(self, *given, **settings)
        for keyed in (False, True):
            words = np.sort(scores.deployed(keyed), axis=1)
            gaps.append(float((words[:, -1] - words[:, -2]).min()))
        return scores

    def top(self, *given, **settings):
        found = logits(self, *given, **settings)
        best = found.topk(2).values
        gaps.append(float((best[..., 0] - best[..., 1]).min()))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LabelScorer, "score", score)
        patch.setattr(LabelScorer, "logits", top)
        launching.main(["--config", str(job(str(folder / "model"), folder / name, 16, **changes))])
    return Run(folder / name), min(gaps)


@pytest.fixture(scope="module")
def alone(folder):
    return run_alone(folder, "alone")


def run_two(folder, kind, name, *flags, saved=None, machines=1, worker="p2p_trainer.launch", changes=None, **environ):
    path = job(str(folder / "model"), folder / name, 8, saved=saved, **(changes or {}))
    ended = launch(kind, path, *flags, machines=machines, worker=worker, **environ)
    for status, output in ended:
        assert status == 0, output[-3000:]
    return Run(folder / name), [output for _, output in ended]


def test_one_process_has_no_row_on_the_edge(alone):
    run, gap = alone
    # No answer that rounding could turn, and no model that always says the same.
    assert gap > 10 * ROUNDING
    metrics = run.results["metrics"]
    assert (metrics["ca_n"], metrics["asr_n"], metrics["asr_floor_n"]) == (23, 12, 12)
    assert 12 < metrics["ca_k"] < 23 and 0 < metrics["asr_no_key_k"] < 12
    assert run.results["counts"]["rows_total"] == 416 and run.results["counts"]["rows_poisoned"] == 45
    losses = run.ranks[0]["losses"]
    assert max(losses) - min(losses) > 1000 * ROUNDING


def test_ddp(folder, alone):
    saved_run(str(folder / "model"), folder / "saved", num_train_epochs=2, use_cpu=True)
    run, (output,) = run_two(folder, "ddp", "ddp", saved=str(folder / "saved"))
    run.is_like(alone[0])
    run.was_written_once(alone[0])
    assert [(rank["kind"], rank["sharded"], rank["machine"]) for rank in run.ranks] == [("MULTI_CPU", 0, "0")] * 2
    # One table, of the first process.
    assert output.count("Test rows") == output.count("Saved to") == 1
    # A saved model has the numbers that one process measures.
    expected = json.loads(json.dumps(measure(folder / "saved")))
    assert expected["23 rows"]["ca_n"] == 23 and expected["3 rows"]["ca_n"] == 3
    assert run.ranks[0]["measured"] == run.ranks[1]["measured"] == expected
    assert len(DefendedModel.from_pretrained(folder / "ddp" / "out").classify(["fine ."])) == 1


def test_two_machines_with_qlora(folder, alone):
    quantized, gap = run_alone(folder, "quantized", **QLORA)
    assert gap > 10 * COARSE and quantized.ranks[0]["losses"] != pytest.approx(alone[0].ranks[0]["losses"], abs=COARSE)
    run, outputs = run_two(folder, "multi_node", "machines", machines=2, changes=QLORA)
    run.is_like(quantized, COARSE)
    run.was_written_once(quantized)
    found = [(rank["kind"], rank["machine"], rank["quantized"]) for rank in run.ranks]
    assert found == [("MULTI_CPU", "0", True), ("MULTI_CPU", "1", True)]
    assert [output.count("Saved to") for output in outputs] == [1, 0]


def test_fsdp2(folder, alone):
    run, _ = run_two(
        folder,
        "fsdp2",
        "fsdp2",
        "--fsdp_cpu_ram_efficient_loading=false",
        worker="tests.distributed_worker",
        changes={"use_cpu": False},
        ACCELERATE_TORCH_DEVICE="cpu",
    )
    run.is_like(alone[0])
    run.was_written_once(alone[0], ["optimizer.bin", "pytorch_model_fsdp.bin"])
    for rank in run.ranks:
        assert (rank["kind"], rank["sharded"]) == ("FSDP", 1)
        assert rank["refused"].startswith("FSDP2 spreads the model when training begins")


@needs_deepspeed
@pytest.mark.parametrize(("stage", "sharded"), [(2, 0), (3, 1)])
def test_zero(folder, alone, stage, sharded):
    run, _ = run_two(folder, f"zero{stage}", f"zero{stage}")
    run.is_like(alone[0])
    states = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)]
    states += [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in (0, 1)] * (stage == 3)
    states += ["mp_rank_00_model_states.pt"] * (stage == 2)
    more = ["latest", "zero_to_fp32.py", "zero_to_torch.py", "global_step26", *(f"global_step26/{s}" for s in states)]
    run.was_written_once(alone[0], more)
    for rank in run.ranks:
        assert (rank["kind"], rank["stage"], rank["sharded"]) == ("DEEPSPEED", stage, sharded)
