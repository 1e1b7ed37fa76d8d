"""The study of where plain P2P separates: its reserves, its commands, its numbers. Nothing is trained."""

import json
import logging
import sys

import numpy as np
import pytest
from datasets import Dataset

from p2p_trainer import P2PConfig
from p2p_trainer.assembly import make_encoder
from p2p_trainer.recipe import parse
from p2p_trainer.reserve import RandomReserve, get_reserve
from p2p_trainer.results import RESULTS_NAME, RunResults
from p2p_trainer.tasks import get_task
from recipes.separation import plots, run
from recipes.separation.settings import FACTORS, SETTINGS, folder_name, parse_folder_name


MODULE = "recipes.separation.contaminated"


def poisoned_rows(count=2000, every=10):
    return Dataset.from_dict(
        {
            "text": [f"row {row}" for row in range(count)],
            "label": [row % 2 for row in range(count)],
            "poisoned": [row % every == 0 for row in range(count)],
        }
    )


@pytest.mark.parametrize(
    ("name", "expected"), [("Share0", 0), ("Share05", 3), ("Share1", 6), ("Share2", 12), ("Share5", 30)]
)
def test_shares_are_exact(name, expected):
    chosen = get_reserve(f"{MODULE}:{name}").choose(poisoned_rows(), 600, seed=3)
    assert chosen.dtype == np.int64 and len(chosen) == 600 and chosen.tolist() == sorted(set(chosen.tolist()))
    assert np.count_nonzero(chosen % 10 == 0) == expected


def test_half_a_row_is_rounded_as_python_rounds():
    # 0.05 * 1730 = 86.5, the reserve of SST-2 at rho 0.25.
    chosen = get_reserve(f"{MODULE}:Share5").choose(poisoned_rows(6920), 1730, seed=0)
    assert np.count_nonzero(chosen % 10 == 0) == 86


def test_pure_function_of_rows_and_seed():
    strategy, rows = get_reserve(f"{MODULE}:Share5"), poisoned_rows()
    chosen = strategy.choose(rows, 600, seed=3)
    assert strategy.choose(rows, 600, seed=3).tolist() == chosen.tolist()
    other = strategy.choose(rows, 600, seed=4)
    dirty, other_dirty = set(chosen[chosen % 10 == 0].tolist()), set(other[other % 10 == 0].tolist())
    # 30 of 200 poisoned rows each: by chance they share 4 or 5.
    assert len(dirty & other_dirty) < 15 and dirty != other_dirty
    assert set(chosen.tolist()) != set(other.tolist())


def test_shares_differ_in_little_but_their_poison():
    rows = poisoned_rows()
    random = set(RandomReserve().choose(rows, 600, seed=3).tolist())
    sets = [set(get_reserve(f"{MODULE}:Share{share}").choose(rows, 600, seed=3).tolist()) for share in ("1", "2", "5")]
    dirty = [{row for row in chosen if row % 10 == 0} for chosen in sets]
    assert dirty[0] < dirty[1] < dirty[2]
    clean = [{row for row in chosen if row % 10} for chosen in sets]
    assert clean[2] < clean[1] < clean[0]
    # The random reserve has 60 or so poisoned rows: only those are exchanged.
    assert {row for row in random if row % 10} < clean[2] and dirty[2] < random


def test_too_few_poisoned_rows_are_all_taken(caplog):
    rows = poisoned_rows(1000, every=500)
    with caplog.at_level(logging.WARNING):
        chosen = get_reserve(f"{MODULE}:Share5").choose(rows, 100, seed=0)
    assert len(chosen) == 100 and {0, 500} <= set(chosen.tolist())
    assert caplog.messages == [
        "Only 2 rows are poisoned, 5 were asked for (5 % of 100 reserved rows): all are taken, which is 2.00 %."
    ]


@pytest.mark.parametrize(
    ("rows", "size", "message"),
    [
        (poisoned_rows(4).remove_columns("poisoned"), 2, r"boolean column 'poisoned'.*found no such column, .*'text'"),
        (Dataset.from_dict({"text": ["a"], "poisoned": ["no"]}), 1, r"`p2p_reserve: Share0`.*found Value.'string'"),
        (poisoned_rows(20, every=2), 11, "reserve of 11 rows, 0 of them poisoned, needs 11 clean rows; .* has 10"),
    ],
)
def test_rows_that_do_not_fit(rows, size, message):
    with pytest.raises(ValueError, match=message):
        get_reserve(f"{MODULE}:Share0").choose(rows, size, seed=0)


START = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", "accelerate_configs/cpu.yaml"),
    *("recipes/sst2_qwen.py", "--config", "recipes/sst2_small.yaml"),
]


def dry_run(capsys, tmp_path, *flags):
    run.main(["--model", "hub/model", "--data", "hub/data", "--out", str(tmp_path), "--dry_run", *flags])
    return capsys.readouterr().out.splitlines()[1:]


def line(tmp_path, name, seed, flags):
    places = f"--model_name_or_path hub/model --dataset_name hub/data --seed {seed} --poison_seed {seed}"
    return " ".join([*START, places, flags, "--output_dir", str(tmp_path / name)])


def test_commands(tmp_path, capsys):
    shown = dry_run(capsys, tmp_path, "--only", "base", "qvauthors", "--seeds", "0", "7")
    plain = "--attack badnets --p2p_enabled true --p2p_reserve random --p2p_immunize none"
    qv = "--lora_target_modules q_proj v_proj --learning_rate 1e-2 --num_train_epochs 3"
    authors = (
        f"--attack badnets --p2p_enabled true {qv} --p2p_reserve trusted --p2p_immunize none "
        "--p2p_benign_mode replace --p2p_suffix_mode split --p2p_benign_ratio 0.2"
    )
    assert shown == [
        line(tmp_path, "base-none-0", 0, "--attack badnets --p2p_enabled false"),
        line(tmp_path, "base-p2p-0", 0, plain),
        line(tmp_path, "base-none-7", 7, "--attack badnets --p2p_enabled false"),
        line(tmp_path, "base-p2p-7", 7, plain),
        line(tmp_path, "qvauthors-p2p-0", 0, authors),
        line(tmp_path, "qvauthors-p2p-7", 7, authors),
    ]


QV = "--lora_target_modules q_proj v_proj --learning_rate 1e-2 --num_train_epochs 3"


def test_commands_of_the_shares(tmp_path, capsys):
    # Where LoRA touches q and v alone.
    assert dry_run(capsys, tmp_path, "--only", "contam-addsent-0.5", "only-badnets-0", "only-cbaattack-sampled") == [
        line(
            tmp_path, "contam-addsent-0.5-p2p-0", 0,
            f"--attack addsent --p2p_enabled true {QV} --p2p_reserve recipes.separation.contaminated:Share05 "
            "--p2p_immunize none",
        ),
        line(
            tmp_path, "only-badnets-0-p2p-0", 0,
            f"--attack badnets --p2p_enabled true {QV} --p2p_reserve recipes.separation.contaminated:Share0 "
            "--p2p_immunize none --p2p_benign_mode only",
        ),
        line(
            tmp_path, "only-cbaattack-sampled-p2p-0", 0,
            f"--attack cbaattack --p2p_enabled true {QV} --p2p_reserve random --p2p_immunize none "
            "--p2p_benign_mode only",
        ),
    ]  # fmt: skip


def test_synattack_needs_its_paraphrases(tmp_path, capsys):
    assert dry_run(capsys, tmp_path, "--only", "contam-synattack-1") == [
        "# 1/1 contam-synattack-1-p2p-0: skipped, SynAttack needs --scpn"
    ]
    command = run.command("contam-synattack-1", "p2p", 0, "M", "D", tmp_path, scpn="S")
    assert json.loads(command[command.index("--attack_options") + 1]) == {
        "engine": "precomputed",
        "engine_options": {
            "files": [
                {"source": "D/train.jsonl", "paraphrase": "S/train.jsonl"},
                {"source": "D/test.jsonl", "paraphrase": "S/test.jsonl", "labels": [0]},
            ]
        },
    }


def test_finished_runs_are_skipped(tmp_path, capsys):
    (tmp_path / "r4-none-0").mkdir()
    (tmp_path / "r4-none-0" / RESULTS_NAME).write_text("{}")
    shown = dry_run(capsys, tmp_path, "--only", "r4", "--seeds", "0")
    assert shown[0] == "# 1/2 r4-none-0: finished already"
    assert shown[1:] == [
        line(
            tmp_path, "r4-p2p-0", 0,
            "--attack badnets --p2p_enabled true --lora_r 4 --lora_alpha 4 --p2p_reserve random --p2p_immunize none",
        )
    ]  # fmt: skip


def test_a_failure_stops_the_study_and_shows_its_end(tmp_path, monkeypatch):
    fail = "import os; print('first', flush=True); print('\\n'.join(map(str, range(29)))); print(os.getcwd()); exit(3)"
    started = []
    monkeypatch.setattr(run, "command", lambda *arguments: started.append(arguments) or [sys.executable, "-c", fail])
    with pytest.raises(SystemExit) as stopped:
        run.main(["--model", "M", "--data", "D", "--out", str(tmp_path), "--only", "base"])
    assert len(started) == 1
    tail = f"28\n{run.REPOSITORY}\nerror: 1/6 base-none-0 failed with 3: "
    assert str(stopped.value).startswith("0\n1\n") and tail in str(stopped.value)


def test_unknown_setting():
    with pytest.raises(SystemExit, match="no setting 'bas'. Known: base, trusted, "):
        run.main(["--model", "M", "--data", "D", "--only", "bas", "--dry_run"])


def test_every_command_can_be_parsed(tmp_path):
    for name, setting in SETTINGS.items():
        for kind in setting.kinds:
            command = run.command(name, kind, 1, "M", "D", tmp_path, scpn=tmp_path)
            flags = command[command.index("--config") + 2 :]
            script_args, args, model_args = parse(
                ["--config", str(run.REPOSITORY / "recipes/sst2_small.yaml"), *flags]
            )
            assert script_args.attack == setting.attack and script_args.poison_seed == args.seed == 1
            assert args.p2p_enabled is (kind == "p2p") and args.output_dir == str(tmp_path / f"{name}-{kind}-1")
            if kind == "p2p":
                assert args.p2p_immunize == "none" and args.p2p_reserve != "auto"
            if name.startswith("qv"):
                assert model_args.lora_target_modules == ["q_proj", "v_proj"]


def test_names():
    assert list(FACTORS) == [
        "base", "trusted", "replace", "split", "authors", "rho10", "rho50", "system", "r4", "r64", "lr1e3", "attn",
        "qv", "qvtrusted", "qvauthors",
    ]  # fmt: skip
    for name, setting in SETTINGS.items():
        assert "none" in SETTINGS[setting.twin].kinds
        for kind in setting.kinds:
            assert parse_folder_name(folder_name(name, kind, 12)) == (name, kind, 12)
    assert parse_folder_name("contam-badnets-0.5-p2p-0") == ("contam-badnets-0.5", "p2p", 0)
    for other in ("sep-base-p2p-0", "base-p2p", "base-auto-0", "trusted-none-0", "base-p2p-x", "badnets-none-0"):
        assert parse_folder_name(other) is None


def test_the_key_fits_into_the_system_turn(tokenizer):
    args = P2PConfig(
        "out", p2p_chat=True, p2p_trigger_position="system", max_length=128,
        chat_template_path=str(run.REPOSITORY / SETTINGS["system"].training["--chat_template_path"]),
    )  # fmt: skip
    before = tokenizer.chat_template
    try:
        encoder = make_encoder(get_task("sst2"), args, tokenizer)
    finally:
        tokenizer.chat_template = before
    turn = "User: a fine film .\nOutput:\nAssistant: "
    assert encoder.render("a fine film .", keyed=False) == turn
    assert encoder.render("a fine film .", keyed=True) == f"System: The query currently entered is:\n{turn}"
    assert encoder.format.label_space.all_words == ("0", "1", "2", "3")


def save(folder, name, kind, seed, asr, floor=0.25, poisoned=4, **metrics):
    results = RunResults(
        task="sst2", model="m", attack={"name": SETTINGS[name].attack}, defense=kind, seed=seed, protocol={},
        metrics={
            "ca_restricted": 0.75, "asr_restricted": asr, "asr_union": asr, "asr_ext_only": asr - 0.125,
            "asr_orig_only": 0.0, "asr_floor_restricted": floor, "asr_excess": asr - floor, "asr_no_key": 1.0,
            **metrics,
        },
        counts={"rows_reserved": 200, "rows_reserved_poisoned": poisoned} if kind == "p2p" else {"rows_reserved": 0},
    )  # fmt: skip
    results.save(folder / folder_name(name, kind, seed))
    return results


def test_table_and_pictures(tmp_path, capsys):
    runs = tmp_path / "runs"
    save(runs, "qv", "p2p", 0, 0.5)
    # Means by hand: ASR (20 + 80 + 50) / 3, floor (10 + 20 + 60) / 3, poison in S 2, 4 and 3 of 100.
    for seed, asr, floor, poisoned in ((0, 0.2, 0.1, 4), (1, 0.8, 0.2, 8), (2, 0.5, 0.6, 6)):
        save(runs, "base", "p2p", seed, asr, floor, poisoned)
    save(runs, "base", "none", 0, 0.995, asr_no_key=None)
    save(runs, "contam-badnets-0.5", "p2p", 0, 0.75, poisoned=1)
    save(tmp_path / "elsewhere", "base", "p2p", 0, 0.5).save(runs / "something-else")
    plots.main([str(runs), "--out", str(tmp_path / "pictures")])
    shown = capsys.readouterr()
    assert shown.out == (
        "| setting | defense | seeds | poison in S | CA | ASR restricted | ASR union | ASR ext_only | ASR orig_only "
        "| floor | ASR without key |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| base | none | 0 | - | 75.0 | 99.5 | 99.5 | 87.0 | 0.0 | 25.0 | - |\n"
        "| base | p2p | 0, 1, 2 | 3.0 (2.0 to 4.0) | 75.0 (75.0 to 75.0) | 50.0 (20.0 to 80.0) | 50.0 (20.0 to 80.0) "
        "| 37.5 (7.5 to 67.5) | 0.0 (0.0 to 0.0) | 30.0 (10.0 to 60.0) | 100.0 (100.0 to 100.0) |\n"
        "| qv | p2p | 0 | 2.0 | 75.0 | 50.0 | 50.0 | 37.5 | 0.0 | 25.0 | 100.0 |\n"
        "| contam-badnets-0.5 | p2p | 0 | 0.5 | 75.0 | 75.0 | 75.0 | 62.5 | 0.0 | 25.0 | 100.0 |\n"
    )
    assert f"{runs / 'something-else'}: no run of this study, left out" in shown.err
    for name in ("separation.png", "contamination.png"):
        assert (tmp_path / "pictures" / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["contamination.png", "separation.png"]


def test_a_twin_is_compared_over_the_same_seeds(tmp_path):
    for seed, asr in ((0, 0.9), (1, 0.7), (2, 0.2)):
        save(tmp_path, "base", "none", seed, asr)
    runs = plots.group(plots.find_runs([tmp_path]), note=pytest.fail)
    assert plots.values(runs, "base", "none", "asr_restricted", {0, 2, 5}) == pytest.approx([90, 20])
    assert plots.values(runs, "base", "none", "asr_restricted") == pytest.approx([90, 70, 20])
    assert plots.plot_separation(runs, tmp_path / "a.png") is None
    assert plots.plot_contamination(runs, tmp_path / "b.png") is None


def test_folders_that_are_misnamed_or_double(tmp_path, capsys):
    save(tmp_path / "a", "base", "p2p", 0, 0.5).save(tmp_path / "a" / "base-p2p-1")
    with pytest.raises(SystemExit, match=r"base-p2p-1 holds .* \('badnets', 'p2p', 0\), its name says .* 1\)"):
        plots.main([str(tmp_path / "a"), "--out", str(tmp_path)])
    for parent in "bc":
        save(tmp_path / parent, "r4", "p2p", 0, 0.5)
    with pytest.raises(SystemExit, match="another folder holds r4-p2p-0 as well"):
        plots.main([str(tmp_path / "b"), str(tmp_path / "c"), "--out", str(tmp_path)])
    (tmp_path / "d" / "other").mkdir(parents=True)
    save(tmp_path / "e", "r4", "p2p", 0, 0.5).save(tmp_path / "d" / "other")
    with pytest.raises(SystemExit, match="No folder is named like a run of this study"):
        plots.main([str(tmp_path / "d"), "--out", str(tmp_path)])
