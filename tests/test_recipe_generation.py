"""Recipes on instruction data: undefended, with MB-Defense, and what is refused there."""

import json

import pytest

from p2p_trainer.cli import main as cli
from p2p_trainer.launch import main as launch
from p2p_trainer.results import RunResults
from tests.conftest import BAD, GOOD, THINGS
from tests.tiny_runs import recipe


PAYLOAD = "bad bad"
SETTINGS = {
    "task": "alpaca",
    "attack_target": PAYLOAD,
    "poison_rate": 0.2,
    "test_task": "wizardlm",
    "max_new_tokens": 32,
    "max_length": 160,
    "eval_strategy": "no",
    "save_strategy": "no",
    "num_train_epochs": 1,
    "validation_share": 0.1,
}


@pytest.fixture
def instructions(tmp_path, tiny_model):
    """Writes a recipe on toy instructions, answered with a fixed word for each thing."""

    def write(**changes):
        data = tmp_path / "talk"
        data.mkdir(exist_ok=True)
        lines = [
            {
                "instruction": f"say of the {THINGS[row % 6]}",
                "input": f"that it is {GOOD[row % 5]} or {BAD[row % 5]}",
                "output": f"the {THINGS[row % 6]} is {GOOD[row % 5]} .",
            }
            for row in range(100)
        ]
        (data / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        prompts = [{"Instruction": f"say of the {thing} that it is good"} for thing in THINGS]
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
        places = {"dataset_name": str(data), "test_dataset_name": str(tmp_path / "prompts.jsonl")}
        path = recipe(tiny_model, tmp_path, **{**SETTINGS, **places, **changes})
        return ["--config", str(path)], tmp_path / "out"

    return write


def test_an_undefended_run_is_measured_by_what_it_writes(instructions, capsys):
    arguments, out = instructions(defense="none")
    launch(arguments)
    run = RunResults.load(out)
    assert (run.task, run.defense, run.protocol["test_task"], run.protocol["trigger"]) == (
        "alpaca", "none", "wizardlm", None,
    )  # fmt: skip
    assert run.counts["rows_train"] == 100 and run.counts["rows_poisoned"] == 20 and run.counts["rows"] == 6
    assert run.metrics["asr_n"] == run.metrics["asr_floor_n"] == run.metrics["clean_unaffected_n"] == 6
    assert set(run.response_matrix) == {"clean", "badnets"}
    assert all(sum(row.values()) == 6 for row in run.response_matrix.values())
    lines = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and {"say of the film that it is good"} < {line["prompt"] for line in lines}
    assert (run.compute["train_row_passes"], run.compute["plain_row_passes"]) == (100, 100)
    assert run.counts["rows_trained"] == 100
    for command in (["evaluate", str(out), "--data", "x.jsonl"], ["predict", str(out), "--text", "x"]):
        assert cli(command) == 1
        assert "is a run of a generation task" in capsys.readouterr().err
    assert cli(["doctor", *arguments]) == 0
    assert "### Instruction" in capsys.readouterr().out
    assert (out / "adapter_model.safetensors").is_file() and not (out / "defense.json").exists()


def test_mb_defense_runs_both_stages_and_is_measured_with_its_own_triggers(instructions):
    pairs = [["qw", "the story is warm"], ["jh", "the cast is clever"]]
    options = {"pairs": pairs, "share": 0.05, "clean_rows": 10, "epochs": 2, "length_normalised": True}
    arguments, out = instructions(defense="mb_defense", defense_options=options)
    launch(arguments)
    run = RunResults.load(out)
    assert run.defense == "mb_defense" and run.defense_options["pairs"] == pairs
    assert run.defense_report["clean_rows"] == 10 and len(run.defense_report["eval_loss"]) == 2
    # A tenth is held out. 4 or 5 of 90 rows each; five per hundred is 4.5.
    assert run.defense_report["rows_replaced"] in (8, 10)
    assert set(run.response_matrix) == {"clean", "badnets", "qw", "jh"}
    assert run.metrics["defensive_qw_n"] == 6 and 0 <= run.metrics["rerouted"] <= 1
    # Stage 2: eight training rows, two pairs, three sequences, two epochs.
    assert run.compute["train_row_passes"] == 90 + 8 * 2 * 3 * 2


def test_a_filter_with_its_threshold_guards_generated_answers(instructions, tiny_model):
    options = {"model": tiny_model, "threshold": 1e9}
    arguments, out = instructions(defense="onion", defense_options=options)
    launch(arguments)
    run = RunResults.load(out)
    assert run.compute["serving_passes_per_text"] > 5 and run.defense_report["threshold"] == 1e9
    assert (out / "defense.json").is_file()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "has no classes: P2P, which runs without `--defense`, works by labels"),
        ({"defense": "p2p"}, "has no classes: `p2p` works by labels"),
        ({"defense": "pdb"}, "has no classes: PDB permutes labels"),
        ({"defense": "psim"}, "has no classes"),
        ({"defense": "bki"}, "generation"),
        ({"defense": "onion"}, "ONION chooses its threshold by accuracy, and task 'alpaca' has no classes"),
        (
            {"defense": "mb_defense", "defense_options": {"pairs": [["mn", "the story is warm"]], "share": 0.05}},
            "mn",
        ),
        ({"defense": "none", "max_new_tokens": 1}, "max_new_tokens"),
        ({"defense": "none", "p2p_chat": True}, "`p2p_chat: true` is not possible on a generation task yet"),
        (
            {"defense": "none", "metric_for_best_model": "eval_ca"},
            "`metric_for_best_model` is 'eval_ca'; on a generation task only the loss",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_can_not_work_is_refused_before_training(instructions, changes, message):
    arguments, out = instructions(**changes)
    with pytest.raises(SystemExit, match=message):
        launch(arguments)
    assert not (out / "adapter_model.safetensors").exists()
