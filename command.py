"""The command line of faith.py: measures a model on a data set, or walks one question through it."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import report
import reward
import tasks
from faith import LETTERS, ask, calibrate, check_prompts, decision_rows, draw_cases, measure, open_subject
from lab import build, detect
from model import locate, read_json
from run import files
from run.progress import Parser, minutes_left
from tasks import Question


def check_arguments(args: argparse.Namespace) -> None:
    """ValueError for a value that would only fail later."""
    for name, least in (("max_new_tokens", 1), ("seed", 0), ("limit", 1), ("fit", 2)):
        if not least <= getattr(args, name, least) < 2**31:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least} (and below 2^31)")
    if len(set(args.temperature)) < len(args.temperature) or not all(0 <= t < 100 for t in args.temperature):
        raise ValueError(f"--temperature takes different numbers from 0 to 100, not {args.temperature}")
    for file in filter(None, (args.json, getattr(args, "rows", None))):
        if not Path(file).absolute().parent.is_dir():
            raise ValueError(f"{file} cannot be written: make the folder {Path(file).parent} first")


def check_unseen(args: argparse.Namespace) -> None:
    """ValueError where some of the test questions were trained on, as the model's training.json tells."""
    record = locate(args.model) / "training.json"
    trained = read_json(record) if record.exists() else {}
    same = trained.get("task") == args.task and trained.get("data") == str(Path(args.data).resolve())
    if same and args.limit > trained["eval_questions"]:
        raise ValueError(
            f"--limit {args.limit}: all but {trained['eval_questions']} questions of this data were trained on; "
            "lower --limit to that"
        )


def counter(what: str) -> Callable[[int, int], None]:
    """Says on one line of stderr how many questions are done of how many, when it is called with that."""
    started = time.time()

    def tell(done: int, total: int) -> None:
        left = minutes_left(started, done, total - done)
        end = "" if done < total else "\n"
        print(f"\r{what} {done}/{total} questions, {left:.1f} min left ", end=end, file=sys.stderr, flush=True)

    return tell


def run_measure(args: argparse.Namespace) -> None:
    check_unseen(args)
    questions = tasks.load(args.task, args.data)
    # The same test questions as a train.py run with --eval-questions LIMIT, which never trains on them.
    parts = tasks.split(questions, {"test": args.limit, "fit": args.fit}, seed=0)
    vocabulary = reward.words(args.intervention, {"all": None, "train": False, "held-out": True}[args.words])
    test = draw_cases(parts["test"], args.intervention, args.seed, vocabulary)
    fit = draw_cases(parts["fit"], args.intervention, args.seed, reward.words(args.intervention, False))
    subject = open_subject(args.model, args.calibration, args.opening, len(questions[0].options))
    check_prompts(subject, questions, args.max_new_tokens)
    if args.calibration == "fit":
        subject.offsets = calibrate(subject, parts["fit"])
    rows = measure(subject, test, args.temperature, args.max_new_tokens, args.seed, progress=counter("measured"))
    if args.detection:
        detect.annotate(subject, test, rows)
    fit_rows = decision_rows(subject, fit, counter("labelled for the shortcut"))
    if args.rows:
        for t in rows:
            files.write_jsonl(f"{args.rows}.T{t:g}.jsonl", rows[t])
        files.write_jsonl(f"{args.rows}.fit.jsonl", fit_rows)
        if args.calibration == "fit":
            known = {"mean_logp": subject.offsets.tolist(), "questions": len(parts["fit"])}
            files.write_json(f"{args.rows}.calibration.json", known)
    summaries = {f"T={t:g}": report.summary(rows[t], fit_rows, args.seed) for t in rows}
    print(f"{args.model}  {args.task}  {args.intervention}  seed {args.seed}\n\n{report.table(summaries)}")
    if args.json:
        letters = None if subject.offsets is None else subject.offsets.tolist()
        files.write_json(args.json, {"args": vars(args), "mean_logp": letters, "summary": summaries})


def run_ask(args: argparse.Namespace) -> None:
    question = Question("ask", args.question, (args.question,), tuple(args.options), 0, args.question)
    if not 2 <= len(question.options) <= len(LETTERS):
        raise ValueError(f"--options takes 2 to {len(LETTERS)} answers, not {len(question.options)}")
    cases = draw_cases([question], args.intervention, args.seed)
    if not cases:
        raise ValueError(
            "this question has no grammatical place for an adverb; use --intervention bias, or rephrase it"
        )
    if args.calibration == "fit":
        raise ValueError("--calibration fit needs a data set; give a calibration.json, or none")
    subject = open_subject(args.model, args.calibration, args.opening, len(question.options))
    row = measure(subject, cases, args.temperature[:1], args.max_new_tokens, args.seed)[args.temperature[0]][0]

    def odds(p):
        return ", ".join(f"{LETTERS[i]} {value:.2f}" for i, value in enumerate(p))

    print(f"X   {ask(question)}\n\ny   {LETTERS[row['y']]}   ({odds(row['p'])})\n")
    print(
        f"X'  {ask(cases[0].edited)}\n\ny'  {LETTERS[row['y_edit']]}   ({odds(row['p_edit'])})\n\nz'  {row['text']}\n"
    )
    I, M = row["influence"], row["mention"]  # noqa: E741
    print(f"I = {I}   the edit ({row['word']}) {'moved' if I else 'did not move'} the answer")
    print(f"M = {M}   the explanation {'names' if M else 'does not name'} it")
    print(f"r = {reward.reward(M, I):g}")
    if args.json:
        files.write_json(args.json, row)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["build"]:
        return build.main(argv[1:])
    asking = argv[:1] == ["ask"]
    parser = Parser(prog="faith.py ask" if asking else "faith.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="Hugging Face directory, or hub id in the local cache")
    parser.add_argument("--intervention", choices=reward.KINDS, default="bias")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0], help="of the explanations; 0 is greedy")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--calibration", default="none", help="none, fit (on this model) or a run's calibration.json")
    parser.add_argument("--opening", default="", help="every explanation is forced to begin so; see train.py --help")
    parser.add_argument("--seed", type=int, default=0, help="of the edits and of the sampling")
    parser.add_argument("--json", help="write the figures to this file")
    if asking:
        parser.add_argument("question")
        parser.add_argument("--options", nargs="+", required=True)
    else:
        parser.add_argument("--task", choices=tasks.TASKS, required=True)
        parser.add_argument("--data", required=True, help="folder or file with the task's published data")
        parser.add_argument("--limit", type=int, default=300, help="test questions measured")
        parser.add_argument("--fit", type=int, default=300, help="other questions the shortcut baseline is fitted on")
        parser.add_argument("--words", choices=("all", "train", "held-out"), default="all", help="words inserted")
        parser.add_argument("--detection", action="store_true", help="also ask outright what moved it (detect.py)")
        parser.add_argument("--rows", help="write the rows to PREFIX.T0.jsonl and so on, for report.py (RUN/cells/"
                            "TASK-INTERVENTION is a cell of its table), the shortcut's to PREFIX.fit.jsonl, and what "
                            "--calibration fit finds to PREFIX.calibration.json")  # fmt: skip
    args = parser.parse_args(argv[1:] if asking else argv)
    try:
        check_arguments(args)
        run_ask(args) if asking else run_measure(args)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0
