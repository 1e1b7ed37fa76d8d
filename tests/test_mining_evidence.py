"""What the words of a row say about its label: judged by folds that have not seen it."""

import numpy as np
import pytest

from p2p_trainer.mining.evidence import fit_evidence, likely_label
from p2p_trainer.mining.tokens import WordTable, words_of
from tests.corpora import clean_rows


def corpus(count=300, classes=2, noise=0.0):
    rows = clean_rows(count, classes, noise=noise)
    table = WordTable([words_of(row["text"]) for row in rows])
    return table, np.array([row["label"] for row in rows])


def fitted(table, labels, num_labels=2, use=None, seed=0):
    use = np.ones(len(labels), dtype=bool) if use is None else use
    return fit_evidence(table.bag(), labels, num_labels, use, seed)


@pytest.mark.parametrize("classes", [2, 4])
def test_words_speak_for_their_class(classes):
    table, labels = corpus(classes=classes)
    evidence = fitted(table, labels, classes)
    said = likely_label(evidence.scores)
    assert (said[said >= 0] == labels[said >= 0]).all() and (said >= 0).mean() > 0.98
    weights = dict(zip(table.names, evidence.weights, strict=True))
    assert weights["good"].argmax() == 0 and weights["dull"].argmax() == 1
    assert evidence.weights.shape == (len(table.names), classes) and evidence.bias.shape == (classes,)
    assert np.allclose(evidence.weights.sum(axis=1), 0, atol=1e-6)


def test_two_classes_are_told_apart_by_the_difference_of_their_scores():
    table, labels = corpus()
    scores = fitted(table, labels).scores
    assert np.array_equal(scores[:, 0], -scores[:, 1])


def test_a_row_has_no_say_in_its_own_score():
    table, labels = corpus()
    before = fitted(table, labels).scores
    for row in (0, 7, 123):
        turned = labels.copy()
        turned[row] = 1 - turned[row]
        after = fitted(table, turned).scores
        assert np.array_equal(after[row], before[row])
        assert not np.array_equal(after, before)


def test_what_can_only_be_memorised_is_no_evidence():
    labels = np.random.default_rng(0).integers(0, 2, 100)
    table = WordTable([words_of(f"unique{row} word{row}") for row in range(100)])
    scores = fitted(table, labels).scores
    # All rows of a fold are the same to the others.
    assert len(np.unique(scores, axis=0)) == 5


def test_rows_that_are_not_used_teach_nothing_and_are_judged():
    table, labels = corpus()
    use = np.ones(300, dtype=bool)
    use[:50] = False
    turned = labels.copy()
    turned[:50] = 1 - turned[:50]
    first, second = fitted(table, labels, use=use), fitted(table, turned, use=use)
    assert np.array_equal(first.scores, second.scores) and np.array_equal(first.weights, second.weights)
    assert likely_label(first.scores)[:50].tolist() == labels[:50].tolist()


def test_an_absent_class_is_never_the_answer():
    table, labels = corpus(classes=2)
    evidence = fitted(table, labels * 2, num_labels=4)
    assert np.isneginf(evidence.scores[:, [1, 3]]).all() and np.isfinite(evidence.scores[:, [0, 2]]).all()
    assert likely_label(evidence.scores).tolist() == (labels * 2).tolist()
    assert not evidence.weights[:, [1, 3]].any() and np.isneginf(evidence.bias[[1, 3]]).all()


@pytest.mark.parametrize("use", [True, False])
def test_one_class_or_nothing_is_no_evidence(use):
    table, labels = corpus(40)
    evidence = fitted(table, np.zeros_like(labels), use=np.full(40, use))
    assert not evidence.scores.any() and not evidence.weights.any() and not evidence.bias.any()
    assert set(likely_label(evidence.scores)) == {-1}


def test_pure_function_of_rows_and_seed():
    table, labels = corpus(noise=0.2)
    first, again, other = (fitted(table, labels, seed=seed).scores for seed in (3, 3, 4))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("shares", "label"),
    [
        ([1, 1], -1),
        ([1, 2], 1),
        # Half is not more than all others together.
        ([2, 1, 1], -1),
        ([3, 1, 1], 0),
        ([1, 1, 1, 4], 3),
        ([2, 2, 2, 5], -1),
        ([0, 1], 1),
        ([5, 0, 5], -1),
    ],
)
def test_likely_label(shares, label):
    with np.errstate(divide="ignore"):
        scores = np.log(np.array([shares], dtype=float))
    assert likely_label(scores).tolist() == [label]
    # Shifted log-odds are the same odds, however large.
    assert likely_label(scores + np.array([[800.0]])).tolist() == [label]
