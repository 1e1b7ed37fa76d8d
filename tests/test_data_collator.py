"""P2PDataCollator: exact tensors, the same in any worker, and what TRL itself would have made of the rows."""

import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from p2p_trainer import LabelSpace, P2PDataCollator, PromptEncoder, PromptFormat
from p2p_trainer.immunizer import Immunizer
from p2p_trainer.mining import Fragment, Screening
from tests.conftest import make_rows


SPACE = LabelSpace(("0", "1"), ("2", "3"))
# Every word a token; the ids are the places in this list.
WORDS = ["<pad>", "<eos>", "Key", "Out", "0", "1", "2", "3", "good", "bad", "film", "<unk>"]


@pytest.fixture(scope="module")
def encoder():
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    return PromptEncoder(PromptFormat(SPACE, trigger="Key", suffix="Out ", keyed_suffix="Out ", max_length=9), fast)


KEYED = {"text": "good film", "label": 1, "p2p_keyed": True}
PLAIN = {"text": "bad", "label": 0, "p2p_keyed": False}


def toy_rows(count):
    return Dataset.from_list([{**row, "p2p_keyed": number % 3 == 0} for number, row in enumerate(make_rows(count))])


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_keyed_and_a_plain_row(encoder):
    collator = P2PDataCollator(encoder)
    assert isinstance(collator, DataCollatorForLanguageModeling)
    batch = collator([KEYED, PLAIN])
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]
    # Key good film Out 3 <eos> / bad Out 0 <eos>
    assert batch["input_ids"].tolist() == [[2, 8, 10, 3, 7, 1], [9, 3, 4, 1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100] * 4 + [7, 1], [-100, -100, 4, 1, -100, -100]]
    assert {value.dtype for value in batch.values()} == {torch.int64}


@pytest.mark.parametrize(
    ("label", "keyed", "expected"),
    [(0, False, [3, 4, 1]), (1, False, [3, 5, 1]), (0, True, [3, 6, 1]), (1, True, [3, 7, 1])],
)
def test_each_label_has_its_word(encoder, label, keyed, expected):
    batch = P2PDataCollator(encoder)([{"text": "film", "label": label, "p2p_keyed": keyed}])
    assert batch["input_ids"].tolist() == [[2] * keyed + [10, *expected]]
    assert batch["labels"].tolist() == [[-100] * (2 + keyed) + expected[1:]]


def test_pads_to_a_multiple(encoder):
    batch = P2PDataCollator(encoder, pad_to_multiple_of=8)([KEYED, PLAIN])
    assert batch["input_ids"].tolist() == [[2, 8, 10, 3, 7, 1, 0, 0], [9, 3, 4, 1, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100] * 4 + [7, 1, -100, -100], [-100, -100, 4, 1, -100, -100, -100, -100]]
    assert batch["attention_mask"].sum(1).tolist() == [6, 4]


def test_a_long_row_keeps_key_suffix_and_answer(encoder):
    batch = P2PDataCollator(encoder)([{"text": "good bad " * 20, "label": 0, "p2p_keyed": True}])
    ids = batch["input_ids"][0].tolist()
    assert len(ids) <= 9 and ids[:3] == [2, 8, 9] and ids[-3:] == [3, 6, 1]
    assert batch["labels"][0].tolist() == [-100] * (len(ids) - 2) + [6, 1]


def test_other_columns_do_not_matter(encoder):
    collator = P2PDataCollator(encoder)
    assert same(collator([{**KEYED, "poisoned": True, "id": "x"}]), collator([KEYED]))


def test_the_eos_that_pads_is_no_target(tokenizer):
    # Where a tokenizer pads with its end of sequence, the answer's own end is trained and the padding is not.
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    encoder = PromptEncoder(PromptFormat(SPACE), bare)
    batch = P2PDataCollator(encoder)([{**PLAIN, "text": "good " * 9}, PLAIN])
    eos = bare.eos_token_id
    assert encoder.pad_token_id == eos and bare.pad_token is None
    ids, labels, mask = (batch[key][1] for key in ("input_ids", "labels", "attention_mask"))
    padding = mask == 0
    assert padding.any() and (ids[padding] == eos).all() and (labels[padding] == -100).all()
    assert labels[~padding][-1] == eos


def test_pure_in_any_worker(tokenizer):
    collator = P2PDataCollator(PromptEncoder(PromptFormat(SPACE), tokenizer))
    rows = toy_rows(48)
    batches = [list(DataLoader(rows, batch_size=8, collate_fn=collator, num_workers=workers)) for workers in (0, 0, 2)]
    again = list(DataLoader(rows, batch_size=8, collate_fn=pickle.loads(pickle.dumps(collator))))
    for others in (*batches[1:], again):
        assert len(others) == len(batches[0]) == 6
        assert all(same(one, other) for one, other in zip(batches[0], others, strict=True))
    # A row is the same whatever stands beside it.
    alone = collator([rows[9]])
    length = alone["input_ids"].shape[1]
    assert torch.equal(batches[0][1]["input_ids"][1, :length], alone["input_ids"][0])
    assert torch.equal(batches[0][1]["labels"][1, :length], alone["labels"][0])


def immunizer():
    exemplars = (((Fragment("mn", "inside"),),), ((Fragment("so it goes", "start"), Fragment("no doubt", "end")),))
    return Immunizer(Screening((), *[np.array([], dtype=np.int64)] * 4, exemplars), seed=5)


def numbered_rows(count):
    """Every third row is keyed; of those, every other one has a number."""
    rows = toy_rows(count).to_list()
    return [{**row, "p2p_row": number if number % 6 == 0 else -1} for number, row in enumerate(rows)]


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_immunizer_writes_into_numbered_rows_alone(tokenizer, epoch):
    encoder = PromptEncoder(PromptFormat(SPACE), tokenizer)
    collator, rows = P2PDataCollator(encoder, immunizer=immunizer()), numbered_rows(60)
    collator.set_epoch(epoch)
    written = [
        {**row, "text": immunizer().write(row["text"], row["p2p_row"], epoch)} if row["p2p_row"] >= 0 else row
        for row in rows
    ]
    assert 0 < sum(one != other for one, other in zip(rows, written, strict=True)) < 10
    assert same(collator(rows), P2PDataCollator(encoder)(written))
    assert same(pickle.loads(pickle.dumps(collator))(rows), collator(rows))
    # Without a number, as rows of one's own may be, a keyed row stays as it is.
    bare = [{key: value for key, value in row.items() if key != "p2p_row"} for row in rows]
    assert same(collator(bare), P2PDataCollator(encoder)(rows))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_that_persist_see_the_epoch(tokenizer, workers):
    encoder = PromptEncoder(PromptFormat(SPACE), tokenizer)
    rows = Dataset.from_list(numbered_rows(48))
    collator = P2PDataCollator(encoder, immunizer=immunizer())
    loader = DataLoader(
        rows, batch_size=8, collate_fn=collator, num_workers=workers, persistent_workers=workers > 0
    )  # fmt: skip
    seen = []
    for epoch in (0, 1, 2):
        collator.set_epoch(epoch)
        seen.append(list(loader))
        expected = P2PDataCollator(encoder, immunizer=immunizer())
        expected.set_epoch(epoch)
        for number, batch in enumerate(seen[-1]):
            assert same(batch, expected([rows[row] for row in range(8 * number, 8 * number + 8)]))
    assert not all(same(one, other) for one, other in zip(seen[0], seen[1], strict=True))


@pytest.mark.parametrize("keyed", [False, True])
def test_equals_what_trl_prepares(tiny_model, tokenizer, tmp_path, keyed):
    rows = [{**row, "p2p_keyed": keyed} for row in make_rows(24)]
    delta = "The query currently entered is: " if keyed else ""
    words = SPACE.extended_words if keyed else SPACE.words
    prompts = [{"prompt": f"{delta}{row['text']}\nOutput: ", "completion": words[row["label"]]} for row in rows]
    trainer = SFTTrainer(
        tiny_model,
        SFTConfig(str(tmp_path), max_length=512, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True),
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
    )
    prepared = trainer.data_collator([trainer.train_dataset[row] for row in range(len(rows))])
    ours = P2PDataCollator(PromptEncoder(PromptFormat(SPACE), tokenizer))(rows)
    assert sorted(prepared) == sorted(ours)
    assert same(prepared, ours)
    # TRL puts loss on the answer and its end alone.
    assert (ours["labels"] != -100).sum(1).tolist() == [2] * 24
