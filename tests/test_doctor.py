"""`p2p-trainer doctor` on a recipe: what it takes, whether it fits, and what to change."""

import json
import shutil

import pytest

from p2p_trainer.cli import main
from p2p_trainer.estimation import devices, forecasting
from p2p_trainer.estimation.cost import GIB
from tests.tiny_runs import recipe


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(devices, "_MEASURED_S", 0.01)
    devices._measured_flops.cache_clear()
    yield
    devices._measured_flops.cache_clear()


@pytest.fixture
def doctor(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")

    def run(path, *flags):
        status = main(["doctor", "--config", str(path), *map(str, flags)])
        return status, " ".join(capsys.readouterr().out.replace("│", " ").split())

    return run


def test_what_a_recipe_takes(tiny_model, tmp_path, doctor):
    status, shown = doctor(recipe(tiny_model, tmp_path, max_length=16))
    assert status == 0
    # 2 layers of rank 4: queries 32 -> 32, values 32 -> 16.
    assert f"{2 * 4 * (32 + 32 + 32 + 16):,} trained" in shown
    assert "activations (8 rows of 16 tokens)" in shown and "weights (float32)" in shown and "libraries" in shown
    assert "yes: 1 of" in shown and "GiB (CPU, 1 x ddp)" in shown
    # 20 validation rows twice, 30 test rows: clean and triggered, with the key and without it.
    assert "training less than a minute, evaluation less than a minute (280 texts), if 40% of" in shown
    assert "TFLOPS measured is reached; 16 tokens a row with padding" in shown


def test_what_does_not_fit_says_what_would(tiny_model, tmp_path, doctor, monkeypatch):
    # 100 MB of activations a token.
    read = forecasting.read_model

    def large(*arguments):
        size = read(*arguments)
        return type(size)(**{**vars(size), "saved": 1e8})

    monkeypatch.setattr(forecasting, "read_model", large)
    monkeypatch.setattr(devices, "main_memory", lambda: 10 * GIB)
    status, shown = doctor(recipe(tiny_model, tmp_path))
    assert status == 1 and "no: " in shown and "of 10 GiB (CPU, 1 x ddp). Any of these would do: - per_device" in shown
    assert "per_device_train_batch_size: 2, gradient_accumulation_steps: 4" in shown
    # Close to what there is, it is left to the user.
    needed = float(shown.split("no: ")[1].split()[0])
    monkeypatch.setattr(devices, "main_memory", lambda: int(needed * GIB))
    status, shown = doctor(tmp_path / "recipe.yaml")
    assert status == 0 and "perhaps not: " in shown


def test_a_launch_of_several_processes(tiny_model, tmp_path, doctor, monkeypatch):
    path = tmp_path / "fsdp2.yaml"
    path.write_text(json.dumps({"distributed_type": "FSDP", "num_processes": 4, "num_machines": 2}))
    monkeypatch.setattr(devices, "main_memory", lambda: 8 * GIB)
    status, shown = doctor(recipe(tiny_model, tmp_path), "--accelerate_config", path)
    # Two processes share a machine's memory; 100 rows in 4 x 8.
    assert status == 0 and "of 4 GiB (CPU, 4 x fsdp2)" in shown and "8 = 2 epochs x 4 of batch 32" in shown


def test_an_accelerate_configuration_that_is_not_there(tiny_model, tmp_path, capsys):
    arguments = ["doctor", "--config", str(recipe(tiny_model, tmp_path)), "--accelerate_config", "nowhere.yaml"]
    assert main(arguments) == 1
    assert "The accelerate configuration 'nowhere.yaml' does not exist." in capsys.readouterr().err


def test_a_model_without_configuration_is_not_estimated(tiny_model, tmp_path, doctor):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    path = recipe(str(folder), tmp_path)
    (folder / "model.safetensors").unlink()
    assert doctor(path)[0] == 0
    for config in ({"model_type": "unheard_of"}, {"model_type": "clip_vision_model", "architectures": ["Trainer"]}):
        (folder / "config.json").write_text(json.dumps(config))
        status, shown = doctor(path)
        assert status == 0 and "not estimated, the model's configuration can't be used: " in shown


def test_code_of_a_model_is_not_run(tiny_model, tmp_path, doctor):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    path = recipe(str(folder), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    doctor(path)
    assert not (tmp_path / "ran").exists()
