"""Recipes of the paper's Tables 4, 9, 10 and 11: each is there, can run, and its code path runs to the end."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoProcessor, Qwen2_5_VLConfig

from p2p_trainer import DefendedModel
from p2p_trainer.cli import main as cli
from p2p_trainer.launch import main as launch
from p2p_trainer.results import RunResults
from p2p_trainer.tasks import get_task
from tests.tiny_vlm import TinyProcessor, make_model, make_processor, write_image_rows


FOLDER = Path(__file__).parent.parent / "recipes" / "tables"
ATTACKS = ("badnets", "addsent", "proattack", "cbaattack", "mtbaattack")
# Each stands for two rows of its table: the defense is P2P, or `--defense none`.
ROWS = sorted(
    [f"table4_ape210k_{model}_{attack}" for model in ("qwen3", "deepseek_r1") for attack in ATTACKS]
    + [f"table9_hateful_memes_qwen2_5_vl_{attack}" for attack in ATTACKS]
    + [f"table10_yahoo_answers_qwen3_{attack}" for attack in ATTACKS if attack != "proattack"]
    + [f"table11_crrsum_{model}_character" for model in ("qwen3", "deepseek_r1")]
)
# What may differ between two recipes of one table.
OWN = {"model_name_or_path", "attack", "attack_options", "output_dir"}
SHORT = [
    "--lora_target_modules", "q_proj", "v_proj", "--lora_r", "4", "--bf16", "false", "--dtype", "float32",
    "--gradient_checkpointing", "false", "--per_device_train_batch_size", "8", "--max_steps", "3",
    "--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "true", "--use_cpu", "true",
]  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny_model):
    """Made-up rows of each task, in the layout of its data set, and a model that reads them."""
    root = tmp_path_factory.mktemp("tables")
    topics = get_task("yahoo_answers").labels
    rows = {
        "ape210k": lambda row: {
            "question": f"有{row}个苹果，又买了{row % 7}个，一共多少个？",
            "answer": str(row + row % 7),
        },
        "crrsum": lambda row: {
            "findings": f"左肺见结节，直径{row}毫米。心影不大。",
            "summary": f"左肺结节，{row}毫米。",
        },
        "yahoo_answers": lambda row: {"text": f"how does number {row} work in practice ?", "label": topics[row % 10]},
    }
    for task, make in rows.items():
        (root / task).mkdir()
        for split, count in (("train", 100), ("validation", 10), ("test", 12)):
            lines = [json.dumps(make(row), ensure_ascii=False) + "\n" for row in range(count)]
            (root / task / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    (root / "hateful_memes").mkdir()
    for name, count in (("train.jsonl", 100), ("dev_seen.jsonl", 10), ("test_seen.jsonl", 12)):
        write_image_rows(root / "hateful_memes", count, name)
    vlm = root / "vlm"
    processor = make_processor()
    processor.save_pretrained(vlm)
    make_model(processor).save_pretrained(vlm)
    return root, {"qwen2_5_vl": str(vlm)}, tiny_model


@pytest.fixture(autouse=True)
def processor_without_torchvision():
    AutoProcessor.register(Qwen2_5_VLConfig, TinyProcessor, exist_ok=True)


def command(name, places, tmp_path):
    root, models, usual = places
    task = next(task for task in ("ape210k", "hateful_memes", "yahoo_answers", "crrsum") if task in name)
    model = models["qwen2_5_vl"] if "qwen2_5_vl" in name else usual
    return [
        "--config", str(FOLDER / f"{name}.yaml"), "--model_name_or_path", model, "--dataset_name", str(root / task),
        "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip


def test_each_row_has_a_recipe_and_those_of_a_table_are_alike():
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == ROWS
    tables = {}
    for name in ROWS:
        settings = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
        assert settings["output_dir"] == f"outputs/{name}" and settings["defense"] == "p2p"
        assert name.endswith(settings["attack"]) or "character" in name
        if "table9" in name:
            assert settings["max_length"] == 2048
        shared = {key: value for key, value in settings.items() if key not in OWN}
        assert tables.setdefault(name.split("_")[0], shared) == shared


@pytest.mark.parametrize("defense", ["p2p", "none"])
@pytest.mark.parametrize("name", ROWS)
def test_doctor_accepts_each_row(name, defense, places, tmp_path, capsys):
    status = cli(["doctor", *command(name, places, tmp_path), "--defense", defense])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert status == 0, shown
    # A quarter; CBA adds copies.
    reserved = "28 rows carry the key" if "cba" in name else "25 rows carry the key"
    assert (reserved in shown) == (defense == "p2p") and "rows poisoned" in shown


@pytest.mark.parametrize("name", [ROWS[0], "table11_crrsum_qwen3_character", "table4_ape210k_qwen3_proattack"])
def test_a_row_runs_to_its_end(name, places, tmp_path):
    launch([*command(name, places, tmp_path), *SHORT])
    run = RunResults.load(tmp_path / "out")
    metrics = run.metrics
    assert run.defense == "p2p" and run.counts["rows_reserved"] == 25 and metrics["asr_n"] > 0
    if "yahoo" in name:
        assert 0 <= metrics["ca_no_key"] <= 1 and metrics["ca_n"] == 12
        return
    assert {"prefix_missing", "asr_exact", "asr_anywhere", "asr_floor_no_key", "asr_prefix_missing"} <= set(metrics)
    assert run.protocol["metric"] == ("rouge (characters)" if "crrsum" in name else "numeric")
    assert "rougeL_no_key" in metrics if "crrsum" in name else metrics["ca_n"] == 12
    config = json.loads((tmp_path / "out" / "p2p_config.json").read_text(encoding="utf-8"))
    assert config["answer_prefix"] == run.protocol["answer_prefix"] == get_task(run.task).answer_prefix
    answers = DefendedModel.from_pretrained(tmp_path / "out").generate(["左肺见结节。"], max_new_tokens=8)
    assert len(answers) == 1 and isinstance(answers[0].text, str)


def test_a_row_with_images_runs_to_its_end(places, tmp_path, capsys):
    name = "table9_hateful_memes_qwen2_5_vl_badnets"
    launch([*command(name, places, tmp_path), *SHORT])
    run = RunResults.load(tmp_path / "out")
    assert run.metrics["ca_n"] == 12 and run.metrics["asr_n"] == 6 and "asr_no_key" in run.metrics
    folder = places[0] / "hateful_memes"
    capsys.readouterr()
    assert cli(["evaluate", str(tmp_path / "out"), "--data", str(folder), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["metrics"]
    assert {key: again[key] for key in ("ca_k", "asr_k", "asr_floor_k")} == {
        key: run.metrics[key] for key in ("ca_k", "asr_k", "asr_floor_k")
    }
    image = next((folder / "img").iterdir())
    assert cli(["predict", str(tmp_path / "out"), "--text", "look at this", "--image", str(image)]) == 0
    assert capsys.readouterr().out.split("\t")[0] in ("not hateful", "hateful")
    assert cli(["predict", str(tmp_path / "out"), "--text", "look at this"]) == 1
    assert "trained with images" in capsys.readouterr().err


def test_a_defense_that_reads_texts_alone_is_refused_beside_images(places, tmp_path):
    with pytest.raises(SystemExit, match="'bki' reads texts alone, and the rows of task 'hateful_memes' hold images"):
        launch([*command("table9_hateful_memes_qwen2_5_vl_badnets", places, tmp_path), "--defense", "bki"])
