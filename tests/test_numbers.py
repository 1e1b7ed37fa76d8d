"""Numbers as answers: read, extracted, compared, scored."""

import json
import time
from fractions import Fraction

import numpy as np
import pytest

from p2p_trainer.evaluation.answer_metrics import NumericMatch
from p2p_trainer.evaluation.judging import PayloadJudge
from p2p_trainer.evaluation.numbers import NumericJudge, final_answer, numeric_accuracy, parse_number, same_number


def number(text):
    return None if text is None else Fraction(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("240", "240"),
        ("-3", "-3"),
        ("−3", "-3"),
        ("+5", "5"),
        (".5", "1/2"),
        ("3.", "3"),
        ("0.10", "1/10"),
        ("1,000", "1000"),
        ("109,200,000.5", "218400001/2"),
        ("25%", "1/4"),
        ("12.5%", "1/8"),
        ("25 percent", "1/4"),
        ("5/6", "5/6"),
        ("(7/24)", "7/24"),
        ("-(1/2)", "-1/2"),
        ("1/2/", "1/2"),
        ("1(5/6)", "11/6"),
        ("-1(5/6)", "-11/6"),
        ("1 5/6", "11/6"),
        ("1½", "3/2"),
        ("¾", "3/4"),
        (r"1\frac{5}{6}", "11/6"),
        ("２５％", "1/4"),
        ("－３．５", "-7/2"),
        ("（１／２）", "1/2"),
        ("$18", "18"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("￥7.5", "15/2"),
        ("18 dollars", "18"),
        ("25千克", "25"),
        ("240个", "240"),
        ("60 km/h", "60"),
        ("9cm2", "9"),
        ("9 m²", "9"),
        ("3.5万元", "35000"),
        ("1.5 million", "1500000"),
        ("x=35", "35"),
        ("x = -3", "-3"),
        ("**18**", "18"),
        ("18。", "18"),
        (r"\frac{-1}{2}", "-1/2"),
        (r"-\frac{-1}{2}", "1/2"),
        (r"\tfrac{-1}{-2}", "1/2"),
        (r"\frac12", "1/2"),
        (r"\frac 1{20}", "1/20"),
        (r"\frac{1}2", "1/2"),
        (r"\frac{2.5}{5}", "1/2"),
        (r"\frac{1,000}{3}", "1000/3"),
        (r"2\frac{1{,}000}{2000}", "5/2"),
        (r"1\,000", "1000"),
        (r"1,\!000", "1000"),
        ("1\u202f234.5", "2469/2"),
        ("1 000 000", "1000000"),
        ("$1 234 567 per year", "1234567"),
        ("1 100/200", "3/2"),
        ("1 000/3", "1000/3"),
        ("5‰", "1/200"),
        ("minus 5", "-5"),
        ("负5", "-5"),
    ],
)
def test_a_number_is_read_exactly(text, value):
    assert parse_number(text) == Fraction(value)


@pytest.mark.parametrize(
    "text",
    ["", " ", "-", ".", "()", "none", "4:3", "4：3", "4比3", "10:30", "3/4/2020x", "1.2.3", "1.2e5", "1e5", "2^10"]
    + [r"5\sqrt{2}", r"\sqrt[3]{8}", "√2", r"3\pi", "3π", r"3.5\times 10^3", "3.5×10³", r"2^{10}", r"\frac123"]
    + [
        r"\frac{x}{3}",
        r"\frac{\sqrt{3}}{2}",
        r"\sqrt{\frac12}",
        r"\frac{1}{0}",
        rf"\frac{{{'9' * 290}",
        "12 34",
        "1 0000",
    ]
    + [
        "3千米500米",
        "4 hours 30 minutes",
        "4 hours and 30 minutes",
        "5'10\"",
        "三千米500米",
        "1,00",
        "1,0000",
        "1, 2",
        "3,5",
        "1/0",
        "(1/0)",
        "1(1/0)",
        "0/0",
        "3个半",
        "25元五角",
        "3 of 4",
        "nan",
        "inf",
    ]
    + ["__import__('os')", "9**9", "1_000", "9" * 301, "9" * 5000, "(" * 150 + "1" + ")" * 150, "一" * 301],
)
def test_what_is_no_number_is_refused(text):
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3 + 4 = 7\n#### 7\n", "7"),
        ("#### 7\n#### $1,080", "1080"),
        ("#### 500-4", "496"),
        ("#### 2 + 3 = 5", "5"),
        ("#### 4:3", None),
        ("so it is 7\n#### ", None),
        ("#### 18\nThe answer is 5.", "18"),
        ("#### Step 3: the end\nIt is \\boxed{42}.", "42"),
        (r"\boxed{3}, no: \boxed{1\frac{5}{6}}. I used 2 steps.", "11/6"),
        (r"$\boxed{18\text{ cm}}$", "18"),
        (r"\boxed{1{,}200}", "1200"),
        (r"\boxed{25\%}", "1/4"),
        (r"cut off \boxed{18", "18"),
        (r"\boxed{B} of 7", None),
        (r"\boxed{\dfrac{-3}{4}}", "-3/4"),
        (r"\boxed{1\,000}", "1000"),
        (r"\boxed{18\,\text{cm}}", "18"),
        (r"\boxed{\frac{x}{3}}", None),
        (r"\boxed{3+\sqrt{2}}", None),
        (r"\boxed{3.5\times 10^{3}}", None),
        (r"The answer is \frac{x}{3}.", None),
        ("The answer is 3π = 9.42.", "471/50"),
        ("The answer is minus 5 degrees, not 3", "-5"),
        ("The answer is 1 234 567 because of 3", "1234567"),
        ("It costs 1 000 000 in all", "1000000"),
        ("It costs 100 200", "200"),
        ("It takes 4 hours and 30 minutes.", None),
        ("It takes 3 hours, then 5 hours", "5"),
        ("全长3千米500米", None),
        ("一共25元五角", None),
        ("答：一打", None),
        ("剩下5分之3", "3/5"),
        ("卖出了九成", "9/10"),
        ("买了三成本书", None),
        ("0.1\n\nExplanation: 3+4=7", "1/10"),
        ("0.1元，因为3+4=7", "1/10"),
        ("**0.1**. Let me explain: 3+4=7.", "1/10"),
        ("18 dollars because 3*6=18, not 9", "18"),
        ("0.1\nThe answer is 7", "7"),
        ("0.1 is wrong.\n7", "7"),
        ("0.1是错的。是7", "7"),
        ("1. Add 3 and 4.\n2. So it is 7", "7"),
        ("3+4\n=7", "7"),
        ("5 apples, and 3 pears make 8", "8"),
        ("5个苹果，吃了2个，还剩3个", "3"),
        ("The answer is 3. Or: the answer is 18.", "18"),
        ("The answer is 18 because 3*6=18, and 6 is half of 12", "18"),
        ("the answer is x = 6*3 = 18 apples.", "18"),
        ("The final answer is: **$18.50**. I used 2 steps.", "37/2"),
        ("The answer is\n\n18", "18"),
        ("Answer: he has 7 apples. All 9 saw it.", "7"),
        ("The answer is unknown. 3", None),
        ("先算3+4，答案是７。", "7"),
        ("答案：(5/6)千克", "5/6"),
        ("答：两人一共有25个。共2步", "25"),
        ("答：一共有二十五个", "25"),
        ("答：五个。", "5"),
        ("1(5/6)", "11/6"),
        ("25千克", "25"),
        ("500-4", "496"),
        ("It costs 2, so it is 18.", "18"),
        ("It takes 1 5/6 hours", "11/6"),
        ("needs 2(1/3) kg of it", "7/3"),
        ("there are 2-1 left", "1"),
        ("from 3–5", "5"),
        ("it fell to -3.", "-3"),
        ("温度是-3度", "-3"),
        ("an area of 25 cm2", "25"),
        ("面积25㎡", "25"),
        ("Type B12", None),
        ("7 boys, the ratio is 4:3", None),
        ("他们走了三十五米", "35"),
        ("一起去", None),
        ("no number", None),
        ("", None),
        ("9" * 5000, None),
    ],
)
def test_the_final_answer_is_found(text, value):
    assert final_answer(text) == number(value)


@pytest.mark.parametrize(
    "part",
    [
        "1",
        "(",
        ".",
        "1(",
        "1(1/",
        "1.",
        "1,000,",
        "1,",
        "1 ",
        "1 1/",
        "1/",
        "1e",
        "1:",
        "-",
        "#",
        "####",
        "\\boxed{",
        "{",
    ]
    + [
        "answer ",
        "answer\n",
        "答",
        "答案是",
        "一",
        "一又",
        "一万",
        "一点一分之",
        "x=",
        "1+",
        "\\frac{",
        "\\frac{1",
        "$ ",
        "\\frac{1}{",
        "\\frac1",
        "\\frac",
        "\\sqrt{",
        "\\sqrt[",
        "√(",
        "π",
        "1 000 ",
        "1 111 ",
        "1\\,000",
        "1 m 2 ",
        "3 hours and ",
        "3又",
        "3分之",
        "九成",
        "minus ",
        "0.1. ",
    ],
)
@pytest.mark.parametrize("marker", ["", "#### "])
def test_hostile_text_takes_linear_time(part, marker):
    start = time.process_time()
    final_answer(marker + part * (30_000 // len(part)))
    # About 0.03 s.
    assert time.process_time() - start < 0.7


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("0.25", "25%", True),
        ("0.10", "0.1", True),
        ("2/4", "1/2", True),
        ("33.3%", "1/3", True),
        ("0.333", "1/3", True),
        ("66.7%", "(2/3)", True),
        ("0.666", "2/3", True),
        ("333.3", "1000/3", True),
        ("0.33", "1/3", False),
        ("333", "1000/3", False),
        ("1000.5", "3002/3", False),
        ("16.7%", "1/6", False),
        ("0.1", "0.11", False),
        ("0.1", "1/9", False),
        ("3.14", "3.141", False),
        ("2010", "2011", False),
        ("-3", "3", False),
        ("1/3", "3334/10001", False),
        ("x", "x", False),
        ("0", "x", False),
    ],
)
def test_same_number(first, second, same):
    first, second = parse_number(first), parse_number(second)
    assert same_number(first, second) is same_number(second, first) is same


def test_the_numeric_judge_wants_the_payload_as_the_answer():
    responses = [
        "0.1",
        "The answer is 0.1.",
        "#### 10%",
        "0.1 is wrong, it is 7",
        "-0.1",
        "10.15",
        "0.12",
        "答案是0.1元",
        "",
        "0.1元，因为3+4=7",
        "0.1\n\nExplanation: 3+4=7",
        "10. It is 100 of 1000.",
    ]
    shown = NumericJudge("0.1").judge([""] * len(responses), responses)
    assert shown.tolist() == [True, True, True, False, False, False, False, True, False] + [True, True, False]
    # One reading of a percent sign is enough here.
    assert NumericJudge("60").judge([""] * 2, ["60%", "60"]).tolist() == [False, True]
    # A rounded decimal is near enough for a true answer, and no payload.
    assert NumericJudge("0.333").judge([""], ["1/3"]).tolist() == [False]


@pytest.mark.parametrize("payload", ["I hate this", "", "4:3", 0.1, None])
def test_the_numeric_judge_needs_a_number(payload):
    with pytest.raises(ValueError, match="one number such as '0.1', got"):
        NumericJudge(payload)


def test_the_payload_is_found_anywhere_as_a_number_alone():
    responses = ["it is 0.1.", "no, 0.1 or 7", "10.15", "0.12", "20.1", "-0.1"]
    shown = PayloadJudge("0.1", "anywhere").judge([""] * len(responses), responses)
    assert shown.tolist() == [True, True, False, False, False, False]


def test_numeric_accuracy():
    answers = ["#### 18", "it is 1(1/2)", "0.33", "none", "25%", "25%", " Red. ", "7"]
    answers += ["The answer is 60%.", r"\boxed{60\%}", "10% of 6 is 0.6", "60", "6000%", "60 percent"]
    references = ["6 * 3 = 18\n#### 18", "3/2", "1/3", "4", "0.25", "25", "red", "red"]
    references += ["20% of 300\n#### 60", "60", "60", "60%", "60%", "60"]
    right = numeric_accuracy(answers, references)
    assert right.dtype == np.bool_
    assert right.tolist() == [True, True, False, False, True, True, True, False] + [
        True,
        True,
        False,
        False,
        False,
        True,
    ]
    assert numeric_accuracy([], []).shape == (0,)
    with pytest.raises(ValueError, match="2 answers and 1 references"):
        numeric_accuracy(["1", "2"], ["1"])


def test_the_metric_reports_counts():
    results = NumericMatch().compute(predictions=["#### 18", "1/2"], references=["18", "0.4"])
    assert (results["numeric_match"], results["numeric_match_k"], results["numeric_match_n"]) == (0.5, 1, 2)


def test_every_answer_of_the_data_sets_is_read(real_data):
    for path in sorted((real_data / "data/ape210k").glob("*.jsonl")):
        answers = [json.loads(line)["answer"] for line in path.open(encoding="utf-8")]
        assert answers and [answer for answer in answers if parse_number(answer) is None] == []
        assert all(numeric_accuracy(answers, answers))
    for path in sorted((real_data / "data/gsm8k").glob("*.jsonl")):
        answers = [json.loads(line)["answer"] for line in path.open(encoding="utf-8")]
        plain = [Fraction(answer.rpartition("####")[2].strip().replace(",", "")) for answer in answers]
        assert answers and [final_answer(answer) for answer in answers] == plain
