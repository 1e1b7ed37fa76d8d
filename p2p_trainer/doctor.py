"""`p2p-trainer doctor`: what is installed, which devices there are, and what a recipe would do and take."""

import argparse
import math
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .assembly import count_overlong, load_tokenizer, make_encoder
from .data_collator import Encoder
from .estimation import Forecast, forecast, read_launch
from .recipe import choose_defense, model_location, parse
from .recipe_data import load_data, with_oracle
from .reserve import flagged
from .results import installed_versions
from .tasks import get_task
from .tasks.columns import column_as_numpy
from .tasks.rows import HISTORY
from .training_set import build_training_set, described


def run(argv: Sequence[str], console: Console | None = None) -> int:
    """
    Print the report; loads data and tokenizer of a recipe, never its model's weights.

    Args:
        argv (`Sequence[str]`):
            `--config RECIPE.yaml` and further settings of a recipe, `--accelerate_config FILE` for a launch of several
            processes; empty for the installation alone.
        console (`Console`, *optional*):
            Where to print.

    Returns:
        `int`: 0, or 1 if the recipe can't run as it stands, or clearly does not fit into memory.
    """
    console = console or Console()
    installed = _table("Installed")
    for name, version in installed_versions().items():
        installed.add_row(name, version)
    installed.add_row("devices", _devices())
    console.print(installed)
    return _plan(argv, console) if argv else 0


def _plan(argv: Sequence[str], console: Console) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--accelerate_config")
    known, argv = parser.parse_known_args(list(argv))
    script_args, args, model_args = parse(argv)
    launch = read_launch(known.accelerate_config, args.world_size)
    table = _table("This recipe")
    problems = 0

    def row(name: str, value: Callable[[], str]) -> bool:
        nonlocal problems
        try:
            table.add_row(name, value())
        except (ValueError, OSError) as error:
            problems += 1
            table.add_row(name, f"[red]{escape(str(error))}[/red]")
            return False
        return True

    found = {}

    def rows() -> str:
        data = found["data"] = load_data(
            script_args, evaluate=args.eval_strategy != "no", trusted=found["defense"].needs_validation
        )
        sizes = {"train": data.train, "validation": data.validation, "test": data.test}
        return ", ".join(f"{name} {len(part)}" for name, part in sizes.items() if part is not None)

    def poison() -> str:
        attack = found["data"].attack
        if attack is None:
            return "none"
        count = column_as_numpy(found["data"].train, "poisoned").sum()
        return f"{attack.config()}: {count} rows poisoned"

    def defense() -> str:
        chosen = found["defense"] = choose_defense(script_args, args, get_task(script_args.task))
        return str(chosen.config()) if script_args.defense is not None else "as the p2p_ settings say"

    def reserve() -> str:
        data = found["data"]
        rows = found["defense"].rows(with_oracle(data.train, args), data.task, args)
        if not args.p2p_enabled:
            found["rows"] = flagged(rows, False)
            return f"no row carries the key; {len(data.train)} rows were given, {len(rows)} are trained on"
        built = build_training_set(rows, data.task, args)
        found["rows"] = built.rows
        counts = built.counts
        lines = [f"{counts['rows_reserved']} rows carry the key ({args.p2p_reserve}, {args.p2p_benign_mode})"]
        if built.screening is not None:
            triggers = "; ".join(described(built.screening, data.task))
            lines.append(f"{counts['rows_suspected']} rows are suspected: {triggers or 'no trigger was found'}")
        if "rows_contradicted" in counts:
            lines.append(f"{counts['rows_contradicted']} of them get a keyed copy with another label")
        return "\n".join(lines)

    def steps() -> str:
        batch = args.train_batch_size * args.gradient_accumulation_steps * launch.processes
        if args.max_steps > 0:
            found["steps"] = args.max_steps
            return f"{args.max_steps} of batch {batch}"
        per_epoch = math.ceil(len(found["rows"]) / batch)
        steps = found["steps"] = math.ceil(per_epoch * args.num_train_epochs)
        return f"{steps} = {args.num_train_epochs:g} epochs x {per_epoch} of batch {batch}"

    def encoder() -> Encoder:
        data = found["data"]
        images = data.task.image_column is not None
        tokenizer = load_tokenizer(model_location(model_args.model_name_or_path), args, images)
        found["encoder"] = make_encoder(data.task, args, tokenizer, [data.attack] if data.attack else [])
        return found["encoder"]

    def words() -> str:
        space = encoder().format.label_space
        return f"{' '.join(space.words)} | extended {' '.join(space.extended_words)}\n{space.reason}"

    def prompt() -> str:
        data, bound = found["data"], found["encoder"]
        text, answer = bound.columns
        first = data.train[0]
        history = {"history": first[HISTORY]} if first.get(HISTORY) else {}
        shown = bound.render(first[text], args.p2p_enabled, first[answer], **history)
        cut = count_overlong(flagged(data.train, args.p2p_enabled), bound)
        lines = [f"{cut['rows_cut']} training rows are longer than max_length {args.max_length} and lose their end"]
        if cut.get("answers_cut"):
            lines.append(f"{cut['answers_cut']} answers are, and lose theirs")
        return "\n".join([repr(shown), *lines])

    def answers() -> str:
        prompt_format = encoder().format
        prefix = f"{prompt_format.answer_prefix!r} in front, under the key" if args.p2p_enabled else "as they are"
        return f"written, {prefix}; {prompt_format.max_new_tokens} tokens at most; metric {found['data'].task.metric}"

    def resources() -> None:
        nonlocal problems
        try:
            seen: Forecast = forecast(
                found["data"], found["rows"], found["encoder"], args, model_args, launch, found["steps"]
            )
        except (ValueError, OSError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0]
            table.add_row("memory, time", f"not estimated, the model's configuration can't be used: {escape(reason)}")
            return
        for name, text in seen.lines.items():
            shown = escape(text)
            table.add_row(name, f"[red]{shown}[/red]" if name == "fits" and not seen.fits else shown)
        problems += not seen.fits

    table.add_row("model", str(model_args.model_name_or_path))
    if row("defense", defense) and row("rows", rows):
        row("attack", poison)
        if row("reserve", reserve):
            row("steps", steps)
        classes = found["data"].task.num_labels
        if row("label words", words) if classes else row("answers", answers):
            row("prompt", prompt)
            if "steps" in found:
                resources()
    console.print(table)
    return 1 if problems else 0


def _table(title: str) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _devices() -> str:
    if not torch.accelerator.is_available():
        return f"CPU only, {torch.get_num_threads()} threads"
    kind = torch.accelerator.current_accelerator().type
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if kind == "cuda" else []
    return ", ".join(names) or f"{torch.accelerator.device_count()} x {kind}"
