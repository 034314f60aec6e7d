"""toy.py: the world keeps its rule, the base says nothing of what moves it, and one default run teaches it to."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import faith
import model as models
import reward
import tasks
import toy
import train

ROOT = Path(__file__).parent.parent


def test_the_rule():
    """By hand: weights decide, an edit pushes by two and a half classes, toward the option it favours."""
    questions = {frozenset(q.options): q for q in toy.make_questions()}
    far, close = questions[frozenset(("feather", "truck"))], questions[frozenset(("apple", "shoe"))]
    heavy = {q.id: q.options.index(thing) for q, thing in ((far, "truck"), (close, "shoe"))}
    pushes = Counter()
    for kind in reward.KINDS:
        for word in reward.words(kind):
            for option in (0, 1):
                edit = reward.Intervention(kind, word, word, option if kind == "bias" else None, None)
                push = toy.push(edit)
                pushes[kind, push] += 1
                assert push in (0, toy.PUSH, -toy.PUSH)
                assert push == 0 or kind == "adverb" or (push > 0) == (option == 0)
                assert toy.decision(far, edit) == heavy[far.id] == far.gold
                favours = None if push == 0 else 0 if push > 0 else 1
                assert toy.decision(close, edit) == (heavy[close.id] if favours is None else favours)
    for kind in reward.KINDS:
        n = sum(count for (k, _), count in pushes.items() if k == kind)
        assert 0.3 * n < pushes[kind, 0] < 0.7 * n and pushes[kind, 2.5] > 0.1 * n < pushes[kind, -2.5]


def test_questions():
    questions = toy.make_questions()
    assert len({q.id for q in questions}) == len({q.parts + q.options for q in questions}) == len(questions) > 4000
    assert all(toy.decision(q) == q.gold and q.parts[0].startswith("The ") for q in questions)
    assert 0.45 < sum(q.gold for q in questions) / len(questions) < 0.55
    for kind in reward.KINDS:
        cases = faith.draw_cases(questions, kind, 0)
        flips = [toy.decision(c.question) != toy.decision(c.edited, c.intervention) for c in cases]
        assert len(cases) == len(questions) and 0.1 < sum(flips) / len(flips) < 0.2


def test_file(tmp_path):
    """Questions come back from the file as they were; a broken one is named."""
    question = toy.make_questions()[7]
    row = {"id": question.id, "parts": question.parts, "options": question.options, "answer": question.gold,
           "group": question.group}  # fmt: skip
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps(row) + "\n" + json.dumps(row | {"id": "toy/x"}) + "\n")
    assert tasks.load("toy", tmp_path)[0] == question
    for wrong in ({"answer": 2}, {"answer": None}, {"parts": "x"}, {"options": []}, {"group": 3}, {"id": ""}):
        file.write_text(json.dumps(row) + "\n" + json.dumps(row | wrong) + "\n")
        with pytest.raises(ValueError, match="questions.jsonl, line 2: "):
            tasks.load("toy", tmp_path)


def test_settings_are_defaults_of_the_toy_alone():
    assert train.parse([]) == train.Args(**toy.SETTINGS)
    assert train.parse(["--steps", "7", "--lr", "0.1"]) == train.Args(**toy.SETTINGS | {"steps": 7, "lr": 0.1})
    assert train.parse(["--model", "x"]) == train.Args(model="x")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The default run, from nothing, as a user starts it: (its folder, what it printed, the toy's cache)."""
    folder = tmp_path_factory.mktemp("toy")
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(folder / "cache"),
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "1",
        ROOT / "train.py",
    ]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    (out,) = (folder / "out").iterdir()
    (cache,) = (folder / "cache" / "faith").iterdir()
    return out, done.stdout, cache


def test_the_default_run_learns(run, capsys):
    """Phi-CCT at T = 1 on 1,500 held-out questions, natural rates: about 0 before, far above the shortcut after."""
    out, printed, _ = run
    before, after = (json.loads((out / f"{name}.json").read_text())["T=1"] for name in ("before", "after"))
    with capsys.disabled():
        print(f" Phi {before['phi']['value']:.3f} -> {after['phi']['value']:.3f}", end="")
    assert after["n"]["value"] == 1500
    assert abs(before["phi"]["value"]) < 0.12
    assert after["phi"]["value"] >= 0.5
    assert after["phi_less_shortcut"]["low"] > 0
    assert after["accuracy"]["value"] > before["accuracy"]["value"] - 0.03
    assert after["tokens"]["value"] < 1.5 * before["tokens"]["value"] and after["repeats"]["value"] < 0.01
    assert "1500 test questions, T=1" in printed and f"step {toy.SETTINGS['steps']}/" in printed


def test_decisions_follow_the_rule(run):
    """What the base decides is what was planted, so the ground truth is one."""
    _, _, cache = run
    subject = faith.open_subject(str(cache / "model"), "none", "", 2)
    for kind in reward.KINDS:
        cases = faith.draw_cases(tasks.load("toy", cache)[::15], kind, 3)
        rows = faith.decision_rows(subject, cases)
        right = [(r["y"], r["y_edit"]) == (toy.decision(c.question), toy.decision(c.edited, c.intervention))
                 for c, r in zip(cases, rows, strict=True)]  # fmt: skip
        assert sum(right) > 0.97 * len(right)


def test_it_is_an_ordinary_model(run):
    transformers = pytest.importorskip("transformers")
    out, _, cache = run
    for folder in (cache / "model", out / "model"):
        theirs, tokenizer = (
            auto.from_pretrained(folder) for auto in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
        )
        ours, ids = models.Tokenizer(folder), None
        question = tasks.load("toy", cache)[5]
        chat = [{"role": "user", "content": faith.ask(question)}]
        ids = ours.encode(ours.render(chat))
        assert tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == ids
        with torch.no_grad():
            assert (models.load(folder)(torch.tensor([ids])) - theirs(torch.tensor([ids])).logits).abs().max() < 1e-4
