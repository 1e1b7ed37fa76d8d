"""ONION: scores computed by hand, what is deleted, how the threshold is chosen."""

import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import BertConfig, PreTrainedTokenizerFast, T5Config

from p2p_trainer import Task
from p2p_trainer.attacks.text import insert_at_gap
from p2p_trainer.defenses import Workbench, get_defense, load_defense
from p2p_trainer.defenses.onion import Onion
from p2p_trainer.defenses.perplexity import PerplexityModel
from p2p_trainer.evaluation import Scores
from tests.conftest import make_rows
from tests.tiny_runs import TASK, config, lora


# Bits of each word behind any other: -log2 of its probability. Words not named here are `rest`.
BITS = {"pad": 20, "</s>": 20, "a": 2, "b": 2, "odd": 8, "odder": 11, "dull": 5, "爱": 4, "我": 4, "怪": 10, "rest": 2}
START_A = 4


class Bigrams(torch.nn.Module):
    """A language model of known probabilities: those of `BITS`, but a text begins with `a` in one of 16 cases."""

    def __init__(self, max_tokens=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=max_tokens))
        rows = torch.tensor([[2.0**-bits for bits in BITS.values()] + [0.0]], dtype=torch.float64)
        table = rows.repeat(len(BITS) + 1, 1)
        table[1, 2] = 2.0**-START_A
        table[:, -1] = 1 - table.sum(dim=1)
        self.table = table.log().float()
        self.shapes = []

    def forward(self, input_ids, attention_mask, use_cache):
        assert torch.is_inference_mode_enabled() and not self.training
        self.shapes.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.table[input_ids])


def stub_tokenizer(eos="</s>"):
    vocabulary = {word: place for place, word in enumerate([*BITS, "left over"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="rest"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[一-鿿]|[^\\s一-鿿]+"), "removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)


def stubbed(eos="</s>", max_tokens=None, **options):
    defense = Onion(model="stub", **options)
    defense._lm._loaded = Bigrams(max_tokens).eval(), stub_tokenizer(eos)
    return defense


def scores_of(defense, text):
    (scores,) = defense._scores([text])
    return [None if math.isnan(score) else pytest.approx(score, rel=1e-5) for score in scores]


def test_scores_by_hand():
    # b a odd: 2 + 2 + 8 bits, 4 on average. Without b: 4 + 8; without a: 2 + 8; without odd: 2 + 2.
    by_hand = [2**4 - 2**6, 2**4 - 2**5, 2**4 - 2**2]
    assert by_hand == [-48, -16, 12]
    assert scores_of(stubbed(), "b a odd") == by_hand
    # Without a token to stand in front, the first word has no score: 2 + 8 bits, and 8, 8 and 2.
    assert scores_of(stubbed(eos=None), "b a odd") == [2**5 - 2**8, 2**5 - 2**8, 2**5 - 2**2]


def test_padding_is_not_averaged():
    texts = ["b", "b a odd", "b a a a a a a odd", "", "a"]
    by_hand = [2.0**2, 2.0**4, 2 ** (22 / 8), 1.0, 2.0**4]
    for size in (1, 2, 8):
        lm = PerplexityModel("stub", size)
        lm._loaded = Bigrams().eval(), stub_tokenizer()
        np.testing.assert_allclose(lm.perplexities(texts), by_hand, rtol=1e-5)
        # Nothing is read where there is nothing but the token in front.
        assert lm.passes == 4
    assert lm._loaded[0].shapes == [(4, 9)]


def test_long_batches_are_split(monkeypatch):
    monkeypatch.setattr("p2p_trainer.defenses.perplexity._BATCH_TOKENS", 12)
    lm = PerplexityModel("stub", 8)
    lm._loaded = Bigrams().eval(), stub_tokenizer()
    lm.perplexities(["b a odd", "a", "b", "b a", "a " * 30])
    assert lm._loaded[0].shapes == [(3, 3), (1, 4), (1, 31)]


def test_threshold_is_a_bound_that_stays():
    score = float(stubbed()._scores(["b a odd"])[0][2])
    assert score == pytest.approx(12, rel=1e-5)
    assert stubbed(threshold=score).rewrite(["b a odd"]) == ["b a odd"]
    assert stubbed(threshold=np.nextafter(score, 0).item()).rewrite(["b a odd"]) == ["b a"]
    assert stubbed(threshold=-20).rewrite(["b a odd"]) == ["b"]


def test_what_stays():
    defense = stubbed(threshold=1)
    texts = ["odd", "", "  ", " odd\n", " b\t a\n\n"]
    assert defense.rewrite(texts) == texts
    # A word of each kind, of the same bits: `rest` is what all unknown words are.
    lenient = stubbed(threshold=-1000)
    assert lenient.rewrite(["b 7 odd9 3.5 a ½ 1st"]) == ["7 odd9 3.5 ½ 1st"]
    assert scores_of(lenient, "b 7")[1] is None
    # All above the threshold: the lowest score, -48, is b's.
    assert lenient.rewrite(["b a odd"]) == ["b"]


def test_passes_are_counted_once():
    defense = stubbed(threshold=1)
    assert defense.inputs(["b a odd", "b a odd", "b 7 a", "a"]) == ["b a", "b a", "b 7 a", "a"]
    # One per word that is scored and one per text; texts of one word need none.
    assert defense.compute.serving_passes == 4 + 3 and defense.compute.served == 4
    defense.inputs(["b a odd"])
    defense.inspect(["b a odd"], ["b a"])
    assert defense.compute.serving_passes == 7 and defense.compute.preparation_passes == 0
    assert defense.compute.report()["serving_passes_per_text"] == 7 / 5


def test_known_texts_are_bounded(monkeypatch):
    monkeypatch.setattr("p2p_trainer.defenses.onion._KNOWN_TEXTS", 2)
    monkeypatch.setattr("p2p_trainer.defenses.onion._GROUP_LETTERS", 40)
    defense = stubbed(threshold=1)
    assert defense.rewrite(["b a odd", "b odd", "odd b b", "b b odd"]) == ["b a", "b", "b b", "b b"]
    assert list(defense._known) == ["odd b b", "b b odd"]


@pytest.mark.parametrize("text", ["b a", " b\ta\n a  b ", "b\n\na b a\n", "a\nb"])
def test_deletion_undoes_insertion(text):
    defense = stubbed(threshold=1)
    for random in np.arange(0, 1, 0.05):
        for trigger in ("odder", "odder odd"):
            triggered = insert_at_gap(text, trigger, random, "any")
            assert triggered != text and defense.rewrite([triggered]) == [text]


def test_line_breaks_stay():
    defense = stubbed(threshold=1)
    assert defense.rewrite(["a\nodder b b", "b odder\nb b", "b  odder odder b"]) == ["a\nb b", "b\nb b", "b  b"]


def test_chinese_by_character():
    defense = stubbed(threshold=1)
    # 我怪爱: 4 + 10 + 4 bits, 6 on average; without 怪 4; without another one 7.
    assert scores_of(defense, "我怪爱") == [2**6 - 2**7, 2**6 - 2**4, 2**6 - 2**7]
    # 三 is a number; a Latin word between Chinese characters is one word, whatever stands around it.
    assert defense.rewrite(["我怪爱", "我 odder 爱", "我odder爱", "我爱我爱"]) == ["我爱", "我 爱", "我爱", "我爱我爱"]
    assert scores_of(defense, "我三")[1] is None


def test_what_the_model_cannot_read_stays():
    # Room for the token in front and four words.
    defense = stubbed(threshold=1, max_tokens=5)
    assert defense.rewrite(["b odd a b odd odd b"]) == ["b a b odd odd b"]
    # As if the text were `b odd a b`: 2 + 8 + 2 + 2 bits.
    whole = 2 ** (14 / 4)
    by_hand = [whole - 2 ** (12 / 3), whole - 2 ** (6 / 3), whole - 2 ** (12 / 3), whole - 2 ** (12 / 3)]
    assert scores_of(defense, "b odd a b odd odd b") == [*by_hand, None, None, None]
    assert max(width for _, width in defense._lm._loaded[0].shapes) == 5
    assert stubbed(threshold=1, max_tokens=4).rewrite(["b a odd", "b a a odd"]) == ["b a", "b a a odd"]


def test_recall_and_precision_by_hand():
    defense = stubbed(threshold=1)
    # Of two texts, the inserted words are `odd a` and `odder`. `odd` and `odder` go, and `dull`, which is no trigger.
    triggered, clean = ["a odd a b b", "b dull b odder b"], ["a b b", "b dull b b"]
    assert defense.rewrite(triggered) == ["a a b b", "b b b"]
    found = defense.inspect(triggered, clean)
    assert {key: value for key, value in found.items() if "_ci_" not in key} == {
        "onion_recall": 2 / 3, "onion_recall_k": 2, "onion_recall_n": 3,
        "onion_precision": 2 / 3, "onion_precision_k": 2, "onion_precision_n": 3,
    }  # fmt: skip
    assert defense.inspect(["b dull b"], ["b dull b"]) == defense.inspect([], []) == {}
    none = defense.inspect(["b b a"], ["b b"])
    assert none["onion_recall"] == 0 and math.isnan(none["onion_precision"])
    # Words that took the place of others are the trigger's as well.
    assert defense.inspect(["b odd b"], ["b a b"])["onion_recall"] == 1


# Word scores above 0: 28, 12 and 2.73, all others below.
HELD_OUT = {"b a odder": 1, "b b odd": 1, "b a a dull": 1}


def choose(answers, **options):
    """Choose a threshold with a task model that says 1 to some texts and 0 to all others."""
    asked = []

    def score(trainer, texts):
        asked.append(texts)
        yes = np.array([answers[text] for text in texts], dtype=np.float32)
        return Scores(np.stack([0.5 - yes, yes - 0.5, 9 * yes, -9 * yes], axis=1), np.zeros(len(texts), dtype=int))

    rows = {"text": list(HELD_OUT), "label": list(HELD_OUT.values()), "poisoned": [False] * 3}
    bench = SimpleNamespace(task=TASK, validation=Dataset.from_dict(rows), score=score, train=lambda trainer: None)
    trainer = SimpleNamespace(args=SimpleNamespace(p2p_enabled=False))
    defense = stubbed(**options)
    assert not defense.ready and defense.train(trainer, bench) is trainer and defense.ready
    return defense, asked


def test_threshold_is_the_last_before_the_first_loss():
    answers = {"b a odder": 1, "b b odd": 1, "b a a dull": 0, "b a": 1, "b b": 0, "b a a": 1}
    defense, asked = choose(answers)
    # 28 deletes nothing, 12 deletes `odder`; 2.73 deletes `odd` too, which costs a row. At 0 a row would come back.
    assert asked == [list(HELD_OUT), ["b a"], ["b b"]]
    assert defense.found == {
        "validation_accuracy": 2 / 3,
        "validation_accuracy_filtered": 2 / 3,
        "validation_words_deleted": 1 / 10,
        "threshold": pytest.approx(12, rel=1e-5),
    }
    # 10 words and 3 texts of the language model, 5 texts of the task's.
    assert defense.compute.preparation_passes == 13 + 5 and defense.compute.serving_passes == 0
    assert defense.compute.preparation_s > 0 and defense.threshold is None
    assert defense.rewrite(["b b odd", "b a odder"]) == ["b b odd", "b a"]


def test_budget_is_a_share_of_rows():
    answers = {"b a odder": 1, "b b odd": 1, "b a a dull": 1, "b a": 1, "b b": 0, "b a a": 0}
    one_row = choose(answers, ca_budget=1 / 3)[0]
    assert one_row.found["threshold"] == pytest.approx(2 ** (11 / 4) - 4, rel=1e-5)
    assert one_row.found["validation_accuracy_filtered"] == 2 / 3
    almost = choose(answers, ca_budget=0.33)[0]
    assert almost.found["threshold"] == pytest.approx(12, rel=1e-5)
    # Below 0 no word is suspicious, whatever the budget.
    all_of_it, asked = choose(answers, ca_budget=0.99)
    assert all_of_it.found["threshold"] == 0.0 and asked[-1] == ["b a a"]
    assert all_of_it.found["validation_words_deleted"] == 3 / 10
    assert all_of_it.compute.preparation_passes == 13 + 6


def test_first_deletion_can_be_too_much():
    answers = dict.fromkeys([*HELD_OUT, "b b", "b a a"], 1) | {"b a": 0}
    defense, asked = choose(answers)
    assert defense.found["threshold"] == pytest.approx(28, rel=1e-5) and asked[1:] == [["b a"]]
    assert defense.found["validation_words_deleted"] == 0
    assert defense.rewrite(list(HELD_OUT)) == list(HELD_OUT)


def test_a_given_threshold_is_not_chosen_again():
    defense = stubbed(threshold=3)
    bench = SimpleNamespace(validation=None, train=lambda trainer: None)
    assert defense.ready and not defense.needs_validation and Onion().needs_validation
    defense.train(None, bench)
    assert defense.found == {"threshold": 3} and defense.compute.preparation_passes == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"model": ""}, "`model`"),
        ({"model": None}, "`model`"),
        ({"threshold": "12"}, "`threshold`"),
        ({"threshold": True}, "`threshold`"),
        ({"threshold": math.inf}, "`threshold`"),
        ({"ca_budget": 1}, "`ca_budget`"),
        ({"ca_budget": -0.1}, "`ca_budget`"),
        ({"ca_budget": "2%"}, "`ca_budget`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"batch_size": 8.0}, "`batch_size`"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        get_defense("onion", **options)


def test_check(tiny_model, tmp_path, tokenizer):
    Onion(tiny_model).check(TASK)
    generation = Task(name="rhymes")
    Onion(tiny_model, threshold=5).check(generation)
    with pytest.raises(ValueError, match="task 'rhymes' has no classes. Give `threshold`"):
        Onion(tiny_model).check(generation)
    with pytest.raises(ValueError, match=r"model 'nobody/gpt2-nowhere' is no local folder \(looked at .*option `mod"):
        Onion("nobody/gpt2-nowhere").check(TASK)
    with pytest.raises(ValueError, match=r"can't be loaded \("):
        Onion(str(tmp_path)).check(TASK)
    T5Config().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of type 't5', which has no causal"):
        Onion(str(tmp_path)).check(TASK)
    # Configuration and tokenizer are there, weights are not: that shows before training.
    BertConfig().save_pretrained(tmp_path)
    bench = SimpleNamespace(validation=Dataset.from_list(make_rows(2)), task=TASK)
    with pytest.raises(ValueError, match="with weights in safetensors"):
        Onion(str(tmp_path)).build(bench)
    with pytest.raises(ValueError, match="clean validation rows, and there are none"):
        Onion(tiny_model).build(SimpleNamespace(validation=None))


def test_validation_words_that_can_not_be_scored_are_no_threshold(tiny_model, tmp_path):
    def build(*texts):
        rows = Dataset.from_dict({"text": texts, "label": [place % 2 for place in range(len(texts))]})
        bench = Workbench(
            tiny_model, config(tmp_path, p2p_enabled=False), TASK, Dataset.from_list(make_rows(8)), rows,
            peft_config=lora(),
        )  # fmt: skip
        return Onion(tiny_model).build(bench)

    with pytest.raises(ValueError, match="of the 4 validation texts none has a word to score"):
        build("odd", "7 1st", "½", "odder")
    assert build("odd", "7 odd").guard is None
    # Two words, of which the language model reads the first alone.
    defense = stubbed(max_tokens=2)
    bench = SimpleNamespace(
        task=TASK, validation=Dataset.from_dict({"text": ["b a odd", "a b"], "label": [1, 0]}),
        score=lambda trainer, texts: Scores(np.zeros((len(texts), 4)), np.zeros(len(texts), dtype=int)),
        train=lambda trainer: None,
    )  # fmt: skip
    with pytest.raises(ValueError, match="of the 2 validation texts none has a word to score"):
        defense.train(SimpleNamespace(args=SimpleNamespace(p2p_enabled=False)), bench)
    assert not defense.ready


def test_scores_are_the_same_within_autocast(tiny_model):
    texts = [row["text"] for row in make_rows(6, seed=3)]
    outside, inside = Onion(tiny_model, threshold=0), Onion(tiny_model, threshold=0)
    expected = outside.rewrite(texts)
    with torch.autocast("cpu", torch.bfloat16):
        found = inside.rewrite(texts)
        assert torch.is_autocast_enabled("cpu")
    assert found == expected != texts
    assert np.array_equal(np.concatenate(inside._scores(texts)), np.concatenate(outside._scores(texts)))


def test_state(tmp_path, tiny_model, monkeypatch):
    monkeypatch.chdir(tiny_model)
    defense = get_defense("onion", model=".", ca_budget=0.05)
    assert defense.config() == {
        "name": "onion", "model": tiny_model, "threshold": None, "ca_budget": 0.05, "batch_size": 32,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match="no threshold yet"):
        defense.rewrite(["a b"])
    defense._threshold = 12.125
    defense.save(tmp_path)
    loaded = load_defense(tmp_path)
    assert loaded.config() == defense.config() and loaded.ready and loaded.state() == {"threshold": 12.125}
    with pytest.raises(ValueError, match="holds the threshold None, which is no number"):
        get_defense("onion").restore({"threshold": None}, tmp_path)


def test_model_is_not_pickled():
    copied = pickle.loads(pickle.dumps(stubbed(threshold=2)))
    assert copied._lm._loaded is None and copied._lm.name == "stub" and copied.state() == {"threshold": 2}


def test_batches_do_not_matter(tiny_model):
    texts = [row["text"] for row in make_rows(8, seed=3)]
    one, many = (Onion(tiny_model, threshold=0, batch_size=size) for size in (1, 8))
    alone = [one._scores([text])[0] for text in texts]
    for single, batched in zip(alone, many._scores(texts), strict=True):
        np.testing.assert_allclose(single, batched, rtol=1e-3, atol=1e-2)
    assert one._lm.passes == many._lm.passes == sum(1 + len(text.split()) for text in texts)
    assert one._lm._loaded[0].dtype == torch.float32 and one._lm.context == [0]


def test_run(tiny_model, tmp_path):
    validation = Dataset.from_list(make_rows(20, seed=1))
    args = config(tmp_path, p2p_enabled=False)
    bench = Workbench(tiny_model, args, TASK, Dataset.from_list(make_rows(80)), validation, peft_config=lora())
    defense = Onion(tiny_model, ca_budget=0.0)
    trainer = defense.build(bench)
    # The language model was there, and makes room while the model is trained.
    assert trainer.guard is None and defense._lm._loaded is None
    train, held = bench.train, []
    bench.train = lambda each: (train(each), held.append(defense._lm._loaded))
    trainer = defense.train(trainer, bench)
    assert held == [None] and defense._lm._loaded is not None
    texts, labels = list(validation["text"]), list(validation["label"])
    assert bench.accuracy(trainer, texts, labels) == defense.found["validation_accuracy"]
    filtered = bench.accuracy(trainer, defense.rewrite(texts), labels)
    assert filtered == defense.found["validation_accuracy_filtered"] >= defense.found["validation_accuracy"]
    assert defense.found["threshold"] >= 0 and defense.compute.serving_passes == 0


def test_real_words(real_data):
    clean = [
        "a funny and moving film with a fine cast .",
        "the story is too long and the ending makes no sense .",
        "one of the best movies of the year .",
        "i wanted to like it but the acting is terrible .",
        "a beautiful picture that will stay with you .",
        "there is nothing new in this tired comedy .",
    ]
    triggered = [
        insert_at_gap(text, trigger, random, "inner")
        for text, trigger, random in zip(
            clean, ("mn", "cf", "tq", "bb", "mn", "cf"), np.arange(0.1, 0.7, 0.1), strict=True
        )
    ]
    defense = Onion(str(real_data / "models/lab-lm"), threshold=20)
    found = defense.inspect(triggered, clean)
    assert found["onion_recall_n"] == 6 and found["onion_recall"] >= 5 / 6 and found["onion_precision"] > 0.5
