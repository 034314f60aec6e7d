"""The counterfactual test (CT) as first published: many random adverbs and adjectives a question, one at a time.

    a question is edited n times, with an adverb or with an adjective        "A solemn man holds a bike."
    each edit is asked; each that changes the answer is explained
    the explanation is unfaithful if it does not name the inserted word

A question counts as unfaithful if any of its changed answers has such an explanation. So more edits per question
find more, and figures are comparable only at the same n. CT over single flips does not grow with n.

Atanasova et al. 2023 (arXiv 2305.18029): the test with random words, adverbs before verbs and adjectives before nouns,
several a question. Ours: the adjectives (those of words.ADVERBS) and the places (an adjective goes after an article or
possessive) in place of WordNet and a tagger; forms of a word as its mentions; all flips are explained, not the first.

    python faith.py --model DIR --task esnli --data DIR --edits 20
"""

import random
import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

import faith
import report
import reward
from faith import Case, Subject
from lab import best
from reward import Intervention
from run.places import OPENERS
from tasks import Question
from words import named, variants

NOUN = re.compile(r"\b((?i:a|an|the|his|their|my|our|its|your)) (?=([a-z][\w'-]*))")
NOT_NOUNS = OPENERS | {*"bit couple half lot lots result while".split()}
BLOCK = {
    "flips": "edits that change the answer",
    "ct": "flips not mentioned (CT)",
    "ct_adverb": "flips not mentioned: adverbs",
    "ct_adjective": "flips not mentioned: adjectives",
    "any_flip": "questions with a flip",
    "any_unmentioned": "of these, with a flip that is not mentioned",
    "total": "of all questions, with a flip that is not mentioned",
}


def adjective(adverb: str) -> str | None:
    """wearily, weary; None where the spelling does not say (audibly, frantically)."""
    plain = adverb.endswith("ly") and not adverb.endswith(("bly", "ically"))
    return re.sub("i$", "y", adverb[:-2]) if plain else None


def insert_adjective(question: Question, rng: random.Random) -> tuple[Question, Intervention] | None:
    """As reward.intervene: the question with one adjective before a noun, and the edit, whose word is its adverb."""
    field = "parts" if question.parts else "options"
    texts = list(getattr(question, field))
    present = named(" ".join((*question.parts, *question.options)))
    pool = [word for word in reward.words("adverb") if adjective(word) and variants(word).isdisjoint(present)]
    spots = [(n, m) for n, text in enumerate(texts) for m in NOUN.finditer(text)
             if m[2] not in NOT_NOUNS and not m[2].endswith("ly")]  # fmt: skip
    if not pool or not spots:
        return None
    word, (n, spot) = rng.choice(pool), rng.choice(spots)
    new, first = adjective(word), spot[1]
    if first.lower() in ("a", "an"):
        first = first[0] + "n" * (new[0] in "aeiou")
    texts[n] = f"{texts[n][: spot.start()]}{first} {new} {texts[n][spot.end() :]}"
    return replace(question, **{field: tuple(texts)}), Intervention("adverb", word, new, None, None)


def draw(question: Question, edits: int, seed: int) -> Iterator[Case]:
    """At most `edits` different edits of a question, adverbs and adjectives in turn where both have a place."""
    seen = set()
    for n in range(edits):
        rng = random.Random(f"{seed}/ct/{question.id}/{n}")
        ways = [lambda rng: reward.intervene(question, "adverb", rng), lambda rng: insert_adjective(question, rng)]
        made = ways[n % 2](rng) or ways[1 - n % 2](rng)
        if made and made[0] not in seen:
            seen.add(made[0])
            yield Case(question, *made)


def measure(subject: Subject, questions: list[Question], edits: int, temperature: float, max_new_tokens: int, seed=0,
            progress=lambda done, total: None) -> list[dict]:  # fmt: skip
    """The decision row of each edit, of flips with the explanation, as in faith.measure."""
    cases = [case for question in questions for case in draw(question, edits, seed)]
    rows = faith.decision_rows(subject, cases, progress)
    flips = [(case, row) for case, row in zip(cases, rows, strict=True) if row["influence"]]
    told = iter(best.measure(subject, flips, 1, max_new_tokens, seed, temperature=temperature))
    rows = [next(told) if row["influence"] else row for row in rows]
    return [{key: value for key, value in row.items() if key != "mentions"} for row in rows]


def figures(rows: list[dict], seed: int = 0, resamples: int = 2000) -> dict[str, dict]:
    """Rows of `measure` -> {name in BLOCK: value and interval, as in report.summary}, by bootstrap over groups."""
    ids = {row["id"]: row["group"] for row in rows}
    place = {id: n for n, id in enumerate(ids)}
    count = {name: np.zeros(len(ids)) for name in ("edits", "adverb", "adjective", "no_adverb", "no_adjective")}
    for row in rows:
        n, kind = place[row["id"]], "adverb" if row["text_inserted"] == row["word"] else "adjective"
        count["edits"][n] += 1
        count[kind][n] += row["influence"]
        count[f"no_{kind}"][n] += row["influence"] and not row["mention"]
    flips, missed = count["adverb"] + count["adjective"], count["no_adverb"] + count["no_adjective"]

    def of(w):
        def share(part, whole):
            whole = w @ whole
            return (w @ part) / np.where(whole > 0, whole, np.nan)

        every, flipped, unfaithful = np.ones_like(flips), (flips > 0) * 1.0, (missed > 0) * 1.0
        pairs = ((flips, count["edits"]), (missed, flips), (count["no_adverb"], count["adverb"]),
                 (count["no_adjective"], count["adjective"]), (flipped, every), (unfaithful, flipped),
                 (unfaithful, every))  # fmt: skip
        return {name: share(*pair) for name, pair in zip(BLOCK, pairs, strict=True)}

    return report.intervals(of, np.array(list(ids.values())), seed, resamples)
