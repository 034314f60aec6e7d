"""Prints every figure of a run, of a measurement, or of two with their paired differences.

The statistics are in report.py of the root. lab/paper.py makes the paper's table of several runs.

    python -m lab.report ROWS.jsonl [--fit FILE]
    python -m lab.report BEFORE.rows.jsonl AFTER.rows.jsonl [--fit FILE] [--json FILE] [--markdown]
    python -m lab.report RUN                                   a folder that train.py wrote
"""

import sys
from pathlib import Path

import faith
import reward
from lab import plot
from lab.compare import compare
from report import by_part, summary
from run import files, reading, results
from run.args import Args
from run.progress import Parser, command, quoted
from run.tables import overview, table


def of_rows(paths: list[str], fit: str | None) -> dict[str, dict]:
    """{"before", "after", "difference"} of two files of measured rows, or {"rows"} of one."""
    results.check_rows(*paths)
    for path in paths if fit else ():
        results.check_rows(fit, path)
    fit_rows, rows = reading.read_jsonl(fit) if fit else None, [reading.read_jsonl(path) for path in paths]
    groups = [{(row.get("task"), row["group"]) for row in some if "group" in row} for some in (*rows, fit_rows or ())]
    if both := sorted(str(group) for _, group in set.union(*groups[:-1]) & groups[-1]):
        raise ValueError(f"--fit {fit}: {len(both)} of its groups of questions, such as {both[0]!r}, are measured too; "
                         "give rows of other questions")  # fmt: skip
    initial = rows[0] if len(rows) > 1 else None
    out = [summary(some, fit_rows, source=path, initial=initial) for path, some in zip(paths, rows, strict=True)]
    names = ("before", "after") if len(rows) > 1 else ("rows",)
    return dict(zip(names, out, strict=True)) | ({"difference": compare(*rows)} if len(rows) > 1 else {})


def of_run(run: Path) -> dict[str, dict]:
    """{"T=0": {"before", "after", "difference"}, "T=1": …}, without the parts that the run did not write."""
    out: dict[str, dict] = {}
    for phase in ("before", "after"):
        if (file := run / f"{phase}.json").exists():
            for t, figures in reading.read_json(file).items():
                if not isinstance(figures, dict):
                    raise ValueError(f"{file} holds no figures for {t}; measure again")
                out.setdefault(t, {})[phase] = figures
    for t in out:
        if (file := run / f"difference.{t.replace('=', '')}.json").exists():
            out[t]["difference"] = reading.read_json(file)
    if not out:
        raise ValueError(f"{run} holds no before.json or after.json; give the folder of a finished run of train.py")
    return out


def finish(args: Args, test: list[faith.Case], before: dict, after: dict) -> None:
    """Compares before and after, prints the overview at T = 1 and two examples, fills in the card, draws the curves."""
    out, tables = Path(args.out), []
    phases = {"before": before, "after": after} if before else {"after": after}
    for t in after:
        known = {phase: reading.read_json(out / f"{phase}.json") for phase in phases}
        parts, columns = {phase: by_part(phases[phase][t]) for phase in phases}, {}
        for part in parts["after"]:
            each = {phase: known[phase][f"T={t:g}{part}"] for phase in phases}
            if before:
                each["difference (paired)"] = compare(parts["before"][part], parts["after"][part], args.seed)
                files.write_json(out / f"difference.T{t:g}{part}.json", each["difference (paired)"])
            if part:  # Phi of a task or an intervention below the figures of all
                each = {phase: {f"Phi-CCT, {part[1:]}": figures["phi"]} for phase, figures in each.items()}
            columns = {phase: columns.get(phase, {}) | each[phase] for phase in each}
        tables.append((f"{len(after[t])} test questions, T = {t:g}", columns))
    if after:
        title, columns = tables[-1]
        print(f"\n{title}\n{overview(columns)}\n{examples(test, before.get(t, []), after[t])}", flush=True)
    card = "".join(f"\n{title}\n\n{overview(columns, markdown=True)}\n" for title, columns in tables)
    files.write_text(out / "model" / "README.md", results.model_card(args, card))
    print(f"\nthe trained model is in {out}/model; every figure: python -m lab.report {quoted(out)}", flush=True)
    plot.after_run(out)


def examples(test: list[faith.Case], before: list[dict], after: list[dict]) -> str:
    """A test question whose edit changed the answer and one whose edit did not, explained before and after."""
    cases, old, lines = {case.question.id: case for case in test}, {row["id"]: row for row in before}, []
    for row in [next((row for row in after if row["influence"] == i), None) for i in (1, 0)]:
        if row is None:
            continue
        picks = " → ".join(faith.LETTERS[row[key]] for key in ("y", "y_edit"))
        lines.append("\n" + " ".join(faith.ask(cases[row["id"]].edited).split("\n")[:-1]))
        lines.append(f"    {row['text_inserted']!r}: {picks}, I = {row['influence']}")
        for phase, told in (("before", old.get(row["id"])), ("after", row)):
            if told:
                r = reward.reward(told["mention"], told["influence"])
                lines.append(f"    {phase:6}  r = {r:g}  {told['text']!r}")
    return "\n".join(lines)


@command("lab.report")
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="lab.report", description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="+", metavar="ROWS.jsonl [AFTER.jsonl], or RUN", help="rows, or a run's folder")
    parser.add_argument("--fit", metavar="FILE", help="with rows: rows that fit the shortcut baseline")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    args = parser.parse_args(argv)
    files.check_writable(args.json)
    folders = [path for path in args.paths if Path(path).is_dir()]
    if len(args.paths) == 1 and folders and not args.fit:
        figures = tables = of_run(Path(args.paths[0]))
    elif len(args.paths) < 3 and len(folders) < 2 and not (folders and args.fit):
        figures = of_rows(args.paths, args.fit)
        tables = {"": figures}
    else:
        raise ValueError("give one file of rows, the rows before and after, or one run; --fit goes with rows; "
                         "python -m lab.paper BASE RUN … compares runs")  # fmt: skip
    texts = [f"{name}\n" * bool(name) + table(columns, args.markdown) for name, columns in tables.items()]
    print("\n\n".join(texts))
    if args.json:
        files.write_json(args.json, figures)


if __name__ == "__main__":
    sys.exit(main())
