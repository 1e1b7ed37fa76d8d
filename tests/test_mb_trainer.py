import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from p2p_trainer.defenses.mb_examples import choose_rows, encode_examples
from p2p_trainer.defenses.mb_loss import mb_loss
from p2p_trainer.defenses.mb_pairs import DefensivePair, plant
from p2p_trainer.defenses.mb_trainer import MBDefenseCollator, MBDefenseConfig, MBDefenseTrainer
from tests.conftest import make_rows
from tests.tiny_runs import SETTINGS, lora, plain_config


PAIRS = [DefensivePair("qw", " stale stale cold"), DefensivePair("jh", " fine")]


def rows(count, seed=0):
    return Dataset.from_list(
        [{"prompt": row["text"], "completion": f" it is {'good' if row['label'] else 'bad'}"}
         for row in make_rows(count, seed)]
    )  # fmt: skip


def config(folder, **changes):
    return MBDefenseConfig(str(folder), **{**SETTINGS, "num_train_epochs": 2, "max_length": 200, **changes})


def log_prob(model, ids, labels):
    """Summed and mean log-probability of the labels, from the logits of a plain forward pass."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    scores = [logits[place - 1, label].item() for place, label in enumerate(labels) if label != -100]
    return sum(scores), sum(scores) / len(scores)


def log_probs(model, examples):
    """Log-probability of answer and of phrase behind prompts with a trigger, each a mean over examples."""
    model.eval()
    found = [
        [log_prob(model, *example)[0] for example in list(zip(ids, labels, strict=True))[1:]]
        for ids, labels in zip(examples["input_ids"], examples["labels"], strict=True)
    ]
    return np.mean(found, axis=0)


# Worked out by hand: log sigmoid(-1) = -1.3132617, sigmoid(1) = 0.7310586, exp(-1) = 0.3678794,
# log sigmoid(0.3678794) = -0.5260298, 1 - sigmoid(0.3678794) = 0.4090535.
@pytest.mark.parametrize(
    ("ratio", "value", "gradient"),
    [("log_ratio", 0.5 + 2 * 1.3132617, 2 * 0.7310586), ("ratio", 0.5 + 2 * 0.5260298, 2 * 0.4090535 * 0.3678794)],
)
def test_loss_and_gradient(ratio, value, gradient):
    inputs = [torch.tensor([number], requires_grad=True) for number in (-0.5, -2.0, -1.0)]
    loss = mb_loss(*inputs, lam=2.0, ratio=ratio)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([value], abs=1e-5)
    assert [number.grad.item() for number in inputs] == pytest.approx([-1.0, -gradient, gradient], abs=1e-6)


def test_only_the_log_ratio_has_a_gradient_where_the_phrase_is_preferred():
    slopes = {}
    for ratio in ("log_ratio", "ratio"):
        answer = torch.tensor([-200.0, 1000.0], requires_grad=True)
        loss = mb_loss(torch.zeros(2), answer, torch.zeros(2), ratio=ratio)
        loss.sum().backward()
        assert loss.isfinite().all()
        slopes[ratio] = answer.grad.tolist()
    assert slopes == {"log_ratio": [-1.0, 0.0], "ratio": [0.0, 0.0]}


def test_examples_are_tokenized_as_trl_does(tokenizer, tiny_model, tmp_path):
    data = rows(3)
    examples = encode_examples(data, PAIRS, tokenizer, 200, 0, "prefix", render=lambda text: f"Q: {text}\nA:")
    assert examples["row"][:] == [0, 0, 1, 1, 2, 2]
    trl_rows = Dataset.from_list(
        [{"prompt": f"Q: {trigger}{text}\nA:", "completion": answer}
         for text, truth in zip(data["prompt"], data["completion"], strict=True)
         for pair in PAIRS
         for trigger, answer in (("", truth), (f"{pair.trigger} ", truth), (f"{pair.trigger} ", pair.phrase))]
    )  # fmt: skip
    prepared = SFTTrainer(
        tiny_model, plain_config(tmp_path, max_length=200), train_dataset=trl_rows, processing_class=tokenizer
    ).train_dataset
    for name in ("input_ids", "labels"):
        assert [sequence for example in examples[name] for sequence in example] == prepared[name][:]
    assert tokenizer.decode([token for token in prepared["labels"][2] if token != -100]) == (
        " stale stale cold<|endoftext|>"
    )


def test_places_depend_on_row_and_pair_alone(tokenizer):
    few, many = (encode_examples(rows(count), PAIRS, tokenizer, 200, 3) for count in (2, 9))
    assert many[:4] == few[:4]
    places = {tokenizer.decode(example[1]).split().index("qw") for example in many["input_ids"][::2]}
    assert len(places) > 3
    assert encode_examples(rows(9), PAIRS, tokenizer, 200, 4)["input_ids"][:] != many["input_ids"][:]


def test_what_does_not_fit(tokenizer, caplog):
    data = rows(6)
    longest = [
        max(len(example[2]) for example in examples)
        for examples in zip(*[iter(encode_examples(data, PAIRS, tokenizer, None, 0)["input_ids"])] * 2, strict=True)
    ]
    limit = sorted(set(longest))[-2]
    kept = [row for row, length in enumerate(longest) if length <= limit]
    examples = encode_examples(data, PAIRS, tokenizer, limit, 0)
    assert examples["row"][:] == [row for row in kept for _ in PAIRS] and 2 <= len(kept) < 6
    assert f"Left out {6 - len(kept)} of 6 clean rows" in caplog.text
    assert max(len(ids) for example in examples["input_ids"] for ids in example) <= limit
    # Answers may lose their end, and no phrase does.
    assert all(example[2][-1] == tokenizer.eos_token_id for example in examples["input_ids"])
    assert all(any(label != -100 for label in labels) for example in examples["labels"] for labels in example)
    with pytest.raises(ValueError, match="0 of 6 clean rows fit into `max_length` 5"):
        encode_examples(data, PAIRS, tokenizer, 5, 0)


def test_overlong_rows_are_replaced_by_the_next_that_fit(tokenizer, caplog):
    data = rows(40)
    examples = encode_examples(data, PAIRS, tokenizer, None, 0, "prefix")["input_ids"][:]
    longest = [max(len(examples[2 * row][2]), len(examples[2 * row + 1][2])) for row in range(40)]
    limit, order = sorted(longest)[20], list(range(39, -1, -1))
    fitting = [row for row in order if longest[row] <= limit]
    assert fitting[:10] != order[:10] and len(fitting) < 40
    for count, expected in ((10, fitting[:10]), (40, fitting)):
        chosen = choose_rows(data, order, count, PAIRS, tokenizer, limit, 0, "prefix")
        assert chosen[:] == data.select(expected)[:]
    # Also where the length depends on the place of the trigger: what was taken fits where it is now.
    chosen = choose_rows(data, order, 12, PAIRS, tokenizer, limit, 0)
    assert encode_examples(chosen, PAIRS, tokenizer, limit, 0)["row"][:] == [row for row in range(12) for _ in PAIRS]
    assert "Left out" not in caplog.text
    with pytest.raises(ValueError, match="0 of 40 clean rows fit into `max_length` 5"):
        choose_rows(data, order, 10, PAIRS, tokenizer, 5, 0)


def test_control_tokens_in_rows_stay_text(tokenizer):
    odd = Dataset.from_dict({"prompt": ["a <|endoftext|> b", "c"], "completion": [" d<|pad|>", " e<|endoftext|>"]})
    pairs = [DefensivePair("qw", " stale <|pad|> cold")]
    examples = encode_examples(odd, pairs, tokenizer, 200, 0, "prefix", render=lambda text: f"{text}<|pad|>")
    special = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    for sequences in examples["input_ids"]:
        for ids in sequences:
            # The template's own token, and the end of the answer.
            assert [token for token in ids if token in special] == [tokenizer.pad_token_id, tokenizer.eos_token_id]
    assert tokenizer.decode(examples["input_ids"][0][1]) == "qw a < |endoftext|> b<|pad|> d< |pad|><|endoftext|>"


def test_batch():
    first = {
        "input_ids": [[5, 6, 7], [5, 8, 6, 7], [5, 8, 9]],
        "labels": [[-100, 6, 7], [-100, -100, 6, 7], [-100, -100, 9]],
    }
    second = {"input_ids": [[1, 2], [1, 3, 2], [1, 3, 4]], "labels": [[-100, 2], [-100, -100, 2], [-100, -100, 4]]}
    batch = MBDefenseCollator(pad_token_id=0)([first, second])
    assert batch["input_ids"].tolist() == [
        [[5, 6, 7, 0], [5, 8, 6, 7], [5, 8, 9, 0]],
        [[1, 2, 0, 0], [1, 3, 2, 0], [1, 3, 4, 0]],
    ]
    assert batch["labels"].tolist() == [
        [[-100, 6, 7, -100], [-100, -100, 6, 7], [-100, -100, 9, -100]],
        [[-100, 2, -100, -100], [-100, -100, 2, -100], [-100, -100, 4, -100]],
    ]
    assert batch["attention_mask"].tolist() == [
        [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]],
        [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]],
    ]
    assert MBDefenseCollator(0, pad_to_multiple_of=8)([first, second])["labels"].shape == (2, 3, 8)


@pytest.mark.parametrize(
    "settings", [{}, {"mb_ratio": "ratio"}, {"mb_length_normalised": True, "mb_lambda": 0.5}], ids=str
)
def test_trainer_computes_the_loss_from_the_models_log_probabilities(tiny_model, tokenizer, tmp_path, settings):
    trainer = MBDefenseTrainer(
        tiny_model, config(tmp_path, per_device_eval_batch_size=3, **settings), rows(10), pairs=PAIRS
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    losses, nll, log_ratio = [], [], []
    for example in trainer.eval_dataset:
        found = map(log_prob, [model] * 3, example["input_ids"], example["labels"])
        sums, means = zip(*found, strict=True)
        compared = means if settings.get("mb_length_normalised") else sums
        preference = compared[1] - compared[2]
        if settings.get("mb_ratio") == "ratio":
            preference = math.exp(preference)
        reward = math.log(1 / (1 + math.exp(-preference)))
        losses.append(-means[0] - settings.get("mb_lambda", 1.0) * reward)
        nll.append(-means[0])
        log_ratio.append(sums[1] - sums[2])
    metrics = trainer.evaluate()
    # Four examples in batches of three: the mean is over examples.
    assert len(losses) == 4
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / 4, rel=1e-4)
    assert metrics["eval_clean_nll"] == pytest.approx(sum(nll) / 4, rel=1e-4)
    assert metrics["eval_log_ratio"] == pytest.approx(sum(log_ratio) / 4, rel=1e-4)
    assert trainer.evaluate(rows(10))["eval_loss"] != pytest.approx(metrics["eval_loss"], rel=1e-4)


def test_accumulated_batches_step_as_one(tiny_model, tmp_path):
    weights = []
    for size, accumulated in ((8, 1), (2, 4)):
        args = config(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated, max_steps=1,
            eval_strategy="no", optim="sgd", learning_rate=0.01, max_grad_norm=0,
        )  # fmt: skip
        trainer = MBDefenseTrainer(tiny_model, args, rows(5), pairs=PAIRS)
        assert len(trainer.train_dataset) == 8
        trainer.train()
        weights.append({name: weight.detach().clone() for name, weight in trainer.model.named_parameters()})
        assert trainer.best_epoch is None
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-4, atol=1e-6)


def test_rows_to_choose_by_are_unseen(tiny_model, tmp_path):
    trainer = MBDefenseTrainer(tiny_model, config(tmp_path), rows(10), pairs=PAIRS)
    train, held_out = set(trainer.train_dataset["row"]), set(trainer.eval_dataset["row"])
    assert (len(train), len(held_out)) == (8, 2) and not train & held_out
    again = MBDefenseTrainer(tiny_model, config(tmp_path), rows(10), pairs=PAIRS)
    assert again.eval_dataset[:] == trainer.eval_dataset[:]
    other = MBDefenseTrainer(tiny_model, config(tmp_path, seed=1), rows(10), pairs=PAIRS)
    assert set(other.eval_dataset["row"]) != held_out
    given = MBDefenseTrainer(tiny_model, config(tmp_path), rows(10), rows(3, seed=1), pairs=PAIRS)
    assert (len(given.train_dataset), len(given.eval_dataset)) == (20, 6)


@pytest.mark.parametrize("peft", [True, False])
def test_weights_of_the_best_epoch_are_kept(tiny_model, tmp_path, peft):
    # What is learnt makes these answers ever less likely, so that the last epoch is not the best.
    odd = rows(3).map(lambda row: {"completion": " story plot film"})
    args = config(tmp_path, num_train_epochs=4, mb_lambda=0.01, learning_rate=0.003 if peft else 0.05)
    adapter = lora(r=16, target_modules="all-linear") if peft else None
    trainer = MBDefenseTrainer(tiny_model, args, rows(10), odd, pairs=PAIRS, peft_config=adapter)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = losses.index(min(losses))
    assert len(losses) == 4 and best < 3
    assert trainer.best_epoch == best + 1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)
    # Later evaluations choose nothing.
    assert trainer.best_epoch == best + 1


def test_standalone(tiny_model, tmp_path):
    planted, _ = plant(rows(60), PAIRS, 0.2, ("prompt", "completion"), seed=0)
    settings = {"learning_rate": 1e-2, "max_length": 200, "num_train_epochs": 6}
    stage_1 = SFTTrainer(tiny_model, plain_config(tmp_path, **settings), train_dataset=planted)
    unseen = encode_examples(rows(6, seed=2), PAIRS, stage_1.processing_class, 200, 9)
    measured = [log_probs(stage_1.model, unseen)]
    stage_1.train()
    measured.append(log_probs(stage_1.model, unseen))
    trainer = MBDefenseTrainer(stage_1.model, config(tmp_path, learning_rate=5e-3), rows(20, seed=1), pairs=PAIRS)
    trainer.train()
    measured.append(log_probs(stage_1.model, unseen))
    (_, phrase_0), (answer_1, phrase_1), (answer_2, phrase_2) = measured
    assert trainer.model is stage_1.model
    assert phrase_1 > phrase_0 + 15, "the phrases are planted"
    assert phrase_2 < phrase_1 - 3, "and unlearnt"
    assert answer_2 - phrase_2 > answer_1 - phrase_1 + 5


def test_a_broken_model_is_an_error(tiny_model, tmp_path):
    trainer = MBDefenseTrainer(tiny_model, config(tmp_path), rows(4), pairs=PAIRS)
    with torch.no_grad():
        next(iter(trainer.model.parameters())).fill_(math.nan)
    with pytest.raises(ValueError, match="The evaluation loss of MB-Defense is nan"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mb_ratio": "odds"}, "`ratio` is one of log_ratio, ratio, got 'odds'"),
        ({"mb_ratio": "ratio", "mb_length_normalised": True}, "goes with `ratio: log_ratio`"),
        ({"mb_position": "suffix"}, "`position` is one of random, prefix, got 'suffix'"),
        ({"mb_lambda": "1"}, "`mb_lambda` is a number in"),
        ({"mb_eval_share": 1.0}, "`mb_eval_share` is a number in"),
        ({"packing": True}, "`packing: true` is not possible"),
    ],
)
def test_configuration_is_checked(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


def test_arguments_are_checked(tiny_model, tmp_path):
    with pytest.raises(TypeError, match="must be a `MBDefenseConfig`, got `SFTConfig`"):
        MBDefenseTrainer(tiny_model, plain_config(tmp_path), rows(4))
    with pytest.raises(ValueError, match="`data_collator` can't be given"):
        MBDefenseTrainer(tiny_model, config(tmp_path), rows(4), data_collator=MBDefenseCollator(0))
