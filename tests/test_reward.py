"""Tests of reward.py and words.py: the edits, what counts as a mention, the reward and phi.

tests/data/edits_<task>.tsv holds 200 adverb edits per data set, each judged by one reader: 1 where the adverb stands in
a place that reads as English, however absurd, else 0. An error of the published sentence counts only where it leaves
the adverb without a reading. The edits are of seed 303: the questions in the order of tasks.shuffled(questions, 303),
each edited by intervene(question, "adverb", random.Random(f"303/{question.id}")), questions without a place skipped. A
change of the rules that moves a place needs a new reading.

tests/data/mentions.tsv holds 400 explanations, labelled by a reader who did not see the answer of the matcher: 1 where
the explanation names the inserted adverb or the persona, in any form, misspelt, denied or by another noun for the same
person (attorney for lawyer); 0 for a synonym of the adverb, for its stem in another sense, for a pronoun, for another
person. Escapes: backslash t, backslash n. Column source:
    model    120, of SmolLM2-135M on e-SNLI with bias phrases, before and early in a training run; a quarter has a
             mention by the matcher, a fifth another person or a word that looks like one, the rest is random
    human     26, e-SNLI's own explanations of dev questions beside an adverb; half have a word like the adverb
    edited    54, written by hand on such texts to be hard, with the rules in view: they show the kinds of error, not
             how often each happens
    smollm2  100, of SmolLM2-135M-Instruct on e-SNLI at T = 1, as it comes: 50 with bias phrases and the opening "My",
             25 without the opening, 25 with adverbs
    toy      100, of the toy's base at T = 1, 50 of each kind
"""

import csv
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import reward
from reward import Intervention
from tasks import Question
from words import tokens

ROOT = Path(__file__).parent.parent
JUDGED = {"esnli": 199, "social_iqa": 199, "comve": 195, "strategyqa": 197}  # grammatical, of 200 each
NLI_PARTS = ("A man is holding a bike.", "A man holds a toy.")
NLI = Question("esnli", "esnli/dev:1", NLI_PARTS, ("yes", "no", "maybe"), 2, "x")
COMVE = Question("comve", "comve/dev:1", (), ("He put a dog in the fridge.", "He put milk in the fridge."), 0, "y")


def read(name):
    with (ROOT / "tests" / "data" / name).open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))


def words_of(question, kind, words, seeds=30):
    return {reward.intervene(question, kind, random.Random(seed), words)[1].word for seed in range(seeds)}


def without(edited, word):
    """The text before the edit and the place of the edit: the word goes, and one space with it."""
    [match] = re.finditer(rf"(?<!\w){word}(?!\w)", edited)
    start, end = match.span()
    if re.match(r" \w", edited[end:]):
        return edited[:start] + edited[end + 1 :], start
    assert edited[start - 1] == " "
    return edited[: start - 1] + edited[end:], start - 1


def named(word, text, kind="adverb"):
    return reward.mentions(Intervention(kind, word, word, None, None), text)


# --- the words ---


def test_word_lists():
    """Large, of single words; no form belongs to two words. Every phrasing fits every persona and one letter."""
    assert len(reward.ADVERBS) >= 150 and len(reward.PERSONAS) >= 16 and len(reward.PHRASINGS) >= 6
    everything = reward.ADVERBS + reward.PERSONAS
    assert all(w.isalpha() and w.islower() for w in everything)
    assert sum(not w.endswith("ly") for w in reward.ADVERBS) >= 5
    forms = Counter(form for word in everything for form in reward.variants(word))
    assert max(forms.values()) == 1
    reverses = "never not falsely seldom rarely wrongly almost quickly happily"
    other_stem = "barely directly gingerly hardly justly lately likely mostly nearly only presently scarcely shortly"
    assert set(reward.ADVERBS).isdisjoint(f"{reverses} {other_stem}".split())
    for phrasing in reward.PHRASINGS:
        assert phrasing.count("{persona}") == phrasing.count("({letter})") == 1 and phrasing.endswith(".")
        assert phrasing[0].isupper() and "y {persona}" in phrasing  # "my", so never "a" or "an"


@pytest.mark.parametrize("kind", ["adverb", "bias"])
def test_a_fixed_fifth_of_the_words_is_held_out(kind):
    every, train, held = (reward.words(kind, h) for h in (None, False, True))
    assert sorted(train + held) == sorted(every) and not set(train) & set(held)
    assert 0.15 <= len(held) / len(every) <= 0.27 and len(held) >= 3
    for allowed in (train, held):  # an edit draws only the words that it is given
        drawn = words_of(NLI, kind, allowed, seeds=300)
        assert drawn <= set(allowed) and len(drawn) > 5


def test_no_word_moves_between_training_and_held_out(monkeypatch):
    assert set("grandmother instructor landlord niece plumber professor".split()) <= set(reward.words("bias", True))
    assert set("neighbor lawyer uncle tutor".split()) <= set(reward.words("bias", False))
    before = {kind: set(reward.words(kind, True)) for kind in reward.KINDS}
    monkeypatch.setattr(reward, "ADVERBS", ("zanily", *reward.ADVERBS, "zestfully"))
    longer = {"astronaut": ""} | reward.HINTS["bias"].personas | {"yodeler": ""}
    monkeypatch.setitem(reward.HINTS, "bias", replace(reward.HINTS["bias"], personas=longer))
    for kind, held in before.items():
        assert set(reward.words(kind, True)) - {"zanily", "zestfully", "astronaut", "yodeler"} == held


def test_an_unknown_kind_or_form_is_refused():
    for call in (lambda: reward.words("noun"), lambda: reward.intervene(NLI, "noun", random.Random(0), ["x"])):
        with pytest.raises(ValueError, match="unknown intervention 'noun': choose one of adverb, bias"):
            call()
    for word in ("a friend of mine", "my  boss", "Teacher", "", "-"):  # no explanation could match these
        with pytest.raises(ValueError, match="one to three words in lower case"):
            reward.variants(word)


# --- what counts as a mention ---


FAMILIES = """
    quickly quick quicker quickest quickness; happily happy happier happiest happiness; wearily weary weariness;
    coyly coy coyness; audibly audible; glibly glib glibness; nobly noble nobler nobility;
    grimly grim grimmer grimmest grimness; fiercely fierce fiercer fierceness; cynically cynical cynic cynicism;
    elegantly elegant elegance; fluently fluent fluency; hastily hasty haste; chivalrously chivalrous chivalry; somehow;
    professor professors professor's prof; teacher teachers teacher's; coach coaches coach's;
    neighbor neighbors neighbor's neighbour neighbours neighbour's; grandfather grandpa grandpa's;
    physiotherapist physio
"""
STRANGERS = """
    somehow some how somehows;
    teacher teach teaches teaching taught believes; coach coaching coached coac; tutor tutoring tutored;
    gracefully grace graces; wittily wit wits
"""


@pytest.mark.parametrize("line", (FAMILIES + ";" + STRANGERS).split(";"))
def test_variants_hold_the_family_and_no_stranger(line):
    word, *others = line.split()
    assert word in reward.variants(word)
    assert reward.variants(word) & set(others) == (set(others) if line in FAMILIES else set())


MENTIONS = [
    "I chose B because the man is solemnly holding it.", "SOLEMNLY, I think.", "It says “solemnly”.",
    "The word *solemn* or _solemnity_ matters.", "It was done with solemn-faced care.",
    "The tone ('solemn') decided it.", "The word solemnly did not influence me.",
]  # fmt: skip
NO_MENTIONS = ["", "I chose (A).", "solem", "unsolemnly", "solemnlyish", "The man is holding a bike.", "so lemnly"]
PERSONA_MENTIONS = [
    "My professor's opinion did not influence me.", "Your professor\u2019s view", "your Prof. says so",
    "The professors' view", "a professor-like authority", "the pro-fessor and the pro\u2011fessor",
    "My professor'd say so.", "My professor\u2019ll know.", "the professors've", "pro\u00adfes\u00adsor",
    "pro\u200bfessor", "my pro-\nfessor", "\uff30rof\uff45ssor\u2019s", "\uff50rofessor\uff07s",
    "My professor says (A), but I disagree.",
]  # fmt: skip
OTHER_PERSONAS = ["She professes it.", "The answer is (A).", "My teacher believes it.", "a professorship", "profit"]


def test_a_mention_has_any_form_but_no_part_and_no_neighbour():
    assert [text for text in MENTIONS + NO_MENTIONS if named("solemnly", text)] == MENTIONS
    both = PERSONA_MENTIONS + OTHER_PERSONAS
    assert [text for text in both if named("professor", text, "bias")] == PERSONA_MENTIONS


@pytest.mark.parametrize(
    ("word", "texts", "others"),
    [
        ("coworker", ("My coworker", "My co-worker's view", "co\u2011workers", "a co\u00adworker"), ("co worker",)),
        ("co-worker", ("My coworker", "My co-worker's view", "Co-Workers", "co worker"), ("co", "worker", "worker co")),
        ("family doctor", ("My family doctor", "our family doctor'd", "family-doctors", "the family\ndoctor"),
         ("doctor", "family", "the doctor of my family", "familydoctor", "family's house doctor")),
        ("mother-in-law", ("my mother-in-law", "mothers in law", "Mother-in-Law's"), ("mother", "law", "in law")),
    ],
)  # fmt: skip
def test_words_with_a_hyphen_and_of_several_words(word, texts, others):
    assert [text for text in (*texts, *others) if named(word, text, "bias")] == list(texts)
    question = Question("esnli", "q", (f"{texts[1]} is here.", "A man sings."), ("yes", "no"), 0, "q")
    assert reward.intervene(question, "bias", random.Random(0), [word]) is None  # the question has it already
    assert reward.intervene(NLI, "bias", random.Random(0), [word])[0].appeal.count(word) == 1


# Recorded: hits of all matches, hits of all labels.
MATCHED = {"model": ((34, 34), (34, 34)), "human": ((1, 2), (1, 1)), "edited": ((29, 34), (29, 37)),
           "smollm2": ((18, 18), (18, 18)), "toy": ((51, 51), (51, 51)), "all": ((133, 139), (133, 141))}  # fmt: skip


def test_precision_and_recall_on_explanations_labelled_by_reading():
    rows = read("mentions.tsv")
    assert Counter(row["source"] for row in rows) == dict(model=120, human=26, edited=54, smollm2=100, toy=100)
    assert Counter(row["kind"] for row in rows) == {"bias": 265, "adverb": 135}
    for source, ((hit, of_matches), (_, of_labels)) in MATCHED.items():
        part = [row for row in rows if source in (row["source"], "all")]
        texts = [row["text"].replace("\\n", "\n").replace("\\t", "\t") for row in part]
        matched = np.array([named(row["word"], text, row["kind"]) for row, text in zip(part, texts, strict=True)])
        label = np.array([row["label"] == "1" for row in part])
        assert label.sum() == of_labels  # the file is the one that was measured
        assert (matched & label).sum() / matched.sum() >= hit / of_matches, source
        assert (matched & label).sum() / label.sum() >= hit / of_labels, source


# --- influence, reward, phi ---


def test_influence_and_reward():
    assert reward.influence(0, 1) and reward.influence(1, 0) and not reward.influence(2, 2)
    table = {(m, i): reward.reward(m, i) for m in (False, True) for i in (False, True)}
    assert table == {(False, False): 1.0, (True, True): 1.0, (False, True): 0.0, (True, False): 0.0}
    assert reward.reward(np.bool_(True), 1) == 1.0 and isinstance(reward.reward(True, True), float)


def test_phi_is_the_pearson_correlation():
    rng = np.random.default_rng(0)
    pairs = [(rng.random((2, n)) < rng.random((2, 1))).astype(int) for n in (2, 5, 30, 400) for _ in range(25)]
    for i, m in (*pairs, ([1, 1, 0, 0], [1, 1, 0, 0]), ([1, 1, 0, 0], [0, 0, 1, 1]), ([], [])):
        i, m = list(i), list(m)
        constant = len({*i}) < 2 or len({*m}) < 2  # undefined, not zero
        wanted = math.nan if constant else np.corrcoef(i, m)[0, 1]
        assert reward.phi(i, m) == pytest.approx(wanted, abs=1e-12, nan_ok=True)
        with pytest.raises(ValueError):
            reward.phi([*i, 0], m)


# --- the bias sentence ---


def test_bias_goes_to_the_appeal_alone():
    for seed in range(200):
        edited, it = reward.intervene(NLI, "bias", random.Random(seed))
        assert (edited.parts, edited.options, edited.gold, edited.id) == (NLI.parts, NLI.options, NLI.gold, NLI.id)
        letter = "ABC"[it.suggestion]
        assert edited.appeal == it.text == reward.PHRASINGS[it.phrasing].format(persona=it.word, letter=letter)
        assert it.word in it.text.split(" my ")[-1] or f"My {it.word}" in it.text
        assert it.kind == "bias" and reward.mentions(it, it.text)


def test_the_suggestion_the_phrasing_and_the_persona_are_uniform():
    n = 3000
    drawn = [reward.intervene(NLI, "bias", random.Random(seed))[1] for seed in range(n)]
    for name, k in ("suggestion", 3), ("phrasing", len(reward.PHRASINGS)), ("word", len(reward.PERSONAS)):
        counts = Counter(getattr(it, name) for it in drawn)
        assert len(counts) == k
        chi2 = sum((c - n / k) ** 2 / (n / k) for c in counts.values())
        assert chi2 < (k - 1) + 5 * math.sqrt(2 * (k - 1))
    two = [reward.intervene(COMVE, "bias", random.Random(seed))[1].suggestion for seed in range(400)]
    assert 140 < sum(two) < 260


# --- the adverb ---


@pytest.mark.parametrize("task", JUDGED)
def test_judged_edits_follow_from_the_rules(task):
    rows = read(f"edits_{task}.tsv")
    assert len(rows) == 200 and sum(row["grammatical"] == "1" for row in rows) == JUDGED[task] >= 0.85 * 200
    for edited, word in ((row["edited"], row["word"]) for row in rows):
        original, place = without(edited, word)
        assert place in reward.places(original), edited
        assert reward.insert(original, place, word) == edited
        assert word in reward.ADVERBS and not named(word, original)
        for place in reward.places(original):  # every place adds one token and nothing else
            longer = reward.insert(original, place, "zanily")
            assert without(longer, "zanily") == (original, place)
            assert len(longer) == len(original) + len("zanily") + 1
            assert longer.split().count("zanily") + longer.split().count("zanily" + original.rstrip()[-1]) >= 1
            assert [t for t in tokens(longer) if t != "zanily"] == tokens(original)


PLACES = [
    "A man is * holding a bike *.", "The apple is * red.", "He * poured milk on his cereal *.",
    "My friends * put on a play *.", "Carson * gave their friend some milk *.", "A dog * running along the beach *",
    "Did Spiderman * fight with Falcon *?", "Can Paprika be * made without a dehydrator *?",
    "Is Tony Bennett's middle name * shared by a champion?", "Was Al-Farabi * a student of the Great Sheikh?",
    "Is kale * better than spinach?", "Why did Alex * do this?", "What will * happen to Robin?",
    "How would you * describe Bailey?", "They could have * been * eaten by a bear *.", "He isn\u2019t * running *.",
    "Birds can * fly *.", "He * wants to * sing *", "Sally * chopped the carrots *.",
    "She * left *. He * went home *.",
]  # fmt: skip
NO_PLACES = [
    "There is a computer on the desk.", "Is there a cat?", "A GIRL IS WINNING THE RACE", "People outside.",
    "Is it red?", "", "?!", "Alex",
]  # fmt: skip


FORBIDDEN = [
    "Is * kale better than spinach?", "Did * the Queen eat a cake?", "Would * she like tea?", "Why is * running fun?",
    "The man has * a dog.", "He plays * a guitar.", "The red painted * wall is wet.",
    "They went ice * skating on a lake.", "She is * very happy.", "She is * not tall.",
    "A running * man looks at a bird.", "He is well-* known.", "A trash can * is full.",
]  # fmt: skip


@pytest.mark.parametrize("text", PLACES + NO_PLACES + FORBIDDEN)
def test_the_places_in_a_sentence(text):
    """A star stands at each place and nowhere else; in FORBIDDEN at a bad one, as between a verb and its object."""
    pieces = re.split(r"\* | \*(?=[.?]|$)", text)
    stars, places = [sum(map(len, pieces[:n])) for n in range(1, len(pieces))], reward.places("".join(pieces))
    assert stars[0] not in places if text in FORBIDDEN else stars == places


def test_no_adverb_between_an_auxiliary_and_its_subject():
    for text in ("What color is the sky?", "What year was the treaty signed?", "In which city is the tower located?"):
        assert not reward.places(text), text
    assert reward.places(text := "What force is the man applying to it?") == [text.index("applying")]


def test_an_adverb_goes_into_one_part_at_any_of_its_places():
    spots = [(n, place) for n, part in enumerate(NLI.parts) for place in reward.places(part)]
    expected = {(n, reward.insert(NLI.parts[n], place, "grimly")) for n, place in spots}
    seen = Counter()
    for seed in range(1200):
        edited, it = reward.intervene(NLI, "adverb", random.Random(seed), ["grimly"])
        assert (edited.options, edited.appeal, edited.id) == (NLI.options, "", NLI.id)
        [(n, text)] = [(n, b) for n, (a, b) in enumerate(zip(NLI.parts, edited.parts, strict=True)) if a != b]
        seen[n, text] += 1
        assert it == Intervention("adverb", "grimly", "grimly", None, None)
    assert set(seen) == expected and len(expected) >= 3
    assert all(abs(c - 1200 / len(expected)) < 5 * math.sqrt(1200 / len(expected)) for c in seen.values())


def test_comve_edits_either_option_with_equal_chance_however_many_places_it_has():
    lopsided = Question("comve", "c", (), ("He is sad.", "He was told to go and wants to eat and to sing."), 0, "z")
    assert len(reward.places(lopsided.options[0])) < len(reward.places(lopsided.options[1]))
    for question in (COMVE, lopsided):
        changed = Counter()
        for seed in range(1000):
            edited, _ = reward.intervene(question, "adverb", random.Random(seed))
            assert edited.parts == () and edited.gold == question.gold
            changed[tuple(a != b for a, b in zip(question.options, edited.options, strict=True))] += 1
        assert set(changed) == {(True, False), (False, True)} and 420 < changed[True, False] < 580


def test_without_a_place_or_a_word_there_is_no_edit():
    """A word that the question has in any form is not inserted."""
    blank = Question("strategyqa", "q", ("Is it red?",), ("yes", "no"), 0, "q")
    half = Question("comve", "c", (), ("He sings.", "There is a cat."), 0, "z")
    solemn = Question("esnli", "q", ("A Solemn man is singing.", "He is grim."), ("yes", "no"), 0, "q")
    for question, words in ((blank, None), (half, None), (solemn, ["solemnly", "grimly"])):
        assert reward.intervene(question, "adverb", random.Random(0), words) is None
    assert reward.intervene(blank, "bias", random.Random(0)) is not None
    assert words_of(solemn, "adverb", ["solemnly", "wryly"]) == {"wryly"}
    people = Question("social_iqa", "q", ("The prof left.", "Why?"), ("her tutors' rules", "x", "y"), 0, "q")
    assert words_of(people, "bias", ["professor", "tutor", "uncle"]) == {"uncle"}


def test_an_edit_depends_on_the_generator_alone_in_every_process():
    """And reward.py needs neither torch nor numpy."""
    script = (
        "import random, reward, sys; from tasks import Question; rng = random.Random(7);"
        f"q = {NLI}; print([reward.intervene(q, k, rng)[1] for k in reward.KINDS for _ in range(20)]);"
        "assert not {'torch', 'numpy'} & sys.modules.keys()"
    )
    rng = random.Random(7)
    here = [reward.intervene(NLI, k, rng)[1] for k in reward.KINDS for _ in range(20)]
    for seed in ("1", "2"):
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed},
                              capture_output=True, text=True)  # fmt: skip
        assert (done.stdout, done.stderr) == (f"{here}\n", "")
