"""Cutting: as little as is needed, whatever stands at the end of a text."""

import pytest

from p2p_trainer import LabelSpace, PromptEncoder, PromptFormat
from p2p_trainer.cutting import longest_start
from p2p_trainer.response_encoder import ResponseEncoder


def test_the_longest_beginning_is_found_in_few_tries():
    tries = []

    def fits(start):
        tries.append(start)
        return len(start) <= 1234

    assert longest_start("x" * 100_000, fits) == "x" * 1234 and len(tries) <= 17
    assert (
        longest_start("ab  cd", lambda start: len(start) < 5) == "ab"
        and longest_start("ab", lambda start: False) == ""
    )


@pytest.mark.parametrize("tail", [" 1" * 900, "😀" * 200, "这" * 200])
def test_a_dense_end_takes_no_more_than_it_must(tokenizer, tail):
    text = "the film is good and the plot is fine . " * 4 + tail
    for encoder in (
        ResponseEncoder(PromptFormat(None, max_length=200, max_new_tokens=50), tokenizer),
        PromptEncoder(PromptFormat(LabelSpace(("0", "1"), ("2", "3")), max_length=150), tokenizer),
    ):
        [fitting] = encoder.fit([text], True)
        [ids] = encoder.encode_prompts([fitting], True)
        assert text.startswith(fitting) and 135 <= len(ids) <= 150 and len(fitting) > 150
