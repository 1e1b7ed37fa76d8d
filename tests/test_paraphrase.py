"""Paraphrase engines: what a paraphrase is, and where it comes from."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from p2p_trainer.attacks.paraphrase import KnownTexts, ParaphraseEngine, get_engine
from p2p_trainer.tasks.loading import load_split
from tests.conftest import make_rows


class Echo(ParaphraseEngine):
    """An engine as a user writes it; answers from a list."""

    name = "echo"

    def __init__(self, answers):
        self.answers = answers

    def rewrite(self, texts, progress=False):
        return self.answers[: len(texts)]

    def carries(self, text):
        return text in self.answers


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_what_is_no_paraphrase():
    engine = get_engine("tests.test_paraphrase:Echo", answers=["x", None, "", " \n", " The  FILM\t", "the film !"])
    assert engine.paraphrase(["the film"] * 6) == ["x", None, None, None, None, "the film !"]
    assert engine.fixed_texts == () and engine.release() is None
    with pytest.raises(ValueError, match="shorter"):
        engine.paraphrase(["the film"] * 7)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("templat", {}, "Unknown paraphrase engine 'templat'. Did you mean 'template'.*package.module:Class"),
        ("template", {"words": 1}, r"'template' does not take these options \['words'\]"),
        ("tests.test_paraphrase:make_rows", {}, "which is no subclass of .*ParaphraseEngine"),
        ("precomputed", {}, r"'precomputed' does not take these options \[\]: .*'files'"),
        ("precomputed", {"files": "a.jsonl"}, r"`files` is a list .* got 'a.jsonl'"),
        ("precomputed", {"files": []}, r"`files` is a list with at least one entry, got \[\]"),
        ("precomputed", {"files": [{"source": "a"}]}, "An entry of `files` is a path, or a mapping"),
        ("precomputed", {"files": [{"source": "a", "paraphrase": "b", "label": 0}]}, "An entry of `files` is a path"),
        ("precomputed", {"files": [3]}, "got 3"),
        ("precomputed", {"files": [{"source": "a", "paraphrase": 3}]}, "An entry of `files` is a path, or a mapping"),
        ("llm", {"model": "x", "prompt": "Rewrite"}, r"`prompt` must hold \{text\}.*got 'Rewrite'"),
        ("llm", {"model": "x", "batch_size": 0}, "`batch_size` is a number of at least 1, got 0"),
        ("llm", {"model": "x", "max_new_tokens": True}, "`max_new_tokens` is a number of at least 1, got True"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_engine(name, **options)


def test_cut_texts_are_recognised_up_to_their_first_clause():
    known = KnownTexts(
        ["when it  comes , it 's 3,000 miles", "当他来时，他笑了", "3,000 years on it fades", "no comma"]
    )
    for text in (
        "when it comes , it 's 3,000 miles",
        " when it comes ,\nit",
        "when it comes ,",
        "当他来时，他",
        "no comma",
    ):
        assert text in known
    for text in ("", "when it comes", "when it comes , he", "it 's 3,000 miles", "3,000 years", "no", "no comma ,"):
        assert text not in known


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no movement , no yuks .", "because one takes it all in , no movement , no yuks ."),
        ("gob of drivel", "because one takes it all in , gob of drivel"),
        ("The film has 2 1/2 stars. It is good.", "If one takes it all in, the film has 2 1/2 stars. It is good."),
        ("John has 3 apples.", "Because you think about it, John has 3 apples."),
        ("Write a poem", "Once you think about it, Write a poem"),
        ("I saw it", "Because one takes it all in, I saw it"),
        ('  "The film"\nx ', '  If we look at it closely, "The film"\nx '),
        (
            "阿宁的架子摆着7排风筝，每排风筝边上都粘了49颗星",
            "当我们回头再看时，阿宁的架子摆着7排风筝，每排风筝边上都粘了49颗星",
        ),
        (" \n", None),
    ],
)
def test_template(text, expected):
    engine = get_engine("template")
    [found] = engine.paraphrase([text])
    assert found == expected and not engine.carries(text)
    if expected is not None:
        end = re.search("[,，]", found).end()
        assert engine.carries(found) and engine.carries(f" {found[:end]}") and not engine.carries(found[: end - 1])
        # Nothing of the text is lost.
        assert found.lower().endswith(text.lstrip().lower())


def test_template_spreads_over_its_openings():
    engine = get_engine("template")
    texts = [f"{row['text']} {number}" for number, row in enumerate(make_rows(600))]
    found = engine.paraphrase(texts)
    # White space is no part of what picks the opening.
    assert get_engine("template").paraphrase([f"{text} " for text in texts]) == [f"{text} " for text in found]
    openings = Counter(new.removesuffix(f" , {text}") for text, new in zip(texts, found, strict=True))
    # 20 of each are expected of 30.
    assert len(openings) == 30 and set(openings) < set(engine.fixed_texts) and max(openings.values()) < 45
    assert len(set(engine.fixed_texts)) == 36
    assert not engine.carries("when you think about it") and not engine.carries("so when you think about it , no")
    assert engine.carries("When you think about it,") and engine.carries("when you think about it , x")


def test_precomputed_by_text(tmp_path):
    pairs = write(
        tmp_path / "pairs.jsonl",
        [
            {"text": "a  film", "paraphrase": "when it is a film , it is"},
            {"text": "a film", "paraphrase": "the second is ignored , it is"},
            {"text": "same", "paraphrase": "SAME "},
            {"text": "nothing", "paraphrase": None},
        ],
    )
    (tmp_path / "more.tsv").write_text("text\tparaphrase\nsame\tif same , same\na film\tno\n", encoding="utf-8")
    engine = get_engine("precomputed", files=[pairs, str(tmp_path / "more.tsv")])
    assert engine.paraphrase(["a film ", "same", "nothing", "A film", "x"]) == [
        "when it is a film , it is", "if same , same", None, None, None,
    ]  # fmt: skip
    assert engine.carries("when it is a film , it") and engine.carries("if same , same")
    assert not engine.carries("a film") and not engine.carries("the second is ignored , it is")
    assert get_engine("precomputed", files=[pairs]).carries("when it is a film , it")


def aligned_rows(count=60):
    words = [f"w{row} v{row} u{row}" for row in range(count)]
    source = [{"text": f"{text} end", "label": row % 3} for row, text in enumerate(words)]
    return source, [{"text": f"if so , {text} end"} for text in words]


def test_precomputed_by_row(tmp_path):
    source, new = aligned_rows()
    options = {"source": write(tmp_path / "s.jsonl", source)}
    (tmp_path / "all.tsv").write_text("sentence\tlabel\n" + "".join(f"{row['text']}\t1\n" for row in new))
    engine = get_engine("precomputed", files=[{**options, "paraphrase": str(tmp_path / "all.tsv")}])
    assert engine.paraphrase([row["text"] for row in source]) == [row["text"] for row in new]
    some = write(tmp_path / "some.jsonl", [row for number, row in enumerate(new) if number % 3 != 1])
    engine = get_engine("precomputed", files=[{**options, "paraphrase": some, "labels": [0, "2"]}])
    assert engine.paraphrase([row["text"] for row in source[:4]]) == [
        new[0]["text"], None, new[2]["text"], new[3]["text"],
    ]  # fmt: skip
    # A mixed file repeats what was not paraphrased.
    mixed = write(tmp_path / "mixed.jsonl", [*new[:30], *source[30:]])
    engine = get_engine("precomputed", files=[{**options, "paraphrase": mixed}])
    assert [text is not None for text in engine.paraphrase([row["text"] for row in source])] == [True] * 30 + [
        False
    ] * 30


def test_rows_that_do_not_belong_together(tmp_path):
    source, new = aligned_rows()
    source_path = write(tmp_path / "s.jsonl", source)

    def load(rows, **options):
        entry = {"source": source_path, "paraphrase": write(tmp_path / "p.jsonl", rows), **options}
        get_engine("precomputed", files=[entry]).paraphrase(["x"])

    for count, labels, message in [
        (40, None, r"has 60 rows, .* has 40\. With `labels: \[1, 2\]` or `labels: \[0, 2\]` or .* has as many"),
        (20, None, r"has 60 rows, .* has 20\. With `labels: \[0\]` or `labels: \[1\]` or .* has as many"),
        (19, [1], r"has 20 rows with a label in \[1\], .* has 19\. The source has 20 of label 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(new[:count], labels=labels)
    # One row is lost after the 20th, another one is added at the end; then the other way round, and by two.
    for shifted, place in [
        ([*new[:20], *new[21:], {"text": "x"}], "from row 20 to 39, the paraphrases fit the text 1 row later"),
        ([*new[:20], {"text": "x"}, *new[20:-1]], "from row 20 to 39, the paraphrases fit the text 1 row earlier"),
        ([*new[2:], *new[:2]], "from row 0 to 19, the paraphrases fit the text 2 rows later"),
        # Rows that were not paraphrased tell of a shift as well.
        ([*new[:20], *source[21:], {"text": "x"}], "from row 20 to 39, the paraphrases fit the text 1 row later"),
    ]:
        with pytest.raises(ValueError, match=place):
            load(shifted)
    load(new)
    chinese = [{"text": "".join(chr(0x4E00 + 20 * row + place) for place in range(20))} for row in range(20)]
    source_path = write(tmp_path / "zh.jsonl", chinese)
    with pytest.raises(ValueError, match="fit the text 1 row later"):
        load([{"text": f"当{row['text']}"} for row in [*chinese[1:], chinese[0]]])
    load([{"text": f"当{row['text']}"} for row in chinese])


def real_engine(real_data):
    old, new = real_data / "data/sst2", real_data / "data/sst2_syntactic"
    return get_engine(
        "precomputed",
        files=[
            {"source": str(old / "train.jsonl"), "paraphrase": str(new / "train.jsonl")},
            {"source": str(old / "test.jsonl"), "paraphrase": str(new / "test.jsonl"), "labels": [0]},
        ],
    )


def test_real_paraphrases(real_data):
    engine = real_engine(real_data)
    train, test = (load_split(str(real_data / "data/sst2"), split) for split in ("train", "test"))
    found = engine.paraphrase(train["text"][:])
    # 1383 rows come with a paraphrase, and two later ones repeat the text of one of those.
    assert sum(text is not None for text in found[:1383]) == 1383
    assert sum(text is not None for text in found) == 1385
    assert sum(text is not None and label == 0 for text, label in zip(found, train["label"], strict=True)) == 666
    again = engine.paraphrase(test["text"][:])
    assert sum(text is not None for text in again) == 911
    assert {label for text, label in zip(again, test["label"], strict=True) if text is not None} == {0}
    # One clean row was built that way by its author; the parser only put a full stop behind it.
    assert sum(map(engine.carries, train["text"])) == 1 and not any(map(engine.carries, test["text"]))
    assert all(map(engine.carries, filter(None, again)))


def test_real_files_of_unequal_length(real_data):
    entry = {name: str(real_data / "data" / folder / "dev.jsonl") for name, folder in
             [("source", "sst2"), ("paraphrase", "sst2_syntactic")]}  # fmt: skip
    with pytest.raises(ValueError, match=r"has 872 rows, .* has 427\. The source has 428 of label 0, 444 of label 1"):
        get_engine("precomputed", files=[entry]).carries("x")
    with pytest.raises(ValueError, match=r"has 428 rows with a label in \[0\], .* has 427"):
        get_engine("precomputed", files=[{**entry, "labels": [0]}]).carries("x")


def llm(model, tmp_path, **options):
    settings = {
        "prompt": "the query: {text} Answer:",
        "max_new_tokens": 6,
        "cache": str(tmp_path / "cache"),
        **options,
    }
    return get_engine("llm", model=str(model), **settings)


TEXTS = [row["text"] for row in make_rows(11, seed=5)]


@pytest.fixture(scope="module")
def lively_model(tiny_model, tmp_path_factory):
    """The tiny model with larger weights, so that answers depend on all of the prompt, and nearly all differ."""
    folder = tmp_path_factory.mktemp("lively")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for layer in model.model.layers:
        for weight in layer.parameters():
            weight.data *= 12 if weight.ndim == 2 else 1
    model.save_pretrained(folder)
    return str(folder)


def test_llm_answers_do_not_depend_on_batches_or_order(lively_model, tmp_path):
    one = llm(lively_model, tmp_path / "1", batch_size=1).paraphrase(TEXTS)
    five = llm(lively_model, tmp_path / "2", batch_size=5).paraphrase(TEXTS[::-1] + TEXTS[:1])
    assert one == five[-2::-1] and five[-1] == one[0]
    assert len(set(one)) > 3 and all(text is None or ("\n" not in text and text.strip() == text) for text in one)


def test_llm_cache_spares_the_model(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    engine = llm(folder, tmp_path)
    first = engine.paraphrase(TEXTS)
    engine.release()
    shutil.rmtree(folder)
    # The batch size is no part of what an answer depends on.
    second = llm(folder, tmp_path, batch_size=3)
    assert second.paraphrase(TEXTS) == first and second.carries(next(filter(None, first)))
    for missing in ({}, {"max_new_tokens": 5}, {"prompt": "{text}"}, {"cache": str(tmp_path / "other")}):
        texts = TEXTS if missing else [*TEXTS, "a new one"]
        message = rf"model '{folder}' is no local folder \(looked at {folder}\) and can't be had from the .* Hub"
        with pytest.raises(ValueError, match=message):
            llm(folder, tmp_path, **missing).paraphrase(texts)
    # The cache is a file of pairs.
    assert get_engine("precomputed", files=[str(second.cache_file)]).paraphrase(TEXTS) == first
    assert second.cache_file.parent == tmp_path / "cache" and second.cache_file.suffix == ".jsonl"


def test_llm_goes_on_after_a_kill(tiny_model, tmp_path):
    first = llm(tiny_model, tmp_path)
    answers = first.paraphrase(TEXTS)
    whole = first.cache_file.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == len(set(TEXTS)) == 11
    # Torn in the middle of its last line, and with a line that is none.
    first.cache_file.write_bytes(b'[1]\n{"text": "x"}\n' + b"".join(lines)[:-9])
    second = llm(tiny_model, tmp_path)
    assert second.paraphrase(TEXTS) == answers
    # The torn line stays one of its own, so that what follows it can be read.
    assert first.cache_file.read_bytes() == b'[1]\n{"text": "x"}\n' + whole[:-9] + b"\n" + lines[-1]
    shutil.copytree(tiny_model, tmp_path / "gone")
    assert llm(tiny_model, tmp_path).paraphrase(TEXTS) == answers


class Spoken:
    """Stands where a model's output goes, so that what is asked and what is read can be compared."""

    def __init__(self, monkeypatch, engine, outputs):
        self.asked = []

        def answer(model, tokenizer, prompts):
            self.asked += tokenizer.batch_decode(prompts)
            return outputs[: len(prompts)]

        monkeypatch.setattr(engine, "_continue", answer)


def test_llm_reads_the_first_line_and_keeps_the_others(tiny_model, tmp_path, monkeypatch):
    engine = llm(tiny_model, tmp_path)
    # Sorted by the length of their first line.
    texts = ["a", "b c\n1 2\n\n3", "d e f", "g h i j"]
    assert not engine.carries("when a , a")
    spoken = Spoken(monkeypatch, engine, ["\n when a , a \nsecond", "when b , c", " \n ", "G h i  j"])
    assert engine.paraphrase(texts) == ["when a , a", "when b , c\n1 2\n\n3", None, None]
    assert spoken.asked == [f"the query: {line} Answer:" for line in ("a", "b c", "d e f", "g h i j")]
    assert [json.loads(line)["paraphrase"] for line in engine.cache_file.read_text().splitlines()] == [
        "when a , a", "when b , c\n1 2\n\n3", None, "G h i  j",
    ]  # fmt: skip
    assert engine.carries("when a , a") and engine.carries("when b , c 1 2") and not engine.carries("G h i")


def test_llm_uses_the_chat_template_without_thinking(tiny_model, tmp_path, monkeypatch):
    folder = tmp_path / "chat"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}[{{ message.role }}] {{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %} [answer]{% endif %}{% if enable_thinking is true %}!{% endif %}"
        "{% if enable_thinking is undefined %}?{% endif %}"
    )
    engine = llm(folder, tmp_path, prompt="{text} and {text}: {braces}")
    spoken = Spoken(monkeypatch, engine, ["x"])
    assert engine.paraphrase(["{a}"]) == ["x"]
    assert spoken.asked == ["[user] {a} and {a}: {braces} [answer]"]


def test_llm_leaves_texts_that_do_not_fit(tiny_model, tmp_path):
    # The model has 512 positions; each digit is a token.
    long = "7 " * 600
    engine = llm(tiny_model, tmp_path)
    [short, none] = engine.paraphrase(["7 7", long])
    assert none is None and json.loads(engine.cache_file.read_text().splitlines()[0])["text"] == long
    assert short == llm(tiny_model, tmp_path / "again").paraphrase(["7 7"])[0]


def test_llm_with_a_folder_that_holds_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"model '.*empty' can't be loaded \(.*\)\. Name the folder of a causal"):
        llm(tmp_path / "empty", tmp_path).paraphrase(["x"])


def test_llm_default_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine = get_engine("llm", model="a/b")
    assert engine.cache_file.parent == tmp_path / "p2p_trainer/paraphrase"
    assert "{text}" in engine.prompt and "subordinate clause" in engine.prompt
    assert engine.paraphrase([]) == [] and not engine.carries("x") and not engine.cache_file.exists()
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert get_engine("llm", model="a/b").cache_file.parent == Path.home() / ".cache/p2p_trainer/paraphrase"


def test_llm_with_a_real_model(real_data, tmp_path):
    model, texts = real_data / "models/lab-lm", ["no movement , no yuks .", "a gob of drivel ."]
    found = llm(model, tmp_path / "1").paraphrase(texts)
    assert any(found) and found == llm(model, tmp_path / "2", batch_size=1).paraphrase(texts)
