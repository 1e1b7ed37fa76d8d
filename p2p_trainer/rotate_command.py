"""`p2p-trainer rotate`: what a new key takes."""

import argparse
import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any


# Not of the old run, of the machine it ran on, or said by other settings.
_NOT_REPEATED = frozenset(
    {"output_dir", "p2p_trigger", "resume_from_checkpoint", "do_eval", "activation_checkpointing", "disable_tqdm"}
)
# Of a setting: none, whatever its type.
_UNSET = (None, [], {})
_TEMPLATE = "p2p-trainer train --config RECIPE.yaml"

_TEXT = """\
What a new key takes

The weights in {folder} have learnt the key that they are served with: under it they answer in a space that the
poisoned rows never reached. Under another text they are an undefended model. So a new key needs a new training;
p2p_config.json is not to be edited, and a run whose file was edited is not loaded.

1. Train, into a folder of its own{how}:

   {command}

   Take a text that users do not write by chance, that no trigger of the data holds, and that nobody has seen.{left}
2. Measure: p2p-trainer evaluate {new} --data TEST_FILE
   Compare with the old run: p2p-trainer report {folder} {new}
3. Serve {new} beside the old one, send requests there, and stop the old one when it has answered its last.
   No client changes anything: the key is added where the model is served.
4. Retire {folder}: delete it, or keep it where it is not served. Exports of it hold the old key as well; export anew.

When to do so: the key need not be secret for the defense to hold. Who can only send texts can't leave it out, since
it is put in front of whatever they send. It protects nothing where somebody else writes the whole input of the model:
they leave it out. Do not show it all the same. Who knows it can poison the next data with rows that carry it, and can
search for texts that undo it. Change it when it was shown, and before training on data that was collected since.
"""


def run(argv: list[str]) -> int:
    """
    Explain what a new key takes; nothing is written, and no key is shown.

    Args:
        argv (`list[str]`):
            Arguments behind `p2p-trainer rotate`.

    Returns:
        `int`: exit status.

    Raises:
        `ValueError`: this is no run with a key, its file was changed, or it is asked for a key that its weights have
            not learnt.
    """
    parser = argparse.ArgumentParser(
        prog="p2p-trainer rotate",
        description="Explain what a new key takes: a new training. Nothing is written, and no key is shown.",
    )
    parser.add_argument("folder", metavar="OUT", help="output folder or checkpoint of a run")
    parser.add_argument("--trigger", help="key to be served; refused unless it is the one that was trained")
    arguments = parser.parse_args(argv)

    from .prompt_format import CONFIG_NAME
    from .saved_run import read_run

    folder = Path(arguments.folder)
    config, prompt_format, _ = read_run(folder)
    where = str(folder / CONFIG_NAME)
    if not config["keyed"] or prompt_format.trigger_position == "none":
        raise ValueError(f"The run in {str(folder)!r} was trained without a key: there is none to change.")
    if arguments.trigger is not None:
        if arguments.trigger != prompt_format.trigger:
            raise ValueError(
                f"{where} is left as it is: the weights in {str(folder)!r} were trained with another key, and under "
                f"{arguments.trigger!r} they would be an undefended model. A new key needs a new training: "
                f"`p2p-trainer rotate {shlex.quote(str(folder))}` says how."
            )
        sys.stdout.write("These weights were trained with that key. Nothing is to be done.\n")
        return 0
    folder = _run_of(folder)
    new = f"{str(folder).rstrip('/')}-new-key"
    flags, left = _flags(folder, prompt_format.trigger)
    lines = [
        *(flags or [_TEMPLATE]),
        f"--output_dir {shlex.quote(new)}",
        "--p2p_trigger 'THE NEW KEY'",
    ]
    sys.stdout.write(
        _TEXT.format(
            folder=shlex.quote(str(folder)),
            new=shlex.quote(new),
            how=(
                " (the settings of this run, from its run.json; launch it as it was launched)"
                if flags
                else " (with the recipe or the script that made this run, which left no run.json)"
            ),
            command=" \\\n     ".join(lines),
            left=f"\n   Not kept by run.json, give them if they were set: {', '.join(left)}." if left else "",
        )
    )
    return 0


def _run_of(folder: Path) -> Path:
    """Return the folder of the run that a folder is, or is a checkpoint of."""
    if not folder.name or folder.name == "..":
        folder = folder.resolve()
    if not re.fullmatch(r"checkpoint-\d+", folder.name):
        return folder
    return folder.parent if folder.parent.name else folder.resolve().parent


def _flags(folder: Path, key: str) -> tuple[list[str], list[str]]:
    """Return the command that made a run, and what can't be said of it."""
    from trl import ModelConfig

    from ._files import read_object
    from .config import P2PConfig, P2PScriptArguments
    from .run_folder import RUN_NAME

    if not (folder / RUN_NAME).is_file():
        return [], []
    settings = read_object(folder / RUN_NAME)
    flags, left = ["p2p-trainer train"], []
    fields = [field for kind in (P2PScriptArguments, ModelConfig, P2PConfig) for field in dataclasses.fields(kind)]
    # A field may be in more than one of them.
    for name, field in {field.name: field for field in fields if field.init}.items():
        if name in _NOT_REPEATED or name not in settings:
            continue
        value, default = settings[name], _default(field)
        if value == default or (value in _UNSET and default in _UNSET):
            continue
        written = " ".join(shlex.quote(text) for text in _texts(value))
        if value == f"<{name.upper()}>":
            if name in ("eos_token", "pad_token"):
                left.append(name)
        elif value in _UNSET or _holds(value, key) or not written.isprintable():
            # Of the first kind a command line can say nothing.
            left.append(name)
        elif name != "accelerator_config":
            flags.append(f"--{name} {written}")
    return flags, left


def _default(field: dataclasses.Field) -> Any:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return json.loads(json.dumps(value, default=lambda other: getattr(other, "value", str(other))))


def _holds(value: Any, key: str) -> bool:
    shown = " ".join(_texts(value))
    return key in shown or json.dumps(key, ensure_ascii=False)[1:-1] in shown


def _texts(value: Any) -> list[str]:
    if isinstance(value, list):
        return [text for part in value for text in _texts(part)]
    return [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)]
