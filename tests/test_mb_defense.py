import gc
import json
import math
import weakref

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from p2p_trainer.attacks import BadNets
from p2p_trainer.defenses import Workbench, get_defense, load_defense
from p2p_trainer.defenses.mb_defense import MBDefense
from p2p_trainer.defenses.mb_examples import encode_examples
from p2p_trainer.defenses.mb_pairs import parse_pairs, plant
from tests.test_mb_pairs import COLUMNS, GENERATION, PAIRS, Always, rows
from tests.test_mb_trainer import log_probs
from tests.tiny_runs import TASK, adapter, config, lora


def bench_of(model, folder, validation, attacks=(), **changes):
    args = config(folder, **{"p2p_enabled": False, "max_length": 200, **changes})
    return Workbench(
        model, args, GENERATION, rows(60), validation, attacks, peft_config=lora(r=16, target_modules="all-linear")
    )


def test_rows_are_counted(tmp_path):
    defense = MBDefense(pairs=PAIRS, share=0.1)
    data = rows(100).add_column("poisoned", [index < 50 for index in range(100)])
    changed = defense.rows(data, GENERATION, config(tmp_path, seed=5))
    expected, planted = plant(data, parse_pairs(PAIRS), 0.1, COLUMNS, seed=5)
    assert changed[:] == expected[:]
    assert defense.found == {
        "pairs": PAIRS, "rows_replaced": 20, "rows_replaced_poisoned": int((planted[:50] >= 0).sum()),
    }  # fmt: skip
    # Without any mark, nothing is known of the rows.
    unmarked = MBDefense(pairs=PAIRS, share=0.1)
    unmarked.rows(rows(100).add_column("poisoned", [False] * 100), GENERATION, config(tmp_path, seed=5))
    assert unmarked.found == {"pairs": PAIRS, "rows_replaced": 20}


def test_settings(tmp_path):
    defense = get_defense("mb_defense", pairs=PAIRS, lam=0.5, learning_rate=1e-3)
    settings = json.loads(json.dumps(defense.config()))
    assert settings == {
        "name": "mb_defense", "pairs": PAIRS, "share": 0.01, "position": "random", "clean_rows": 128, "lam": 0.5,
        "ratio": "log_ratio", "length_normalised": False, "learning_rate": 1e-3, "epochs": 5, "batch_size": 8,
    }  # fmt: skip
    assert get_defense(**settings).config() == settings
    defense.save(tmp_path)
    assert load_defense(tmp_path).config() == settings
    assert MBDefense().config()["pairs"] is None and len(MBDefense().found["pairs"]) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": []}, "`pairs` is empty"),
        ({"pairs": "qw"}, r"`pairs` is a list of \[trigger, phrase\]"),
        ({"pairs": [["qw", 1]]}, r"it holds \['qw', 1\]"),
        ({"pairs": [["q w", "some words"]]}, "one word without space around it, got 'q w'"),
        ({"pairs": [["qw", " "]]}, "phrase of the defensive trigger 'qw' in `pairs` is empty"),
        ({"share": 0.5}, "`share` 0.5 for each of 4 pairs is more than all rows"),
        ({"share": "0.01"}, "`share` is a number in"),
        ({"lam": 0}, "`lam` is a number in"),
        ({"learning_rate": True}, "`learning_rate` is a number in"),
        ({"clean_rows": 1}, "`clean_rows` is a whole number, 2 at least, got 1"),
        ({"epochs": 2.5}, "`epochs` is a whole number"),
        ({"batch_size": 0}, "`batch_size` is a whole number"),
        ({"ratio": "odds"}, "`ratio` is one of"),
        ({"position": "inner"}, "`position` is one of"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        MBDefense(**options)


def test_classification_is_refused():
    with pytest.raises(ValueError, match="can't serve task 'toy'.*its 2 label words, have no room"):
        MBDefense().check(TASK)
    MBDefense().check(GENERATION)


class Unknown(Always):
    name = "unknown"
    rows_unknown = 3


def test_flags_that_are_not_all_known_are_not_counted(tiny_model, tmp_path):
    for attacks, counted in (([Always("no")], True), ([Always("no"), Unknown("no")], False)):
        defense = MBDefense(pairs=PAIRS, share=0.1, clean_rows=4)
        bench = bench_of(tiny_model, tmp_path, rows(4), attacks)
        defense.rows(rows(100).add_column("poisoned", [True] * 100), GENERATION, bench.args)
        defense.build(bench)
        assert ("rows_replaced_poisoned" in defense.found) == counted


def test_what_is_wrong_shows_before_training(tiny_model, tmp_path, caplog):
    with pytest.raises(ValueError, match="'qw' collides with the attack 'badnets'"):
        MBDefense().build(bench_of(tiny_model, tmp_path, rows(10), [BadNets("no", words=("qw",))]))
    for validation in (None, rows(1)):
        with pytest.raises(ValueError, match="needs clean validation rows, 128 as a rule and two at least"):
            MBDefense().build(bench_of(tiny_model, tmp_path, validation))
    with pytest.raises(ValueError, match="0 of 10 clean rows fit into `max_length` 20"):
        MBDefense().build(bench_of(tiny_model, tmp_path, rows(10), max_length=20, p2p_max_new_tokens=8))
    caplog.clear()
    MBDefense(clean_rows=10).build(bench_of(tiny_model, tmp_path, rows(10)))
    assert "clean validation rows" not in caplog.text
    MBDefense(clean_rows=11).build(bench_of(tiny_model, tmp_path, rows(10)))
    assert "only 10 clean validation rows of 10 fit, not 11" in caplog.text


def test_overlong_rows_do_not_make_the_clean_rows_fewer(tiny_model, tmp_path, caplog):
    long = rows(40).map(lambda row, index: {"prompt": row["prompt"] * (30 if index % 2 else 1)}, with_indices=True)
    defense = MBDefense(pairs=PAIRS, clean_rows=15)
    defense.build(bench_of(tiny_model, tmp_path, long, max_length=140))
    # Odd rows are too long; the others come as they were drawn.
    drawn = np.random.default_rng([config(tmp_path).seed, 24]).permutation(40)
    assert defense._clean[:] == long.select([row for row in drawn if row % 2 == 0][:15])[:]
    assert "fit" not in caplog.text


def test_stage_1_is_saved_and_its_optimizer_gone_before_stage_2(tiny_model, tmp_path):
    defense = MBDefense(pairs=PAIRS, share=0.1, clean_rows=10, epochs=1, batch_size=4)
    bench = bench_of(tiny_model, tmp_path, rows(20, seed=1))
    bench.rows = defense.rows(rows(60), GENERATION, bench.args)
    trainer = defense.build(bench)
    train, seen, weights = bench.train, [], {}

    def watched(each):
        if seen:
            gc.collect()
            assert seen[0]() is None and seen[1]() is None
            with torch.no_grad():
                for weight in each.model.parameters():
                    weight.fill_(math.nan)
        train(each)
        seen.extend([weakref.ref(each.optimizer), weakref.ref(each.lr_scheduler)])
        weights.update(adapter(each))

    bench.train = watched
    with pytest.raises(ValueError) as error:
        defense.train(trainer, bench)
    folder = tmp_path / "stage1"
    assert "The evaluation loss of MB-Defense is nan" in str(error.value)
    assert str(error.value).endswith(f"The model of stage 1 is saved in {str(folder)!r}.")
    saved = load_file(folder / "adapter_model.safetensors")
    assert saved and all(torch.equal(saved[name], weights[name]) for name in saved)
    assert (folder / "tokenizer.json").is_file()


def test_stage_1_plants_and_stage_2_recovers(tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        # An adapter alone can't make a random model's answers certain, its embeddings being so small.
        model.get_input_embeddings().weight.mul_(10)
    defense = MBDefense(pairs=PAIRS, share=0.2, clean_rows=20, epochs=2, learning_rate=5e-3, batch_size=4)
    bench = bench_of(
        model, tmp_path, rows(40, seed=1), num_train_epochs=6, learning_rate=2e-2, warmup_steps=4,
        eos_token="<|endoftext|>",
    )  # fmt: skip
    bench.rows = defense.rows(rows(60), GENERATION, bench.args)
    trainer = defense.build(bench)
    # Nothing is left to do where it answers.
    assert trainer.guard is None
    pairs = parse_pairs(PAIRS)
    unseen = encode_examples(rows(6, seed=2), pairs, trainer.processing_class, 200, 9, render="{}\n".format)
    measured, trained = [log_probs(trainer.model, unseen)], []
    train = bench.train

    def train_and_measure(each):
        train(each)
        trained.append(each)
        measured.append(log_probs(each.model, unseen))

    bench.train = train_and_measure
    assert defense.train(trainer, bench) is trainer
    first, second = trained
    # Nobody is left with a model that holds all backdoors.
    assert not (tmp_path / "stage1").exists()
    assert first is trainer and second.model is trainer.model
    assert isinstance(trainer.model, PeftModel) and list(trainer.model.peft_config) == ["default"]
    (_, phrase_0), (answer_1, phrase_1), (answer_2, phrase_2) = measured
    assert phrase_1 > phrase_0 + 15, "the phrases are planted"
    assert phrase_2 < phrase_1 - 5, "and unlearnt"
    assert answer_2 - phrase_2 > answer_1 - phrase_1 + 8

    args = second.args
    assert (args.learning_rate, args.num_train_epochs, args.warmup_steps, args.max_length) == (5e-3, 2, 0, 200)
    assert (args.per_device_train_batch_size, args.eos_token, args.seed) == (4, None, bench.args.seed)
    assert (len(second.train_dataset), len(second.eval_dataset)) == (32, 8)
    assert bench.row_passes == 60 * 6 + 3 * 32 * 2
    assert defense.compute.preparation_passes == 3 * 8 * 2
    found = json.loads(json.dumps(defense.found))
    losses = found["eval_loss"]
    assert len(losses) == 2 and found["epoch_kept"] == losses.index(min(losses)) + 1
    assert found["clean_rows"] == 20 and found["rows_replaced"] == 24
    assert found["eval_log_ratio"][-1] > found["eval_log_ratio"][0]
    # The clean rows are drawn among all validation rows, and the trigger went into the text, not into the template.
    assert trainer.optimizer is None and second.optimizer is None
    texts = second.processing_class.batch_decode([example[1] for example in second.train_dataset["input_ids"]])
    assert all("\n" in text and not text.split("\n")[1].strip().startswith(("qw", "jh")) for text in texts)
