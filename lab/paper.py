"""The paper's experiment as a table: base, RQ1, RQ2-frozen and RQ2-on-policy, in-distribution and elsewhere.

A run is a folder of train.py whose cells were measured after training. The base is a folder with cells only:

    RUN/args.json                  objective and labels name the row; task and intervention are what it was trained on
    RUN/cells/WHERE-KIND.T1.jsonl  a cell: rows of one kind of edit on one task, or on another file of questions
    RUN/cells/WHERE-KIND.fit.jsonl rows that fit its shortcut baseline
    RUN/cells/WHERE-KIND.json      how it was measured, in its args

Runs are compared in pairs, so all must be asked the same questions with the same edits: give faith.py the same --seed,
--limit, --fit and --calibration file for each. The runs of one row may differ only in their seed; others are refused.

A cell has Phi, the shortcut's Phi, and Phi minus the shortcut's and minus the base's, with 95 % intervals by bootstrap
over groups (report.py). With several seeds it has the median and [least, greatest]. Frozen labels reward Phi with the
initial model's I. With the trained model's own I, part of that gain vanishes. The vanished share is

    1 − (Phi(own I) − Phi(base)) / (Phi(initial I) − Phi(base)),     undefined if the interval of the gain holds 0

    python faith.py --model RUN/model --task TASK … --temperature 1 --rows RUN/cells/TASK-KIND
    python -m lab.paper BASE RUN [RUN …] [--markdown] [--json FILE] [--figure FILE.png]
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import report
from lab import plot
from lab.compare import compare, pairs
from reward import KINDS
from run import files, identity, reading
from run.args import Args
from run.progress import Parser, command
from run.results import check_rows, hashes
from run.tables import cell, grid

ROWS = (  # in the table's order
    "base", "form", "RQ1-shuffled", "RQ1", "imitation", "RQ2-shuffled", "RQ2-frozen", "RQ2-on-policy",
)  # fmt: skip
LEGEND = ("[ ]: 95 % interval by bootstrap; with several seeds the median and [least, greatest]; "
          "(1 of 3): measured for one of the row's three seeds")  # fmt: skip
FREE = {
    *"seed out resume note save_every checkpoint_every micro parallel recompute log rows kernels eval_before".split()
}
SMOKE = 20  # a run of fewer steps shows only that the commands work
PARTS = {"phi": "Phi-CCT", "shortcut_phi": "Phi of the shortcut baseline",
         "phi_less_shortcut": "Phi minus the shortcut's", "phi_less_base": "Phi minus the base's",
         "detection": "correlation of I and what the model says of it when asked outright",
         "detection_less_shortcut": "the same, minus the correlation of I and the shortcut's log odds",
         "accuracy": "accuracy on X"}  # fmt: skip
GAIN = {"phi_base": "Phi of the base", "phi_initial": "Phi with the initial I", "phi_own": "Phi with its own I",
        "vanished": "share of the gain that vanishes"}  # fmt: skip
Key = tuple[str, str]  # (task or WHERE, intervention or KIND); of what a run was trained on, names with commas between


@dataclass
class Run:
    """A folder with measured cells. The base has no args, is trained on None and logged 0 steps."""

    folder: Path
    row: str
    cells: dict[Key, Path]  # without .T1.jsonl
    args: dict
    trained: Key | None = None
    steps: int = 0


def home_of(trained: Key | None) -> list[Key]:
    """The cells that a run was trained on."""
    return [(task, kind) for task in trained[0].split(",") for kind in trained[1].split(",")] if trained else []


def read(folder: str | Path) -> Run:
    """Reads a folder. ValueError if it has no measured cells or is no run."""
    folder, cells = Path(folder), {}
    for file in sorted((folder / "cells").glob("*.T1.jsonl")):
        where, _, kind = file.name.removesuffix(".T1.jsonl").rpartition("-")
        if not where or kind not in KINDS:
            raise ValueError(f"{file}: name a cell by task and intervention, such as esnli-bias.T1.jsonl")
        cells[where, kind] = file.with_name(f"{where}-{kind}")
    if not cells:
        raise ValueError(f"{folder}: no measured cells; see faith.py --rows {folder}/cells/TASK-INTERVENTION")
    saved = next((file for name in ("args.json", "training.json") if (file := folder / name).exists()), None)
    if not saved:
        return Run(folder, folder.resolve().name, cells, {})
    args = reading.read_json(saved)
    objective, labels = args.take("objective", str), args.take("labels", str)
    # Of shuffled labels an imitation learns the form of an explanation alone.
    shuffled = labels == "shuffled"
    supervised = {"detection": "RQ1-shuffled" if shuffled else "RQ1", "imitation": "form" if shuffled else "imitation"}
    row = supervised.get(objective) or f"RQ2-{labels}"
    if row not in ROWS:
        args.refuse("labels", "on-policy, frozen or shuffled")
    task, kind, _ = (args.take(key, str) for key in ("task", "intervention", "model"))
    steps, log = args.take("steps", int), folder / "metrics.jsonl"
    return Run(folder, row, cells, args, (task, kind), len(reading.read_jsonl(log)) if log.exists() else steps)


def check_alike(runs: list[Run]) -> None:
    """ValueError unless the runs of one row differ only in their seed, and in flags that change no result."""
    for a, b in itertools.combinations(runs, 2):
        if (a.row, a.trained) == (b.row, b.trained):
            both, free = f"{a.folder} and {b.folder} are", FREE
            was, now = (hashes(run.folder / "identity.json") for run in (a, b))
            if was and now:  # the same model and data may have been elsewhere
                free = FREE | {"model", "data", "dataset"}
                names = "weights", "questions", "dataset"
                was, now = ({"dataset": "none"} | known for known in (was, now))
                identity.check_same(was, now, f"{a.folder}/identity.json", f"{both} not seeds of one row", names)
            for key in sorted((a.args.keys() | b.args.keys()) - free):
                x, y = (run.args.get(key, getattr(Args, key, None)) for run in (a, b))  # one may be older than a flag
                if x != y:
                    flag = "history of flags" if key == "history" else f"--{key.replace('_', '-')}"
                    raise ValueError(f"{both} not seeds of one row, {b.row}: their {flag} differs, {x!r} and {y!r}")
            if a.args.get("seed") == (seed := b.args.get("seed")):
                raise ValueError(f"{both} the same seed of {b.row}, --seed {seed}: give one of them")


def check_asked(key: Key, runs: list[Run]) -> None:
    """ValueError where a cell was measured with different flags that rows and hashes do not show."""
    first, was = None, {}
    for file in (file for run in runs if (file := Path(f"{run.cells[key]}.json")).exists()):
        found = reading.read_json(file)
        args = found.take("args", dict, {})
        how = {"--max-new-tokens": args.get("max_new_tokens"), "--fit": args.get("fit")}
        how["the offsets of --calibration"] = found.get("mean_logp")
        for name in was:
            if how[name] != was[name]:
                raise ValueError(f"{file} and {first} were measured differently: {name} {how[name]} and {was[name]}")
        first, was = file, how


def check_made_of(key: Key, runs: list[Run]) -> None:
    """ValueError where a cell was measured with other questions, prompts, words or opening, or with another model."""
    check_rows(*[f"{run.cells[key]}.T1.jsonl" for run in runs])
    base = next((hashes(f"{run.cells[key]}.identity.json") for run in runs if not run.trained), {})
    for run in (run for run in runs if run.trained):
        where, begun = f"{run.folder}/identity.json", hashes(run.folder / "identity.json")
        if begun and base:
            begun |= {"weights": identity.base_weights(begun)}
            identity.check_same(begun, base, where, "give the base that the run began with", ["weights", "tokenizer"])
        made_of = hashes(f"{run.cells[key]}.identity.json")
        if made_of and (run.folder / "model").exists():
            now = {"weights": identity.weights(run.folder / "model")}
            identity.check_same(made_of, now, str(run.cells[key]), f"measure {run.folder}/model again")


def gain(base: list[dict], rows: list[dict], resamples=2000) -> dict[str, dict]:
    """Phi before, after with the initial model's I and with its own, and the share of the gain that vanishes."""
    a, b = pairs(base, rows)

    def figures(w):
        was, initial, own = (report.phi(i["influence"], m["mention"], w) for i, m in ((a, a), (a, b), (b, b)))
        share = 1 - (own - was) / np.where(initial > was, initial - was, np.nan)
        return {"phi_base": was, "phi_initial": initial, "phi_own": own, "gain": initial - was, "vanished": share}

    out = report.intervals(figures, a["group"], 0, resamples)
    if not out["gain"]["low"] > 0:  # NaN too: there is no gain to share
        out["vanished"] = {"value": np.nan, "low": np.nan, "high": np.nan, "undefined": resamples}
    return out


def over_seeds(figures: list[dict]) -> dict | None:
    """Median, least and greatest value over seeds; with one seed its own figure; None for none."""
    if len(figures) < 2:
        return figures[0] if figures else None
    known = [f["value"] for f in figures if f["value"] == f["value"]]
    value, low, high = np.percentile(known, [50, 0, 100]).tolist() if known else [np.nan] * 3
    return {"value": value, "low": low, "high": high, "undefined": len(figures) - len(known), "seeds": len(figures)}


def columns(trained: Key | None, runs: list[Run]) -> dict[Key, str]:
    """The cells of runs trained on `trained` and their headings; without it all cells."""
    there = {key: ", ".join(key) for run in runs for key in run.cells}
    if not trained:
        return there
    home, (tasks, kinds) = home_of(trained), (names.split(",") for names in trained)
    which = {key: ", ".join([key[0]] * (len(tasks) > 1) + [key[1]] * (len(kinds) > 1)) for key in home}
    near = {key: "in-distribution" + f": {name}" * bool(name) for key, name in which.items()}
    far = {key: f"OOD: {key[0]}" + f", {key[1]}" * (len(kinds) > 1)
           for key in sorted(there) if key[1] in kinds and key not in home}  # fmt: skip
    cross = {(task, kind): f"cross-intervention: {kind}" + f", {task}" * (len(tasks) > 1)
             for kind in KINDS if kind not in kinds for task in tasks}  # fmt: skip
    named = near | far | {key: head for key, head in cross.items() if key in there}
    rest = sorted({key for run in runs if run.trained for key in run.cells} - named.keys())
    return named | {key: f"elsewhere: {there[key]}" for key in rest}


def measured(key: Key, runs: list[Run], resamples=2000) -> dict[Path, dict]:
    """{folder: figures} of the runs that have the cell: report.summary, and two that need the rows of the base.

    These are phi_less_base, and gain of runs trained on the cell. ValueError where runs were asked differently.
    """
    runs = [run for run in runs if key in run.cells]
    check_asked(key, runs)
    check_made_of(key, runs)
    rows = {run.folder: reading.read_jsonl(f"{run.cells[key]}.T1.jsonl") for run in runs}
    base, out = next((rows[run.folder] for run in runs if not run.trained), None), {}
    for run in runs:
        fit, mine, first = Path(f"{run.cells[key]}.fit.jsonl"), rows[run.folder], runs[0].folder
        if (report.columns(mine, f"{run.cells[key]}.T1.jsonl")["kind"] != key[1]).any():
            raise ValueError(f"{run.cells[key]}.T1.jsonl: its rows are not of {key[1]}")
        where = f"{'-'.join(key)} of {first} and of {run.folder}"
        try:
            pairs(rows[first], mine)
            where = fit
            fitted = reading.read_jsonl(fit) if fit.exists() else None
            out[run.folder] = found = report.summary(mine, fitted, 0, resamples)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if base is not None and run.trained:
            found["phi_less_base"] = compare(base, mine, 0, resamples)["phi"]
            found |= {"gain": gain(base, mine, resamples)} if key in home_of(run.trained) else {}
    return out


def tables(folders: list, resamples=2000) -> list[dict]:
    """One table for each task and intervention that runs were trained on; of a base alone, one of all its cells."""
    unique: dict[Path, Path] = {}
    for folder in map(Path, folders):
        unique.setdefault(folder.resolve(), folder)
    runs = [read(folder) for folder in unique.values()]
    bases, trained = ([run for run in runs if bool(run.trained) == t] for t in (False, True))
    if len(bases) > 1:
        raise ValueError(f"{bases[0].folder} and {bases[1].folder} have no args.json: give one base")
    for a, b in itertools.combinations(trained, 2):
        was, now = (identity.base_weights(hashes(run.folder / "identity.json")) for run in (a, b))
        if was != now if was and now else a.args["model"] != b.args["model"]:
            models = f"{a.args['model']} of {a.folder} and {b.args['model']} of {b.folder}"
            raise ValueError(f"runs of several models, {models}: make a table of each")
    check_alike(trained)
    out = []
    for home in sorted({run.trained for run in trained}) or [None]:
        those = bases + sorted((run for run in trained if run.trained == home), key=lambda run: ROWS.index(run.row))
        heads = columns(home, those)
        figures = {heads[key]: measured(key, those, resamples) for key in heads}
        rows = {}
        for row, of in itertools.groupby(those, lambda run: run.row):
            mine = list(of)
            rows[row] = {
                "runs": [str(run.folder) for run in mine],
                "steps": [run.steps for run in mine], "planned": [run.args.get("steps", 0) for run in mine],
                "smoke": any(run.trained and run.steps < SMOKE for run in mine),
                "cells": {head: [found[run.folder] for run in mine if run.folder in found]
                          for head, found in figures.items()},
            }  # fmt: skip
        n = {head: next(iter(found.values()))["n"]["value"] for head, found in figures.items() if found}
        title = f"trained on {home[0]}, {home[1]}" if home else "not trained"
        out.append({"title": title, "n": n, "columns": list(heads.values()), "rows": rows})
    return out


def label(row: str, of: dict) -> str:
    """The row's name, how many seeds it has, and which of them stopped before their last step."""
    several = len(of["runs"]) > 1
    stopped = [str(steps) for steps, planned in zip(of["steps"], of["planned"], strict=True) if steps < planned]
    notes, number = [f"{len(of['runs'])} seeds"] * several, f"{len(stopped)} of them " * several
    notes += [f"{number}stopped after {' and '.join(stopped)} of {of['planned'][0]} steps"] * bool(stopped)
    return f"{row} ({', '.join(notes)})" if notes else row


def entry(figures: list[dict | None], of: dict) -> str:
    """The cell's text. If only some runs of the row have it, it says how many."""
    found = [figure for figure in figures if figure]
    part = f" ({len(found)} of {len(of['runs'])})" * (len(found) < len(of["runs"]))
    return cell(over_seeds(found)) + part + " (smoke test)" * of["smoke"] if found else "–"


def text(table: dict, markdown: bool) -> str:
    """A table for each figure of the cells, and one of what frozen labels gained."""
    parts = [f"{table['title']}; explanations at T = 1\n{LEGEND}"]
    heads = [f"{head} (n = {table['n'][head]})" if head in table["n"] else head for head in table["columns"]]
    names = {row: label(row, of) for row, of in table["rows"].items()}
    for figure, title in PARTS.items():
        body = [[names[row], *(entry([f.get(figure) for f in of["cells"][head]], of) for head in table["columns"])]
                for row, of in table["rows"].items()]  # fmt: skip
        if any(words != "–" for line in body for words in line[1:]):
            parts += [title, grid(["", *heads], body, markdown)]
    for home in table["columns"]:
        body = []
        for row, of in table["rows"].items():
            gains = [f["gain"] for f in of["cells"][home] if "gain" in f]
            body += [[names[row], *(entry([g[key] for g in gains], of) for key in GAIN)]] if gains else []
        if body:
            parts += [f"What labels of the initial model reward, {home}"]
            parts += [grid(["", *GAIN.values()], body, markdown)]
    return "\n\n".join(parts)


def draw(made: list[dict], to: Path) -> None:
    """A picture of Phi by cell."""
    plot.cells({table["title"]: {
        head: {label(row, of): over_seeds([f["phi"] for f in of["cells"][head]]) for row, of in table["rows"].items()}
        for head in table["columns"]} for table in made}, to)  # fmt: skip


@command("lab.paper")
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="lab.paper", description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", metavar="RUN", help="the base and runs of train.py, with measured cells")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="draw Phi by cell")
    args = parser.parse_args(argv)
    files.check_writable(args.json)
    plot.check_picture(args.figure)
    made = tables(args.folders)
    print("\n\n\n".join(text(table, args.markdown) for table in made))
    if args.json:
        files.write_json(args.json, {"tables": made})
    if args.figure:
        draw(made, args.figure)


if __name__ == "__main__":
    sys.exit(main())
