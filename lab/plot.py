"""Pictures: the curves of runs, step by step, and the README's figure.

matplotlib is needed here only, and nothing else in the project needs it: pip install matplotlib.

    python plot.py RUN [RUN …] [--to FILE.png]      one picture; several runs (seeds, say) are drawn over each other
    python report.py RUN … --figure FILE.png        Phi by row and column of the paper's table (paper.py)

A run is a folder that train.py wrote: its metrics.jsonl, and before.json and after.json where it was evaluated.
"""

import json
import sys
from pathlib import Path

import numpy as np

from run import files
from run.progress import Parser

COLOURS = {"phi": "#1b6ca8", "reward": "#6a4c93", "mention_1": "#2a9d5c", "mention_0": "#d1495b"}
NAMES = {"phi": "Phi-CCT", "reward": "reward", "mention_1": "mentions where the edit moved the answer (I = 1)",
         "mention_0": "mentions where it did not (I = 0)"}  # fmt: skip


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over the last `width` steps (fewer at the start), steps without a value left out: (n,) -> (n,)."""
    windows = [values[max(0, i + 1 - width) : i + 1] for i in range(len(values))]
    return np.array([w[~np.isnan(w)].mean() if (~np.isnan(w)).any() else np.nan for w in windows])


def read(run: Path) -> tuple[dict[str, np.ndarray], dict[int, dict]]:
    """A run's metrics, a number per step, and its figures at T = 1 {step: summary}; ValueError for no such run."""
    metrics = files.read_jsonl(run / "metrics.jsonl")
    if not metrics or not all(key in record for record in metrics for key in NAMES):
        raise ValueError(f"{run / 'metrics.jsonl'} holds no steps of train.py; give a run's folder")
    steps = {key: np.array([np.nan if m[key] is None else m[key] for m in metrics], float) for key in NAMES}
    found = {0: run / "before.json", len(metrics): run / "after.json"}
    return steps, {at: json.loads(file.read_text())["T=1"] for at, file in found.items() if file.exists()}


def blank(width: float, height: float):
    """An empty figure, in inches; ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("it needs matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained")


def save(figure, to: Path) -> Path:
    part = to.with_suffix(".part.png")
    figure.savefig(part, dpi=150)
    part.replace(to)
    return to


def with_interval(panel, x: float, f: dict, **style) -> None:
    """A figure of report.py at x; what is undefined is not drawn."""
    value, low, high = (np.nan if f[key] is None else f[key] for key in ("value", "low", "high"))
    error = [[np.maximum(0, value - low)], [np.maximum(0, high - value)]]  # by rounding, a bound may be a hair off
    panel.errorbar([x], [value], error, fmt="o", capsize=3, **style)


def cells(tables: dict[str, dict[str, dict[str, dict | None]]], to: Path) -> Path:
    """Draws a PNG: a panel a table, {title: {column: {row: figure}}}, the rows side by side in each column."""
    figure = blank(10, 3.6 * len(tables))
    panels = figure.subplots(len(tables), 1, squeeze=False)[:, 0]
    for panel, (title, table) in zip(panels, tables.items(), strict=True):
        rows = list(dict.fromkeys(row for column in table.values() for row in column))
        for n, row in enumerate(rows):
            colour, label = list(COLOURS.values())[n % len(COLOURS)], row
            for at, column in enumerate(table.values()):
                if column.get(row):
                    x = at + (n - (len(rows) - 1) / 2) * 0.8 / len(rows)
                    with_interval(panel, x, column[row], color=colour, label=label)
                    label = None
        panel.axhline(0, color="#888888", linewidth=0.8)
        panel.set(title=title, ylabel="Phi-CCT", xticks=range(len(table)), xticklabels=list(table))
        panel.grid(alpha=0.3, axis="y")
        panel.legend(fontsize=8, frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    return save(figure, to)


def curves(runs: list[Path], to: Path) -> Path:
    """Draws a PNG: Phi, reward and mentions of the training batches over the steps, Phi on test questions."""
    figure = blank(10, 3.6)
    panels = figure.subplots(1, 2, sharex=True)
    for n, run in enumerate(runs):
        steps, tested = read(Path(run))
        width = max(1, len(steps["phi"]) // 20)
        for panel, keys in zip(panels, (("phi", "reward"), ("mention_1", "mention_0")), strict=True):
            for key in keys:
                x, label = np.arange(1, len(steps[key]) + 1), None if n else NAMES[key]
                panel.plot(x, smooth(steps[key], width), color=COLOURS[key], alpha=0.9 / len(runs) ** 0.5, label=label)
        for at, summary in tested.items():
            label = None if n or at else "Phi-CCT on test questions, 95 %"
            with_interval(panels[0], at, summary["phi"], color=COLOURS["phi"], label=label)
    for panel in panels:
        panel.set(xlabel="step", ylim=(-0.15, 1.02))
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        panel.spines[["top", "right"]].set_visible(False)
    return save(figure, to)


def after_run(run: Path) -> None:
    """Draws the curves of a finished run; a picture that cannot be drawn does not spoil the run."""
    try:
        print(f"its curves: {curves([run], run / 'curves.png')}", flush=True)
    except (ImportError, ValueError, KeyError, OSError) as error:
        print(f"its curves are not drawn: {error}; then python -m lab.plot {run}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="lab.plot", description="The curves of runs of train.py as a picture.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder that train.py wrote")
    parser.add_argument("--to", type=Path, help="the PNG to write (default: curves.png in the first run)")
    args = parser.parse_args(argv)
    try:
        print(curves(args.runs, args.to or args.runs[0] / "curves.png"))
    except (ImportError, ValueError, OSError) as error:
        print(f"lab.plot: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
