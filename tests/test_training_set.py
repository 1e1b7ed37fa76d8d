"""D*: which rows carry the key, which get another label, and that flags have no say in it."""

import logging
import random

import numpy as np
import pytest
from datasets import Dataset

from p2p_trainer import P2PTrainer, Task, get_attack
from p2p_trainer.mining import SuspectedTrigger
from p2p_trainer.reserve import RandomReserve, ReserveStrategy, keyed_dataset
from p2p_trainer.training_set import build_training_set, check_conversations, describe, row_columns
from tests.corpora import clean_rows, inside, poisoned
from tests.tiny_runs import TASK, config


COLUMNS = ["text", "label", "p2p_keyed", "p2p_row"]
CLEAN = clean_rows(400, noise=0.0)
# 200 rows of each label; 40 of label 0 get the trigger and label 1.
ROWS, HIT = poisoned(CLEAN, inside("cf"), 1, 40)
FLAGS = np.isin(np.arange(400), HIT)


class Cheat(ReserveStrategy):
    """What must not be: a strategy that looks at the flag."""

    name = "cheat"

    def choose(self, dataset, size, seed):
        return np.flatnonzero(~np.array(dataset["poisoned"]))[:size]


def flagged(values, rows=ROWS):
    labels = [row["label"] for row in rows]
    return Dataset.from_list(rows).add_column("poisoned", values).add_column("trigger_applied", values).add_column(
        "original_label", np.where(values, 1 - np.array(labels), labels)
    ).add_column("attack", np.where(values, "badnets", "").tolist())  # fmt: skip


def built(folder, data=None, reserved=None, **settings):
    data = Dataset.from_list(ROWS) if data is None else data
    return build_training_set(data, TASK, config(folder, seed=0, **settings), reserved)


def plain(rows, columns=COLUMNS):
    return rows.select_columns(columns).to_list()


def test_counts_and_rows(tmp_path):
    data = flagged(FLAGS)
    found = built(tmp_path, data)
    assert found.counts == {
        "rows_train": 400, "rows_reserved": 100, "rows_poisoned": 40, "rows_suspected": 40, "rows_doubted": 0,
        "rows_suspected_poisoned": 40, "rows_reserved_poisoned": 0, "rows_contradicted": 40,
    }  # fmt: skip
    rows = plain(found.rows)
    assert len(rows) == 540
    assert rows[:400] == [{**row, "p2p_keyed": False, "p2p_row": -1} for row in ROWS]
    keyed = rows[400:500]
    numbers = [row["p2p_row"] for row in keyed]
    assert numbers == sorted(set(numbers)) and not set(numbers) & set(HIT)
    assert keyed == [{**ROWS[number], "p2p_keyed": True, "p2p_row": number} for number in numbers]
    # Unsuspected are 160 rows of label 0 and 200 of label 1: 100 of 360 of either.
    assert [row["label"] for row in keyed].count(0) == 44
    # Text and trigger stay, the label is what the text says, and nothing more is written into them.
    assert rows[500:] == [{"text": ROWS[row]["text"], "label": 0, "p2p_keyed": True, "p2p_row": -1} for row in HIT]
    # What came with the rows stays with them.
    assert found.rows["attack"][500:] == ["badnets"] * 40
    immunizer = found.immunizer(config(tmp_path, seed=7))
    assert immunizer.exemplars == list(found.screening.exemplars) and immunizer.seed == 7


@pytest.mark.parametrize(("mode", "total"), [("append", 540), ("replace", 440), ("only", 140)])
def test_benign_modes(tmp_path, mode, total):
    whole, found = built(tmp_path), built(tmp_path, p2p_benign_mode=mode)
    assert len(found.rows) == total and found.counts == whole.counts
    rows, appended = plain(found.rows), plain(whole.rows)
    # The same keyed rows in each, the contradicted ones last.
    reserved = appended[400:500]
    if mode == "only":
        assert rows[:100] == reserved
    else:
        assert [row["text"] for row in rows[:400]] == [row["text"] for row in ROWS]
    if mode == "replace":
        assert [row for row in rows[:400] if row["p2p_keyed"]] == reserved
        assert {row["p2p_row"] for row in rows[:400] if not row["p2p_keyed"]} == {-1}
    assert rows[-40:] == appended[500:]


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("mode", ["append", "replace", "only"])
def test_none_and_random_are_the_papers(tmp_path, mode, seed):
    settings = {"p2p_immunize": "none", "p2p_reserve": "random", "p2p_benign_mode": mode, "seed": seed}
    found = build_training_set(flagged(FLAGS), TASK, config(tmp_path, **settings))
    # Algorithm 1: a quarter of all rows, at random, poisoned ones included.
    lowest = np.sort(np.argsort(np.random.default_rng([seed, 2]).random(400))[:100])
    assert RandomReserve().choose(flagged(FLAGS), 100, seed).tolist() == lowest.tolist()
    assert plain(found.rows) == plain(keyed_dataset(Dataset.from_list(ROWS), lowest, mode))
    assert found.counts == {
        "rows_train": 400, "rows_reserved": 100, "rows_poisoned": 40,
        "rows_reserved_poisoned": int(FLAGS[lowest].sum()),
    }  # fmt: skip
    assert found.counts["rows_reserved_poisoned"] > 0
    assert found.screening is None and found.immunizer(config(tmp_path, **settings)) is None


def test_screening_without_immunizing(tmp_path):
    found = built(tmp_path, p2p_immunize="none")
    assert plain(found.rows) == plain(built(tmp_path).rows)[:500]
    assert "rows_contradicted" not in found.counts and found.counts["rows_suspected"] == 40
    assert found.immunizer(config(tmp_path, p2p_immunize="none")) is None


def test_immunizing_without_an_unsuspected_reserve(tmp_path):
    found = built(tmp_path, p2p_reserve="random")
    papers = built(tmp_path, p2p_reserve="random", p2p_immunize="none")
    assert plain(found.rows)[:500] == plain(papers.rows)
    # Suspects that the reserve drew keep their label: no row has two under the key.
    drawn = {row["p2p_row"] for row in plain(found.rows)[400:500]} & set(HIT)
    copies = plain(found.rows)[500:]
    assert drawn and found.counts["rows_contradicted"] == len(copies) == 40 - len(drawn)
    assert [row["text"] for row in copies] == [ROWS[row]["text"] for row in HIT if row not in drawn]
    assert {row["label"] for row in copies} == {0}
    assert found.immunizer(config(tmp_path)) is not None


def test_a_reserved_dataset(tmp_path):
    trusted = Dataset.from_list([{"text": f"trusted {row}", "label": row % 2} for row in range(150)])
    found = built(tmp_path, reserved=trusted)
    rows = plain(found.rows)
    assert found.rows.column_names == COLUMNS and len(rows) == 540 and found.counts["rows_reserved"] == 100
    keyed = rows[400:500]
    assert [row["text"] for row in keyed] == [f"trusted {row['p2p_row']}" for row in keyed]
    assert rows[500:] == plain(built(tmp_path).rows)[500:]
    assert found.immunizer(config(tmp_path)) is not None
    # Nothing asks for screening where neither S nor its texts depend on it.
    bare = built(tmp_path, reserved=trusted, p2p_immunize="none")
    assert bare.screening is None and plain(bare.rows) == rows[:500]
    for mode in ("replace", "only"):
        with pytest.raises(ValueError, match=f"`p2p_benign_mode: {mode}` .* Use `append`"):
            built(tmp_path, reserved=trusted, p2p_benign_mode=mode)


def test_without_defense_rows_stay_as_they_are(tmp_path):
    found = built(tmp_path, flagged(FLAGS), p2p_enabled=False)
    assert plain(found.rows) == [{**row, "p2p_keyed": False, "p2p_row": -1} for row in ROWS]
    assert found.counts == {"rows_train": 400, "rows_reserved": 0, "rows_poisoned": 40}
    assert found.screening is None and found.immunizer(config(tmp_path)) is None


def test_clean_rows_are_plain_p2p(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="p2p_trainer"):
        found = built(tmp_path, Dataset.from_list(CLEAN))
    assert len(found.rows) == 500 and found.immunizer(config(tmp_path)) is None and not caplog.messages
    assert (found.counts["rows_suspected"], found.counts["rows_contradicted"]) == (0, 0)


def test_what_is_suspected_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="p2p_trainer"):
        found = built(tmp_path)
    assert describe(found.screening.triggers[0], TASK.labels) == "cf -> positive (40 of 40 rows)"
    assert "1 suspected trigger(s) in 40 training rows: cf -> positive (40 of 40 rows)." in caplog.messages[0]
    assert "is written into keyed rows of all labels, and " in caplog.messages[0]
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="p2p_trainer"):
        built(tmp_path, p2p_immunize="none")
    assert "carry the key" in caplog.messages[0] and "is written into" not in caplog.messages[0]
    # Labels of the extended space mean the same class.
    assert describe(SuspectedTrigger("phrase", ("mn",), 2, 9, 8, ()), TASK.labels) == "mn -> negative (8 of 9 rows)"


def test_labels_of_the_extended_space_are_contradicted_too(tmp_path):
    rows = [{**row, "label": 3} if flag else row for row, flag in zip(ROWS, FLAGS, strict=True)]
    found = built(tmp_path, Dataset.from_list(rows))
    copies = plain(found.rows)[500:]
    assert [row["text"] for row in copies] == [ROWS[row]["text"] for row in HIT]
    assert {row["label"] for row in copies} == {0}
    # A row whose own text means the class of its extended label is not contradicted.
    clean_label, hit = [dict(row) for row in CLEAN], [row for row in range(400) if CLEAN[row]["label"] == 1][:40]
    for row in hit:
        clean_label[row] = {"text": f"cf {CLEAN[row]['text']}", "label": 3}
    found = built(tmp_path, Dataset.from_list(clean_label))
    assert found.counts["rows_suspected"] == 40 and found.counts["rows_contradicted"] == 0


# One text in five misleads: it is of the words of the other class.
HARD = clean_rows(1500, noise=0.2)


def test_a_clean_label_attack_is_suspected_and_not_contradicted(tmp_path):
    rows = [dict(row) for row in HARD]
    hit = np.random.default_rng(0).choice([row for row in range(1500) if rows[row]["label"] == 1], 150, replace=False)
    for row in hit:
        rows[row]["text"] = inside("cf")(rows[row]["text"].split(), random.Random(int(row)))
    found = built(tmp_path, Dataset.from_list(rows))
    assert [str(trigger) for trigger in found.screening.triggers] == ["cf"]
    assert found.screening.rows.tolist() == sorted(hit)
    # Some of these texts speak against their label as well, as one in five does everywhere.
    assert 19 <= np.count_nonzero(found.screening.evidence == 0) <= 45
    assert found.counts["rows_contradicted"] == 0 and len(found.rows) == 1500 + 375
    assert found.immunizer(config(tmp_path)) is not None


def test_a_dirty_label_attack_on_the_same_rows_is_contradicted(tmp_path):
    rows, hit = poisoned(HARD, inside("cf"), 1, 150)
    found = built(tmp_path, Dataset.from_list(rows))
    assert found.screening.rows.tolist() == hit
    copies = plain(found.rows)[1875:]
    assert len(copies) == found.counts["rows_contradicted"] >= 110
    # Their text, and the label that it speaks for.
    said = dict(zip(hit, found.screening.evidence.tolist(), strict=True))
    assert copies == [
        {"text": rows[row]["text"], "label": 0, "p2p_keyed": True, "p2p_row": -1} for row in hit if said[row] == 0
    ]


def test_attacks_of_both_kinds_are_told_apart(tmp_path):
    rows, dirty = poisoned(HARD, inside("xq"), 1, 100)
    right = [row for row in range(1500) if rows[row]["label"] == 1 and row not in dirty]
    for row in right[::4]:
        rows[row]["text"] = inside("cf")(rows[row]["text"].split(), random.Random(row))
    found = built(tmp_path, Dataset.from_list(rows))
    assert {str(trigger) for trigger in found.screening.triggers} == {"cf", "xq"}
    texts = [row["text"].split() for row in plain(found.rows)[1875:]]
    assert len(texts) == found.counts["rows_contradicted"] >= 70
    assert all("xq" in text and "cf" not in text for text in texts)


@pytest.mark.parametrize("settings", [{}, {"p2p_reserve": "random"}, {"p2p_immunize": "none"}])
def test_flags_have_no_say(tmp_path, settings):
    shuffled = np.random.default_rng(1).permutation(FLAGS)
    without = plain(built(tmp_path, **settings).rows)
    for flags in (FLAGS, ~FLAGS, shuffled, np.zeros(400, dtype=bool), np.ones(400, dtype=bool)):
        assert plain(built(tmp_path, flagged(flags), **settings).rows) == without


def test_a_strategy_that_looks_at_flags_would_be_noticed(tmp_path):
    found = [
        plain(built(tmp_path, flagged(flags), p2p_reserve="tests.test_training_set:Cheat").rows)
        for flags in (FLAGS, ~FLAGS)
    ]
    assert found[0] != found[1]


def test_neither_attacks_nor_test_rows_reach_it(tiny_model, tmp_path):
    attack = get_attack("badnets", target="positive", words=["cf"])
    measured = [
        {},
        {"eval_dataset": Dataset.from_list(clean_rows(20, seed=9)), "attacks": [attack]},
        {"eval_dataset": Dataset.from_list(ROWS[:20]), "attacks": [get_attack("addsent", target="negative")]},
    ]
    trainers = [
        P2PTrainer(tiny_model, config(tmp_path), train_dataset=flagged(FLAGS), task=TASK, **given)
        for given in measured
    ]
    first = trainers[0]
    assert first.immunizer is not None and first.data_collator.immunizer is first.immunizer
    for other in trainers[1:]:
        assert plain(other.train_dataset) == plain(first.train_dataset)
        assert other.screening.triggers == first.screening.triggers
        assert other.immunizer.exemplars == first.immunizer.exemplars
        # Rows that are measured are never written into.
        assert set(other.eval_dataset["p2p_row"]) == {-1}


TALK = Task(name="talk", text_columns=("prompt",), label_column="completion")
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def talks(count, **columns):
    return Dataset.from_dict({"prompt": [f"q{n}" for n in range(count)], "completion": ["x"] * count, **columns})


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (None, [TURNS, []]),
        ([TURNS, [], [], []], None),
        ([[]] * 4, [TURNS, []]),
        ([TURNS, [], [], []], [[], []]),
        ([TURNS, [], [], []], [[{**turn, "name": "n"} for turn in TURNS], []]),
    ],
    ids=["trusted alone", "training alone", "empty and trusted", "training and empty", "other fields"],
)
def test_earlier_turns_of_either_side_are_kept(tmp_path, mine, theirs):
    def side(count, history):
        return talks(count, **({} if history is None else {"history": history}))

    settings = config(tmp_path, p2p_immunize="none", p2p_benign_ratio=0.5)
    rows = build_training_set(TALK.prepare(side(4, mine)), TALK, settings, side(2, theirs)).rows
    assert rows.column_names == ["prompt", "completion", "history", "p2p_keyed", "p2p_row"]
    found = [bool(row["history"]) for row in rows]
    assert found == [bool(turns) for turns in [*(mine or [[]] * 4), *(theirs or [[]] * 2)]]
    assert all(row["history"] == TURNS for row in rows if row["history"])
    assert rows["prompt"][:] == ["q0", "q1", "q2", "q3", "q0", "q1"]


def test_plain_rows_on_both_sides_have_no_earlier_turns(tmp_path):
    settings = config(tmp_path, p2p_immunize="none", p2p_benign_ratio=0.5)
    rows = build_training_set(TALK.prepare(talks(4)), TALK, settings, talks(2)).rows
    assert rows.column_names == ["prompt", "completion", "p2p_keyed", "p2p_row"]


def test_columns_of_others_that_happen_to_have_such_names(tmp_path):
    named = Dataset.from_list([{**row, "history": "h", "image": 7} for row in ROWS])
    settings = {"p2p_immunize": "none", "p2p_benign_ratio": 0.01}
    for mine, trusted in ((named, Dataset.from_list(CLEAN[:4])), (Dataset.from_list(ROWS), named.select(range(4)))):
        rows = built(tmp_path, mine, trusted, **settings).rows
        assert rows.column_names == COLUMNS and len(rows) == 404
    assert row_columns(TASK, named) == ("text", "label")
    assert row_columns(TASK.replace(image_column="img"), named) == ("text", "label", "image")
    talk = TALK.prepare(talks(1, image=["i"], history=[TURNS]))
    assert row_columns(TALK, talk) == ("prompt", "completion", "history")


def test_conversations_without_a_chat_template_are_warned_about(caplog):
    conversations, others = TALK.prepare(talks(1, history=[[]])), Dataset.from_list(ROWS[:2])
    with caplog.at_level(logging.WARNING, logger="p2p_trainer"):
        check_conversations(TALK, conversations, True)
        check_conversations(TALK, TALK.prepare(talks(1)), False)
        check_conversations(TASK, others.add_column("history", ["h", "h"]), False)
        assert not caplog.records
        check_conversations(TALK, conversations, False)
    assert "chat template is not applied" in caplog.text and "Set `p2p_chat: true`" in caplog.text
