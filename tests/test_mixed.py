"""Several tasks in one run: batches by --mix, each task balanced, calibrated, measured and continued by itself."""

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path

import launch
import numpy as np
import pytest
import tiny
import torch
from launch import lines, ran, refused, same, weights

import faith
import report
import tasks
from batches import DecisionAnchor, Stream, balanced_batch, label
from lab import build
from lab.compare import compare
from run import files, identity
from run.args import Args, data_sets
from run.policy import Policy
from run.ranks import Ranks

DATA = tiny.ROOT / "tests" / "data"
BOTH = {"task": "esnli,strategyqa", "data": f"{DATA}/esnli,{DATA}/strategyqa"}  # of three and of two options
OFFSETS = {"esnli": np.array([-1.0, -3.0, -0.5]), "strategyqa": np.array([-0.3, -2.0])}


def arguments(**changes):
    return Args(**launch.SMALL | BOTH | {"prompts": 6} | changes)


def flags(folder, out, **changes):
    return launch.flags(folder, out, **BOTH | {"mix": "2,1", "prompts": 6, "eval_questions": 4} | changes)


@pytest.fixture(scope="module")
def questions():
    return [q for task in ("esnli", "strategyqa") for q in tasks.load(task, DATA / task)]


def counts(labelled):
    return Counter((case.question.task, row["influence"]) for case, row in labelled)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"data": DATA / "esnli"}, "one path for each"), ({"task": "esnli,esnli"}, "name each task once"),
        ({"task": "esnli,snli"}, "unknown task 'snli'"), ({"mix": "0,1"}, "a whole number from 1 to 1000 for each of"),
        ({"mix": "2"}, "--mix 2: give"), ({"mix": "1,1,1"}, "--mix 1,1,1: give"), ({"mix": "1,x"}, "--mix 1,x: give"),
        ({"task": "esnli", "data": DATA / "esnli", "mix": "1,2"}, "for each of esnli"),
        ({"mix": "1,1001"}, "1 to 1000"),
        ({"fit_questions": 15}, "too few"),
    ],
)  # fmt: skip
def test_mistakes(folder, tmp_path, changes, words):
    assert words in refused(flags(folder, tmp_path / "o", **changes)) and not (tmp_path / "o").exists()


def test_splits_are_those_of_each_task_alone(tmp_path, capsys):
    """Rows with a fault are left out of any of them. Ids may not meet."""
    sizes, paths = {"test": 4, "fit": 3, "train": -1}, data_sets(BOTH["task"], BOTH["data"])
    loaded, parts = tasks.load_splits(paths, sizes, False)
    alone = {task: tasks.split(tasks.load(task, path), sizes, seed=0) for task, path in paths.items()}
    assert parts == {name: alone["esnli"][name] + alone["strategyqa"][name] for name in sizes}
    own = {"parts": ["Is it?"], "options": list("abcd"), "gold": 0, "group": "g", "id": loaded[0].id}
    files.write_jsonl(tmp_path / "own.jsonl", [own, own | {"id": "1", "gold": 7}])
    with pytest.raises(ValueError, match="gold must be"):
        tasks.load_splits({"jsonl": tmp_path / "own.jsonl"}, {"test": 1}, False)
    assert len(tasks.load_splits({"jsonl": tmp_path / "own.jsonl"}, {"test": 1}, True)[0]) == 1
    with pytest.raises(ValueError, match="the id .* occurs in two files or tasks"):
        tasks.load_splits(paths | {"jsonl": tmp_path / "own.jsonl"}, {"test": 1}, True)
    assert "skipped 1 of 2 rows" in capsys.readouterr().err


@pytest.mark.parametrize("offsets", [{}, OFFSETS])
def test_decisions_and_anchor_are_those_of_each_task_alone(subject, questions, offsets):
    """Questions of two, three and four options in turns. Also the figure and the gradient of the anchor's KL."""
    subject.offsets = offsets
    four = tasks.Question("jsonl", "four", ("Is a man here?",), tuple("abcd"), 0, "g")
    mixed = [q for pair in zip(questions[:5], questions[-5:], strict=True) for q in (*pair, four)]
    together = faith.decide(subject, mixed)
    for question, logp in zip(mixed, together, strict=True):
        n = len(question.options)
        plain = faith.decide(dataclasses.replace(subject, offsets={}), [question])[0] - offsets.get(question.task, 0.0)
        assert np.allclose(logp[:n], plain - np.log(np.exp(plain).sum()), atol=1e-5)
        assert not np.exp(logp[n:]).any()
    cases = faith.draw_cases(mixed[:8], "bias", 0)
    labelled = label(subject, cases, Ranks())
    for (case, row), y in zip(labelled, faith.decide(subject, [c.question for c in cases]).argmax(1), strict=True):
        assert row["task"] == case.question.task and len(row["p"]) == len(row["p_edit"]) == len(case.question.options)
        assert row["y"] == y and sum(row["p"]) == pytest.approx(1)
    network, args = subject.sampler.model, arguments(anchor=1.0)
    anchor = DecisionAnchor(subject, Policy(network, args, Ranks()), labelled, args, Ranks())
    assert abs(anchor.divergence(labelled)) < 1e-5
    with torch.no_grad():
        network.layers[0].self_attn.o_proj.weight += 0.05
    results = []
    for parts in ([labelled], [[pair] for pair in labelled]):
        network.zero_grad()
        kl = sum(anchor.divergence(part) for part in parts)
        kl.backward()
        results.append((kl.item(), network.embed_tokens.weight.grad.clone()))
    assert results[0][0] > 0.01 and results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    assert torch.allclose(*(gradient for _, gradient in results), atol=1e-5)


@pytest.mark.parametrize("labels", ["on-policy", "frozen"])
def test_batches_follow_the_mix_and_balance_each_task(subject, questions, labels):
    args = arguments(mix="2,1", labels=labels, candidates=400)
    stream = Stream(questions, args)
    if labels == "frozen":
        stream.frozen = label(subject, stream.next_cases(60), Ranks())
        drawn = Counter(case.question.task for case, _ in stream.frozen)
        assert drawn == {"esnli": 40, "strategyqa": 20}
    for n in range(2):
        batch, labelled = balanced_batch(subject, stream, n, args, Ranks())
        assert counts(batch) == {("esnli", 0): 2, ("esnli", 1): 2, ("strategyqa", 0): 1, ("strategyqa", 1): 1}
        assert {case.question.task for case, _ in labelled} == {"esnli", "strategyqa"}
    turns = []  # a batch of one pair: the tasks take turns from step to step
    for n in range(6):
        batch, _ = balanced_batch(subject, stream, n, arguments(mix="2,1", prompts=2, labels=labels), Ranks())
        turns += {case.question.task for case, _ in batch}
    assert turns == ["esnli", "strategyqa", "esnli"] * 2
    even, _ = balanced_batch(subject, Stream(questions, arguments()), 0, arguments(prompts=4, candidates=400), Ranks())
    assert counts(even) == {(task, i): 1 for task in ("esnli", "strategyqa") for i in (0, 1)}


def test_each_task_streams_as_alone_and_goes_on_from_anywhere(questions):
    args = arguments(mix="3,1")
    stream = Stream(questions, args)
    cases = stream.next_cases(60)
    for task in ("esnli", "strategyqa"):
        mine = [case for case in cases if case.question.task == task]
        alone = Stream([q for q in questions if q.task == task], arguments(task=task))
        assert len(mine) == (45 if task == "esnli" else 15) and mine == alone.next_cases(len(mine))
    stream.next_cases(7, "strategyqa")
    resumed = Stream(questions, args)
    resumed.resume_at(**json.loads(json.dumps(stream.position())))
    for task in ("strategyqa", "", "esnli"):
        assert resumed.next_cases(30, task) == stream.next_cases(30, task) and resumed.drawn == stream.drawn


def test_the_shortcut_knows_the_task():
    """In one task influence comes with the letter A, in the other with B."""

    def rows(n):
        return [{"task": task, "y_edit": k % 2, "suggestion": 0, "word": "w", "phrasing": 0,
                 "influence": int(k % 2 == moved)} for k in range(n) for moved, task in enumerate("ab")]  # fmt: skip

    some, fit = rows(20), rows(30)
    guess = report.shortcut(some, fit)
    assert guess["phi"].tolist() == [row["influence"] for row in some]
    assert list(report.by_part(some)) == ["", ".a", ".b"] and list(report.by_part(some[::2])) == [""]


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "whole"
    given = {"steps": 4, "calibrate": True, "calibration_questions": 6, "anchor": 0.5, "anchor_questions": 6,
             "checkpoint_every": 2}  # fmt: skip
    return out, ran(flags(folder, out, **given))


def test_a_run_measures_each_task_and_all(done, folder, tmp_path):
    out, printed = done
    rows, fit = lines(out / "after.T1.jsonl"), lines(out / "after.fit.jsonl")
    figures, difference = json.loads((out / "after.json").read_text()), out / "difference.T1.strategyqa.json"
    assert Counter(row["task"] for row in rows) == {"esnli": 4, "strategyqa": 4}
    assert list(figures) == [f"T={t}{part}" for t in (0, 1) for part in ("", ".esnli", ".strategyqa")]
    for task in ("esnli", "strategyqa"):
        mine, of = ([row for row in some if row["task"] == task] for some in (rows, fit))
        wanted = json.loads(files.json_line(report.summary(mine, of)))
        assert {name: figures[f"T=1.{task}"][name] for name in wanted} == wanted
        assert f"Phi-CCT, {task} " in printed and f"Phi-CCT, {task}" in (out / "model" / "README.md").read_text()
    was, now = ([row for row in some if row["task"] == "strategyqa"] for some in (lines(out / "before.T1.jsonl"), rows))
    assert json.loads(difference.read_text()) == json.loads(files.json_line(compare(was, now)))
    for m in lines(out / "metrics.jsonl"):
        assert m["prompts"] == m["prompts.esnli"] + m["prompts.strategyqa"] and m["prompts.esnli"] <= 4
        assert m["labelled"] == m["labelled.esnli"] + m["labelled.strategyqa"] and len(m["picks"]) == 3
    marks = {identity.mark(q) for task in ("esnli", "strategyqa") for q in tasks.load(task, DATA / task)}
    assert {line.split()[1] for line in (out / "model" / "questions.txt").read_text().splitlines()} <= marks
    # faith.py asks one task as the run did, with the calibration that it had for that task.
    for task in ("esnli", "strategyqa"):
        given = ("--model", out / "model", "--task", task, "--data", DATA / task, "--limit", 4, "--fit", 5,
                 "--temperature", 0, 1, "--max-new-tokens", 10, "--rows", tmp_path / task,
                 "--calibration", out / "model" / "calibration.json")  # fmt: skip
        assert faith.main([str(word) for word in given]) == 0
        again, keys = lines(tmp_path / f"{task}.T1.jsonl"), ("id", "word", "y", "y_edit", "text")
        mine = [row for row in rows if row["task"] == task]
        assert [[row[key] for key in keys] for row in again] == [[row[key] for key in keys] for row in mine]
        for a, b in zip(again, mine, strict=True):
            assert a["p"] == pytest.approx(b["p"], abs=1e-4)


def test_a_stopped_run_goes_on(done, tmp_path):
    """As if the run had been killed between its two checkpoints."""
    copy = Path(shutil.copytree(done[0], tmp_path / "copy"))
    for path in (copy / "checkpoints" / "step-00000004", copy / "model"):
        shutil.rmtree(path)
    assert "continuing after step 2" in ran(["--resume", "--out", copy])
    same(done[0], copy)


def test_frozen_data_set_of_two_tasks(folder, tmp_path, monkeypatch):
    """Half and half in each task, with its offsets. A killed build goes on. The detection objective takes it."""
    sizes = {"eval_questions": 4, "fit_questions": 3, "calibrate": True, "calibration_questions": 5}
    named = {"model": folder, "intervention": "bias", "size": 8, "edits": 12} | BOTH | sizes
    made = [
        word
        for name, value in named.items()
        for word in (f"--{name.replace('_', '-')}", str(value))[: 1 + (value is not True)]
    ]
    assert build.main([*made, "--out", str(tmp_path / "set")]) == 0
    rows, manifest = lines(tmp_path / "set" / "train.jsonl"), json.loads((tmp_path / "set/manifest.json").read_text())
    wanted = {(task, i): 4 for task in ("esnli", "strategyqa") for i in (0, 1)}
    assert Counter((row["task"], row["influence"]) for row in rows) == wanted
    append, again = files.append_jsonl, [*made, "--out", str(tmp_path / "again")]

    def killed(path, values):
        append(path, values)
        if "strategyqa" in path.name:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "append_jsonl", killed)
        assert build.main(again) == 130
    assert build.main(again) == 0
    one, other = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("set", "again"))
    assert one == other and len(one) == 4
    given = {"labels": "frozen", "dataset": tmp_path / "set", "objective": "detection", "steps": 1} | sizes
    ran(flags(folder, tmp_path / "o", **given, eval_before=None))
    saved = json.loads((tmp_path / "o" / "calibration.json").read_text())
    assert saved["mean_logp"] == manifest["mean_logp"] and saved["questions"] == 10
    log = lines(tmp_path / "o" / "explanations.jsonl")
    assert Counter((e["task"], e["influence"]) for e in log) == {(t, i): k for t, k in (("esnli", 2), ("strategyqa", 1))
                                                                for i in (0, 1)}  # fmt: skip
    first, after = weights(folder), weights(tmp_path / "o" / "model")
    assert max((first[name] - after[name]).abs().max() for name in first) > 0
    one = {"task": "esnli", "mix": None, "data": DATA / "esnli"}
    assert "built with task 'esnli,strategyqa', not 'esnli'" in refused(flags(folder, tmp_path / "n", **given | one))
