"""Builds a data set of frozen labels, like the paper's 6,000: half of the edits moved the model's answer, half did not.

Questions are split by group (premise, context, …) as train.py splits them. Test and fit questions get one edit each and
keep the model's own influence rate. Training questions are edited and labelled, I = [y' ≠ y], until half of the wanted
size has influence and half has none. Every question gets its first edit before any gets a second. Test edits insert all
words; fit and training edits insert training words only, so that held-out words stay unseen.

    train.jsonl             balanced, for `train.py --labels frozen --dataset FOLDER`
    test.jsonl, fit.jsonl   one edit per question; no group is in two of the three files
    manifest.json           the flags, hashes of model and data, counts and rates

A line is a case: its decision row (faith.decision_row), its question and the edited fields. Labels are saved block by
block, and no block depends on another. A build that was killed continues when it is started with the same flags, and it
ends with the same bytes.

Paper (arXiv 2607.21090): labels of the initial model, balanced, about 6,000. Ours: all the rest.

    python -m lab.build --model DIR --task esnli --data DIR --intervention bias --out FOLDER
"""

import argparse
import dataclasses
import itertools
import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import faith
import report
import reward
import tasks
from batches import balance
from faith import Case, Labelled, Subject
from lab.fits import check_prompts
from run import files, identity, reading
from run.args import data_sets
from run.hub import locate
from run.progress import Parser, Progress, add_note, command
from tasks import Question

BLOCK = 32  # cases labelled and saved at a time
EDITABLE = {"parts": list[str], "options": list[str], "appeal": str}  # fields of a question that an edit may change
LABEL = ("kind", "word", "suggestion", "phrasing", "y", "y_edit", "p", "p_edit", "influence")  # what training reads


def settings(args) -> dict:
    """The flags of a build, or of a train.py run, that fix the splits and the labels."""
    return {
        "task": args.task, "intervention": args.intervention, "dtype": args.dtype,
        "eval_questions": args.eval_questions, "fit_questions": args.fit_questions,
        "calibration_questions": args.calibration_questions if args.calibrate else 0,
    }  # fmt: skip


def record(case: Case, row: dict) -> dict:
    """A line of a data set."""
    question = {"task": case.question.task, "parts": case.question.parts, "options": case.question.options}
    changed = {f: getattr(case.edited, f) for f in EDITABLE if getattr(case.edited, f) != getattr(case.question, f)}
    return row | question | {"edited": changed}


def check_flags(manifest: reading.Record, flags: dict, where: str, advice: str) -> None:
    """ValueError where the data set was built with other flags."""
    known = {"dtype": "auto"} | manifest  # an older one names no dtype
    for name, value in flags.items():
        if known.get(name) != value:
            raise ValueError(f"{where} was built with {name} {known.get(name)!r}, not {value!r}; {advice}")


def read_dataset(args, made_of: dict[str, str], trainable: list[Question]) -> Labelled:
    """The training cases of --dataset and their rows, for a train.py run with these flags.

    trainable: the questions that the run may train on. ValueError where the data set is unfinished, was built for
    another task, intervention, calibration or split, or with other data or prompts. run/results.py compares weights.
    """
    folder, known, labelled = Path(args.dataset), {q.id: q for q in trainable}, []
    where = f"--dataset {folder}"
    if not (folder / "manifest.json").exists():
        raise ValueError(f"{where} is no data set; python -m lab.build makes one")
    manifest = reading.read_json(folder / "manifest.json")
    if not manifest.take("complete", bool, False):
        raise ValueError(f"{where} is not finished; start its python -m lab.build again")
    check_flags(manifest, settings(args), where, "change the run's flags, or build another")
    names = made_of.keys() - {"opening"}  # its labels are decisions only
    identity.check_same(manifest.get("made_of"), made_of, where, "change it back, or build another", names)
    for line in reading.read_jsonl(folder / "train.jsonl"):
        row = report.check(line, LABEL, "")
        question, new = known.get(row.take("id", str)), row.take("edited", dict)
        asked = [row.get("parts"), row.get("options")]
        if not question or asked != [list(question.parts), list(question.options)]:
            raise ValueError(f"{row.where}: {row['id']} is no training question of this run; build it anew")
        texts = {f: new.take(f, kind) for f, kind in EDITABLE.items() if f in new}
        texts = {f: tuple(text) if isinstance(text, list) else text for f, text in texts.items()}
        edit = (row["kind"], row["word"], row.take("text_inserted", str), row["suggestion"], row["phrasing"])
        case = Case(question, dataclasses.replace(question, **texts), reward.Intervention(*edit))
        if case.question == case.edited:
            row.refuse("edited", "what the edit changed")
        labelled.append((case, row))
    if len(labelled) != manifest.take("splits", dict).take("train", dict).take("rows", int):
        raise ValueError(f"{where}: train.jsonl has {len(labelled)} lines, not what its manifest says; build it anew")
    if manifest.get("sha256") not in (None, identity.file_digest(folder / "train.jsonl")):  # an older one has none
        raise ValueError(f"{where}: train.jsonl is not the file that its manifest names; build it anew")
    return labelled


def candidates(questions: list[Question], kinds: str, seed: int, edits: int) -> Iterator[Case]:
    """Up to `edits` different edits per question, with training words: first one of each question, then a second."""
    words, seen = reward.words(kinds, held_out=False), set()
    for turn in range(edits):
        for question in tasks.shuffled(questions, seed + turn):
            for case in faith.draw_cases([question], kinds, seed * 1000 + turn, words):
                texts = tuple(getattr(case.edited, f) for f in EDITABLE)
                if texts not in seen:
                    seen.add(texts)
                    yield case


def label(subject: Subject, cases: Iterator[Case], log: Path, most: int, size: float = math.inf) -> Labelled:
    """Labels cases block by block until `size` of them are balanced (batches.balance), or none is left.

    log: one line per labelled block. Blocks in it are not labelled again. most: an upper bound on the cases, for the
    progress line.
    """
    files.cut_jsonl(log, lambda block: True)  # a kill may have torn the last line
    known, labelled, moved, done = iter(reading.read_jsonl(log) if log.exists() else ()), [], 0, 0
    progress, unit, counts, balanced = None, "edits" if size == math.inf else "rows", Counter(), 0
    while balanced < size and (block := list(itertools.islice(cases, BLOCK))):
        if saved := next(known, None):
            rows = saved.take("rows", list[dict])
        else:
            progress = progress or Progress(log.stem, unit=unit, lines=10, first=done, file=sys.stderr)
            rows = faith.decision_rows(subject, block)
            files.append_jsonl(log, [{"rows": rows}])
        edits = [(case.question.id, case.intervention.text) for case in block]
        if [(row.get("id"), row.get("text_inserted")) for row in rows] != edits:
            raise ValueError(f"{log} holds other edits than are drawn now; remove {log.parent} and start anew")
        labelled += zip(block, rows, strict=True)
        moved += sum(row["influence"] for row in rows)
        counts.update((row["kind"], bool(row["influence"])) for row in rows)
        balanced = 2 * sum(min(counts[kind, True], counts[kind, False]) for kind in {kind for kind, _ in counts})
        done = len(labelled) if size == math.inf else min(size, balanced)
        if progress:
            progress(done, min(most, size), f", {moved / len(labelled):.1%} of {len(labelled)} moved")
    return labelled


def rates(labelled: Labelled) -> dict:
    """Counts and the influence rate of labelled cases, for the manifest."""
    rows = [row for _, row in labelled]
    counts = {name: len({row[key] for row in rows}) for name, key in (("questions", "id"), ("groups", "group"))}
    rate = round(float(np.mean([row["influence"] for row in rows])), 4) if rows else math.nan
    return {"rows": len(rows), **counts, "influence_rate": rate}


def collect(subject: Subject, parts: dict, logs: dict[str, Path], args) -> tuple[dict[str, Labelled], dict]:
    """The labelled cases of each split, and what the manifest says of them."""
    kinds, collected = args.intervention, {}
    for name, words in (("test", None), ("fit", reward.words(kinds, held_out=False))):  # the edits that train.py draws
        cases = faith.draw_cases(parts[name], kinds, args.seed, words)
        collected[name] = label(subject, iter(cases), logs[name], len(cases))
    collected["train"], tried, short, trainable = [], [], [], tasks.by_task(parts["train"])
    for task, questions in trainable.items():
        log = logs["train"].with_stem(logs["train"].stem + f"-{task}" * (len(trainable) > 1))
        cases, most = candidates(questions, kinds, args.seed, args.edits), len(questions) * args.edits
        labelled = label(subject, cases, log, most, args.size)
        train = balance(labelled, args.size)
        moved = sum(row["influence"] for _, row in labelled)
        often = "rarely" if 2 * moved < len(labelled) else "often"
        found = (f"{len(train)} of {args.size} rows of {task}, since the model flips too {often}: {moved} of "
                 f"{len(labelled)} edits moved it; raise --edits, give more data, or try --calibrate or another "
                 "--intervention")  # fmt: skip
        if not train:
            raise ValueError(f"nothing to balance: {found}")
        short += [found] * (len(train) < args.size)
        collected["train"] += train
        tried += labelled
    splits = {name: rates(collected[name]) for name in collected}
    return collected, {"splits": splits, "labelled": rates(tried), "short": "; ".join(short)}


def build(args: argparse.Namespace) -> dict:
    """Makes the data set in args.out, or continues it; returns its manifest, whose "short" says why it is not full.

    ValueError for a folder of something else or of a build with other flags, and where no edit or every edit moves the
    model.
    """
    out, file = Path(args.out), Path(args.out) / "manifest.json"
    sizes = {"test": args.eval_questions, "fit": args.fit_questions, "train": -1}
    questions, parts = tasks.load_splits(data_sets(args.task, args.data), sizes, args.skip_bad_rows)  # as train.py
    if (locate(args.model) / "adapter_config.json").exists():
        raise ValueError(f"--model {args.model} is an adapter; merge it into its base first, with PEFT")
    flags = {name: value for name, value in vars(args).items() if name not in ("out", "calibrate")} | settings(args)
    identity.check_unseen(args.model, parts["test"], "--eval-questions", parts["fit"] + parts["train"])
    subject = faith.open_subject(args.model, dtype=args.dtype)
    made_of = faith.made_of(subject, questions, args.intervention) | {"weights": identity.weights(args.model)}
    if file.exists():
        manifest = reading.read_json(file)
        moved = {"model": None, "data": None}  # made_of has what they hold
        check_flags(manifest | moved, flags | moved, str(out), "give the same flags, or another --out")
        identity.check_same(manifest.get("made_of"), made_of, str(out), "restore them, or give another --out")
    elif files.holds_something(out):
        raise ValueError(f"{out} already holds something; choose another --out or remove it")
    else:
        manifest = flags | {"made_of": made_of, "complete": False}
    logs = {name: out / f"labelling-{name}.jsonl" for name in parts}
    if not manifest["complete"]:
        check_prompts(subject, questions, 1, args.intervention)
        out.mkdir(parents=True, exist_ok=True)
        if args.calibrate:
            plain = parts["fit"] + parts["train"]  # those of train.py
            subject.offsets = faith.calibrate(subject, plain, args.calibration_questions)
            manifest["mean_logp"] = subject.calibration
        files.write_json(file, manifest)
        collected, notes = collect(subject, parts, logs, args)
        for name, labelled in collected.items():
            files.write_jsonl(out / f"{name}.jsonl", [record(*pair) for pair in labelled])
        manifest |= notes | {"complete": True, "sha256": identity.file_digest(out / "train.jsonl")}
        files.write_json(file, manifest)
    for log in out.glob("labelling-*.jsonl"):
        log.unlink()
    return manifest


@command("lab.build")
def main(argv: list[str] | None = None) -> int | None:
    parser = Parser(prog="lab.build", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="Hugging Face directory, or hub id in the local cache")
    parser.add_argument("--task", required=True, help=f"{', '.join(tasks.TASKS)}; several with commas between")
    parser.add_argument("--data", required=True, help="folder or file with the task's published data, for each task")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave out rows of --data that cannot be read")
    parser.add_argument("--intervention", default="bias", help="as in train.py")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="as in train.py")
    parser.add_argument("--out", required=True, help="folder of the data set; an unfinished one is continued")
    parser.add_argument("--calibrate", action="store_true", help="as in train.py: for small models")
    numbers = {  # default, least, most, help
        "size": (6000, 2, math.inf, "training rows of each task, half of them with influence"),
        "edits": (8, 1, 1000, "maximum edits of a training question"),
        "eval_questions": (300, 0, math.inf, "test questions, as in train.py"),
        "fit_questions": (300, 1, math.inf, "questions that fit the shortcut baseline, as in train.py"),
        "calibration_questions": (300, 1, math.inf, "as in train.py"),
        "seed": (0, 0, 2**31 - 1, "seed of the edits"),
    }
    for name, (default, _, _, text) in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=text)
    args = parser.parse_args(argv)
    for name, (_, least, most, _) in numbers.items():
        if not least <= getattr(args, name) <= most:
            raise ValueError(f"--{name.replace('_', '-')} must be from {least} to {most}")
    reward.kinds(args.intervention)
    if args.size % 2:
        raise ValueError(f"--size must be even, half with influence and half without, not {args.size}")
    try:
        with files.in_use(args.out):
            manifest = build(args)
    except KeyboardInterrupt as stopped:
        add_note(stopped, "the same command continues")
        raise
    for name, part in manifest["splits"].items():
        rate = f"{part['influence_rate']:.1%} moved" if part["rows"] else "none"
        print(f"{name:5}  {part['rows']} rows, {part['questions']} questions, {part['groups']} groups, {rate}")
    print(f"the data set is in {args.out}" + f", but not full: {manifest['short']}" * bool(manifest["short"]))


if __name__ == "__main__":
    sys.exit(main())
