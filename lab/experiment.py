"""A run around its training: prepare, measure, train, save, measure again. train.py hands it the step and the loop."""

import contextlib
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import faith
import report
import reward
import tasks
import toy
from batches import DecisionAnchor, Stream, label, shuffle_influence
from faith import Case, Subject
from lab import base, detect, imitate
from lab.build import read_dataset
from lab.fits import check_prompts
from lab.plan import plan
from lab.rehearsal import rehearse
from lab.report import finish
from run import checkpoint, files, identity, lora, reading, results
from run.args import Args, check, data_sets
from run.checkpoint import RunState
from run.hub import locate
from run.log import find, opened
from run.policy import Policy, make_policy
from run.progress import Progress, say
from run.ranks import Ranks


def run(args: Args, step: Callable, train: Callable) -> None:
    """The whole run. step, train: of train.py. Other objectives have steps of their own in lab/."""
    step = {"detection": detect.step, "imitation": imitate.step}.get(args.objective, step)
    with Ranks() as ranks, contextlib.ExitStack() as held:
        check(args)
        if args.log != "none":
            ranks.on_first(lambda: find(args.log) and None)
        prepare_defaults(args, ranks)
        ranks.on_first(lambda: held.enter_context(files.in_use(args.out)))
        subject, test, fit, stream = ranks.together(lambda: prepare(args, ranks))
        check_ranks(subject, ranks)
        with checkpoint.way_on_named(args):
            policy = make_policy(subject.sampler.model, args, ranks, plan)
            if ranks.device.type == "cuda" and args.objective == "disclosure":
                ranks.together(lambda: rehearse(subject, policy, stream.questions, args, ranks))
            logged = held.enter_context(opened(args, checkpoint.steps_done(Path(args.out) / "checkpoints"), ranks.rank))
            measure_and_train(args, ranks, policy, step, train, logged, subject, test, fit, stream)


def prepare_defaults(args: Args, ranks: Ranks) -> None:
    """Fills in what the flags leave open: the toy's folders, and a new folder for the run."""
    if args.model in toy.VARIANTS and not Path(args.model).is_dir():
        ranks.on_first(lambda: base.prepare(args.model))  # the others find it made
        folder = ranks.together(lambda: base.prepare(args.model))
        args.model = str(folder / "model")
        args.data = args.data or (str(folder) if args.task == "toy" else "")
    elif args.model in toy.VARIANTS and ranks.rank == 0:
        say(f"--model {args.model}: the directory of this name, not the toy")
    elif args.model.startswith("toy"):
        try:
            locate(args.model)
        except ValueError:
            base.prepare(args.model)  # it says which toys there are
    if not args.data:
        raise ValueError("--task and --data are needed with a model of your own; see python train.py --help")
    name = f"{args.task}-{args.intervention}-{time.strftime('%Y%m%d-%H%M%S')}"
    taken = (Path("out") / (name + f"-{n}" * (n > 1)) for n in itertools.count(1))
    args.out = args.out or ranks.gather([str(next(path for path in taken if not path.exists()))])[0]


def prepare(args: Args, ranks: Ranks) -> tuple[Subject, list[Case], list[Case], Stream]:
    """Loads and checks all that a run needs before it starts: the model, test and fit cases, the training stream."""
    if not args.resume and files.holds_something(args.out):
        raise ValueError(f"{args.out} already holds something, maybe another run; choose another --out or remove it")
    if args.resume and (done := checkpoint.steps_done(Path(args.out) / "checkpoints")) > args.steps:
        raise ValueError(f"--steps {args.steps}: the run has done {done}; give at least that, or leave out --steps")
    sizes = {"test": args.eval_questions, "fit": args.fit_questions, "train": -1}
    questions, parts = tasks.load_splits(data_sets(args.task, args.data), sizes, args.skip_bad_rows)
    stream = Stream(parts["fit"] + parts["train"], args, parts["test"])
    identity.check_unseen(args.model, parts["test"], "--eval-questions", stream.questions)
    subject = faith.open_subject(args.model, args.opening, args.kernels, args.why, args.dtype)
    network = subject.sampler.model
    if lora.adapters(network):
        check_goes_on(args, lora.peft_config(network), subject.only_explains)
    elif args.lora:
        lora.attach(network, args.lora, args.lora_alpha, args.lora_targets.split(","), args.seed)
    network.recompute, subject.sampler.rows = args.recompute, args.rows
    subject.only_explains = args.train_only == "explanation"
    subject.made_of = faith.made_of(subject, questions, args.intervention)
    if args.dataset:
        stream.frozen = read_dataset(args, subject.made_of, stream.questions)
    check_prompts(subject, questions, args.max_new_tokens, args.intervention)
    words = reward.words(args.intervention, held_out=False)
    test = faith.draw_cases(parts["test"], args.intervention, args.seed)
    fit = faith.draw_cases(parts["fit"], args.intervention, args.seed, words)
    return subject, test, fit, stream


def check_ranks(subject: Subject, ranks: Ranks) -> None:
    """Raises ValueError, on all ranks, if one has read another model or other data than rank 0."""
    some = [weight.detach().flatten()[:3].tolist() for weight in subject.sampler.model.parameters()]
    first, *others = ranks.gather([subject.made_of | {"weights": identity.digest(some)}])
    for rank, other in enumerate(others, 1):
        identity.check_same(other, first, f"what rank {rank} has read, unlike rank 0,", "give all the same files")


def check_goes_on(args: Args, adapter: dict, only_explains: bool) -> None:
    """Raises ValueError unless the flags match the adapter in --model, whose training then continues."""
    targets = sorted(name.removeprefix("model.") for name in adapter["target_modules"])
    has = {"--lora": adapter["r"], "--lora-alpha": float(f"{adapter['lora_alpha']:.6g}"),  # saved as scale · r
           "--lora-targets": ",".join(targets),
           "--train-only": "explanation" if only_explains else "all"}  # fmt: skip
    given = args.lora, args.lora_alpha, ",".join(sorted(args.lora_targets.split(","))), args.train_only
    if tuple(has.values()) != given:
        flags = " ".join(f"{flag} {value}" for flag, value in has.items())
        raise ValueError(f"--model {args.model} is an adapter; to train it on give {flags}, or merge it into its base")


def measure_and_train(
    args: Args, ranks: Ranks, policy: Policy, step: Callable, train: Callable, logged: Callable,
    subject: Subject, test: list[Case], fit: list[Case], stream: Stream,
) -> None:  # fmt: skip
    """The run once everything is prepared: measure, train, save, measure again. logged(n, values): run/log.py's."""
    out, before = Path(args.out), {}
    subject.made_of = ranks.on_first(lambda: results.identify(args, subject.made_of))
    if ranks.rank == 0:
        if not args.resume:
            out.mkdir(parents=True, exist_ok=True)
            results.write_args(args)
        if not all((out / name).exists() for name in ("identity.json", identity.LIST)):
            results.write_identity(args, subject.made_of, stream)
        each = args.samples if args.objective == "disclosure" else 1
        print(f"{args.task}, {args.intervention}, {args.labels} labels: {args.steps} steps of {args.prompts} x "
              f"{each} explanations, into {out}", flush=True)  # fmt: skip
    if args.calibrate:
        subject.offsets = faith.calibrate(subject, stream.questions, args.calibration_questions)
        if ranks.rank == 0:
            used = sum(min(len(some), args.calibration_questions) for some in stream.of.values())
            results.write_offsets(out / "calibration.json", subject, used, args.task)
    if args.resume and (out / "before.json").exists():
        before = {t: reading.read_jsonl(out / f"before.T{t:g}.jsonl") for t in (0.0, 1.0)}
    elif test and args.eval_before:
        before = evaluate(subject, test, fit, "before", args, ranks)
    if args.labels != "on-policy" and not args.dataset:
        progress = Progress("labelled", ranks.rank)
        stream.frozen = label(subject, stream.next_cases(args.frozen_questions), ranks, progress)
    if args.labels == "shuffled":
        stream.frozen = shuffle_influence(stream.frozen, args.seed)
    held = []
    if args.anchor:
        progress = Progress("labelled for the anchor", ranks.rank)
        held = label(subject, stream.next_cases(args.anchor_questions), ranks, progress)
    anchor = DecisionAnchor(subject, policy, held, args, ranks)
    state = RunState(out / "checkpoints", policy, stream, subject.made_of, ranks, args.checkpoint_every)
    if args.resume:  # only now, because all above needs the initial model
        ranks.together(state.resume)
        if ranks.rank == 0:
            results.write_args(args, state.steps)
            for file in [*out.glob("after.*"), *out.glob("difference.*")] if state.steps < args.steps else ():
                file.unlink()  # of a run that goes on; runs/lines.sh takes it for done
    if ranks.rank == 0 and before and not state.steps:
        logged(0, {"before": reading.read_json(out / "before.json")})
    problem = train(args, ranks, step, subject, policy, stream, anchor, state, logged)
    if ranks.rank == 0:
        if problem:
            say(f"stopped after step {state.steps}: {problem}")
        results.save_model(args, policy.model, "model")  # before anything else can fail
        subject.made_of |= {"weights": identity.weights(out / "model")}
    after = evaluate(subject, test, fit, "after", args, ranks, before) if test else {}
    if ranks.rank == 0:
        if after:
            logged(state.steps, {"after": reading.read_json(out / "after.json")})
        finish(args, test, before, after)
    ranks.gather([])  # all ranks wait until rank 0 has written everything


def evaluate(
    subject: Subject, cases: list[Case], fit: list[Case], name: str, args: Args, ranks: Ranks,
    before: dict | None = None,
) -> dict:  # fmt: skip
    """Measures `cases`, greedy and at T = 1; writes the rows and their summary; returns {temperature: rows}.

    before: what this returned for the initial model; None if that is measured now.
    """
    fit_rows = [row for _, row in label(subject, fit, ranks)]
    mine, nulls = ranks.share(cases), -(-100 // ranks.world)
    unit = "questions" + " of this rank" * (ranks.world > 1)
    progress = Progress(f"measured {name} training", ranks.rank, unit=unit)
    sizes = args.max_new_tokens, args.seed, nulls, progress
    measured = ranks.together(lambda: faith.measure(subject, mine, (0.0, 1.0), *sizes))
    if args.objective == "detection":
        ranks.together(lambda: detect.ask_outright(subject, mine, measured))
    rows = {t: ranks.gather(measured[t]) for t in measured}
    if ranks.rank == 0:
        initial, fitted, summaries = rows if before is None else before, report.by_part(fit_rows), {}
        for t in rows:
            for part, some in report.by_part(rows[t]).items():
                summaries[f"T={t:g}{part}"] = report.summary(some, fitted.get(part), args.seed, initial=initial.get(t))
        results.write_measured(Path(args.out) / name, rows, fit_rows, subject, args.max_new_tokens)
        files.write_json(Path(args.out) / f"{name}.json", summaries)
    return rows
