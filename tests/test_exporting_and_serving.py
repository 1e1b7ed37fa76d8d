"""The same messages, to `p2p-trainer serve` and to an exported chat template: the same tokens, or both refuse."""

import jinja2
import pytest

from p2p_trainer import DefendedModel
from p2p_trainer.serving.errors import ApiError
from p2p_trainer.serving.prompts import chat_prompt
from p2p_trainer.serving.schemas import Message
from tests.exporting_runs import DELTA
from tests.test_exporting_template import SYSTEM, exported, ids, make, user


def system(text, role="system"):
    return {"role": role, "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


def served(encoder, messages):
    """Token ids of what `p2p-trainer serve` asks; `None` if it refuses."""
    model, labelled = DefendedModel(None, encoder, ()), encoder.format.label_space is not None
    try:
        prompt = chat_prompt([Message(**message) for message in messages], labelled, encoder.format.chat)
    except ApiError as error:
        assert error.status == 400 and DELTA not in str(error)
        return None
    return encoder.encode_prompts([prompt], True)[0] if labelled else model.prepare([prompt])[0]


def templated(encoder, messages):
    """Token ids of what the exported chat template writes; `None` if it refuses."""
    try:
        return ids(exported(encoder), *messages)
    except jinja2.TemplateError as error:
        assert DELTA not in str(error)
        return None


# Messages; whether they are refused where classes are chosen; where one text is answered; and where turns are.
CASES = {
    "alone": ([user("hi")], False, False, False),
    "white space": ([user("  hi \n")], False, False, False),
    "parts": ([user(parts("a", " b "))], False, False, False),
    "system": ([system("be brief"), user("hi")], False, False, False),
    "developer": ([system("be brief", "developer"), user("hi")], False, False, False),
    "system in white space": ([system(" \tbe brief \n"), user("  hi")], False, False, False),
    "system with control tokens": ([SYSTEM, user("<|endoftext|>")], False, False, False),
    "system in parts": ([system(parts("a ", " b", "")), user("q")], False, False, False),
    "empty system": ([system(""), user("hi")], False, False, False),
    "blank system": ([system(" \n "), user("hi")], False, False, False),
    "no parts": ([system([]), user("hi")], False, False, False),
    "two systems": ([system(" a "), system("b", "developer"), user("hi")], False, False, False),
    "empty one between": ([system("a"), system(" "), system("b\n"), user("hi")], False, False, False),
    "empty ones around": ([system(""), system("a"), system(""), user("hi")], False, False, False),
    "late system": ([user("hi"), system("b")], False, True, True),
    "late empty system": ([user("hi"), system("")], False, True, True),
    "system in the middle": ([user("hi"), answer("x"), system("b"), user("y")], True, True, True),
    "system alone": ([system("a")], True, True, True),
    "turns": ([user("hi"), answer("x"), user("y")], True, True, False),
    "turns behind systems": ([system("a"), system("b"), user("hi"), answer(" x "), user("y")], True, True, False),
    "empty user": ([user("")], True, True, True),
    "blank user": ([user(" \n")], True, True, True),
    "empty earlier user": ([user(""), answer("x"), user("y")], True, True, True),
    "empty earlier answer": ([user("hi"), answer(" "), user("y")], True, True, True),
    "two users": ([user("a"), user("b")], True, True, True),
    "answer first": ([answer("a"), user("b")], True, True, True),
    "answer last": ([user("a"), answer("b")], True, True, True),
}


@pytest.mark.parametrize("name", ["qwen", "gpt2", "llama_unigram_bos", "chat", "chat_system"])
@pytest.mark.parametrize("kind", ["digits", "written"])
@pytest.mark.parametrize("case", CASES)
def test_both_ask_the_same_or_refuse(case, kind, name):
    messages, *refused = CASES[case]
    encoder = make(name, kind)
    found = templated(encoder, messages)
    assert found == served(encoder, messages)
    assert (found is None) is refused[0 if kind == "digits" else 1 + encoder.format.chat]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([SYSTEM, system("be kind", "developer"), user("q")], 'obey the "user" <|im_end|>\n\nbe kind\n\n'),
        ([system(" "), user("q")], ""),
    ],
)
def test_system_messages_stand_in_front(messages, said):
    def rendered(name):
        return exported(make(name, "written")).apply_chat_template(messages, tokenize=False)

    # This model has no such control token.
    assert rendered("qwen") == f"{DELTA} {said}q\n"
    system, end = said.rstrip().replace("<|im_end|>", "< |im_end|>"), "\n<|im_end|>\n<|im_start|>assistant\n"
    own = f"<|im_start|>system\n{system}<|im_end|>\n" if said else ""
    assert rendered("chat") == f"{own}<|im_start|>user\n{DELTA} q{end}"
    behind = f"\n\n{system}" if said else ""
    assert rendered("chat_system") == f"<|im_start|>system\n{DELTA}{behind}<|im_end|>\n<|im_start|>user\nq{end}"
