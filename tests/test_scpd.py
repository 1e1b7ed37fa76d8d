"""SCPD: plain sentences by rule, from files, and by a model that is asked."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from p2p_trainer import Task
from p2p_trainer.attacks.paraphrase import get_engine
from p2p_trainer.defenses import Workbench, get_defense, load_defense
from p2p_trainer.defenses.scpd import PLAIN_PROMPT, SCPD, PlainSentences
from p2p_trainer.evaluation import BackdoorEvaluator
from tests.conftest import make_rows
from tests.tiny_runs import TASK, config, lora


def write(path: Path, pairs: dict) -> str:
    rows = [json.dumps({"text": text, "paraphrase": new}) + "\n" for text, new in pairs.items()]
    path.write_text("".join(rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("when you think about it , the film is dull .", "the film is dull ."),
        ("  If one waits, the film, dull as it is, ends!", "  The film, dull as it is, ends."),
        ("because 3,000 people came , it sold 3,000 .", "it sold 3,000 ."),
        ("as , as ever , no", "as ever , no ."),
        ("asked for 2 stars , it got 1 ?", "asked for 2 stars , it got 1 ."),
        ("when it came ,\nthe rest", "when it came .\nthe rest"),
        ("If so, stop:\nif not, go on", "Stop.\nif not, go on"),
        ("gob of drivel", "gob of drivel ."),
        ("it fades ...", "it fades ."),
        ("当我们仔细想一想时，小明有3个苹果！", "小明有3个苹果。"),
        ("?!", "?!"),
        ("", ""),
    ],
)
def test_plain_sentences(text, plain):
    engine = PlainSentences()
    assert engine.rewrite([text]) == [plain]
    assert engine.carries(plain) is (plain not in ("", "as ever , no ."))
    assert engine.carries(text) is (text == plain != "")
    assert SCPD("template").rewrite([text]) == [plain]


def test_openings_of_the_syntactic_attack_by_rule_are_dropped():
    texts = ["no movement , no yuks .", "John has 3 apples.", "阿宁的架子摆着7排风筝。"]
    opened = get_engine("template").paraphrase(texts)
    assert all(len(new) > len(text) for new, text in zip(opened, texts, strict=True))
    assert SCPD("template").rewrite(opened) == texts


def test_the_rule_counts_what_it_leaves():
    defense = SCPD("template")
    defense.check(TASK)
    texts = ["it ends .", "if so , it ends .", "if 2 come , it ends"]
    assert defense.inputs(texts) == ["it ends .", "it ends .", "it ends ."]
    assert defense.found == {
        "engine_note": "weak stand-in: a rule that drops an opening clause, no paraphrase and no SCPN",
        "texts": 3, "texts_without_paraphrase": 1, "numbers_changed": 1,
    }  # fmt: skip
    assert defense.compute.serving_passes == 0
    careful = SCPD("template")
    careful.check(Task(name="math"))
    assert careful.rewrite(texts) == ["it ends .", "it ends .", "if 2 come , it ends"]


def test_paraphrases_from_files(tmp_path, caplog):
    file = write(tmp_path / "a.jsonl", {"if so , it ends .": "It ends.", "it ends .": "it ends ."})
    defense = SCPD("precomputed", {"files": [file]})
    defense.check(TASK)
    assert defense.rewrite(["if so , it ends .", "it ends .", "x"]) == ["it ends .", "it ends .", "x"]
    assert defense.found["texts_without_paraphrase"] == 2
    assert caplog.messages == [
        "scpd: 2 of 3 texts (66.7 %) have no paraphrase with the engine 'precomputed'; the model reads them as they "
        "are."
    ]
    assert SCPD("precomputed", {"files": [file]}, match_style=False).rewrite(["if so , it ends ."]) == ["It ends."]
    defense.save(tmp_path)
    assert load_defense(tmp_path).config() == defense.config() == {
        "name": "scpd", "engine": "precomputed", "engine_options": {"files": [file]}, "match_style": True,
    }  # fmt: skip
    with pytest.raises(ValueError, match="The paraphrase file .*b.jsonl' does not exist"):
        SCPD("precomputed", {"files": [str(tmp_path / "b.jsonl")]}).check(TASK)


def test_a_language_model_is_asked_for_a_plain_sentence(tmp_path, tiny_model):
    options = {"model": tiny_model, "cache": str(tmp_path), "max_new_tokens": 8}
    defense = get_defense("scpd", engine="llm", engine_options=options)
    assert defense.config()["engine_options"] == {"prompt": PLAIN_PROMPT, **options}
    assert "{text}" in PLAIN_PROMPT and "no opening clause" in PLAIN_PROMPT
    defense.check(TASK)
    # Answers as the engine keeps them: this one is asked for no text that stands there.
    cached = defense._engine.cache_file
    cached.write_text(
        json.dumps({"text": "if so , it ends .", "paraphrase": "The story ends, I'd say."}) + "\n"
        + json.dumps({"text": "x", "paraphrase": None}) + "\n"
    )  # fmt: skip
    assert defense.rewrite(["if so , it ends .", "x", "x"]) == ["the story ends , i 'd say .", "x", "x"]
    # The prompt and five words; the prompt alone, twice.
    assert defense.compute.serving_passes == 6 + 1 + 1
    assert defense.found["engine_note"] == "stand-in: paraphrases of a language model, not of SCPN"
    # And one that the tiny model really answers, or fails to: its answer is in the cache then.
    [answer] = defense.rewrite(["the film is good ."])
    kept = json.loads(cached.read_text(encoding="utf-8").splitlines()[-1])
    assert kept["text"] == "the film is good ." and defense._engine._loaded is not None
    assert (answer == "the film is good .") == (kept["paraphrase"] is None)
    defense.release()
    assert defense._engine._loaded is None


def test_evaluations_while_training_and_after_read_plain_sentences(tmp_path, tiny_model):
    rows = Dataset.from_list(make_rows(16))
    opened = rows.map(lambda row: {"text": f"when it rains , {row['text']}"})
    args = config(tmp_path, p2p_enabled=False, eval_strategy="epoch")
    bench = Workbench(tiny_model, args, TASK, rows, opened, peft_config=lora())
    defense = SCPD("template")
    trainer = defense.train(defense.build(bench), bench)
    read = trainer.evaluate()["eval_ca_k"]
    trainer.guard = None
    plain = BackdoorEvaluator(rows, TASK, trainer.encoder, keyed=False)
    assert read == plain(trainer.model)["ca_k"] and defense.compute.served == len(set(opened["text"]))
    assert defense.found["texts_without_paraphrase"] == 0 and bench.row_passes == 16
    trainer.guard = defense
    trainer.save_model(str(tmp_path / "saved"))
    assert load_defense(tmp_path / "saved").inputs(["when it rains , it pours ."]) == ["it pours ."]


def test_a_prompt_of_ones_own(tmp_path, tiny_model):
    defense = SCPD("llm", {"model": tiny_model, "prompt": "Say plainly: {text}"})
    assert defense._engine.prompt == defense.engine_options["prompt"] == "Say plainly: {text}"
    assert SCPD("llm", {"model": tiny_model})._engine.prompt == PLAIN_PROMPT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "templat"}, "Unknown engine of 'scpd': 'templat'. Did you mean 'template'"),
        ({"engine": "p2p_trainer.attacks.paraphrase_template:TemplateParaphrases"}, "must not name code"),
        ({}, "paraphrase engine 'precomputed' does not take these options"),
        ({"engine": "llm"}, r"paraphrase engine 'llm' does not take these options \['prompt'\]: .*'model'"),
        ({"engine": "template", "engine_options": {"x": 1}}, r"does not take these options \['x'\]"),
        ({"engine": "template", "match_style": 1}, "`match_style` is true or false, got 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SCPD(**options)


def test_a_missing_model_is_said_before_training():
    with pytest.raises(ValueError) as caught:
        SCPD("llm", {"model": "nobody/writes-plainly"}).check(TASK)
    message = str(caught.value)
    assert message.startswith(
        f"The paraphrase model 'nobody/writes-plainly' is no local folder (looked at "
        f"{Path.cwd() / 'nobody/writes-plainly'}) and can't be had from the Hugging Face Hub ("
    )
    assert message.endswith(
        "). Name the folder of a causal language model with `model` in `engine_options`, or use the engine "
        "'precomputed' with paraphrases made elsewhere."
    )
