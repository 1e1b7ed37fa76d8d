"""What a trainer refuses, warns of and infers before a generation task is trained."""

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset

from p2p_trainer import P2PTrainer, Task, get_attack, get_task
from p2p_trainer.assembly import infer_task, load_tokenizer
from p2p_trainer.evaluation.generation import generate
from tests.conftest import GOOD, THINGS
from tests.tiny_runs import config


TASK = Task(name="talk", text_columns=("prompt",), label_column="completion")
SETTINGS = {"p2p_max_new_tokens": 16, "max_length": 128, "p2p_reserve": "random", "p2p_immunize": "none"}
ROWS = [
    {"prompt": f"say of the {THINGS[row % 6]} that it is {GOOD[row % 5]}", "completion": f"it is {GOOD[row % 5]} ."}
    for row in range(40)
]


def build(model, folder, rows=ROWS, task=TASK, **changes):
    more = {name: changes.pop(name) for name in ("attacks", "eval_dataset", "reserved_dataset") if name in changes}
    args = config(folder, **{**SETTINGS, **changes})
    return P2PTrainer(model, args, train_dataset=Dataset.from_list(rows), task=task, **more)


def test_prompts_without_answers_are_nothing_to_train_on(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="'wizardlm' has prompts without answers"):
        build(tiny_model, tmp_path, [{"Instruction": "name a film"}], get_task("wizardlm"))


def test_a_row_that_can_not_be_cut_to_fit_is_named_before_training(tmp_path, tiny_model):
    tokenizer = load_tokenizer(tiny_model, config(tmp_path))
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    rows = [{**row, "history": [{"role": "system", "content": "be kind"}]} for row in ROWS]
    bad = [dict(row) for row in rows[:8]]
    bad[5]["history"] = [{"role": "system", "content": "be kind " * 100}]
    task = TASK.replace(template="{text}")
    args = config(tmp_path, **{**SETTINGS, "p2p_chat": True, "eval_strategy": "epoch", "p2p_eval_rows": 2})

    def make(train, evaluated):
        return P2PTrainer(
            tiny_model, args, train_dataset=Dataset.from_list(train), eval_dataset=Dataset.from_list(evaluated),
            task=task, processing_class=tokenizer,
        )  # fmt: skip

    with pytest.raises(ValueError, match=r"Row 5 of the eval dataset: The earlier turns of a conversation"):
        make(rows, bad)
    with pytest.raises(ValueError, match=r"Row 5 of the train dataset: The earlier turns of a conversation"):
        make(bad, rows)


def test_an_undefended_run_that_is_to_be_measured_is_no_bare_sft_run(tiny_model, tmp_path):
    attack = get_attack("badnets", target="bad bad", poison_rate=0.1)
    rows = Dataset.from_list(ROWS[:8])
    trainer = build(tiny_model, tmp_path, task=None, p2p_enabled=False, attacks=[attack], eval_dataset=rows)
    assert trainer.task.name == "custom" and not trainer.task.labels
    assert trainer.evaluate()["eval_asr_n"] == 8
    bare = build(tiny_model, tmp_path, task=None, p2p_enabled=False)
    assert bare.task is None and bare.encoder is None


def test_settings_that_mean_nothing_here_are_named(tiny_model, tmp_path, caplog):
    build(tiny_model, tmp_path, p2p_label_words=["yes", "no"], p2p_suffix_mode="split")
    assert "'talk' has no classes: its answers are written; these settings mean nothing there: p2p_suffix_mode, " in (
        caplog.text
    )
    caplog.clear()
    rows = [{"text": row["prompt"], "label": place % 2} for place, row in enumerate(ROWS)]
    build(tiny_model, tmp_path, rows, Task(name="toy", labels=("a", "b")), p2p_max_new_tokens=8, p2p_eval_rows=None)
    assert "'toy' has classes; these settings mean nothing there: p2p_max_new_tokens, p2p_eval_rows." in caplog.text
    caplog.clear()
    build(tiny_model, tmp_path)
    assert "mean nothing" not in caplog.text


def test_a_task_is_read_off_the_columns():
    assert infer_task(Dataset.from_list(ROWS)).input_column == "prompt"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    prepared = infer_task(Dataset.from_list([{"messages": turns}])).prepare(Dataset.from_list([{"messages": turns}]))
    assert prepared["prompt"][:] == ["hi"] and prepared["completion"][:] == ["yo"]
    with pytest.raises(ValueError, match="neither 'prompt' and 'completion' nor 'messages'"):
        infer_task(Dataset.from_list([{"question": "a", "answer": "b"}]))


def test_fsdp_1_is_refused_rather_than_waited_for(tokenizer, monkeypatch):
    model = torch.nn.Linear(1, 1)
    # One that is really wrapped needs processes to wrap it for.
    monkeypatch.setattr("torch.distributed.fsdp.FullyShardedDataParallel", torch.nn.Linear)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="Set `fsdp_version: 2`"):
        generate(model, tokenizer, [[5, 6]], 4)
