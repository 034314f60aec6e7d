"""An upper bound: of N explanations of each question, the one that the reward likes best.

    z'_1 … z'_N   sampled at T = 1; z'_1 is the sample of a measurement at T = 1
    z'            the first of them with M = I, or z'_1 if none has

The choice reads I, so no model has these figures. They say how far choosing among a model's own explanations can go.
Where all N samples of a question name the edit, or none does, there is nothing to choose. The mean reward of all N is
that of a random sample. All of this is ours.

    python faith.py --model DIR --task esnli --data DIR --intervention bias --best-of 8
"""

import numpy as np

import faith
import report
from faith import Labelled, Subject
from reward import reward

BLOCK = {
    "phi": "Phi-CCT",
    "mention_if_flip": "P(M|I=1)",
    "mention_if_same": "P(M|I=0)",
    "reward": "reward",
    "reward_random": "reward of a random sample",
}


def measure(subject: Subject, labelled: Labelled, count: int, max_new_tokens: int, seed: int = 0,
            progress=lambda done, total: None, temperature: float = 1.0) -> list[dict]:  # fmt: skip
    """The row of the best of `count` explanations of each case, as in faith.measure. mentions: M of each sample."""
    rows, how = [], (subject.opening, subject.why)
    for start in range(0, len(labelled), 64):
        block = labelled[start : start + 64]
        prompts = [faith.explanation_prompt(subject.tokenizer, c.edited, row["y_edit"], *how) for c, row in block]
        keys = [case.key for case, _ in block]
        groups = subject.sampler.generate(prompts, count, max_new_tokens, temperature, seed, keys=keys)
        for (case, row), group in zip(block, groups, strict=True):
            told = [faith.explanation_row(subject, case, answer, seed) for answer in group]
            best = max(told, key=lambda one: reward(one["mention"], row["influence"]))  # the first of equals
            rows.append(row | best | {"mentions": [one["mention"] for one in told]})
        progress(len(rows), len(labelled))
    return rows


def figures(rows: list[dict], fit_rows: list[dict], seed: int = 0) -> dict[str, dict]:
    """report.summary of the rows of `measure`, with `reward.reward` of the best and the mean of all samples."""
    best = np.array([reward(row["mention"], row["influence"]) for row in rows])
    samples = np.array([np.mean([reward(m, row["influence"]) for m in row["mentions"]]) for row in rows])
    groups = np.array([row["group"] for row in rows])
    both = {"reward": best, "reward_random": samples}
    means = report.intervals(lambda w: {k: report.mean(v, w) for k, v in both.items()}, groups, seed, 2000)
    return report.summary(rows, fit_rows, seed) | means
