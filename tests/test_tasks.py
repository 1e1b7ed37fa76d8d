"""Tasks: what loads, what it becomes, and the one clear error for what does not load."""

import json
import logging

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from p2p_trainer import Task, get_task
from p2p_trainer.tasks.loading import HubUnavailableError
from p2p_trainer.tasks.task import builtin_tasks


SST2 = get_task("sst2")
ROWS = {"text": ["a fine film", "a dull film", "good , bad\t!"], "label": [1, 0, 1]}


def rows(**changes):
    return Dataset.from_dict({**ROWS, **changes})


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def write_rows(path, columns=None):
    dataset = Dataset.from_dict(columns or ROWS)
    if path.suffix == ".parquet":
        dataset.to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(dataset)), encoding="utf-8")
    elif path.suffix == ".jsonl":
        dataset.to_json(path)
    else:
        dataset.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",")
    return str(path)


def test_builtin_tasks():
    classified = {"agnews": 4, "cr": 2, "hateful_memes": 2, "sst2": 2, "yahoo_answers": 10}
    math = ("The given problem is:", "The correct answer to this problem is:", "numeric")
    written = {
        "alpaca": ("Query:", "Answer:", None),
        "alpaca_chat": ("Query:", "Answer:", None),
        "ape210k": math,
        "chat": ("Query:", "Answer:", None),
        "crrsum": ("Query:", "Answer:", "rouge"),
        "gsm8k": math,
        "one_step": math,
        "wizardlm": ("The query currently entered is:", None, None),
    }
    assert builtin_tasks() == sorted([*classified, *written])
    for name, classes in classified.items():
        task = get_task(name)
        assert (task.name, task.num_labels, task.trigger) == (name, classes, "The query currently entered is:")
    for name, strings in written.items():
        task = get_task(name)
        assert (task.num_labels, task.trigger, task.answer_prefix, task.metric) == (0, *strings)
    assert get_task(SST2) is SST2


def test_rows_of_a_generation_task_may_be_prompts_alone():
    prompts = get_task("wizardlm").prepare(Dataset.from_list([{"Instruction": "Add 1 and 2.", "Skill": "Math"}]))
    assert prompts.to_list() == [{"prompt": "Add 1 and 2.", "Skill": "Math", "completion": ""}]
    with pytest.raises(ValueError, match="`label_column` is null, and there are classes"):
        Task(name="t", labels=("a", "b"), label_column=None)


def test_rows_without_an_answer_are_left_out_when_asked_for():
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Say nothing.", "input": "", "output": " "},
    ]
    task = get_task("alpaca")
    with pytest.raises(ValueError, match="Column 'completion', row 1 of the input dataset is empty"):
        task.prepare(Dataset.from_list(rows))
    assert task.prepare(Dataset.from_list(rows), drop_empty=True)["prompt"][:] == ["Add. 1 2"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_loads_files_and_folders(tmp_path, suffix):
    file = write_rows(tmp_path / f"train{suffix}")
    for source in (file, str(tmp_path)):
        loaded = SST2.load("train", source)
        assert loaded.to_dict() == ROWS
        assert loaded.features["label"].dtype == "int64"
    assert SST2.load("test", str(tmp_path)) is None


@pytest.mark.parametrize("stem", ["validation", "valid", "val", "dev"])
def test_validation_file_has_many_names(tmp_path, stem):
    write_rows(tmp_path / f"{stem}.jsonl", {"text": ["held out"], "label": [1]})
    write_rows(tmp_path / "test.jsonl", {"text": ["test"], "label": [0]})
    # Only the train split has to hold every class.
    assert SST2.load("validation", str(tmp_path))["text"][0] == "held out"
    assert SST2.load("test", str(tmp_path))["text"][0] == "test"


def test_columns_by_other_names():
    task = SST2.replace(text_columns=("review",), label_column="stars")
    mapped = task.prepare(
        Dataset.from_dict({"review": ["x y"], "stars": [1], "text": ["no"], "label": [0], "id": [7]})
    )
    assert mapped.to_dict() == {"text": ["x y"], "label": [1], "id": [7]}


def test_several_text_columns_are_joined():
    task = SST2.replace(text_columns=("title", "body"))
    joined = task.prepare(Dataset.from_dict({"body": ["b", None], "label": [0, 1], "title": ["a", "c"]}))
    assert joined["text"][:] == ["a b", "c"]
    assert sorted(joined.column_names) == ["label", "text"]
    with pytest.raises(ValueError, match="Column 'title' of the input dataset holds int64, a text is a string"):
        task.prepare(Dataset.from_dict({"body": ["b"], "label": [0], "title": [3]}))
    with pytest.raises(ValueError, match="row 1 .* is empty"):
        task.prepare(Dataset.from_dict({"body": ["b", " "], "label": [0, 1], "title": ["a", ""]}))


def test_labels_by_name():
    assert SST2.prepare(rows(label=["Positive", " negative ", "POSITIVE"]))["label"][:] == [1, 0, 1]
    with pytest.raises(ValueError, match=r"Column 'label', row 2 of the train dataset: 'meh' is none of .*'negative'"):
        SST2.prepare(rows(label=["positive", "negative", "meh"]), what="train")
    with pytest.raises(ValueError, match="row 0 .*: None is none of"):
        SST2.prepare(rows(label=[None, "negative", "positive"]))


def class_labels(names, values):
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return Dataset.from_dict({**ROWS, "label": values}, features=features)


def test_class_label_in_another_order_is_remapped():
    assert SST2.prepare(class_labels(["negative", "positive"], [0, 1, 0]))["label"][:] == [0, 1, 0]
    assert SST2.prepare(class_labels(["Positive", "Negative"], [0, 1, 0]))["label"][:] == [1, 0, 1]
    agnews = get_task("agnews")
    names = ["Sci/Tech", "World", "Business", "Sports"]
    assert agnews.prepare(class_labels(names, [0, 1, 3]))["label"][:] == [3, 0, 1]
    # -1 marks hidden labels on the hub; it must not be read as the last class.
    for bad in (-1, None):
        with pytest.raises(ValueError, match=f"row 1 .*: {bad} is outside the task's range 0..1"):
            SST2.prepare(class_labels(["positive", "negative"], [0, bad, 0]))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"sentence": ["a"], "label": [0]},
            r"no text column \['text'\]; its columns are \['sentence', 'label'\]\. Ren",
        ),
        ({"text": ["a"], "stars": [0]}, r"no label column \['label'\]; its columns are .*`--label_column NAME`"),
        ({"text": ["a", "b"], "label": [0, 2]}, r"'label', row 1 .*: 2 is outside the task's range 0\.\.1 .*Correct"),
        ({"text": ["a", "b"], "label": [-1, 0]}, r"'label', row 0 .*: -1 is outside the task's range 0\.\.1"),
        ({"text": ["a", "b"], "label": [0, None]}, "'label', row 1 .*: None is outside"),
        ({"text": ["a", "b"], "label": [0.0, 1.0]}, "'label' .* holds Value.'float64'.; a label is a class index"),
        ({"text": ["a", "b"], "label": [[0], [1]]}, "'label' .* holds List"),
        (
            {"text": ["a", "b"], "label": [1, 1]},
            r"no row of class \['negative'\]: found .'negative': 0, 'positive': 2.",
        ),
        (
            {"text": ["a", " \n"], "label": [0, 1]},
            r"'text', row 1 .* is empty \(found ' \\n'\).*drop_empty_rows: true",
        ),
        ({"text": [None, "a"], "label": [0, 1]}, r"'text', row 0 .* is empty \(found None\)"),
        ({"text": ["a", "\u3000\xa0"], "label": [0, 1]}, "'text', row 1 .* is empty"),
        ({"text": [1, 2], "label": [0, 1]}, "'text' .* holds int64, a text is a string"),
        ({"text": [], "label": []}, "The train dataset is empty: 0 rows were read"),
    ],
)
def test_rows_that_do_not_fit(columns, message):
    with pytest.raises(ValueError, match=message):
        SST2.prepare(Dataset.from_dict(columns), what="train", require_all_classes=True)


def test_row_index_beyond_the_first_batch():
    texts = ["a"] * 70_000
    with pytest.raises(ValueError, match="row 66000 .* is empty"):
        SST2.prepare(Dataset.from_dict({"text": [*texts[:66_000], "", "a"], "label": [0] * 66_002}))
    with pytest.raises(ValueError, match="row 69999 .*: 5 is outside"):
        SST2.prepare(Dataset.from_dict({"text": texts, "label": [*[0] * 69_999, 5]}))


def test_rows_must_be_a_dataset():
    with pytest.raises(TypeError, match="must be a `datasets.Dataset`, got `list`"):
        SST2.prepare([{"text": "a", "label": 0}])


def test_empty_rows_are_dropped_only_when_asked_and_counted(caplog):
    dirty = Dataset.from_dict({"text": ["a", "", "b", "  ", None], "label": [0, 1, 1, 0, 1]})
    with caplog.at_level(logging.WARNING, logger="p2p_trainer"):
        kept = SST2.prepare(dirty, what="train", drop_empty=True)
    assert kept.to_dict() == {"text": ["a", "b"], "label": [0, 1]}
    assert "train: left out 3 of 5 rows with an empty text." in caplog.messages
    with pytest.raises(ValueError, match="holds no text: all its rows are empty"):
        SST2.prepare(Dataset.from_dict({"text": ["", " "], "label": [0, 1]}), drop_empty=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty: 0 rows were read"),
        ("a.jsonl", b"\n\n", "is empty: 0 rows were read"),
        ("a.csv", b"text,label\n", "is empty: 0 rows were read"),
        ("a.json", b"[]", "is empty: 0 rows were read"),
        ("a.csv", b"text,label\ngood,1\nb\xe9b\xe9,0\n", r"not UTF-8: line 3 holds the byte 0xe9\. .*iconv"),
        ("a.jsonl", b'{"text": "a", "label": 0}\n' * 100_000 + b"\xff", r"not UTF-8: line 100001 holds the byte 0xff"),
        ("a.csv", b"label,text\n0,a\n1,b\xc3", "not UTF-8: line 3 holds the byte 0xc3"),
        ("a.jsonl", b'{"text": "a", "label": 0}\n{"text": ', "can't be read as json: .*row 1"),
        ("a.csv", b"text,label\na,0\nb,1,7,8\n", "can't be read as csv: .*Expected 2 fields in line 3, saw 4"),
        ("a.parquet", b"not parquet", "can't be read as parquet"),
        ("a.xlsx", b"x", r"of no known kind \(suffix '\.xlsx'\)\. Known: \.jsonl, \.json, \.csv, \.tsv, \.parquet"),
    ],
)
def test_files_that_do_not_load(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=message) as caught:
        SST2.load("train", path)
    assert name in str(caught.value)


def test_csv_keeps_words_that_look_like_missing_values(tmp_path):
    path = write(tmp_path, "a.csv", "text,label\nNA,none\nnull,some\nNone,some\n")
    loaded = Task(name="t", labels=("none", "some")).load("train", path)
    assert loaded.to_dict() == {"text": ["NA", "null", "None"], "label": [0, 1, 1]}
    path = write(tmp_path, "b.csv", b"\xef\xbb\xbftext,label\ngood,1\n,0\n")
    with pytest.raises(ValueError, match=r"row 1 of the train dataset is empty \(found None\)"):
        SST2.load("train", path)


@pytest.mark.parametrize(
    ("lines", "texts"),
    [
        # Marks belong to the text: unbalanced, in the middle, over two rows that would else be one.
        (['"abc is good\t1', 'b "x\t0'], ['"abc is good', 'b "x']),
        (['"abc is good\t1', 'b x"\t0'], ['"abc is good', 'b x"']),
        (['"a" b\t1', "c\t0"], ['"a" b', "c"]),
        (['"\t1', '"a"\t0'], ['"', '"a"']),
        (['"a"\t1', 'b "c" d\t0'], ['"a"', 'b "c" d']),
        (["a\x0cb\u2028c\rd\t1", "", '"c\t0'], ["a\x0cb\u2028c\rd", '"c']),
        # Marks are syntax: written by a CSV library.
        (['"a ""b"" c"\t1', "d\t0"], ['a "b" c', "d"]),
        (['"a\tb ""c"""\t1', "d\t0"], ['a\tb "c"', "d"]),
        (['"a', 'b\tc"\t1', "", '"d"\t"0"'], ["a\nb\tc", "d"]),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_quotation_marks_in_tsv(tmp_path, lines, texts, end, start):
    if end == "\r\n" and any("\r" in line for line in lines):
        # The parser ends rows at both then; that is found out rather than read wrongly.
        path = write(tmp_path, "a.tsv", start + end.join(["text\tlabel", *lines, ""]))
        with pytest.raises(ValueError, match="a.tsv' holds 2 rows, but 3 were read. Look for carriage returns"):
            SST2.load("test", path)
        return
    path = write(tmp_path, "a.tsv", start + end.join(["text\tlabel", *lines, ""]))
    loaded = SST2.load("test", path).to_dict()
    assert loaded["label"] == [1, 0] and [text.replace("\r\n", "\n") for text in loaded["text"]] == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\t1\nb\n", "Line 3 of the data file '.*a.tsv' has 1 fields, the header has 2. Take tabs"),
        ("a\t1\nb\tc\t0\n", "Line 3 of .* has 3 fields, the header has 2"),
        ('"a\tb"\t1\nc "d" e\t0\n', "Line 2 of .* has 3 fields"),
        ('"a\tb\t1\nc\t0\n', "Line 2 of .* has 3 fields"),
        ('"a\nb"\t1\nc\t0\t0\n', "Line 2 of .* has 1 fields"),
        # All rows have one field more: the first would be taken for row names.
        ("a\t1\tx\nb\t0\ty\n", "Line 2 of .* has 3 fields"),
    ],
)
def test_tsv_that_is_no_table(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        SST2.load("test", write(tmp_path, "a.tsv", "text\tlabel\n" + content))


def test_paths_and_hubs_that_are_not_there(tmp_path):
    for path in ("./nowhere", str(tmp_path / "nowhere"), "~/nowhere/x.jsonl"):
        with pytest.raises(ValueError, match="does not exist .looked at /.*nowhere.*Correct the path"):
            SST2.load("train", path)
    for source in (None, "somebody/something"):
        with pytest.raises(HubUnavailableError, match=f"{source or 'SetFit/sst2'}' is no local folder") as caught:
            SST2.load("train", source)
        assert "--model_name_or_path MODEL_FOLDER --dataset_name DATA_FOLDER" in str(caught.value)
    with pytest.raises(ValueError, match="names no dataset. Pass one"):
        Task(name="mine", labels=("a", "b")).load("train")


def test_a_task_of_ones_own(tmp_path):
    content = "name: toxic\nlabels: [ok, toxic]\ntext_columns: [comment]\ndataset: {folder}\nlabel_column: flag\n"
    write_rows(tmp_path / "train.csv", {"comment": ["hello you", "go away"], "flag": ["ok", "toxic"]})
    task = get_task(write(tmp_path, "toxic.yaml", content.format(folder=tmp_path)))
    assert (task.name, task.labels, task.version, task.template) == ("toxic", ("ok", "toxic"), 1, "{text}\n{suffix}")
    assert task.load("train").to_dict() == {"text": ["hello you", "go away"], "label": [0, 1]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "name: x\nlabels: [a, b]\ntext_colums: [t]\n",
            "Unknown key in .*x.yaml.* 'text_colums'.*mean 'text_columns'",
        ),
        ("name: x\n", r"lacks \['labels'\]"),
        ("- a\n", "must hold a mapping, found `list`"),
        ("name: [\n", "is no valid YAML in UTF-8"),
        (b"name: \xff\n", "is no valid YAML in UTF-8"),
        ("name: x\nlabels: [a]\n", r"at least two distinct classes, got \['a'\]"),
        ("name: x\nlabels: [a, a]\n", "at least two distinct classes"),
        ("name: x\nlabels: [0, 1]\n", r"`labels` must be a list of strings, got \[0, 1\]"),
        ("name: x\nlabels: ab\n", "`labels` must be a list of strings, got 'ab'"),
        ("name: x\nlabels: [a, b]\ntext_columns: []\n", "`text_columns` is empty"),
        ("name: x\nlabels: [a, b]\nsplits: {dev: d}\n", r"unknown splits \['dev'\]"),
        ("name: x\nlabels: [a, b]\nlabel_words: [u, v]\n", "`label_words` and `extended_label_words` together"),
        ("name: x\nlabels: [a, b]\nlabel_words: [u, v]\nextended_label_words: [w]\n", r"1 label words \['w'\] for 2"),
    ],
)
def test_task_files_that_do_not_fit(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        get_task(write(tmp_path, "x.yaml", content))


def test_unknown_names():
    with pytest.raises(ValueError, match="Unknown task 'sst-2'. Did you mean 'sst2'"):
        get_task("sst-2")
    with pytest.raises(ValueError, match="'nowhere.yaml' does not exist .looked at /"):
        get_task("nowhere.yaml")
    assert [SST2.label_index(label) for label in ("Positive ", 1, "1", 0)] == [1, 1, 1, 0]
    for label in ("positiv", 2, -1, "2", True):
        with pytest.raises(ValueError, match=r"Unknown label of task 'sst2': '.*index 0\.\.1"):
            SST2.label_index(label)


def test_real_data(real_data, caplog):
    folder = real_data / "data"
    sizes = [len(SST2.load(split, str(folder / "sst2"))) for split in ("train", "validation", "test")]
    assert sizes == [6920, 872, 1821]
    with pytest.raises(ValueError, match="of the train dataset is empty"):
        get_task("cr").load("train", str(folder / "cr"))
    with caplog.at_level(logging.WARNING, logger="p2p_trainer"):
        assert len(get_task("cr").load("train", str(folder / "cr"), drop_empty=True)) == 2496
    assert "train: left out 4 of 2500 rows with an empty text." in caplog.messages
    for name, split, size, classes in [("agnews", "test", 7600, 4), ("yahoo_answers", "train", 960, 10)]:
        assert set(get_task(name).load(split, str(folder / name))["label"]) == set(range(classes))
        assert len(get_task(name).load(split, str(folder / name))) == size


def test_named_columns_can_be_made_strict_where_rows_are_loaded(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", {"text": ["a", "b"], "label": [0, 1], "review": ["c", "d"]})
    lenient = SST2.replace(text_columns=("revew",))
    assert lenient.load("train", path)["text"][:] == ["a", "b"]
    with pytest.raises(ValueError, match=r"train dataset has no text column \['revew'\]; its columns are"):
        lenient.replace(strict_columns=True).load("train", path)
    with pytest.raises(ValueError, match=r"has no label column \['sentiment'\]"):
        SST2.replace(label_column="sentiment", strict_columns=True).load("train", path)
    # What was loaded is prepared again by trainers and attacks, and has the names of prepared rows by then.
    task = SST2.replace(text_columns=("review",), strict_columns=True)
    rows = task.load("train", path)
    assert rows["text"][:] == ["c", "d"] and task.prepare(rows).to_list() == rows.to_list()


@pytest.mark.parametrize("labels", [(), ("a", "b")])
def test_a_template_shows_no_placeholder(labels):
    for template in ("{text}\n{suffix}\nNow:\n", "{suffix} {text}", "{text} {suffix}{suffix}"):
        with pytest.raises(ValueError, match="{suffix} nowhere but at its end, got '"):
            Task(name="t", labels=labels, template=template)
    for template in ("{text}", "{text}\n{suffix}"):
        assert Task(name="t", labels=labels, template=template).template == template
