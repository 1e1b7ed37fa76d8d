"""accelerate_configs/: what each starts, that they differ in nothing else, and that their headers' lines work."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from p2p_trainer.recipe import parse


ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "accelerate_configs"
SCRIPT = "recipes/sst2_qwen.py"
# Kind, processes, machines, whether it is for the CPU.
KINDS = {
    "cpu": ("NO", 1, 1, True),
    "single_gpu": ("NO", 1, 1, False),
    "ddp": ("MULTI_GPU", 8, 1, False),
    "fsdp2": ("FSDP", 8, 1, False),
    "zero2": ("DEEPSPEED", 8, 1, False),
    "zero3": ("DEEPSPEED", 8, 1, False),
    "multi_node": ("MULTI_GPU", 16, 2, False),
}
OWN = {"distributed_type", "num_processes", "num_machines", "use_cpu", "fsdp_config", "deepspeed_config"}
TWO_MACHINES = ["--num_machines", "2", "--num_processes", "16", "--main_process_ip", "10.0.0.1"]
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}
DEEPSPEED = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    # Left to the recipe.
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": None,
    "ACCELERATE_GRADIENT_CLIPPING": None,
}
HANDED_OVER = {
    "ddp": {"ACCELERATE_USE_FSDP": None, "ACCELERATE_USE_DEEPSPEED": None},
    "fsdp2": FSDP,
    "zero2": {
        **DEEPSPEED,
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    },
    "zero3": {
        **DEEPSPEED,
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    },
}


@pytest.fixture
def started(monkeypatch):
    """Do what `accelerate launch` does up to the processes; which launcher it takes, and its arguments."""
    found = []
    for name in ("simple_launcher", "multi_gpu_launcher", "deepspeed_launcher"):
        monkeypatch.setattr(launch, name, lambda arguments, name=name: found.append((name, arguments)))

    def start(*argv):
        launch.launch_command(launch.launch_command_parser().parse_args(list(argv)))
        return found.pop()

    return start


def path(name):
    return str(FOLDER / f"{name}.yaml")


def header(name):
    """The comment on top, without its marks."""
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return "\n".join(line[2:] for line in lines[: lines.index("compute_environment: LOCAL_MACHINE")])


def lines_of(name):
    """The launch lines of a header."""
    found = re.findall(r"^ +(accelerate launch (?:.*\\\n)*.*)$", header(name), re.MULTILINE)
    return [shlex.split(line.replace("\\\n", " "))[2:] for line in found]


def test_each_is_there():
    assert sorted(file.stem for file in FOLDER.glob("*.yaml")) == sorted(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_each_loads_as_what_it_is_called(name):
    config = load_config_from_file(path(name))
    found = config.distributed_type.value, config.num_processes, config.num_machines, config.use_cpu
    assert found == KINDS[name]
    # A precision would overrule `bf16: false` of a recipe.
    assert config.machine_rank == 0 and config.mixed_precision == "no"


def test_they_differ_in_what_they_are_for_alone():
    shared = {}
    for name in KINDS:
        settings = yaml.safe_load(Path(path(name)).read_text(encoding="utf-8"))
        shared[name] = {key: value for key, value in settings.items() if key not in OWN}
        assert list(settings) == sorted(settings)
        assert ("fsdp_config" in settings, "deepspeed_config" in settings) == (name == "fsdp2", "zero" in name)
    assert all(settings == shared["cpu"] for settings in shared.values())


@pytest.mark.parametrize("name", HANDED_OVER)
def test_what_processes_are_told(name, started, monkeypatch):
    for variable in {key for variables in HANDED_OVER.values() for key in variables}:
        monkeypatch.delenv(variable, raising=False)
    launcher, arguments = started("--config_file", path(name), "--main_process_port", "0", SCRIPT)
    assert launcher == ("deepspeed_launcher" if "zero" in name else "multi_gpu_launcher")
    told = prepare_deepspeed_cmd_env(arguments)[1] if "zero" in name else prepare_multi_gpu_env(arguments)
    assert {key: told.get(key) for key in HANDED_OVER[name]} == HANDED_OVER[name]
    assert told["ACCELERATE_MIXED_PRECISION"] == "no" and arguments.nproc_per_node == "8"


@pytest.mark.parametrize("name", ["fsdp2", "zero2", "zero3", "multi_node"])
def test_two_machines(name, started):
    flags = TWO_MACHINES[4:] if name == "multi_node" else TWO_MACHINES
    rank = ["--machine_rank", "1", "--main_process_port", "29500"]
    _, arguments = started("--config_file", path(name), *flags, *rank, SCRIPT)
    if "zero" in name:
        command, _ = prepare_deepspeed_cmd_env(arguments)
        # Not DeepSpeed's own launcher, which would log in to the other machine.
        assert command is None
    else:
        prepare_multi_gpu_env(arguments)
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", 1)
    assert arguments.rdzv_endpoint == "10.0.0.1:29500"


@pytest.mark.parametrize("name", KINDS)
def test_the_lines_of_a_header_start_it(name, started, tmp_path):
    lines = lines_of(name)
    assert len(lines) == (2 if name == "multi_node" else 1)
    for rank, line in enumerate(lines):
        words = [str(ROOT / word) if word.endswith(".yaml") else word for word in line if word != "..."]
        assert path(name) in words
        _, arguments = started(*words)
        assert arguments.training_script == SCRIPT and int(arguments.machine_rank) == rank
        given = [*arguments.training_script_args, "--output_dir", str(tmp_path), "--bf16", "false"]
        _, config, model = parse(given, (ROOT / SCRIPT).with_suffix(".yaml"))
        # The batch of the paper, whatever the machines.
        step = config.per_device_train_batch_size * config.gradient_accumulation_steps * arguments.num_processes
        assert step == 32 and model.model_name_or_path.startswith("Qwen/")


def test_the_slurm_script_starts_each_machine(tmp_path, started):
    script = "\n".join(re.findall(r"^  (#!/bin/bash\n(?:  .*\n)+)", header("multi_node"), re.MULTILINE)).replace(
        "\n  ", "\n"
    )
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n" in script
    stubs = {
        "scontrol": 'echo "$@" >&2; printf "node07\\nnode08\\n"',
        # As `srun` does: the command once on each machine.
        "srun": 'for node in 0 1; do SLURM_NODEID=$node "$@" || exit 1; done',
        "accelerate": 'printf "%s\\n" "$*"',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=ROOT,
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_NNODES": "2",
            "SLURM_JOB_NODELIST": "node[07-08]",
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "show hostnames node[07-08]\n"
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    assert len(commands) == 2
    for rank, words in enumerate(commands):
        assert words.pop(0) == "launch"
        _, arguments = started(*words)
        assert (arguments.num_machines, arguments.num_processes, int(arguments.machine_rank)) == (2, 16, rank)
        assert (arguments.main_process_ip, arguments.main_process_port) == ("node07", 29500)
        assert arguments.training_script == SCRIPT
        assert arguments.training_script_args == ["--per_device_train_batch_size", "2"]
