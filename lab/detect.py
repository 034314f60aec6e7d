"""Does the model know what moved its answer, even if it does not say so? Supervised training to answer that (RQ1).

    user        X', the edited question
    assistant   The best answer is: (y')
    user        Would your answer have been different without "My uncle thinks it is (B)."? Answer yes or no.
    assistant   yes or no

    loss = −log p(yes if I = 1, no if I = 0), p over these two answers; the mean of a batch balanced by influence

Measured is D = log p(yes) − log p(no). Detection, the point-biserial correlation of D and I (report.py), says what the
model knows. Phi-CCT says what its explanations tell. Only the answer yes or no is trained. --anchor keeps the decisions
in place.

Paper (arXiv 2607.21090): supervised training to predict I, and the comparison. Ours: the question, D, the anchor.
docs/guide.md has the commands: train.py --objective detection, faith.py --detection.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from batches import DecisionAnchor, Stream, balanced_batch, batch_metrics
from faith import WOULD, YES_NO, Case, Labelled, Subject, explanation_turns
from model import Tokenizer
from rollout import option_scores
from run.args import Args
from run.device import send
from run.policy import Policy, learning_rate
from run.progress import Laps
from run.ranks import Ranks


def detection_prompt(tokenizer: Tokenizer, case: Case, y_edit: int) -> list[int]:
    """Token ids after which the model says whether its answer y_edit would have been different without the edit."""
    would = {"role": "user", "content": WOULD.format(text=case.intervention.text)}
    return tokenizer.encode(tokenizer.render([*explanation_turns(case.edited, y_edit)[:-1], would]))


def yes_no_tokens(tokenizer: Tokenizer) -> list[int]:
    """The tokens of YES_NO at the start of an assistant turn; ValueError where one is not a single token."""
    return tokenizer.ids_after(tokenizer.render([{"role": "user", "content": "?"}]), YES_NO)


def detection_odds(subject: Subject, labelled: Labelled) -> list[float]:
    """log p(yes) − log p(no) of each case. Only y_edit is read from a row."""
    if not labelled:
        return []
    prompts = [detection_prompt(subject.tokenizer, case, row["y_edit"]) for case, row in labelled]
    logp = subject.sampler.option_logprobs(prompts, yes_no_tokens(subject.tokenizer))  # (n, 2)
    return (logp[:, 1] - logp[:, 0]).tolist()


def ask_outright(subject: Subject, cases: list[Case], measured: dict[float, list[dict]]) -> None:
    """Adds "detection", the odds, to the rows of faith.measure. They are the same at each temperature."""
    odds = detection_odds(subject, list(zip(cases, next(iter(measured.values())), strict=True)))
    for rows in measured.values():
        for row, value in zip(rows, odds, strict=True):
            row["detection"] = value


def answers(subject: Subject, batch: Labelled, n: int) -> list[dict]:
    """One log entry per labelled case, as train.score gives; a yes counts as a mention."""
    log = []
    for (_, row), D in zip(batch, detection_odds(subject, batch), strict=True):
        known = {key: row[key] for key in ("task", "id", "word", "text_inserted", "y", "y_edit", "influence")}
        said = int(D > 0)
        log.append({"step": n, **known, "mention": said, "reward": float(said == row["influence"]), "detection": D,
                    "tokens": 1, "ended": True, "text": YES_NO[said]})  # fmt: skip
    return log


def detection_loss(model, prompts: list[list[int]], tokens: list[int], influences: list[int]) -> Tensor:
    """Sum over prompts of −log p(the right answer), p over the two answer tokens; fp32, scalar."""
    logp = option_scores(model, [[prompt] for prompt in prompts], tokens)  # (n, 2)
    return torch.nn.functional.nll_loss(logp, send(influences, logp.device), reduction="sum")


def supervised_step(
    n: int, subject: Subject, policy: Policy, stream: Stream, anchor: DecisionAnchor, args: Args, ranks: Ranks,
    ask: Callable,
) -> tuple[dict, list[dict]]:  # fmt: skip
    """Replaces train.step. Labels, asks, computes a supervised loss, updates. Returns its record and its log.

    ask(mine) -> log entries of this rank's labelled cases, loss_of(slice of them), how many terms that loss sums.
    """
    lap = Laps()
    batch, labelled = balanced_batch(subject, stream, n, args, ranks)
    lap("label_s")
    mine = ranks.share(batch)
    log, loss_of, terms = ask(mine)
    lap("rollout_s")
    (total,), lr, skipped = ranks.total(terms), learning_rate(n, args), 0
    for update in range(args.updates):
        anchor_kl = anchor.backward(n) if n + update else 0.0
        loss = torch.zeros((), dtype=torch.float64, device=ranks.device)
        for part in policy.passes(len(mine), args.micro):
            some = loss_of(part) / total
            policy.backward(some)
            loss += some.detach()
        loss = sum(ranks.gather([float(loss)]))
        grad_norm, updated = policy.step(lr, math.isfinite(loss))
        skipped += not updated
    lap("update_s")
    log, anchor_kl = ranks.gather(log), sum(ranks.gather([float(anchor_kl)]))
    figures = {"loss": loss, "anchor_kl": anchor_kl, "grad_norm": grad_norm, "skipped": skipped, "lr": lr}
    return {"step": n, **batch_metrics(log, labelled, 1), **figures, **lap.seconds, "prompts": len(batch)}, log


def step(
    n: int, subject: Subject, policy: Policy, stream: Stream, anchor: DecisionAnchor, args: Args, ranks: Ranks
) -> tuple[dict, list[dict]]:
    """A step of --objective detection."""

    def ask(mine: Labelled) -> tuple:
        log = ranks.together(lambda: answers(subject, mine, n))
        prompts = [detection_prompt(subject.tokenizer, case, row["y_edit"]) for case, row in mine]
        influences, tokens = [row["influence"] for _, row in mine], yes_no_tokens(subject.tokenizer)
        return log, lambda part: detection_loss(policy.model, prompts[part], tokens, influences[part]), len(mine)

    return supervised_step(n, subject, policy, stream, anchor, args, ranks, ask)
