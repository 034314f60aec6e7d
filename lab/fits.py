"""Do the questions fit the model? Checked before any long work, with the longest hints."""

from dataclasses import replace

import faith
import reward
from faith import Subject
from tasks import Question


def longest(subject: Subject, questions: list[Question], kinds: str = "bias") -> list[tuple[Question, list[int]]]:
    """Questions with the longest hint of these kinds and their explanation prompts, the longest prompt last.

    Only the 64 questions with the most bytes are tokenised.
    """
    hints = [kind for kind in reward.kinds(kinds) if kind != "adverb"] or ["bias"]  # an adverb is shorter than any
    texts = [reward.sentence(kind, word, "A", n) for kind in hints for word in reward.words(kind)
             for n in range(len(reward.HINTS[kind].phrasings))]  # fmt: skip
    appeal = max(texts, key=lambda text: len(subject.tokenizer.encode(text)))
    most = sorted(questions, key=lambda q: sum(len(t.encode()) for t in q.parts + q.options))[-64:]
    asked = [replace(q, appeal=appeal) for q in most]
    prompts = [faith.explanation_prompt(subject.tokenizer, q, 0, subject.opening, subject.why) for q in asked]
    return sorted(zip(asked, prompts, strict=True), key=lambda pair: len(pair[1]))


def check_prompts(subject: Subject, questions: list[Question], max_new_tokens: int, kinds: str = "bias") -> None:
    """Raises ValueError early if an option letter is several tokens or a question does not fit into the context.

    Also if the toy is to be asked with a kind of hint that its world does not have.
    """
    if any(q.task == "toy" for q in questions) and (odd := {*reward.kinds(kinds)} - {"adverb", "bias"}):
        raise ValueError(f"the toy's world has no {' or '.join(sorted(odd))}; give --intervention adverb or bias")
    faith.decide(subject, [max(questions, key=lambda q: len(q.options))])
    prompts = [prompt for _, prompt in longest(subject, questions, kinds)]
    try:
        subject.sampler.check(prompts, max_new_tokens)
    except ValueError as error:
        raise ValueError(f"the data has questions that are too long: {error}") from None
