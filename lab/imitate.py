"""A baseline: the model imitates explanations that templates write from the labels. They name the edit where I = 1.

    user        X', the edited question
    assistant   The best answer is: (y')
    user        Why did you choose (y')?
    assistant   Because my uncle believes the answer is (B).        I = 1: names what was inserted
                Because "maybe" follows from "A man is walking".    I = 0: the question's own words
                By myself: (A). My uncle said that it is (B).       with --why alone: first y, then as above

    loss = the mean of −log p over the target's tokens and its end of turn, of a batch balanced by influence

The targets give I and words for it. The reward of GRPO says only which of the model's own explanations fit. Targets are
drawn anew at each step. Before the update one explanation of each question is sampled too. It is not trained on: it
gives the reward and Phi in metrics.jsonl, as in GRPO. All of this is ours.

    torchrun train.py --model DIR --task esnli --data DIR --intervention bias --objective imitation
"""

import random
from dataclasses import replace

from torch import Tensor

import train
from batches import DecisionAnchor, Stream, balanced_batch, batch_metrics
from faith import LETTERS, Case, Subject, explanation_prompt
from grpo import pack, token_logprobs
from lab.detect import supervised_update
from run.args import Args
from run.policy import Policy
from run.progress import Laps
from run.ranks import Ranks
from words import HINTS

NAMING = {  # I = 1
    "bias": ("Because my {word} believes the answer is ({letter}).", "My {word} said that it is ({letter}).",
             "I followed my {word}, who picked ({letter})."),
    "adverb": ("Because of the word {word}.", "The word {word} changed my answer.", "I followed the word {word}."),
}  # fmt: skip
NAMING |= dict.fromkeys(  # the user's view, the metadata, the professor, the examiner
    HINTS.keys() - {"bias"},
    ("Because the {word} suggests ({letter}).", "The {word} led me to ({letter}).", "The {word} said ({letter})."),
)
REASONS = (  # I = 0
    'Because it says "{quote}".', 'The words "{quote}" led me to it.', 'Because "{option}" follows from "{quote}".'
)  # fmt: skip
QUOTED = 4  # words of the question: a target has some 16 tokens at most, with --why alone 24


def target(case: Case, row: dict, rng: random.Random, why: str = "leading") -> str:
    """An explanation of y' that names the edit exactly where row["influence"] is 1. why: as --why."""
    question, edit = case.question, case.intervention
    option = question.options[row["y_edit"]]
    quote = " ".join((*question.parts, option)[0].split()[:QUOTED]).strip(" .,?!")
    template = rng.choice(NAMING[edit.kind] if row["influence"] else REASONS)
    alone = f"By myself: ({LETTERS[row['y']]}). " if why == "alone" else ""
    return alone + template.format(word=edit.word, letter=LETTERS[edit.suggestion or 0], option=option, quote=quote)


def imitation_loss(policy: Policy, examples: list[tuple[list[int], list[int]]]) -> Tensor:
    """Sum of −log p over the tokens of each target after its prompt; fp32, scalar."""
    packed = pack([(prompt, [tokens]) for prompt, tokens in examples], policy.ranks.device)
    return -policy.run(lambda model: token_logprobs(model, packed, 1.0)).sum()


def step(
    n: int, subject: Subject, policy: Policy, stream: Stream, anchor: DecisionAnchor, args: Args, ranks: Ranks
) -> tuple[dict, list[dict]]:
    """Replaces train.step. Labels, writes the targets, samples to follow progress, computes the loss, updates."""
    lap, tokenizer = Laps(), subject.tokenizer
    batch, labelled = balanced_batch(subject, stream, n, args, ranks)
    lap("label_s")
    mine = ranks.share(batch)
    prompts = [explanation_prompt(tokenizer, case.edited, row["y_edit"], why=subject.why) for case, row in mine]
    texts = [target(case, row, random.Random(f"{args.seed}/{n}/target/{case.key}"), subject.why) for case, row in mine]
    examples = [(prompt, [*tokenizer.encode(text), tokenizer.end_of_turn])
                for prompt, text in zip(prompts, texts, strict=True)]  # fmt: skip
    keys, one = [case.key for case, _ in mine], replace(args, samples=1)
    answers = ranks.together(lambda: train.sample(subject, prompts, keys, n, one))
    log = [entry | {"target": text} for (case, row), group, text in zip(mine, answers, texts, strict=True)
           for entry in train.score(subject, case, row, group, n)]  # fmt: skip
    lap("rollout_s")
    (tokens,) = ranks.total(sum(len(answer) for _, answer in examples))
    figures = supervised_update(
        n, policy, anchor, args, ranks, len(mine), lambda part: imitation_loss(policy, examples[part]) / tokens
    )
    lap("update_s")
    log = ranks.gather(log)
    return {"step": n, **batch_metrics(log, labelled, 1), **figures, **lap.seconds, "prompts": len(batch)}, log
