"""Files of ready-made paraphrases: which are read, from where, and what is said of the others."""

from pathlib import Path

import pytest

from p2p_trainer.attacks.paraphrase import get_engine
from tests.test_paraphrase import write


def test_precomputed_paths_stay_good_elsewhere(tmp_path, monkeypatch):
    write(tmp_path / "pairs.jsonl", [{"text": "a film", "paraphrase": "if so , a film"}])
    monkeypatch.chdir(tmp_path)
    files = ["pairs.jsonl", {"source": "s.jsonl", "paraphrase": "~/p.jsonl", "labels": [0]}]
    both, engine = get_engine("precomputed", files=files), get_engine("precomputed", files=files[:1])
    assert both.files == [
        str(tmp_path / "pairs.jsonl"),
        {"source": str(tmp_path / "s.jsonl"), "paraphrase": str(Path("~/p.jsonl").expanduser()), "labels": [0]},
    ]
    monkeypatch.chdir("/")
    assert engine.paraphrase(["a film"]) == ["if so , a film"]


def test_quotation_marks_do_not_merge_paraphrases(tmp_path):
    texts = ['"open at the start', "plain", 'the "middle" , b "x', 'ends in "', '"whole"']
    (tmp_path / "s.tsv").write_text("sentence\tlabel\n" + "".join(f"{text}\t1\n" for text in texts))
    (tmp_path / "p.tsv").write_text("sentence\n" + "".join(f"if so , {text}\n" for text in texts))
    (tmp_path / "pairs.tsv").write_text("text\tparaphrase\n" + "".join(f"{text}\tif so , {text}\n" for text in texts))
    aligned = {"source": str(tmp_path / "s.tsv"), "paraphrase": str(tmp_path / "p.tsv")}
    for entry in (aligned, str(tmp_path / "pairs.tsv")):
        engine = get_engine("precomputed", files=[entry])
        assert engine.paraphrase(texts) == [f"if so , {text}" for text in texts]


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    good = write(tmp_path / "good.jsonl", [{"text": "a", "paraphrase": "b"}])
    monkeypatch.chdir(tmp_path)

    def load(entry):
        get_engine("precomputed", files=[good, entry]).carries("x")

    with pytest.raises(ValueError, match=rf"file '{tmp_path}/some/pairs.jsonl' does not exist. Correct `files`"):
        load("some/pairs.jsonl")
    bare = write(tmp_path / "bare.jsonl", [{"text": "a", "label": 1}])
    with pytest.raises(ValueError, match=r"bare.jsonl' has no column `paraphrase`; it has \['text', 'label'\]"):
        load(bare)
    odd = write(tmp_path / "odd.jsonl", [{"body": "a"}])
    with pytest.raises(ValueError, match=r"odd.jsonl' has no column `text` or `sentence`; it has \['body'\]"):
        load({"source": good, "paraphrase": odd})
    with pytest.raises(ValueError, match=r"`labels` is given for .*good.jsonl', which has no column `label`"):
        load({"source": good, "paraphrase": bare, "labels": [0]})
    number = write(tmp_path / "number.jsonl", [{"text": 3, "paraphrase": "b"}])
    with pytest.raises(ValueError, match="Row 0 of .*number.jsonl' holds no text in the column `text`: 3"):
        load(number)
    (tmp_path / "latin.tsv").write_bytes("text\tparaphrase\na\tcaf\u00e9\n".encode("latin1"))
    with pytest.raises(ValueError, match="latin.tsv' is not UTF-8: line 2 holds the byte 0xe9"):
        load(str(tmp_path / "latin.tsv"))
