"""Options that every command about a saved run takes."""

import argparse
import json
import warnings
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .inference import DefendedModel


def saved_run_parser(command: str, description: str, asks: bool = True) -> argparse.ArgumentParser:
    """Build the parser of a command about a saved run, with what only those need that ask the model (`asks`)."""
    parser = argparse.ArgumentParser(prog=f"p2p-trainer {command}", description=description)
    parser.add_argument("folder", metavar="OUT", help="output folder or checkpoint of a run, or its hub id")
    parser.add_argument("--base_model", help="base model of the adapter, if it has moved")
    if asks:
        parser.add_argument(
            "--quantization",
            choices=("4bit", "8bit", "none"),
            help="how the base model is held; by default as in training",
        )
        parser.add_argument("--batch_size", type=int, default=32, help="rows per forward pass")
    parser.add_argument("--dtype", help="type of the weights; by default that of training")
    parser.add_argument("--device", help="device to run on; by default the accelerator if there is one")
    parser.add_argument("--defense", help="the run's defense, package.module:Class, if it is not this package's")
    parser.add_argument("--defense_options", default="{}", help="options of the defense that have changed (JSON)")
    return parser


def load_saved_run(arguments: argparse.Namespace) -> "DefendedModel":
    # Names that transformers itself still uses; there is nothing for a user to change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    from .inference import DefendedModel

    return DefendedModel.from_pretrained(
        arguments.folder,
        device=arguments.device,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        base_model=arguments.base_model,
        defense=arguments.defense,
        defense_options=json_object(arguments.defense_options, "defense_options"),
    )


def json_object(text: str, name: str = "attack_options") -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"`--{name}` is no JSON: {text!r} ({error}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"`--{name}` must be a JSON object, got {text!r}.")
    return value
