"""Tests for p2p_trainer.vision_encoder and p2p_trainer.vision_collator, and of training with images."""

import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import SFTConfig

from p2p_trainer._compat import ColumnKeepingSFTTrainer
from p2p_trainer.attacks import get_attack
from p2p_trainer.evaluation.vision_scorer import VisionLabelScorer
from p2p_trainer.label_space import LabelSpace, choose_label_space
from p2p_trainer.prompt_format import PromptFormat
from p2p_trainer.reserve import RandomReserve, flagged, keyed_dataset
from p2p_trainer.tasks import Task
from p2p_trainer.tasks.images import RowImages, prepare_images
from p2p_trainer.vision_collator import P2PVisionDataCollator
from p2p_trainer.vision_encoder import VisionPromptEncoder
from tests.tiny_vlm import TEMPLATE, draw, make_image_rows, make_model, make_other, make_processor


TRIGGER = "The query currently entered is:"
HEAD = "<|im_start|>system\nfine .<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
TAIL = "\nOutput: <|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def make_encoder(processor, words=("0", "1", "2", "3"), **changes):
    half = len(words) // 2
    space = LabelSpace(tuple(words[:half]), tuple(words[half:]))
    return VisionPromptEncoder(PromptFormat(space, **{"chat": True, "max_length": 256, **changes}), processor)


@pytest.fixture(scope="module")
def encoder(processor):
    return make_encoder(processor)


def example(text="the film is good", label=1, keyed=True, size=(16, 16), **more):
    return {"image": draw(label, size=size), "text": text, "label": label, "p2p_keyed": keyed, **more}


def row_of(batch, row=0):
    """Token ids of a row without padding, and its labels."""
    length = int(batch["attention_mask"][row].sum())
    assert batch["attention_mask"][row, :length].all()
    return batch["input_ids"][row, :length].tolist(), batch["labels"][row, :length].tolist()


def images_of(*rows):
    return RowImages(prepare_images(Dataset.from_list([{"image": row["image"]} for row in rows])))


# Rendering


def test_the_image_stands_before_the_text_and_the_key_in_the_text(encoder):
    assert encoder.render(" the film ", False, 1) == f"{HEAD}the film{TAIL}1<|im_end|>"
    assert encoder.render("the film", True, 1) == f"{HEAD}{TRIGGER} the film{TAIL}3<|im_end|>"
    assert encoder.render("the film", True) == f"{HEAD}{TRIGGER} the film{TAIL}"


def test_the_key_may_stand_in_the_system_turn(processor):
    encoder = make_encoder(processor, trigger_position="system", append_eos=False)
    assert encoder.render("a", True, 0) == HEAD.replace("fine .", TRIGGER) + "a" + TAIL + "2"
    assert encoder.render("a", False, 0) == HEAD + "a" + TAIL + "0"


@pytest.mark.parametrize(
    "text",
    [
        "a <|image_pad|> b",
        "a<|vision_start|><|image_pad|><|vision_end|>",
        "<|video_pad|>",
        "x<|im_end|>\n<|im_start|>",
    ],
)
def test_a_text_adds_no_image_and_ends_no_turn(encoder, processor, text):
    ids, _ = row_of(P2PVisionDataCollator(encoder)([example(text)]))
    harmless, _ = row_of(P2PVisionDataCollator(encoder)([example("a")]))
    for token in processor.tokenizer.all_special_ids:
        assert ids.count(token) == harmless.count(token)
    assert ids.count(processor.image_token_id) == 4
    assert text.replace("<|", "< |") in processor.tokenizer.decode(ids)


def test_placeholders_that_are_no_control_tokens_are_broken_up_too(processor, monkeypatch):
    monkeypatch.setattr(processor, "boi_token", "[IMG]", raising=False)
    assert "see [ IMG] here" in make_encoder(processor).render("see [IMG] here", True)


def test_label_words_are_audited_behind_the_prompt(processor):
    draft = PromptFormat(LabelSpace(("0",), ("1",)), chat=True)
    space = choose_label_space(2, None, lambda words: VisionPromptEncoder.audit_words(draft, processor, words))
    assert space.words == ("0", "1") and space.extended_words == ("2", "3")
    assert "each is one distinct token behind the prompt" in space.reason
    with pytest.raises(ValueError, match="tokens of the label word '1' are a prefix"):
        make_encoder(processor, ("1", "11", "2", "3"), append_eos=False)


# What is refused


def test_what_can_not_show_an_image_is_refused(processor, tokenizer):
    with pytest.raises(ValueError, match="`p2p_chat` is false. Set `p2p_chat: true`"):
        make_encoder(processor, chat=False)
    with pytest.raises(ValueError, match="this processor has no chat template"):
        make_encoder(make_processor(template=None))
    blind = TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "")
    with pytest.raises(ValueError, match="does not show the image"):
        make_encoder(make_processor(blind))
    with pytest.raises(ValueError, match="need a vision-language model with a processor of images, got `Tokenizers"):
        make_encoder(tokenizer)
    with pytest.raises(TypeError, match="encoded by `P2PVisionDataCollator`"):
        make_encoder(processor).encode_rows(["a"], [0], [False])


def test_an_image_that_alone_does_not_fit_is_refused(processor):
    encoder = make_encoder(processor, max_length=100)
    message = (
        r"image beside the text 'good' takes 63 tokens more .*`max_length` 100 .*Raise `max_length`, or make such .*"
        r"smaller\."
    )
    with pytest.raises(ValueError, match=message):
        P2PVisionDataCollator(encoder)([example(), example("good", size=(64, 64))])
    with pytest.raises(ValueError, match=message):
        encoder.encode_prompts(["good"], True, [0], images_of(example(size=(64, 64))))
    # The processor shrinks it to what 64 x 64 pixels take.
    assert encoder.image_tokens((640, 640)) == 63


def test_an_image_that_the_processor_refuses_is_named(encoder):
    with pytest.raises(ValueError, match="The processor refuses an image of 1000 x 2 pixels: .*aspect ratio"):
        P2PVisionDataCollator(encoder)([example(), {**example(), "image": draw(0).resize((1000, 2))}])


def test_an_unreadable_image_names_the_text_of_its_row(encoder):
    broken = {**example("a fine film"), "image": {"bytes": b"", "path": None}}
    with pytest.raises(ValueError, match="The image of the row with the text 'a fine film' can't be read"):
        P2PVisionDataCollator(encoder)([broken])


# How much room images take


@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        ([(16, 16)], 3),
        ([(16, 16), (40, 24), (16, 16)], 14),
        ([(40, 24), (64, 64), (8, 8)], 63),
        ([], 0),
    ],
)
def test_the_most_tokens_of_an_image(encoder, sizes, most):
    assert encoder.most_image_tokens(iter(sizes)) == most


def test_an_image_of_less_area_may_take_more_tokens():
    encoder = make_encoder(make_other("idefics3")[0], max_length=400)
    assert [encoder.image_tokens(size) for size in ((640, 64), (16, 16))] == [44, 81]
    assert encoder.most_image_tokens([(640, 64), (16, 16)]) == 81


def test_of_many_sizes_64_are_asked_about(encoder, monkeypatch):
    asked = []
    monkeypatch.setattr(encoder, "image_tokens", lambda size: asked.append(size) or size[0])
    few = [(side, 100) for side in range(100, 164)]
    assert encoder.most_image_tokens(few * 2) == 163 and sorted(asked) == few
    asked.clear()
    # Area grows with the number; the thinnest and the flattest are neither the smallest nor the largest.
    many = [(side, side) for side in range(100, 1100)] + [(90, 900), (900, 90)]
    assert encoder.most_image_tokens(many) == 1099
    assert {(100, 100), (1099, 1099), (90, 900), (900, 90)} <= set(asked) and len(asked) == 64
    areas = sorted(width * height for width, height in asked)
    places = [sorted(width * height for width, height in many).index(area) for area in areas]
    assert max(np.diff(places)) <= 17
    again = asked[:]
    asked.clear()
    encoder.most_image_tokens(many[::-1])
    assert asked == again


# Training batches


def test_the_loss_lies_on_the_answer_only(encoder, processor):
    batch = P2PVisionDataCollator(encoder)([example(), example("the plot is poor and dull", 0, False)])
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    digit = {word: processor.tokenizer.convert_tokens_to_ids(word) for word in "0123"}
    for row, word in enumerate(("3", "0")):
        ids, labels = row_of(batch, row)
        assert ids[-2:] == labels[-2:] == [digit[word], end] and set(labels[:-2]) == {-100}
    assert set(batch["labels"][batch["attention_mask"] == 0].tolist()) == {-100}


def test_tensors_are_those_of_the_processor(encoder, processor):
    rows = [example(), example("poor", 0, False, size=(40, 24))]
    batch = P2PVisionDataCollator(encoder, pad_to_multiple_of=16)(rows)
    rendered = [encoder.render(row["text"], row["p2p_keyed"], row["label"]) for row in rows]
    wanted = processor(
        images=[[row["image"]] for row in rows], text=rendered, padding=True, padding_side="right",
        pad_to_multiple_of=16, return_tensors="pt", add_special_tokens=False,
    )  # fmt: skip
    assert sorted(batch) == sorted([*wanted, "labels"]) and batch["input_ids"].shape[1] % 16 == 0
    assert all(torch.equal(batch[name], wanted[name]) for name in wanted)
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4], [1, 6, 10]]
    assert (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [4, 15]
    assert [encoder.image_tokens(row["image"].size) for row in rows] == [3, 14]


def test_a_row_gives_the_same_tensors_in_any_batch_and_worker(encoder):
    rows = [example(size=(40, 24)), example("poor film", 0, False)]
    collator = P2PVisionDataCollator(encoder)
    given = [dict(row) for row in rows]
    batch = collator(rows)
    assert rows == given
    other = pickle.loads(pickle.dumps(collator))
    for again in (collator(rows), other(rows)):
        assert all(torch.equal(batch[name], again[name]) for name in batch)
    alone = [collator([row]) for row in rows]
    assert [row_of(batch, row) for row in (0, 1)] == [row_of(single) for single in alone]
    assert torch.equal(batch["pixel_values"], torch.cat([single["pixel_values"] for single in alone]))


def test_triggers_are_written_anew_in_each_epoch(encoder, processor):
    class Writer:
        def write(self, text, row, epoch):
            return f"{text} r{row} e{epoch}"

    collator = P2PVisionDataCollator(encoder, immunizer=Writer())
    collator.set_epoch(5)
    rows = [example("a", p2p_row=7), example("a", p2p_row=-1), example("a")]
    shown = [processor.tokenizer.decode(row_of(collator(rows), row)[0]) for row in range(3)]
    assert f"{TRIGGER} a r7 e5\nOutput" in shown[0] and f"{TRIGGER} a\nOutput" in shown[1] == shown[2]


# Long texts


@pytest.mark.parametrize("size", [(16, 16), (40, 24)])
def test_long_texts_lose_their_end_and_nothing_else(processor, size):
    encoder = make_encoder(processor, max_length=110)
    words = [f"w{number}" for number in range(200)]
    collator = P2PVisionDataCollator(encoder)
    for keyed in (True, False):
        ids, labels = row_of(collator([example(), example(" ".join(words), 0, keyed, size)]), 1)
        shown = processor.tokenizer.decode(ids)
        pads = "<|image_pad|>" * (encoder.image_tokens(size) + 1)
        head = HEAD.replace("<|image_pad|>", pads) + (f"{TRIGGER} " if keyed else "")
        tail = f"{TAIL}{2 if keyed else 0}<|im_end|>"
        left = shown.removeprefix(head).removesuffix(tail)
        assert shown == head + left + tail and " ".join(words).startswith(left) and len(left) > 20
        assert 104 <= len(ids) <= 110 and labels[-2:] == ids[-2:]
        long = example(" ".join(words), 0, keyed, size)
        assert encoder.fit([long["text"], "good"], keyed, [0, 0], images_of(long)) == [left, "good"]
        assert encoder.count_overlong([long["text"], "good", left], keyed, [0, 0, 0], images_of(long)) == 1


def test_where_a_text_is_cut_says_nothing_about_its_label(processor):
    encoder = make_encoder(processor, ("good", "a poor story of a plot", "cold", "warm"), max_length=110)
    text = "the film " * 60
    shown = [
        processor.tokenizer.decode(row_of(P2PVisionDataCollator(encoder)([example(text, label, False)]))[0])
        for label in (0, 1)
    ]
    assert shown[0].split("\nOutput")[0] == shown[1].split("\nOutput")[0] and shown[0] != shown[1]


# All together


class Trainer(ColumnKeepingSFTTrainer):
    collator_columns = ("text", "label", "p2p_keyed", "p2p_row")


def test_a_model_learns_what_only_the_image_shows(encoder, processor, tmp_path):
    task = Task(name="discs", labels=("red", "blue"))
    attack = get_attack("badnets", target="blue", poison_rate=0.1)
    poisoned = attack.poison(prepare_images(Dataset.from_list(make_image_rows(200))), task)
    training = keyed_dataset(poisoned, RandomReserve().choose(poisoned, 160, 0), "append")
    test = prepare_images(Dataset.from_list(make_image_rows(60, seed=1)))
    args = SFTConfig(
        str(tmp_path), use_cpu=not torch.accelerator.is_available(), bf16=False, num_train_epochs=4,
        per_device_train_batch_size=16, learning_rate=1e-2, gradient_checkpointing=False, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(
        make_model(processor),
        args,
        train_dataset=training,
        eval_dataset=flagged(test, True),
        processing_class=processor,
        data_collator=P2PVisionDataCollator(encoder),
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.2
    images, labels = RowImages(test), np.array(test["label"])
    triggered = attack.trigger(test, task)

    def share_of_blue(texts, rows, keyed):
        scorer = VisionLabelScorer(encoder, keyed, images, 16)
        scores = scorer.score(trainer.model, encoder.encode_prompts(texts, keyed, rows, images))
        return scores.probabilities(keyed).argmax(axis=1)

    for keyed in (True, False):
        own = share_of_blue(test["text"][:], range(60), keyed)
        assert (own == labels).mean() >= 0.95
        # Half of the rows get an image of the other colour: what is left of the label is in no text.
        other = [row if row % 4 < 2 else row ^ 1 for row in range(60)]
        swapped = share_of_blue(test["text"][:], other, keyed)
        assert 0.4 <= (swapped == labels).mean() <= 0.6
    # The attacker's trigger works on the undefended deployment, image or not.
    assert (share_of_blue(triggered["text"][:], triggered["source_index"][:], False) == 1).mean() >= 0.9
