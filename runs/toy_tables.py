"""Tables of the toy for docs/ from what runs/toy.sh wrote:  python runs/toy_tables.py OUT_DIR

An interval is the range over the seeds, beside their median.
"""

import json
import sys
from pathlib import Path
from statistics import median

OUT = Path(sys.argv[1])


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


def runs(name: str) -> list[Path]:
    return sorted(p for p in (OUT / name).glob("*") if (p / "difference.T1.json").exists())


def main() -> None:
    print("**In short: median and range over seeds**")
    kinds = {"adverb": "adverbs", "bias": "bias phrases", "plain-adverb": "plain: adverbs", "plain-bias": "plain: bias"}
    columns = [[figures(run) for run in runs(kind)] for kind in kinds]
    rows = [
        [what, *(spread([f[part][key]["value"] for f in column]) for column in columns)]
        for what, part, key in (
            ("Phi before", "before", "phi"), ("**Phi after**", "after", "phi"),
            ("less the best shortcut's", "after", "phi_less_shortcut"),
            ("P(mention, I = 1)", "after", "mention_if_flip"),
            ("P(mention, I = 0)", "after", "mention_if_same"),
            ("mentions that agree with the planted cause, before", "before", "planted_agreement"),
            ("the same, after", "after", "planted_agreement"), ("influence rate", "after", "flip_rate"),
            ("accuracy on X, change", "difference", "accuracy"),
            ("other words named, change", "difference", "decoy_any"),
        )
    ]  # fmt: skip
    table(["", *kinds.values()], rows)

    print("\n**Labels: median and range over seeds**")
    rows = []
    for name, what in (("adverb", "on-policy, anchor"), ("frozen", "frozen, anchor"), ("free", "on-policy, no anchor"),
                       ("free-frozen", "frozen, no anchor")):  # fmt: skip
        f = [figures(run) for run in runs(name)]

        def of(part: str, key: str, f=f) -> str:
            return spread([x[part][key]["value"] for x in f])

        rows.append([what, of("difference", "changed_y"), of("difference", "changed_y_edit"),
                     of("difference", "changed_influence"), of("difference", "phi_old_labels"), of("after", "phi"),
                     of("after", "planted_phi"), of("after", "accuracy")])  # fmt: skip
    table(["labels", "y changed", "y' changed", "I changed", "Phi with the initial model's I", "Phi with its own I",
           "Phi with the planted cause", "accuracy on X"], rows)  # fmt: skip

    print("\n**Elsewhere: Phi, median and range over seeds**")
    rows = []
    for kind in ("adverb", "bias"):
        for where in ("here", "other-form", "held-out", "transfer"):
            base, after, less = [], [], []
            if where == "here":
                f = [figures(run) for run in runs(kind)]
                base = [x["before"]["phi"]["value"] for x in f]
                after = [x["after"] for x in f]
            else:
                for file in sorted((OUT / where / kind).glob("*.json")):
                    summary = json.loads(file.read_text())["summary"]["T=1"]
                    if file.stem == "base":
                        base = [summary["phi"]["value"]]
                    else:
                        after.append(summary)
            less = [x["phi_less_shortcut"]["value"] for x in after]
            rows.append([kind, where, spread(base), spread([x["phi"]["value"] for x in after]), spread(less),
                         f"{min((x['n']['value'] for x in after), default=0)}"])  # fmt: skip
    table(["trained on", "measured on", "base", "trained", "less the shortcut", "questions"], rows)


if __name__ == "__main__":
    main()
