"""Recipes for each model of the paper, for QLoRA and for full fine-tuning: all fit what they are for, and run."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from p2p_trainer import DefendedModel, recipe
from p2p_trainer.cli import main as cli
from p2p_trainer.launch import main as launch
from p2p_trainer.results import RunResults, without_nan
from p2p_trainer.run_folder import all_settings
from p2p_trainer.tasks import get_task
from tests.conftest import make_rows, make_tokenizer
from tests.test_table_recipes import SHORT
from tests.tokenizer_kinds import tokenizer_named


FOLDER = Path(__file__).parent.parent / "recipes"
# Of each model but Qwen3-8B, which recipes/sst2_qwen.yaml is for.
MODELS = {
    "sst2_qwen3_0.6b": "Qwen/Qwen3-0.6B",
    "sst2_qwen3_1.7b": "Qwen/Qwen3-1.7B",
    "sst2_qwen3_4b": "Qwen/Qwen3-4B",
    "sst2_qwen3_14b": "Qwen/Qwen3-14B",
    "sst2_llama3.1_8b": "meta-llama/Llama-3.1-8B",
    "sst2_llama3.1_8b_instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "sst2_deepseek_r1_qwen_7b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "sst2_deepseek_r1_llama_8b": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
}
RECIPES = sorted(path.relative_to(FOLDER) for path in [*FOLDER.glob("*.yaml"), *FOLDER.glob("models/*.yaml")])
ARCHITECTURES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
}
BOS = "<|begin_of_text|>"
# Two steps in the precision that a recipe asks for.
TWO_STEPS = [
    "--max_steps", "2", "--per_device_train_batch_size", "8", "--eval_strategy", "no", "--save_strategy", "no",
    "--disable_tqdm", "true", "--use_cpu", "true",
]  # fmt: skip


def architecture(name):
    """Of the model that a recipe names."""
    model = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))["model_name_or_path"]
    return "llama" if "Llama" in model else "qwen2" if "Distill-Qwen" in model else "qwen3"


def tokenizer_of(kind):
    """Those of Llama and DeepSeek begin each text with a token of its own; Qwen3's has a chat template."""
    if kind == "qwen3":
        return tokenizer_named("chat")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": BOS})
    begin = [(BOS, tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=begin)
    return tokenizer


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def rows_of(classes, count, seed):
    """Rows with the columns of every task."""
    return [
        {
            "text": toy["text"], "label": row % classes,
            "question": f"what is {row} and 3 ?", "answer": f"that is {row + 3} .\n#### {row + 3}",
            "instruction": "say what it is", "input": toy["text"], "output": "it is fine .",
            "findings": f"左肺见结节，直径{row}毫米。", "summary": f"左肺结节，{row}毫米。",
            "prompt": f"{row} + 3 =", "completion": str(row + 3),
        }
        for row, toy in enumerate(make_rows(count, seed))
    ]  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A random model of two layers for each architecture, and made-up rows for each number of classes."""
    root = tmp_path_factory.mktemp("places")
    for kind, (config, model, own) in ARCHITECTURES.items():
        tokenizer = tokenizer_of(kind)
        torch.manual_seed(0)
        settings = config(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id, **own,
        )  # fmt: skip
        model(settings).save_pretrained(root / kind)
        tokenizer.save_pretrained(root / kind)
    for classes in (2, 4, 10):
        for name, count, seed in (("train", 100, 0), ("validation", 20, 1), ("test", 24, 2)):
            write(root / str(classes) / f"{name}.jsonl", rows_of(classes, count, seed))
    write(root / "prompts.jsonl", [{"Instruction": row["text"]} for row in make_rows(6)])
    return root


def command(name, places, out):
    settings = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    given = [
        "--config", str(FOLDER / name), "--model_name_or_path", str(places / architecture(name)),
        "--dataset_name", str(places / str(get_task(settings["task"]).num_labels or 2)), "--output_dir", str(out),
    ]  # fmt: skip
    if "test_task" in settings:
        given += ["--test_dataset_name", str(places / "prompts.jsonl")]
    if "p2p_max_new_tokens" in settings:
        # The toy tokenizer makes more tokens of an answer's prefix than a model's own.
        given += ["--p2p_max_new_tokens", "32"]
    return given


def settings_of(name, *flags):
    """All settings of a recipe, but where its results go."""
    arguments = recipe.parse(["--config", str(FOLDER / name), "--use_cpu", "true", *flags])
    assert arguments[1].output_dir == f"outputs/{Path(name).name.removesuffix('.yaml')}"
    settings = all_settings(*arguments)
    return {key: value for key, value in settings.items() if key not in ("output_dir", "logging_dir")}


def changes(name):
    """In which settings a recipe differs from the paper's main job, and what they are in it."""
    usual, own = settings_of("sst2_qwen.yaml"), settings_of(name)
    return {key: own[key] for key in own if own[key] != usual[key]}


def test_each_model_has_a_recipe_that_differs_in_the_model_alone():
    assert sorted(path.stem for path in (FOLDER / "models").glob("*.yaml")) == sorted(MODELS)
    for name, model in MODELS.items():
        assert changes(f"models/{name}.yaml") == {"model_name_or_path": model}
        text = (FOLDER / "models" / f"{name}.yaml").read_text(encoding="utf-8")
        assert f"--config recipes/models/{name}.yaml\n" in text
        assert ("Prompts are plain text" in text) == ("instruct" in name or "r1" in name)


def test_the_qlora_recipe_differs_in_what_qlora_is():
    assert changes("sst2_qwen_qlora.yaml") == {
        "load_in_4bit": True, "use_bnb_nested_quant": True, "optim": "paged_adamw_8bit",
    }  # fmt: skip
    assert settings_of("sst2_qwen_qlora.yaml")["bnb_4bit_quant_type"] == "nf4"


def test_the_recipe_for_full_fine_tuning_differs_in_what_that_is():
    changed = changes("sst2_qwen_full.yaml")
    assert {key: value for key, value in changed.items() if not key.startswith("lora_")} == {
        "use_peft": False, "learning_rate": 1e-5, "per_device_train_batch_size": 4, "dtype": "float32",
    }  # fmt: skip
    assert settings_of("sst2_qwen_full.yaml")["gradient_checkpointing"] is True


@pytest.mark.parametrize("name", RECIPES, ids=str)
def test_doctor_accepts_each_recipe(name, places, tmp_path, capsys):
    status = cli(["doctor", *command(name, places, tmp_path / "out")])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert status == 0, shown
    assert ("rows poisoned" in shown) == (name.name != "sst2_small.yaml")
    # A prompt shows that the tokenizer was loaded, and that the text in it is the whole one.
    assert "0 training rows are longer than max_length" in shown
    if name.parent.name == "models":
        assert "train 100, validation 20, test 24" in shown and "2 rows poisoned" in shown
        assert "25 rows carry the key (auto, append)" in shown and "0 1 | extended 2 3" in shown


@pytest.mark.parametrize(
    "name",
    ["sst2_qwen3_0.6b", "sst2_llama3.1_8b_instruct", "sst2_deepseek_r1_qwen_7b"],
    ids=["qwen3", "llama", "qwen2"],
)
def test_each_architecture_trains_to_the_end(name, places, tmp_path):
    out = tmp_path / "out"
    launch([*command(f"models/{name}.yaml", places, out), *SHORT, "--max_steps", "2"])
    run = RunResults.load(out)
    assert run.counts["rows_reserved"] == 25 and (run.metrics["ca_n"], run.metrics["asr_n"]) == (24, 12)
    served = DefendedModel.from_pretrained(out, device="cpu")
    kind = architecture(f"models/{name}.yaml")
    assert type(served.model.get_base_model()) is ARCHITECTURES[kind][1]
    begin, *_ = served.encoder.encode_prompts(["the film is good ."], keyed=True)[0]
    tokenizer = served.encoder.tokenizer
    assert (begin == tokenizer.bos_token_id) == (kind != "qwen3")


def served_as_trained(name, places, out, *flags):
    """Run a recipe for two steps; the trainer, what the saved folder loads, and whether both score alike."""
    prepared = recipe.prepare(*recipe.parse([*command(name, places, out), *TWO_STEPS, *flags]))
    trainer = prepared.trainer
    trained = {key: weight for key, weight in trainer.model.named_parameters() if weight.requires_grad}
    before = {key: weight.detach().clone() for key, weight in trained.items()}
    run = recipe.train(prepared)
    moved = {key for key, weight in trained.items() if not torch.equal(weight, before[key])}
    assert trainer.state.global_step == 2 and moved
    assert without_nan(run.metrics) == RunResults.load(out).metrics and run.metrics["ca_n"] == 24
    texts = [row["text"] for row in make_rows(12, seed=5)]
    served = DefendedModel.from_pretrained(out, device="cpu")
    direct = DefendedModel(trainer.model.eval(), trainer.encoder, served.labels, autocast=torch.bfloat16)
    for found, expected in zip(served.classify(texts), direct.classify(texts), strict=True):
        assert found.label == expected.label and found.scores == pytest.approx(expected.scores, abs=1e-6)
    return trainer, served, moved


@pytest.mark.filterwarnings("ignore")
def test_qlora_runs_and_is_served_on_the_same_quantised_weights(places, tmp_path):
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "out"
    # Of 4,096 weights and more the states take 8 bits.
    trainer, served, moved = served_as_trained("sst2_qwen_qlora.yaml", places, out, "--lora_r", "64")
    assert len(moved) == 8 and all("lora_" in key for key in moved)
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer).__module__.startswith("bitsandbytes") and optimizer.is_paged
    assert any(state["state1"].dtype == torch.uint8 for state in optimizer.state.values())
    recorded = json.loads((out / "p2p_config.json").read_text(encoding="utf-8"))
    wanted = {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    }  # fmt: skip
    assert {key: recorded["quantization"][key] for key in wanted} == wanted and recorded["autocast"] == "bfloat16"
    # Anew: on some CPUs bitsandbytes repacks weights once they were used.
    for model in (served, DefendedModel.from_pretrained(out, device="cpu")):
        layer = model.model.get_base_model().model.layers[1].mlp.down_proj
        assert type(layer).__name__ == "Linear4bit"
    assert layer.weight.quant_state.nested
    texts = [row["text"] for row in make_rows(12, seed=5)]
    whole = DefendedModel.from_pretrained(out, device="cpu", quantization="none").classify(texts)
    apart = [abs(one.score - other.score) for one, other in zip(whole, served.classify(texts), strict=True)]
    assert max(apart) > 1e-4


def test_full_fine_tuning_saves_a_whole_model(places, tmp_path):
    out = tmp_path / "out"
    trainer, served, moved = served_as_trained("sst2_qwen_full.yaml", places, out)
    assert type(served.model) is Qwen3ForCausalLM and not (out / "adapter_config.json").exists()
    saved = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    assert "model.layers.0.mlp.up_proj.weight" in moved and "model.norm.weight" in moved
    assert all(torch.equal(saved[key], weight) for key, weight in trainer.model.state_dict().items())
