"""Back-translation: looks of texts by rule, translations from files, a tiny Marian model that really runs."""

import json
import logging
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, MarianConfig, MarianMTModel, PreTrainedTokenizerFast

from p2p_trainer import Task
from p2p_trainer.attacks import get_attack
from p2p_trainer.defenses import get_defense, load_defense
from p2p_trainer.defenses.back_translation import BackTranslation
from p2p_trainer.defenses.translation import MarianTranslator, detokenise, restyle
from p2p_trainer.evaluation import BackdoorEvaluator
from p2p_trainer.label_space import LabelSpace
from p2p_trainer.prompt_encoder import PromptEncoder
from p2p_trainer.prompt_format import PromptFormat
from tests.conftest import make_rows
from tests.tiny_runs import TASK


MATH = Task(name="math")


def write(path: Path, pairs: dict) -> str:
    rows = [json.dumps({"text": text, "paraphrase": new}) + "\n" for text, new in pairs.items()]
    path.write_text("".join(rows), encoding="utf-8")
    return str(path)


def precomputed(folder: Path, pairs: dict, **options) -> BackTranslation:
    return BackTranslation("precomputed", {"files": [write(folder / "pairs.jsonl", pairs)]}, **options)


def save_marian(folder: Path, tokenizer, seed: int, room: int = 24) -> str:
    """A tiny model that has seen some sentences, so that most of what it says ends, each at its own place."""
    torch.manual_seed(seed)
    config = MarianConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=room, dropout=0.0,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        decoder_start_token_id=tokenizer.pad_token_id, forced_eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = MarianMTModel(config)
    lines = [row["text"].capitalize() for row in make_rows(64, seed=9 + seed)]
    read = tokenizer(
        [line for line in lines if len(tokenizer(line)["input_ids"]) < room], padding=True, return_tensors="pt"
    ).to(model.device)
    ends = torch.full((len(read["input_ids"]), 1), tokenizer.eos_token_id)
    labels = torch.cat([read["input_ids"].masked_fill(read["attention_mask"] == 0, tokenizer.eos_token_id), ends], 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(**read, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config.bad_words_ids = [[tokenizer.pad_token_id]]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict:
    folder = tmp_path_factory.mktemp("marian")
    return {"to": save_marian(folder / "to", tokenizer, 0), "back": save_marian(folder / "back", tokenizer, 1)}


class Dictionary:
    """In the place of a model: a translation for each line, 3 passes each."""

    def __init__(self, pairs):
        self.pairs = pairs
        self.asked = []

    def translate(self, lines):
        self.asked += lines
        return [(self.pairs[line], 3) for line in lines]


def with_dictionaries(there: dict, back: dict, **options) -> BackTranslation:
    defense = BackTranslation(**options)
    defense._translators = (Dictionary(there), Dictionary(back))
    return defense


@pytest.mark.parametrize(
    ("text", "cased"),
    [
        ("it 's a charming , funny film .", "It's a charming, funny film."),
        ("i ca n't say . i 'm 20 % sure !", "I can't say. I'm 20% sure!"),
        ("`` fine '' , he said -lrb- twice -rrb- .", '"Fine", he said (twice).'),
        ("the \" good \" one costs $ 3 ( or 3.50 ) .", 'The "good" one costs $3 (or 3.50).'),
        ("slow ... but why ?\nwell , so .", "Slow... but why?\nWell, so."),
        ("The U.S. team , it seems , won .", "The U.S. team, it seems, won."),
        ("gob of drivel", "Gob of drivel"),
    ],
)  # fmt: skip
def test_looks_by_rule(text, cased):
    assert detokenise(text) == cased
    assert restyle(cased, like=text) == text.replace('" good "', '" good "').replace("$ 3", "$3").replace(" %", "%")
    assert BackTranslation("detokenise").rewrite([text]) == [cased]


@pytest.mark.parametrize("text", ["John has 3,000 apples. Why?", "he said so, twice", "x = 3", "", "小明有3个苹果。"])
def test_written_texts_are_left_alone(text):
    expected = "X = 3" if text == "x = 3" else text
    assert detokenise(text) == expected and restyle(text, like="It is.") == text


def test_style_of_another_text():
    cased = "Mr. Lee’s film isn't bad: it cost 3,000.50 at 5:30 … “Why?” he asks."
    assert restyle(cased, like="the film .") == (
        "mr. lee 's film is n't bad : it cost 3,000.50 at 5:30 ... \" why ? \" he asks ."
    )
    assert restyle(cased, like="The film .").startswith("Mr. Lee 's film is n't")
    assert restyle(cased, like="the film, no") == cased.lower()


def test_translations_from_files(tmp_path, caplog):
    pairs = {"a good film .": "A nice movie.", "a dull plot .": "A boring plot.", "Two stars": "two stars"}
    defense = precomputed(tmp_path, pairs, match_style=False)
    defense.check(TASK)
    texts = ["a  good film . ", "a cold cast .", "a dull plot .", "a cold cast .", " ", "Two stars"]
    expected = ["A nice movie.", "a cold cast .", "A boring plot.", "a cold cast .", " ", "two stars"]
    with caplog.at_level(logging.WARNING, logger="p2p_trainer"):
        assert defense.inputs(texts) == expected
        assert defense.inputs(["another", "a dull plot ."]) == ["another", "A boring plot."]
    assert caplog.messages == [
        "back_tr: 1 of 5 texts (20.0 %) have no translation with the engine 'precomputed'; the model reads them as "
        "they are."
    ]
    assert defense.found == {
        "engine_note": "translations made elsewhere; what they cost is not counted",
        "texts": 6, "texts_without_translation": 2, "numbers_changed": 0,
    }  # fmt: skip
    assert defense.compute.served == 8 and defense.compute.serving_passes == 0
    assert precomputed(tmp_path, pairs).rewrite(texts[:3]) == ["a nice movie .", "a cold cast .", "a boring plot ."]


def test_changed_numbers_are_counted_and_on_generation_tasks_undone(tmp_path):
    pairs = {
        "Tim has 3 apples.\nHe eats 2.": "Tim owns three apples.\nHe consumes 2.",
        "It is 5 km.\nGo.": "It's five km. Go.",
        "Of it 20 % or 3,000 left": "Left are 20% of 3000",
    }
    plain, careful = precomputed(tmp_path, pairs), precomputed(tmp_path, pairs)
    plain.check(TASK)
    careful.check(MATH)
    assert plain.rewrite(list(pairs)) == list(pairs.values())
    # Where lines do not match, the whole text stays.
    kept = ["Tim has 3 apples.\nHe consumes 2.", "It is 5 km.\nGo.", "Left are 20% of 3000"]
    assert careful.rewrite(list(pairs)) == kept
    assert plain.found["numbers_changed"] == careful.found["numbers_changed"] == 2
    careful.save(tmp_path)
    loaded = load_defense(tmp_path)
    assert loaded.config() == careful.config() and loaded.rewrite(list(pairs)) == kept


def test_lines_go_there_and_back():
    there = {"Fine film.": "Feiner Film.", "It's dull.": "Es ist fad.", "So what?": None}
    back = {"Feiner Film.": "Nice movie.", "Es ist fad.": "It is boring."}
    defense = with_dictionaries(there, back)
    texts = ["fine film .\n\n  it 's dull .\n3 + 4", "it 's dull .", "so what ?", "12 !"]
    new = ["nice movie .\n\n  it is boring .\n3 + 4", "it is boring .", "so what ?", "12 !"]
    assert defense.rewrite(texts) == new
    # Every line once; those without a letter never.
    assert defense._translators[0].asked == ["Fine film.", "It's dull.", "So what?"]
    assert defense._translators[1].asked == ["Feiner Film.", "Es ist fad."]
    # `12 !` has nothing to translate; it is not missing.
    assert defense.found["texts_without_translation"] == 1 and defense.found["lines_left"] == 1
    # 6 for a line there and back: 12, 6, and 3 for the line that failed on its way.
    assert defense.compute.serving_passes == 21
    assert defense.rewrite(texts[1:2] * 2) == new[1:2] * 2
    assert defense.compute.serving_passes == 33 and len(defense._translators[0].asked) == 3
    raw = with_dictionaries({"it 's dull .": "es ist fad."}, {"es ist fad.": "It is boring."}, match_style=False)
    assert raw.rewrite(["it 's dull ."]) == ["It is boring."]


def test_a_real_model_translates_alike_in_every_batch(marian, tokenizer):
    lines = [row["text"] for row in make_rows(12, seed=3)] + ["so what", "the film", "a " * 30]
    results = []
    for batch_size, order in ((1, lines), (4, lines), (4, lines[::-1])):
        translator = MarianTranslator(marian["to"], 3, 16, batch_size)
        found = dict(zip(order, translator.translate(order), strict=True))
        assert found == dict(zip(order, translator.translate(order), strict=True))
        results.append(found)
    assert results[0] == results[1] == results[2]
    found = results[0]
    assert found["a " * 30] == (None, 0) and len(tokenizer("a " * 30)["input_ids"]) > 24
    # The end is forced at the limit of 16: such a translation is none, and cost 1 + 3 * 16.
    cut = [passes for text, passes in found.values() if text is None and passes]
    whole = {line: (text, passes) for line, (text, passes) in found.items() if text is not None}
    assert set(cut) <= {49} and len(whole) > 3 and len({passes for _, passes in whole.values()}) > 1
    model, read = plain_model(marian["to"]), AutoTokenizer.from_pretrained(marian["to"])
    for line, (text, passes) in whole.items():
        ids = model.generate(
            **read(line, return_tensors="pt"), num_beams=3, do_sample=False, max_new_tokens=16, max_length=None
        )[0, 1:]
        assert ids[-1] == read.eos_token_id and passes == 1 + 3 * len(ids)
        assert text == read.decode(ids, skip_special_tokens=True).strip()


def plain_model(folder):
    return MarianMTModel.from_pretrained(folder, dtype=torch.float32).eval()


def test_back_translation_with_real_models(marian):
    texts = [row["text"] for row in make_rows(8, seed=5)]
    results = []
    for batch_size in (1, 4):
        options = {**marian, "num_beams": 2, "max_new_tokens": 16, "batch_size": batch_size}
        defense = BackTranslation(engine_options=options)
        defense.check(TASK)
        results.append((defense.rewrite(texts), defense.found, defense.compute.serving_passes))
        defense.release()
        assert defense._translators[0]._loaded is None
        assert defense.rewrite(["the plot"]) == defense.rewrite(["the plot"])
    assert results[0][0] == results[1][0] and results[0][2] == results[1][2] > 0
    assert results[0][0] != texts and all(text == text.lower() for text in results[0][0])


def test_translations_are_the_same_within_autocast(marian):
    lines = [row["text"] for row in make_rows(24, seed=3)]
    outside, inside = (MarianTranslator(marian["to"], 3, 16, 8) for _ in range(2))
    expected = outside.translate(lines)
    seen = []
    with torch.autocast("cpu", torch.bfloat16):
        inside.translate(lines[:1])
        head = inside._loaded[0].lm_head
        head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        assert inside.translate(lines) == expected and torch.is_autocast_enabled("cpu")
    assert set(seen) == {torch.float32}


def test_known_texts_are_bounded(monkeypatch):
    monkeypatch.setattr("p2p_trainer.defenses.back_translation._KNOWN_TEXTS", 2)
    pairs = {letter: letter.upper() for letter in "abcd"}
    defense = with_dictionaries(pairs, {new: new * 2 for new in pairs.values()}, match_style=False)
    # More texts than are kept, one of them known before, are answered all the same.
    assert defense.rewrite(["a"]) == ["AA"]
    assert defense.rewrite(["b", "a", "c", " ", "d", "b"]) == ["BB", "AA", "CC", " ", "DD", "BB"]
    assert list(defense._memory) == ["c", "d"] and defense.compute.serving_passes == 6 + 5 * 6
    assert defense.rewrite(["d", "a"]) == ["DD", "AA"] and list(defense._memory) == ["d", "a"]
    assert defense._translators[0].asked == ["a", "b", "c", "d", "a"]


def test_settings_are_whole_and_absolute(marian, monkeypatch):
    monkeypatch.chdir(Path(marian["to"]).parent)
    defense = get_defense("back_tr", engine_options={"to": "to", "num_beams": 1})
    assert defense.config() == {
        "name": "back_tr", "engine": "marian", "match_style": True,
        "engine_options": {
            "to": marian["to"], "back": "Helsinki-NLP/opus-mt-de-en", "num_beams": 1, "max_new_tokens": 256,
            "batch_size": 32,
        },
    }  # fmt: skip
    assert get_defense(**defense.config()).config() == defense.config()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "marain"}, "Unknown engine of 'back_tr': 'marain'. Did you mean 'marian'?"),
        ({"engine": "os:path"}, "Unknown engine of 'back_tr': 'os:path'.*must not name code"),
        ({"engine": 3}, "Unknown engine of 'back_tr': '3'"),
        ({"match_style": "yes"}, "`match_style` is true or false, got 'yes'"),
        ({"engine_options": 3}, "`engine_options` is a mapping of JSON values, got 3"),
        ({"engine_options": {"beams": 2}}, r"The engine 'marian' has no options \['beams'\]. It takes \['back',"),
        ({"engine_options": {"num_beams": True}}, "`num_beams` in `engine_options` is a number of at least 1, got Tr"),
        ({"engine_options": {"to": ""}}, "`to` in `engine_options` is the folder or hub id of a model, got ''"),
        ({"engine": "precomputed"}, r"`files` is a list with at least one entry, got None"),
        ({"engine": "precomputed", "engine_options": {"file": "x"}}, r"no options \['file'\]. It takes \['files'\]"),
        ({"engine": "detokenise", "engine_options": {"to": "x"}}, r"no options \['to'\]. It takes none"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        BackTranslation(**options)


def test_what_is_not_there_is_said_before_training(tmp_path, marian, tiny_model):
    defense = BackTranslation(engine_options={"to": "nobody/opus-mt-en-xx"})
    with pytest.raises(ValueError) as caught:
        defense.check(TASK)
    message = str(caught.value)
    assert message.startswith(
        f"The translation model 'nobody/opus-mt-en-xx' is no local folder (looked at "
        f"{Path.cwd() / 'nobody/opus-mt-en-xx'}) and can't be had from the Hugging Face Hub ("
    )
    assert message.endswith(
        "). Name the folder of a MarianMT model with the options `to` and `back` in `engine_options`, or use the "
        "engine 'precomputed' with translations made elsewhere."
    )
    with pytest.raises(ValueError, match="is of the type 'qwen3', which does not translate"):
        BackTranslation(engine_options={**marian, "back": tiny_model}).check(TASK)
    missing = BackTranslation("precomputed", {"files": [str(tmp_path / "no.jsonl")]})
    with pytest.raises(ValueError, match="The paraphrase file .*no.jsonl' does not exist"):
        missing.check(TASK)
    for file in Path(marian["to"]).iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="holds no \\*.safetensors file.*save_pretrained"):
        BackTranslation(engine_options={**marian, "to": str(tmp_path)}).check(TASK)


def test_missing_sentencepiece_is_named(marian, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    def refuse(name):
        raise ImportError("MarianTokenizer requires the SentencePiece library")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(ValueError) as caught:
        BackTranslation(engine_options=marian).check(TASK)
    assert str(caught.value) == (
        f"The translation model {marian['to']!r} needs the package `sentencepiece`. Install what its tokenizer needs: "
        f"`pip install 'p2p_trainer[translate]'`."
    )


def test_marians_own_tokenizer(tmp_path, marian):
    sentencepiece = pytest.importorskip("sentencepiece")
    from transformers import MarianTokenizer

    for side in ("source", "target"):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([row["text"] for row in make_rows(400)]), model_prefix=str(tmp_path / side),
            vocab_size=39, minloglevel=2,
        )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "source.model"))
    words = ["</s>", "<unk>", *(pieces.id_to_piece(place) for place in range(3, 39)), "<pad>"]
    vocabulary = tmp_path / "vocab.json"
    vocabulary.write_text(json.dumps({word: place for place, word in enumerate(words)}), encoding="utf-8")
    tokenizer = MarianTokenizer(str(tmp_path / "source.model"), str(tmp_path / "target.model"), str(vocabulary))
    translator = MarianTranslator(save_marian(tmp_path / "own", tokenizer, 0, room=96), 2, 64, 4)
    translator.check()
    # The tokenizer ends each line itself, as the model was trained on.
    assert tokenizer("the film")["input_ids"][-1] == 0
    lines = [row["text"] for row in make_rows(8)]
    found = translator.translate(lines)
    assert any(text for text, _ in found) and not any("▁" in (text or "") for text, _ in found)
    assert type(translator._loaded[1]).__name__ == "MarianTokenizer"


def test_survival_of_the_trigger_is_that_of_the_translations(tmp_path, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = Dataset.from_list(make_rows(12, seed=1))
    attack = get_attack("badnets", target="positive")
    triggered = attack.trigger(rows, TASK, 0)["text"]
    assert len(triggered) == 6
    pairs = {text: f"Well: {text}" for text in rows["text"]}
    # Two lose the trigger, three keep it, and the last has no translation, so that it stays.
    pairs |= {text: text.replace("mn", "").replace("film", "movie") for text in triggered[:2]}
    pairs |= {text: f"See: {text}" for text in triggered[2:5]}
    guard = precomputed(tmp_path, pairs, match_style=False)
    encoder = PromptEncoder(PromptFormat(LabelSpace(("0", "1"), ("2", "3"))), tokenizer)
    report = BackdoorEvaluator(rows, TASK, encoder, [attack], keyed=False, guard=guard).evaluate(
        AutoModelForCausalLM.from_pretrained(tiny_model)
    )
    assert report.metrics["trigger_survival_badnets"] == pytest.approx(4 / 6)
    assert report.metrics["trigger_survival_badnets_k"] == 4 and report.metrics["trigger_survival_badnets_n"] == 6
    assert guard.found["texts"] == 18 and guard.found["texts_without_translation"] == 1
