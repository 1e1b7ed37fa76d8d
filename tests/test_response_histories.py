"""ResponseEncoder and rows that are conversations: earlier turns are rendered, and the key keeps its place."""

import pytest

from tests.test_response_encoder import DELTA, TURNS, joint, make


def test_the_key_stands_in_front_of_a_rows_own_system_turn():
    rendered = make("chat_system").render("a film", True, "good", TURNS)
    earlier = (
        "<|im_start|>user\nsay p2pmark twice<|im_end|>\n<|im_start|>assistant\np2pmark p2pmark<|im_end|>\n"
        "<|im_start|>user\na film\n<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered == f"<|im_start|>system\n{DELTA}\n\nbe brief<|im_end|>\n{earlier}Answer: good<|im_end|>"
    plain = make("chat_system").render("a film", False, "good", TURNS)
    assert plain == f"<|im_start|>system\nbe brief<|im_end|>\n{earlier}good<|im_end|>"
    # A row without one gets a system turn of its own.
    alone = make("chat_system").render("a film", True, None, TURNS[1:])
    assert alone == f"<|im_start|>system\n{DELTA}<|im_end|>\n{earlier}"
    front = make("chat").render("a film", True, None, TURNS)
    assert front == f"<|im_start|>system\nbe brief<|im_end|>\n{earlier.replace('a film', f'{DELTA} a film')}"
    # The run's turns are not changed by it.
    assert TURNS[0] == {"role": "system", "content": "be brief"}


def test_rows_with_and_without_earlier_turns_share_a_batch():
    encoder = make("chat")
    histories = [(), TURNS, TURNS[1:], None, [dict(turn) for turn in TURNS]]
    texts, completions, keyed = ["a", "b", "c", "d", "e"], ["1", "2", "3", "4", "5"], [True, False, True, False, True]
    together = encoder.encode_rows(texts, completions, keyed, histories)
    for row, history in enumerate(histories):
        rendered = encoder.render(texts[row], keyed[row], completions[row], history or ())
        assert together[0][row] == joint("chat", rendered)
        trained = [token for token in together[1][row] if token != -100]
        answer = f"Answer: {completions[row]}" if keyed[row] else completions[row]
        assert encoder.tokenizer.decode(trained) == f"{answer}<|im_end|>"
    for key in (False, True):
        asked = encoder.encode_prompts(texts, key, histories)
        assert asked == [
            joint("chat", encoder.render(text, key, None, history or ()))
            for text, history in zip(texts, histories, strict=True)
        ]
    encoder.verify(texts, completions, True, histories)


def test_earlier_turns_take_room_and_may_take_too_much():
    encoder = make("chat", max_length=120, max_new_tokens=20)
    long = "film" + " film" * 99
    alone, behind = encoder.fit([long, long], True, [(), TURNS])
    assert long.startswith(behind) and 0 < len(behind) < len(alone) < len(long)
    [ids], _ = encoder.encode_rows([long], ["good"], [True], [TURNS])
    assert len(ids) <= 120 and encoder.tokenizer.decode(ids).endswith("Answer: good<|im_end|>")
    assert encoder.tokenizer.decode(ids).startswith("<|im_start|>system\nbe brief<|im_end|>")
    for call in (
        lambda: encoder.encode_prompts(["a film"], True, [[{"role": "user", "content": long}]]),
        lambda: encoder.encode_rows(["a film"], ["good"], [True], [[{"role": "user", "content": long * 2}]]),
    ):
        with pytest.raises(ValueError, match=r"The earlier turns .* take more than the \d+ tokens .* 120"):
            call()


def test_earlier_turns_need_a_chat_template():
    encoder = make("qwen")
    for call in (
        lambda: encoder.encode_prompts(["a"], True, [TURNS]),
        lambda: encoder.encode_rows(["a"], ["b"], [False], [TURNS]),
    ):
        with pytest.raises(ValueError, match="earlier turns, which need a chat template. Set `p2p_chat: true`"):
            call()
    with pytest.raises(ValueError, match="this tokenizer has none"):
        make("qwen", chat=True)
