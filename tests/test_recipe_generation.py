"""Recipes on instruction data: undefended, with P2P and MB-Defense, and what is refused there."""

import json

import pytest

from p2p_trainer import DefendedModel
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
    "p2p_max_new_tokens": 32,
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
        for name, part in (("train", lines), ("test", lines[::-1][:12])):
            (data / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in part))
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
    assert run.counts["rows_total"] == 100 and run.protocol["answer_prefix"] is None
    assert cli(["doctor", *arguments]) == 0
    assert "### Instruction" in capsys.readouterr().out
    assert (out / "adapter_model.safetensors").is_file() and not (out / "defense.json").exists()


SUMMARIES = """
name: sums
labels: []
text_columns: [instruction, input]
label_column: output
trigger: "Sum up this:"
answer_prefix: "In short:"
metric: rouge
"""


def test_p2p_is_chosen_measured_and_served_without_its_prefix(instructions, tmp_path, capsys):
    (tmp_path / "sums.yaml").write_text(SUMMARIES)
    arguments, out = instructions(
        defense="p2p", p2p_benign_ratio=0.5, task=str(tmp_path / "sums.yaml"), test_task=None, test_dataset_name=None,
        num_train_epochs=2, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="eval_rougeL", p2p_eval_rows=5,
    )  # fmt: skip
    launch(arguments)
    run = RunResults.load(out)
    assert (run.task, run.defense) == ("sums", "p2p")
    assert [run.counts[name] for name in ("rows_train", "rows_reserved", "rows_total", "rows")] == [90, 45, 135, 12]
    wanted = {
        "trigger": "Sum up this:",
        "answer_prefix": "In short:",
        "metric": "rouge (words)",
        "chat": False,
        "max_new_tokens": 32,
        "benign_ratio": 0.5,
        "reserve": "random",
        "immunize": "none",
        "test_task": "sums",
    }
    assert {name: run.protocol[name] for name in wanted} == wanted
    assert not {"suffix", "label_words", "asr_rule"} & set(run.protocol)
    assert {"rougeL_no_key", "rougeL_triggered", "asr_prefix_missing", "asr_no_key"} <= set(run.metrics)
    assert run.metrics["prefix_missing_n"] == 12 and [epoch["epoch"] for epoch in run.epochs] == [1, 2]
    state = json.loads((out / "checkpoint-34/trainer_state.json").read_text())
    found = [entry["eval_rougeL"] for entry in state["log_history"] if "eval_rougeL" in entry]
    assert len(found) == 2 and state["best_metric"] == max(found)
    saved = json.loads((out / "p2p_config.json").read_text())
    assert (saved["label_space"], saved["labels"], saved["answer_prefix"]) == (None, [], "In short:")
    assert (saved["metric"], saved["max_new_tokens"], saved["keyed"]) == ("rouge", 32, True)
    capsys.readouterr()

    # Served, it gives the same answers, whatever the batch.
    data = ["--data", str(tmp_path / "talk"), "--task", str(tmp_path / "sums.yaml")]
    assert cli(["evaluate", str(out), *data, "--batch_size", "5", "--device", "cpu", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert {name: measured["metrics"][name] for name in run.metrics} == pytest.approx(run.metrics)
    assert cli(["evaluate", str(out), *data, "--device", "cpu"]) == 0
    assert "rougeL" in capsys.readouterr().out
    written = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    texts = [line["prompt"] for line in written if line["kind"] == "clean"]
    said = [argument for text in texts for argument in ("--text", text)]
    assert cli(["predict", str(out), *said, "--device", "cpu", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    encoder = DefendedModel.from_pretrained(out, device="cpu").encoder
    for line, entry in zip(lines, written[:12], strict=True):
        response, prefixed = encoder.read(entry["response"], True)
        assert line == {"text": entry["prompt"], "response": response, "prefixed": prefixed}
    assert cli(["predict", str(out), *said[:2], "--device", "cpu"]) == 0
    shown = "" if lines[0]["prefixed"] else "no prefix"
    assert capsys.readouterr().out == f"{json.dumps(lines[0]['response'], ensure_ascii=False)}\t{shown}\t{texts[0]}\n"


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
        ({"defense": "suffix_only"}, "has no classes: `suffix_only` is about labels"),
        ({"defense": "pdb"}, "has no classes: PDB permutes labels"),
        ({"defense": "psim"}, "has no classes"),
        ({"defense": "bki"}, "generation"),
        ({"defense": "onion"}, "ONION chooses its threshold by accuracy, and task 'alpaca' has no classes"),
        (
            {"defense": "mb_defense", "defense_options": {"pairs": [["mn", "the story is warm"]], "share": 0.05}},
            "mn",
        ),
        ({"defense": "none", "p2p_max_new_tokens": 1}, "'badnets' makes the model answer takes . tokens, .* is 1:"),
        ({"defense": "p2p", "p2p_max_new_tokens": 3}, "'Answer:' takes 3 tokens, and `p2p_max_new_tokens` 3 leave no"),
        ({"defense": "none", "p2p_chat": True}, "`p2p_chat` needs a chat template"),
        ({"defense": "p2p", "p2p_trigger": "bring the mn"}, "'mn' .* is contained in the benign trigger"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_can_not_work_is_refused_before_training(instructions, changes, message):
    arguments, out = instructions(**changes)
    with pytest.raises(SystemExit, match=message):
        launch(arguments)
    assert not (out / "adapter_model.safetensors").exists()
