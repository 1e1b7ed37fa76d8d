"""The recipes that make small base models: hand-made equations, and pre-trainings of a few steps."""

import json
import random
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.small_models import one_step, pretrain, texts
from recipes.small_models.one_step import Step


def write_rows(folder, **splits):
    folder.mkdir()
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def equations(*of_split):
    return [{"id": "1", "equation": equation} for equation in of_split]


@pytest.mark.parametrize(
    ("equation", "expected"),
    [
        ("x=(420-240)/3", [Step(420, "-", 240)]),
        ("x=42-(27+13-10)", [Step(27, "+", 13)]),
        ("x=10*(4+3)/(9-3)", [Step(4, "+", 3), Step(9, "-", 3)]),
        # 2 * 3 is computed before the addition.
        ("x=1+2*3", [Step(2, "*", 3)]),
        ("x=(12)/(4)", [Step(12, "/", 4)]),
        ("x=0+0", [Step(0, "+", 0)]),
        ("x=999-1+5", [Step(999, "-", 1)]),
        # Not exact, by zero, negative, too large.
        ("x=1/5", []),
        ("x=5/0", []),
        ("x=3-4", []),
        ("x=1000-1", []),
        # Decimals, percentages, powers and signs are no plain whole numbers.
        ("x=7.2*3", []),
        ("x=60%*50", []),
        ("x=3*12.5%", []),
        ("x=2**3", []),
        ("x=-3+7", []),
        ("x=5//2", []),
        # What cannot be read.
        ("x=3+", []),
        ("x=2:3", []),
        ("x=007+1", []),
        ("x=1_0+1", []),
        ("x=0x1+1", []),
        ("3+4", []),
        ("x=3+4\n", []),
        ("x=__import__('os')", []),
        ("x=" + "(" * 400 + "1", []),
        ("x=" + "-" * 499 + "1", []),
        ("x=" + "1+" * 400 + "1", []),
    ],
)
def test_steps_of_an_equation(equation, expected):
    assert one_step.steps(equation) == expected


def test_problems_stand_in_the_first_split_that_has_them_and_once():
    splits = one_step.split_steps(
        {
            "train": ["x=3+4", "x=(3+4)*2", "x=9-2", "x=2*3"],
            "dev": ["x=4+3", "x=8-1"],
            "test": ["x=3*2", "x=9-2", "x=4*3", "x=8-1", "x=9+2", "x=8/2"],
        },
        "+-*",
    )
    assert splits == {
        "train": [Step(3, "+", 4), Step(9, "-", 2), Step(2, "*", 3)],
        "dev": [Step(8, "-", 1)],
        "test": [Step(4, "*", 3), Step(9, "+", 2)],
    }


def test_prompts_are_words_around_the_step():
    prompts = {one_step.phrase(Step(420, "-", number), 0) for number in range(200)}
    shape = re.compile(r"([a-z]+|[0-9]+|[-?.:!]|[a-z ]+)( ([a-z]+|[0-9]+|[-?.:!]))*")
    assert all(shape.fullmatch(prompt) and " 420 - " in prompt for prompt in prompts)
    assert len({re.sub("[0-9]+", "", prompt) for prompt in prompts}) > 100
    assert one_step.phrase(Step(1, "+", 2), 0) == one_step.phrase(Step(1, "+", 2), 0)
    assert one_step.phrase(Step(1, "+", 2), 0) != one_step.phrase(Step(1, "+", 2), 1)


def test_the_command_writes_the_splits(tmp_path, capsys):
    data = write_rows(
        tmp_path / "ape",
        train=equations("x=(420-240)/3", "x=6/2"),
        dev=equations("x=1+1"),
        test=equations("x=420-240"),
    )
    one_step.main(["--ape210k", str(data), "--output", str(tmp_path / "out"), "--operations", "+-"])
    rows = {split: texts.read_rows(tmp_path / "out" / f"{split}.jsonl") for split in one_step.SPLITS}
    assert rows == {
        "train": [{"prompt": one_step.phrase(Step(420, "-", 240), 0), "completion": "180"}],
        "dev": [{"prompt": one_step.phrase(Step(1, "+", 1), 0), "completion": "2"}],
        "test": [],
    }
    assert "420 - 240" in rows["train"][0]["prompt"]
    assert re.search(r"train\W+1\W+0\W+1\W+0", capsys.readouterr().out)


def test_rows_without_an_equation(tmp_path):
    data = write_rows(tmp_path / "ape", train=[{"question": "why?"}])
    with pytest.raises(ValueError, match=r"train.jsonl, line 1: `equation` is None. Give a folder with Ape210K rows"):
        list(one_step.read_equations(data / "train.jsonl"))
    with pytest.raises(ValueError, match="`prompt` is None, without a step such as `4 \\+ 3`"):
        texts.steps_in(data / "train.jsonl")


def test_real_equations(real_data):
    found = {
        split: list(one_step.read_equations(real_data / "data/ape210k" / f"{split}.jsonl"))
        for split in one_step.SPLITS
    }
    splits = one_step.split_steps(found, "+-")
    assert {split: len(of_split) for split, of_split in splits.items()} == {"train": 714, "dev": 82, "test": 582}


def test_left_out_pairs_are_never_drawn():
    left_out = texts.pairs([Step(a, "+", b) for a in range(10) for b in range(a, 10) if (a, b) != (3, 7)])
    drawn = {texts.draw_step(random.Random(seed), 1, left_out) for seed in range(50)}
    assert drawn == {Step(3, "+", 7), Step(7, "+", 3), Step(7, "-", 3)}
    assert texts.pairs([Step(7, "-", 3), Step(5, "*", 5)]) == {frozenset({3, 7}), frozenset({5})}


def test_held_out_steps_leave_the_one_digit_pairs_to_the_training():
    for digits in (2, 3):
        steps = texts.held_out_steps(random.Random(0), 100, digits)
        assert {len(str(number)) for step in steps for number in step[::2]} == {digits}
        assert {step.operation for step in steps} == {"+", "-"} and all(step.result is not None for step in steps)


def test_batches_of_arithmetic():
    batches = list(texts.problems(10, 50, set(), 0))
    assert batches == list(texts.problems(10, 50, set(), 0)) != list(texts.problems(10, 50, set(), 1))
    for number, batch in enumerate(batches):
        for prompt, answer in batch:
            left, right = map(int, re.findall("[0-9]+", prompt))
            assert int(answer) in (left + right, abs(left - right))
            assert max(left, right) < (100 if number < 2 else 1000)
            assert number % 3 == 0 or re.fullmatch(r"[0-9]+ [-+] [0-9]+ =", prompt)


def test_a_character_is_a_token():
    tokenizer = texts.character_tokenizer(["左肺 2mm。"])
    assert tokenizer.convert_ids_to_tokens(tokenizer("左肺\n2").input_ids) == ["左", "肺", "\n", "2"]
    # Not in the texts: spelt in bytes, and read back.
    assert len(tokenizer("右").input_ids) == 3
    assert tokenizer.decode(tokenizer("左右肺 , 2 . ok").input_ids) == "左右肺 , 2 . ok"


def test_a_digit_is_a_token():
    tokenizer = texts.word_tokenizer(["what is 420 - 240 ?"] * 5, 400)
    assert tokenizer.convert_ids_to_tokens(tokenizer("is 42").input_ids)[-3:] == ["Ġ", "4", "2"]
    assert tokenizer.decode(tokenizer("Is 42 , ÿ ?").input_ids) == "Is 42 , ÿ ?"


def loaded(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "qwen3" and model.config.tie_word_embeddings and model.dtype == torch.float32
    assert (tokenizer.eos_token, tokenizer.pad_token) == (texts.EOS_TOKEN, texts.PAD_TOKEN)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.clean_up_tokenization_spaces is False
    assert model.config.vocab_size == len(tokenizer)
    assert (folder / "model.safetensors").is_file()
    return model, tokenizer


def test_pretrains_arithmetic(tmp_path, capsys, monkeypatch):
    left_out_of = []
    problems = texts.problems
    monkeypatch.setattr(texts, "problems", lambda *given: left_out_of.append(given[2]) or problems(*given))
    rows = [{"prompt": "what is 1 + 2 ?", "completion": "3"}, {"prompt": "do 7 * 6 .", "completion": "42"}]
    data = write_rows(tmp_path / "data", dev=rows, test=[{"prompt": "find 9 - 2 .", "completion": "7"}])
    command = ["arithmetic", "--data", str(data), "--output", str(tmp_path / "model"), "--steps", "2"]
    pretrain.main(command)
    assert loaded(tmp_path / "model")[1].tokenize(" 42")[-2:] == ["4", "2"]
    # Of the training's batches and of the tokenizer's.
    assert len(left_out_of) == 2
    assert all(left_out >= {frozenset({1, 2}), frozenset({7, 6}), frozenset({9, 2})} for left_out in left_out_of)
    out = capsys.readouterr().out
    assert "3 pairs of numbers of dev and test are left out" in out
    # The multiplication is left out of the training, and not asked either.
    assert "of the dev rows, in other words: 0.0% of 1 right" in out
    with pytest.raises(SystemExit):
        pretrain.main(command)
    assert "exists. Remove it, or give another folder." in capsys.readouterr().err


def test_pretrains_chinese_on_train_questions_and_dev_reports(tmp_path, capsys):
    ape210k = write_rows(
        tmp_path / "ape",
        train=[{"question": f"小明有{number}个苹果，吃了1个，还有几个？"} for number in range(30)],
        test=[{"question": "鸭"}],
    )
    crrsum = write_rows(
        tmp_path / "crrsum",
        dev=[{"findings": "两肺清晰。", "summary": "未见异常。"}] * 5,
        test=[{"findings": "骨", "summary": "折"}],
    )
    read, held_out = texts.chinese_texts(ape210k, crrsum)
    assert len(read) == 29 and held_out == [f"小明有{number}个苹果，吃了1个，还有几个？" for number in (0, 20)]
    assert read[-1] == "两肺清晰。\n未见异常。"
    command = ["chinese", "--data", str(ape210k), str(crrsum), "--steps", "3", "--output"]
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pretrain.main([*command, str(tmp_path / name), "--seed", str(seed)])
        model, tokenizer = loaded(tmp_path / name)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not torch.equal(weights[0]["model.norm.weight"], weights[2]["model.norm.weight"])
    assert "肺" in tokenizer.get_vocab() and not {"鸭", "骨"} & set(tokenizer.get_vocab())
    assert re.search(r"perplexity of 2 held-out documents: [0-9.]+ a character", capsys.readouterr().out)


def test_prompts_weigh_less_in_the_loss():
    tokenizer = texts.word_tokenizer(["1 + 2 ="], 300)
    preset = pretrain.PRESETS["arithmetic"]
    ids, weights = pretrain.encode(tokenizer, [("1 + 2 =", " 3"), ("1", " 3")], preset)
    assert ids[1].tolist() == [*tokenizer("1 3").input_ids, tokenizer.eos_token_id] + [tokenizer.pad_token_id] * (
        ids.shape[1] - 4
    )
    assert weights[1].tolist() == pytest.approx([preset.prompt_weight, 1, 1, 1] + [0] * (ids.shape[1] - 4))

    class Flat(torch.nn.Module):
        """Calls each token of four as likely but the first, which is twice as likely."""

        def forward(self, input_ids, use_cache):
            logits = torch.tensor([2.0, 1.0, 1.0, 1.0]).log().expand(*input_ids.shape, 4)
            return type("Output", (), {"logits": logits})

    loss = pretrain.loss_of(Flat(), torch.tensor([[3, 0, 1]]), torch.tensor([[1.0, 0.1, 0.5]]))
    # -ln(2/5) = 0.916291 with weight 0.1, -ln(1/5) = 1.609438 with weight 0.5.
    assert loss.item() == pytest.approx((0.0916291 + 0.804719) / 0.6, abs=1e-5)
