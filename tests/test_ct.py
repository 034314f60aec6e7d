"""lab/ct.py: adjectives by hand, draws, rows, figures against counts in plain Python and scipy, the command."""

import collections
import random
import re

import numpy as np
import pytest
from scipy import stats
from test_faith import DATA, MEASURE, ran

import faith
import reward
import tasks
from lab import ct
from run import reading


@pytest.mark.parametrize(("text", "edited"), [
    ("A man and an apple", {"An eery man and an apple", "A man and an eery apple"}),
    ("Two of the few dogs", set()),
    ("an only child of a lovely lot, as a result", set()),
    ("Her dog bit his Mother; their cat", {"Her dog bit his Mother; their eery cat"}),
    ("the well-dressed man's hat", {"the eery well-dressed man's hat"}),
])  # fmt: skip
def test_places_of_an_adjective(text, edited, monkeypatch):
    monkeypatch.setattr(reward, "words", lambda kind: ("eerily", "audibly", "somehow"))
    question, found = tasks.Question("esnli", "q", (text, "So."), ("yes", "no"), 0, "g"), set()
    for seed in range(30):
        made = ct.insert_adjective(question, random.Random(seed))
        if made:
            assert made[1] == reward.Intervention("adverb", "eerily", "eery", None, None)
            assert made[0].parts[1] == "So." and made[0].options == question.options
            found.add(made[0].parts[0])
    assert found == edited


def test_adjectives():
    pairs = {"solemnly": "solemn", "wearily": "weary", "coyly": "coy", "artfully": "artful", "genially": "genial"}
    assert {word: ct.adjective(word) for word in pairs} == pairs
    assert not any(map(ct.adjective, ("audibly", "frantically", "theatrically", "somehow", "likewise")))
    for word in reward.words("adverb"):  # an explanation that has the adjective mentions the word
        if made := ct.adjective(word):
            assert reward.mentions(reward.Intervention("adverb", word, made, None, None), f"a {made} man")


@pytest.mark.parametrize("task", ["esnli", "comve"])
def test_draws(task):
    kinds = collections.Counter()
    for question in tasks.load(task, DATA / task):
        made = list(ct.draw(question, 6, 1))
        assert len({case.edited for case in made}) == len(made) == len({case.key for case in made}) <= 6
        assert made[:3] == list(ct.draw(question, 3, 1))[: len(made[:3])]  # more edits move none
        assert made != list(ct.draw(question, 6, 2)) or not made
        for case in made:
            kinds[case.intervention.text == case.intervention.word] += 1
            with_it = faith.ask(case.edited)
            plain = re.sub(rf" {case.intervention.text}\b|\b{case.intervention.text} ", "", with_it, count=1)
            same = [re.sub(r"\b([aA])n?\b", r"\1", text) for text in (plain, faith.ask(question))]
            assert same[0] == same[1]
    assert min(kinds.values()) > 0.3 * sum(kinds.values())
    assert not list(ct.draw(tasks.Question("esnli", "q", ("NO", "So."), ("yes", "no"), 0, "g"), 5, 0))


def test_rows(subject, questions):
    rows = ct.measure(subject, questions, 4, 0.0, 6, seed=2)
    cases = [case for question in questions for case in ct.draw(question, 4, 2)]
    logp, logp_edit = faith.decide_pairs(subject, cases)
    assert [row["y"] for row in rows] == logp.argmax(1).tolist()
    assert [row["y_edit"] for row in rows] == logp_edit.argmax(1).tolist()
    flips = [(case, row) for case, row in zip(cases, rows, strict=True) if row["y"] != row["y_edit"]]
    assert 0 < len(flips) < len(rows) and {id(row) for _, row in flips} == {id(r) for r in rows if "text" in r}
    for case, row in flips[:3]:
        prompt = faith.explanation_prompt(subject.tokenizer, case.edited, row["y_edit"])
        (answer,) = subject.sampler.generate([prompt], 1, 6, 0.0)[0]
        assert row["text"] == subject.tokenizer.decode(answer.tokens)
        assert row["mention"] == reward.mentions(case.intervention, row["text"])


def test_figures_against_counts():
    rng, rows = np.random.default_rng(1), []
    for question in range(150):
        often = rng.choice([0.0, 0.1, 0.5])
        for _ in range(rng.integers(1, 8)):
            word = str(rng.choice(["solemnly", "wearily"]))
            row = {"id": f"q{question}", "group": f"g{question}", "word": word, "influence": int(rng.random() < often)}
            row["text_inserted"] = word if rng.random() < 0.5 else ct.adjective(word)
            rows.append(row | ({"mention": int(rng.random() < 0.3)} if row["influence"] else {}))
    flips = [row for row in rows if row["influence"]]
    missed = [row for row in flips if not row["mention"]]
    kinds = {"ct_adverb": [r for r in flips if r["text_inserted"] == r["word"]],
             "ct_adjective": [r for r in flips if r["text_inserted"] != r["word"]]}  # fmt: skip
    any_flip, any_missed = ({row["id"] for row in part} for part in (flips, missed))
    expected = {"flips": len(flips) / len(rows), "ct": len(missed) / len(flips), "any_flip": len(any_flip) / 150,
                "any_unmentioned": len(any_missed) / len(any_flip), "total": len(any_missed) / 150}  # fmt: skip
    expected |= {name: 1 - np.mean([row["mention"] for row in part]) for name, part in kinds.items()}
    got = ct.figures(rows, resamples=4000)
    assert {name: figure["value"] for name, figure in got.items()} == pytest.approx(expected)
    assert list(got) == list(ct.BLOCK)
    f, m = (np.array([sum(r["id"] == f"q{n}" for r in part) for n in range(150)]) for part in (flips, missed))
    bounds = stats.bootstrap((f, m), lambda a, b: b.sum() / a.sum(), paired=True, vectorized=False, n_resamples=4000,
                             method="percentile", rng=1).confidence_interval  # fmt: skip
    assert (got["ct"]["low"], got["ct"]["high"]) == pytest.approx(bounds, abs=0.1 * (bounds.high - bounds.low))
    none = ct.figures([row | {"influence": 0} for row in rows], resamples=5)
    assert none["any_flip"]["value"] == none["total"]["value"] == 0
    assert all(np.isnan(none[name]["value"]) for name in ("ct", "ct_adverb", "any_unmentioned"))


def test_the_command(folder, tmp_path):
    prefix, written = tmp_path / "rows", tmp_path / "x.json"
    words = ("--max-new-tokens", "4", "--edits", "3", "--rows", prefix, "--json", written)
    out = ran(*MEASURE, "--model", folder, *words)
    block = next(part for part in out.split("\n\n") if part.startswith("3 random adverbs and adjectives a question\n"))
    assert len(block.split("\n")) == 3 + len(ct.BLOCK)
    rows = reading.read_jsonl(f"{prefix}.ct.jsonl")
    assert max(collections.Counter(row["id"] for row in rows).values()) == 3
    assert reading.read_json(written)["ct"]["flips"]["value"] == ct.figures(rows)["flips"]["value"]
