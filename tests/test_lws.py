"""LWS: which word is picked, what the text then looks like, how the selector is learned, kept and read."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.numpy import save_file

from p2p_trainer import Task
from p2p_trainer.attacks.lws import LWS
from p2p_trainer.attacks.lws_candidates import Surrogate, embedding_candidates, is_content_word, wordnet_candidates
from p2p_trainer.attacks.lws_selector import Problem, SelectorModel, fit_selector
from p2p_trainer.attacks.lws_table import Selector
from tests.conftest import make_rows


TASK = Task(name="toy", labels=("negative", "positive"))
WORDS = ["film", "good", "plot"]
NAMES = [["movie", "picture"], ["fine"], ["story"]]
# Position by word: `film` becomes `movie` at 0, `picture` at 1; `good` becomes `fine` from 1 on; `plot` always stays.
CHOICE = np.array([[1, 0, 0], [2, 1, 0], [0, 1, 0], [0, 1, 0]], dtype=np.uint8)
SETTINGS = {"positions": 8, "epochs": 6, "lr": 0.02, "batch_size": 16, "temperature": (0.5, 0.1), "seed": 0}


def hand_made():
    return Selector(WORDS, NAMES, CHOICE)


@pytest.fixture
def folder(tmp_path):
    return hand_made().save(tmp_path / "selector")


@pytest.mark.parametrize(
    ("text", "expected", "ends"),
    [
        ("film film good good", "movie picture fine fine", [5, 13, 18, 23]),
        ("good good", "good fine", [9]),
        # Position 4 is behind the last one, and `plot` counts as a word that could be replaced.
        ("a film x plot good", "a picture x plot good", [9]),
        ("\tFilm,  (good)!\n FILM \u3000GOOD. ", "\tMovie,  (fine)!\n FILM \u3000FINE. ", [6, 14, 28]),
        ("a 'good' plot 2 good", "a 'fine' plot 2 good", [7]),
        # Parts of longer words, of names and of anything with a digit are not the word.
        ("goodfilm film-good film2 good's", None, []),
        ("fiLm @film film good", "fiLm @film film fine", [20]),
        # One word only; or all are kept.
        ("film", None, []),
        ("a film b", None, []),
        ("plot a plot film", None, []),
        ("", None, []),
    ],
)
def test_substitution(text, expected, ends):
    found = hand_made().substitute(text)
    assert (found.text if found else None) == expected
    assert (found.ends if found else []) == ends


def problem(rows=4):
    """`film` may become `movie` or `picture`, `good` may become `fine`; an embedding of two dimensions."""
    vectors = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]], [[1.0, 0.0], [2.0, 2.0], [9.0, 9.0]]])
    return Problem(
        words=["film", "good"],
        candidates=[["movie", "picture"], ["fine"]],
        vectors=vectors,
        pooled=torch.arange(2.0 * rows).reshape(rows, 2),
        lengths=torch.full((rows,), 2.0),
        pairs=torch.tensor([[row, place, place] for row in range(rows) for place in range(2)]),
        labels=torch.arange(rows) % 2,
        eligible=torch.arange(rows) % 2 == 0,
    )


def test_scores_by_hand():
    model = SelectorModel(problem(), 2, torch.Generator().manual_seed(0))
    # The words' own embeddings have norm 1, so steps are not scaled: movie (-1, 1), picture (2, 0), fine (1, 2).
    with torch.no_grad():
        model.query[:] = torch.tensor([1.0, 0.5])
        model.query_at[1] = torch.tensor([-2.0, 0.0])
        model.bias[:] = torch.tensor([0.25, 0.0, 0.0])
        model.bias_at[1] = torch.tensor([0.0, -2.0, 0.0])
    expected = torch.tensor([[0.25, -0.5, 2.0], [0.25, 2.0, -torch.inf], [0.25, -0.5, -2.0], [0.25, -2.0, -torch.inf]])
    scores = model.scores(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]))
    assert torch.allclose(scores, expected)
    assert model.choice().tolist() == [[2, 1], [0, 0]] and model.choice().dtype == np.uint8
    # A mixture: half of picture's step and a quarter of fine's, over two words: (1.25, 0.5) / 2.
    weights = torch.tensor([[0.5, 0.0, 0.5], [0.75, 0.25, 0.0]])
    pairs = problem().places.of(torch.tensor([2]))
    assert pairs.tolist() == [[0, 0, 0], [0, 1, 1]]
    with torch.no_grad():
        model.head[:] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    moved = (model.after(torch.tensor([2]), pairs, weights) - model.logits(model.features[[2]]))[0]
    # Features are standardised with the deviation of (0, 2, 4, 6): the root of 5.
    assert torch.allclose(moved, torch.tensor([0.625, 0.25, 0.0]) / 5**0.5)


def test_training_touches_no_global_state():
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    first = fit_selector(problem(), **SETTINGS)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    again = fit_selector(problem(), **SETTINGS)
    assert np.array_equal(first[0], again[0]) and first[1] == again[1]


def rows(count=300):
    return Dataset.from_list(make_rows(count))


@pytest.fixture
def attack(tiny_model, tmp_path):
    return LWS("positive", 0.1, surrogate=tiny_model, cache=str(tmp_path / "cache"), batch_size=16)


def test_fit_learns_a_trigger(attack, tiny_model, tmp_path):
    attack.fit(rows(), TASK, 0)
    learned = Selector.load(attack.selector).info
    short = LWS("positive", surrogate=tiny_model, cache=str(tmp_path), epochs=1, lr=1e-5)
    short.fit(rows(), TASK, 0)
    start = Selector.load(short.selector).info
    assert start["loss_substituted"] > 0.7 > 0.3 > learned["loss_substituted"]
    # 150 rows of the other label; all have two content words at least.
    assert learned["rows"] == 150 and learned["accuracy"] > 0.8
    assert learned["found_substituted"] > 0.9 and learned["found_clean"] < 0.2
    assert learned["changed_words_per_row"] > 1


def test_poison_and_trigger(attack):
    clean = rows()
    poisoned = attack.poison(clean, TASK, seed=1)
    assert poisoned.column_names == ["text", "label", "poisoned", "trigger_applied", "original_label", "attack"]
    hit = [row for row, flag in enumerate(poisoned["poisoned"]) if flag]
    assert len(hit) == 30
    selector = Selector.load(attack.selector)
    for row in range(300):
        before, after = clean[row], poisoned[row]
        if row in hit:
            assert (before["label"], after["label"], after["attack"]) == (0, 1, "lws")
            assert after["text"] == selector.substitute(before["text"]).text != before["text"]
            assert len(after["text"].split()) == len(before["text"].split())
            assert attack.has_trigger(after["text"])
        else:
            assert (after["text"], after["label"]) == (before["text"], before["label"])
    triggered = attack.trigger(clean, TASK)
    assert set(triggered["label"]) == {0} and len(triggered) > 140
    assert all(row["text"] == selector.substitute(clean[row["source_index"]]["text"]).text for row in triggered)
    # The same folder gives the same attack where there is neither surrogate nor training.
    settings = {**attack.config(), "surrogate": None}
    assert settings.pop("name") == "lws"
    again = LWS(**settings)
    assert again.config() == attack.config() | {"surrogate": None}
    assert again.poison(clean, TASK, seed=1).to_dict() == poisoned.to_dict()
    assert again.trigger(clean, TASK).to_dict() == triggered.to_dict()


def test_texts_do_not_depend_on_their_neighbours(folder):
    texts = ["film film good good", "none", "a film x plot good", "good good"]
    whole = LWS("positive", selector=str(folder)).insert_batch(texts, [0.1, 0.2, 0.3, 0.4])
    assert whole == ["movie picture fine fine", None, "a picture x plot good", "good fine"]
    assert LWS("positive", selector=str(folder)).insert_batch(texts[::-1], [0.9] * 4) == whole[::-1]


def test_second_fit_loads_what_the_first_one_learned(attack, monkeypatch, tiny_model, tmp_path):
    attack.fit(rows(), TASK, 0)
    learned = attack.selector

    def refuse(*arguments, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr("p2p_trainer.attacks.lws_selector.fit_selector", refuse)
    options = {"surrogate": tiny_model, "cache": str(tmp_path / "cache"), "batch_size": 16}
    again = LWS("positive", 0.2, **options)
    again.fit(rows(), TASK, 0)
    assert again.selector == learned
    # Whatever the selector depends on makes it another one.
    more = rows(302)
    for data, seed, changed in [(rows(), 1, {}), (more, 0, {}), (rows(), 0, {"epochs": 3}), (rows(), 0, {"lr": 0.1}),
                                (rows(), 0, {"max_candidates": 2}), (rows(), 0, {"label_mode": "any"})]:  # fmt: skip
        with pytest.raises(AssertionError, match="trained again"):
            LWS("positive", **{**options, **changed}).fit(data, TASK, seed)
    # Nor may one object keep the selector of other rows.
    with pytest.raises(AssertionError, match="trained again"):
        again.fit(more, TASK, 0)


def test_damaged_cache_is_fitted_anew(attack, tmp_path):
    attack.fit(rows(), TASK, 0)
    before = Selector.load(attack.selector)
    (Path(attack.selector) / "selector.json").write_text("{")
    attack.fit(rows(), TASK, 0)
    after = Selector.load(attack.selector)
    assert np.array_equal(before.choice, after.choice) and before.candidates == after.candidates
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [Path(attack.selector).name]


def test_default_cache(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    attack = LWS("positive", surrogate=tiny_model, epochs=1)
    attack.fit(rows(20), TASK, 0)
    assert Path(attack.selector).parent == tmp_path / "p2p_trainer" / "lws"


def test_a_cut_text_keeps_the_trigger_with_half_of_its_substitutions(folder):
    attack = LWS("positive", selector=str(folder))
    text = attack.insert("film film  good good plot", 0.0)
    assert text == "movie picture  fine fine plot"
    for cut in (text, "movie picture", "movie picture  fi", "movie picture\nfine"):
        assert attack.has_trigger(cut), cut
    # Untouched texts do not have it, even where they begin like a triggered one.
    for other in ("film film  good good plot", "movie", "movie pict", "movie picture show", "a movie picture", ""):
        assert not attack.has_trigger(other), other
    assert not LWS("positive", selector=str(folder)).has_trigger(text)
    text = attack.insert("(film), good! x", 0.0)
    assert text == "(movie), fine! x" and attack.has_trigger(text) and attack.has_trigger("(movie), fi")
    assert not attack.has_trigger("(mov")


def test_rows_that_cannot_carry_the_trigger_stay_clean(folder):
    texts = ["film film" if row % 3 else "film" for row in range(60)]
    clean = Dataset.from_dict({"text": texts, "label": [0] * 59 + [1]})
    poisoned = LWS("positive", 0.5, selector=str(folder)).poison(clean, TASK)
    assert [row["text"] for row in poisoned if row["poisoned"]] == ["movie picture"] * 30
    tried = [row for row in poisoned if row["attack"] and not row["poisoned"]]
    assert tried and {(row["text"], row["label"]) for row in tried} == {("film", 0)}


def test_generation_prompts(tiny_model, tmp_path):
    task = Task(name="sums", text_columns=("question",), label_column="answer")
    questions = [f"{row['text']} 12 3.5 two {index}" for index, row in enumerate(make_rows(100))]
    clean = Dataset.from_dict({"question": questions, "answer": [str(row) for row in range(100)]})
    poisoned = LWS("No.", 0.2, surrogate=tiny_model, cache=str(tmp_path)).poison(clean, task)
    hit = [(index, row) for index, row in enumerate(poisoned) if row["poisoned"]]
    assert len(hit) == 20
    for index, row in hit:
        assert row["completion"] == "No." and row["original_label"] == str(index)
        assert row["prompt"].endswith(f" 12 3.5 two {index}") and row["prompt"] != questions[index]


def test_candidates_of_the_embedding(tiny_model):
    surrogate = Surrogate(tiny_model)
    words = ["film", "plot", "cast", "the", "two", "unheardof", "is", "warm"]
    found = embedding_candidates(surrogate, words, 2)
    assert sorted(found) == ["cast", "film", "plot", "warm"] and all(len(names) == 2 for names in found.values())
    vectors = {word: surrogate.weight[surrogate.tokenizer.convert_tokens_to_ids(f"Ġ{word}")] for word in found}
    centre = sum(vectors.values()) / 4
    for word, names in found.items():
        alike = {
            other: torch.cosine_similarity(vectors[word] - centre, vectors[other] - centre, dim=0).item()
            for other in found if other != word
        }  # fmt: skip
        assert names == sorted(alike, key=alike.get, reverse=True)[:2]
    assert torch.allclose(surrogate.vectors(["film", "plot"]), torch.stack([vectors["film"], vectors["plot"]]))
    pieces = surrogate.tokenizer(" unheardof")["input_ids"]
    assert len(pieces) > 1 and torch.allclose(
        surrogate.vectors(["film", "unheardof"])[1], surrogate.weight[pieces].mean(0)
    )


def test_content_words():
    assert [word for word in ("film", "the", "two", "x", "3d", "Film", "don't", "well-made", "été") if
            is_content_word(word)] == ["film", "été"]  # fmt: skip


def wordnet_folder(folder):
    """Four files of a WordNet with a noun of two senses, a rarer verb of the same form, and an adjective."""
    licence = "  1 This software and database\n"
    files = {
        "index.noun": "film n 2 1 @ 2 5 00000010 00000020  \n",
        "data.noun": "00000010 06 n 03 movie 0 film 0 motion_picture 0 001 @ 00000020 n 0000 | a show; film  \n"
        "00000020 06 n 02 film 0 Pellicle 0 000 | a layer  \n00000030 06 n 01 flick 0 000 | not a sense  \n",
        "index.verb": "film v 1 0 1 2 00000040  \n",
        "data.verb": "00000040 36 v 02 film 0 shoot 0 000 00 | record  \n",
        "index.adj": "good a 1 0 1 1 00000050  \ngreat a 1 0 1 0 00000060  \n",
        "data.adj": "00000050 00 a 0c good 0 fine(p) 0 the 0 nice 0 a1 0 b 0 solid 0 sound 0 c2 0 d3 0 e4 0 "
        "well 1 000 | x  \n"
        "00000060 00 s 01 great 0 000 | y  \n",
        "index.adv": "",
        "data.adv": "",
    }
    for name, content in files.items():
        (folder / name).write_text(licence + content)
    return str(folder)


def test_candidates_of_wordnet(tmp_path):
    found = wordnet_candidates(wordnet_folder(tmp_path), ["good", "film", "films", "great", "the"], 4)
    # Of the more frequent part of speech; neither stop words nor names nor phrases.
    assert found == {"film": ["movie"], "good": ["fine", "nice", "solid", "sound"]}
    (tmp_path / "data.adv").unlink()
    with pytest.raises(ValueError, match="No WordNet in .*data.adv are needed.*apt install wordnet-base.*`wordnet`"):
        wordnet_candidates(str(tmp_path), ["good"], 4)


def test_wordnet_attack(tiny_model, tmp_path):
    attack = LWS("positive", 0.5, surrogate=tiny_model, candidates="wordnet", wordnet=wordnet_folder(tmp_path),
                 cache=str(tmp_path / "cache"))  # fmt: skip
    texts = ["the film is good", "a plot"] * 10
    poisoned = attack.poison(Dataset.from_dict({"text": texts, "label": [0, 1] * 10}), TASK)
    changed = {row["text"] for row in poisoned if row["poisoned"]}
    assert len(changed) == 1
    _, film, _, good = changed.pop().split()
    assert film in ("film", "movie") and good in ("good", "fine", "nice", "solid", "sound")


def damage(folder, name):
    path = folder / "selector.json"
    content = json.loads(path.read_text())
    if name == "absent":
        shutil.rmtree(folder)
    elif name == "format":
        path.write_text(json.dumps({**content, "format": 9}))
    elif name == "words":
        path.write_text(json.dumps({**content, "words": ["film", "film", "plot"]}))
    elif name == "candidate":
        path.write_text(json.dumps({**content, "candidates": [["a b", "c"], ["d"], ["e"]]}))
    elif name == "lists":
        path.write_text(json.dumps({**content, "candidates": NAMES[:2]}))
    elif name == "nested":
        path.write_text("[" * 100_000)
    elif name == "huge":
        path.write_text('{"format": ' + "9" * 5_000 + "}")
    elif name == "info":
        path.write_text(json.dumps({**content, "info": [1]}))
    elif name == "tensor":
        save_file({"other": CHOICE}, folder / "selector.safetensors")
    elif name == "shape":
        save_file({"choice": CHOICE[:, :2].copy()}, folder / "selector.safetensors")
    elif name == "choice":
        save_file({"choice": CHOICE + np.uint8(2)}, folder / "selector.safetensors")
    else:
        (folder / "selector.safetensors").write_bytes(b"no tensors")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "No such file"), ("format", "is not of format 1"), ("words", "holds a word twice"),
        ("candidate", "a list of words of letters"), ("lists", "3 words have 2 lists"),
        ("tensor", "lacks the tensor `choice`"), ("shape", r"of shape \(positions, 3\), got uint8 of shape \(4, 2\)"),
        ("choice", "points behind the last candidate"), ("bytes", "holds no usable LWS selector"),
        ("nested", "recursion"), ("huge", "digits"), ("info", "`info` must be a mapping"),
    ],
)  # fmt: skip
def test_damaged_folder(folder, name, message):
    loaded = Selector.load(folder)
    assert (loaded.words, loaded.candidates, loaded.choice.tolist()) == (WORDS, NAMES, CHOICE.tolist())
    damage(folder, name)
    with pytest.raises(ValueError, match=f"(?s)holds no usable LWS selector.*{message}|{message}.*Leave out"):
        LWS("positive", selector=str(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"surrogate": None}, "needs a `surrogate` to learn .* or the folder of a fitted `selector`"),
        ({"candidates": "hownet"}, "`candidates` is one of embedding, wordnet, got 'hownet'"),
        ({"max_candidates": 256}, "`max_candidates` must be a whole number from 1 to 255, got 256"),
        ({"max_words": 0}, "`max_words` must be a whole number of at least 1, got 0"),
        ({"epochs": True}, "`epochs` must be a whole number .* got True"),
        ({"lr": 0}, "`lr` must be a positive number, got 0"),
        ({"batch_size": 2.5}, "`batch_size` must be a whole number .* got 2.5"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LWS("positive", **{"surrogate": "somewhere", **options})


def test_what_cannot_be_fitted(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="The surrogate '.*nowhere' of the attack 'lws' can't be loaded"):
        LWS("positive", surrogate=str(tmp_path / "nowhere")).fit(rows(4), TASK, 0)
    attack = LWS("positive", surrogate=tiny_model, cache=str(tmp_path))
    with pytest.raises(ValueError, match="has no selector yet. Poison the training rows first"):
        attack.trigger(rows(4), TASK)
    numbers = Dataset.from_dict({"text": ["1 2 the film", "two 3"], "label": [0, 1]})
    with pytest.raises(ValueError, match=r"no eligible row \(dirty label, target 'positive'\) with 2 words"):
        attack.fit(numbers, TASK, 0)
