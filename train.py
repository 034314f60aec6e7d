"""GRPO by hand: teach a model to name what moved its answer, and nothing else. `step` below is the whole method.

    label      edit questions, see which edits move the *current* model, take half and half     (batches.py)
    sample     a group of explanations of each                                                  (rollout.py)
    reward     r = 1[mention = influence] per explanation                                       (reward.py)
    advantage  A = (r − mean of its group) / std of its group                                   (grpo.py)
    loss       −min(ρ A, clip(ρ) A) per explanation token, ρ = exp(logp − logp when sampled), + β KL
    update     AdamW on fp32 weights                                                            (run/policy.py)

Only the explanation is trained, including its end-of-turn token. The reward does not train the decision.

Paper (arXiv 2607.21090): GRPO, the reward, frozen labels. Ours: on-policy labels (the default), the loss's
normalisations (GRPO 2402.03300, DAPO 2503.14476, Dr. GRPO 2503.20783), all hyperparameters.

    torchrun train.py                                 the embedded toy
    torchrun train.py --model DIR --task esnli --data DIR --intervention bias --out out/bias
    torchrun --nproc-per-node 2 train.py …            data-parallel, same result up to rounding

Axes: G group (explanations of a question), M explanation tokens in a micro-batch.
"""

from run import early  # noqa: F401

# isort: split
import contextlib
import itertools
import math
import sys
import time
from pathlib import Path

import torch

import faith
import model as models
import report
import reward
import tasks
import toy
from batches import DecisionAnchor, NothingToBalance, Stream, balanced_batch, batch_metrics, label
from faith import Case, Subject, explanation_prompt
from grpo import LossStats, Packed, advantages, informative, kl_k3, pack, policy_loss, token_logprobs, token_weights
from rollout import Completion, Sampler
from run import checkpoint, files, identity, lora, reading, results
from run.args import Args, check, data_sets, parse
from run.checkpoint import RunState
from run.device import send
from run.hub import locate
from run.log import find, opened
from run.policy import Policy, learning_rate, make_policy
from run.progress import Laps, Progress, command, say
from run.ranks import Ranks
from run.stop import saved_when_stopped

# ---- the step --------------------------------------------------------------------------------------------------


def step(
    n: int, subject: Subject, policy: Policy, stream: Stream, anchor: DecisionAnchor, args: Args, ranks: Ranks
) -> tuple[dict, list[dict]]:
    """GRPO step n (from 0): label, sample, reward, advantage, loss, update. Returns its record and its explanations."""
    lap = Laps()
    batch, labelled = balanced_batch(subject, stream, n, args, ranks)  # half with influence, half without
    lap("label_s")

    mine = ranks.share(batch)
    how = subject.opening, subject.why
    prompts = [explanation_prompt(subject.tokenizer, case.edited, row["y_edit"], *how) for case, row in mine]
    answers = ranks.together(lambda: sample(subject, prompts, [case.key for case, _ in mine], n, args))
    log = [score(subject, case, row, group, n) for (case, row), group in zip(mine, answers, strict=True)]
    rewards = [[entry["reward"] for entry in group] for group in log]
    lap("rollout_s")

    groups = list(zip(prompts, answers, strict=True))
    totals = ranks.total(sum(map(len, answers)), sum(len(c.tokens) for group in answers for c in group))
    if not args.kl:  # without the KL, a group with equal rewards has no gradient
        groups, rewards = ([part[i] for i in informative(rewards)] for part in (groups, rewards))
    lr, skipped = learning_rate(n, args), 0
    for update in range(args.updates):
        # At the initial weights the anchor's gradient is only rounding noise, which AdamW would scale up to full steps.
        anchor_kl, stats = anchor.backward(n) if n + update else 0.0, LossStats(ranks.device)
        for part in policy.passes(len(groups), args.micro):
            given = micro_batch(groups[part], rewards[part], totals, args, ranks.device)
            stats.add(*backward(policy, *given, args), args.clip_low, args.clip_high)
        figures = stats.summary(ranks)
        grad_norm, updated = policy.step(lr, math.isfinite(figures["loss"]))
        skipped += not updated
    lap("update_s")

    log = [entry for group in ranks.gather(log) for entry in group]  # in the batch's order
    anchor_kl = sum(ranks.gather([float(anchor_kl)]))
    figures |= {"anchor_kl": anchor_kl, "grad_norm": grad_norm, "skipped": skipped, "lr": lr}
    return {
        "step": n,
        **batch_metrics(log, labelled, args.samples),
        **figures,
        **lap.seconds,
        "prompts": len(batch),
    }, log


def backward(policy: Policy, packed: Packed, old, A, weights, args: Args) -> tuple[torch.Tensor, ...]:
    """The loss of a micro-batch, forward and backward. Returns what LossStats.add takes: loss, kl, logprobs, old, A."""

    def logprobs_under(model: models.Transformer) -> torch.Tensor:
        return token_logprobs(model, packed, args.temperature)

    logprobs = policy.run(logprobs_under)  # (M,)
    per_token = policy_loss(logprobs, old, A, args.clip_low, args.clip_high)
    kl = kl_k3(logprobs, policy.reference(logprobs_under)) if args.kl else torch.zeros_like(per_token)
    loss = ((per_token + args.kl * kl) * weights).sum()
    policy.backward(loss)
    return loss, kl, logprobs, old, A


def sample(subject: Subject, prompts: list[list[int]], keys: list[int], n: int, args: Args) -> list[list[Completion]]:
    """G explanations per prompt. Step 0 in the sampler's hash is the measurement's, so training step n uses n + 1."""
    if not prompts:
        return []
    sizes = args.samples, args.max_new_tokens, args.temperature
    return subject.sampler.generate(prompts, *sizes, args.seed, n + 1, keys)


def score(subject: Subject, case: Case, row: dict, group: list[Completion], n: int) -> list[dict]:
    """One log entry per explanation of a labelled case, with its mention and its reward."""
    known = {key: row[key] for key in ("task", "id", "word", "text_inserted", "y", "y_edit", "influence")}
    entries = []
    for answer in group:
        text = subject.tokenizer.decode(answer.tokens)
        mention = reward.mentions(case.intervention, text)
        entries.append({"step": n, **known, "mention": int(mention), "reward": reward.reward(mention, row["influence"]),
                        "tokens": len(answer.tokens), "ended": answer.ended, "text": text})  # fmt: skip
    return entries


def micro_batch(groups: list, rewards: list[list[float]], totals: list[int], args: Args, device):
    """Some groups packed for one pass, and per explanation token (M,): logprob when sampled, advantage, loss weight.

    totals: sequences and tokens of the whole step, over all ranks.
    """
    packed = pack([(prompt, [c.tokens for c in group]) for prompt, group in groups], device)
    lengths = torch.tensor([len(c.tokens) for _, group in groups for c in group])
    old = [lp for _, group in groups for c in group for lp in c.logprobs]
    A = advantages(torch.tensor(rewards), args.advantage).flatten().repeat_interleave(lengths)
    weights = token_weights(lengths, args.loss, args.max_new_tokens, *totals)
    return packed, *(send(x, device) for x in (old, A, weights))


# ---- the loop --------------------------------------------------------------------------------------------------

SKIPS = 5  # this many steps in a row without a finite update end the run


def train(args: Args, ranks: Ranks, take_step, subject, policy, stream, anchor, state: RunState, logged) -> str:
    """All remaining steps, logged and saved; returns why it stopped early, or an empty string.

    ValueError where it stopped before anything was learned; SystemExit where a signal stopped it.
    """
    progress, problem, skips = Progress("training", ranks.rank, lines=8, first=state.steps), "", 0
    with saved_when_stopped(ranks, bool(policy.sharded), state.stop) as signals:
        policy.before_update = signals.hold
        for n in range(state.steps, args.steps):
            try:
                record, log = take_step(n, subject, policy, stream, anchor, args, ranks)
            except NothingToBalance as error:
                problem = str(error)
                break
            state.advance(n + 1)
            if ranks.rank == 0:
                files.append_jsonl(Path(args.out) / "explanations.jsonl", log)
                record |= {"position": stream.drawn}
                files.append_jsonl(Path(args.out) / "metrics.jsonl", [record])
                logged(n, record)
                text = progress_line(record, len(log), args, progress.minutes_left(n + 1, args.steps))
                progress.show(text, n + 1, args.steps, always=record["skipped"] > 0)
            if args.checkpoint_every and (n + 1) % args.checkpoint_every == 0:
                state.save()
            if ranks.rank == 0 and args.save_every and (n + 1) % args.save_every == 0 and n + 1 < args.steps:
                results.save_model(args, policy.model, f"step-{n + 1}")
            signals.release()
            skips = skips + 1 if record["skipped"] == args.updates else 0
            if skips == SKIPS:
                problem = f"the loss or its gradient was not finite {SKIPS} times in a row; lower --lr or --clip-norm"
                break
        if state.steps > skips:  # otherwise nothing was learned, and there is nothing to save
            signals.hold()
            state.save()
            signals.release()
    if skips == SKIPS and (saved := checkpoint.newest(state.folder)):
        problem += f"; the last good checkpoint is {saved}"
    if problem and state.steps == skips:
        raise ValueError(f"step {n + 1}: {problem}")
    return problem


def progress_line(record: dict, explanations: int, args: Args, minutes_left: float) -> str:
    seconds = sum(record[name] for name in ("label_s", "rollout_s", "update_s"))
    tokens = record["tokens"] * explanations / seconds if seconds else math.nan  # a clock may stand still
    return (
        f"step {record['step'] + 1}/{args.steps}  reward {record['reward']:.3f}  phi {record['phi']:.2f}  "
        f"P(M|I=1) {record['mention_1']:.2f}  P(M|I=0) {record['mention_0']:.2f}  I {record['influence_rate']:.2f}  "
        f"{tokens:.0f} tok/s  {minutes_left:.1f} min left" + "  SKIPPED: not finite" * bool(record["skipped"])
    )


def evaluate(
    subject: Subject,
    cases: list[Case],
    fit: list[Case],
    name: str,
    args: Args,
    ranks: Ranks,
    before: dict | None = None,
) -> dict:
    """Measures `cases`, greedy and at T = 1; writes the rows and their summary; returns {temperature: rows}.

    before: the initial model's rows so returned, where it is another model.
    """
    fit_rows = [row for _, row in label(subject, fit, ranks)]
    mine, nulls, detection = ranks.share(cases), -(-100 // ranks.world), args.objective == "detection"
    unit = "questions" + " of this rank" * (ranks.world > 1)
    progress = Progress(f"measured {name} training", ranks.rank, unit=unit)
    measured = ranks.together(
        lambda: faith.measure(subject, mine, (0.0, 1.0), args.max_new_tokens, args.seed, nulls, detection, progress)
    )
    rows = {t: ranks.gather(measured[t]) for t in measured}
    if ranks.rank == 0:
        initial, fitted, summaries = rows if before is None else before, report.by_task(fit_rows), {}
        for t in rows:
            for part, some in report.by_task(rows[t]).items():
                figures = report.summary(some, fitted.get(part, []), args.seed, initial=initial.get(t))
                summaries[f"T={t:g}{part}"] = figures
        results.write_measured(Path(args.out) / name, rows, fit_rows, subject, args.max_new_tokens)
        files.write_json(Path(args.out) / f"{name}.json", summaries)
    return rows


# ---- the run ---------------------------------------------------------------------------------------------------


def prepare_defaults(args: Args, ranks: Ranks) -> None:
    """Fills in what the flags leave open: the toy's folders, and a new folder for the run."""
    if args.model in toy.VARIANTS and not Path(args.model).is_dir():
        folder = None
        for first in (True, False):  # rank 0 makes it, then the others find it made
            made = ranks.together(lambda: toy.prepare(args.model) if (ranks.rank == 0) == first else None)  # noqa: B023
            folder = made or folder
        args.model = str(folder / "model")
        args.data = args.data or (str(folder) if args.task == "toy" else "")
    elif args.model in toy.VARIANTS and ranks.rank == 0:
        say(f"--model {args.model}: the directory of this name, not the toy")
    elif args.model.startswith("toy"):
        try:
            locate(args.model)
        except ValueError:
            toy.prepare(args.model)  # it says which toys there are
    if not args.data:
        raise ValueError("--task and --data are needed with a model of your own; see python train.py --help")
    name = f"{args.task}-{args.intervention}-{time.strftime('%Y%m%d-%H%M%S')}"
    taken = (Path("out") / (name + f"-{n}" * (n > 1)) for n in itertools.count(1))
    args.out = args.out or ranks.gather([str(next(path for path in taken if not path.exists()))])[0]


def prepare(args: Args, ranks: Ranks, read_dataset) -> tuple[Subject, list[Case], list[Case], Stream]:
    """Loads and checks all that a run needs before it starts: the model, test and fit cases, the training stream."""
    if not args.resume and files.holds_something(args.out):
        raise ValueError(f"{args.out} already holds something, maybe another run; choose another --out or remove it")
    if args.resume and (done := checkpoint.steps_done(Path(args.out) / "checkpoints")) > args.steps:
        raise ValueError(f"--steps {args.steps}: the run has done {done}; give at least that, or leave out --steps")
    sizes = {"test": args.eval_questions, "fit": args.fit_questions, "train": -1}
    questions, parts = tasks.load_splits(data_sets(args.task, args.data), sizes, args.skip_bad_rows)
    stream = Stream(parts["fit"] + parts["train"], args, parts["test"])
    identity.check_unseen(args.model, parts["test"], "--eval-questions", stream.questions)
    tokenizer = models.Tokenizer(args.model)
    network = models.load(args.model, ranks.device, args.dtype)
    if lora.adapters(network):
        raise ValueError(f"--model {args.model} is an adapter; merge it into its base first, with PEFT")
    if args.lora:
        lora.attach(network, args.lora, args.lora_alpha, args.lora_targets.split(","), args.seed)
    network.recompute = args.recompute
    sampler = Sampler(network, {*network.config.end_of_turn, tokenizer.end_of_turn}, args.rows, kernels=args.kernels)
    subject = Subject(sampler, tokenizer, {}, args.train_only == "explanation", args.opening, args.why)
    subject.made_of = faith.made_of(subject, questions)
    if args.dataset:
        stream.frozen = read_dataset(args, subject.made_of, stream.questions)
    faith.check_prompts(subject, questions, args.max_new_tokens)
    words = reward.words(args.intervention, held_out=False)
    test = faith.draw_cases(parts["test"], args.intervention, args.seed)
    fit = faith.draw_cases(parts["fit"], args.intervention, args.seed, words)
    return subject, test, fit, stream


def run(
    args: Args, ranks: Ranks, policy: Policy, take_step, finish, logged,
    subject: Subject, test: list[Case], fit: list[Case], stream: Stream,
) -> None:  # fmt: skip
    """The whole run, with what `prepare` returned: measure, train, save, measure again.

    finish: lab/report.py's. logged(n, values): run/log.py's.
    """
    out, before = Path(args.out), {}
    subject.made_of = ranks.on_first(lambda: results.identify(args, subject.made_of))
    if ranks.rank == 0:
        if not args.resume:
            out.mkdir(parents=True, exist_ok=True)
            results.write_args(args)
        if not all((out / name).exists() for name in ("identity.json", identity.LIST)):
            results.write_identity(args, subject.made_of, stream)
        print(f"{args.task}, {args.intervention}, {args.labels} labels: {args.steps} steps of {args.prompts} x "
              f"{args.samples} explanations, into {out}", flush=True)  # fmt: skip
    if args.calibrate:
        subject.offsets = faith.calibrate(subject, stream.questions, args.calibration_questions)
        if ranks.rank == 0:
            used = sum(min(len(some), args.calibration_questions) for some in stream.of.values())
            faith.write_offsets(subject, used, args.task, out / "calibration.json")
    if args.resume and (out / "before.json").exists():
        before = {t: reading.read_jsonl(out / f"before.T{t:g}.jsonl") for t in (0.0, 1.0)}
    elif test and args.eval_before:
        before = evaluate(subject, test, fit, "before", args, ranks)
    if args.labels == "frozen" and not args.dataset:
        progress = Progress("labelled", ranks.rank)
        stream.frozen = label(subject, stream.next_cases(args.frozen_questions), ranks, progress)
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
    if ranks.rank == 0 and before and not state.steps:
        logged(0, {"before": reading.read_json(out / "before.json")})
    problem = train(args, ranks, take_step, subject, policy, stream, anchor, state, logged)
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


@command("train.py", ranks=True)
def main(argv: list[str] | None = None) -> None:
    # The only place that imports lab/, and only what the flags ask for.
    args = parse(argv, {"intervention": reward.KINDS}, toy.SETTINGS)
    take_step, plan, read_dataset = step, None, None
    from lab.report import finish

    with Ranks() as ranks, contextlib.ExitStack() as held:
        if args.objective == "detection":
            from lab.detect import step as take_step
        if args.parallel == "auto" and ranks.world > 1:
            from lab.plan import plan
        if args.dataset:
            from lab.build import read_dataset
        check(args)
        if args.log != "none":
            ranks.on_first(lambda: find(args.log) and None)
        prepare_defaults(args, ranks)
        ranks.on_first(lambda: held.enter_context(files.in_use(args.out)))
        subject, test, fit, stream = ranks.together(lambda: prepare(args, ranks, read_dataset))
        with checkpoint.way_on_named(args):
            policy = make_policy(subject.sampler.model, args, ranks, plan)
            if ranks.device.type == "cuda" and args.objective == "disclosure":
                from lab.rehearsal import rehearse

                ranks.together(lambda: rehearse(subject, policy, stream.questions, args, ranks))
            logged = held.enter_context(opened(args, checkpoint.steps_done(Path(args.out) / "checkpoints"), ranks.rank))
            run(args, ranks, policy, take_step, finish, logged, subject, test, fit, stream)


if __name__ == "__main__":
    sys.exit(main())
