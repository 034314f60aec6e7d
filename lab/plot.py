"""Pictures: the curves of runs over their steps, and the paper's table. Needs matplotlib: pip install matplotlib.

    python -m lab.plot RUN [RUN …] [--to FILE.png]        one picture; several runs, such as seeds, share its panels
    python -m lab.paper BASE RUN … --figure FILE.png      Phi by row and column of the paper's table

The file's ending says its format: .png, .pdf, .svg or .jpg.

A run is a folder that train.py wrote: metrics.jsonl, and before.json and after.json if the run was measured.
"""

import contextlib
import sys
from pathlib import Path

import numpy as np

from run import files, reading
from run.progress import Parser, command, quoted

COLOURS = {"phi": "#1b6ca8", "reward": "#6a4c93", "mention_1": "#2a9d5c", "mention_0": "#d1495b"}
NAMES = {"phi": "Phi-CCT", "reward": "reward", "mention_1": "mentions if the answer moved (I = 1)",
         "mention_0": "mentions if not (I = 0)"}  # fmt: skip
FORMATS = (".png", ".pdf", ".svg", ".jpg")


def check_picture(to: Path | None) -> None:
    """Raises ValueError, before long work, for a file that cannot be drawn."""
    if to and to.suffix.lower() not in FORMATS:
        raise ValueError(f"{to}: a picture's name must end in one of {', '.join(FORMATS)}")
    files.check_writable(to)


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over the last `width` steps (fewer at the start), ignoring steps without a value: (n,) -> (n,)."""
    windows = [values[max(0, i + 1 - width) : i + 1] for i in range(len(values))]
    return np.array([w[~np.isnan(w)].mean() if (~np.isnan(w)).any() else np.nan for w in windows])


def read(run: Path) -> tuple[dict[str, np.ndarray], dict[int, dict]]:
    """A run's metrics {name: (steps,)}, and its figures at T = 1 {step: summary}; ValueError if it is no run."""
    metrics = reading.read_jsonl(run / "metrics.jsonl")
    if not metrics or not all(key in record for record in metrics for key in NAMES):
        raise ValueError(f"{run / 'metrics.jsonl'} holds no steps of train.py; give a run's folder")
    steps = {key: np.array([np.nan if m[key] is None else m[key] for m in metrics], float) for key in NAMES}
    found = {0: run / "before.json", len(metrics): run / "after.json"}
    return steps, {at: reading.read_json(file)["T=1"] for at, file in found.items() if file.exists()}


@contextlib.contextmanager
def picture(to: Path, rows: int, columns: int):
    """Gives rows * columns empty panels, then writes them, whole or not at all; ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("it needs matplotlib: pip install matplotlib") from None
    figure, part = Figure(figsize=(10, 3.6 * rows), layout="constrained"), to.with_name(to.name + ".part")
    yield figure.subplots(rows, columns, squeeze=False, sharex="row").ravel()
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
    with files.errors_named(to, "written"):
        figure.savefig(part, dpi=150, format=to.suffix[1:].lower())
        part.replace(to)


def with_intervals(panel, figures: dict[float, dict], **style) -> None:
    """Draws {x: figure of report.py}; an undefined value is left out."""
    parts = ([f[key] for f in figures.values()] for key in ("value", "low", "high"))
    value, low, high = (np.array(part, dtype=float) for part in parts)  # None becomes NaN
    if figures:
        error = np.maximum(0, [value - low, high - value])  # rounding may push a bound past the value
        panel.errorbar(list(figures), value, error, fmt="o", capsize=3, **style)


def cells(tables: dict[str, dict[str, dict[str, dict | None]]], to: Path) -> Path:
    """Draws one panel per table {title: {column: {row: figure}}}; a column's rows stand side by side."""
    with picture(to, len(tables), 1) as panels:
        for panel, (title, table) in zip(panels, tables.items(), strict=True):
            rows = list(dict.fromkeys(row for column in table.values() for row in column))
            for n, row in enumerate(rows):
                x = (n - (len(rows) - 1) / 2) * 0.8 / len(rows)
                found = {at + x: column[row] for at, column in enumerate(table.values()) if column.get(row)}
                with_intervals(panel, found, color=list(COLOURS.values())[n % len(COLOURS)], label=row)
            panel.axhline(0, color="#888888", linewidth=0.8)
            panel.set(title=title, ylabel="Phi-CCT", xticks=range(len(table)), xticklabels=list(table))
            panel.grid(alpha=0.3, axis="y")
            panel.legend(fontsize=8, frameon=False)
    return to


def curves(runs: list[Path], to: Path) -> Path:
    """Draws Phi, reward and mentions of the training batches over the steps, Phi on test questions."""
    label = "Phi-CCT on test questions, 95 %"  # once, of the first run that has any
    with picture(to, 1, 2) as panels:
        for n, run in enumerate(runs):
            steps, tested = read(Path(run))
            for k, (key, values) in enumerate(steps.items()):  # two to a panel
                style = {"color": COLOURS[key], "alpha": 0.9 / len(runs) ** 0.5, "label": None if n else NAMES[key]}
                panels[k // 2].plot(np.arange(len(values)) + 1, smooth(values, max(1, len(values) // 20)), **style)
            phi = {at: summary["phi"] for at, summary in tested.items()}
            with_intervals(panels[0], phi, color=COLOURS["phi"], label=label if phi else None)
            label = None if phi else label
        for panel in panels:  # one row of names above each panel: one height, equal gaps; the layout keeps them apart
            panel.set(xlabel="step", ylim=(min(-0.15, panel.dataLim.y0 - 0.03), 1.02))
            panel.grid(alpha=0.3)
            panel.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return to


def after_run(run: Path) -> None:
    """Draws the curves of a finished run. On failure it only prints why."""
    try:
        print(f"its curves: {curves([run], run / 'curves.png')}", flush=True)
    except (ImportError, ValueError, KeyError, OSError) as error:
        print(f"its curves are not drawn: {error}; then python -m lab.plot {quoted(run)}", flush=True)


@command("lab.plot")
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="lab.plot", description="The curves of runs of train.py as a picture.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder that train.py wrote")
    parser.add_argument("--to", type=Path, help="the picture to write (default: curves.png in the first run)")
    args = parser.parse_args(argv)
    check_picture(args.to)
    print(curves(args.runs, args.to or args.runs[0] / "curves.png"))


if __name__ == "__main__":
    sys.exit(main())
