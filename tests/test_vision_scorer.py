"""Tests for p2p_trainer.evaluation.vision_scorer: scores are the model's own, whatever the batch and the processor."""

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLProcessor

from p2p_trainer.evaluation.vision_scorer import VisionLabelScorer
from p2p_trainer.vision_collator import P2PVisionDataCollator
from tests.test_vision import example, images_of, make_encoder, row_of
from tests.tiny_vlm import TEMPLATE, make_model, make_other, make_processor


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def model(processor):
    return make_model(processor).eval()


@pytest.fixture(scope="module")
def encoder(processor):
    return make_encoder(processor)


@pytest.mark.parametrize("keyed", [True, False])
@pytest.mark.parametrize("text", ["the film is good", "the film <|image_pad|> " * 40])
def test_prompts_in_scoring_are_those_of_training(processor, keyed, text):
    encoder = make_encoder(processor, max_length=110)
    row = example(text, keyed=keyed, size=(40, 24))
    batch = P2PVisionDataCollator(encoder)([row])
    ids, labels = row_of(batch)
    images = images_of(row, example("a"))
    scorer = VisionLabelScorer(encoder, keyed, images)
    tokens, pixels = scorer.inputs(encoder.encode_prompts([text, "a"], keyed, [0, 1], images))
    prompt = tokens["input_ids"][0][tokens["attention_mask"][0].bool()].tolist()
    assert prompt == ids[: len(prompt)] and len(prompt) == labels.count(-100)
    patches = len(batch["pixel_values"])
    assert torch.equal(pixels["pixel_values"][:patches], batch["pixel_values"])


def by_hand(model, encoder, row, keyed):
    """Log-probabilities of the label words' tokens, each word read behind its prompt in a pass of its own."""
    found = []
    for word, ids in zip(encoder.format.label_space.all_words, encoder.answers[keyed].scored, strict=True):
        text = encoder.render(row["text"], keyed) + word
        batch = encoder.processor(images=[row["image"]], text=[text], return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            log_probs = model(**batch).logits[0].log_softmax(-1)
        places = range(len(log_probs) - 1 - len(ids), len(log_probs) - 1)
        found.append(sum(float(log_probs[place, token]) for place, token in zip(places, ids, strict=True)))
    return found


WORDS = [("0", "1", "2", "3"), ("good film", "poor plot", "good cast", "cold story")]


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("keyed", [True, False])
def test_scores_are_the_models_own_for_any_batch_size(processor, model, words, keyed):
    encoder = make_encoder(processor, words)
    assert encoder.answers[keyed].single_token == (words == WORDS[0])
    rows = [example("a fine film"), example("the plot", 0, size=(40, 24)), example("the cast " * 5, size=(24, 16))]
    images = images_of(*rows)
    prompts = encoder.encode_prompts([row["text"] for row in rows], keyed, range(3), images)
    scores = [VisionLabelScorer(encoder, keyed, images, size).score(model, prompts) for size in (1, 2, 3)]
    wanted = [by_hand(model, encoder, row, keyed) for row in rows]
    for found in scores:
        np.testing.assert_allclose(found.log_probs, wanted, atol=2e-5)
        assert found.free.tolist() == scores[0].free.tolist()


def test_one_pass_per_batch_where_words_are_single_tokens(encoder, processor, model, monkeypatch):
    passes = []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, **batch: passes.append(batch) or forward(self, **batch))
    rows = [example() for _ in range(5)]
    images = images_of(*rows)
    prompts = encoder.encode_prompts(["a", "b", "c", "d", "e"], True, range(5), images)
    model.train()
    VisionLabelScorer(encoder, True, images, 2).score(model, prompts)
    assert len(passes) == 3 and model.training
    model.eval()


def test_batches_are_formed_over_rows_sorted_by_length(encoder, model, monkeypatch):
    # The image of the third row takes the most tokens, the text of the second.
    rows = [example("a"), example("the cast " * 8), example("a", size=(64, 64)), example("a film", size=(24, 16))]
    images = images_of(*rows)
    prompts = encoder.encode_prompts([row["text"] for row in rows], True, range(4), images)
    scorer = VisionLabelScorer(encoder, True, images, 2)
    mask = scorer.inputs(prompts)[0]["attention_mask"]
    lengths = [scorer.length(prompt) for prompt in prompts]
    assert lengths == (mask.sum(dim=1) + encoder.answers[True].cut).tolist() and len(set(lengths)) == 4
    read = []
    inputs = scorer.inputs
    monkeypatch.setattr(scorer, "inputs", lambda batch: read.append([image for _, image in batch]) or inputs(batch))
    scorer.score(model, prompts)
    assert read == [[2, 1], [3, 0]]


def test_an_image_changes_the_scores_of_the_same_text(encoder, model):
    images = images_of(example(label=0), example(label=1))
    prompts = encoder.encode_prompts(["a film"] * 3, True, [0, 1, 0], images)
    scores = VisionLabelScorer(encoder, True, images).score(model, prompts).log_probs
    assert len(set(prompts)) == 2 and np.array_equal(scores[0], scores[2]) and not np.allclose(scores[0], scores[1])


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_models_of_other_families_are_trained_and_scored_alike(family, words):
    processor, model = make_other(family)
    encoder = make_encoder(processor, words, max_length=160)
    rows = [example("a <image> film"), example("the plot", 0, size=(40, 24)), example("the cast " * 100)]
    images = images_of(*rows)
    batch = P2PVisionDataCollator(encoder)(rows)
    with torch.no_grad():
        assert model(**batch).loss.isfinite()
    prompts = encoder.encode_prompts([row["text"] for row in rows], True, range(3), images)
    scorer = VisionLabelScorer(encoder, True, images, 3)
    tokens, _ = scorer.inputs(prompts)
    for row in range(3):
        prompt = tokens["input_ids"][row][tokens["attention_mask"][row].bool()].tolist()
        ids, labels = row_of(batch, row)
        assert prompt == ids[: len(prompt)] and len(ids) <= 160 and -100 not in labels[labels.count(-100) :]
    found = scorer.score(model, prompts).log_probs
    np.testing.assert_allclose(found[:2], [by_hand(model, encoder, row, True) for row in rows[:2]], atol=2e-5)
    np.testing.assert_allclose(
        found, VisionLabelScorer(encoder, True, images, 1).score(model, prompts).log_probs, atol=2e-5
    )


def test_the_processor_as_it_is_released_gives_the_same(encoder, processor, model):
    pytest.importorskip("torchvision")
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    limits = {"patch_size": 4, "merge_size": 2, "min_pixels": 16 * 16, "max_pixels": 64 * 64}
    released = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**limits), processor.tokenizer, Qwen2VLVideoProcessor(), chat_template=TEMPLATE
    )
    other = make_encoder(released)
    rows = [example("a <|video_pad|> film"), example("poor", 0, False, size=(40, 24))]
    batch, wanted = P2PVisionDataCollator(other)(rows), P2PVisionDataCollator(encoder)(rows)
    assert sorted(batch) == sorted(wanted)
    for name in wanted:
        torch.testing.assert_close(batch[name], wanted[name], atol=1e-5, rtol=0)
    assert [other.image_tokens(size) for size in ((16, 16), (40, 24), (640, 640))] == [3, 14, 63]
    images = images_of(*rows)
    prompts = other.encode_prompts(["a film", "poor"], True, [0, 1], images)
    assert prompts == encoder.encode_prompts(["a film", "poor"], True, [0, 1], images)
    scores = [VisionLabelScorer(each, True, images).score(model, prompts).log_probs for each in (other, encoder)]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)
