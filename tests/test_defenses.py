"""What every defense shares, P2P behind the interface, and the controls."""

import dataclasses
import json

import numpy as np
import pytest
from datasets import Dataset

from p2p_trainer import BackdoorEvaluator, DefendedModel, get_attack
from p2p_trainer.cli import main as cli
from p2p_trainer.defenses import BUILTIN_DEFENSES, Defense, Workbench, get_defense, load_defense
from p2p_trainer.defenses.stamping import stamped_copies
from p2p_trainer.evaluation import Scores
from p2p_trainer.launch import main as launch
from p2p_trainer.reserve import KEYED
from p2p_trainer.tasks import Task
from tests.conftest import make_rows
from tests.tiny_runs import TASK, config, lora, recipe, saved_run


BADNETS = get_attack("badnets", target="positive", poison_rate=0.1)
GENERATION = Task(name="talk", labels=())


class Loud(Defense):
    """Writes texts in capitals, swaps two labels, and answers nothing that holds a question mark."""

    name = "loud"

    def __init__(self, mark: str = "?") -> None:
        super().__init__()
        self.mark = mark

    def rewrite(self, texts):
        return [text.upper() for text in texts]

    def decode(self, scores):
        return Scores(scores.log_probs[:, [1, 0, 3, 2]], np.where(scores.free >= 0, scores.free ^ 1, -1))

    def screen(self, texts):
        return np.array([self.mark in text for text in texts])


class Knows:
    """Stands in for the scorer: label 1 for texts with `GOOD` or `good`, by the tokens alone."""

    def __init__(self, answers, pad_token_id, batch_size):
        self.tokenizer = Knows.tokenizer

    def score(self, model, prompts, progress=None):
        good = np.array(["good" in self.tokenizer.decode(ids).lower() for ids in prompts])
        upper = np.array(["THE" in self.tokenizer.decode(ids) for ids in prompts])
        Knows.seen.append(bool(upper.any()))
        scores = np.full((len(prompts), 4), -9.0)
        scores[np.arange(len(prompts)), good.astype(int)] = -0.1
        return Scores(scores, good.astype(np.int64))


@pytest.fixture
def bench(tmp_path, tiny_model, toy_rows):
    rows = BADNETS.poison(toy_rows, TASK)
    return Workbench(tiny_model, config(tmp_path), TASK, rows, attacks=[BADNETS], peft_config=lora())


def configured(name, folder, **options):
    args = config(folder)
    defense = get_defense(name, **options)
    defense.check(TASK)
    defense.configure(args)
    return defense, args


def test_every_built_in_defense_is_found_by_its_name_and_says_how_to_set_it_up_again():
    for name in BUILTIN_DEFENSES:
        defense = get_defense(name, **{"scpd": {"engine": "template"}}.get(name, {}))
        assert defense.name == name
        settings = json.loads(json.dumps(defense.config()))
        assert settings.pop("name") == name
        assert get_defense(name, **settings).config() == defense.config()


def test_a_wrong_name_or_option_names_what_is_known():
    with pytest.raises(ValueError, match="Unknown defense 'onoin'. Did you mean 'onion'\\? Known: back_tr, bki, "):
        get_defense("onoin")
    with pytest.raises(ValueError, match="'clean_only' does not take these options \\['rate'\\]"):
        get_defense("clean_only", rate=1)
    with pytest.raises(ValueError, match="which is no subclass of `p2p_trainer.defenses.base.Defense`"):
        get_defense("tests.test_defenses:Knows")
    found = get_defense("tests.test_defenses:Loud", mark="!")
    assert found.config() == {"name": "tests.test_defenses:Loud", "mark": "!"} and get_defense(found) is found


def test_p2p_serves_generation_and_controls_of_labels_do_not():
    for name in ("p2p", "p2p_auto", "reserved_only", "expansion_only", "none"):
        get_defense(name).check(GENERATION)
    for name in ("suffix_only", "key_without_relabel"):
        with pytest.raises(ValueError, match=f"'talk' has no classes: `{name}` is about labels. Use `p2p_auto`, "):
            get_defense(name).check(GENERATION)


def test_settings_that_a_name_stands_for(tmp_path):
    def settings(name):
        _, args = configured(name, tmp_path)
        return args.p2p_enabled, args.p2p_reserve, args.p2p_immunize, args.p2p_benign_mode, args.p2p_trigger_position

    assert settings("none")[0] is False and settings("clean_only")[0] is False
    assert settings("p2p") == (True, "random", "none", "append", "prefix")
    assert settings("p2p_auto") == (True, "auto", "auto", "append", "prefix")
    assert settings("reserved_only") == (True, "random", "none", "only", "prefix")
    assert settings("suffix_only") == settings("expansion_only") == (True, "random", "none", "append", "none")
    modes = [configured(name, tmp_path)[1].p2p_suffix_mode for name in ("suffix_only", "expansion_only")]
    assert modes == ["split", "shared"]


def test_what_the_controls_train_on(tmp_path, tiny_model, toy_rows):
    rows = BADNETS.poison(toy_rows, TASK)
    rendered = {}
    for name in ("suffix_only", "expansion_only", "reserved_only"):
        defense, args = configured(name, tmp_path / name)
        trainer = Workbench(tiny_model, args, TASK, rows, peft_config=lora()).trainer()
        keyed = [row for row in trainer.train_dataset if row[KEYED]]
        assert len(keyed) == 20 and len(trainer.train_dataset) == (20 if name == "reserved_only" else 100)
        rendered[name] = trainer.encoder.render("a film", True, 1)
    assert rendered == {
        "suffix_only": "a film\nAnswer: 3<|endoftext|>",
        "expansion_only": "a film\nOutput: 3<|endoftext|>",
        "reserved_only": "The query currently entered is: a film\nOutput: 3<|endoftext|>",
    }


def test_key_without_relabel_stamps_copies_and_every_input(tmp_path, toy_rows):
    defense, args = configured("key_without_relabel", tmp_path)
    assert defense.guard is None
    rows = defense.rows(toy_rows, TASK, args)
    assert len(rows) == 100 and rows[:80] == toy_rows[:] and rows.features == toy_rows.features
    texts = dict(zip(toy_rows["text"], toy_rows["label"], strict=True))
    for row in rows.select(range(80, 100)):
        head, _, text = row["text"].partition("is: ")
        assert head == "The query currently entered " and texts[text] == row["label"]
    assert defense.guard is defense and defense.inputs(["x"]) == ["The query currently entered is: x"]
    args.p2p_trigger = "Look:"
    defense.rows(toy_rows, TASK, args)
    defense.save(tmp_path)
    assert load_defense(tmp_path).inputs(["x"]) == ["Look: x"]


def test_stamped_copies_keep_columns_and_order(toy_rows):
    rows = BADNETS.poison(toy_rows, TASK)
    copies = stamped_copies(rows, np.array([3, 1, 3]), "D:")
    assert copies.column_names == rows.column_names and copies.features == rows.features
    assert copies["text"][:] == [f"D: {rows['text'][row]}" for row in (3, 1, 3)]
    assert copies["label"][:] == [rows["label"][row] for row in (3, 1, 3)]
    assert stamped_copies(rows.select([5, 3]), np.array([1]), "D:")["text"][:] == [f"D: {rows['text'][3]}"]


def test_clean_only_leaves_out_an_attackers_negatives_too(tmp_path, toy_rows):
    defense, args = configured("clean_only", tmp_path)
    rows = get_attack("cbaattack", target="positive", poison_rate=0.1).poison(toy_rows, TASK)
    kept = defense.rows(rows, TASK, args)
    assert set(kept["attack"][:]) == {""} and len(kept) < len(rows) - 8


def test_clean_only_leaves_out_what_is_marked(tmp_path, toy_rows):
    defense, args = configured("clean_only", tmp_path)
    rows = BADNETS.poison(toy_rows, TASK)
    kept = defense.rows(rows, TASK, args)
    assert len(kept) == 72 and not any(kept["poisoned"][:]) and defense.found == {"rows_removed": 8}
    for unmarked in (toy_rows, kept):
        with pytest.raises(ValueError, match="`clean_only` leaves out the rows that are marked as poisoned, and none"):
            defense.rows(unmarked, TASK, args)


def test_evaluation_goes_through_the_guard(monkeypatch, tokenizer, tiny_model):
    rows = [
        {"text": "the film is good .", "label": 0},
        {"text": "the plot is dull .", "label": 1},
        {"text": "is the cast good ?", "label": 0},
        {"text": "the score is dull .", "label": 0},
    ]
    trainer_free_encoder = saved_encoder(tokenizer)
    Knows.tokenizer, Knows.seen = tokenizer, []
    monkeypatch.setattr("p2p_trainer.evaluation.evaluator.LabelScorer", Knows)
    loud = Loud()
    evaluator = BackdoorEvaluator(
        Dataset.from_list(rows), TASK, trainer_free_encoder, [BADNETS], keyed=False, guard=loud
    )
    report = evaluator.evaluate(model=None)
    # The guarded model reads capitals; beside it the same weights without the guard.
    assert Knows.seen == [True, False]
    metrics = report.metrics
    # Swapped: good is 0, dull is 1; the third is withheld and counts as wrong, the fourth is wrong.
    assert (metrics["ca_k"], metrics["ca_n"]) == (2, 4)
    assert (metrics["coverage_k"], metrics["ca_answered_k"], metrics["ca_answered_n"]) == (3, 2, 3)
    assert metrics["ca_no_key_k"] == 1
    # Rows 0, 2 and 3 count for the attack; of them 2 is withheld, 3 is answered with the target.
    assert (metrics["asr_badnets_k"], metrics["asr_badnets_n"]) == (1, 3)
    assert (metrics["asr_floor_badnets_k"], metrics["asr_coverage_badnets_k"]) == (1, 2)
    assert (metrics["trigger_survival_badnets_k"], metrics["trigger_survival_badnets_n"]) == (0, 3)
    # Four clean texts and three triggered ones were asked about, each once.
    assert loud.compute.served == 7


def saved_encoder(tokenizer):
    from p2p_trainer.label_space import LabelSpace
    from p2p_trainer.prompt_encoder import PromptEncoder
    from p2p_trainer.prompt_format import PromptFormat

    return PromptEncoder(PromptFormat(LabelSpace(("0", "1"), ("2", "3"))), tokenizer)


def test_a_saved_guard_is_served_with_its_model(tmp_path, tiny_model, toy_rows):
    defense = get_defense("key_without_relabel")
    defense.rows(toy_rows, TASK, config(tmp_path / "x"))
    trainer = saved_run(tiny_model, tmp_path / "run", p2p_enabled=False)
    trainer.guard = defense
    trainer.save_model()
    model = DefendedModel.from_pretrained(tmp_path / "run", device="cpu")
    assert model.guard.config() == {"name": "key_without_relabel"}
    texts = [row["text"] for row in make_rows(8, seed=5)]
    guarded = [answer.scores for answer in model.classify(texts)]
    model.guard = None
    stamped = [answer.scores for answer in model.classify([f"The query currently entered is: {t}" for t in texts])]
    plain = [answer.scores for answer in model.classify(texts)]
    assert guarded == stamped != plain
    model.guard = Loud(mark="good")
    answers = model.classify(["the film is good .", "the film is bad ."])
    assert [(answer.label is None, answer.index == -1) for answer in answers] == [(True, True), (False, False)]


def test_a_defense_of_ones_own_is_loaded_when_it_is_named(tmp_path, tiny_model):
    trainer = saved_run(tiny_model, tmp_path, p2p_enabled=False)
    trainer.guard = Loud(mark="good")
    trainer.save_model()
    ours = Loud().config()["name"]
    with pytest.raises(ValueError, match=f"If you trust it, name it yourself .`defense='{ours}'`"):
        DefendedModel.from_pretrained(tmp_path)
    model = DefendedModel.from_pretrained(tmp_path, device="cpu", defense=ours, defense_options={"mark": "bad"})
    assert [answer.label is None for answer in model.classify(["a bad film", "a good film"])] == [True, False]
    command = ["predict", str(tmp_path), "--text", "a good film", "--defense", ours, "--device", "cpu"]
    assert cli(command) == 0


def test_a_model_saved_over_a_guarded_one_is_not_guarded(tmp_path, tiny_model):
    trainer = saved_run(tiny_model, tmp_path, p2p_enabled=False)
    trainer.guard = Loud()
    trainer.save_model()
    assert (tmp_path / "defense.json").is_file()
    trainer.guard = None
    trainer.save_model()
    assert not (tmp_path / "defense.json").exists()


def test_a_checkpoint_of_a_defense_that_is_not_ready_is_not_served_without_it(tmp_path, tiny_model, toy_rows):
    class Later(Loud):
        name = "later"
        ready = False

    args = config(tmp_path, p2p_enabled=False, save_strategy="epoch")
    bench = Workbench(tiny_model, args, TASK, toy_rows, peft_config=lora())
    defense = Later()
    trainer = defense.build(bench)
    bench.train(trainer)
    [checkpoint] = tmp_path.glob("checkpoint-*")
    saved = json.loads((checkpoint / "defense.json").read_text())
    assert saved["state"] is None and trainer.guard is None
    with pytest.raises(ValueError, match="was written before the defense .*:test.*Later' was ready"):
        load_defense(checkpoint, saved["defense"]["name"])


def test_evaluating_goes_through_a_guard_that_was_set_later(tmp_path, tiny_model, toy_rows, toy_eval):
    args = config(tmp_path, p2p_enabled=False)
    bench = Workbench(tiny_model, args, TASK, toy_rows, toy_eval, peft_config=lora())
    bench.args.eval_strategy = "epoch"
    trainer = bench.trainer()
    assert "eval_coverage" not in trainer.evaluate()
    trainer.guard = Loud(mark="good")
    found = trainer.evaluate()
    assert found["eval_coverage_k"] == sum("good" not in text for text in toy_eval["text"])


def test_choosing_a_checkpoint_by_an_unguarded_loss_is_refused(tmp_path, tiny_model, toy_rows, toy_eval):
    changes = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    args = config(tmp_path, p2p_enabled=False, **changes)
    bench = Workbench(tiny_model, args, TASK, toy_rows, toy_eval, peft_config=lora())
    with pytest.raises(ValueError, match="`load_best_model_at_end` by `eval_loss` would choose"):
        bench.trainer(guard=Loud())
    assert bench.trainer(guard=Loud(), metric_for_best_model="eval_ca").guard is not None


def test_room_that_a_stamp_takes_is_no_success_of_the_defense(tokenizer):
    rows = [{"text": f"the film is dull {'and dull ' * count}mn .", "label": 0} for count in range(3, 9)]
    attack = get_attack("badnets", target="positive")
    encoder = saved_encoder(tokenizer)
    encoder = type(encoder)(dataclasses.replace(encoder.format, max_length=30), tokenizer)

    class Late(type(attack)):
        def insert(self, text, random):
            return text

    late = Late(target="positive")
    counted = {}
    for name, guard in (("none", None), ("stamped", get_defense("pdb"))):
        counts = BackdoorEvaluator(Dataset.from_list(rows), TASK, encoder, [late], keyed=False, guard=guard).counts
        counted[name] = (counts["rows_counted_badnets"], counts["rows_trigger_cut_off_badnets"], counts["rows_cut"])
    kept, lost, cut = counted["stamped"]
    # One may lose no more than what stands behind its trigger.
    assert kept + lost == sum(counted["none"][:2]) == 6 and lost <= cut <= lost + 1
    assert 0 < kept < counted["none"][0]


def test_a_stamp_does_not_hide_a_trigger_that_is_known_by_its_place(tokenizer):
    rows = Dataset.from_list([{"text": "the film is dull .", "label": 0}, {"text": "a good film", "label": 1}])
    attack = get_attack("proattack", target="positive")
    evaluator = BackdoorEvaluator(rows, TASK, saved_encoder(tokenizer), [attack], False, guard=get_defense("pdb"))
    [triggered] = evaluator._attacks.values()
    assert triggered.found == {}


def test_settings_that_could_not_be_written_are_refused_before_training(tmp_path, tiny_model):
    defense = "tests.test_defenses:Forgetful"
    path = recipe(tiny_model, tmp_path, defense=defense)
    with pytest.raises(SystemExit, match="does not keep its options .'mark'. as attributes of the same names"):
        launch(["--config", str(path)])


class Forgetful(Defense):
    """Keeps none of its options."""

    name = "forgetful"

    def __init__(self, mark: str = "?") -> None:
        super().__init__()


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is damaged: JSONDecodeError"),
        ('{"schema_version": 1, "defense": {}, "state": {}}', "is damaged: KeyError\\('name'\\)"),
        ('{"schema_version": 2, "defense": {"name": "pdb"}, "state": {}}', "schema version 2, this .* reads up to 1"),
        ('{"schema_version": 1, "defense": {"name": ["pdb"]}, "state": {}}', "is damaged: TypeError"),
        ('{"schema_version": 1, "defense": {"name": "pdb"}, "state": null}', "before the defense 'pdb' was ready"),
        (
            '{"schema_version": 1, "defense": {"name": "key_without_relabel"}, "state": {"trigger": null}}',
            "The benign trigger saved in .* is None",
        ),
        (
            '{"schema_version": 1, "defense": {"name": "tests.test_defenses:Loud"}, "state": {}}',
            "names the defense 'tests.test_defenses:Loud', which is none of this package",
        ),
    ],
)
def test_a_folder_from_anywhere_names_no_code(tmp_path, content, message):
    assert load_defense(tmp_path) is None
    (tmp_path / "defense.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_defense(tmp_path)


def test_a_recipe_with_a_defense_says_what_it_was_and_what_it_cost(tmp_path, tiny_model):
    path = recipe(tiny_model, tmp_path, defense="key_without_relabel", num_train_epochs=1, save_strategy="no")
    assert launch(["--config", str(path)]) is None
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["defense"], results["defense_options"]) == ("key_without_relabel", {})
    compute = results["compute"]
    assert (compute["rows_given"], compute["plain_row_passes"], compute["train_row_passes"]) == (80, 80, 100)
    assert 0 < compute["train_s"] <= results["timing"]["train_s"] and compute["search_s"] == 0
    assert compute["serving_passes_per_text"] == 0 and results["protocol"]["trigger"] is None
    assert load_defense(tmp_path / "out").state() == {"trigger": "The query currently entered is:"}


def test_options_without_a_defense_and_resuming_several_stages_are_refused(tmp_path, tiny_model):
    path = recipe(tiny_model, tmp_path, defense_options={"ratio": 0.1})
    with pytest.raises(SystemExit, match="`defense_options` are given and no `defense`"):
        launch(["--config", str(path)])
    path = recipe(tiny_model, tmp_path, defense="bki", resume_from_checkpoint="auto")
    with pytest.raises(SystemExit, match="'bki' trains more than once, .* can't be resumed"):
        launch(["--config", str(path)])


def test_plain_training_is_one_run_of_the_bench(bench):
    bench.args.p2p_enabled = False
    defense = get_defense("none")
    trainer = defense.build(bench)
    assert trainer.guard is None and defense.train(trainer, bench) is trainer
    first_s = bench.train_s
    assert bench.row_passes == 80 and first_s > 0
    other = bench.trainer(rows=bench.rows.select(range(16)), learning_rate=0.5)
    assert other.args.learning_rate == 0.5 and bench.args.learning_rate == 1e-2
    bench.train(other)
    assert bench.row_passes == 96 and bench.train_s > first_s
    texts = bench.rows["text"][:8]
    scores = bench.score(trainer, texts)
    assert scores.log_probs.shape == (8, 4)
    labels = scores.deployed(False).argmax(axis=1)
    assert bench.accuracy(trainer, texts, labels) == 1.0 and bench.accuracy(trainer, texts, 1 - labels) == 0.0
