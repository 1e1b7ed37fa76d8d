"""Conversations: the last question, its answer, and the turns before them."""

import pytest
from datasets import Dataset, List, Value

from p2p_trainer import Task
from p2p_trainer.tasks import get_task
from p2p_trainer.tasks.conversations import split_conversations, split_question


TASK = Task(name="talk", text_columns=("prompt",), label_column="completion")
SYSTEM = {"role": "system", "content": "be brief"}
ASK = {"role": "user", "content": "name a film"}
ANSWER = {"role": "assistant", "content": "the plot"}
MORE = {"role": "user", "content": "and one more"}
LAST = {"role": "assistant", "content": "the cast"}


def rows(*conversations, column="messages", **more):
    return Dataset.from_dict({column: list(conversations), **more})


def test_messages_become_question_answer_and_what_was_before():
    given = rows(
        [ASK, ANSWER], [SYSTEM, ASK, ANSWER], [SYSTEM, ASK, ANSWER, MORE, LAST], poisoned=[True, False, False]
    )
    prepared = TASK.prepare(given, what="train")
    assert prepared.to_list() == [
        {"poisoned": True, "prompt": "name a film", "completion": "the plot", "history": []},
        {"poisoned": False, "prompt": "name a film", "completion": "the plot", "history": [SYSTEM]},
        {"poisoned": False, "prompt": "and one more", "completion": "the cast", "history": [SYSTEM, ASK, ANSWER]},
    ]
    # Prepared rows stay as they are, also through a file that holds no earlier turn at all.
    assert TASK.prepare(prepared).to_list() == prepared.to_list()
    empty = Dataset.from_list([{"prompt": "a", "completion": "b", "history": []}])
    assert empty.features["history"] == List(Value("null")) and TASK.prepare(empty).to_list() == empty.to_list()


def test_turns_in_prompt_and_completion_are_the_same_rows():
    given = Dataset.from_list(
        [
            {"prompt": [ASK], "completion": [ANSWER]},
            {"prompt": [SYSTEM, ASK, ANSWER, MORE], "completion": [LAST]},
            {"prompt": [ASK], "completion": [ANSWER, MORE, LAST]},
        ]
    )
    same = rows([ASK, ANSWER], [SYSTEM, ASK, ANSWER, MORE, LAST], [ASK, ANSWER, MORE, LAST])
    assert TASK.prepare(given).to_list() == TASK.prepare(same).to_list()
    assert get_task("chat").prepare(given).to_list() == TASK.prepare(same).to_list()


def test_questions_without_answers():
    task = TASK.replace(label_column=None)
    expected = [{"prompt": "and one more", "history": [ASK, ANSWER], "completion": ""}]
    assert task.prepare(rows([ASK, ANSWER, MORE])).to_list() == expected
    assert task.prepare(rows([ASK, ANSWER, MORE], column="prompt")).to_list() == expected
    assert split_question([ASK, ANSWER, MORE]) == ([ASK, ANSWER], "and one more")
    assert split_question([{**ASK, "name": "me"}]) == ([], "name a film")


def test_rows_that_are_no_conversations_stay_as_they_are():
    plain = Dataset.from_list([{"prompt": "a", "completion": "b", "messages": "x"}])
    assert split_conversations(plain) is plain
    # LLaMA-Factory's rows have such a column as well.
    other = Dataset.from_list([{"prompt": "a", "completion": "b", "history": [["q", "r"]]}])
    with pytest.raises(ValueError, match="Column 'history' of the train dataset holds List.*Rename or remove it"):
        TASK.prepare(other, what="train")


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([ASK], r"turns must be `user` and `assistant` in turn.*end in `assistant`; found \['user'\]"),
        ([SYSTEM], r"found \['system'\]"),
        ([], r"found \[\]"),
        ([ASK, ANSWER, LAST], r"found \['user', 'assistant', 'assistant'\]"),
        ([ANSWER, ASK, ANSWER], r"found \['assistant', 'user', 'assistant'\]"),
        ([ASK, SYSTEM, ANSWER], r"found \['user', 'system', 'assistant'\]"),
        ([SYSTEM, SYSTEM, ASK, ANSWER], r"found \['system', 'system', "),
        ([{"role": "tool", "content": "1"}, ANSWER], r"found \['tool', 'assistant'\]"),
        ([ASK, {"role": "assistant", "content": None}], "both texts; found .*Images and tools in turns"),
        (None, r"is no conversation \(found None\)"),
    ],
)
def test_what_is_wrong_names_the_row(turns, message):
    given = rows([ASK, ANSWER], turns)
    with pytest.raises(ValueError, match="Row 1 of the train dataset.*" + message):
        TASK.prepare(given, what="train")


def test_images_in_turns_are_refused():
    part = {"role": "user", "content": [{"type": "text", "text": "what is it"}]}
    with pytest.raises(ValueError, match="Row 0 of the eval dataset.*Images and tools in turns are not supported"):
        TASK.prepare(rows([part]), what="eval")
    with pytest.raises(ValueError, match="Row 3 of the given dataset.*Images and tools"):
        split_question([part], 3)


def test_other_refusals():
    with pytest.raises(ValueError, match="conversations in 'prompt', but no column 'completion'"):
        TASK.prepare(rows([ASK], column="prompt"), what="train")
    with pytest.raises(ValueError, match=r"end in `user`; found \['user', 'assistant'\]"):
        split_question([ASK, ANSWER])
    with pytest.raises(ValueError, match="Row 2 of the given dataset is no conversation"):
        split_question({"role": "user"}, 2)
    empty = [{"role": "user", "content": " "}, ANSWER]
    with pytest.raises(ValueError, match="Column 'prompt', row 1 of the train dataset is empty"):
        TASK.prepare(rows([ASK, ANSWER], empty), what="train")
    kept = TASK.prepare(rows([ASK, ANSWER], empty), what="train", drop_empty=True)
    assert kept["prompt"][:] == ["name a film"]


def test_a_thousand_and_one_rows_keep_their_numbers():
    good = [ASK, ANSWER]
    with pytest.raises(ValueError, match="Row 1001 of the train dataset"):
        TASK.prepare(rows(*[good] * 1001, [ASK]), what="train")
