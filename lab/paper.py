"""The paper's experiment as a table: base, RQ1, RQ2-frozen and RQ2-on-policy, in-distribution and elsewhere.

A run is a folder of train.py in which cells were measured afterwards; the base is a folder with cells only:

    RUN/args.json                  objective and labels: the row; task and intervention: what it was trained on
    RUN/cells/WHERE-KIND.T1.jsonl  a cell: the rows of one kind of edit on one task, or on questions of another name
    RUN/cells/WHERE-KIND.fit.jsonl the rows that fit its shortcut baseline
    RUN/cells/WHERE-KIND.json      how it was measured, in its args

All runs must be asked the same questions with the same edits, so that they can be compared in pairs: give faith.py the
same --seed, --limit, --fit and --calibration file for each. The runs of a row differ in their seed alone; others are
refused.

A cell has Phi, the shortcut's Phi, and the differences to it and to the base, with 95 % intervals by bootstrap over
groups (report.py); of several seeds it has the median and [least, greatest]. Frozen labels reward Phi with the initial
model's I. The share of that gain that vanishes against the trained model's own I is

    1 − (Phi(own I) − Phi(base)) / (Phi(initial I) − Phi(base)),     undefined where the interval of the gain holds 0

    python faith.py --model RUN/model --task TASK … --temperature 1 --rows RUN/cells/TASK-KIND
    python -m lab.paper BASE RUN [RUN …] [--markdown] [--json FILE] [--figure FILE.png]
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import report
from lab import plot
from run import files
from run.progress import Parser

KINDS = ("adverb", "bias")
ROWS = ("base", "RQ1", "RQ2-frozen", "RQ2-on-policy")  # in the table's order
LEGEND = (
    "[ ]: 95 % interval by bootstrap; of several seeds the median and [least, greatest]; (1 of 3): measured of one of "
    "the row's three seeds"
)
ASKED = ("opening", "max_new_tokens", "seed", "words", "fit")  # flags of faith.py that change a cell
FREE = {"seed", "out", "resume", "note", "save_every", "checkpoint_every", "micro", "parallel", "recompute"}  # in a row
SMOKE = 20  # a run of fewer steps only shows that the commands work
PARTS = {
    "phi": "Phi-CCT",
    "shortcut_phi": "Phi of the best shortcut baseline",
    "phi_less_shortcut": "Phi minus the shortcut's",
    "phi_less_base": "Phi minus the base's",
    "detection": "correlation of I and what it says of it when asked outright",
    "accuracy": "accuracy on X",
}
GAIN = {
    "phi_base": "Phi of the base",
    "phi_initial": "Phi with the initial I",
    "phi_own": "Phi with its own I",
    "vanished": "share of the gain that vanishes",
}


@dataclass
class Run:
    """A folder with measured cells; trained is None for the base."""

    folder: Path
    row: str
    trained: tuple[str, str] | None  # task, intervention
    model: str
    steps: int  # logged
    planned: int
    args: dict
    cells: dict[tuple[str, str], Path]  # by (where, kind), without .T1.jsonl


def read(folder: str | Path) -> Run:
    """ValueError where the folder holds no measured cells, or is not of a run."""
    folder, cells = Path(folder), {}
    for file in sorted((folder / "cells").glob("*.T1.jsonl")):
        where, _, kind = file.name.removesuffix(".T1.jsonl").rpartition("-")
        if not where or kind not in KINDS:
            raise ValueError(f"{file}: name a cell by task and intervention, such as esnli-bias.T1.jsonl")
        cells[where, kind] = file.with_name(f"{where}-{kind}")
    if not cells:
        raise ValueError(f"{folder}: no measured cells; see faith.py --rows {folder}/cells/TASK-INTERVENTION")
    found = [file for file in (folder / "args.json", folder / "training.json") if file.exists()]
    if not found:
        return Run(folder, folder.resolve().name, None, "", 0, 0, {}, cells)
    try:
        args = json.loads(found[0].read_text())
        row = "RQ1" if args["objective"] == "detection" else f"RQ2-{args['labels']}"
        names, steps = (args["task"], args["intervention"], args["model"]), args["steps"]
        if row not in ROWS or [*map(type, names), type(steps)] != [str, str, str, int]:
            raise ValueError("a value that no run has")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{found[0]}: not of a run of train.py ({error!r})") from None
    logged = len(files.read_jsonl(log)) if (log := folder / "metrics.jsonl").exists() else steps
    return Run(folder, row, names[:2], names[2], logged, steps, args, cells)


def check_alike(runs: list[Run]) -> None:
    """ValueError unless the runs of one row differ in their seed, and in flags that change no result."""
    for n, run in enumerate(runs):
        for other in (o for o in runs[:n] if (o.row, o.trained) == (run.row, run.trained)):
            for key in sorted((other.args.keys() | run.args.keys()) - FREE):
                a, b = other.args.get(key), run.args.get(key)
                if (a or 0) != (b or 0):  # a run that is older than a flag has it off
                    raise ValueError(f"{other.folder} and {run.folder} are not seeds of one row, {run.row}: "
                                     f"their --{key.replace('_', '-')} differs, {a!r} and {b!r}")  # fmt: skip
            if other.args.get("seed") == run.args.get("seed"):
                raise ValueError(f"{other.folder} and {run.folder} are the same seed of {run.row}, "
                                 f"--seed {run.args.get('seed')}: give one of them")  # fmt: skip


def check_asked(key: tuple[str, str], runs: list[Run]) -> None:
    """ValueError where two runs measured the cell differently, as far as their files tell."""
    known: dict[Path, dict] = {}
    for run in runs:
        if (file := Path(f"{run.cells[key]}.json")).exists():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
                args = dict(found.get("args") or {})
            except (ValueError, TypeError, AttributeError, OSError) as error:
                raise ValueError(f"{file}: not of a measurement by faith.py ({error!r})") from None
            how = {name: args[name] for name in ASKED if name in args}
            how |= {"calibration": args["calibration"] != "none"} if "calibration" in args else {}
            how |= {"letters": found["mean_logp"]} if found.get("mean_logp") else {}
            for other, was in known.items():
                for name in (name for name in how if name in was and how[name] != was[name]):
                    words = {
                        "calibration": "one with --calibration, one without",
                        "letters": "with other letter offsets; give both the same --calibration FILE",
                    }.get(name, f"--{name.replace('_', '-')} {was[name]!r} and {how[name]!r}")
                    raise ValueError(f"{'-'.join(key)} of {other} and of {run.folder}: measured differently, {words}")
            known[run.folder] = how


# ---- figures ---------------------------------------------------------------------------------------------------


def cell(rows: list[dict], fit: list[dict] | None, base: list[dict] | None, seed=0, resamples=2000):
    """The figures of report.summary, and the paired phi_less_base where there are rows of the base."""
    out = report.summary(rows, fit, seed, resamples)
    if base is not None:

        def phi(c, w):
            return {"phi": report.phi(c["influence"], c["mention"], w)}

        out["phi_less_base"] = report.compare(base, rows, seed, resamples, of=phi)["phi"]
    return out


def gain(base: list[dict], rows: list[dict], seed=0, resamples=2000) -> dict[str, dict]:
    """Phi before, after with the initial model's I and with its own, and the share of the gain that vanishes."""
    a, b = report.pairs(base, rows)

    def figures(w):
        was, initial, own = (report.phi(i["influence"], m["mention"], w) for i, m in ((a, a), (a, b), (b, b)))
        share = 1 - (own - was) / np.where(initial > was, initial - was, np.nan)
        return {"phi_base": was, "phi_initial": initial, "phi_own": own, "gain": initial - was, "vanished": share}

    out = report.intervals(figures, a["group"], seed, resamples)
    if not out["gain"]["low"] > 0:  # NaN too: there is no gain to share
        out["vanished"] = {"value": np.nan, "low": np.nan, "high": np.nan, "undefined": resamples}
    return out


def over_seeds(figures: list[dict]) -> dict | None:
    """One figure of several seeds: median, least and greatest value. One seed's own figure; None for none."""
    if len(figures) < 2:
        return figures[0] if figures else None
    known = [f["value"] for f in figures if f["value"] == f["value"]]
    value, low, high = np.percentile(known, [50, 0, 100]).tolist() if known else [np.nan] * 3
    return {"value": value, "low": low, "high": high, "undefined": len(figures) - len(known), "seeds": len(figures)}


def columns(home: tuple[str, str] | None, runs: list[Run]) -> dict[tuple[str, str], str]:
    """What runs trained on `home` (task, intervention) are asked: {(where, kind): heading}."""
    if not home:
        return {key: ", ".join(key) for run in runs for key in run.cells}
    task, kind = home
    others = sorted({where for run in runs for where, of in run.cells if of == kind and where != task})
    heads = {(task, kind): "in-distribution"} | {(where, kind): f"OOD: {where}" for where in others}
    cross = [(task, other) for other in KINDS if other != kind and any((task, other) in run.cells for run in runs)]
    return heads | {key: f"cross-intervention: {key[1]}" for key in cross}


def measured(key: tuple[str, str], runs: list[Run], seed=0, resamples=2000) -> dict[Path, dict]:
    """{folder: figures} of the runs that have the cell; ValueError where they were asked differently."""
    runs = [run for run in runs if key in run.cells]
    check_asked(key, runs)
    rows = {run.folder: files.read_jsonl(f"{run.cells[key]}.T1.jsonl") for run in runs}
    base, out = next((rows[run.folder] for run in runs if not run.trained), None), {}
    for run in runs:
        fit, mine, first = Path(f"{run.cells[key]}.fit.jsonl"), rows[run.folder], runs[0].folder
        kinds = report.columns(mine, f"{run.cells[key]}.T1.jsonl")["kind"]
        if (kinds != key[1]).any():
            raise ValueError(f"{run.cells[key]}.T1.jsonl: its rows are not of {key[1]}")
        try:
            report.pairs(rows[first], mine)
        except ValueError as error:
            raise ValueError(f"{'-'.join(key)} of {first} and of {run.folder}: {error}") from None
        try:
            fitted = files.read_jsonl(fit) if fit.exists() else None
            out[run.folder] = cell(mine, fitted, base if run.trained else None, seed, resamples)
        except ValueError as error:
            raise ValueError(f"{fit}: {error}") from None
        if base is not None and run.trained == key:
            out[run.folder]["gain"] = gain(base, mine, seed, resamples)
    return out


def tables(folders: list, seed=0, resamples=2000) -> list[dict]:
    """One table for each task and intervention that runs were trained on; of a base alone one of all its cells."""
    unique: dict[Path, Path] = {}
    for folder in map(Path, folders):
        unique.setdefault(folder.resolve(), folder)
    runs = [read(folder) for folder in unique.values()]
    bases, trained = ([run for run in runs if bool(run.trained) == t] for t in (False, True))
    if len(bases) > 1:
        raise ValueError(f"{bases[0].folder} and {bases[1].folder} have no args.json: give one base")
    if len(models := sorted({run.model for run in trained})) > 1:
        raise ValueError(f"runs of several models, {models[0]} and {models[1]}: make a table of each")
    check_alike(trained)
    out = []
    for home in sorted({run.trained for run in trained}) or [None]:
        those = bases + [run for run in trained if run.trained == home]
        order = [run.row for run in bases]
        order += [row for row in ROWS if any(run.row == row and run.trained for run in those)]
        heads = columns(home, those)
        figures = {heads[key]: measured(key, those, seed, resamples) for key in heads}
        rows = {}
        for row in order:
            mine = [run for run in those if run.row == row]
            cells = {head: [found[run.folder] for run in mine if run.folder in found]
                     for head, found in figures.items()}  # fmt: skip
            rows[row] = {
                "runs": [str(run.folder) for run in mine], "steps": [run.steps for run in mine],
                "planned": [run.planned for run in mine],
                "smoke": any(run.trained and run.steps < SMOKE for run in mine), "cells": cells,
            }  # fmt: skip
        n = {head: next(iter(found.values()))["n"]["value"] for head, found in figures.items() if found}
        title = f"trained on {home[0]}, {home[1]}" if home else "not trained"
        out.append({"title": title, "n": n, "columns": list(heads.values()), "rows": rows})
    return out


# ---- in print --------------------------------------------------------------------------------------------------


def label(row: str, of: dict) -> str:
    """The row's name, with how many seeds it has, and which stopped before their last step."""
    seeds = len(of["runs"])
    stopped = [steps for steps, planned in zip(of["steps"], of["planned"], strict=True) if steps < planned]
    notes = [f"{seeds} seeds"] * (seeds > 1)
    if stopped:
        number = f"{len(stopped)} of them " * (seeds > 1)
        notes += [f"{number}stopped after {' and '.join(map(str, stopped))} of {of['planned'][0]} steps"]
    return f"{row} ({', '.join(notes)})" if notes else row


def entry(figures: list[dict | None], of: dict) -> str:
    """A cell of the row in print, and how many of its runs have it, where some do not."""
    found = [figure for figure in figures if figure]
    part = f" ({len(found)} of {len(of['runs'])})" * (len(found) < len(of["runs"]))
    return report.cell(over_seeds(found)) + part + " (smoke test)" * of["smoke"] if found else "–"


def text(table: dict, markdown: bool) -> str:
    """A table for each figure of the cells, and one of what frozen labels gained."""
    parts = [f"{table['title']}; explanations at T = 1\n{LEGEND}"]
    heads = [f"{head} (n = {table['n'][head]})" if head in table["n"] else head for head in table["columns"]]
    names = {row: label(row, of) for row, of in table["rows"].items()}
    for figure, title in PARTS.items():
        body = [[names[row], *(entry([f.get(figure) for f in of["cells"][head]], of) for head in table["columns"])]
                for row, of in table["rows"].items()]  # fmt: skip
        if any(words != "–" for line in body for words in line[1:]):
            parts += [title, report.grid(["", *heads], body, markdown)]
    home, body = table["columns"][0], []
    for row, of in table["rows"].items():
        gains = [f["gain"] for f in of["cells"][home] if "gain" in f]
        body += [[names[row], *(entry([g[key] for g in gains], of) for key in GAIN)]] if gains else []
    if body:
        title = "What labels of the initial model reward, in-distribution"
        parts += [title, report.grid(["", *GAIN.values()], body, markdown)]
    return "\n\n".join(parts)


def draw(made: list[dict], to: Path) -> None:
    """A picture of Phi by cell."""
    points = {}
    for table in made:
        rows = {label(row, of): of["cells"] for row, of in table["rows"].items()}
        points[table["title"]] = {
            head: {row: over_seeds([f["phi"] for f in cells[head]]) for row, cells in rows.items()}
            for head in table["columns"]
        }
    plot.cells(points, to)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="lab.paper", description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", metavar="RUN", help="the base and runs of train.py, with measured cells")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--figure", metavar="FILE.png", help="draw Phi by cell")
    args = parser.parse_args(argv)
    try:
        files.check_writable(args.json, args.figure)
        made = tables(args.folders)
        print("\n\n\n".join(text(table, args.markdown) for table in made))
        if args.json:
            files.write_json(args.json, {"tables": made})
        if args.figure:
            draw(made, Path(args.figure))
    except (ValueError, ImportError, OSError) as error:
        print(f"lab.paper: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
