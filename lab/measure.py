"""The command line of faith.py, which measures a model on a data set or walks one question through."""

import argparse
import sys

import numpy as np

import faith
import report
import reward
import tasks
from lab import best, controls, ct, detect
from lab.compare import f_auroc
from lab.fits import check_prompts
from rollout import COLDEST
from run import files, identity, reading, results, tables
from run.args import said
from run.hub import locate
from run.progress import Parser, Progress, command, quoted
from tasks import Question


def open_subject(args: argparse.Namespace, options: int, task: str = "") -> faith.Subject:
    """The model to measure, with the offsets of --calibration FILE. Says where it was trained in another way."""
    longest = max(args.why, key=lambda why: len(faith.WHYS[why]))  # for check_prompts
    subject = faith.open_subject(args.model, args.opening, args.kernels, longest, args.dtype)
    folder = locate(args.model)
    record, saved = folder / "training.json", folder / "calibration.json"
    record = reading.read_json(record) if record.exists() else reading.Record({}, str(record))
    if (trained := record.get("opening", args.opening)) != args.opening:
        print(f"note: this model was trained with explanations that begin {trained!r}; see --opening")
    if (trained := record.get("why", "leading" if record else args.why[0])) not in args.why:
        print(f"note: this model was trained to explain when asked --why {trained}")
    if args.calibration not in ("none", "fit"):
        made_of = record.take("made_of", dict[str, str], {})
        begun = {made_of.get("weights"), made_of.get("base") if subject.only_explains else None}
        offsets = read_offsets(subject, args.calibration, options, task, args.model, begun)
        subject.offsets = {task or "ask": offsets}
    elif args.calibration == "none" and saved.exists():
        print(f"note: this model was trained with calibrated decisions; see --calibration {quoted(saved)}")
    return subject


def read_offsets(subject: faith.Subject, file: str, options: int, task: str, model="", begun=frozenset()) -> np.ndarray:
    """The offsets (options,) of a calibration.json; ValueError if it is of another task, other prompts, or weights
    other than the model's and `begun`, those that its training run began with.
    """
    try:
        saved = reading.read_json(file)
        if task and task not in saved.take("task", str, task).split(","):
            saved.refuse("task", f"{task!r}, as --task")
        if isinstance(saved.get("mean_logp"), dict):  # of several tasks
            saved = reading.Record({**saved, "mean_logp": saved["mean_logp"].get(task)}, saved.where)
        offsets = saved.take("mean_logp", list[float])
        if len(offsets) != options:
            saved.refuse("mean_logp", f"{options} numbers, one per option")
        if "made_of" in saved:
            now = faith.made_of(subject, [])
            identity.check_same(saved["made_of"], now, file, "calibrate anew", ("tokenizer", "prompts"))
            if model and (then := saved["made_of"].get("weights")) and then not in begun:
                advice = "give that of this model, or of the run that made it"
                identity.check_same(saved["made_of"], {"weights": identity.weights(model)}, file, advice)
    except ValueError as error:
        raise ValueError(f"--calibration takes none, fit or a calibration.json: {error}") from None
    return np.array(offsets)


def check_arguments(args: argparse.Namespace) -> None:
    """ValueError for a value that would fail only later."""
    for name, least in (("max_new_tokens", 1), ("seed", 0), ("edits", 0), ("best_of", 0), ("limit", 1), ("fit", 2)):
        if not least <= getattr(args, name, least) < 2**31:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least} (and below 2^31)")
    fit = all(t == 0 or COLDEST <= t <= 100 for t in args.temperature)
    if not fit or len({f"{t:g}" for t in args.temperature}) < len(args.temperature):  # they name the files of rows
        raise ValueError(f"--temperature takes different numbers, 0 or from {COLDEST} to 100, not {args.temperature}")
    names, held_out = reward.kinds(args.intervention), getattr(args, "words", "") == "held-out"
    if held_out and (none := [kind for kind in names if not reward.words(kind, held_out=True)]):
        raise ValueError(f"--words held-out: training has all words of {none[0]}; give --words all")
    if getattr(args, "controls", False) and args.intervention not in controls.ASIDE:
        some = ", ".join(controls.ASIDE)
        raise ValueError(f"--controls needs one --intervention of {some}, not {args.intervention}; leave it out")
    if len({*args.why}) < len(args.why):
        raise ValueError(f"--why takes different names, not {' '.join(args.why)}")
    files.check_writable(args.json, getattr(args, "rows", None))


def run_measure(args: argparse.Namespace) -> None:
    # These are the test questions of a train.py run with --eval-questions LIMIT, which never trains on them.
    counts = {"test": args.limit, "fit": args.fit}
    questions, parts = tasks.load_splits({args.task: args.data}, counts, args.skip_bad_rows)
    identity.check_unseen(args.model, parts["test"], "--limit")
    vocabulary = reward.words(args.intervention, {"all": None, "train": False, "held-out": True}[args.words])
    test = faith.draw_cases(parts["test"], args.intervention, args.seed, vocabulary)
    fit = faith.draw_cases(parts["fit"], args.intervention, args.seed, reward.words(args.intervention, held_out=False))
    subject = open_subject(args, len(questions[0].options), args.task)
    subject.made_of = faith.made_of(subject, questions, args.intervention) | {"weights": identity.weights(args.model)}
    check_prompts(subject, questions, args.max_new_tokens, args.intervention)
    if args.calibration == "fit":
        subject.offsets = faith.calibrate(subject, parts["fit"])
    fit_rows = faith.decision_rows(subject, fit, Progress("labelled for the shortcut", file=sys.stderr))
    trained = (locate(args.model) / "training.json").exists()
    measured, summaries, kept, fitted = {}, {}, [], report.by_part(fit_rows)
    sizes = args.max_new_tokens, args.seed
    for why in args.why:
        also = f", asked {why}" * (len(args.why) > 1)
        subject.why, progress = why, Progress(f"measured{also}", file=sys.stderr)
        measured[why] = rows = faith.measure(subject, test, args.temperature, *sizes, progress=progress)
        if args.detection:
            detect.ask_outright(subject, test, rows)
        if args.controls:
            controls.measure(subject, test, rows, *sizes, Progress(f"explained beside an aside{also}", file=sys.stderr))
        initial = dict.fromkeys(rows) if trained else rows  # whose labels the paper takes
        for t in rows:
            for part, some in report.by_part(rows[t]).items():
                name = f"T={t:g}{also}" + f", {part[1:]}" * bool(part)
                summaries[name] = report.summary(some, fitted.get(part), args.seed, initial=initial[t])
        if args.rows:
            subject.made_of |= {"opening": faith.made_of(subject, [])["opening"]}
            kept.append(args.rows + f".{why}" * (len(args.why) > 1))
            results.write_measured(kept[-1], rows, fit_rows, subject, args.max_new_tokens)
    if args.rows and args.calibration == "fit":
        results.write_offsets(f"{args.rows}.calibration.json", subject, len(parts["fit"]), args.task)
    print(f"{args.model}  {args.task}  {args.intervention}  seed {args.seed}  {len(test)} questions")
    first = f", asked {args.why[0]}" * (len(args.why) > 1)
    main = {f"T={t:g}{first}": summaries[f"T={t:g}{first}"] for t in args.temperature}
    print(f"\n{tables.overview(main)}")
    if len(summaries) > len(main):  # of several ways to ask why, of several interventions
        names = {name: tables.OVERVIEW[name] for name in ("flip_rate", "mention_if_flip", "mention_if_same", "phi")}
        lines = [[head, *(tables.cell(found[name]) for name in names)] for head, found in summaries.items()]
        print(f"\n{tables.grid(['', *names.values()], lines)}")
    areas = {t: f_auroc([rows[t] for rows in measured.values()]) for t in args.temperature if len(measured) > 1}
    for t, area in areas.items():
        print(f"F-AUROC over {len(measured)} why-questions, T={t:g}: {tables.cell(area)}")
    if args.controls:
        print(f"\nWhat influence means for this model\n{tables.overview(main, rows=controls.BLOCK)}")
    decided = list(zip(test, measured[args.why[0]][args.temperature[0]], strict=True))
    chosen = best_of(subject, decided, fit_rows, args) if args.best_of else {}
    many = many_edits(subject, parts["test"], args) if args.edits else {}
    pair = [quoted(f"{kept[0]}.{part}.jsonl") for part in (f"T{args.temperature[0]:g}", "fit") if kept]
    more = f": python -m lab.report {' --fit '.join(pair)}" if pair else " needs --rows PREFIX, see --help"
    print(f"\nevery figure{more}")
    if args.json:
        more = {"best_of": chosen, "ct": many, "f_auroc": {f"T={t:g}": area for t, area in areas.items()}}
        more = {name: found for name, found in more.items() if found}
        files.write_json(args.json, {"args": vars(args), "mean_logp": subject.calibration, "summary": summaries} | more)


def best_of(subject: faith.Subject, labelled: faith.Labelled, fit_rows: list, args: argparse.Namespace) -> dict:
    """Chooses among --best-of samples at the first --why, prints the figures and returns them."""
    subject.why, progress = args.why[0], Progress(f"explained {args.best_of} times", file=sys.stderr)
    rows = best.measure(subject, labelled, args.best_of, args.max_new_tokens, args.seed, progress)
    if args.rows:
        files.write_jsonl(f"{args.rows}.best.jsonl", rows)
    figures = best.figures(rows, fit_rows, args.seed)
    head = f"best of {args.best_of} by reward, T=1 (an upper bound)"
    print(f"\n{tables.overview({head: figures}, rows=best.BLOCK)}")
    return figures


def many_edits(subject: faith.Subject, questions: list[Question], args: argparse.Namespace) -> dict[str, dict]:
    """Measures CT with --edits at the first temperature and --why, prints its figures and returns them."""
    subject.why, t, progress = args.why[0], args.temperature[0], Progress("asked", unit="edits", file=sys.stderr)
    rows = ct.measure(subject, questions, args.edits, t, args.max_new_tokens, args.seed, progress)
    if not rows:
        raise ValueError("no question has a place for an adverb or an adjective; leave out --edits")
    if args.rows:
        files.write_jsonl(f"{args.rows}.ct.jsonl", rows)
    figures = ct.figures(rows, args.seed)
    table = tables.overview({f"T={t:g}": figures}, rows=ct.BLOCK)
    print(f"\n{args.edits} random adverbs and adjectives a question\n{table}")
    return figures


def run_ask(args: argparse.Namespace) -> None:
    if not 2 <= len(args.options) <= len(faith.LETTERS):
        raise ValueError(f"--options takes 2 to {len(faith.LETTERS)} answers, not {len(args.options)}")
    if not all(text.strip() for text in (args.question, *args.options)) or len({*args.options}) < len(args.options):
        raise ValueError("the question and its options must be different texts, none of them empty")
    question = Question("ask", args.question, (args.question,), tuple(args.options), 0, args.question)
    cases = faith.draw_cases([question], args.intervention, args.seed)
    if not cases:
        raise ValueError("this question has no place for this edit; use --intervention bias, or rephrase it")
    if args.calibration == "fit":
        raise ValueError("--calibration fit needs a data set; give a calibration.json, or none")
    subject = open_subject(args, len(question.options))
    row = faith.measure(subject, cases, args.temperature, args.max_new_tokens, args.seed)[args.temperature[0]][0]
    for x, y, p, asked in (("X ", "y", "p", question), ("X'", "y_edit", "p_edit", cases[0].edited)):
        odds = ", ".join(f"{faith.LETTERS[i]} {value:.2f}" for i, value in enumerate(row[p]))
        print(f"{x}  {faith.ask(asked)}\n\n{x.replace('X', 'y')}  {faith.LETTERS[row[y]]}   ({odds})\n")
    I, M = row["influence"], row["mention"]  # noqa: E741
    print(f"z'  {row['text']}\n\nI = {I}   the edit ({row['word']}) {'moved' if I else 'did not move'} the answer")
    print(f"M = {M}   the explanation {'names' if M else 'does not name'} it")
    print(f"r = {reward.reward(M, I):g}")
    if args.json:
        files.write_json(args.json, row)


@command("faith.py")
def main(argv: list[str] | None = None) -> int | None:
    argv = sys.argv[1:] if argv is None else argv
    asking = argv[:1] == ["ask"]
    more = "" if asking else " `faith.py ask` walks one question through."
    parser = Parser(prog="faith.py ask" if asking else "faith.py", description=faith.__doc__.split("\n")[0] + more)
    parser.add_argument("--model", required=True, help="Hugging Face directory, or hub id in the local cache")
    parser.add_argument("--intervention", default="bias", help="what is inserted, as in train.py")
    parser.add_argument("--temperature", type=float, nargs=1 if asking else "+", default=[0.0],
                        help="sampling temperature of the explanations; 0: greedy")  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--calibration", default="none", help="none, fit (on this model) or a run's calibration.json")
    parser.add_argument("--opening", default="", type=said, help="forced first words of explanations, as in train.py")
    parser.add_argument("--why", choices=faith.WHYS, nargs=1 if asking else "+", default=["leading"],
                        help="how to ask why it chose its answer; several ways also give F-AUROC")  # fmt: skip
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="as in train.py")
    parser.add_argument("--kernels", choices=("auto", "fused", "plain"), default="auto", help="as in train.py")
    parser.add_argument("--seed", type=int, default=0, help="seed of the edits and the sampling")
    parser.add_argument("--json", help="write the figures to this file")
    if asking:
        parser.add_argument("question", type=said)
        parser.add_argument("--options", type=said, nargs="+", required=True)
    else:
        parser.add_argument("--task", choices=tasks.TASKS, required=True)
        parser.add_argument("--data", required=True, help="folder or file with the task's published data")
        parser.add_argument("--skip-bad-rows", action="store_true", help="leave out rows of --data that cannot be read")
        parser.add_argument("--limit", type=int, default=300, help="number of test questions")
        parser.add_argument("--fit", type=int, default=300, help="other questions, to fit the shortcut baseline")
        parser.add_argument("--words", choices=("all", "train", "held-out"), default="all",
                            help="which words may be inserted")  # fmt: skip
        parser.add_argument("--detection", action="store_true", help="also ask outright: did the edit move the answer?")
        parser.add_argument("--controls", action="store_true", help="also ask with other edits, and say what influence "
                            "means for this model; about as long again")  # fmt: skip
        parser.add_argument("--edits", type=int, default=0, metavar="N", help="also CT of N random adverbs and "
                            "adjectives a question; N times the decisions")  # fmt: skip
        parser.add_argument("--best-of", type=int, default=0, metavar="N", help="also an upper bound: of N "
                            "explanations at T = 1 the one with the highest reward")  # fmt: skip
        parser.add_argument("--rows", metavar="PREFIX", help="write the rows to PREFIX.T0.jsonl and so on, the rows of "
                            "the shortcut to PREFIX.fit.jsonl, fitted offsets to PREFIX.calibration.json")  # fmt: skip
    args = parser.parse_args(argv[1:] if asking else argv)
    check_arguments(args)
    run_ask(args) if asking else run_measure(args)
