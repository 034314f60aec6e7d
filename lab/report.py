"""Two measurements and their paired differences; or every figure of a run.

python -m lab.report BEFORE.rows.jsonl AFTER.rows.jsonl [--fit FILE] [--json FILE] [--markdown]
python -m lab.report RUN
"""

import os

from lab import paper
from report import compare, summary, table
from run import files
from run.progress import Parser


def main(argv=None):
    """Command line; input that cannot be used ends it with one line on stderr and status 2."""
    parser = Parser(description="Two measurements and their paired differences, or the paper's table of runs.")
    parser.add_argument("paths", nargs="+", metavar="BEFORE.jsonl AFTER.jsonl, or RUN", help="rows, or folders: "
                        "base, and runs of train.py, with cells/TASK-INTERVENTION (paper.py)")  # fmt: skip
    parser.add_argument("--fit", metavar="FILE", help="rows to fit the shortcut on; cells have their own")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--figure", metavar="FILE.png", help="with runs: draw Phi by cell")
    args = parser.parse_args(argv)
    runs = any(os.path.isdir(path) for path in args.paths)
    if runs and args.fit:
        parser.error("--fit is for two files of rows; the cells of runs have their own, CELL.fit.jsonl")
    if args.figure and not runs:
        parser.error("--figure draws folders of runs, not files of rows")
    try:
        if runs:
            return paper.show(args.paths, args.markdown, args.json, args.figure)
        if len(args.paths) != 2:
            parser.error("give the rows before and the rows after, or folders of runs")
        paths = dict(zip(("before", "after"), args.paths, strict=True))
        fit = files.read_jsonl(args.fit) if args.fit else None
        rows = {name: files.read_jsonl(path) for name, path in paths.items()}
        out = {name: summary(rows[name], fit, source=path) for name, path in paths.items()}
        difference = {"difference": compare(**rows)}
        print(table(out, args.markdown), table(difference, args.markdown), sep="\n\n")
        if args.json:
            files.write_json(args.json, out | difference)
    except (ValueError, ImportError, OSError) as error:
        parser.exit(2, f"report.py: {error}\n")


if __name__ == "__main__":
    main()
