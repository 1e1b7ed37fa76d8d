"""Writes a saved run in the formats that servers read."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from .._files import write_json, write_text
from ..data_collator import Encoder
from ..evaluation import GUARD_NAME
from ..inference import DefendedModel
from ..prompt_format import CONFIG_NAME
from ..saved_run import find_run, load_encoder, read_run
from .chat_template import build_template, check_template, plain_answers
from .folders import RECORD_NAME, RECORD_SCHEMA_VERSION, check_free, written_aside
from .launch import launch_without_weights, whole_launch
from .merged import merge, write_weights
from .openai_recipe import RECIPE_NAME, make_recipe
from .readme import merged_readme, recipe_readme, template_readme


FORMATS = ("merged", "chat-template", "openai-recipe")


def export_run(
    folder: str | Path,
    out: str | Path,
    formats: Sequence[str],
    base_model: str | None = None,
    tokenizer_only: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
    defense: str | None = None,
    defense_options: dict[str, Any] | None = None,
) -> list[str]:
    """
    Export a saved run; nothing is left behind where a part of it fails.

    Args:
        folder (`str` or `Path`):
            Output folder or checkpoint of a [`P2PTrainer`] run, or its hub id.
        out (`str` or `Path`):
            Folder to write. Several formats get a folder each within it, by their names.
        formats (`Sequence[str]`):
            `"merged"`: the whole model, for this package. `"chat-template"`: the whole model with the key in its chat
            template, for other servers. `"openai-recipe"`: the fields of requests to those.
        base_model (`str`, *optional*):
            Base model of an adapter, if it has moved.
        tokenizer_only (`bool`, *optional*, defaults to `False`):
            Whether `"chat-template"` goes without weights.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether an export that is there is replaced.
        device (`str`, *optional*, defaults to `"cpu"`):
            Where adapter and base are put together.
        dtype (`str`, *optional*):
            Type of the exported weights, by default that of training.
        defense (`str`, *optional*):
            Import path of the run's defense, if it is not this package's.
        defense_options (`dict[str, Any]`, *optional*):
            Options of the run's defense that have changed.

    Returns:
        `list[str]`: what the operator should know, a line each.

    Raises:
        `ValueError`: the folder holds something else, the run can't be loaded, or a format can't serve it as it was
        trained.
    """
    formats = tuple(dict.fromkeys(formats))
    if not formats or (unknown := [name for name in formats if name not in FORMATS]):
        raise ValueError(f"Formats are {', '.join(FORMATS)}; got {list(formats) if not formats else unknown[0]!r}.")
    if tokenizer_only and "chat-template" not in formats:
        raise ValueError("`--tokenizer_only` is about `--format chat-template`. Add that format, or leave it out.")
    run, out = find_run(folder).resolve(), Path(out).expanduser().resolve()
    check_free(out, run, overwrite)
    config, prompt_format, labels = read_run(run)
    _check_served_elsewhere(run, config, formats)
    # What needs no weights is checked before they are loaded.
    needs_weights = "merged" in formats or ("chat-template" in formats and not tokenizer_only)
    encoder = None if formats == ("merged",) else load_encoder(run, prompt_format, images=False)
    template = build_template(encoder, config["keyed"]) if "chat-template" in formats else None
    recipe = None if encoder is None else make_recipe(encoder, config["keyed"], labels)
    model = None
    if needs_weights:
        model = DefendedModel.from_pretrained(
            run, device=device, dtype=dtype, quantization="none", base_model=base_model, defense=defense,
            defense_options=defense_options,
        )  # fmt: skip
        config = {**config, "dtype": dtype or config["dtype"]}
    said = []
    with written_aside(out, run, overwrite) as new:
        places = {name: new / name if len(formats) > 1 else new for name in formats}
        for place in places.values():
            place.mkdir(exist_ok=True)
        if model is not None:
            model.model = merge(model.model)
        if "merged" in places:
            said += _write_merged(places["merged"], run, model, config, defense, defense_options)
        if "chat-template" in places:
            said += _write_template(places["chat-template"], run, encoder, template, recipe, model)
        if "openai-recipe" in places:
            write_json(places["openai-recipe"] / RECIPE_NAME, recipe)
            write_text(places["openai-recipe"] / "README.md", recipe_readme())
            said.append(f"{RECIPE_NAME}: requests for {', '.join(recipe['requests'])}.")
        write_json(new / RECORD_NAME, {"schema_version": RECORD_SCHEMA_VERSION, "formats": list(formats)})
    if not config["keyed"]:
        said.append("This run was trained without a key (`keyed: false`): nothing of P2P defends it.")
    return said


def _check_served_elsewhere(run: Path, config: dict[str, Any], formats: Sequence[str]) -> None:
    for name in formats:
        if name == "merged":
            continue
        if config.get("images"):
            raise ValueError(
                f"This run reads images, and `--format {name}` is for texts alone. Use `--format merged`, and "
                f"`DefendedModel`."
            )
        if (run / GUARD_NAME).is_file():
            raise ValueError(
                f"The run has a defense ({GUARD_NAME}) that changes texts, answers or what is answered at all, and a "
                f"server that knows only `--format {name}` would leave it out. Use `p2p-trainer serve`, or "
                f"`--format merged` with it."
            )


def _write_merged(
    place: Path,
    run: Path,
    model: DefendedModel,
    config: dict[str, Any],
    defense: str | None,
    defense_options: dict[str, Any] | None,
) -> list[str]:
    write_weights(model.model, model.encoder, place)
    getattr(model.encoder, "processor", model.encoder.tokenizer).save_pretrained(place)
    write_json(place / CONFIG_NAME, {**config, "quantization": None})
    guard = None if model.guard is None else str(getattr(model.guard, "name", type(model.guard).__name__))
    if model.guard is not None:
        model.guard.save(place)
        try:
            DefendedModel.from_pretrained(place, device="cpu", defense=defense, defense_options=defense_options)
        except ValueError as error:
            raise ValueError(
                f"The defense {guard!r} of this run can't be applied to a merged model: {error} Serve the run itself, "
                f"with `p2p-trainer serve`."
            ) from error
    quantized = config.get("quantization") is not None
    write_text(place / "README.md", merged_readme(config["keyed"], quantized, guard))
    said = ["merged: for `DefendedModel` and `p2p-trainer serve`."]
    if config["keyed"]:
        said[0] += " Any other server leaves out the key, and so serves the backdoored model in full."
    if quantized:
        said.append("The base was quantised in training; the adapter is folded into the base as it was before.")
    if guard is not None:
        said.append(f"The defense {guard!r} of the run is applied by this package alone.")
    return said


def _write_template(
    place: Path, run: Path, encoder: Encoder, template: str, recipe: dict[str, Any], model: DefendedModel | None
) -> list[str]:
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.chat_template = template
    tokenizer.response_template = plain_answers(tokenizer)
    tokenizer.save_pretrained(place)
    # As a server reads it, not as it is in memory.
    count = check_template(AutoTokenizer.from_pretrained(place), encoder, recipe["keyed"])
    if model is not None:
        write_weights(model.model, encoder, place)
    lengths = encoder.format.max_length, encoder.format.max_new_tokens
    launch = whole_launch(recipe, lengths[0]) if model is not None else launch_without_weights(run, lengths[0])
    write_text(place / "README.md", template_readme(recipe, *lengths, launch, model is None))
    return [f"chat-template: {count} requests of the check have the tokens of training. Read its README.md."]
