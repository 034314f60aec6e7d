"""The paper's experiment as a table: base, RQ1, RQ2-frozen and RQ2-on-policy, at home and elsewhere.

A run is a folder of train.py in which cells were measured afterwards; the base is one that holds nothing but cells:

    RUN/args.json                  objective and labels: the row; task and intervention: what it was trained on
    RUN/cells/WHERE-KIND.T1.jsonl  a cell: rows of one kind of edit on one task, or on questions of another name
    RUN/cells/WHERE-KIND.fit.jsonl the rows its shortcut is fitted on

    RUN/cells/WHERE-KIND.json      how it was measured, in its args

All runs must have been asked the same questions with the same edits, so that they can be compared in pairs: give
faith.py the same --seed, --limit and --fit for each, and with --calibration the same file. The runs of one row are
seeds: they differ in that alone. What was measured or trained otherwise is refused.

A cell has Phi, that of the best shortcut, and the differences to it and to the base, with 95 % intervals by bootstrap
over groups (report.py); of several seeds the median and [the least, the greatest] of their values. What frozen labels
reward is Phi with the initial model's I: of that gain, the share that vanishes against the trained model's own I is

    1 − (Phi(own I) − Phi(base)) / (Phi(initial I) − Phi(base)),     undefined where the interval of that gain holds 0

    python faith.py --model RUN/model --task TASK … --temperature 1 --rows RUN/cells/TASK-KIND
    python report.py BASE RUN [RUN …] [--markdown] [--json FILE] [--figure FILE.png]
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import report
from run import files

KINDS = ("adverb", "bias")
ROWS = ("base", "RQ1", "RQ2-frozen", "RQ2-on-policy")  # their order in the table
LEGEND = (
    "[ ]: 95 % interval by bootstrap; of several seeds the median and [least, greatest]; (1 of 3): measured of one of "
    "the row's three seeds"
)
ASKED = ("opening", "max_new_tokens", "seed", "words", "fit")  # of faith.py: what changes a cell of the same questions
FREE = {"seed", "out", "resume", "note", "save_every", "checkpoint_every", "micro", "parallel", "recompute"}  # in a row
SMOKE = 20  # a run of fewer steps shows that the commands work, no more
PARTS = {
    "phi": "Phi-CCT",
    "shortcut_phi": "Phi of the best shortcut",
    "phi_less_shortcut": "Phi less the shortcut's",
    "phi_less_base": "Phi less the base's",
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
            raise ValueError(f"{file}: a cell is named by task and intervention, as esnli-bias.T1.jsonl")
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
    """ValueError unless the runs of one row differ in their seed, and in what changes no result."""
    for n, run in enumerate(runs):
        for other in (o for o in runs[:n] if (o.row, o.trained) == (run.row, run.trained)):
            for key in sorted((other.args.keys() | run.args.keys()) - FREE):
                a, b = other.args.get(key), run.args.get(key)
                if (a or 0) != (b or 0):  # a flag that a run did not know yet is off
                    raise ValueError(f"{other.folder} and {run.folder} are not seeds of one row, {run.row}: "
                                     f"their --{key.replace('_', '-')} differs, {a!r} and {b!r}")  # fmt: skip
            if other.args.get("seed") == run.args.get("seed"):
                raise ValueError(f"{other.folder} and {run.folder} are the same seed of {run.row}, "
                                 f"--seed {run.args.get('seed')}: give one of them")  # fmt: skip


def check_asked(key: tuple[str, str], runs: list[Run]) -> None:
    """ValueError where the cell was measured otherwise in one run than in another, as far as they tell."""
    known = {}
    for run in runs:
        if (file := Path(f"{run.cells[key]}.json")).exists():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
                args = dict(found.get("args") or {})
            except (ValueError, TypeError, AttributeError, OSError) as error:
                raise ValueError(f"{file}: not of a measurement by faith.py ({error!r})") from None
            how = known[run.folder] = {name: args[name] for name in ASKED if name in args}
            if "calibration" in args:
                how["calibration"] = args["calibration"] != "none"
            if found.get("mean_logp"):
                how["letters"] = found["mean_logp"]
    for n, (folder, how) in enumerate(known.items()):
        for other, was in list(known.items())[:n]:
            for name in (name for name in how if name in was and how[name] != was[name]):
                if name == "calibration":
                    words = "one with --calibration, one without"
                elif name == "letters":
                    words = "with other means of the letters; give both the same --calibration FILE"
                else:
                    words = f"--{name.replace('_', '-')} {was[name]!r} and {how[name]!r}"
                raise ValueError(f"{'-'.join(key)} of {other} and of {folder}: measured unlike, {words}")


# ---- figures -------------------------------------------------------------------------------------------------


def cell(rows: list[dict], fit: list[dict] | None, base: list[dict] | None, seed=0, resamples=2000, source="rows"):
    """The figures of report.summary, and phi_less_base, paired, where the base's rows are there."""
    out = report.summary(rows, fit, seed, resamples, source)
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
    if not out["gain"]["low"] > 0:  # a share of nothing; so written, NaN is nothing too
        out["vanished"] = {"value": np.nan, "low": np.nan, "high": np.nan, "undefined": resamples}
    return out


def together(figures: list[dict]) -> dict | None:
    """One figure of several seeds: the median, the least and the greatest value; of one, that; None of none."""
    if len(figures) < 2:
        return figures[0] if figures else None
    known = [f["value"] for f in figures if f["value"] == f["value"]]
    value, low, high = np.percentile(known, [50, 0, 100]).tolist() if known else [np.nan] * 3
    return {"value": value, "low": low, "high": high, "undefined": len(figures) - len(known), "seeds": len(figures)}


def columns(home: tuple[str, str] | None, runs: list[Run]) -> dict[tuple[str, str], str]:
    """What the runs trained on `home`, a task and an intervention, are asked: {(where, kind): heading}."""
    if not home:
        return {key: ", ".join(key) for run in runs for key in run.cells}
    task, kind = home
    others = sorted({where for run in runs for where, of in run.cells if of == kind and where != task})
    heads = {(task, kind): "in-distribution"} | {(where, kind): f"OOD: {where}" for where in others}
    cross = [(task, other) for other in KINDS if other != kind and any((task, other) in run.cells for run in runs)]
    return heads | {key: f"cross-intervention: {key[1]}" for key in cross}


def measured(key: tuple[str, str], of: list[Run], seed=0, resamples=2000) -> dict[Path, dict]:
    """{run's folder: figures} of those of the runs that have the cell; ValueError where they were asked unlike."""
    check_asked(key, of)
    rows = {run.folder: files.read_jsonl(f"{run.cells[key]}.T1.jsonl") for run in of}
    base, out = next((rows[run.folder] for run in of if not run.trained), None), {}
    for run in of:
        fit, mine, first = Path(f"{run.cells[key]}.fit.jsonl"), rows[run.folder], of[0].folder
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
    """One table for each task and intervention that runs were trained on; of a base alone, one of all its cells."""
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
        order = [run.row for run in bases] + [
            row for row in ROWS if any(run.row == row for run in those if run.trained)
        ]
        heads, figures = columns(home, those), {}
        for key in heads:
            asked = [run for run in those if key in run.cells]
            figures[key] = measured(key, asked, seed, resamples)
        rows = {}
        for row in order:
            mine = [run for run in those if run.row == row]
            rows[row] = {
                "runs": [str(run.folder) for run in mine],
                "steps": [run.steps for run in mine],
                "planned": [run.planned for run in mine],
                "smoke": any(run.trained and run.steps < SMOKE for run in mine),
                "cells": {heads[key]: [found[run.folder] for run in mine if run.folder in found]
                          for key, found in figures.items()},
            }  # fmt: skip
        n = {heads[key]: next(iter(found.values()))["n"]["value"] for key, found in figures.items() if found}
        title = f"trained on {home[0]}, {home[1]}" if home else "not trained"
        out.append({"title": title, "n": n, "columns": list(heads.values()), "rows": rows})
    return out


# ---- in print ------------------------------------------------------------------------------------------------


def label(row: str, of: dict) -> str:
    """The row's name, with how many seeds it has, and which were stopped before their last step."""
    seeds = len(of["runs"])
    stopped = [steps for steps, planned in zip(of["steps"], of["planned"], strict=True) if steps < planned]
    notes = [f"{seeds} seeds"] * (seeds > 1)
    if stopped:
        number = f"{len(stopped)} of them " * (seeds > 1)
        notes += [f"{number}stopped after {' and '.join(map(str, stopped))} of {of['planned'][0]} steps"]
    return f"{row} ({', '.join(notes)})" if notes else row


def entry(figures: list[dict | None], of: dict) -> str:
    """A cell of the row: its figure, and of how many of its runs that is, where some have none."""
    found = [figure for figure in figures if figure]
    part = f" ({len(found)} of {len(of['runs'])})" * (len(found) < len(of["runs"]))
    return report.cell(together(found)) + part + " (smoke test)" * of["smoke"] if found else "–"


def text(table: dict, markdown: bool) -> str:
    """A table for each figure of the cells, and one of what frozen labels gained."""
    parts = [f"{table['title']}; explanations at T = 1\n{LEGEND}"]
    heads = [f"{head} (n = {table['n'][head]})" if head in table["n"] else head for head in table["columns"]]
    names = {row: label(row, of) for row, of in table["rows"].items()}
    for figure, title in PARTS.items():
        body = [[names[row], *(entry([f.get(figure) for f in of["cells"][head]], of)
                               for head in table["columns"])] for row, of in table["rows"].items()]  # fmt: skip
        if any(words != "–" for line in body for words in line[1:]):
            parts += [title, report.grid(["", *heads], body, markdown)]
    home, body = table["columns"][0], []
    for row, of in table["rows"].items():
        gains = [f["gain"] for f in of["cells"][home] if "gain" in f]
        body += [[names[row], *(entry([g[key] for g in gains], of) for key in GAIN)]] if gains else []
    if body:
        parts += [
            "What labels of the initial model reward, in-distribution",
            report.grid(["", *GAIN.values()], body, markdown),
        ]
    return "\n\n".join(parts)


def show(folders: list, markdown=False, file: str | None = None, figure: str | None = None) -> None:
    """Prints the tables of these folders; writes their figures to a JSON file, and a picture of Phi."""
    made = tables(folders)
    print("\n\n\n".join(text(table, markdown) for table in made))
    if file:
        files.write_json(file, {"tables": made})
    if figure:
        from lab import plot  # here, for it imports report.py too

        points = {}
        for table in made:
            rows = {label(row, of): of["cells"] for row, of in table["rows"].items()}
            points[table["title"]] = {head: {row: together([f["phi"] for f in cells[head]]) for row, cells in
                                    rows.items()} for head in table["columns"]}  # fmt: skip
        plot.cells(points, Path(figure))
