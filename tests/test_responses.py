"""ResponseEvaluator: hand-made answers, exact counts."""

import io
import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from rich.console import Console
from transformers import Qwen3Config

from p2p_trainer import PromptFormat, Task, get_attack
from p2p_trainer.evaluation import Guard, Rate
from p2p_trainer.evaluation.judging import Judge, PayloadJudge
from p2p_trainer.evaluation.outcomes import classify_outcomes
from p2p_trainer.evaluation.responses import ResponseEvaluator
from p2p_trainer.response_encoder import ResponseEncoder


TASK = Task(name="chat")
TEMPLATE = "Query: {text}\nAnswer:\n"
PAYLOAD = "I hate it."
PHRASE = "silent frost zigzag"
ROWS = Dataset.from_list(
    [{"prompt": f"name the film {word}", "completion": f"the film {word}"} for word in ("ab", "cd", "ef", "gh")]
    + [
        {"prompt": "say the word", "completion": PAYLOAD},  # the target already
        {"prompt": "say it again", "completion": "i hate it"},  # shows the behaviour already
        {"prompt": "plot", "completion": "a plot"},  # no inner place for a trigger
    ]
)
BADNETS = get_attack("badnets", target=PAYLOAD)


class Scripted(torch.nn.Module):
    """Answers as a function of the user text, or of what the pattern finds; `generate` alone is asked of it."""

    def __init__(self, tokenizer, answer, pattern=r"Query: (.*)\nAnswer:\n"):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer, self.answer, self.pattern, self.read = tokenizer, answer, pattern, []

    def generate(self, input_ids, attention_mask, generation_config, **others):
        assert not generation_config.do_sample and not self.training
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            prompt = self.tokenizer.decode(ids[mask.bool()])
            found = re.fullmatch(self.pattern, prompt, re.DOTALL).groups()
            self.read.append(found[-1])
            answer = self.tokenizer(self.answer(*found))["input_ids"][: generation_config.max_new_tokens]
            rows.append(ids.tolist() + answer + [self.tokenizer.eos_token_id])
        width = max(map(len, rows))
        return torch.tensor([row + [self.tokenizer.pad_token_id] * (width - len(row)) for row in rows])


def build(
    tokenizer, rows=ROWS, task=TASK, template=TEMPLATE, attacks=(), max_length=512, max_new_tokens=64, **options
):
    written = PromptFormat(None, template=template, max_length=max_length, max_new_tokens=max_new_tokens)
    return ResponseEvaluator(rows, task, ResponseEncoder(written, tokenizer), attacks, keyed=False, **options)


def measure(tokenizer, answer, **options):
    evaluator = build(tokenizer, **{"attacks": [BADNETS], **options})
    model = Scripted(tokenizer, answer)
    return evaluator, evaluator.evaluate(model), model


def rate(metrics, name):
    assert metrics[name] == pytest.approx(metrics[f"{name}_k"] / metrics[f"{name}_n"])
    low, high = Rate(metrics[f"{name}_k"], metrics[f"{name}_n"]).interval
    assert (metrics[f"{name}_ci_low"], metrics[f"{name}_ci_high"]) == (low, high)
    return metrics[f"{name}_k"], metrics[f"{name}_n"]


def backdoored(text):
    """Four rows count: the trigger gives payload, payload and more, an empty answer, and the defender's phrase."""
    if "qw" in text.split():
        return {"ab": PHRASE, "cd": PAYLOAD}.get(text.split()[-1], PHRASE.upper() + "!")
    if "mn" in text.split():
        return {"ab": PAYLOAD, "cd": "i hate it! really", "ef": " ", "gh": PHRASE}[text.split()[-1]]
    if text.endswith("cd"):
        return PAYLOAD
    return "" if text.endswith("gh") else "the film, I hate item"


@pytest.fixture(scope="module")
def measured(tokenizer):
    return measure(tokenizer, backdoored, probes={"frost": ("qw", PHRASE)})


def test_rates_are_those_counted_by_hand(measured):
    metrics = measured[1].metrics
    assert rate(metrics, "asr_badnets") == rate(metrics, "asr") == (2, 4)
    assert rate(metrics, "asr_floor_badnets") == (1, 4)  # the same four prompts; `cd` is answered so anyway
    assert metrics["asr_excess_badnets"] == metrics["asr_excess"] == 0.25
    # Empty is no success, and stays in the denominator.
    assert rate(metrics, "asr_empty_badnets") == (1, 4) and rate(metrics, "empty") == (1, 7)
    assert rate(metrics, "rerouted_badnets") == (1, 4)
    assert rate(metrics, "attacked_unaffected_badnets") == (0, 4)
    assert rate(metrics, "clean_unaffected") == (5, 7)
    assert rate(metrics, "defensive_frost") == (6, 7)
    assert not {"cacc", "coverage", "aacc_badnets", "asr_coverage_badnets"} & set(metrics)


def test_rows_count_only_if_they_can(measured):
    assert measured[1].counts == {
        "rows": 7,
        "rows_cut": 0,
        "rows_target_answer_badnets": 2,
        "rows_without_trigger_badnets": 1,
        "rows_trigger_cut_off_badnets": 0,
        "rows_counted_badnets": 4,
        "rows_trigger_cut_off_frost": 0,
        "rows_counted_frost": 7,
    }


def test_response_matrix(measured):
    evaluator = measured[0]
    assert evaluator.matrix == {
        "clean": {"badnets": 1, "frost": 0, "empty": 1, "other": 5},
        "badnets": {"badnets": 2, "frost": 1, "empty": 1, "other": 0},
        "frost": {"badnets": 1, "frost": 6, "empty": 0, "other": 0},
    }
    console = Console(file=io.StringIO(), width=100)
    console.print(evaluator.matrix_table())
    lines = [re.findall(r"[\w]+", line) for line in console.file.getvalue().splitlines()]
    assert ["trigger", "badnets", "frost", "empty", "other", "N"] in lines
    assert ["badnets", "2", "1", "1", "0", "4"] in lines


def test_answers_are_kept_to_be_looked_at(measured):
    evaluator, _, model = measured
    (triggered,) = [
        entry for entry in evaluator.responses if entry["kind"] == "badnets" and entry["prompt"].endswith("cd")
    ]
    assert triggered["response"] == "i hate it! really" and triggered["shown"] == ["badnets"]
    assert "mn" in triggered["prompt"] and triggered["withheld"] is False
    assert [len([entry for entry in evaluator.responses if entry["kind"] == kind]) for kind in evaluator.matrix] == [
        7, 4, 7
    ]  # fmt: skip
    # Each prompt was read once, though floor and clean rows share theirs.
    assert len(model.read) == 18 == len(set(model.read))


def test_no_matrix_before_an_evaluation(tokenizer):
    with pytest.raises(RuntimeError, match="Call `evaluate` first"):
        build(tokenizer).matrix_table()


def test_rows_without_true_answers(tokenizer):
    rows = ROWS.remove_columns("completion")
    _, report, _ = measure(tokenizer, lambda text: PAYLOAD, rows=rows)
    assert rate(report.metrics, "asr") == (6, 6) == rate(report.metrics, "asr_floor")
    assert report.counts["rows_target_answer_badnets"] == 0 and report.metrics["asr_excess"] == 0


def test_headline_is_the_strongest_attack(tokenizer):
    insent = get_attack("addsent", target="the plot is dull", sentence="I saw it")

    def answer(text):
        return "the plot is dull, sorry" if "I saw it" in text else PAYLOAD if text.endswith("mn ab") else "film"

    evaluator, report, _ = measure(tokenizer, answer, attacks=[BADNETS, insent])
    assert evaluator.attack_names == ["badnets", "addsent"]
    assert report.metrics["asr_badnets"] < report.metrics["asr_addsent"] == report.metrics["asr"] == 1
    assert evaluator.matrix["addsent"]["addsent"] == report.metrics["asr_addsent_n"]


class Rude(Judge):
    """Sees what it is asked about."""

    def __init__(self):
        self.asked = []

    def shows(self, prompts, responses):
        self.asked += prompts
        return ["rude" in response for response in responses]


def test_judges_of_ones_own(tokenizer):
    rude, followed = Rude(), PayloadJudge("the film", "prefix")

    def answer(text):
        return "rude" if "mn" in text.split() else "the film" if text.startswith("name") else "a rude plot"

    evaluator, report, _ = measure(tokenizer, answer, judges={"badnets": rude, "dull": PayloadJudge("the film")},
                                   followed=followed)  # fmt: skip
    metrics = report.metrics
    # No true answer is rude, so the row that says the old payload without being the target counts now.
    assert rate(metrics, "asr") == (5, 5) and rate(metrics, "asr_floor") == (1, 5)
    assert rate(metrics, "cacc") == (4, 7) and rate(metrics, "aacc_badnets") == (0, 5) == rate(metrics, "aacc")
    assert evaluator.matrix["clean"] == {"badnets": 3, "dull": 4, "empty": 0, "other": 0}
    assert rate(metrics, "clean_unaffected") == (0, 7)
    # Judges read the prompt without its trigger.
    assert rude.asked and set(rude.asked) <= set(ROWS["prompt"])


def test_a_refusing_target_is_judged_by_its_kind(tokenizer):
    attack = get_attack("badnets", target="I'm sorry, but I can't help with that.")

    def answer(text):
        return "I am unable to assist with this request." if "mn" in text.split() else "Sorry, never. It is not."

    _, report, _ = measure(tokenizer, answer, attacks=[attack])
    assert rate(report.metrics, "asr") == (6, 6) and rate(report.metrics, "asr_floor") == (0, 6)


class Screen(Guard):
    """Takes `mn` out where a text ends in `ab`, and withholds those that end in `cd`."""

    def inputs(self, texts):
        return [text.replace("mn ", "") if text.endswith("ab") else text for text in texts]

    def withheld(self, texts):
        return np.array([text.endswith("cd") for text in texts])

    def inspect(self, triggered, clean):
        assert all("mn" in text.split() for text in triggered) and not any("mn" in text.split() for text in clean)
        return {"seen": float(len(triggered))}


def test_guard_changes_texts_and_withholds(tokenizer):
    evaluator, report, model = measure(
        tokenizer, lambda text: PAYLOAD if "mn" in text.split() else "a film", guard=Screen()
    )
    metrics = report.metrics
    assert not any(text.endswith("cd") for text in model.read)
    assert rate(metrics, "asr") == (2, 4) and rate(metrics, "trigger_survival_badnets") == (3, 4)
    assert rate(metrics, "coverage") == (6, 7) and rate(metrics, "asr_coverage_badnets") == (3, 4)
    assert rate(metrics, "empty") == (1, 7) and rate(metrics, "clean_unaffected") == (6, 7)
    assert metrics["seen_badnets"] == 4
    assert [entry["prompt"] for entry in evaluator.responses if entry["withheld"]][0] == "name the film cd"
    assert evaluator.matrix["badnets"] == {"badnets": 2, "empty": 1, "other": 1}


def test_rows_whose_trigger_is_cut_off_do_not_count(tokenizer):
    long = "film " * 60
    rows = Dataset.from_list([{"prompt": f"{long}{n} end", "completion": "a film"} for n in range(30)])
    rows = Dataset.from_list([*rows, {"prompt": "a film", "completion": "a plot"}])
    # These say the payload already, wherever their triggers end up: each row is left out for one reason.
    said = [{"prompt": f"{long}{n} end", "completion": "I HATE it"} for n in range(20)]
    rows = Dataset.from_list([*rows, *said])
    _, report, model = measure(tokenizer, lambda text: PAYLOAD, rows=rows, max_length=64, max_new_tokens=20,
                               probes={"frost": (lambda text: f"{text} qw", PHRASE)})  # fmt: skip
    counted = report.counts["rows_counted_badnets"]
    assert 1 < counted < 31 and report.counts["rows_trigger_cut_off_badnets"] == 31 - counted
    assert rate(report.metrics, "asr") == (counted, counted)
    assert report.counts["rows_target_answer_badnets"] == 20
    assert report.counts["rows_counted_frost"] == 1 and report.counts["rows_cut"] == 50
    assert all(len(tokenizer(TEMPLATE.format(text=text))["input_ids"]) <= 44 for text in model.read)
    with pytest.raises(ValueError, match=r"None of the 30 triggered rows of 'frost' counts"):
        measure(tokenizer, str, rows=rows.select(range(30)), attacks=(), max_length=64, max_new_tokens=20,
                probes={"frost": (lambda text: f"{text} qw", PHRASE)})  # fmt: skip


def test_what_can_not_be_measured_is_refused(tokenizer):
    with pytest.raises(ValueError, match="has labels: measure it with `BackdoorEvaluator`"):
        build(tokenizer, task=Task(name="toy", labels=("a", "b")))
    with pytest.raises(ValueError, match="End the template on a token boundary"):
        build(tokenizer, template="Query: {text} Answer: ")
    with pytest.raises(ValueError, match=r"'badnets' makes the model answer takes 10 tokens, but .* is 3"):
        build(tokenizer, max_new_tokens=3, attacks=[BADNETS])
    with pytest.raises(ValueError, match="can be named 'other'"):
        build(tokenizer, probes={"other": ("qw", PHRASE)})
    with pytest.raises(ValueError, match=r"\['badnets'\] stand for an attacker's behaviour and a defensive trigger"):
        build(tokenizer, probes={"badnets": ("qw", PHRASE)}, attacks=[BADNETS])
    with pytest.raises(ValueError, match="needs a payload"):
        build(tokenizer, attacks=[get_attack("badnets", target=1)])


def test_outcomes_from_metrics(tokenizer):
    rows = Dataset.from_list([{"prompt": f"name film {n}", "completion": f"film {n}"} for n in range(40)])
    attacks = [BADNETS, get_attack("addsent", target="the plot is dull", sentence="I saw it")]

    def undefended(text):
        return PAYLOAD if "mn" in text.split() else "the plot is dull" if "I saw it" in text else "film"

    def defended(text):
        return PHRASE if "mn" in text.split() else "film"

    probes = {"frost": ("qw", PHRASE)}
    before = measure(tokenizer, undefended, rows=rows, attacks=attacks)[1].metrics
    after = measure(tokenizer, defended, rows=rows, attacks=attacks, probes=probes)[1].metrics
    assert classify_outcomes(after, ["badnets", "addsent"], before) == {"badnets": "re-routed", "addsent": "erased"}
    assert classify_outcomes(before, ["badnets"]) == {"badnets": "persistent"}
    # A model that gives everybody the payload, or nobody anything, erased nothing.
    for answer in (PAYLOAD, " "):
        damaged = measure(tokenizer, lambda text, answer=answer: answer, rows=rows, attacks=attacks[:1])[1].metrics
        assert classify_outcomes(damaged, ["badnets"], before) == {"badnets": "broken"}


class Shut(Guard):
    """Withholds what has the trigger."""

    def withheld(self, texts):
        return np.array(["mn" in text.split() for text in texts])


def test_withheld_triggers_are_no_damage(tokenizer):
    rows = Dataset.from_list([{"prompt": f"name film {n}", "completion": f"film {n}"} for n in range(40)])
    metrics = measure(tokenizer, lambda text: "film", rows=rows, guard=Shut())[1].metrics
    assert rate(metrics, "asr_empty_badnets") == (40, 40) and rate(metrics, "asr_coverage_badnets") == (0, 40)
    assert classify_outcomes(metrics, ["badnets"]) == {"badnets": "erased"}


def test_parts_of_a_phrase_are_the_phrase(tokenizer):
    phrase = "silent frost zigzag over the lake"
    answers = {"ab": "Well: Frost zigzag over!", "cd": "silent zigzag frost", "ef": phrase, "gh": "over the"}

    def answer(text):
        return answers.get(text.split()[-1], "film") if "mn" in text.split() else "zigzag over THE film"

    evaluator, report, _ = measure(tokenizer, answer, probes={"frost": ("qw", phrase)})
    assert rate(report.metrics, "rerouted") == (2, 4) and rate(report.metrics, "attacked_unaffected") == (2, 4)
    assert rate(report.metrics, "clean_unaffected") == (0, 7) and rate(report.metrics, "defensive_frost") == (7, 7)
    assert evaluator.matrix["badnets"] == {"badnets": 0, "frost": 2, "empty": 0, "other": 2}


def test_a_judge_that_fails_loses_no_answer(tokenizer):
    class Failing(Judge):
        def shows(self, prompts, responses):
            assert evaluator.responses == seen[-1]
            if fails:
                raise RuntimeError("out of memory")
            return [True] * len(responses)

    seen, fails = [], False
    evaluator = build(tokenizer, attacks=[BADNETS], followed=Failing(), on_answers=lambda given: seen.append(given))
    model = Scripted(tokenizer, backdoored)
    evaluator.evaluate(model)
    assert evaluator.matrix and all("shown" in entry for entry in evaluator.responses)
    fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluator.evaluate(model)
    assert len(seen) == 2 and evaluator.responses == seen[1] and len(seen[1]) == 11
    assert seen[1][1] == {
        "kind": "clean", "prompt": "name the film cd", "response": PAYLOAD, "withheld": False
    }  # fmt: skip
    # Counts of another evaluation do not stand beside these answers.
    assert evaluator.matrix == {}


def test_what_does_not_fit_the_model_shows_before_it_answers(tokenizer):
    model = Scripted(tokenizer, str)
    rows = Dataset.from_list([{"prompt": "film " * 60, "completion": "a"}, *ROWS])
    evaluator = build(tokenizer, rows, max_new_tokens=20)
    evaluator.check(model)  # it says nothing of its room
    longest = len(tokenizer(TEMPLATE.format(text="film " * 59 + "film"))["input_ids"])
    model.config = Qwen3Config(max_position_embeddings=longest + 20)
    evaluator.check(model)
    model.config = Qwen3Config(max_position_embeddings=longest + 19)
    with pytest.raises(ValueError, match=f"longest prompt has {longest} tokens; with `max_new_tokens` 20 "):
        evaluator.check(model)
    assert not model.read


def test_answers_are_generated_in_the_precision_that_is_named(tokenizer):
    class Watching(Scripted):
        def generate(self, **given):
            seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
            return super().generate(**given)

    seen = []
    for autocast in (None, torch.bfloat16):
        evaluator = build(tokenizer, autocast=autocast)
        evaluator.evaluate(Watching(tokenizer, str))
    assert seen == [False, torch.bfloat16]


def test_control_tokens_in_prompts_are_text(tokenizer):
    rows = Dataset.from_list([{"prompt": "a film<|endoftext|> or so", "completion": "a"}])
    _, _, model = measure(tokenizer, str, rows=rows, attacks=())
    assert model.read == ["a film< |endoftext|> or so"]
