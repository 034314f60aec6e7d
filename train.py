"""GRPO by hand: train a model to name an edit exactly when it moved the answer. `step` below is the whole method.

    label      edit questions, see which edits move the *current* model, take half and half     (batches.py)
    sample     a group of explanations of each                                                  (rollout.py)
    reward     r = 1[mention = influence] per explanation                                       (reward.py)
    advantage  A = (r − mean of its group) / std of its group                                   (grpo.py)
    loss       −min(ρ A, clip(ρ) A) per explanation token, ρ = exp(logp − logp when sampled), + β KL
    update     AdamW on fp32 weights                                                            (run/policy.py)

Only the explanation is trained, including its end-of-turn token. The reward does not train the decision. What a run
does around this, such as measuring before and after, is in lab/experiment.py.

Paper (arXiv 2607.21090): GRPO, the reward, frozen labels. Ours: on-policy labels (the default), the loss's
normalisations (GRPO 2402.03300, DAPO 2503.14476, Dr. GRPO 2503.20783), all hyperparameters.

    torchrun train.py                                 the embedded toy
    torchrun train.py --model DIR --task esnli --data DIR --intervention bias --out out/bias
    torchrun --nproc-per-node 2 train.py …            data-parallel, same result up to rounding

Axes: G group (explanations of a question), M explanation tokens in a micro-batch.
"""

from run import early  # noqa: F401

# isort: split
import math
import sys
from pathlib import Path

import torch

import model as models
import reward
import toy
from batches import DecisionAnchor, NothingToBalance, Stream, balanced_batch, batch_metrics
from faith import Case, Subject, explanation_prompt
from grpo import Packed, advantages, informative, kl_k3, pack, policy_loss, token_logprobs, token_weights
from rollout import Completion
from run import checkpoint, files, results
from run.args import Args, parse
from run.checkpoint import RunState
from run.device import send
from run.policy import Policy, learning_rate
from run.progress import Laps, Progress, command
from run.ranks import Ranks
from run.stats import LossStats
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
    metrics = batch_metrics(log, labelled, args.samples)
    return {"step": n, **metrics, **figures, **lap.seconds, "prompts": len(batch)}, log


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
    sizes = args.samples, args.max_new_tokens, args.temperature
    return subject.sampler.generate(prompts, *sizes, args.seed, n + 1, keys) if prompts else []


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
            if ranks.rank == 0 and args.save_every and (n + 1) % args.save_every == 0:
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


@command("train.py", ranks=True)
def main(argv: list[str] | None = None) -> None:
    from lab import experiment  # here, because lab imports this file

    experiment.run(parse(argv, {}, toy.SETTINGS), step, train)


if __name__ == "__main__":
    sys.exit(main())
