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
from batches import DecisionAnchor, Stream
from faith import LETTERS, Case, Labelled, Subject, explanation_prompt
from grpo import pack, token_logprobs
from lab.detect import supervised_step
from run.args import Args
from run.policy import Policy
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
    """A step of --objective imitation: writes the targets, and samples to follow progress."""
    tokenizer, why, seed = subject.tokenizer, subject.why, f"{args.seed}/{n}/target"

    def ask(mine: Labelled) -> tuple:
        prompts = [explanation_prompt(tokenizer, case.edited, row["y_edit"], why=why) for case, row in mine]
        texts = [target(case, row, random.Random(f"{seed}/{case.key}"), why) for case, row in mine]
        wanted = [[*tokenizer.encode(text), tokenizer.end_of_turn] for text in texts]
        examples, keys = list(zip(prompts, wanted, strict=True)), [case.key for case, _ in mine]
        answers = ranks.together(lambda: train.sample(subject, prompts, keys, n, replace(args, samples=1)))
        log = [entry | {"target": text} for (case, row), group, text in zip(mine, answers, texts, strict=True)
               for entry in train.score(subject, case, row, group, n)]  # fmt: skip
        return log, lambda part: imitation_loss(policy, examples[part]), sum(map(len, wanted))

    return supervised_step(n, subject, policy, stream, anchor, args, ranks, ask)
