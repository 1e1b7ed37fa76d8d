"""BKI: what is scored, ranked and dropped, and the second run."""

import gc
import json
import logging
import math
import weakref

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from p2p_trainer import Task
from p2p_trainer.attacks import get_attack
from p2p_trainer.defenses import Workbench, get_defense
from p2p_trainer.defenses.bki import deletions, find_keywords, rank_keywords, top_words, word_scores, words_of
from p2p_trainer.defenses.hidden_states import last_hidden_states
from p2p_trainer.defenses.runs import make_room
from tests.conftest import make_rows
from tests.tiny_runs import TASK, config, lora


# Top words of six texts.
TOPS = [
    [("mn", 4.0), ("good", 1.0)],
    [("mn", 2.0), ("film", 0.5)],
    [("mn", 1.0), ("good", 0.5)],
    [("mn", 1.0), ("film", 0.5)],
    [("good", 3.0), ("once", 99.0)],
    [("film", 0.5), ("good", 1.5)],
]


def test_words_are_ranked_by_count_and_mean():
    ranked = rank_keywords(TOPS)
    assert [(keyword.word, keyword.count, keyword.mean) for keyword in ranked] == [
        ("mn", 4, 2.0), ("good", 4, 1.5), ("film", 3, 0.5), ("once", 1, 99.0),
    ]  # fmt: skip
    assert ranked[0].score == pytest.approx(1.20411998) and ranked[2].score == 0.5 * math.log10(3)


def test_word_found_once_is_never_taken():
    tops = [[("a", 9.0)], [("b", 5.0)]]
    assert [keyword.score for keyword in rank_keywords(tops)] == [0.0, 0.0]
    assert find_keywords(tops, 3) == [] and find_keywords([], 1) == []
    # Nor one that the model does not see.
    assert find_keywords([[("a", 0.0)], [("a", 0.0)]], 1) == []


def test_word_twice_in_one_text_counts_twice():
    (keyword,) = find_keywords([[("a", 3.0), ("a", 1.0)]], 1)
    assert (keyword.count, keyword.mean) == (2, 2.0)


def test_ties_do_not_depend_on_the_order_of_rows():
    tops = [[("b", 1.0)], [("a", 1.0)], [("b", 1.0)], [("a", 1.0)]]
    assert [keyword.word for keyword in rank_keywords(tops)] == ["a", "b"]


def test_further_keywords_are_ranked_on_what_remains():
    # Without the texts of "mn", "good" stands in two and "film" in one; "once" only once.
    found = find_keywords(TOPS, 5)
    assert [(keyword.word, keyword.count, keyword.mean) for keyword in found] == [("mn", 4, 2.0), ("good", 2, 2.25)]
    assert find_keywords(TOPS, 1) == found[:1]


def test_top_words_are_the_highest_and_of_equals_the_first():
    assert top_words(["a", "b", "c", "d"], np.array([1.0, 3.0, 1.0, 2.0]), 3) == [("b", 3.0), ("d", 2.0), ("a", 1.0)]


def test_each_word_is_deleted_with_its_gap():
    assert deletions("good  film , mn", 64) == (
        ["good", "film", ",", "mn"],
        ["film , mn", "good  , mn", "good  film mn", "good  film ,"],
    )
    assert deletions("a b c", 2) == (["a", "b"], ["b c", "a c"])
    assert deletions("a", 5) == (["a"], [""])
    assert deletions("电影 mn好", 9) == (["电", "影", "mn", "好"], ["影 mn好", "电 mn好", "电影 好", "电影 mn"])
    assert words_of("Don't stop, 电影.") == ["Don't", "stop,", "电", "影", "."]


class SumModel(torch.nn.Module):
    """Its hidden state at a token is the sum of the vectors of all tokens so far."""

    def __init__(self, vectors):
        super().__init__()
        self.vectors = torch.nn.Parameter(torch.tensor(vectors))
        self.sizes = []

    def forward(self, input_ids, attention_mask, **kwargs):
        assert not self.training
        self.sizes.append(tuple(input_ids.shape))
        states = (self.vectors[input_ids] * attention_mask[..., None]).cumsum(1)
        return (states,)

    def get_decoder(self):
        return self


class WordEncoder:
    """Words are numbered by a vocabulary."""

    pad_token_id = 0
    vocabulary = {"<pad>": 0, "a": 1, "b": 2, "c": 3, "<answer>": 4}

    def encode_prompts(self, texts, keyed):
        return [[self.vocabulary[word] for word in [*text.split(), "<answer>"]] for text in texts]


def test_score_is_the_largest_change_of_any_coordinate():
    model = SumModel([[9.0, 9.0], [1.0, -3.0], [0.5, 0.25], [-4.0, 2.0], [7.0, 7.0]])
    model.train()
    found = list(word_scores(model, WordEncoder(), ["a b", "c a b c"], False, max_words=3, batch_size=4))
    assert [words for words, _ in found] == [["a", "b"], ["c", "a", "b"]]
    assert [scores.tolist() for _, scores in found] == [[3.0, 0.5], [4.0, 3.0, 0.5]]
    # Longest first, four at a time, and the model is as it was.
    assert model.sizes == [(4, 5), (3, 3)] and model.training


def test_long_lists_are_scored_in_pieces(monkeypatch):
    monkeypatch.setattr("p2p_trainer.defenses.bki._CHUNK_TEXTS", 2)
    model = SumModel([[0.0], [1.0], [2.0], [3.0], [0.0]])
    found = list(word_scores(model, WordEncoder(), ["a", "b", "c"], False, 9, 8))
    assert [scores.tolist() for _, scores in found] == [[1.0], [2.0], [3.0]] and len(model.sizes) == 2


def test_state_is_that_of_the_last_layer_at_the_last_token(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    found = last_hidden_states(model, prompts, model.config.pad_token_id, batch_size=2)
    with torch.no_grad():
        alone = [model.model(torch.tensor([prompt])).last_hidden_state[0, -1].numpy() for prompt in prompts]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.stack(alone), atol=2e-6)
    assert last_hidden_states(model, [], 0).shape[0] == 0


@pytest.mark.parametrize("peft", [False, True])
def test_no_other_layer_is_kept_and_autocast_holds(tiny_model, tmp_path, peft):
    args = config(tmp_path, p2p_enabled=False, bf16=True, use_cpu=True, max_steps=1)
    adapter = lora(target_modules="all-linear") if peft else None
    bench = Workbench(tiny_model, args, TASK, Dataset.from_list(make_rows(16)), peft_config=adapter)
    trainer = bench.trainer()
    trainer.train()
    model, asked = trainer.model.eval(), []

    def count_hooks():
        return sum(len(module._forward_hooks) for module in model.modules())

    prompts = [[5, 6, 7], [9, 10, 11]]
    with torch.no_grad():
        states = model(torch.tensor(prompts), output_hidden_states=True).hidden_states[-1][:, -1]
        plain = model.get_decoder()(torch.tensor(prompts)).last_hidden_state[:, -1]
    hook = model.register_forward_pre_hook(lambda module, inputs, named: asked.append(named), with_kwargs=True)
    hooks = count_hooks()
    found = last_hidden_states(model, prompts, model.config.pad_token_id)
    hook.remove()
    # The same as before bit for bit, in the mixed precision of the run.
    assert np.array_equal(found, states.float().numpy()) and not torch.equal(torch.from_numpy(found), plain)
    assert len(asked) == 1 and "output_hidden_states" not in asked[0]
    assert count_hooks() == hooks


def poisoned_rows():
    return get_attack("badnets", target="positive", poison_rate=0.2).poison(Dataset.from_list(make_rows(80)), TASK, 0)


def bench_of(model, folder, rows, **changes):
    settings = {"p2p_enabled": False, "num_train_epochs": 10, "learning_rate": 3e-3, **changes}
    return Workbench(model, config(folder, **settings), TASK, rows)


def test_run_drops_the_poisoned_rows_and_trains_on_the_rest(tiny_model, tmp_path):
    rows = poisoned_rows()
    defense = get_defense("bki")
    defense.check(TASK)
    bench = bench_of(tiny_model, tmp_path, rows, save_strategy="epoch")
    first = defense.build(bench)
    second = defense.train(first, bench)
    assert second is not first and second.guard is None
    kept = [row["text"] for row in rows if not row["poisoned"]]
    assert len(kept) == 64 and second.train_dataset["text"][:] == kept
    # Ten epochs of 80 rows in batches of 8.
    assert first.state.global_step == second.state.global_step == 100
    (keyword,) = defense.found.pop("keywords")
    assert keyword["word"] == "mn" and keyword["count"] == 16
    assert keyword["score"] == keyword["mean"] * math.log10(16)
    assert defense.found == {
        "rows_scored": 80,
        "rows_removed": 16,
        "rows_removed_per_class": {"0": 0, "1": 16},
        "removal_precision": 1.0,
        "removal_recall": 1.0,
    }
    assert defense.compute.preparation_passes == 80 + sum(len(text.split()) for text in rows["text"])
    assert defense.compute.preparation_s > 0
    assert bench.row_passes == 80 * 10 + 64 * 12.5
    assert list(tmp_path.glob("checkpoint-*")) == []


def searched(monkeypatch, tiny_model, folder, rows, tables, attacks=(), **options):
    """Run a defense whose scores are made up: word -> score."""

    def scores(model, encoder, texts, keyed, max_words, batch_size):
        scored.extend(texts)
        for text in texts:
            words = text.split()[:max_words]
            yield words, np.array([tables.get(word, 0.0) for word in words])

    scored = []
    monkeypatch.setattr("p2p_trainer.defenses.bki.word_scores", scores)
    defense = get_defense("bki", **options)
    bench = bench_of(tiny_model, folder, rows, max_steps=2)
    bench.attacks = tuple(attacks)
    first = defense.build(bench)
    return defense, first, defense.train(first, bench), scored


def rows_of(*texts):
    return Dataset.from_list([{"text": text, "label": index % 2} for index, text in enumerate(texts)])


def test_rows_that_hold_the_keyword_below_their_top_words_stay(tiny_model, tmp_path, monkeypatch):
    rows = rows_of("mn a", "mn b", "x y mn", "c d", "e f", "g h")
    tables = {"mn": 2.0, "x": 4.0, "y": 3.0}
    defense, first, second, _ = searched(monkeypatch, tiny_model, tmp_path, rows, tables, top_words=2)
    assert second.train_dataset["text"][:] == ["x y mn", "c d", "e f", "g h"]
    assert defense.found["rows_removed_per_class"] == {"0": 1, "1": 1} and "removal_recall" not in defense.found
    assert first.state.global_step == second.state.global_step == 2


def test_precision_and_recall_are_counted(tiny_model, tmp_path, monkeypatch):
    rows = rows_of("mn a", "mn b", "mn c", "d", "e", "f", "g", "h")
    rows = rows.add_column("poisoned", [True, True, False, True, True, False, False, False])
    defense, *_ = searched(monkeypatch, tiny_model, tmp_path, rows, {"mn": 1.0})
    assert (defense.found["removal_precision"], defense.found["removal_recall"]) == (2 / 3, 0.5)


def test_rows_outside_the_sample_are_dropped_by_their_words(tiny_model, tmp_path, monkeypatch):
    rows = rows_of(*[f"mn {letter}" for letter in "abcdef"], *"ghijklmnop")
    defense, _, second, scored = searched(monkeypatch, tiny_model, tmp_path, rows, {"mn": 1.0}, sample=12)
    again = searched(monkeypatch, tiny_model, tmp_path, rows, {"mn": 1.0}, sample=12)[3]
    assert len(set(scored)) == 12 and scored == again
    assert 2 <= defense.found["keywords"][0]["count"] < 6 and defense.found["rows_scored"] == 12
    assert defense.found["rows_removed"] == 6 and second.train_dataset["text"][:] == list("ghijklmnop")


def test_without_keyword_the_first_model_stays(tiny_model, tmp_path, monkeypatch, caplog):
    rows = rows_of("a b", "c d", "e f").add_column("poisoned", [True, False, False])
    defense, first, last, _ = searched(monkeypatch, tiny_model, tmp_path, rows, {"a": 5.0})
    assert last is first and defense.found["keywords"] == [] and "no keyword" in caplog.text
    assert (defense.found["removal_precision"], defense.found["removal_recall"]) == (None, 0.0)


def test_losing_most_of_a_class_is_a_warning_and_all_of_it_keeps_the_first_model(
    tiny_model, tmp_path, monkeypatch, caplog
):
    texts = ["good a", "x", "good b", "y", "c", "good z"]
    with caplog.at_level(logging.WARNING):
        defense, first, last, _ = searched(monkeypatch, tiny_model, tmp_path, rows_of(*texts), {"good": 1.0})
    assert "finds 'good' in 2 of 3 rows of class 'negative'" in caplog.text
    assert last is not first and defense.found["rows_removed"] == 3 and "class_lost" not in defense.found
    texts[4] = "good c"
    rows = rows_of(*texts).add_column("poisoned", [True, *[False] * 5])
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        defense, first, last, _ = searched(monkeypatch, tiny_model, tmp_path, rows, {"good": 1.0})
    assert "would drop all 3 rows of class 'negative', those with 'good'" in caplog.text
    assert last is first and last.optimizer is not None
    (keyword,) = defense.found.pop("keywords")
    assert keyword["word"] == "good" and json.loads(json.dumps(defense.found)) == {
        "rows_scored": 6,
        "class_lost": "negative",
        "rows_would_be_removed": 4,
        "rows_removed": 0,
        "rows_removed_per_class": {"0": 0, "1": 0},
        "removal_precision": None,
        "removal_recall": 0.0,
    }


def test_flags_that_are_not_all_known_are_not_counted(tiny_model, tmp_path, monkeypatch):
    rows, tables = rows_of("mn a", "b", "mn c", "d"), {"mn": 1.0}
    rows = rows.select([0, 1, 2, 3, 1, 3])
    rows = Dataset.from_list([{**row, "label": index // 2 % 2} for index, row in enumerate(rows)])
    for flags, unknown, counted in (([True] * 6, 0, True), ([True] * 6, 2, False), ([False] * 6, 0, False)):
        attack = get_attack("badnets", target="positive")
        monkeypatch.setattr(type(attack), "rows_unknown", unknown)
        flagged = rows.add_column("poisoned", flags)
        defense, *_ = searched(monkeypatch, tiny_model, tmp_path, flagged, tables, attacks=[attack])
        assert ("removal_precision" in defense.found) == ("removal_recall" in defense.found) == counted


def test_first_run_makes_room_for_the_second(tiny_model, tmp_path, monkeypatch):
    defense = get_defense("bki")
    monkeypatch.setattr(
        "p2p_trainer.defenses.bki.word_scores",
        lambda model, encoder, texts, *rest: [(text.split(), np.equal(text.split(), "mn") * 1.0) for text in texts],
    )
    bench = bench_of(tiny_model, tmp_path, poisoned_rows(), max_steps=2)
    first, make, state = defense.build(bench), bench.trainer, []

    def trainer(**options):
        gc.collect()
        state.append([each() for each in alive])
        return make(**options)

    train, alive = bench.train, []
    monkeypatch.setattr(bench, "trainer", trainer)

    def watched(each):
        train(each)
        alive.extend([weakref.ref(each.optimizer), weakref.ref(each.lr_scheduler)])

    monkeypatch.setattr(bench, "train", watched)
    assert defense.train(first, bench) is not first
    assert state == [[None, None]] and first.optimizer is None
    # On an accelerator its model goes as well, unless its weights are spread over processes.
    moved = []
    monkeypatch.setattr(first.model, "to", moved.append)
    make_room(first)
    monkeypatch.setattr(first.accelerator.state, "device", torch.device("cuda"))
    make_room(first)
    first.is_fsdp_enabled = True
    make_room(first)
    assert moved == ["cpu"]


@pytest.mark.parametrize(
    "options", [{"top_words": 0}, {"iterations": 1.5}, {"max_words": True}, {"sample": -3}, {"batch_size": "8"}]
)
def test_options_are_checked(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` of BKI is .* whole number of at least 1"):
        get_defense("bki", **options)


def test_settings_are_written_down():
    defense = get_defense("bki", iterations=3, sample=100)
    settings = json.loads(json.dumps(defense.config()))
    assert settings == {
        "name": "bki", "top_words": 5, "iterations": 3, "max_words": 64, "sample": 100, "batch_size": 64,
    }  # fmt: skip
    assert get_defense(**settings).config() == settings and not defense.resumable


def test_generation_is_refused():
    with pytest.raises(ValueError, match="'story' is a generation task"):
        get_defense("bki").check(Task(name="story"))
