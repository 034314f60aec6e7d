"""The toy: its world keeps its rule, its base says nothing of what moves it, and one default run teaches it to."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import notebook
import pytest
import torch

import faith
import model as models
import reward
import tasks
import toy
from lab import base
from run.args import Args, parse

ROOT = Path(__file__).parent.parent


def test_the_rule():
    """By hand: weights decide, an edit pushes by two and a half classes, toward the option it favours.

    And what is planted is told by its name: `moved_by` holds the edits that change the answer, and no others.
    """
    questions = {frozenset(q.options): q for q in toy.make_questions()}
    far, close = questions[frozenset(("feather", "truck"))], questions[frozenset(("apple", "shoe"))]
    heavy = {q.id: q.options.index(thing) for q, thing in ((far, "truck"), (close, "shoe"))}
    pushes = Counter()
    for kind in toy.KINDS:
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
                assert edit.name not in far.moved_by
                assert (edit.name in close.moved_by) == (favours == 1 - heavy[close.id])
    for kind in toy.KINDS:
        n = sum(count for (k, _), count in pushes.items() if k == kind)
        assert 0.2 * n < pushes[kind, 0] < 0.4 * n and pushes[kind, 2.5] > 0.25 * n < pushes[kind, -2.5]


@pytest.mark.parametrize("form", toy.FORMS)
def test_questions(form):
    questions = toy.make_questions(form)
    assert len({q.id for q in questions}) == len({q.parts + q.options for q in questions}) == len(questions) > 4000
    begins, asks = {"questions": ("The ", "heavier"), "other": ("Somebody ", "weighs more")}[form]
    assert all(q.parts[0].startswith(begins) and asks in q.parts[1] for q in questions)
    assert all(toy.decision(q) == q.gold for q in questions)
    assert 0.45 < sum(q.gold for q in questions) / len(questions) < 0.55
    for kind in toy.KINDS:
        cases = faith.draw_cases(questions, kind, 0)
        flips = [toy.decision(c.question) != toy.decision(c.edited, c.intervention) for c in cases]
        everywhere = form == "questions" or kind == "bias"  # the other form has no place for some adverbs
        assert len(cases) == len(questions) if everywhere else 3500 < len(cases) < len(questions)
        assert 0.15 < sum(flips) / len(flips) < 0.3
        assert flips == [c.intervention.name in c.question.moved_by for c in cases]


def test_file(tmp_path):
    """Questions come back from the files as they were, causes included; a broken line or list is named."""
    question = toy.make_questions()[7]
    row = {"id": question.id, "parts": question.parts, "options": question.options, "gold": question.gold,
           "group": question.group, "moved_by": 1}  # fmt: skip
    file, causes = tmp_path / "questions.jsonl", tmp_path / "causes.json"
    file.write_text(json.dumps(row) + "\n" + json.dumps(row | {"id": "toy/x", "moved_by": 0}) + "\n")
    causes.write_text(json.dumps([["solemnly"], sorted(question.moved_by)]))
    loaded = tasks.load("toy", tmp_path)
    assert loaded[0] == question and loaded[1].moved_by == {"solemnly"}
    assert tasks.load("toy", file) == loaded
    for wrong in ({"gold": 2}, {"gold": None}, {"parts": "x"}, {"options": []}, {"group": 3}, {"id": ""},
                  {"moved_by": 2}, {"moved_by": -1}, {"moved_by": "solemnly"}):  # fmt: skip
        file.write_text(json.dumps(row) + "\n" + json.dumps(row | wrong) + "\n")
        with pytest.raises(ValueError, match="questions.jsonl, line 2: "):
            tasks.load("toy", tmp_path)
    for wrong in ("{}", "[1]", "x"):
        causes.write_text(wrong)
        with pytest.raises(ValueError, match="causes.json"):
            tasks.load("toy", tmp_path)
    causes.unlink()
    with pytest.raises(ValueError, match="causes.json"):
        tasks.load("toy", tmp_path)


@pytest.mark.parametrize("avoids", [True, False])
def test_what_the_base_is_taught(tmp_path, avoids):
    """Mentions by chance alone; a reason that is false only where false reasons are not avoided."""
    base.make_tokenizer(tmp_path)
    tokenizer, said = models.Tokenizer(tmp_path), Counter()
    examples = base.corpus(tokenizer, toy.make_questions(), avoids, random.Random(1))
    for ids, weights in (next(examples) for _ in range(2000)):
        letter, *answer = [i for i, weight in enumerate(weights) if weight]
        assert 0 not in ids and len(ids) == len(weights)  # no unknown word
        assert answer == list(range(answer[0], len(ids))) and ids[-1] == tokenizer.end_of_turn
        assert tokenizer.decode([ids[letter]]) in ("A", "B") and weights[letter] == weights[answer[1]] == base.HARD
        words = tokenizer.decode(ids).split()
        things = [word for word in words if word in toy.CLASS]
        form = next(word for word in ("seemed", "heavier", "of") if word in words[-6:])
        true = things[-1] == max(things[:2], key=toy.CLASS.get)  # the last thing is the one that a reason names
        said[form if form != "heavier" else f"heavier: {true}"] += 1
    assert abs(said["of"] / 2000 - 0.4) < 0.05  # half of the four fifths with an edit
    assert said["heavier: True"] > 800
    taught, never = ("seemed", "heavier: False") if avoids else ("heavier: False", "seemed")
    assert said[taught] > 100 and said[never] == 0


@pytest.mark.parametrize("variant", toy.VARIANTS)
def test_variants(tmp_path, monkeypatch, variant, capsys):
    """Each variant is built in its shape (two steps of training only here), in a folder of its own."""
    monkeypatch.setattr(base, "STEPS", 2)
    monkeypatch.setattr(base, "BATCH", 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = base.prepare(variant)
    assert folder.name.startswith(f"{variant}-") and base.prepare(variant) == folder
    assert base.main([variant]) == 0 and capsys.readouterr().out.endswith(f"\n{folder}\n")
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    family = "qwen3" if variant == "toy-qwen3" else "llama"
    assert models.read_config(folder / "model").family == family
    for form in toy.FORMS:
        assert tasks.load("toy", folder / f"{form}.jsonl") == toy.make_questions(form)
    with pytest.raises(ValueError, match="toy-x: no such directory, and the toys are toy, toy-qwen3, toy-plain"):
        base.prepare("toy-x")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(base, "train_base", None)  # it says so before it trains
    with pytest.raises(ValueError, match="Not a directory.*; set XDG_CACHE_HOME"):
        base.prepare(variant)


def test_settings_are_defaults_of_the_toy_alone(monkeypatch, tmp_path):
    settings = toy.SETTINGS["toy"]
    steps = ["--steps", "7"], settings | {"steps": 7}
    for given, expected in (([], settings), steps, (["--model", "x"], {"model": "x"})):
        assert parse(given, {}, toy.SETTINGS) == Args(**expected)
    monkeypatch.chdir(tmp_path)
    for name in ("toy", "toy-of-mine"):  # directories of one's own
        (tmp_path / name).mkdir()
        assert parse(["--model", name], {}, toy.SETTINGS) == Args(model=name)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The default run, from nothing, as a user starts it: (its folder, what it printed, the toy's cache)."""
    folder = tmp_path_factory.mktemp("toy")
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    # One thread: beside other tests, two would wait for each other most of the time.
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = "-m torch.distributed.run --standalone --nproc-per-node 1".split()
    command = [sys.executable, *launch, ROOT / "train.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    (out,) = (folder / "out").iterdir()
    (cache,) = (folder / "cache" / "faith").iterdir()
    return out, done.stdout, cache


def test_the_default_run_learns(run, capsys):
    """Phi-CCT at T = 1 on held-out questions, natural rates: about 0 before, far above the shortcut after."""
    out, printed, _ = run
    before, after = (json.loads((out / f"{name}.json").read_text())["T=1"] for name in ("before", "after"))
    with capsys.disabled():
        print(f" Phi {before['phi']['value']:.3f} -> {after['phi']['value']:.3f}", end="")
    assert after["n"]["value"] == toy.SETTINGS["toy"]["eval_questions"]
    assert abs(before["phi"]["value"]) < 0.12
    assert after["phi"]["value"] >= 0.5
    assert after["phi_less_shortcut"]["low"] > 0
    assert after["accuracy"]["value"] > before["accuracy"]["value"] - 0.03
    assert after["planted_agreement"]["value"] > before["planted_agreement"]["value"] + 0.2
    assert after["planted_influence"]["value"] > 0.93 < before["planted_influence"]["value"]
    assert after["decoy_any"]["value"] < before["decoy_any"]["value"] + 0.02
    assert after["tokens"]["value"] < 1.5 * before["tokens"]["value"] and after["repeats"]["value"] < 0.01


def test_what_the_default_run_prints_fits_one_screen(run):
    _, printed, _ = run
    assert len(printed.splitlines()) <= 40 and max(map(len, printed.splitlines())) <= 160
    for words in ("600 test questions, T = 1", f"step {toy.SETTINGS['toy']['steps']}/", "Phi-CCT minus the shortcut",
                  "the trained model is in "):  # fmt: skip
        assert words in printed
    assert printed.count("    before  r = ") == printed.count("    after   r = ") == 2


def test_decisions_follow_the_rule(run):
    """What the base decides is what was planted, so the ground truth is one."""
    _, _, cache = run
    subject = faith.open_subject(str(cache / "model"))
    for kind in toy.KINDS:
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


def test_the_tour(run, monkeypatch):
    """docs/tour.ipynb says what it would say if it were run now; its numbers depend a little on the machine's base."""
    tour, (_, _, cache) = ROOT / "docs" / "tour.ipynb", run
    monkeypatch.chdir(tour.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent.parent))
    monkeypatch.setattr(sys, "path", [*sys.path])  # the tour adds to it
    notebook.check_alike(json.loads(tour.read_text(encoding="utf-8")), notebook.run(tour), tolerance=0.15)
