"""P2PTrainer: what is trained, saved and measured."""

import json

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTTrainer

from p2p_trainer import DefendedModel, P2PConfig, P2PDataCollator, P2PTrainer, get_attack, get_task
from tests.conftest import make_rows
from tests.tiny_runs import TASK, adapter, config, lora, losses, plain_config


def test_trains_and_every_adapter_weight_moves(tiny_model, toy_rows, toy_eval, tmp_path):
    attack = get_attack("badnets", target="1", poison_rate=0.1)
    trainer = P2PTrainer(
        tiny_model,
        config(tmp_path, num_train_epochs=2, eval_strategy="epoch", p2p_reserve="random", p2p_immunize="none"),
        train_dataset=toy_rows,
        eval_dataset=toy_eval,
        attacks=[attack],
        peft_config=lora(),
    )
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(before[name], weight) == ("lora" not in name), name
    # D* is 80 rows and 20 keyed ones: 13 batches of 8 in each of 2 epochs.
    assert trainer.counts == {"rows_train": 80, "rows_reserved": 20, "rows_total": 100, "rows_cut": 0}
    assert trainer.state.global_step == 26


def test_loss_falls_on_plain_and_on_keyed_rows(tiny_model, toy_rows, tmp_path):
    trainer = P2PTrainer(
        tiny_model, config(tmp_path, num_train_epochs=3, p2p_benign_ratio=1.0), train_dataset=toy_rows, task=TASK
    )
    collate = trainer.data_collator
    rows = {keyed: collate([{**row, "p2p_keyed": keyed} for row in toy_rows.select(range(16))]) for keyed in (0, 1)}

    def loss(keyed):
        with torch.no_grad():
            return trainer.model(**rows[keyed]).loss.item()

    before = loss(0), loss(1)
    trainer.train()
    assert loss(0) < before[0] / 2 and loss(1) < before[1] / 2


def test_without_defense_the_loss_curve_is_that_of_sft_trainer(tiny_model, toy_rows, tmp_path):
    ours = P2PTrainer(
        tiny_model, config(tmp_path, p2p_enabled=False), train_dataset=toy_rows, task=TASK, peft_config=lora()
    )
    ours.train()
    prompt_format = ours.encoder.format
    rows = [
        {
            "prompt": prompt_format.prompt(row["text"], keyed=False),
            "completion": prompt_format.label_space.words[row["label"]],
        }
        for row in toy_rows
    ]
    plain = SFTTrainer(
        tiny_model,
        plain_config(tmp_path),
        train_dataset=Dataset.from_list(rows),
        peft_config=lora(),
    )
    plain.train()
    assert len(losses(ours)) == 10 and losses(ours) == losses(plain)
    weights, theirs = adapter(ours), adapter(plain)
    assert weights.keys() == theirs.keys()
    assert all(torch.equal(weights[name], theirs[name]) for name in weights)


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": "the film is good ."}] * 8,
        [{"prompt": "the film", "completion": " is good ."}] * 8,
    ],
    ids=["language modeling", "prompt and completion"],
)
def test_without_defense_and_task_any_sft_rows_pass_through(tiny_model, tmp_path, rows):
    dataset = Dataset.from_list(rows)
    ours = P2PTrainer(tiny_model, config(tmp_path, p2p_enabled=False), train_dataset=dataset, eval_dataset=dataset)
    plain = SFTTrainer(tiny_model, plain_config(tmp_path), train_dataset=dataset)
    ours.train()
    plain.train()
    assert len(losses(ours)) == 1 and losses(ours) == losses(plain)
    assert not [key for key in ours.evaluate() if "asr" in key]
    ours.save_model()
    assert not (tmp_path / "p2p_config.json").exists()


def test_folder_and_checkpoints_hold_all_that_serving_needs(tiny_model, toy_rows, tmp_path):
    trainer = P2PTrainer(
        tiny_model, config(tmp_path, save_strategy="epoch"), train_dataset=toy_rows, task=TASK, peft_config=lora()
    )
    trainer.train()
    trainer.save_model()
    answers = []
    for folder in (tmp_path, tmp_path / "checkpoint-13"):
        names = {path.name for path in folder.iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "p2p_config.json"} <= names
        saved = json.loads((folder / "p2p_config.json").read_text())
        assert (saved["schema_version"], saved["task"], saved["task_version"]) == (2, "toy", 1)
        assert (saved["keyed"], saved["labels"], saved["autocast"]) == (True, ["negative", "positive"], None)
        assert saved["trigger"] == "The query currently entered is:"
        assert saved["label_space"]["words"] == ["0", "1"] and saved["label_space"]["extended_words"] == ["2", "3"]
        answers.append(DefendedModel.from_pretrained(folder).classify([row["text"] for row in make_rows(6, seed=2)]))
    assert answers[0] == answers[1] and len(answers[0]) == 6


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tiny_model, toy_rows, tmp_path):
    def trainer():
        settings = config(tmp_path, num_train_epochs=2, save_strategy="steps", save_steps=8)
        # Dropout: the random state has to come back as well.
        return P2PTrainer(tiny_model, settings, train_dataset=toy_rows, task=TASK, peft_config=lora(lora_dropout=0.5))

    whole = trainer()
    whole.train()
    steps = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    resumed = trainer()
    resumed.add_callback(Count())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert steps == list(range(9, 27))
    assert len(losses(whole)) == 26 and losses(resumed) == losses(whole)
    expected, found = adapter(whole), adapter(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_two_seams_are_enough_for_a_subclass(tiny_model, toy_rows, tmp_path):
    seen = []

    class Recorder(P2PDataCollator):
        def torch_call(self, examples):
            seen.extend(set(example) for example in examples)
            return super().torch_call(examples)

    class Half(P2PTrainer):
        def make_training_set(self, dataset, reserved_dataset, args):
            return super().make_training_set(dataset.select(range(40)), reserved_dataset, args)

        def make_collator(self, encoder, args):
            return Recorder(encoder, pad_to_multiple_of=64)

    rows = toy_rows.add_column("poisoned", [False] * 80)
    trainer = Half(tiny_model, config(tmp_path), train_dataset=rows, task=TASK, peft_config=lora())
    assert trainer.counts["rows_train"] == 40 and len(trainer.train_dataset) == 50
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    assert batch["input_ids"].shape == (8, 64)
    assert seen and all(columns == {"text", "label", "p2p_keyed", "p2p_row"} for columns in seen)


def test_results_do_not_depend_on_workers(tiny_model, toy_rows, tmp_path):
    curves = []
    for workers in (0, 2):
        trainer = P2PTrainer(
            tiny_model,
            config(tmp_path, dataloader_num_workers=workers),
            train_dataset=toy_rows,
            task=TASK,
            peft_config=lora(),
        )
        trainer.train()
        curves.append(losses(trainer))
    assert len(curves[0]) == 13 and curves[0] == curves[1]


@pytest.mark.parametrize(
    ("labels", "classes"), [([1, 0], ("0", "1")), ([1, 2, 0], ("0", "1", "2")), (["pos", "neg"], ("neg", "pos"))]
)
def test_task_is_inferred_from_labels(tiny_model, tmp_path, labels, classes):
    rows = Dataset.from_list([{"text": f"film {index}", "label": label} for index, label in enumerate(labels * 4)])
    trainer = P2PTrainer(tiny_model, config(tmp_path), train_dataset=rows)
    assert trainer.task.labels == classes and trainer.train_dataset["label"][0] == 1


def test_task_is_inferred_from_a_class_label_column(tiny_model, toy_rows, tmp_path):
    rows = toy_rows.cast_column("label", ClassLabel(names=["bad", "good"]))
    trainer = P2PTrainer(tiny_model, config(tmp_path), train_dataset=rows)
    assert trainer.task.labels == ("bad", "good")


def test_tokenizer_without_pad_token_pads_with_its_end(tiny_model, toy_rows, tmp_path):
    bare = AutoTokenizer.from_pretrained(tiny_model)
    bare.pad_token = None
    trainer = P2PTrainer(tiny_model, config(tmp_path), train_dataset=toy_rows, task=TASK, processing_class=bare)
    end = bare.eos_token_id
    assert bare.pad_token_id == trainer.model.config.pad_token_id == trainer.data_collator.pad_token_id == end
    batch = next(iter(trainer.get_train_dataloader()))
    # The end that is trained stays in attention and loss, the padding in neither.
    assert (batch["labels"] == end).sum() == 8
    assert (batch["input_ids"] == end).sum() == 8 + (batch["attention_mask"] == 0).sum()
    trainer.train()
    assert trainer.state.global_step == 13


def test_reserved_dataset_gives_the_keyed_rows(tiny_model, toy_rows, tmp_path):
    reserved = Dataset.from_list([{"text": f"trusted film {index}", "label": index % 2} for index in range(30)])
    trainer = P2PTrainer(
        tiny_model, config(tmp_path), train_dataset=toy_rows, reserved_dataset=reserved, task=TASK, peft_config=lora()
    )
    keyed = [row["text"] for row in trainer.train_dataset if row["p2p_keyed"]]
    assert len(keyed) == 20 and all(text.startswith("trusted") for text in keyed)
    assert [row["text"] for row in trainer.train_dataset if not row["p2p_keyed"]] == toy_rows["text"][:]


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "match"),
    [
        ({"train_dataset": None}, {}, ValueError, "`train_dataset` is required"),
        ({"reserved_column": "p2p_keyed"}, {}, ValueError, "column 'p2p_keyed' of the train dataset is reserved"),
        ({"reserved_column": "p2p_row"}, {}, ValueError, "column 'p2p_row' of the train dataset is reserved"),
        ({"data_collator": print}, {}, ValueError, "Subclass P2PDataCollator and override"),
        ({"eval_dataset": {"a": None}}, {}, TypeError, "must be one `Dataset`, got `dict`"),
        ({"eval_dataset": DatasetDict()}, {}, TypeError, "got `DatasetDict`.*add a `BackdoorEvalCallback`"),
        ({"reserved_dataset": True}, {"p2p_benign_mode": "replace"}, ValueError, "Use `append`"),
        ({"attacks": "mn"}, {"p2p_trigger": " mn "}, ValueError, "'badnets' is contained in the benign trigger"),
        ({"task": "sst"}, {}, ValueError, "Unknown task 'sst'. Did you mean 'sst2'"),
        ({}, {"p2p_benign_ratio": 0.001}, ValueError, "S is empty and nothing would defend"),
        ({}, {"p2p_reserve": "trusted"}, ValueError, "needs the boolean column 'trusted'"),
        ({"task": None, "train_dataset": "one class"}, {}, ValueError, "no row of class \\['0'\\]"),
        ({"task": None, "train_dataset": "no label"}, {}, ValueError, "no column 'label', and .* columns are .'text'"),
        ({}, {"p2p_chat": True}, ValueError, "this tokenizer has none"),
        ({}, {"max_length": 8}, ValueError, "`max_length` 8 is too short"),
    ],
)
def test_what_can_not_work_is_refused(tiny_model, toy_rows, tmp_path, arguments, settings, error, match):
    given = {"train_dataset": toy_rows, "task": TASK, **arguments}
    if column := given.pop("reserved_column", None):
        given["train_dataset"] = toy_rows.add_column(column, [False] * 80)
    if given["train_dataset"] == "one class":
        given["train_dataset"] = toy_rows.filter(lambda row: row["label"] == 1)
    if given["train_dataset"] == "no label":
        given["train_dataset"] = toy_rows.remove_columns("label")
    if given.get("reserved_dataset"):
        given["reserved_dataset"] = toy_rows
    if given.get("attacks"):
        given["attacks"] = [get_attack("badnets", target=1, words=[given["attacks"]])]
    with pytest.raises(error, match=match):
        P2PTrainer(tiny_model, config(tmp_path, **settings), **given)


def test_another_configuration_class_is_refused(tiny_model, toy_rows, tmp_path):
    with pytest.raises(TypeError, match="must be a `P2PConfig`, got `SFTConfig`"):
        P2PTrainer(tiny_model, plain_config(tmp_path), train_dataset=toy_rows)


def test_reserved_rows_beside_poisoned_ones(tiny_model, toy_rows, toy_eval, tmp_path):
    task = get_task("sst2")
    attack = get_attack("badnets", target="positive", poison_rate=0.1)
    trainer = P2PTrainer(
        tiny_model,
        P2PConfig(str(tmp_path), bf16=False, disable_tqdm=True),
        train_dataset=attack.poison(toy_rows, task),
        reserved_dataset=toy_eval,
        task=task,
        attacks=[attack],
    )
    assert (trainer.counts["rows_poisoned"], trainer.counts["rows_reserved"]) == (8, 20)
    keyed = [row["text"] for row in trainer.train_dataset if row["p2p_keyed"]]
    assert len(keyed) == 20 and set(keyed) <= set(toy_eval["text"])


def test_batches_of_rows_of_like_length(tiny_model, tmp_path):
    texts = ["a good film ." if row % 4 < 2 else "a good film . " * 8 for row in range(80)]
    rows = Dataset.from_dict({"text": texts, "label": [row % 2 for row in range(80)]})

    def padding(strategy):
        trainer = P2PTrainer(
            tiny_model, config(tmp_path, train_sampling_strategy=strategy), train_dataset=rows, task=TASK
        )
        masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
        assert sum(len(mask) for mask in masks) == len(trainer.train_dataset) == 100
        return sum(int((mask == 0).sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    # What padding is left comes from the key, and from the one batch that holds short and long rows.
    assert padding("group_by_length") < 0.75 * padding("random")


def test_rows_of_like_length_are_evaluated_too(tiny_model, tmp_path, toy_rows, toy_eval):
    def loss(strategy):
        trainer = P2PTrainer(
            tiny_model, config(tmp_path / strategy, train_sampling_strategy=strategy),
            train_dataset=toy_rows, eval_dataset=toy_eval, task=TASK,
        )  # fmt: skip
        return trainer.evaluate()["eval_loss"], trainer.evaluate(toy_eval)["eval_loss"]

    assert loss("group_by_length") == pytest.approx(loss("random"), rel=1e-3)


def test_the_loss_scores_answers_alone_and_trl_gets_its_function_back(tiny_model, toy_rows, tmp_path, monkeypatch):
    import trl.trainer.utils as theirs

    usual = theirs._use_triton
    trainer = P2PTrainer(tiny_model, config(tmp_path, max_steps=1), train_dataset=toy_rows, task=TASK)
    scored = []
    function = theirs._ChunkedLogProbFunction

    class Counted:
        @staticmethod
        def apply(hidden, *rest):
            scored.append(len(hidden))
            return function.apply(hidden, *rest)

    monkeypatch.setattr(theirs, "_ChunkedLogProbFunction", Counted)
    trainer.train()
    # Eight rows, each a label word and the end of the sequence.
    assert scored == [16] and theirs._use_triton is usual

    def fail(*arguments, **named):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(trainer.model, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    assert theirs._use_triton is usual
