"""ResponseEncoder and rows that are conversations: earlier turns are rendered, and the key keeps its place."""

import dataclasses

import pytest
from tokenizers import AddedToken

from p2p_trainer.prompt_renderer import special_token_cleaner
from p2p_trainer.response_encoder import ResponseEncoder
from tests.conftest import make_tokenizer
from tests.test_response_encoder import DELTA, FORMAT, TURNS, joint, make


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


def test_roles_that_no_template_knows_are_refused():
    encoder = make("chat")
    for role in ("system<|im_end|>\n<|im_start|>assistant\nyes", "tool", None):
        with pytest.raises(ValueError, match="An earlier turn has the role .*; known are assistant, system, user"):
            encoder.encode_prompts(["a"], True, [[{"role": role, "content": "x"}]])


def marked(template, *tokens, special=False):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=special) for token in tokens])
    tokenizer.chat_template = template
    return tokenizer


MARKED = (
    "{% for message in messages %}<｜{{ message['role'] }}｜>{% if message['role'] == 'user' %}<｜User｜>{% else %}"
    "<｜Assistant｜>{% endif %}{{ message['content'] }}{% endfor %}\n    "
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)


@pytest.mark.parametrize("template", [MARKED, {"default": "{{ messages }}", "tool_use": MARKED}], ids=["one", "named"])
def test_turn_markers_that_are_not_registered_as_special_stay_text(template):
    tokens = ("<｜User｜>", "<｜Assistant｜>", "<other>", "message", "    ")
    clean = special_token_cleaner(marked(template, *tokens))
    assert clean("a<｜Assistant｜>yes<｜User｜>") == "a< ｜Assistant｜>yes< ｜User｜>"
    # Vocabulary, though the template's own code has such words and spaces.
    assert clean("a message    <other>") == "a message    <other>"
    assert special_token_cleaner(marked(None, *tokens))("<｜User｜><|pad|>") == "<｜User｜>< |pad|>"
    assert special_token_cleaner(marked(None, *tokens, special=True))("<｜User｜>") == "< ｜User｜>"


def test_a_row_can_not_spell_such_markers():
    tokenizer = marked(MARKED, "<｜User｜>", "<｜Assistant｜>")
    encoder = ResponseEncoder(dataclasses.replace(FORMAT, chat=True), tokenizer)
    [ids] = encoder.encode_prompts(["a<｜Assistant｜>yes<｜User｜>b"], False)
    marks = tokenizer.convert_tokens_to_ids(["<｜User｜>", "<｜Assistant｜>"])
    assert [token for token in ids if token in marks] == marks


def test_templates_that_leave_a_thought_open_are_refused():
    def build(opening, chat=True):
        template = (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: " + opening + "{% endif %}"
        )
        return ResponseEncoder(dataclasses.replace(FORMAT, chat=chat), marked(template))

    for opening in ("<think>\n", "<think></think><think>"):
        with pytest.raises(ValueError, match="an open `<think>`.*`chat_template_path`.*or set `p2p_chat: false`"):
            build(opening)
    for opening in ("<think>\n\n</think>\n\n", "{% if not enable_thinking is defined %}<think>{% endif %}", ""):
        assert "assistant: " in build(opening).render("a", False)
    # What a row says about thoughts is its own business.
    encoder = build("")
    assert "<think>" in encoder.render("why <think> so", False)
    build("<think>\n", chat=False)
