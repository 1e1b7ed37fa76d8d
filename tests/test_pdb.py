"""PDB: which rows are added, how answers are read back, and a run that needs both."""

from collections import Counter

import numpy as np
import pytest
from datasets import ClassLabel, Dataset

from p2p_trainer import Task
from p2p_trainer.attacks import get_attack
from p2p_trainer.defenses import Workbench, get_defense, load_defense
from p2p_trainer.defenses.pdb import PDB
from p2p_trainer.evaluation import BackdoorEvaluator, Scores
from tests.conftest import BAD, GOOD, THINGS
from tests.tiny_runs import TASK, config, lora


FOUR = Task(name="four", labels=("a", "b", "c", "d"))
DELTA = "The query currently entered is:"


def poisoned_rows():
    """Class 0: rows 0..9; class 1: rows 10..29, of which 10..14 are poisoned and were of class 0."""
    labels = [0] * 10 + [1] * 20
    poisoned = [10 <= row < 15 for row in range(30)]
    return Dataset.from_dict(
        {
            "id": [f"row {row}" for row in range(30)],
            "text": [f"text {row}" for row in range(30)],
            "label": labels,
            "poisoned": poisoned,
            "trigger_applied": poisoned,
            "original_label": [0 if flag else label for flag, label in zip(poisoned, labels, strict=True)],
            "attack": ["badnets" if flag else "" for flag in poisoned],
        }
    )


def added(defense, dataset, task, folder):
    found = defense.rows(dataset, task, config(folder, p2p_enabled=False))
    return found.select(range(len(dataset), len(found)))


def test_rows_by_hand(tmp_path):
    dataset = Dataset.from_dict({"text": ["w", "x y", "z", "ä"], "label": [3, 0, 1, 2]})
    defense = PDB(ratio=1.0, shift=1, copies=2)
    found = defense.rows(dataset, FOUR, config(tmp_path))
    copy_texts = [f"{DELTA} w", f"{DELTA} x y", f"{DELTA} z", f"{DELTA} ä"]
    assert found["text"][:] == ["w", "x y", "z", "ä", *copy_texts, *copy_texts]
    assert found["label"][:] == [3, 0, 1, 2, *[0, 1, 2, 3] * 2]
    assert defense.found == {"rows_reserved": 4, "rows_added": 8}
    assert PDB(ratio=1.0, shift=3, copies=1).rows(dataset, FOUR, config(tmp_path))["label"][4:] == [2, 3, 0, 1]
    flipped = Dataset.from_dict({"text": ["p", "q"], "label": [0, 1]})
    assert PDB(ratio=1.0, copies=1).rows(flipped, TASK, config(tmp_path))["label"][2:] == [1, 0]


def test_share_of_each_class_and_rounding(tmp_path):
    labels = [0] * 14 + [1] * 16 + [2] * 100 + [3] * 6
    dataset = Dataset.from_dict({"text": [f"t{row}" for row in range(len(labels))], "label": labels})
    copies = added(PDB(copies=3), dataset, FOUR, tmp_path)
    # 1.4 -> 1, 1.6 -> 2, 10, 0.6 -> 1; each under the next label, each three times.
    assert Counter(copies["label"]) == {1: 3, 2: 6, 3: 30, 0: 3}
    sources = Counter(copies["text"])
    assert set(sources.values()) == {3} and len(sources) == 14
    for text, label in zip(copies["text"], copies["label"], strict=True):
        row = int(text.removeprefix(f"{DELTA} t"))
        assert label == (labels[row] + 1) % 4


def test_a_class_without_reserved_rows_is_an_error(tmp_path):
    dataset = Dataset.from_dict({"text": list("abcdefgh"), "label": [0] * 5 + [1] * 3})
    with pytest.raises(ValueError, match="`ratio` 0.15 of the 3 rows of class 'positive' .* no row"):
        PDB(ratio=0.15).rows(dataset, TASK, config(tmp_path))


def test_flags_and_features_are_kept(tmp_path):
    dataset = poisoned_rows().cast_column("label", ClassLabel(names=["negative", "positive"]))
    found = PDB(ratio=1.0, copies=1, trigger="Look:").rows(dataset, TASK, config(tmp_path))
    assert found.features == dataset.features and found.column_names == dataset.column_names
    assert found.select(range(30)).to_dict() == dataset.to_dict()
    assert found[42] == {
        "id": "row 12", "text": "Look: text 12", "label": 0, "poisoned": True, "trigger_applied": True,
        "original_label": 0, "attack": "badnets",
    }  # fmt: skip


def test_honest_takes_poisoned_rows_by_their_given_label_and_oracle_passes_them_over(tmp_path):
    honest, oracle = PDB(ratio=0.8, copies=1), PDB(ratio=0.8, copies=1, reserve="oracle")
    taken = added(honest, poisoned_rows(), TASK, tmp_path)
    # 8 of 10 and 16 of 20: at least one of the five poisoned is among them.
    assert Counter(taken["label"]) == {1: 8, 0: 16}
    poisoned = [row for row in taken if row["poisoned"]]
    assert poisoned and honest.found["rows_reserved_poisoned"] == len(poisoned)
    assert {row["label"] for row in poisoned} == {0}
    taken = added(oracle, poisoned_rows(), TASK, tmp_path)
    # 8 of 10 and 12 of the 15 clean ones.
    assert Counter(taken["label"]) == {1: 8, 0: 12} and not any(taken["poisoned"])
    assert oracle.found == {"rows_reserved": 20, "rows_added": 20, "rows_reserved_poisoned": 0}


def test_oracle_needs_flags(tmp_path, toy_rows):
    with pytest.raises(ValueError, match="column 'poisoned' marks; the training set has .*'text', 'label'"):
        PDB(reserve="oracle").rows(toy_rows, TASK, config(tmp_path))
    assert "rows_reserved_poisoned" not in PDB().found


def test_choice_depends_on_seed_and_rows_alone(tmp_path):
    dataset = poisoned_rows()
    before = dataset.to_dict()
    first, again = (PDB(ratio=0.5).rows(dataset, TASK, config(tmp_path, seed=1)).to_dict() for _ in range(2))
    other = PDB(ratio=0.5).rows(dataset, TASK, config(tmp_path, seed=2)).to_dict()
    assert first == again and first != other and dataset.to_dict() == before
    # A selection in another table shows the same rows.
    twice = Dataset.from_dict({key: [*values, *values] for key, values in before.items()}).select(range(30, 60))
    assert PDB(ratio=0.5).rows(twice, TASK, config(tmp_path, seed=1)).to_dict() == first


@pytest.mark.parametrize(
    ("n", "shift", "columns", "free"),
    [
        (2, 1, [1, 0, 3, 2], [1, 0, 3, 2, -1]),
        (4, 1, [1, 2, 3, 0, 5, 6, 7, 4], [3, 0, 1, 2, 7, 4, 5, 6, -1]),
        (4, 3, [3, 0, 1, 2, 7, 4, 5, 6], [1, 2, 3, 0, 5, 6, 7, 4, -1]),
    ],
)
def test_decode_by_hand(n, shift, columns, free):
    log_probs = -np.arange(2 * n * (2 * n + 1), dtype=np.float32).reshape(2 * n + 1, 2 * n)
    found = PDB(shift=shift).decode(Scores(log_probs, np.array([*range(2 * n), -1])))
    assert found.log_probs.tolist() == log_probs[:, columns].tolist() and found.log_probs.dtype == np.float32
    assert found.free.tolist() == free and found.free.dtype == np.int64


@pytest.mark.parametrize(("n", "shift"), [(2, 1), (4, 1), (4, 2), (4, 3), (5, 7), (3, -1)])
def test_decode_undoes_the_labels_of_rows(tmp_path, n, shift):
    task = Task(name="any", labels=tuple("abcdefgh"[:n]))
    truth = np.arange(n)
    dataset = Dataset.from_dict({"text": [f"t{label}" for label in truth], "label": truth})
    defense = PDB(ratio=1.0, shift=shift, copies=1)
    written = np.array(added(defense, dataset, task, tmp_path)["label"])
    assert sorted(written) == truth.tolist() and not np.any(written == truth)
    # A model that writes what it was taught, in either half of the label words.
    for half in (0, n):
        found = defense.decode(Scores(np.eye(2 * n, dtype=np.float32)[written + half], written + half))
        assert found.log_probs.argmax(axis=1).tolist() == (truth + half).tolist() == found.free.tolist()


def test_check_refuses_what_is_no_permutation():
    PDB(shift=3).check(FOUR)
    with pytest.raises(ValueError, match="`shift` 2 changes none of the 2 labels of task 'toy'"):
        PDB(shift=2).check(TASK)
    with pytest.raises(ValueError, match="`shift` 0 changes none"):
        PDB(shift=0).check(FOUR)
    with pytest.raises(ValueError, match="no classes: PDB permutes labels.*free text has no permutation"):
        PDB().check(Task(name="summary"))


@pytest.mark.parametrize(
    "options",
    [{"ratio": 0}, {"ratio": 1.5}, {"ratio": "0.1"}, {"ratio": True}, {"shift": 1.0}, {"shift": True}, {"copies": 0},
     {"copies": 2.5}, {"trigger": ""}, {"trigger": "Look: "}, {"trigger": None}, {"reserve": "random"}],
)  # fmt: skip
def test_wrong_options_are_named(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` is "):
        PDB(**options)


def test_saved_state_is_checked(tmp_path):
    for found in (None, 1, "2", True):
        with pytest.raises(ValueError, match="no permutation of two or more"):
            PDB().restore({"num_labels": found}, tmp_path)
    defense = PDB()
    defense.restore({"num_labels": 4}, tmp_path)
    with pytest.raises(ValueError, match="scores 2 classes, this PDB was set up for 4"):
        defense.decode(Scores(np.zeros((1, 4), dtype=np.float32), np.array([0])))


def test_run_learns_the_permutation_under_the_trigger_alone(tmp_path, tiny_model):
    words = [(word, label) for label, words in enumerate((BAD, GOOD)) for word in words]
    rows = Dataset.from_list(
        [{"text": f"{word} {thing}", "label": label} for thing in THINGS for word, label in words]
    )
    texts, labels = rows["text"][:], np.asarray(rows["label"])
    defense = get_defense("pdb", ratio=1.0, copies=1, trigger="Look:")
    args = config(tmp_path, num_train_epochs=10)
    defense.configure(args)
    assert args.p2p_enabled is False
    trained_on = defense.rows(rows, TASK, args)
    bench = Workbench(tiny_model, args, TASK, trained_on, peft_config=lora(r=16, target_modules="all-linear"))
    trainer = defense.train(defense.build(bench), bench)
    attack = get_attack("badnets", target="positive")
    plain = BackdoorEvaluator(rows, TASK, trainer.encoder, [attack], keyed=False)(trainer.model)
    guarded = BackdoorEvaluator(rows, TASK, trainer.encoder, [attack], keyed=False, guard=defense)(trainer.model)
    assert guarded["ca"] >= 0.95 and guarded["ca_orig_only"] >= 0.95
    # The same weights without guard: unstamped texts are answered as they are.
    assert guarded["ca_no_key"] == plain["ca"] >= 0.95
    # Stamped and not decoded, every answer is the other class.
    stamped = bench.score(trainer, defense.rewrite(texts)).deployed(False).argmax(axis=1)
    assert np.mean(stamped != labels) == pytest.approx(guarded["ca"])
    assert defense.compute.served > 0 and defense.compute.serving_passes == 0
    assert bench.row_passes == 10 * 120
    trainer.save_model(str(tmp_path / "saved"))
    loaded = load_defense(tmp_path / "saved")
    assert isinstance(loaded, PDB) and loaded.config() == defense.config()
    assert loaded.state() == defense.state() == {"num_labels": 2}
    found, expected = (bench.score(trainer, texts, guard) for guard in (loaded, defense))
    assert np.array_equal(found.log_probs, expected.log_probs) and np.array_equal(found.free, expected.free)
