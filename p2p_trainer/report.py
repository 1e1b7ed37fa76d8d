"""Results into tables and plots."""

import math
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from .results import RunResults


_COLUMNS = {"ca": "CA", "asr": "ASR", "asr_floor": "floor", "asr_no_key": "ASR without key"}
# Of generated answers; those that no run has are not shown.
_RESPONSE_COLUMNS = {
    "ca": "CA",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "clean_unaffected": "no known behaviour",
    "empty": "empty",
    "prefix_missing": "prefix missing",
    "asr": "ASR",
    "asr_anywhere": "payload anywhere",
    "asr_floor": "floor",
    "asr_no_key": "ASR without key",
    "rerouted": "re-routed",
}


def percent(metrics: Mapping[str, float], name: str) -> str:
    """
    Write a rate with its counts.

    Args:
        metrics (`Mapping[str, float]`):
            Metrics of a run.
        name (`str`):
            Name of the rate.

    Returns:
        `str`: such as `"93.4 % (934/1000)"`, `"53.2"` for a mean, `"-"` if it was not measured.
    """
    value = metrics.get(name)
    if value is None or math.isnan(value):
        return "-"
    if f"{name}_k" not in metrics:
        return f"{100 * value:.1f}"
    return f"{100 * value:.1f} % ({metrics[f'{name}_k']}/{metrics[f'{name}_n']})"


def metrics_table(metrics: Mapping[str, float], title: str) -> Table:
    """
    List every rate of one measurement.

    Args:
        metrics (`Mapping[str, float]`):
            Metrics of a [`~evaluation.BackdoorEvaluator`].
        title (`str`):
            Title.

    Returns:
        `rich.table.Table`: one line per rate, with k/N and its Wilson 95 % interval.
    """
    table = Table(title=title)
    table.add_column("rate")
    table.add_column("value (k/N)", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, value in metrics.items():
        if f"{name}_k" in metrics:
            low, high = metrics[f"{name}_ci_low"], metrics[f"{name}_ci_high"]
            table.add_row(
                name, percent(metrics, name), "-" if math.isnan(low) else f"{100 * low:.1f} to {100 * high:.1f}"
            )
        elif not name.endswith(("_k", "_n", "_ci_low", "_ci_high")):
            form = "+.1f" if "excess" in name else ".1f"
            table.add_row(name, "-" if math.isnan(value) else f"{100 * value:{form}}", "")
    return table


def results_table(runs: Mapping[str, RunResults]) -> Table:
    """
    Put runs side by side.

    Args:
        runs (`Mapping[str, RunResults]`):
            Name -> run.

    Returns:
        `rich.table.Table`: clean accuracy, attack success rate, floor and excess, each with k/N.
    """
    generated = any(run.response_matrix for run in runs.values())
    rules = sorted({run.protocol.get("asr_rule") or "restricted" for run in runs.values()})
    columns = _COLUMNS
    if generated:
        measured = {name for run in runs.values() for name in run.metrics}
        columns = {name: title for name, title in _RESPONSE_COLUMNS.items() if name in measured}
    table = Table(title="Test prompts, generated answers" if generated else f"Test rows, rule {', '.join(rules)}")
    table.add_column("run")
    for title in columns.values():
        table.add_column(title, justify="right")
    table.add_column("excess", justify="right")
    for name, run in runs.items():
        excess = run.metrics.get("asr_excess")
        shown = "-" if excess is None or math.isnan(excess) else f"{100 * excess:+.1f}"
        table.add_row(name, *(percent(run.metrics, metric) for metric in columns), shown)
    return table


def plot_runs(runs: Mapping[str, RunResults], path: str | Path) -> Path:
    """
    Draw runs with different defenses side by side: rates, and the shift of confidence (P2P paper, Figure 2).

    Args:
        runs (`Mapping[str, RunResults]`):
            Name -> run, the undefended one first; four at most.
        path (`str` or `Path`):
            PNG file to write.

    Returns:
        `Path`: the file.

    Raises:
        `ImportError`: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: `pip install p2p_trainer[plots]`.") from error
    # Told apart by lightness as well as by hue, so that the picture survives a black-and-white printer.
    colors = dict(zip(runs, ("#b2182b", "#fdb863", "#67a9cf", "#e0e0e0"), strict=False))
    figure = Figure(figsize=(5 + 3 * len(runs), 4.2), layout="constrained")
    rates, *shifts = figure.subplots(1, 1 + len(runs), width_ratios=(1.6, *[1] * len(runs)))
    names = {"ca": "clean\naccuracy", "asr": "attack\nsuccess", "asr_floor": "floor"}
    width = 0.8 / len(runs)
    for number, (name, run) in enumerate(runs.items()):
        places = [position + (number - (len(runs) - 1) / 2) * width for position in range(len(names))]
        values = [100 * run.metrics[metric] for metric in names]
        spread = [
            [value - 100 * run.metrics[f"{metric}_ci_low"] for metric, value in zip(names, values, strict=True)],
            [100 * run.metrics[f"{metric}_ci_high"] - value for metric, value in zip(names, values, strict=True)],
        ]
        bars = rates.bar(
            places, values, 0.95 * width, yerr=spread, capsize=3, color=colors[name], edgecolor="black", label=name
        )
        rates.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    rates.set_xticks(range(len(names)), list(names.values()))
    rates.set_ylabel("test rows (%), Wilson 95 % interval")
    rates.set_ylim(0, 120)
    rates.legend(loc="upper right", frameon=False, ncols=len(runs), fontsize=8)
    rates.set_title("Rates")
    for axes, (name, run) in zip(shifts, runs.items(), strict=True):
        histograms = next(iter(run.confidence.values()))
        target = (run.attack or {}).get("target", "target")
        bins = len(histograms["triggered"])
        total = max(1, sum(histograms["triggered"]))
        edges = [index / bins for index in range(bins + 1)]
        for kind, style in (("clean", {"color": "#bdbdbd"}), ("triggered", {"color": colors[name], "alpha": 0.75})):
            shares = [100 * count / total for count in histograms[kind]]
            axes.stairs(shares, edges, fill=True, label=f"{kind} rows", **style)
            axes.stairs(shares, edges, color="black", linewidth=0.8, linestyle="--" if kind == "clean" else "-")
        axes.set_xlabel(f"confidence in the target ({target})")
        axes.set_ylabel("rows of other labels (%)")
        axes.set_ylim(0, 100)
        axes.set_title(name)
        axes.legend(loc="upper center", frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    figure.savefig(aside, format="png", dpi=140)
    aside.replace(path)
    return path
