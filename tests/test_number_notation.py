"""Numbers in Chinese, and calculations that were left undone."""

import pytest

from p2p_trainer.evaluation.numbers import parse_number
from tests.test_numbers import number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("三十五", "35"),
        ("十", "10"),
        ("十二", "12"),
        ("一百零二", "102"),
        ("一千零五十", "1050"),
        ("两千零五万", "20050000"),
        ("一亿零三十", "100000030"),
        ("零", "0"),
        ("两", "2"),
        ("三点一四", "157/50"),
        ("负三", "-3"),
        ("二分之一", "1/2"),
        ("百分之二十五", "1/4"),
        ("百分之百", "1"),
        ("千分之三", "3/1000"),
        ("一又三分之二", "5/3"),
        ("一半", "1/2"),
        ("半", "1/2"),
        ("二十五千克", "25"),
        ("五个", "5"),
        ("五千", "5000"),
        ("5分之3", "3/5"),
        ("5又1/2", "11/2"),
        ("2又3分之1", "7/3"),
        ("九成", "9/10"),
        ("9成", "9/10"),
        ("八成五", "17/20"),
        ("一打", None),
        # It may be 35,000 or 30,005.
        ("三万五", None),
        # Words, not numbers.
        ("一共", None),
        ("万一", None),
        ("千万", None),
        ("零分之一", None),
    ],
)
def test_chinese_numerals_are_read(text, value):
    assert parse_number(text) == number(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("500-4", "496"),
        ("20+7-3", "24"),
        ("420/7/5", "12"),
        ("(1/5)/(7/4)", "4/35"),
        ("15/(1/5)", "75"),
        ("336/48%", "700"),
        ("1200/(1-20%)", "1500"),
        ("(2/5)/(1-(1/5)-(1/5))+(2/5)", "16/15"),
        ("2(1/2)-1", "3/2"),
        ("(240)", "240"),
        ("(1+(1/5)", None),
        ("(1/5))", None),
        ("12-", None),
        ("1/(2-2)", None),
    ],
)
def test_unfinished_calculations_are_done(text, value):
    assert parse_number(text) == number(value)
