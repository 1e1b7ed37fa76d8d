"""LabelSpace: h, pi, and label words that the tokenizer can tell apart, in context."""

import pytest

from p2p_trainer import LabelSpace, PromptEncoder, PromptFormat
from p2p_trainer.label_space import Answers, audit, choose_label_space
from tests.tokenizer_kinds import tokenizer_named


PROMPT = "film\nOutput: "


def characters(text):
    """A tokenizer that spells, with `$` as its end of sequence."""
    return [ord(character) for character in text]


def merging(text):
    """A tokenizer with a token (1) for ` good`, one (2) for ` no`, and else one per character."""
    return characters(text.replace(" good", "\x01").replace(" no", "\x02"))


def ids(text):
    return tuple(characters(text))


def audit_for(name, **changes):
    """Audit as the trainer does, with and without the key."""
    draft = PromptFormat(LabelSpace(("0",), ("1",)), **changes)
    return lambda words: PromptEncoder.audit_words(draft, tokenizer_named(name), words)


def test_h_and_pi():
    space = LabelSpace(("a", "b", "c"), ("d", "e", "f"))
    assert [space.extend(label) for label in range(3)] == [3, 4, 5]
    assert [space.project(label) for label in range(6)] == [0, 1, 2, 0, 1, 2]
    assert all(space.project(space.extend(label)) == label for label in range(3))
    assert (space.num_labels, space.all_words) == (3, ("a", "b", "c", "d", "e", "f"))
    assert all(space.all_words[space.extend(label)] == space.extended_words[label] for label in range(3))


@pytest.mark.parametrize(
    ("words", "extended", "message"),
    [
        (("a", "b"), ("c",), r"as many extended label words as label words, got \['a', 'b'\] and \['c'\]"),
        ((), (), "as many extended"),
        (("a", " "), ("c", "d"), r"must be a visible text, got ' '"),
        (("a", 1), ("c", "d"), "must be a visible text, got 1"),
        (("a", "b"), ("c", "a"), "label word 'a' stands for two labels"),
    ],
)
def test_words_that_are_none(words, extended, message):
    with pytest.raises(ValueError, match=message):
        LabelSpace(words, extended)


def test_audit_of_single_tokens():
    answers = audit(["0", "1", "2", "3"], characters, PROMPT, "$", "Output: ")
    assert answers == Answers(
        scored=(ids("0"), ids("1"), ids("2"), ids("3")),
        trained=(ids("0$"), ids("1$"), ids("2$"), ids("3$")),
        cut=1,  # the word itself
        room=1,  # the terminator
        terminated=False,
    )
    assert answers.single_token
    bare = audit(["0", "1"], characters, PROMPT, "", "Output: ")
    assert (bare.trained, bare.room) == (bare.scored, 0)


def test_audit_of_several_tokens():
    answers = audit(["yes", "no"], characters, PROMPT, "$", "Output: ")
    assert answers.scored == (ids("yes"), ids("no"))
    assert answers.trained == (ids("yes$"), ids("no$"))
    assert (answers.cut, answers.room, answers.terminated, answers.single_token) == (3, 1, False, False)
    # What all words begin with decides nothing, and is left to the prompt; the loss still lies on it.
    answers = audit(["c-0", "c-1x"], characters, PROMPT, "$", "Output: ")
    assert answers.scored == (ids("0"), ids("1x"))
    assert answers.trained == (ids("c-0$"), ids("c-1x$"))
    assert (answers.cut, answers.room) == (1, 2)


def test_audit_where_words_swallow_the_space_of_the_suffix():
    answers = audit(["good", "no"], merging, PROMPT, "$", "Output: ")
    assert answers.scored == ((1,), (2,))
    assert answers.trained == ((1, ord("$")), (2, ord("$")))
    assert (answers.cut, answers.room, answers.single_token) == (1, 1, True)
    # One word swallows the space and the other does not: the space is part of what is scored.
    answers = audit(["good", "bad"], merging, PROMPT, "$", "Output: ")
    assert answers.scored == ((1,), ids(" bad"))
    assert answers.trained == ((1, ord("$")), ids("bad$"))
    assert (answers.cut, answers.room) == (1, 4)


def test_audit_of_a_collision():
    with pytest.raises(ValueError, match=r"can't tell the label words 'A' and 'a' apart after 'Output: ': .* \[97\]"):
        audit(["b", "A", "a"], lambda text: characters(text.lower()), PROMPT, "$", "Output: ")


def test_audit_of_a_prefix():
    with pytest.raises(
        ValueError, match="'1' are a prefix of those of '10', and no terminator .*p2p_append_eos: true"
    ):
        audit(["0", "1", "10"], characters, PROMPT, "", "Output: ")
    answers = audit(["0", "1", "10"], characters, PROMPT, "$", "Output: ")
    assert answers.terminated
    assert answers.scored == (ids("0$"), ids("1$"), ids("10$"))
    assert answers.trained == answers.scored
    assert (answers.cut, answers.room, answers.single_token) == (1, 2, False)
    # Only the first token of a longer terminator is scored, all of it is trained.
    longer = audit(["0", "1", "10"], characters, PROMPT, "$#", "Output: ")
    assert longer.scored == answers.scored
    assert longer.trained == (ids("0$#"), ids("1$#"), ids("10$#"))
    with pytest.raises(ValueError, match="'a' are a prefix of those of 'a.b', even with the terminator '.'"):
        audit(["a", "a.b"], characters, PROMPT, ".", "Output: ")


def test_a_lower_casing_tokenizer():
    for words in (["a", "b", "A", "B"], ["good", "bad", "Good", "Bad"]):
        with pytest.raises(ValueError, match=f"can't tell the label words '{words[0]}' and '{words[2]}' apart"):
            audit_for("bert")(words)
        assert len(audit_for("qwen")(words)) == 2


@pytest.mark.parametrize("name", ["qwen", "llama_unigram_bos"])
def test_two_and_four_classes_get_digits(name):
    for classes, digits in [(2, "0123"), (4, "01234567")]:
        space = choose_label_space(classes, None, audit_for(name))
        assert space.words + space.extended_words == tuple(digits) and space.num_labels == classes
        assert space.reason == f"digits 0..{digits[-1]}: each is one distinct token behind the prompt"


def test_digits_that_the_tokenizer_does_not_know_are_passed_over():
    for name, why in [("gpt2", "'4' takes several tokens"), ("bert", "can't tell the label words '4' and '5' apart")]:
        assert choose_label_space(2, None, audit_for(name)).all_words == tuple("0123")
        space = choose_label_space(4, None, audit_for(name))
        assert space.all_words == tuple("ABCDEFGH")
        assert space.reason.startswith("letters A..H: each is one distinct token") and why in space.reason


def test_ten_classes_get_letters_where_digits_are_tokens_of_their_own():
    space = choose_label_space(10, None, audit_for("qwen"))
    assert space.words == tuple("ABCDEFGHIJ") and space.extended_words == tuple("KLMNOPQRST")
    assert space.reason.startswith("letters A..T") and "digits passed over: '0' takes several tokens" in space.reason


def test_ten_classes_get_numbers_where_each_number_is_a_token():
    def encode(text):
        prompt, _, number = text.rpartition(" ")
        return [*characters(prompt), 1000 + int(number)] if number else characters(text)

    space = choose_label_space(10, None, lambda words: [audit(words, encode, PROMPT, "", "Output: ")])
    assert space.all_words == tuple(map(str, range(20))) and space.reason.startswith("digits 0..19")


def test_fourteen_classes_get_numbers_of_several_tokens():
    space = choose_label_space(14, None, audit_for("qwen"))
    assert space.all_words == tuple(map(str, range(28)))
    assert space.reason.startswith("numbers 0..27, scored over all their tokens; digits passed over")
    [answers, keyed] = audit_for("qwen")(space.all_words)
    assert answers.scored == keyed.scored and len(set(answers.scored)) == 28
    assert answers.terminated and {len(word) for word in answers.scored} == {2, 3}
    with pytest.raises(ValueError, match="'1' are a prefix of those of '10'.*p2p_append_eos: true"):
        choose_label_space(14, None, audit_for("qwen", append_eos=False))


def test_without_end_of_sequence_ten_classes_still_get_letters():
    space = choose_label_space(10, None, audit_for("qwen", append_eos=False))
    assert space.words == tuple("ABCDEFGHIJ")
    assert "'1' are a prefix of those of '10'" in space.reason


def test_words_as_asked():
    audited = audit_for("qwen")
    assert choose_label_space(2, ["letters"], audited).all_words == ("A", "B", "C", "D")
    assert choose_label_space(10, ["digits"], audited).all_words == tuple(map(str, range(20)))
    assert choose_label_space(2, ["digits"], audited).reason == "digits, as asked"
    space = choose_label_space(2, ["negative", "positive", "very bad", "very good"], audited)
    assert (space.words, space.extended_words) == (("negative", "positive"), ("very bad", "very good"))
    assert space.reason == "given"


@pytest.mark.parametrize(
    ("classes", "spec", "message"),
    [
        (2, ["numbers"], r"is 'digits', 'letters' or a list of 4 words .* got \['numbers'\]"),
        (2, ["a", "b"], r"2 classes need 4 label words: .* holds 2: \['a', 'b'\]"),
        (2, ["a", "b", "c", "d", "e"], "holds 5"),
        (14, ["letters"], "14 classes need 28 label words, there are only 26 letters. Use 'digits'"),
        (2, ["a", "b", "c", "a"], "'a' stands for two labels"),
        (2, ["a", "b", "c", ""], "must be a visible text"),
    ],
)
def test_words_that_do_not_fit(classes, spec, message):
    with pytest.raises(ValueError, match=message):
        choose_label_space(classes, spec, audit_for("qwen"))


def test_given_words_are_audited_in_both_contexts():
    with pytest.raises(ValueError, match="'good' and 'Good' apart after 'Output: '"):
        choose_label_space(2, ["good", "bad", "Good", "fine"], audit_for("bert", keyed_suffix="Answer: "))
    plain, keyed = audit_for("gpt2", keyed_suffix="Answer:\n")(["good", "bad", "fine", "cold"])
    # After a space the words are ` good`, ..., after a line break they are spelt anew.
    assert plain.scored != keyed.scored
    decode = tokenizer_named("gpt2").decode
    assert [decode(list(word)).strip() for word in plain.trained] == [
        f"{word}<|endoftext|>" for word in ("good", "bad", "fine", "cold")
    ]
