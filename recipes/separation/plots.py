"""
Show what the study measured: two pictures, and a table on standard output.

    python -m recipes.separation.plots RUNS... --out recipes/separation
"""

import argparse
import math
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2p_trainer.results import RunResults
from p2p_trainer.summary import find_runs
from recipes.separation.settings import CONTAMINATED_ATTACKS, FACTORS, SETTINGS, SHARES, parse_folder_name


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Setting and kind -> seed -> run.
Runs = dict[tuple[str, str], dict[int, RunResults]]

RATES = {
    "CA": "ca_restricted",
    "ASR restricted": "asr_restricted",
    "ASR union": "asr_union",
    "ASR ext_only": "asr_ext_only",
    "ASR orig_only": "asr_orig_only",
    "floor": "asr_floor_restricted",
    "ASR without key": "asr_no_key",
}
# Told apart by lightness and shape as well as by hue.
UNDEFENDED, P2P, ONLY, FLOOR = "#b2182b", "#2166ac", "#e08214", "#4d4d4d"
HOLLOW: dict[str, Any] = {"markerfacecolor": "none", "markeredgewidth": 1.6}


def group(found: dict[str, RunResults], note: Callable[[str], None]) -> Runs:
    """
    Sort runs by setting and kind.

    Args:
        found (`dict[str, RunResults]`):
            Folder -> run.
        note (`Callable[[str], None]`):
            Gets a line for each folder that is no run of the study.

    Returns:
        `dict[tuple[str, str], dict[int, RunResults]]`: setting and kind -> seed -> run.

    Raises:
        `ValueError`: a folder's name says something else than its results, or two folders hold the same run.
    """
    runs: Runs = {}
    for folder, run in found.items():
        parsed = parse_folder_name(Path(folder).name)
        if parsed is None:
            note(f"{folder}: no run of this study, left out")
            continue
        name, kind, seed = parsed
        held = ((run.attack or {}).get("name"), run.defense, run.seed)
        if held != (SETTINGS[name].attack, kind, seed):
            raise ValueError(
                f"{folder} holds a run of (attack, defense, seed) {held}, its name says "
                f"{(SETTINGS[name].attack, kind, seed)}. Rename the folder, or leave it out."
            )
        if seed in runs.setdefault((name, kind), {}):
            raise ValueError(f"{folder}: another folder holds {Path(folder).name} as well. Leave one of them out.")
        runs[name, kind][seed] = run
    return runs


def values(runs: Runs, name: str, kind: str, rate: str, seeds: Collection[int] | None = None) -> list[float]:
    """
    Read one rate of a setting.

    Args:
        runs (`dict[tuple[str, str], dict[int, RunResults]]`):
            Setting and kind -> seed -> run.
        name (`str`):
            Setting.
        kind (`str`):
            `"none"` or `"p2p"`.
        rate (`str`):
            Name of the rate.
        seeds (`Collection[int]`, *optional*):
            Only these seeds.

    Returns:
        `list[float]`: a value per seed, in percent; runs that did not measure it are left out.
    """
    of_seeds = sorted(runs.get((name, kind), {}).items())
    measured = [run.metrics.get(rate) for seed, run in of_seeds if seeds is None or seed in seeds]
    return [100 * value for value in measured if value is not None and not math.isnan(value)]


def shares(runs: Runs, name: str, kind: str) -> list[float]:
    """Return which part of S was poisoned, in percent, a value per seed."""
    counts = [run.counts for _, run in sorted(runs.get((name, kind), {}).items())]
    return [
        100 * count["rows_reserved_poisoned"] / count["rows_reserved"]
        for count in counts
        if count.get("rows_reserved") and "rows_reserved_poisoned" in count
    ]


def mean(numbers: Sequence[float]) -> float:
    """Return the mean."""
    return sum(numbers) / len(numbers)


def spread(numbers: Sequence[float], digits: int = 1) -> str:
    """Write numbers of several seeds as `"50.0 (20.0 to 80.0)"`, one number as itself, none as `"-"`."""
    if not numbers:
        return "-"
    shown = [f"{number:.{digits}f}" for number in (mean(numbers), min(numbers), max(numbers))]
    return shown[0] if len(numbers) == 1 else f"{shown[0]} ({shown[1]} to {shown[2]})"


def markdown(runs: Runs) -> str:
    """
    Write a table of all settings, in percent: mean over seeds, then lowest and highest.

    Args:
        runs (`dict[tuple[str, str], dict[int, RunResults]]`):
            Setting and kind -> seed -> run.

    Returns:
        `str`: the table.
    """
    rows = [("setting", "defense", "seeds", "poison in S", *RATES)]
    rows.append(tuple("---" for _ in rows[0]))
    for name, setting in SETTINGS.items():
        for kind in setting.kinds:
            if (name, kind) in runs:
                seeds = ", ".join(map(str, sorted(runs[name, kind])))
                rates = (spread(values(runs, name, kind, rate)) for rate in RATES.values())
                rows.append((name, kind, seeds, spread(shares(runs, name, kind)), *rates))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def plot_separation(runs: Runs, path: Path) -> Path | None:
    """
    Draw, for each setting, how much of the attack reaches the keyed path.

    Args:
        runs (`dict[tuple[str, str], dict[int, RunResults]]`):
            Setting and kind -> seed -> run.
        path (`Path`):
            PNG file to write.

    Returns:
        `Path` or `None`: the file; `None` if no setting was run with P2P.
    """
    names = [name for name in FACTORS if values(runs, name, "p2p", "asr_restricted")]
    if not names:
        return None
    figure = _figure((9, 1.4 + 0.44 * len(names)))
    axes = figure.subplots()
    butt: dict[str, Any] = {"solid_capstyle": "butt"}
    for place, name in enumerate(names):
        keyed = values(runs, name, "p2p", "asr_restricted")
        floor = values(runs, name, "p2p", "asr_floor_restricted")
        undefended = values(runs, SETTINGS[name].twin, "none", "asr_restricted", runs[name, "p2p"])
        if floor:
            axes.plot([mean(floor)] * 2, [place - 0.34, place + 0.34], color=FLOOR, linewidth=2.5, **butt)
            axes.plot([mean(floor), mean(keyed)], [place] * 2, color=P2P, alpha=0.25, linewidth=6, **butt)
        # Undefended and defended are often within a point of each other: one stands above the line, one on it.
        if undefended:
            axes.plot(mean(undefended), place - 0.27, "v", color=UNDEFENDED, markersize=6.5, clip_on=False)
        axes.plot([min(keyed), max(keyed)], [place] * 2, color=P2P, linewidth=1.6)
        axes.plot(keyed, [place + 0.25] * len(keyed), ".", color=P2P, markersize=5, alpha=0.8, clip_on=False)
        axes.plot(mean(keyed), place, "o", color=P2P, markersize=7.5, clip_on=False)
        excess = f"{mean(keyed) - mean(floor):+.1f}" if floor else ""
        axes.annotate(excess, (1.015, place), xycoords=("axes fraction", "data"), va="center", fontsize=10)
    axes.annotate("excess", (1.015, -0.75), xycoords=("axes fraction", "data"), va="center", fontsize=10)
    axes.set_yticks(range(len(names)), [f"{SETTINGS[name].about}   $\\bf{{{name}}}$" for name in names])
    axes.set_ylim(len(names) - 0.5, -0.6)
    axes.set_xlim(0, 101)
    axes.set_xlabel("test rows answered with the attacker's target (%)")
    axes.grid(axis="x", color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    _separation_legend(figure)
    return _save(figure, path)


def plot_contamination(runs: Runs, path: Path) -> Path | None:
    """
    Draw, for each attack, what poison in S does.

    Args:
        runs (`dict[tuple[str, str], dict[int, RunResults]]`):
            Setting and kind -> seed -> run.
        path (`Path`):
            PNG file to write.

    Returns:
        `Path` or `None`: the file; `None` if no share was run.
    """
    attacks = [
        attack for attack in CONTAMINATED_ATTACKS
        if any(name.startswith((f"contam-{attack}-", f"only-{attack}-")) for name, _ in runs)
    ]  # fmt: skip
    if not attacks:
        return None
    columns = min(2, len(attacks))
    lines = math.ceil(len(attacks) / columns)
    figure = _figure((9, 1.1 + 2.9 * lines))
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes, attack in zip(panels, attacks, strict=False):
        _contamination_panel(axes, runs, attack)
    for axes in panels[len(attacks) :]:
        axes.remove()
    figure.supxlabel("share of S that is poisoned (%)", fontsize=11)
    figure.supylabel("excess: ASR - floor (points)", fontsize=11)
    _contamination_legend(figure)
    return _save(figure, path)


def _contamination_panel(axes: "Axes", runs: Runs, attack: str) -> None:
    def points(prefix: str, *endings: str) -> tuple[list[float], list[float]]:
        names = [f"{prefix}-{attack}-{ending}" for ending in endings]
        found = [(shares(runs, name, "p2p"), values(runs, name, "p2p", "asr_excess")) for name in names]
        found = [(mean(share), mean(excess)) for share, excess in found if share and excess]
        return [share for share, _ in found], [excess for _, excess in found]

    shown = {seed for (name, _), group in runs.items() if f"-{attack}-" in name for seed in group}
    undefended = values(runs, SETTINGS[f"contam-{attack}-0"].twin, "none", "asr_excess", shown)
    axes.axhline(0, color="#999999", linewidth=0.8)
    if undefended:
        axes.axhline(mean(undefended), color=UNDEFENDED, linestyle="--", linewidth=1.6)
    axes.plot(*points("contam", *SHARES), "o-", color=P2P, markersize=6)
    axes.plot(*points("contam", "sampled"), "D", color=P2P, markersize=9, **HOLLOW)
    axes.plot(*points("only", "0", "sampled"), "^", color=ONLY, markersize=8, markeredgecolor="black")
    axes.set_title(attack, fontsize=12)
    axes.grid(color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelleft=True, labelbottom=True)


def _figure(size: tuple[float, float]) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: `pip install p2p_trainer[plots]`.") from error
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)
    return figure


def _separation_legend(figure: "Figure") -> None:
    from matplotlib.lines import Line2D

    figure.legend(
        handles=[
            Line2D([], [], color=P2P, marker="o", markersize=7.5, linewidth=1.6, label="P2P, mean and range"),
            Line2D([], [], color=P2P, marker=".", markersize=5, linestyle="", label="P2P, each seed"),
            Line2D([], [], color=FLOOR, marker="|", markersize=12, markeredgewidth=2.5, linestyle="", label="floor"),
            Line2D([], [], color=UNDEFENDED, marker="v", markersize=6.5, linestyle="", label="no defense, same seeds"),
        ],
        loc="outside upper center", ncols=4, frameon=False, fontsize=10,
    )  # fmt: skip


def _contamination_legend(figure: "Figure") -> None:
    from matplotlib.lines import Line2D

    only = "trained on S only"
    figure.legend(
        handles=[
            Line2D([], [], color=P2P, marker="o", markersize=6, label="P2P, share set"),
            Line2D([], [], color=P2P, marker="D", markersize=9, linestyle="", label="P2P, S as sampled", **HOLLOW),
            Line2D([], [], color=ONLY, marker="^", markersize=8, markeredgecolor="black", linestyle="", label=only),
            Line2D([], [], color=UNDEFENDED, linestyle="--", label="no defense, same seeds"),
        ],
        loc="outside upper center", ncols=4, frameon=False, fontsize=10,
    )  # fmt: skip


def _save(figure: "Figure", path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    figure.savefig(aside, format="png", dpi=140)
    aside.replace(path)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Show the study."""
    parser = argparse.ArgumentParser(prog="python -m recipes.separation.plots", description=__doc__.split("\n")[1])
    parser.add_argument("runs", type=Path, nargs="+", help="Folders of runs, or folders that hold them at any depth.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="Folder of the pictures.")
    arguments = parser.parse_args(argv)
    try:
        runs = group(find_runs(arguments.runs), lambda line: sys.stderr.write(f"{line}\n"))
        if not runs:
            raise ValueError("No folder is named like a run of this study: SETTING-none-SEED or SETTING-p2p-SEED.")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    sys.stdout.write(markdown(runs))
    for draw, name in ((plot_separation, "separation.png"), (plot_contamination, "contamination.png")):
        path = draw(runs, arguments.out / name)
        sys.stderr.write(f"{path}\n" if path else f"{name}: nothing to draw yet\n")


if __name__ == "__main__":
    main()
