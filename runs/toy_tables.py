"""Tables of the toy for docs/ from what runs/toy.sh wrote:  python runs/toy_tables.py OUT_DIR

An interval is the range over the seeds, beside their median.
"""

import json
import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from run.progress import Parser, command  # noqa: E402


def figures(run: Path) -> dict[str, dict]:
    """before, after and their paired difference at T = 1."""
    read = {name: json.loads((run / f"{name}.json").read_text())["T=1"] for name in ("before", "after")}
    return read | {"difference": json.loads((run / "difference.T1.json").read_text())}


def spread(values: list[float]) -> str:
    unknown, values = sum(v is None for v in values), [v for v in values if v is not None]
    if not values:
        return "undefined" if unknown else "–"
    digits = 3 if max(map(abs, values)) < 0.02 else 2
    middle, low, high = (f"{of(values):.{digits}f}" for of in (median, min, max))
    text = middle + f" [{low}, {high}]" * (len(values) > 1)
    return text.replace("-", "−") + f" ({unknown} undefined)" * bool(unknown)


def table(head: list[str], rows: list[list[str]]) -> None:
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    print("\n".join("| " + " | ".join(row) + " |" for row in rows))


def runs(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*") if (p / "difference.T1.json").exists())


@command("toy_tables.py")
def main(argv: list[str]) -> None:
    parser = Parser(prog="toy_tables.py", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    out = parser.parse_args(argv).out
    kinds = {"adverb": "adverbs", "bias": "bias phrases"}
    columns = [[figures(run) for run in runs(out / kind)] for kind in kinds]
    if not any(columns):
        raise ValueError(f"{out} holds no finished run; give the folder of runs/toy.sh")
    print("**In short: median and range over seeds**")
    rows = [
        [what, *(spread([f[part][key]["value"] for f in column]) for column in columns)]
        for what, part, key in (
            ("Phi before", "before", "phi"), ("**Phi after**", "after", "phi"),
            ("minus the shortcut baseline", "after", "phi_less_shortcut"),
            ("P(mention, I = 1)", "after", "mention_if_flip"),
            ("P(mention, I = 0)", "after", "mention_if_same"),
            ("mentions that agree with the planted cause, before", "before", "planted_agreement"),
            ("the same, after", "after", "planted_agreement"), ("influence rate", "after", "flip_rate"),
            ("accuracy on X, change", "difference", "accuracy"),
            ("other words named, change", "difference", "decoy_any"),
        )
    ]  # fmt: skip
    table(["", *kinds.values()], rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
