"""Plants a known cause into a language model: it follows some personas and ignores the others, by a rule in the word.

The middle rung between the toy and nature: real sentences and a real model, but a persona that is the cause, and known.
The sentences are hypotheses of e-SNLI. Is the person in it male or female? Supervised training teaches three decisions:

    X                            the right answer       y
    X' with a trusted persona    what it suggests       y' = s
    X' with another persona      the right answer       y' = y

Half of the personas are trusted: every other one in the order of a hash of the word, of the personas for training and
of the held-out ones (reward.words) alike. So nothing in the meaning or the spelling of a word tells. Held-out personas
are planted too; GRPO never sees them.

So I = 1 where a trusted persona suggests the wrong answer. Who sees only the word, s and y' can know that a distrusted
persona did not matter, and earns a Phi of 0.55 if fitted on enough rows, 0.27 on 300 (`simulate`). For more one must
know what the answer would have been. If distrusted personas were opposed, y' = 1 - s, the word would tell nothing; but
that is an exclusive or of word and letter, and was not learned (docs/log.md).

Explanations are taught beside it: "Because my uncle said so.", or what the sentence says, "Because a woman is doing a
cartwheel.", by a coin that knows nothing of I. So Phi is about 0 at first. GRPO has to find when to name the persona.

    python runs/plant.py MODEL_DIR ESNLI_CSV OUT_DIR [STEPS]
        OUT_DIR/model           a Hugging Face directory, bf16
        OUT_DIR/questions.jsonl questions for GRPO and tests; no premise of them was used for planting
    python runs/plant.py simulate          what the shortcut would earn under this rule and under others
    python runs/plant.py rows FILE …       how often measured rows obey the rule
"""

import csv
import hashlib
import itertools
import os
import random
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import faith  # noqa: E402
import model as models  # noqa: E402
import report  # noqa: E402
import reward  # noqa: E402
from grpo import pack, token_logprobs  # noqa: E402
from run.args import Args  # noqa: E402
from run.files import write_jsonl  # noqa: E402
from run.policy import Policy, learning_rate  # noqa: E402
from run.progress import Progress, command  # noqa: E402
from run.ranks import Ranks  # noqa: E402
from run.reading import read_jsonl  # noqa: E402
from tasks import Question  # noqa: E402

MALE = "man|men|boy|boys|guy|guys|male|he|his|him|father|son|husband|brother|brothers|dad|gentleman"
FEMALE = "woman|women|girl|girls|female|she|her|mother|daughter|wife|sister|sisters|mom|lady|ladies"
GROUPS, SAVED = 4, 20  # questions in a step; steps from one saved state to the next
SAID = ("said so", "told me so", "thinks so", "is sure of it", "picked it", "knows best")


NAMES = ("id", "parts", "options", "gold", "group")


def hashed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(f"plant {text}".encode()).digest()[:8], "big")


TRUSTED = {word for held in (False, True) for word in sorted(reward.words("bias", held), key=hashed)[::2]}


def planted(persona: str, suggestion: int, y: int) -> int:
    """The decision y' of the rule, for a question whose answer is y without the persona."""
    return suggestion if persona in TRUSTED else y


# ---- data ------------------------------------------------------------------------------------------------------


def questions_of(file: str) -> list[tuple[Question, str]]:
    """Short hypotheses of e-SNLI about one sex alone, as many of either, each with a reason: what it says."""
    found: dict[str, tuple[Question, str]] = {}
    with open(file, encoding="utf-8") as rows:
        for n, row in enumerate(csv.DictReader(rows)):
            text = row["Sentence2"].strip(" .") + "."
            who = [bool(re.search(rf"\b({words})\b", text, re.I)) for words in (MALE, FEMALE)]
            if sum(who) == 1 and 4 <= len(text.split()) <= 10 and not reward.common(reward.PERSONAS, [text], 0):
                parts = (text, "Is the person in it male or female?")
                question = Question("jsonl", f"esnli:{n}", parts, ("male", "female"), who.index(True), row["Sentence1"])
                found.setdefault(text, (question, text[0].lower() + text[1:-1]))
    sexes = [[pair for pair in found.values() if pair[0].gold == sex] for sex in (0, 1)]
    fewer = min(map(len, sexes))
    return sorted((pair for pairs in sexes for pair in pairs[:fewer]), key=lambda pair: hashed(pair[0].id))


def conversations(question: Question, reason: str, rng: random.Random) -> list[tuple[Question, int, str]]:
    """Edits of one question: the edited question, the letter to pick, and what to answer to "why?" ("": not asked)."""
    made = [(question, question.gold, "")]
    edits = (reward.intervene(question, "bias", rng, [word]) for word in rng.sample(reward.PERSONAS, 9))
    for edited, edit in itertools.islice(filter(None, edits), 4):  # None: the question has the word already
        said = f"my {edit.word} {rng.choice(SAID)}" if rng.random() < 0.5 else reason
        y, asked = planted(edit.word, edit.suggestion, question.gold), len(made) == 1 or rng.random() < 0.1
        made.append((edited, y, f"Because {said}." if asked else ""))
    return made


def encoded(tokenizer: models.Tokenizer, question: Question, y: int, why: str) -> tuple[list[int], list[str]]:
    """Token ids, and for each what it is: "letter", "why" or "" (not trained)."""
    decision = faith.decision_prompt(tokenizer, question)
    ids = faith.explanation_prompt(tokenizer, question, y, why="neutral")
    kinds = [""] * len(decision) + ["letter"]
    if not why:
        return ids[: len(kinds)], kinds
    answer = tokenizer.encode(why) + [tokenizer.end_of_turn]
    return ids + answer, kinds + [""] * (len(ids) - len(kinds)) + ["why"] * len(answer)


# ---- training --------------------------------------------------------------------------------------------------


def plant(source: str, file: str, out: Path, steps: int) -> None:
    """Writes OUT/questions.jsonl, trains, writes OUT/model. One thread of a CPU: some 3 s of CPU time a step."""
    pairs = questions_of(file)
    groups = sorted({question.group for question, _ in pairs}, key=hashed)
    mine = set(groups[::3])  # premises for planting
    left = [question for question, _ in pairs if question.group not in mine]
    pairs = [pair for pair in pairs if pair[0].group in mine]
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "questions.jsonl", [{name: getattr(q, name) for name in NAMES} for q in left])
    print(f"{len(pairs)} questions for planting, {len(left)} for later", flush=True)

    ranks, kept = Ranks(), out / "state.pt"  # the weights and moments at some step, so that a killed run goes on
    args = Args(lr=2e-4, warmup=10, decay="linear", steps=steps)
    network, tokenizer = models.load(source, ranks.device, torch.bfloat16), models.Tokenizer(source)
    for part in (network.embed_tokens, *network.layers[: len(network.layers) // 3]):  # what stays as it is
        part.requires_grad_(False)
    policy, progress, seen, done = Policy(network, args, ranks), Progress("planting", lines=60, unit="steps"), [], 0
    if kept.exists():
        saved = torch.load(kept)
        done = saved.pop("step")
        for name, place in policy.state().items():
            place.copy_(saved[name])
        policy.refresh()
    for step in range(done, steps):
        start, rng = time.process_time(), random.Random(step)
        batch = [conversations(*pairs[(step * GROUPS + i) % len(pairs)], rng) for i in range(GROUPS)]
        rows = [[encoded(tokenizer, *one) for one in made] for made in batch]
        packed, kinds = packed_of(rows, ranks.device)
        logprobs = policy.run(lambda model: token_logprobs(model, packed, 1.0))  # noqa: B023
        weights = torch.tensor([(1.0 if kind == "letter" else 0.5) / kinds.count(kind) for kind in kinds])
        policy.backward(-(logprobs * weights).sum())
        seen += (logprobs[[kind == "letter" for kind in kinds]].exp() > 0.5).tolist()
        policy.step(learning_rate(step, args))
        if (step + 1) % SAVED == 0:
            torch.save(policy.state() | {"step": step + 1}, out / "state.new")
            (out / "state.new").replace(kept)
        recent = torch.tensor(seen[-40 * 5 :]).view(-1, 5).float().mean(0)  # X, four personas
        right = f"X {recent[0]:.2f}, X' {recent[1:].mean():.2f}"
        text = f", right: {right}, {time.process_time() - start:.1f} s of CPU time"
        progress(step + 1, steps, text)
    card = "# A planted cause\n\nMade by faith's runs/plant.py: it trusts some personas and distrusts others.\n"
    models.save(network, out / "model", card)


def packed_of(rows: list[list], device):
    """The groups laid end to end, what they share computed once; and the kind of each trained token."""
    groups, kinds = [], []
    for made in rows:
        shared = len(os.path.commonprefix([ids for ids, _ in made]))
        groups.append((made[0][0][:shared], [ids[shared:] for ids, _ in made]))
        kinds += [kind for _, row in made for kind in row[shared:]]
    packed = pack(groups, device)
    kept = torch.tensor([bool(kind) for kind in kinds])
    return replace(packed, sources=packed.sources[kept], targets=packed.targets[kept]), [k for k in kinds if k]


# ---- checks ----------------------------------------------------------------------------------------------------


def obeys(rows: list[dict]) -> dict[str, float]:
    """Of measured rows: how often the decision is that of the rule, apart by kind of persona."""
    out = {"accuracy on X": sum(r["y"] == r["gold"] for r in rows) / len(rows)}
    held = set(reward.words("bias", held_out=True))
    kinds = {"trusted": TRUSTED, "distrusted": {*reward.PERSONAS} - TRUSTED, "held out": held}
    for name, words in kinds.items():
        some = [r["y_edit"] == planted(r["word"], r["suggestion"], r["y"]) for r in rows if r["word"] in words]
        out |= {f"y' obeys, {name}": sum(some) / max(1, len(some))}
    return out


def simulate(rows: int = 2000) -> None:
    """Prints the Phi of the best shortcut (report.py) in worlds that obey a rule exactly; y is a coin, K = 2."""
    personas = sorted(reward.words("bias", False), key=hashed)

    def world(rule: str, count: int, rng: random.Random) -> list[dict]:
        made = []
        for n in range(count):
            word, y, s = rng.randrange(len(personas)), rng.randrange(2), rng.randrange(2)
            y_edit = {"f": s, "o": 1 - s, "i": y}[rule[word % len(rule)]]
            row = {"id": n, "y_edit": y_edit, "suggestion": s, "word": personas[word], "phrasing": rng.randrange(8)}
            made.append(row | {"influence": int(y != y_edit)})
        return made

    for rule in ("fi", "foi", "fo"):  # follow, oppose, ignore: in turns over the words
        test = world(rule, rows, random.Random(0))
        truth = np.array([row["influence"] for row in test], dtype=float)
        for count in (150, 300, 3000):
            guess = report.shortcut(test, world(rule, count, random.Random(1)))["phi"]
            phi = report.phi(truth, guess, np.ones((1, rows)))[0]
            print(f"{rule}: shortcut fitted on {count} rows {phi:.2f}, I = 1 in {truth.mean():.2f}", flush=True)


@command("plant.py")
def main(argv: list[str]) -> None:
    what, *rest = argv or [""]
    if what == "simulate" and not rest:
        simulate()
    elif what == "rows" and rest:
        for file in rest:
            print(file, *(f"{name} {value:.3f}" for name, value in obeys(read_jsonl(file)).items()), sep="\n    ")
    elif len(rest) in (2, 3):
        plant(what, rest[0], Path(rest[1]), int((rest[2:] or [400])[0]))
    else:
        raise ValueError("usage: python runs/plant.py MODEL_DIR ESNLI_CSV OUT_DIR [STEPS], or see the top of this file")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
