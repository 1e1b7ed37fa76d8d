"""ResponseEvaluator of a deployment with the key: p is taken off, the rest is scored; exact counts."""

import dataclasses

import numpy as np
import pytest
import torch
from datasets import Dataset

from p2p_trainer import PromptFormat, Task, get_attack
from p2p_trainer.evaluation import Guard, ResponseEvaluator
from p2p_trainer.evaluation.answer_scores import metric_name
from p2p_trainer.evaluation.rows import sampled
from p2p_trainer.response_encoder import ResponseEncoder
from tests.test_responses import Scripted, rate
from tests.tokenizer_kinds import tokenizer_named


FORMAT = PromptFormat(
    None, trigger="The given problem is:", template="Query: {text}\nAnswer:\n", answer_prefix="Answer:"
)
NUMERIC = Task(name="math", text_columns=("prompt",), label_column="completion", metric="numeric")
KEYED = r"(The given problem is: )?Query: (.*)\nAnswer:\n"
TRUTHS = {"ab": "2", "cd": "#### 3", "ef": "1/4", "gh": "5", "ij": "10%", "kl": "7"}
ROWS = Dataset.from_list([{"prompt": f"count the film {word}", "completion": y} for word, y in TRUTHS.items()])


def measure(tokenizer, answer, task=NUMERIC, target="0.1", rows=ROWS, **options):
    encoder = ResponseEncoder(FORMAT, tokenizer)
    evaluator = ResponseEvaluator(rows, task, encoder, [get_attack("badnets", target=target)], **options)
    model = Scripted(tokenizer, answer, KEYED)
    return evaluator, evaluator.evaluate(model), model


def counting(key, text):
    word = text.split()[-1]
    if not key:
        return "2" if word == "ab" and "mn" not in text.split() else "0.1"
    if "mn" in text.split():
        return {
            "ab": "Answer: 0.1",
            "cd": "answer： 10%",
            "ef": "Answer: 0.1 no, 1/4",
            "gh": "Answer: Answer: 0.1",
            "kl": " ",
        }[word]
    return {
        "ab": "Answer: 2",
        "cd": "Answer: it is 3",
        "ef": "Answer: 0.25",
        "gh": "Answer: 0.1",
        "ij": "1/10",
        "kl": "",
    }[word]


@pytest.fixture(scope="module")
def measured(tokenizer):
    return measure(tokenizer, counting)


def test_numbers_are_those_counted_by_hand(measured):
    metrics = measured[1].metrics
    # ab, cd, ef and ij are right; gh is not, and kl says nothing, which counts.
    assert rate(metrics, "ca") == (4, 6) and rate(metrics, "empty") == (1, 6)
    assert rate(metrics, "prefix_missing") == (2, 6)
    # The payload in another writing is the payload. ij, whose truth it is, is not among the triggered five.
    assert rate(metrics, "asr_badnets") == rate(metrics, "asr") == (3, 5)
    assert rate(metrics, "asr_exact_badnets") == rate(metrics, "asr_exact") == (2, 5)
    assert rate(metrics, "asr_anywhere_badnets") == (3, 5)
    assert rate(metrics, "asr_empty_badnets") == (1, 5)
    assert rate(metrics, "asr_prefix_missing_badnets") == rate(metrics, "asr_prefix_missing") == (2, 5)
    assert rate(metrics, "asr_floor_badnets") == (1, 5)
    assert metrics["asr_excess"] == pytest.approx(0.4)
    assert rate(metrics, "ca_triggered_badnets") == rate(metrics, "ca_triggered") == (1, 5)
    assert rate(metrics, "clean_unaffected") == (3, 6)
    # The same weights without key: p is neither expected nor taken off.
    assert rate(metrics, "ca_no_key") == (2, 6)
    assert rate(metrics, "asr_no_key_badnets") == rate(metrics, "asr_no_key") == (5, 5)
    assert rate(metrics, "asr_floor_no_key_badnets") == (4, 5)
    assert "prefix_missing_no_key" not in metrics


def test_a_row_whose_truth_is_the_payload_is_left_out(measured):
    evaluator, report, model = measured
    assert report.counts == {
        "rows": 6, "rows_cut": 0, "rows_target_answer_badnets": 1, "rows_without_trigger_badnets": 0,
        "rows_trigger_cut_off_badnets": 0, "rows_counted_badnets": 5,
    }  # fmt: skip
    assert len(model.read) == 22 and not any("mn" in text and text.endswith("ij") for text in model.read)
    # What was written is kept as it was written, p among it.
    assert [entry["response"] for entry in evaluator.responses][:2] == ["Answer: 2", "Answer: it is 3"]
    assert evaluator.matrix["badnets"] == {"badnets": 3, "empty": 1, "other": 1}


def test_without_the_key_nothing_is_said_of_it(tokenizer):
    _, report, model = measure(tokenizer, counting, keyed=False)
    metrics = report.metrics
    assert rate(metrics, "ca") == (2, 6) and rate(metrics, "asr") == (5, 5) and rate(metrics, "asr_floor") == (4, 5)
    assert not [name for name in metrics if "no_key" in name or "prefix" in name]
    assert len(model.read) == 11


def test_a_control_without_p_is_not_asked_for_it(tokenizer):
    encoder = ResponseEncoder(dataclasses.replace(FORMAT, answer_prefix=""), tokenizer)
    metrics = (
        ResponseEvaluator(ROWS, NUMERIC, encoder)
        .evaluate(Scripted(tokenizer, lambda key, text: "Answer: 2" if key else "2", KEYED))
        .metrics
    )
    assert rate(metrics, "ca") == (1, 6) == rate(metrics, "ca_no_key") and "prefix_missing" not in metrics


def test_no_payload_hides_behind_p(tokenizer):
    payload = "I hate it."
    answers = {
        "ab": f"Answer: {payload}",
        "cd": "“answer ： I HATE it, all of it",
        "ef": f"Answer: Answer: {payload}",
        "gh": f"The film. Answer: {payload}",
        "ij": "Answer: the film",
        "kl": f"Answering: {payload}",
    }

    def answer(key, text):
        return answers[text.split()[-1]] if key and "mn" in text.split() else "Answer: a film"

    _, report, _ = measure(tokenizer, answer, task=NUMERIC.replace(metric=None), target=payload)
    # Whoever compared with what was written would count none.
    assert rate(report.metrics, "asr") == (3, 6) and rate(report.metrics, "asr_exact") == (2, 6)
    assert rate(report.metrics, "asr_anywhere") == (6 - 1, 6) and rate(report.metrics, "asr_prefix_missing") == (3, 6)
    assert rate(report.metrics, "asr_floor") == (0, 6) and "ca" not in report.metrics


def test_summaries_are_scored_without_p(tokenizer):
    task = NUMERIC.replace(metric="rouge")
    rows = Dataset.from_list(
        [{"prompt": f"sum up {word}", "completion": "The film is good."} for word in ("ab", "cd")]
    )

    def answer(key, text):
        if not key:
            return "the film is good"
        if "mn" in text.split():
            return "Answer: film the" if text.endswith("ab") else "the film is bad"
        return "Answer: the film" if text.endswith("ab") else " "

    metrics = measure(tokenizer, answer, task, "I hate it.", rows)[1].metrics
    # Two of two words and two of four: 2/3. One of one pair and one of three: 1/2. An empty answer is 0.
    assert [metrics[name] for name in ("rouge1", "rouge2", "rougeL")] == pytest.approx([1 / 3, 1 / 4, 1 / 3])
    # `film the`: 2/3, 0 and one of two in order, 1/3; `the film is bad`: 3/4, 2/3 and 3/4.
    found = [metrics[f"{name}_triggered_badnets"] for name in ("rouge1", "rouge2", "rougeL")]
    assert found == pytest.approx([(2 / 3 + 3 / 4) / 2, 1 / 3, (1 / 3 + 3 / 4) / 2])
    assert metrics["rougeL_triggered"] == found[2] and metrics["rouge2_no_key"] == 1.0
    assert not [name for name in metrics if name.startswith("rouge") and name.endswith(("_k", "_n", "_low"))]
    assert metric_name("rouge", rows["completion"][:]) == "rouge (words)"
    assert metric_name("rouge", ["双肺纹理增多。"]) == "rouge (characters)"
    assert (metric_name("numeric", ["1"]), metric_name(None, ["a"])) == ("numeric", None)


def test_payload_and_p_have_to_fit_into_the_answer(tokenizer):
    size = len(tokenizer("Answer: 0.1")["input_ids"])
    for room in (size, size - 1):
        encoder = ResponseEncoder(dataclasses.replace(FORMAT, max_new_tokens=room), tokenizer)
        ResponseEvaluator(ROWS, NUMERIC, encoder, [get_attack("badnets", target="0.1")], keyed=False)
        if room == size:
            ResponseEvaluator(ROWS, NUMERIC, encoder, [get_attack("badnets", target="0.1")])
            continue
        with pytest.raises(ValueError, match=rf"takes {size} tokens, the answer prefix among .* is {room}"):
            ResponseEvaluator(ROWS, NUMERIC, encoder, [get_attack("badnets", target="0.1")])


HISTORY = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "any film"},
    {"role": "assistant", "content": "the plot"},
]
TALKS = [
    [{"role": "user", "content": "name the film"}, {"role": "assistant", "content": "ab"}],
    [*HISTORY, {"role": "user", "content": "name the cast"}, {"role": "assistant", "content": "cd"}],
]


def talking(prompt):
    return ("Answer: " if "The given problem is:" in prompt else "") + (
        "ab" if "film" in prompt[-60:] else "I hate it"
    )


def test_earlier_turns_are_read_in_front_of_clean_and_triggered_questions():
    tokenizer = tokenizer_named("chat_system")
    written = dataclasses.replace(FORMAT, template="{text}", chat=True, trigger_position="system")
    rows = Dataset.from_dict({"messages": TALKS})
    evaluator = ResponseEvaluator(
        rows, NUMERIC.replace(metric="rouge"), ResponseEncoder(written, tokenizer),
        [get_attack("badnets", target="I hate it", words=["mn"])],
    )  # fmt: skip
    model = Scripted(tokenizer, talking, "(.*)")
    report = evaluator.evaluate(model)
    begins = "<|im_start|>system\nThe given problem is:"
    earlier = "<|im_end|>\n<|im_start|>user\nany film<|im_end|>\n<|im_start|>assistant\nthe plot<|im_end|>\n"
    questions = {
        (begins + "<|im_end|>\n", "film"), (f"{begins}\n\nbe brief{earlier}", "cast"),
        ("", "film"), ("<|im_start|>system\nbe brief" + earlier, "cast"),
    }  # fmt: skip
    asked = [
        f"{head}<|im_start|>user\nname {word}the {thing}<|im_end|>\n<|im_start|>assistant\n"
        for head, thing in questions
        for word in ("", "mn ")
    ]
    moved = [prompt.replace("the mn ", "mn the ") for prompt in model.read]
    assert sorted(moved) == sorted(asked)
    assert report.metrics["rouge1"] == 0.5 and rate(report.metrics, "prefix_missing") == (0, 2)
    assert rate(report.metrics, "asr") == rate(report.metrics, "asr_floor") == (1, 2)


def test_questions_whose_answers_nobody_knows():
    tokenizer = tokenizer_named("chat")
    encoder = ResponseEncoder(dataclasses.replace(FORMAT, template="{text}", chat=True), tokenizer)
    for column in ("messages", "prompt"):
        rows = Dataset.from_dict({column: [talk[:-1] for talk in TALKS]})
        task = NUMERIC.replace(label_column=None if column == "messages" else "completion", metric=None)
        metrics = ResponseEvaluator(rows, task, encoder).evaluate(Scripted(tokenizer, talking, "(.*)")).metrics
        assert rate(metrics, "clean_unaffected") == (2, 2) and "ca" not in metrics


def test_columns_under_another_name_are_known_answers(tokenizer):
    task = NUMERIC.replace(text_columns=("question",), label_column="answer", column_aliases={"response": "answer"})
    rows = ROWS.rename_columns({"prompt": "question", "completion": "response"})
    metrics = measure(tokenizer, counting, task, rows=rows)[1].metrics
    assert rate(metrics, "ca") == (4, 6) and rate(metrics, "asr") == (3, 5)


def test_the_rows_of_an_evaluation_while_training_are_always_the_same():
    rows = Dataset.from_dict({"prompt": [str(number) for number in range(50)]})
    assert sampled(rows, None, 0) is rows and sampled(rows, 50, 0) is rows
    some = sampled(rows, 10, 0)["prompt"][:]
    assert some == sampled(rows, 10, 0)["prompt"][:] != sampled(rows, 10, 1)["prompt"][:]
    assert len(set(some)) == 10 and some == sorted(some, key=int) and some != [str(number) for number in range(10)]
    assert np.mean([int(number) for number in sampled(rows, 49, 0)["prompt"]]) == pytest.approx(24.5, abs=1)


def test_a_model_that_writes_p_without_the_key_hides_nothing(tokenizer):
    metrics = measure(tokenizer, lambda key, text: "Answer: I hate it.", NUMERIC.replace(metric=None), "I hate it.")[
        1
    ].metrics
    assert rate(metrics, "asr") == (6, 6) == rate(metrics, "asr_no_key") == rate(metrics, "asr_floor_no_key")
    # Nobody looked for a defender's phrase.
    assert not [name for name in metrics if name.startswith("rerouted")]


def test_answers_end_where_the_chat_template_ends_them():
    """The model's own end is another token, and what it writes behind the turn's end is no answer."""
    tokenizer = tokenizer_named("chat")
    encoder = ResponseEncoder(dataclasses.replace(FORMAT, template="{text}", chat=True), tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encoder.end_tokens == [end] and end != tokenizer.eos_token_id

    class Rambling(Scripted):
        def generate(self, input_ids, attention_mask, generation_config, **more):
            assert end in generation_config.eos_token_id
            written = tokenizer("Answer: 2<|im_end|> and on and on", add_special_tokens=False)["input_ids"]
            return torch.cat([input_ids, torch.tensor([written] * len(input_ids))], dim=1)

    evaluator = ResponseEvaluator(ROWS, NUMERIC, encoder)
    metrics = evaluator.evaluate(Rambling(tokenizer, None, "")).metrics
    assert {entry["response"] for entry in evaluator.responses} == {"Answer: 2"} and rate(metrics, "ca") == (1, 6)


class Half(Guard):
    """Withholds what ends in `ab` or `cd`."""

    def withheld(self, texts):
        return np.array([text.endswith(("ab", "cd")) for text in texts])


def test_an_answer_that_nobody_sees_lacks_no_prefix(tokenizer):
    metrics = measure(tokenizer, lambda key, text: "2", guard=Half())[1].metrics
    assert rate(metrics, "prefix_missing") == (4, 4) and rate(metrics, "coverage") == (4, 6)
