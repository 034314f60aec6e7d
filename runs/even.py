"""From a data set of lab.build another one, in which the model's own answer is wrong as often as it is right.

Where a model is mostly right by itself, an answer that an edit changed is mostly wrong. So it can name the edit
wherever its answer is wrong, and need not know what it would have answered. Here that rule earns nothing: with
influence and without, half of the rows have a y that is not the right answer. Questions with a wrong y get up to six
edits each.

    python runs/even.py DATASET OUT
"""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import faith  # noqa: E402
import tasks  # noqa: E402
from lab import build  # noqa: E402
from run import files, identity, reading  # noqa: E402
from run.args import data_sets  # noqa: E402
from run.progress import Parser, Progress, command  # noqa: E402

EDITS, SEED = 6, 0


def wrong_ones(made: argparse.Namespace) -> list[dict]:
    """Rows of the training questions whose answer is not the right one, edited, labelled by the model of the data set.

    made: the manifest.
    """
    sizes = {"test": made.eval_questions, "fit": made.fit_questions, "train": -1}
    questions, parts = tasks.load_splits(data_sets(made.task, made.data), sizes, made.skip_bad_rows)
    subject = faith.open_subject(made.model, dtype=made.dtype)
    made_of = faith.made_of(subject, questions, made.intervention) | identity.of_model(made.model)
    identity.check_same(made.made_of, made_of, "the data set", "restore its model and data")
    if made.mean_logp:
        subject.offsets = {made.task: np.array(made.mean_logp)}
    picks = faith.decide(subject, parts["train"]).argmax(-1).tolist()
    some = [q for q, y in zip(parts["train"], picks, strict=True) if y != q.gold]
    print(f"{len(some)} of {len(picks)} training questions are answered wrong", flush=True)
    cases = list(build.candidates(some, made.intervention, made.seed, EDITS))
    rows = faith.decision_rows(subject, cases, Progress("labelled", lines=10, file=sys.stderr))
    return [build.record(*pair) for pair in zip(cases, rows, strict=True)]


@command("even.py")
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="even.py", description=__doc__.split("\n")[0])
    parser.add_argument("dataset", type=Path, help="a folder that lab.build wrote, of one task")
    parser.add_argument("out", type=Path, help="the folder to write to")
    args = parser.parse_args(argv)
    manifest = reading.read_json(args.dataset / "manifest.json")
    if "," in manifest.take("task", str) or files.holds_something(args.out):
        raise ValueError(f"{args.dataset} must be of one task, and {args.out} empty or new")
    known = list(reading.read_jsonl(args.dataset / "train.jsonl"))
    rows = [row for row in known if row["y"] == row["gold"]]
    made = argparse.Namespace(**{"mean_logp": None} | manifest)
    rows += [row for row in wrong_ones(made) if row["y"] != row["gold"]]
    cells = [[row for row in rows if (row["influence"], row["y"] == row["gold"]) == cell]
             for cell in ((1, True), (0, True), (1, False), (0, False))]  # fmt: skip
    size = min(*map(len, cells), len(known) // 4)
    if not size:
        counts = ", ".join(str(len(some)) for some in cells)
        raise ValueError(f"nothing to balance: {counts} rows (y right: moved, not moved; y wrong: moved, not moved)")
    rng = np.random.default_rng(SEED)
    drawn = [[some[n] for n in rng.permutation(len(some))[:size]] for some in cells]
    train = [row for four in zip(*drawn, strict=True) for row in four]
    args.out.mkdir(parents=True, exist_ok=True)
    files.write_jsonl(args.out / "train.jsonl", train)
    for name in ("test.jsonl", "fit.jsonl"):
        shutil.copy(args.dataset / name, args.out)
    found = build.rates([(None, row) for row in train])
    manifest |= {
        "splits": manifest["splits"] | {"train": found},
        "sha256": identity.file_digest(args.out / "train.jsonl"),
    }
    files.write_json(args.out / "manifest.json", manifest)
    print(f"{len(train)} rows of {found['questions']} questions, {size} of each kind, are in {args.out}")


if __name__ == "__main__":
    sys.exit(main())
