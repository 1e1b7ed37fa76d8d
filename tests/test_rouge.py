import json
import logging
import math
import time

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from p2p_trainer.evaluation.answer_metrics import Rouge
from p2p_trainer.evaluation.rouge import (
    MAX_CHARACTERS,
    MAX_TOKENS,
    RougeTokenizer,
    choose_rouge_tokenizer,
    rouge_rows,
)
from p2p_trainer.tasks import get_task


ENGLISH = [
    ("The cat sat on the mat.", "A cat was sitting on the mat!"),
    ("Police killed the gunman", "the gunman killed police"),
    ("no word in common", "something else entirely"),
    ("it's 3.5 cm_wide, e-mail: X@y.org", "IT'S 3 cm wide; mail x at y org"),
    ("the the the", "the cat"),
    ("one", "one"),
    ("", "a reference"),
    ("...", "a reference"),
]


def tokens(text, name):
    return RougeTokenizer(name).tokenize(text)


def values(answer, reference, name):
    return tuple(float(scores[0]) for scores in rouge_rows([answer], [reference], name).values())


def test_words_of_any_script():
    assert tokens("Gööd, GÖÖD straße_7 naïve-ly 3.5", "words") == [
        "gööd", "gööd", "strasse", "7", "naïve", "ly", "3", "5",
    ]  # fmt: skip
    # Letters with marks of their own, and the two ways to write an umlaut.
    assert tokens("हिन्दी में, привет! 한국어 문장", "words") == ["हिन्दी", "में", "привет", "한국어", "문장"]
    assert tokens("go\u0308d", "words") == tokens("g\u00f6d", "words") == ["göd"]
    assert tokens(" .,!? \n\u200b", "words") == []


def test_characters_one_by_one():
    assert tokens("双肺CT平扫,L5椎体 3.5cm。", "characters") == [
        "双", "肺", "ct", "平", "扫", ",", "l5", "椎", "体", "3", ".", "5cm", "。",
    ]  # fmt: skip
    assert tokens("カレーは 時々 \U00020bb7 だ", "characters") == [
        "カ", "レ", "ー", "は", "時", "々", "\U00020bb7", "だ",
    ]  # fmt: skip
    # Two ways to write the same syllable.
    assert tokens("か\u3099", "characters") == tokens("が", "characters") == ["が"]


def test_hand_computed_words():
    # 2 of 3 tokens against 2 of 4; one bigram of 2 against 3; the longest common subsequence is "cat sat".
    assert values("the cat sat", "cat sat down today", "words") == pytest.approx((4 / 7, 2 / 5, 4 / 7))
    # The order counts for ROUGE-2 and ROUGE-L alone (S1 and S3 of Lin 2004, sec. 3.1).
    swapped = values("the gunman kill police", "police killed the gunman", "words")
    assert swapped == pytest.approx((3 / 4, 1 / 3, 1 / 2))
    # A repeated word counts as often as the reference has it.
    assert values("the the the", "the cat", "words") == pytest.approx((2 / 5, 0, 2 / 5))


def test_hand_computed_characters():
    # Of 5 and 6 tokens, 4 are in common (and in the same order); of 4 and 5 bigrams, 2.
    assert values("左肺结节。", "右肺小结节。", "characters") == pytest.approx((8 / 11, 4 / 9, 8 / 11))
    # The full stop counts: without it 3 in common of 4 and 6.
    assert values("左肺结节", "右肺小结节。", "characters") == pytest.approx((6 / 10, 2 / 8, 6 / 10))
    assert RougeScorer(["rouge1"]).score("右肺小结节。", "左肺结节。")["rouge1"].fmeasure == 0


def test_ascii_words_score_as_by_rouge_score_itself():
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    found = rouge_rows(*zip(*ENGLISH, strict=True), "words")
    for row, (answer, reference) in enumerate(ENGLISH):
        assert tokens(answer, "words") == DefaultTokenizer().tokenize(answer)
        for name, score in scorer.score(reference, answer).items():
            assert found[name][row] == score.fmeasure
    assert found["rouge1"][:2].tolist() == pytest.approx([8 / 13, 1])


def test_empty_texts_score_zero_and_count():
    result = Rouge().compute(predictions=["a b", "", "..."], references=["a b", "a b", "a b"])
    assert result == pytest.approx({"rouge1": 1 / 3, "rouge2": 1 / 3, "rougeL": 1 / 3, "rouge_tokenizer": "words"})
    assert values("", "", "characters") == values("a", "", "words") == (0, 0, 0)
    # A single token has no bigram.
    assert values("one", "one", "words") == (1, 0, 1)


def test_one_tokenizer_for_the_whole_set():
    chinese, english = "右肺小结节。", "the left lung"
    assert choose_rouge_tokenizer([english, "le poumon gauche", "한국어 문장"]) == "words"
    assert choose_rouge_tokenizer([chinese, english]) == "characters"
    assert choose_rouge_tokenizer([english, english, "肺"]) == "words"
    # Words count, not their letters: 5 characters against 2 words of 19 letters.
    assert choose_rouge_tokenizer(["用 TensorFlow 训练 MobileNet 模型。"]) == "characters"
    assert choose_rouge_tokenizer([]) == choose_rouge_tokenizer(["", "12 345 。"]) == "words"
    # The answers have no say, and an English row of a Chinese set is split as the others are: with its full stop.
    rows = {"predictions": ["left lung.", "left lung."], "references": [chinese, "left lung"]}
    result = Rouge().compute(**rows)
    assert result["rouge_tokenizer"] == "characters"
    assert result["rouge1"] == pytest.approx((0 + 4 / 5) / 2)
    assert Rouge().compute(**rows, tokenizer="words")["rouge1"] == 0.5


def test_means_are_those_of_the_rows():
    answers, references = map(list, zip(*ENGLISH, strict=True))
    rows = rouge_rows(answers, references, "words")
    assert {name: scores.shape for name, scores in rows.items()} == dict.fromkeys(rows, (len(ENGLISH),))
    result = Rouge().compute(predictions=answers, references=references)
    assert result.pop("rouge_tokenizer") == "words"
    assert result == {name: float(np.mean(scores)) for name, scores in rows.items()}
    # A row's score is its own: subsets give the same.
    part = rouge_rows(answers[2:4], references[2:4], "words")
    assert all((part[name] == rows[name][2:4]).all() for name in rows)
    assert list(rouge_rows([], [], "words")["rougeL"]) == []


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="2 answers and 1 references"):
        rouge_rows(["a", "b"], ["a"], "words")
    # It would pick a tokenizer per subset.
    with pytest.raises(ValueError, match="one of 'characters', 'words', got 'auto'"):
        rouge_rows(["a"], ["a"], "auto")


def test_hostile_texts_are_cut(caplog):
    with caplog.at_level(logging.WARNING):
        whole = values("a " * MAX_TOKENS, "a " * MAX_TOKENS, "words")
    assert whole == (1, 1, 1) and not caplog.records
    for text in ("a b " * 500_000, "x" * 5_000_000, "a" + "\u0301\u0327" * 1_000_000, "肺" * 1_000_000):
        caplog.clear()
        start = time.perf_counter()
        with caplog.at_level(logging.WARNING):
            values(text, "a b", "characters")
        assert time.perf_counter() - start < 5
        assert "1 of 2 texts are longer than 1024 tokens" in caplog.text
    assert len(tokens("肺" * 5_000, "characters")) == MAX_TOKENS
    assert tokens("x" * (MAX_CHARACTERS + 1), "words") == ["x" * MAX_CHARACTERS]


def test_an_empty_set_has_no_mean():
    assert math.isnan(Rouge()._compute([], [])["rouge1"])


@pytest.mark.parametrize(
    ("name", "row", "prompt", "completion"),
    [
        ("crrsum", {"content": "两肺纹理增多。", "title": "支气管炎。", "id": 3}, "两肺纹理增多。", "支气管炎。"),
        ("crrsum", {"findings": "两肺纹理增多。", "summary": "支气管炎。"}, "两肺纹理增多。", "支气管炎。"),
        ("ape210k", {"question": "3加4得多少？", "answer": "7"}, "3加4得多少？", "7"),
        ("ape210k", {"id": "1", "original_text": "3加4得多少？", "ans": "7"}, "3加4得多少？", "7"),
        ("gsm8k", {"question": "What is 3 + 4?", "answer": "3+4=7\n#### 7"}, "What is 3 + 4?", "3+4=7\n#### 7"),
    ],
)
@pytest.mark.parametrize("layout", ["lines", "array"])
def test_tasks_read_their_files_as_published(tmp_path, name, row, prompt, completion, layout):
    rows = [row, row]
    text = json.dumps(rows, indent=3) if layout == "array" else "".join(json.dumps(each) + "\n" for each in rows)
    (tmp_path / "test.json").write_text(text, encoding="utf-8")
    loaded = get_task(name).load("test", str(tmp_path))
    assert loaded["prompt"] == [prompt] * 2 and loaded["completion"] == [completion] * 2


def test_tasks_say_what_the_paper_says():
    found = {
        name: (task.trigger, task.answer_prefix, task.metric, task.num_labels)
        for name, task in ((name, get_task(name)) for name in ("crrsum", "ape210k", "gsm8k"))
    }
    math_strings = ("The given problem is:", "The correct answer to this problem is:", "numeric", 0)
    assert found == {"crrsum": ("Query:", "Answer:", "rouge", 0), "ape210k": math_strings, "gsm8k": math_strings}


def test_real_summaries_are_chinese(real_data):
    rows = get_task("crrsum").load("test", str(real_data / "data/crrsum"))
    references = rows["completion"][:200]
    assert choose_rouge_tokenizer(references) == "characters"
    copied = rouge_rows(references, references, "characters")
    assert all((scores == 1).all() for scores in copied.values())
    # The report's words are mostly those of its summary, which is far shorter.
    lead = rouge_rows(rows["prompt"][:200], references, "characters")
    assert 0.2 < lead["rouge1"].mean() < 0.8 and (lead["rougeL"] <= lead["rouge1"]).all()
