"""The batch of a training step: edited questions, their labels under the model, half with influence and half without.

Half and half matters: on such a batch "always mention" and "never mention" both earn 0.5. A fork changes here which
questions a step trains on and which model labels them.

Paper (arXiv 2607.21090): labels computed once by the initial model (frozen), balanced. Ours: labels of the current
model (on-policy), and the decision anchor.
"""

import itertools
import random

import numpy as np
import torch

import faith
import reward
import tasks
from faith import Case, Labelled, Subject
from rollout import option_scores
from run.args import Args, turns
from run.device import send
from run.policy import Policy
from run.ranks import Ranks


class NothingToBalance(ValueError):
    """Of each task and kind, none or all labelled edits changed the model's answer."""


class Stream:
    """Edited training questions in an endless stream: each epoch in a new order, with new edits.

    Each task has epochs of its own, so its questions and edits come as in a run of that task alone.
    """

    def __init__(self, questions: list[tasks.Question], args: Args, kept_back=()):
        """kept_back: the test questions of the run, which are never trained on."""
        self.questions, self.kept_back, self.kind, self.seed = questions, kept_back, args.intervention, args.seed
        self.words = reward.words(args.intervention, held_out=False)
        self.of = tasks.by_task(questions)
        self.turns = turns(",".join(self.of), args.mix)
        self.drawn = 0  # cases handed out so far
        self.taken = dict.fromkeys(self.of, 0)  # questions of each task that were taken for them
        self.order: dict[str, list] = {}  # the questions of each task, as their epoch has them
        self.frozen: Labelled = []  # unless labels are on-policy: cases labelled by the initial model

    def next_cases(self, n: int, task: str = "") -> list[Case]:
        """The next n cases of a task, or of all tasks by turns."""
        return [self.next_case(task or self.turns[self.drawn % len(self.turns)]) for _ in range(n)]

    def next_case(self, task: str) -> Case:
        """The task's next case; questions without a place for an edit are passed over."""
        for _ in range(2 * len(self.of[task])):  # so far apart can a question's turns in two epochs be
            epoch, place = divmod(self.taken[task], len(self.of[task]))
            if place == 0 or task not in self.order:
                self.order[task] = tasks.shuffled(self.of[task], self.seed + epoch)
            self.taken[task] += 1
            for case in faith.draw_cases([self.order[task][place]], self.kind, self.seed * 1000 + epoch, self.words):
                self.drawn += 1
                return case
        raise ValueError(f"no training question of {task} has a place for an edit; choose another --intervention")

    def position(self) -> dict:
        """Where the stream stands, for a checkpoint."""
        return {"drawn": self.drawn, "taken": dict(self.taken)}

    def resume_at(self, drawn: int, taken: dict) -> None:
        self.drawn, self.taken, self.order = drawn, dict(taken), {}


def label(subject: Subject, cases: list[Case], ranks: Ranks, progress=lambda done, total: None) -> Labelled:
    """Each case with its decision row under the current model. The ranks share the work."""
    mine = ranks.share(cases)
    rows = ranks.together(lambda: faith.decision_rows(subject, mine, progress))
    return list(zip(cases, ranks.gather(rows), strict=True))


def balance(labelled: Labelled, size: int) -> Labelled:
    """The first size/2 cases with influence and as many without, alternating; fewer of both where there are too few.

    Several interventions take turns at the pairs. Each is balanced by itself, so that none reveals influence.
    """
    pairs = []
    for kind in dict.fromkeys(row["kind"] for _, row in labelled):
        moved, unmoved = ([p for p in labelled if p[1]["kind"] == kind and p[1]["influence"] == i] for i in (1, 0))
        pairs.append(list(zip(moved, unmoved, strict=False)))
    turns = [both for some in itertools.zip_longest(*pairs) for both in some if both]
    return [pair for both in turns[: size // 2] for pair in both]


def shuffle_influence(labelled: Labelled, seed: int) -> Labelled:
    """The same cases with I permuted within each task and kind, uncorrelated with the true I: a control. y, y' stay.

    A plain permutation is correlated by chance, and GRPO learns from as little as 0.12 (docs/log.md).
    """
    chosen: set[int] = set()
    parts = [(case.question.task, case.intervention.kind) for case, _ in labelled]
    for part in dict.fromkeys(parts):
        mine = [(n, row["influence"]) for n, (_, row) in enumerate(labelled) if parts[n] == part]
        moved, unmoved = ([n for n, influence in mine if influence == value] for value in (1, 0))
        rng, both = random.Random(f"{seed}/shuffled/{part}"), round(len(moved) ** 2 / len(mine))
        chosen |= {*rng.sample(moved, both), *rng.sample(unmoved, len(moved) - both)}
    return [(case, {**row, "influence": int(n in chosen)}) for n, (case, row) in enumerate(labelled)]


def balanced_batch(subject: Subject, stream: Stream, step: int, args: Args, ranks: Ranks) -> tuple[Labelled, Labelled]:
    """The step's balanced batch, and all cases that were labelled to find it; NothingToBalance where there is none.

    The tasks take turns at pairs (one case with influence, one without), so each task is balanced by itself. The turns
    go on from step to step. A task with too few of either has fewer pairs in this batch.
    """
    pairs, batch, labelled = args.prompts // 2, [], []
    tasks_of_pairs = [stream.turns[n % len(stream.turns)] for n in range(step * pairs, (step + 1) * pairs)]
    frozen = random.Random(f"{args.seed}/{step}").sample(stream.frozen, len(stream.frozen))
    for task in dict.fromkeys(tasks_of_pairs):
        size, found = 2 * tasks_of_pairs.count(task), [pair for pair in frozen if pair[0].question.task == task]
        while args.labels == "on-policy" and len(balance(found, size)) < size and len(found) < args.candidates:
            cases = stream.next_cases(min(2 * size, args.candidates - len(found)), task)
            found += label(subject, cases, ranks)
        batch += balance(found, size)
        labelled += found
    if not batch:
        why = f"none or all of {len(labelled)} edits moved the model, so there is nothing to balance"
        raise NothingToBalance(f"{why}; raise --candidates, or try a lower --lr, --calibrate or another --intervention")
    return batch, labelled


def batch_metrics(log: list[dict], labelled: Labelled, samples: int) -> dict:
    """Figures of a whole step, from its explanations (`samples` in a row per case) and the cases that were labelled.

    Phi of a balanced batch is usually higher than at the natural rate, which before.json and after.json have.
    """
    I = np.array([e["influence"] for e in log], bool)  # noqa: E741
    M = np.array([e["mention"] for e in log], bool)
    rewards = np.array([e["reward"] for e in log])
    groups = rewards.reshape(-1, samples)
    influence = [row["influence"] for _, row in labelled]
    picks, options = np.array([row["y"] for _, row in labelled]), max(len(row["p"]) for _, row in labelled)
    figures = {
        "reward": float(rewards.mean()), "phi": reward.phi(I.tolist(), M.tolist()),
        "mention_1": float(M[I].mean()), "mention_0": float(M[~I].mean()),
        "influence_rate": float(np.mean(influence)), "labelled": len(influence),
        "picks": (np.bincount(picks, minlength=options) / len(picks)).round(3).tolist(),
        "flat_groups": float((groups.min(1) == groups.max(1)).mean()),
        "tokens": float(np.mean([e["tokens"] for e in log])), "ended": float(np.mean([e["ended"] for e in log])),
    }  # fmt: skip
    for key in ("task", "kind"):
        parts = {(row["id"], row["text_inserted"]): row[key] for _, row in labelled}
        known = dict.fromkeys(parts.values())
        for part in known if len(known) > 1 else ():  # one may have no pair in this batch
            mine = [e for e in log if parts[e["id"], e["text_inserted"]] == part]
            moved = [row["influence"] for _, row in labelled if row[key] == part]
            phi = reward.phi([e["influence"] for e in mine], [e["mention"] for e in mine])
            figures |= {f"prompts.{part}": len(mine) // samples, f"phi.{part}": phi,
                        f"labelled.{part}": len(moved), f"influence_rate.{part}": float(np.mean(moved))}  # fmt: skip
    return figures


class DecisionAnchor:
    """KL(initial ‖ current) of the probabilities of the letters, on some training questions at each step.

    The reward never reaches the decisions, but they come from the same weights. A small model's letters are so close
    in probability that a few steps would send every pick to one letter.
    """

    def __init__(self, subject: Subject, policy: Policy, labelled: Labelled, args: Args, ranks: Ranks):
        """labelled: cases with the rows that the initial model gave them; none: no anchor."""
        self.subject, self.policy, self.labelled, self.args, self.ranks = subject, policy, labelled, args, ranks

    def backward(self, step: int) -> torch.Tensor:
        """Backpropagates --anchor · mean KL(initial ‖ current) of the cases; returns this rank's part of the mean."""
        size = min(len(self.labelled), self.args.prompts // 2)
        cases = random.Random(f"{self.args.seed}/{step}/anchor").sample(self.labelled, size)
        mine, mean = self.ranks.share(cases), torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for part in self.policy.passes(len(mine), self.args.micro, with_reference=False):
            kl = self.divergence(mine[part]) / (2 * len(cases))
            self.policy.backward(self.args.anchor * kl)
            mean += kl.detach()
        return mean

    def divergence(self, labelled: Labelled) -> torch.Tensor:
        """KL(initial ‖ current) over the letters, summed over X and X' of all cases, which are scored in one pass."""
        device, tokenizer = self.ranks.device, self.subject.tokenizer
        shift = faith.shifts(self.subject, [q for case, _ in labelled for q in (case.question, case.edited)])
        initial = np.zeros_like(shift)
        for place, p in zip(initial, (row[name] for _, row in labelled for name in ("p", "p_edit")), strict=True):
            place[: len(p)] = p
        pairs = [[faith.decision_prompt(tokenizer, q) for q in (case.question, case.edited)] for case, _ in labelled]
        letters = faith.letter_tokens(tokenizer, shift.shape[1])
        logp = self.policy.run(lambda model: option_scores(model, pairs, letters))  # (2 · cases, most options)
        if shift.any():
            logp = (logp - send(shift, device).float()).log_softmax(-1)
        return torch.nn.functional.kl_div(logp, send(initial, device).float(), reduction="sum")
