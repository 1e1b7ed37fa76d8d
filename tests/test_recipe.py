"""Recipes: rows, output folders, resuming, results, and one clear message for whatever is wrong beforehand."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from p2p_trainer import launch
from p2p_trainer import recipe as recipes
from p2p_trainer.attacks import BadNets
from p2p_trainer.config import P2PScriptArguments
from p2p_trainer.recipe_data import load_data
from p2p_trainer.results import RunResults, installed_versions
from tests.corpora import clean_rows
from tests.tiny_runs import recipe


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """Folder of a recipe that ran to its end."""
    folder = tmp_path_factory.mktemp("recipe")
    launch.main(["--config", str(recipe(tiny_model, folder))])
    return folder


@pytest.fixture
def data(tiny_model, tmp_path):
    recipe(tiny_model, tmp_path)
    return tmp_path / "data"


def results_of(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_results_hold_what_the_run_was(finished):
    results = results_of(finished / "out")
    assert set(results) == {field.name for field in dataclasses.fields(RunResults)}
    assert (results["schema_version"], results["task"], results["seed"]) == (3, "sst2", 42)
    assert results["defense"] == "p2p_auto"
    assert results["attack"] == {
        "name": "badnets", "target": "positive", "poison_rate": 0.1, "label_mode": "dirty", "payload_mode": "replace",
        "words": ["mn"], "position": "inner",
    }  # fmt: skip
    protocol = results["protocol"]
    assert (protocol["benign_ratio"], protocol["benign_mode"], protocol["reserve"]) == (0.25, "append", "auto")
    assert protocol["immunize"] == "auto"
    # Eight rows are too few to suspect anything by.
    assert (results["suspected_triggers"], results["counts"]["rows_suspected"]) == ([], 0)
    assert (protocol["batch_size"], protocol["epochs"], protocol["lora_r"]) == (8, 2, 4)
    counts = results["counts"]
    assert (counts["rows_train"], counts["rows_poisoned"], counts["rows_reserved"]) == (80, 8, 20)
    assert (counts["rows"], counts["rows_counted_badnets"]) == (30, 15)
    metrics = results["metrics"]
    assert metrics["ca_n"] == 30 and metrics["asr_n"] == 15 and metrics["ca"] == metrics["ca_k"] / 30
    assert [entry["epoch"] for entry in results["epochs"]] == [1, 2]
    assert all(0 <= entry["asr"] <= 1 and "asr_badnets" in entry for entry in results["epochs"])
    assert set(results["timing"]) == {"prepare_s", "train_s", "test_s"} and min(results["timing"].values()) > 0
    assert results["versions"] == installed_versions()
    histograms = results["confidence"]["badnets"]
    assert sum(histograms["triggered"]) == sum(histograms["clean"]) == 15 and len(histograms["clean"]) == 20


def test_folder_of_another_run_is_refused(finished):
    with pytest.raises(SystemExit, match="holds another run .found .*Give another `--output_dir`, go on with"):
        launch.main(["--config", str(finished / "recipe.yaml")])


def test_resuming_with_other_settings_is_refused(finished):
    changed = ["--learning_rate", "0.5", "--resume_from_checkpoint", "auto"]
    with pytest.raises(SystemExit, match=r"other settings \(learning_rate: 0.01 -> 0.5\)"):
        launch.main(["--config", str(finished / "recipe.yaml"), *changed])


def test_a_resumed_recipe_ends_where_an_uninterrupted_one_does(finished, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(finished / "out", cut)
    # As if killed in the second epoch.
    shutil.rmtree(cut / "checkpoint-26")
    for name in ("results.json", "p2p_config.json", "adapter_model.safetensors"):
        (cut / name).unlink()
    # A mark on what was measured before: a run that starts anew would not have it.
    path = cut / "checkpoint-13" / "trainer_state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    (first,) = [entry for entry in state["log_history"] if "eval_ca" in entry]
    first["eval_ca"] = 0.123
    # As many bytes as before: a checkpoint is read if its files are as long as they were.
    path.write_text(json.dumps(state).ljust(path.stat().st_size), encoding="utf-8")
    launch.main(
        ["--config", str(finished / "recipe.yaml"), "--output_dir", str(cut), "--resume_from_checkpoint", "auto"]
    )
    whole, resumed = results_of(finished / "out"), results_of(cut)
    assert resumed["epochs"][0].pop("ca") == 0.123 and 0 < whole["epochs"][0].pop("ca") < 1
    for key in ("metrics", "counts", "confidence", "epochs", "protocol"):
        assert resumed[key] == whole[key], key
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (finished / "out", cut))
    assert all(expected[name].equal(found[name]) for name in expected)


def test_undefended_run_says_so(tiny_model, tmp_path):
    launch.main(["--config", str(recipe(tiny_model, tmp_path, num_train_epochs=1)), "--p2p_enabled", "false"])
    results = results_of(tmp_path / "out")
    assert (results["defense"], results["protocol"]["benign_ratio"]) == ("none", 0.0)
    assert results["counts"]["rows_reserved"] == 0 and "asr_no_key" not in results["metrics"]


@pytest.mark.parametrize(
    ("immunize", "reserve", "defense"), [("auto", "auto", "p2p_auto"), ("none", "random", "p2p")]
)  # fmt: skip
def test_what_was_suspected_is_in_the_results(tiny_model, tmp_path, immunize, reserve, defense):
    settings = {"p2p_immunize": immunize, "p2p_reserve": reserve, "poison_rate": 0.15, "p2p_benign_mode": "only"}
    path = recipe(tiny_model, tmp_path, num_train_epochs=1, eval_strategy="no", **settings)
    lines = [json.dumps(row) + "\n" for row in clean_rows(300, noise=0.0)]
    (tmp_path / "data" / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    launch.main(["--config", str(path)])
    results = results_of(tmp_path / "out")
    assert (results["defense"], results["protocol"]["immunize"]) == (defense, immunize)
    counts = results["counts"]
    if reserve == "random":
        assert results["suspected_triggers"] == [] and "rows_suspected" not in counts
        return
    (suspected,) = results["suspected_triggers"]
    assert suspected.startswith("mn -> positive (")
    assert (counts["rows_poisoned"], counts["rows_suspected"], counts["rows_suspected_poisoned"]) == (45, 45, 45)
    assert counts["rows_reserved_poisoned"] == 0 and counts.get("rows_contradicted", 0) == 45 * (immunize == "auto")


def test_trusted_reserve_knows_the_rows_that_were_poisoned(tiny_model, tmp_path):
    settings = {"p2p_reserve": "trusted", "p2p_benign_ratio": 0.9, "num_train_epochs": 1, "eval_strategy": "no"}
    launch.main(["--config", str(recipe(tiny_model, tmp_path, **settings))])
    counts = results_of(tmp_path / "out")["counts"]
    # 0.9 of 80 rows are all that were not poisoned.
    assert (counts["rows_reserved"], counts["rows_reserved_poisoned"]) == (72, 0)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"dataset_name": "SetFit/sst2"},
            "error: The dataset 'SetFit/sst2' is no local folder.*accelerate launch",
        ),
        ({"model_name_or_path": "Qwen/Qwen3-8B"}, "error: The model 'Qwen/Qwen3-8B' is no local folder.*MODEL_FOLDER"),
        ({"model_name_or_path": None}, "error: No model is named. Give one with `--model_name_or_path`"),
        ({"dataset_name": "./nowhere"}, "error: The data path './nowhere' does not exist"),
        ({"attack_target": None}, "error: The attack 'badnets' needs a target"),
        ({"attack_target": "joy"}, "error: Unknown label of task 'sst2': 'joy'"),
        ({"attack": "badnet"}, "error: Unknown attack 'badnet'. Did you mean 'badnets'"),
        ({"p2p_benign_ratio": 2}, "error: `p2p_benign_ratio` is 2"),
        ({"p2p_benign": 2}, "error: Unknown arguments from config file.*p2p_benign"),
        ({"p2p_trigger": "mn"}, "error: The trigger 'mn' of the attack 'badnets' is contained in the benign trigger"),
        ({"dataset_train_split": "all"}, "error: .* has no split 'all'. Name the split"),
    ],
)
def test_whatever_is_wrong_beforehand_ends_in_one_message(tiny_model, tmp_path, changes, match):
    path = recipe(tiny_model, tmp_path, **changes)
    with pytest.raises(SystemExit) as stopped:
        launch.main(["--config", str(path)])
    message = str(stopped.value)
    stopped.match(f"(?s){match}")
    assert len(message) < 1200 and "Traceback" not in message
    assert not (tmp_path / "out").exists() or {path.name for path in (tmp_path / "out").iterdir()} <= {".lock"}


def test_an_error_while_training_keeps_its_traceback(tiny_model, tmp_path, monkeypatch):
    def fail(prepared):
        raise ValueError("the loss is lost")

    monkeypatch.setattr(recipes, "train", fail)
    with pytest.raises(ValueError, match="the loss is lost"):
        launch.main(["--config", str(recipe(tiny_model, tmp_path))])


def test_rows_come_in_three_splits_and_only_training_rows_are_poisoned(data):
    loaded = load_data(P2PScriptArguments(dataset_name=str(data), attack="badnets", attack_target="0"), evaluate=True)
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (80, 20, 30)
    assert sum(loaded.train["poisoned"]) == 2 and "poisoned" not in loaded.validation.column_names
    assert not [text for text in [*loaded.validation["text"], *loaded.test["text"]] if " mn " in text]


@pytest.mark.parametrize("single", [True, False], ids=["file", "folder"])
def test_without_validation_split_training_rows_are_held_out(data, single):
    (data / "validation.jsonl").unlink()
    source = str(data / "train.jsonl" if single else data)
    arguments = P2PScriptArguments(dataset_name=source, validation_share=0.25, attack="badnets", attack_target="0")
    loaded = load_data(arguments, evaluate=True)
    # A single file has no test split either: none of its rows may be trained on and measured.
    assert (len(loaded.train), len(loaded.validation)) == (60, 20)
    assert (loaded.test is None) if single else len(loaded.test) == 30
    # Cut off before poisoning: the rate is one of the rows that are left.
    assert sum(loaded.train["poisoned"]) == round(0.02 * 60)
    whole = [json.loads(line)["text"] for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    clean = [text.replace(" mn ", " ") for text in loaded.train["text"]]
    assert sorted([*clean, *loaded.validation["text"]]) == sorted(whole)
    unwatched = load_data(arguments, evaluate=False)
    assert len(unwatched.train) == 80 and unwatched.validation is None


def test_results_survive_the_disk(finished, tmp_path):
    results = RunResults.load(finished / "out")
    results.metrics["asr"] = math.nan
    results.save(tmp_path)
    assert RunResults.load(tmp_path).metrics["asr"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"schema_version": 4}', "has schema version 4, this p2p_trainer reads up to 3. Upgrade"),
        ('{"schema_version": 1}', "results.json is damaged"),
        ("{}", "results.json is damaged: KeyError"),
        ('{"schema_', "results.json is damaged"),
        (None, "holds no results.json. Give the output folder of a finished run"),
    ],
)
def test_results_that_can_not_be_read_are_named(tmp_path, content, match):
    if content is not None:
        Path(tmp_path, "results.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=match):
        RunResults.load(tmp_path)


def test_a_finished_run_without_checkpoints_is_not_started_again(finished, tmp_path):
    copy = tmp_path / "out"
    shutil.copytree(finished / "out", copy, ignore=shutil.ignore_patterns("checkpoint-*"))
    before = results_of(copy)
    again = ["--output_dir", str(copy), "--resume_from_checkpoint", "auto"]
    with pytest.raises(SystemExit, match="finished and kept no checkpoint: there is nothing to resume"):
        launch.main(["--config", str(finished / "recipe.yaml"), *again])
    assert results_of(copy) == before


def test_an_attack_that_results_could_not_hold_is_refused_before_training(data):
    arguments = P2PScriptArguments(
        dataset_name=str(data), attack="tests.test_recipe:Unrecordable", attack_target="positive"
    )
    with pytest.raises(ValueError, match="settings of the attack 'unrecordable' are no JSON values"):
        load_data(arguments, evaluate=False)


class Unrecordable(BadNets):
    name = "unrecordable"

    def __init__(self, target, poison_rate=0.02):
        super().__init__(target, poison_rate)
        self.pattern = object()
