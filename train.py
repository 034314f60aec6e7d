"""GRPO by hand: teach a model to name what moved its answer, and nothing else.

One step, the verbs in order:

    label      draw edited questions, see which edits move the *current* model, take half and half
    rollout    sample a group of explanations of each                                     (rollout.py)
    reward     r = 1[mention = influence] per explanation                                 (reward.py)
    advantage  A = (r − mean of its group) / std of its group
    loss       −min(ρ A, clip(ρ) A) per explanation token, ρ = exp(logp − logp when sampled), + β KL
    step       AdamW on fp32 weights

Only the explanation is trained, its end-of-turn token included; the decision belongs to the environment.
Half and half matters: on such a batch "always mention" and "never mention" earn 0.5 alike.

Paper (arXiv 2607.21090): GRPO, the reward, frozen labels. Ours: on-policy labels (the default), the loss's
normalisations (GRPO 2402.03300, DAPO 2503.14476, Dr. GRPO 2503.20783), all hyperparameters.

    torchrun train.py --model DIR --task esnli --data DIR --intervention bias --out out/bias
    torchrun --nproc-per-node 2 train.py …            data-parallel, same result up to rounding

Axes: B rows, T tokens of a row, M completion tokens in a micro-batch, E hidden size, V vocabulary, G group.
"""

import functools
import math
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import faith
import lora
import model as models
import report
import reward
import tasks
import toy
from faith import Case, Subject
from grpo import advantages, kl_k3, pack, policy_loss, token_logprobs, token_weights
from lab import build, detect
from lab.build import balance
from rollout import Completion, Sampler, option_scores
from run import checkpoint, files, results, shard
from run.args import Args, check, parse
from run.progress import minutes_left
from run.ranks import Ranks
from run.stop import Signals, Stopped


def learning_rate(step: int, args: Args) -> float:
    """At `step` (from 0): linear warm-up, then constant, or decay to 10 % of the peak at the last step."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, args.steps - 1 - args.warmup)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[args.decay]
    return args.lr * (0.1 + 0.9 * shape)


# ---- the step ------------------------------------------------------------------------------------------------


class Stream:
    """Edited training questions without end: each epoch in a new order, with new edits."""

    def __init__(self, questions: list[tasks.Question], args: Args):
        self.questions, self.kind, self.seed = questions, args.intervention, args.seed
        self.words = reward.words(args.intervention, held_out=False)
        self.position = 0  # candidates handed out so far
        self.epoch, self.left = -1, []
        self.frozen: list[tuple[Case, dict]] = []  # with --labels frozen: questions labelled by the initial model

    def take(self, n: int) -> list[Case]:
        """The next n; questions without a place for an edit are passed over."""
        taken, barren = [], 0
        while len(taken) < n:
            if not self.left:
                self.epoch += 1
                self.left = tasks.shuffled(self.questions, self.seed + self.epoch)[::-1]
            case = faith.draw_cases([self.left.pop()], self.kind, self.seed * 1000 + self.epoch, self.words)
            taken += case
            barren = 0 if case else barren + 1
            if barren > len(self.questions):
                raise ValueError("no training question has a place for an edit; choose another --intervention")
        self.position += n
        return taken

    def place(self) -> dict:
        """Where the stream stands, to go on from there."""
        return {"position": self.position, "epoch": self.epoch, "left": len(self.left)}

    def go(self, position: int, epoch: int, left: int) -> None:
        self.position, self.epoch = position, epoch
        self.left = tasks.shuffled(self.questions, self.seed + epoch)[::-1][:left] if left else []


def label(subject: Subject, cases: list[Case], ranks: Ranks, tell=lambda done, total: None) -> list:
    """Each case with its decision row under the current model, the work shared among ranks."""
    mine = ranks.share(cases)
    rows = ranks.together(lambda: faith.decision_rows(subject, mine, tell))
    return list(zip(cases, ranks.gather(rows), strict=True))


def draw_batch(subject: Subject, stream: Stream, step: int, args: Args, ranks: Ranks) -> tuple[list, list]:
    """A batch balanced by influence, and all that was labelled to find it: by the current model, or once (frozen)."""
    if args.labels == "frozen":
        labelled = random.Random(f"{args.seed}/{step}").sample(stream.frozen, len(stream.frozen))
        return balance(labelled, args.prompts), labelled
    labelled = []
    while len(batch := balance(labelled, args.prompts)) < args.prompts and len(labelled) < args.candidates:
        labelled += label(subject, stream.take(min(2 * args.prompts, args.candidates - len(labelled))), ranks)
    return batch, labelled


class Optimizer:
    """AdamW on what is trained, in fp32: the model's own weights, or masters of others, cast back into them.

    Adam on bf16 weights would lose updates smaller than 2^-8 of a weight. cut: the masters, where they are cut
    among ranks and `model` is the copy that samples.
    """

    def __init__(self, model: models.Transformer, args: Args, cut: shard.Cut | None = None):
        trained = {n: w for n, w in (cut.model if cut else model).named_parameters() if w.requires_grad}
        weights, self.cut = dict(model.named_parameters()), cut
        self.names, self.weights = list(trained), [weights[name] for name in trained]
        self.masters = list(trained.values())
        if not cut:
            self.masters = [m if m.dtype == torch.float32 else torch.nn.Parameter(m.detach().float())
                            for m in self.masters]  # fmt: skip
        betas = (0.9, args.beta2)
        self.adam = torch.optim.AdamW(self.masters, lr=args.lr, betas=betas, weight_decay=args.weight_decay)

    def accumulate(self) -> None:
        """Moves the gradient of one backward pass into the fp32 sum."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            if weight is not master and weight.grad is not None:
                grad = weight.grad.float()
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                weight.grad = None

    def step(self, lr: float, clip_norm: float, ranks: Ranks, good: bool = True) -> float:
        """Sums gradients over ranks, clips, updates, clears; returns the norm before clipping.

        Where that is not finite, or the step's loss was not (`good`), nothing is changed: the same on all ranks.
        """
        for master in self.masters:
            if master.grad is None:  # a rank without work still takes part
                master.grad = torch.zeros_like(master)
        if not self.cut:
            ranks.sum_([master.grad for master in self.masters])
        norm = shard.whole(torch.nn.utils.clip_grad_norm_(self.masters, clip_norm))
        if good and torch.isfinite(norm):
            for group in self.adam.param_groups:
                group["lr"] = lr
            self.adam.step()
            self.refresh()
        self.adam.zero_grad(set_to_none=True)
        return float(norm)

    @torch.no_grad()
    def refresh(self) -> None:
        """Casts the masters back into the model."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            if weight is not master:
                weight.copy_(shard.whole(master))

    def state(self) -> dict[str, torch.Tensor]:
        """All that an update changes, by name: the tensors themselves, to save them or to load into them."""
        tensors = {}
        for name, master in zip(self.names, self.masters, strict=True):
            state = self.adam.state[master]
            if not state:  # as AdamW begins
                state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(master)}
                state["exp_avg_sq"] = torch.zeros_like(master)
            tensors |= {f"{key}.{name}": state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
            tensors[f"weight.{name}"] = master.data
        return tensors


Group = tuple[list[int], list[Completion]]  # a prompt and its sampled explanations


def update(
    model: models.Transformer | shard.Cut, reference, optimizer: Optimizer, groups: list[Group],
    rewards: list[list[float]], lr: float, args: Args, ranks: Ranks, anchor=lambda: 0.0, hold=lambda: None,
) -> dict:  # fmt: skip
    """One optimizer update on this rank's groups, as part of a step over all ranks. Returns the step's figures.

    anchor(): backpropagates a loss of its own and returns it. hold() is called when weights are about to change.
    """
    counts = torch.tensor([sum(len(g[1]) for g in groups), sum(len(c.tokens) for g in groups for c in g[1])])
    counts = counts.to(ranks.device)
    ranks.sum_([counts])
    sequences, tokens = counts.tolist()
    totals = torch.zeros(6, dtype=torch.float64, device=ranks.device)
    gap_max, anchored = 0.0, anchor()
    optimizer.accumulate()
    if reference is None:  # a group whose rewards are all equal has no advantage, and so no gradient
        live = [i for i, r in enumerate(rewards) if min(r) < max(r)]
        groups, rewards = [groups[i] for i in live], [rewards[i] for i in live]
    cut = isinstance(model, shard.Cut)  # then every rank makes as many passes as the one with the most groups
    for start in range(0, max(ranks.gather([len(groups)])) if cut else len(groups), args.micro):
        if cut:
            ranks.meet()  # they may agree to stop here
        if not (some := groups[start : start + args.micro]):
            shard.idle(model, reference is model)
            continue
        packed = pack([(prompt, [c.tokens for c in answers]) for prompt, answers in some], ranks.device)
        lengths = torch.tensor([len(c.tokens) for _, answers in some for c in answers])
        A = advantages(torch.tensor(rewards[start : start + args.micro]), args.advantage).flatten()
        A = A.repeat_interleave(lengths).to(ranks.device)
        weights = token_weights(lengths, args.loss, args.max_new_tokens, sequences, tokens).to(ranks.device)
        old = torch.tensor([lp for _, answers in some for c in answers for lp in c.logprobs], device=ranks.device)
        logprobs = shard.through(model, lambda m: token_logprobs(m, packed, args.temperature))  # noqa: B023
        per_token = policy_loss(logprobs, old, A, args.clip_low, args.clip_high)
        kl = torch.zeros_like(per_token)
        if reference is not None:
            with torch.no_grad(), lora.without(reference):  # which is the model itself where that has adapters
                fixed = shard.through(reference, lambda m: token_logprobs(m, packed, args.temperature))  # noqa: B023
            kl = kl_k3(logprobs, fixed)
        loss = ((per_token + args.kl * kl) * weights).sum()
        shard.backward(model, loss, ranks.world)
        optimizer.accumulate()
        ratio = (logprobs - old).detach().exp()
        clipped = ((ratio < 1 - args.clip_low) & (A < 0)) | ((ratio > 1 + args.clip_high) & (A > 0))
        gap = (logprobs.detach() - old).abs()
        gap_max = max(gap_max, float(gap.max()))
        sums = (loss.detach(), kl.detach().sum(), clipped.sum(), gap.sum(), -logprobs.detach().sum(), lengths.sum())
        totals += torch.stack([x.double().to(ranks.device) for x in sums])
    ranks.sum_([totals])
    hold()
    good = bool(torch.isfinite(totals[0]))
    norm = optimizer.step(lr, args.clip_norm, ranks, good)
    totals[1:] /= totals[-1].clone()  # means over the tokens scored; NaN where all groups are flat
    figures = dict(zip(("loss", "kl", "clipped", "sampler_gap", "nll"), totals.tolist(), strict=False))
    gaps, anchors = ranks.gather([gap_max]), ranks.gather([anchored])
    return {**figures, "sampler_gap_max": max(gaps), "anchor_kl": sum(anchors), "grad_norm": norm,
            "skipped": int(not (good and math.isfinite(norm)))}  # fmt: skip


def hold_decisions(subject: Subject, model, labelled: list, weight: float, ranks: Ranks) -> float:
    """Backpropagates weight · mean KL(initial ‖ current) over the letters; returns this rank's share, unweighted.

    labelled: cases with the rows the initial model gave them; the mean is over X and X' of all ranks' cases.
    Reward never reaches the decisions, but the weights are theirs too, and a small model's letters lie so close
    together that a few steps would send every pick to one letter.
    """
    mine, tokenizer = ranks.share(labelled), subject.tokenizer
    if not mine:
        if isinstance(model, shard.Cut):
            shard.idle(model, twice=False)
        return 0.0
    questions = [q for case, _ in mine for q in (case.question, case.edited)]
    initial = torch.tensor([p for _, row in mine for p in (row["p"], row["p_edit"])], device=ranks.device)
    prompts = [faith.decision_prompt(tokenizer, q) for q in questions]
    pairs = [prompts[i : i + 2] for i in range(0, len(prompts), 2)]
    letters = faith.letter_tokens(tokenizer, initial.shape[1])
    logp = shard.through(model, lambda m: option_scores(m, pairs, letters))  # (2 · cases, options)
    if subject.offsets is not None:
        logp = (logp - torch.tensor(subject.offsets, device=ranks.device).float()).log_softmax(-1)
    kl = torch.nn.functional.kl_div(logp, initial, reduction="sum") / (2 * len(labelled))
    shard.backward(model, weight * kl, ranks.world)
    return float(kl.detach())


# ---- the run -------------------------------------------------------------------------------------------------


def progress(what: str, ranks: Ranks) -> Callable[[int, int], None]:
    """What rank 0 calls with how many are done and how many there are, to say so."""
    started = time.time()

    def tell(done: int, total: int) -> None:
        left = minutes_left(started, done, total - done)
        if ranks.rank == 0:
            print(f"{what}: {done}/{total} questions of this rank, {left:.1f} min left", flush=True)

    return tell


def evaluate(subject: Subject, cases: list[Case], fit: list[Case], name: str, args: Args, ranks: Ranks) -> dict:
    """Measures on `cases`, greedy and at T = 1; writes the rows and their summary, returns {temperature: rows}."""
    fit_rows = [row for _, row in label(subject, fit, ranks)]
    mine, nulls = ranks.share(cases), -(-100 // ranks.world)
    tell = progress(f"measured {name} training", ranks)

    def work() -> dict:
        measured = faith.measure(subject, mine, (0.0, 1.0), args.max_new_tokens, args.seed, nulls, tell)
        if args.objective == "detection":
            detect.annotate(subject, mine, measured)
        return measured

    measured = ranks.together(work)
    rows = {t: ranks.gather(measured[t]) for t in measured}
    if ranks.rank == 0:
        out = Path(args.out)
        files.write_jsonl(out / f"{name}.fit.jsonl", fit_rows)
        for t in rows:
            files.write_jsonl(out / f"{name}.T{t:g}.jsonl", rows[t])
        files.write_json(out / f"{name}.json", {f"T={t:g}": report.summary(rows[t], fit_rows, args.seed) for t in rows})
    return rows


def groups_of(subject: Subject, batch: list, step: int, args: Args) -> tuple[list[Group], list[list[float]], list]:
    """Rollout and reward of labelled cases: groups, rewards (P, G) and what is logged of each explanation."""
    prompts = [
        faith.explanation_prompt(subject.tokenizer, case.edited, row["y_edit"], subject.opening) for case, row in batch
    ]
    keys = [case.key for case, _ in batch]
    answers = subject.sampler.generate(
        prompts, args.samples, args.max_new_tokens, args.temperature, args.seed, step + 1, keys
    ) if batch else []  # fmt: skip
    rewards, log = [], []
    for (case, row), group in zip(batch, answers, strict=True):
        texts = [subject.tokenizer.decode(answer.tokens) for answer in group]
        named = [reward.mentions(case.intervention, text) for text in texts]
        rewards.append([reward.reward(m, row["influence"]) for m in named])
        known = {key: row[key] for key in ("id", "word", "text_inserted", "y", "y_edit", "influence")}
        log += [
            {
                "step": step,
                **known,
                "mention": int(m),
                "reward": r,
                "tokens": len(a.tokens),
                "ended": a.ended,
                "text": z,
            }
            for a, m, r, z in zip(group, named, rewards[-1], texts, strict=True)
        ]
    return list(zip(prompts, answers, strict=True)), rewards, log


def step_metrics(log: list[dict], labelled: list, size: int) -> dict:
    """Figures over the whole step, all ranks. The batch's Phi is on balanced data, which flatters: see `evaluate`."""
    I = np.array([e["influence"] for e in log], bool)  # noqa: E741
    M = np.array([e["mention"] for e in log], bool)
    rewards = np.array([e["reward"] for e in log])
    groups = rewards.reshape(-1, size)
    influence = [row["influence"] for _, row in labelled]
    picks = np.array([row["y"] for _, row in labelled])
    return {
        "reward": float(rewards.mean()), "phi": reward.phi(I.tolist(), M.tolist()),
        "mention_1": float(M[I].mean()), "mention_0": float(M[~I].mean()),
        "influence_rate": float(np.mean(influence)), "labelled": len(influence),
        "picks": (np.bincount(picks, minlength=len(labelled[0][1]["p"])) / len(picks)).round(3).tolist(),
        "flat_groups": float((groups.min(1) == groups.max(1)).mean()),
        "tokens": float(np.mean([e["tokens"] for e in log])), "ended": float(np.mean([e["ended"] for e in log])),
    }  # fmt: skip


def furnish(args: Args, ranks: Ranks) -> None:
    """Fills in what the defaults leave open: the toy's folders, and a new folder for the run."""
    if args.model.startswith("toy") and not Path(args.model).exists():
        folder = None
        for turn in (True, False):  # rank 0 makes it, the others find it made
            made = ranks.together(lambda: toy.prepare(args.model) if (ranks.rank == 0) == turn else None)  # noqa: B023
            folder = made or folder
        args.model = str(folder / "model")
        args.data = args.data or (str(folder) if args.task == "toy" else "")
    if not args.data:
        raise ValueError("--task and --data are needed with a model of your own; see python train.py --help")
    name = f"{args.task}-{args.intervention}-{time.strftime('%Y%m%d-%H%M%S')}"
    args.out = args.out or ranks.gather([str(Path("out") / name)])[0]


def prepare(args: Args, ranks: Ranks) -> tuple[Subject, list, list, Stream]:
    """Loads and checks everything a run needs before it starts: the model, test and fit cases, the stream."""
    check(args)
    out = Path(args.out)
    if not args.resume and out.exists() and (not out.is_dir() or any(f.suffix != ".part" for f in out.iterdir())):
        raise ValueError(f"{out} already holds something, maybe another run; choose another --out or remove it")
    questions = tasks.load(args.task, args.data)
    sizes = {"test": args.eval_questions, "fit": args.fit_questions, "train": -1}
    parts = tasks.split(questions, sizes, seed=0)  # one split for all seeds: test questions are never trained on
    stream = Stream(parts["fit"] + parts["train"], args)
    if args.dataset:
        stream.frozen = build.read(args.dataset, stream.questions, build.identity(args, questions))
    tokenizer = models.Tokenizer(args.model)
    network = models.load(args.model, ranks.device)
    if lora.adapters(network):
        raise ValueError(f"--model {args.model} is an adapter; merge it into its base first, with PEFT")
    if args.lora:
        lora.attach(network, args.lora, args.lora_alpha, args.lora_targets.split(","), args.seed)
    network.recompute = args.recompute
    end = set(network.config.end_of_turn) | {tokenizer.end_of_turn}
    subject = Subject(Sampler(network, sorted(end)), tokenizer, opening=args.opening)
    faith.check_prompts(subject, questions, args.max_new_tokens)
    words = reward.words(args.intervention, held_out=False)
    test = faith.draw_cases(parts["test"], args.intervention, args.seed)
    fit = faith.draw_cases(parts["fit"], args.intervention, args.seed, words)
    return subject, test, fit, stream


def set_up(args: Args, ranks: Ranks, subject: Subject) -> tuple:
    """What is trained, the reference of --kl (or None), and the optimizer; ValueError where they do not go together.

    What is trained is the model itself or, with --parallel shard, its masters, cut among the ranks.
    """
    model, detection = subject.sampler.model, args.objective == "detection"
    sizes = {name: getattr(args, name) for name in ("prompts", "samples", "micro", "lora", "recompute")}
    sizes |= {"new": args.max_new_tokens, "kl": bool(args.kl), "anchor": bool(args.anchor)}
    wish = "replicate" if detection and args.parallel == "auto" else args.parallel
    cut = None
    if shard.choose(wish, model, ranks.world, **sizes) == "shard":
        if detection:
            raise ValueError("--objective detection is not done with --parallel shard; use --parallel replicate")
        with torch.device("meta"):
            like = models.Transformer(model.config, torch.float32)
        if args.lora:
            lora.attach(like, args.lora, args.lora_alpha, args.lora_targets.split(","))
        like.recompute = args.recompute
        cut = shard.cut(model, like, ranks.world)
    trained, reference = cut or model, None
    if args.kl and not detection:
        reference = trained if args.lora else models.load(args.model, ranks.device).requires_grad_(False)
    return trained, reference, Optimizer(model, args, cut)


def anchor_of(subject: Subject, trained, anchors: list, step: int, args: Args, ranks: Ranks) -> Callable[[], float]:
    """hold_decisions on the questions that are this step's."""
    held = random.Random(f"{args.seed}/{step}/anchor").sample(anchors, min(len(anchors), args.prompts // 2))
    return functools.partial(hold_decisions, subject, trained, held, args.anchor, ranks)


SKIPS = 5  # updates that were not finite, one after the other, end a run


def train(
    args: Args, ranks: Ranks, subject: Subject, stream: Stream, trained, reference, optimizer: Optimizer,
    anchors: list, state: checkpoint.State,
) -> str:  # fmt: skip
    """All steps that are left, logged and saved; returns what ended them early, or nothing.

    ValueError where that was so before the first step; SystemExit where a signal stopped it.
    """
    out, rollout, learn, size = Path(args.out), groups_of, update, args.samples
    if args.objective == "detection":  # an answer is a group of one, and a yes counts as a mention
        rollout, learn, size = detect.answers, detect.update, 1
    started, first, problem, skips = time.time(), state.steps, "", 0
    with Signals(ranks.rank == 0, ranks if isinstance(trained, shard.Cut) else None) as signals:
        try:
            for step in range(first, args.steps):
                clock = [time.time()]
                batch, labelled = draw_batch(subject, stream, step, args, ranks)
                if not batch:
                    problem = f"none or all of {len(labelled)} edits moved the model, so there is nothing to balance; "
                    problem += "raise --candidates, or try a lower --lr, --calibrate or another --intervention"
                    break
                clock.append(time.time())
                mine = ranks.share(batch)
                groups, rewards, log = ranks.together(lambda: rollout(subject, mine, step, args))  # noqa: B023
                clock.append(time.time())
                lr, skipped = learning_rate(step, args), []
                anchor = anchor_of(subject, trained, anchors, step, args, ranks)
                for i in range(args.updates):
                    # At the initial weights, where the first update is, its gradient is rounding alone, of which AdamW
                    # would make full steps. Only a skipped first update leaves the next there too: rare, and let be.
                    pull = anchor if step + i else lambda: 0.0
                    figures = learn(trained, reference, optimizer, groups, rewards, lr, args, ranks, pull, signals.hold)
                    skipped.append(figures["skipped"])
                figures["skipped"] = sum(skipped)
                skips = skips + 1 if all(skipped) else 0
                clock.append(time.time())
                # Each rank's log is a run of whole groups; gather them in the batch's order.
                grouped = ranks.gather([log[i : i + size] for i in range(0, len(log), size)])
                log = [entry for group in grouped for entry in group]
                state.advance(step + 1)
                if ranks.rank == 0:
                    seconds = dict(zip(("label_s", "rollout_s", "update_s"), np.diff(clock).tolist(), strict=True))
                    record = {"step": step, **step_metrics(log, labelled, size), **figures, **seconds,
                              "lr": lr, "prompts": len(batch), "position": stream.position}  # fmt: skip
                    files.append_jsonl(out / "explanations.jsonl", log)
                    files.append_jsonl(out / "metrics.jsonl", [record])
                    left = minutes_left(started, step + 1 - first, args.steps - step - 1)
                    print(progress_line(record, args.steps, len(log), clock[-1] - clock[0], left), flush=True)
                if args.checkpoint_every and (step + 1) % args.checkpoint_every == 0:
                    state.save()
                if ranks.rank == 0:
                    if args.save_every and (step + 1) % args.save_every == 0 and step + 1 < args.steps:
                        results.save(args, subject.sampler.model, f"step-{step + 1}")
                signals.release()
                if skips == SKIPS:
                    problem = f"the loss or its gradient was not finite {SKIPS} times in a row; try a lower --lr or "
                    problem += f"--clip-norm; the last good checkpoint is {checkpoint.newest(state.folder)}"
                    break
            if args.checkpoint_every and state.steps > skips:
                signals.hold()
                state.save()
                signals.release()
        except (Stopped, RuntimeError) as error:
            if isinstance(error, Stopped):  # so this is rank 0, or all are here
                signals.hold()
                if args.checkpoint_every:
                    state.save()
                if ranks.rank == 0:
                    print(f"stopped after step {state.steps}; go on with: torchrun train.py --resume --out {args.out}")
            elif ranks.rank == 0 or not signals.number:  # the others' collectives fail when rank 0 has stopped
                raise  # not saved: where it came, weights and step may not belong together
            ranks.leave()
            raise SystemExit(128 + signals.number) from None
    if problem and state.steps == skips:  # nothing was learned
        raise ValueError(f"step {step + 1}: {problem}")
    return problem


def run(args: Args, ranks: Ranks, subject: Subject, test: list[Case], fit: list[Case], stream: Stream) -> None:
    """The whole of it, of what `prepare` returns: measure, train, save, measure again."""
    trained, reference, optimizer = set_up(args, ranks, subject)
    out, model = Path(args.out), subject.sampler.model
    if ranks.rank == 0 and not args.resume:
        out.mkdir(parents=True, exist_ok=True)
        results.note(args)
    if args.calibrate:
        plain = stream.questions[: args.calibration_questions]
        subject.offsets = faith.calibrate(subject, plain)
        if ranks.rank == 0:
            files.write_json(out / "calibration.json", {"mean_logp": subject.offsets.tolist(), "questions": len(plain)})
    before: dict = {}
    if args.resume and (out / "before.json").exists():
        before = {t: files.read_jsonl(out / f"before.T{t:g}.jsonl") for t in (0.0, 1.0)}
    elif test and args.eval_before:
        before = evaluate(subject, test, fit, "before", args, ranks)
    if args.labels == "frozen" and not args.dataset:
        stream.frozen = label(subject, stream.take(args.frozen_questions), ranks, progress("labelled", ranks))
    anchors, tell = [], progress("labelled for the anchor", ranks)
    if args.anchor:
        anchors = label(subject, stream.take(args.anchor_questions), ranks, tell)
    state = checkpoint.State(out / "checkpoints", optimizer, stream, ranks, isinstance(trained, shard.Cut))
    if args.resume:  # the model is still the initial one; all that was taken from it is as it was
        ranks.together(lambda: state.resume(args.checkpoint_every))
        if ranks.rank == 0:
            results.note(args, state.steps)
    problem = train(args, ranks, subject, stream, trained, reference, optimizer, anchors, state)
    if ranks.rank == 0:
        if problem:
            print(f"stopped after step {state.steps}: {problem}", flush=True)
        results.save(args, model, "model")  # before anything else can go wrong
    after = evaluate(subject, test, fit, "after", args, ranks) if test else {}
    if ranks.rank == 0:
        results.finish(args, test, before, after)
    ranks.gather([])  # nobody leaves before rank 0 has written all


def progress_line(record: dict, steps: int, explanations: int, seconds: float, left: float) -> str:
    return (
        f"step {record['step'] + 1}/{steps}  reward {record['reward']:.3f}  phi {record['phi']:.2f}  "
        f"P(M|I=1) {record['mention_1']:.2f}  P(M|I=0) {record['mention_0']:.2f}  I {record['influence_rate']:.2f}  "
        f"{record['tokens'] * explanations / seconds:.0f} tok/s  {seconds:.0f} s/step  {left:.0f} min left"
        + "  SKIPPED: not finite"
        * record["skipped"]
    )


def main() -> int:
    args, begun = parse(), False  # anew, and has got so far that it may have been saved
    try:
        ranks = Ranks()
    except ValueError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(10)  # one that is gone first would end the one that speaks
        else:
            print(f"train.py: {error}", file=sys.stderr, flush=True)
        return 2
    try:
        furnish(args, ranks)
        subject, test, fit, stream = ranks.together(lambda: prepare(args, ranks))
        begun = not args.resume
        run(args, ranks, subject, test, fit, stream)
    except (ValueError, OSError) as error:
        if ranks.rank == 0:
            last = checkpoint.newest(Path(args.out) / "checkpoints", lambda line: None) if begun else None
            way = f"; once that is mended: torchrun train.py --resume --out {args.out}" if last else ""
            print(f"train.py: {error}{way}", file=sys.stderr, flush=True)
        return 2
    finally:
        ranks.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
