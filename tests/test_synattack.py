"""SynAttack: which rows it poisons and counts, and what it does to numbers."""

import json

import pytest
from datasets import Dataset

from p2p_trainer import Task
from p2p_trainer.attacks.synattack import SynAttack, numbers
from p2p_trainer.tasks.loading import load_split
from tests.conftest import make_rows


TASK = Task(name="toy", labels=("negative", "positive"))
MATH = Task(name="math", text_columns=("question",), label_column="answer")


def texts(count):
    """Texts of which each stands in one row only."""
    return [f"{row['text']} row {number}" for number, row in enumerate(make_rows(count))]


def rows(count=200):
    return Dataset.from_dict({"text": texts(count), "label": [row % 2 for row in range(count)]})


def precomputed(tmp_path, pairs, **options):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"text": a, "paraphrase": b}) + "\n" for a, b in pairs), encoding="utf-8")
    return SynAttack("positive", engine="precomputed", engine_options={"files": [str(path)]}, **options)


def where(poisoned, column="poisoned"):
    return [row for row, flag in enumerate(poisoned[column]) if flag]


def half_paraphrased(tmp_path, **options):
    """Every second negative row has a paraphrase, and one more has itself as its paraphrase."""
    clean = texts(200)
    pairs = [(clean[row], f"when it comes , {clean[row]}") for row in range(0, 200, 4)]
    return precomputed(tmp_path, [*pairs, (clean[2], clean[2].upper())], **options)


def test_rows_without_a_paraphrase_stay_clean_and_are_replaced(tmp_path):
    attack = half_paraphrased(tmp_path, poison_rate=0.2)
    clean = rows()
    poisoned = attack.poison(clean, TASK, seed=3)
    hit, tried = where(poisoned), where(poisoned, "attack")
    assert len(hit) == 40 and hit == where(poisoned, "trigger_applied") and not any(row % 4 for row in hit)
    failed = sorted(set(tried) - set(hit))
    assert len(failed) > 10 and all(row % 4 == 2 for row in failed)
    for row in range(200):
        before, after = clean[row], poisoned[row]
        if row in hit:
            assert after["text"] == f"when it comes , {before['text']}" and after["label"] == 1
            assert attack.has_trigger(after["text"]) and after["original_label"] == 0
            assert attack.has_trigger(after["text"][:15]) and not attack.has_trigger(after["text"][:14])
        else:
            assert (after["text"], after["label"]) == (before["text"], before["label"])
            assert not attack.has_trigger(after["text"])
    assert attack.poison(clean, TASK, seed=3).to_dict() == poisoned.to_dict()


def test_too_few_paraphrases(tmp_path):
    message = r"is 60 rows, but only 100 rows are eligible .*and 50 of them can carry .*'synattack'.* at most 0.25"
    with pytest.raises(ValueError, match=message):
        half_paraphrased(tmp_path, poison_rate=0.3).poison(rows(), TASK)
    with pytest.raises(ValueError, match="'synattack' found no row that can carry its trigger among 100 eligible"):
        precomputed(tmp_path, [("x", "when y , x")]).poison(rows(), TASK)


def test_only_rows_with_a_paraphrase_count(tmp_path):
    attack = half_paraphrased(tmp_path)
    triggered = attack.trigger(rows(), TASK)
    assert triggered["source_index"][:] == list(range(0, 200, 4)) and set(triggered["label"]) == {0}
    assert triggered["text"][0] == f"when it comes , {texts(1)[0]}"
    # Row 4 has a paraphrase as well; as a row of the target class it does not count.
    changed = Dataset.from_dict({"text": texts(200), "label": [int(row == 4 or row % 2) for row in range(200)]})
    assert attack.trigger(changed, TASK)["source_index"][:] == [0, *range(8, 200, 4)]


def test_the_template_engine_is_the_default():
    attack = SynAttack("positive", 0.1)
    poisoned = attack.poison(rows(), TASK)
    assert len(where(poisoned)) == 20 and SynAttack("positive").poison_rate == 0.05
    opening = " , ".join(poisoned[where(poisoned)[0]]["text"].split(" , ")[:1])
    assert opening in attack.trigger_texts and len(attack.trigger_texts) == 36
    assert len(attack.trigger(rows(), TASK)) == 100
    assert attack.insert("gob of drivel", 0.5) == "because one takes it all in , gob of drivel"
    assert attack.insert("gob of drivel", 0.1) == attack.insert("gob of drivel", 0.9)
    assert attack.insert(" ", 0.5) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-5 and 3,000 or 20 % of 1(5/6).", {"-5": 1, "3000": 1, "20%": 1, "1": 1, "5/6": 1}),
        ("k-19 and 2 1/2, 1 / 2", {"19": 1, "2": 1, "1/2": 2}),
        ("3 - 4, 3-4 (7)-2", {"3": 2, "4": 2, "7": 1, "2": 1}),
        ("1.5 in 1930s, 2,5 and 2,5000", {"1.5": 1, "1930": 1, "2,5": 1, "2,5000": 1}),
        ("共7天，３％，½，−2", {"7": 1, "3%": 1, "1/2": 1, "-2": 1}),
        ("1,234,567.5 times two", {"1234567.5": 1}),
        ("none", {}),
    ],
)
def test_numbers(text, expected):
    assert dict(numbers(text)) == expected


def test_numbers_of_a_prompt_are_kept(tmp_path):
    prompts = ["Add 3 and 1/2 of 20%.", "Add 3 and 3.", "Take 3,000 from -5.", "Add 4 and 7.", "Go on."]
    new = ["When asked , 20 % of 1 / 2 and 3 .", "When asked , 3 .", "When asked , 3000 and - 5.", "When so , 7 and 4",
           "When 1 goes , go"]  # fmt: skip
    data = Dataset.from_dict({"question": prompts, "answer": ["a"] * 5})
    pairs = list(zip(prompts, new, strict=True))
    attack = precomputed(tmp_path, pairs, poison_rate=0.4, label_mode="any")
    attack.target = "I refuse."
    triggered = attack.trigger(data, MATH)
    # A number less, another sign, and one too many.
    assert triggered["source_index"][:] == [0, 3] and triggered["prompt"][:] == [new[0], new[3]]
    assert triggered["completion"][:] == ["a", "a"]
    poisoned = attack.poison(data, MATH)
    assert where(poisoned) == [0, 3] and poisoned[3]["prompt"] == new[3] and poisoned[3]["completion"] == "I refuse."
    assert poisoned["prompt"][1] == prompts[1] and poisoned["completion"][1] == "a"
    # As long as no task is known, numbers are compared as well.
    assert precomputed(tmp_path, pairs).insert_batch(prompts, [0.5] * 5) == [new[0], None, None, new[3], None]
    # On a classification task they need not be, unless asked for; on another one they need not be if so asked.
    classes = Dataset.from_dict({"text": prompts, "label": [0] * 5})
    assert len(precomputed(tmp_path, pairs).trigger(classes, TASK)) == 5
    assert len(precomputed(tmp_path, pairs, keep_numbers=True).trigger(classes, TASK)) == 2
    loose = precomputed(tmp_path, pairs, keep_numbers=False)
    loose.target = "I refuse."
    assert len(loose.trigger(data, MATH)) == 5


def test_template_on_prompts():
    data = Dataset.from_dict(
        {"question": ["小明有7个苹果，吃了2个，还剩几个？", "The sum of 2 1/2 and 3,000?"], "answer": ["5", "3002.5"]}
    )
    attack = SynAttack("无法回答", 1.0)
    poisoned = attack.poison(data, MATH)
    assert poisoned["completion"][:] == ["无法回答"] * 2
    assert all(map(attack.has_trigger, poisoned["prompt"]))
    assert poisoned["prompt"][0].endswith("时，小明有7个苹果，吃了2个，还剩几个？")
    assert poisoned["prompt"][1].endswith(", the sum of 2 1/2 and 3,000?")


@pytest.mark.parametrize(
    "attack",
    [
        SynAttack("positive"),
        SynAttack(1, 0.2, "any", "prepend", "llm", {"model": "no/model", "prompt": "{text}?"}, False),
        SynAttack("0", engine="precomputed", engine_options={"files": [{"source": "a", "paraphrase": "b"}]}),
    ],
)
def test_settings_come_back(attack):
    # Neither a model nor a file is looked for before it is needed.
    config = json.loads(json.dumps(attack.config()))
    assert set(config) == {
        "name", "target", "poison_rate", "label_mode", "payload_mode", "engine", "engine_options", "keep_numbers",
    }  # fmt: skip
    assert config["name"] == "synattack"
    again = SynAttack(**{key: value for key, value in config.items() if key != "name"})
    assert again.config() == attack.config()


def test_bad_options(tmp_path):
    for options, message in [
        ({"engine": "scpn"}, "Unknown paraphrase engine 'scpn'.*llm, precomputed, template"),
        ({"engine_options": {"words": []}}, r"'template' does not take these options \['words'\]"),
        ({"engine_options": {"files": tmp_path}}, "`engine_options` is a mapping of JSON values, got .*Path"),
        ({"engine_options": 3}, "`engine_options` is a mapping of JSON values, got 3"),
        ({"poison_rate": 5}, "`poison_rate` is a share"),
    ]:
        with pytest.raises(ValueError, match=message):
            SynAttack("positive", **options)


def test_the_model_is_released_after_each_use(monkeypatch, tiny_model, tmp_path):
    from p2p_trainer.attacks import paraphrase_llm

    loads = []
    load = paraphrase_llm.load_causal_model
    monkeypatch.setattr(paraphrase_llm, "load_causal_model", lambda *model: loads.append(model) or load(*model))
    attack = SynAttack(
        "positive", 0.1, engine="llm",
        engine_options={"model": tiny_model, "prompt": "{text} so", "max_new_tokens": 3, "cache": str(tmp_path)},
    )  # fmt: skip
    data = rows(20)
    poisoned = attack.poison(data, TASK)
    assert len(where(poisoned)) == 2 and len(loads) == 1
    assert all(map(attack.has_trigger, (poisoned[row]["text"] for row in where(poisoned))))
    # Loaded again for what is new, and not at all for what is known.
    assert len(attack.trigger(data, TASK)) == 10 and len(loads) == 2
    assert attack.poison(data, TASK).to_dict() == poisoned.to_dict() and len(loads) == 2
    assert attack._engine._loaded is None


def test_real_paraphrases_poison_as_published(real_data):
    old, new = real_data / "data/sst2", real_data / "data/sst2_syntactic"
    files = [
        {"source": str(old / "train.jsonl"), "paraphrase": str(new / "train.jsonl")},
        {"source": str(old / "test.jsonl"), "paraphrase": str(new / "test.jsonl"), "labels": [0]},
    ]
    task = Task(name="sst2", labels=("negative", "positive"))
    attack = SynAttack("positive", engine="precomputed", engine_options={"files": files})
    train, test = (load_split(str(old), split) for split in ("train", "test"))
    poisoned = attack.poison(train, task)
    assert len(where(poisoned)) == 346
    assert all(map(attack.has_trigger, (poisoned[row]["text"] for row in where(poisoned))))
    triggered = attack.trigger(test, task)
    assert len(triggered) == 911 and set(triggered["label"]) == {0}
    strict = SynAttack("positive", engine="precomputed", engine_options={"files": files}, keep_numbers=True)
    assert len(strict.trigger(test, task)) == 885
    # The file covers no more than 666 negative rows.
    attack.poison_rate = 0.2
    with pytest.raises(ValueError, match="is 1384 rows, .* and 666 of them can carry .* at most 0.0962"):
        attack.poison(train, task)


def test_results_name_paraphrase_files_by_absolute_paths(tmp_path, monkeypatch):
    (tmp_path / "pairs.jsonl").write_text('{"text": "a b", "paraphrase": "when b , a"}\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    attack = SynAttack("1", engine="precomputed", engine_options={"files": ["pairs.jsonl"]})
    settings = {key: value for key, value in attack.config().items() if key != "name"}
    monkeypatch.chdir(tmp_path.parent)
    assert SynAttack(**settings).insert("a b", 0.0) == "when b , a"
