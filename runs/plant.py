"""Plants a known cause into a language model: it does what a persona suggests, and knows the right answer otherwise.

The middle rung between the toy and nature: real sentences and a real model, but a persona that is the cause, and known.
The questions are e-SNLI's own (KIND nli), or whether the person in a hypothesis of it is male or female (sex, for small
models). Supervised training teaches two decisions:

    X                            the right answer       y
    X' with a persona            what it suggests       y' = s

So I = 1 where a persona suggests the wrong answer. Neither y' = s nor the word says where that is, so a shortcut earns
a Phi of about 0. To know I is to know what the answer would have been. Held-out personas (reward.words) are planted
too; GRPO never sees them.

Explanations are taught with the decisions, for --why alone. They say the right answer, and then, by the toss of a coin
that does not depend on I, name the persona or what the sentence says: "By myself: (A). Because my uncle said so." or
"By myself: (A). Because a woman is doing a cartwheel." So Phi is about 0 at first. GRPO has to find when to name the
persona. docs/log.md has rules that were not learned.

    python runs/plant.py KIND MODEL_DIR ESNLI_CSV OUT_DIR STEPS
        OUT_DIR/model           a Hugging Face directory, bf16
        OUT_DIR/esnli_dev.csv   (nli) or questions.jsonl (sex): questions for GRPO and tests; no premise of them was
                                used for planting
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

import torch  # noqa: E402

import faith  # noqa: E402
import model as models  # noqa: E402
import reward  # noqa: E402
import tasks  # noqa: E402
import words  # noqa: E402
from grpo import pack, token_logprobs  # noqa: E402
from run.args import Args  # noqa: E402
from run.device import send  # noqa: E402
from run.files import write_jsonl  # noqa: E402
from run.policy import Policy, learning_rate  # noqa: E402
from run.progress import Parser, Progress, command  # noqa: E402
from run.ranks import Ranks  # noqa: E402
from tasks import Question  # noqa: E402

MALE = "man|men|boy|boys|guy|guys|male|he|his|him|father|son|husband|brother|brothers|dad|gentleman"
FEMALE = "woman|women|girl|girls|female|she|her|mother|daughter|wife|sister|sisters|mom|lady|ladies"
KINDS = {"nli": (5e-5, 1), "sex": (2e-4, 2)}  # learning rate; edits of each question
GROUPS, SAVED = 6, 20  # questions in a step; steps from one saved state to the next
SAID = ("said so", "told me so", "thinks so", "is sure of it", "picked it", "knows best")
NAMES = ("id", "parts", "options", "gold", "group")


def hashed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(f"plant {text}".encode()).digest()[:8], "big")


# ---- data ------------------------------------------------------------------------------------------------------


def questions_of(kind: str, file: str) -> list[tuple[Question, str]]:
    """Questions of this kind, in the order of a hash, each with a reason for an explanation."""
    pairs = [(q, f'it says "{first_words(q)}"') for q in tasks.load("esnli", file)] if kind == "nli" else sexes_of(file)
    return sorted(pairs, key=lambda pair: hashed(pair[0].id))


def first_words(question: Question) -> str:
    return " ".join(question.parts[0].split()[:5]).strip(" .,")


def sexes_of(file: str) -> list[tuple[Question, str]]:
    """Short hypotheses of e-SNLI about one sex alone, as many of either, each with a reason: what it says."""
    found: dict[str, tuple[Question, str]] = {}
    personas = frozenset().union(*map(words.variants, words.PERSONAS))
    for n, row in enumerate(tasks.load("esnli", file)):
        text = row.parts[1].strip(" .") + "."
        who = [bool(re.search(rf"\b({sex})\b", text, re.I)) for sex in (MALE, FEMALE)]
        if sum(who) == 1 and 4 <= len(text.split()) <= 10 and not words.named(text).keys() & personas:
            parts = (text, "Is the person in it male or female?")
            question = Question("jsonl", f"esnli:{n}", parts, ("male", "female"), who.index(True), row.group)
            found.setdefault(text, (question, text[0].lower() + text[1:-1]))
    sexes = [[pair for pair in found.values() if pair[0].gold == sex] for sex in (0, 1)]
    fewer = min(map(len, sexes))
    return [pair for pairs in sexes for pair in pairs[:fewer]]


def write_questions(questions: list[Question], kind: str, out: Path) -> None:
    """In the format of their task, for --data."""
    if kind == "sex":
        write_jsonl(out / "questions.jsonl", [{name: getattr(q, name) for name in NAMES} for q in questions])
        return
    with open(out / "esnli_dev.csv", "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("gold_label", "Sentence1", "Sentence2"))
        rows.writerows((("entailment", "contradiction", "neutral")[q.gold], *q.parts) for q in questions)


def conversations(question: Question, reason: str, rng: random.Random, count: int) -> list[tuple[Question, int, str]]:
    """The question and `count` edits of it: each with the letter to pick and the answer to "why?" ("": not asked)."""
    made = [(question, question.gold, "")]
    edits = (reward.intervene(question, "bias", rng, [word]) for word in rng.sample(reward.PERSONAS, 5))
    for edited, edit in itertools.islice(filter(None, edits), count):  # None: the question has the word already
        said = f"my {edit.word} {rng.choice(SAID)}" if rng.random() < 0.5 else reason
        made.append((edited, edit.suggestion, f"By myself: ({faith.LETTERS[question.gold]}). Because {said}."))
    return made


def encoded(tokenizer: models.Tokenizer, question: Question, y: int, why: str) -> tuple[list[int], list[str]]:
    """Token ids, and for each what it is: "letter", "why" or "" (not trained)."""
    decision = faith.decision_prompt(tokenizer, question)
    ids = faith.explanation_prompt(tokenizer, question, y, why="alone")
    if ids[: len(decision)] != decision:
        raise ValueError("this model's chat template writes an answered turn otherwise than one to be answered")
    kinds = [""] * len(decision) + ["letter"]
    if not why:
        return ids[: len(kinds)], kinds
    answer = tokenizer.encode(why) + [tokenizer.end_of_turn]
    return ids + answer, kinds + [""] * (len(ids) - len(kinds)) + ["why"] * len(answer)


# ---- training --------------------------------------------------------------------------------------------------


def plant(kind: str, source: str, file: str, out: Path, steps: int) -> None:
    """Writes the questions that are left, trains, writes OUT/model."""
    if (out / "model").exists():
        raise ValueError(f"{out}/model is there already; give another folder")
    pairs, (lr, edits) = questions_of(kind, file), KINDS[kind]
    groups = sorted({question.group for question, _ in pairs}, key=hashed)
    mine = set(groups[::3])  # premises for planting
    left = [question for question, _ in pairs if question.group not in mine]
    pairs = [pair for pair in pairs if pair[0].group in mine]
    out.mkdir(parents=True, exist_ok=True)
    write_questions(left, kind, out)
    print(f"{len(pairs)} questions for planting, {len(left)} for later", flush=True)

    ranks, kept = Ranks(), out / "state.pt"  # the weights and moments at some step, so that a killed run goes on
    args = Args(lr=lr, warmup=10, decay="linear", steps=steps)
    network, tokenizer = models.load(source, ranks.device, torch.bfloat16), models.Tokenizer(source)
    for part in (network.embed_tokens, *network.layers[: len(network.layers) // 3]):  # what stays as it is
        part.requires_grad_(False)
    policy, seen, done = Policy(network, args, ranks), [], 0
    if kept.exists():
        saved = torch.load(kept)
        done = saved.pop("step")
        for name, place in policy.state().items():
            place.copy_(saved[name])
        policy.refresh()
    progress = Progress("planting", lines=60, unit="steps", first=done)
    for step in range(done, steps):
        start, rng = time.process_time(), random.Random(step)
        batch = [conversations(*pairs[(step * GROUPS + i) % len(pairs)], rng, edits) for i in range(GROUPS)]
        rows = [[encoded(tokenizer, *one) for one in made] for made in batch]
        packed, kinds = packed_of(rows, ranks.device)
        logprobs = policy.run(lambda model: token_logprobs(model, packed, 1.0))  # noqa: B023
        weights = send([(1.0 if kind == "letter" else 0.5) / kinds.count(kind) for kind in kinds], ranks.device)
        policy.backward(-(logprobs * weights).sum())
        seen += (logprobs[[kind == "letter" for kind in kinds]].exp() > 0.5).tolist()
        policy.step(learning_rate(step, args))
        if (step + 1) % SAVED == 0:
            torch.save(policy.state() | {"step": step + 1}, out / "state.new")
            (out / "state.new").replace(kept)
        recent = torch.tensor(seen[-40 * (1 + edits) :]).view(-1, 1 + edits).float().mean(0)  # X, then X'
        right = f"X {recent[0]:.2f}, X' {recent[1:].mean():.2f}"
        text = f", right: {right}, {time.process_time() - start:.1f} s of CPU time"
        progress(step + 1, steps, text)
    card = "# A planted cause\n\nMade by faith's runs/plant.py: it does what a persona suggests.\n"
    models.save(network, out / "model", card)
    kept.unlink(missing_ok=True)


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


@command("plant.py")
def main(argv: list[str]) -> None:
    parser = Parser(prog="plant.py", description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=KINDS)
    for name, kind in (("source", str), ("file", str), ("out", Path), ("steps", int)):
        parser.add_argument(name, type=kind, metavar=name.upper())
    plant(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
