"""build.py: what a data set holds, that a killed build ends with the same bytes, and that train.py takes no other."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny

import faith
import reward
import tasks
import train
from lab import build
from model import Tokenizer, load
from rollout import Sampler
from run import files
from run.args import parse
from run.ranks import Ranks

DATA = tiny.ROOT / "tests" / "data" / "esnli"
SMALL = {"task": "esnli", "data": DATA, "intervention": "bias", "eval_questions": 5, "fit_questions": 3}
SPLITS = ("test", "fit", "train")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("model"))


def flags(folder, out, **changes):
    given = {"model": folder, "out": out, **SMALL, "size": 40, "edits": 12} | changes
    named = [(f"--{name.replace('_', '-')}", value) for name, value in given.items() if value is not None]
    return [text for name, value in named for text in ([name] if value is True else [name, str(value)])]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(build, "BLOCK", 4)


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("set") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "BLOCK", 4)
        assert build.main(flags(folder, out)) == 0
    return out


def content(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def read(out):
    return {name: files.read_jsonl(out / f"{name}.jsonl") for name in SPLITS}, json.loads(
        (out / "manifest.json").read_text()
    )


# ---- what is in it -------------------------------------------------------------------------------------------


def test_lines_give_the_cases_and_labels_of_the_model(done, folder):
    """Asked again, from what the lines alone hold, one question at a time."""
    rows, _ = read(done)
    subject = faith.Subject(Sampler(load(folder)), Tokenizer(folder))
    for row in (row for name in SPLITS for row in rows[name]):
        plain = {"parts": row["parts"], "options": row["options"], "appeal": ""}
        ask = [
            tasks.Question(row["task"], "", tuple(q["parts"]), tuple(q["options"]), 0, "", q["appeal"])
            for q in (plain, plain | row["edited"])
        ]
        assert row["text_inserted"] in faith.ask(ask[1]) and row["text_inserted"] not in faith.ask(ask[0])
        p, p_edit = np.exp(faith.decide(subject, ask[:1])[0]), np.exp(faith.decide(subject, ask[1:])[0])
        assert np.allclose(p, row["p"], atol=1e-5) and np.allclose(p_edit, row["p_edit"], atol=1e-5)
        assert (row["y"], row["y_edit"]) == (p.argmax(), p_edit.argmax())
        assert row["influence"] == (row["y"] != row["y_edit"])


def test_balance_and_splits(done):
    rows, manifest = read(done)
    assert [row["influence"] for row in rows["train"]] == [1, 0] * 20
    groups = {name: {row["group"] for row in rows[name]} for name in SPLITS}
    assert all(groups.values()) and not any(groups[a] & groups[b] for a in SPLITS for b in SPLITS if a < b)
    parts = tasks.split(tasks.load("esnli", DATA), {"test": 5, "fit": 3, "train": -1}, seed=0)
    for name in ("test", "fit"):
        assert [row["id"] for row in rows[name]] == [q.id for q in parts[name]]
    assert {row["id"] for row in rows["train"]} <= {q.id for q in parts["train"]}
    texts = [json.dumps([row["parts"], row["edited"]]) for row in rows["train"]]
    assert len(set(texts)) == len(texts)  # no edit twice
    held_out = set(reward.words("bias", held_out=True))
    assert not held_out & {row["word"] for row in rows["train"] + rows["fit"]}
    for name in SPLITS:
        said = manifest["splits"][name]
        assert said["rows"] == len(rows[name]) and said["groups"] == len(groups[name])
        assert said["influence_rate"] == pytest.approx(np.mean([r["influence"] for r in rows[name]]), abs=1e-4)
        assert said["accuracy"] == pytest.approx(np.mean([r["y"] == r["gold"] for r in rows[name]]), abs=1e-4)
        assert said["picks"] == pytest.approx(np.bincount([r["y"] for r in rows[name]], minlength=3) / said["rows"],
                                              abs=1e-4)  # fmt: skip


def test_manifest(done, folder):
    """The hash is sha256sum's; what was labelled but not kept is what an independent count gives."""
    rows, manifest = read(done)
    assert manifest["model_sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert manifest["complete"] and manifest["short"] == "" and manifest["seed"] == 0
    assert {path.name for path in done.iterdir()} == {"manifest.json", *(f"{name}.jsonl" for name in SPLITS)}
    subject = faith.Subject(Sampler(load(folder)), Tokenizer(folder))
    questions = tasks.split(tasks.load("esnli", DATA), {"test": 5, "fit": 3, "train": -1}, seed=0)["train"]
    counts = {0: 0, 1: 0}
    for case in build.candidates(questions, "bias", 0, 12, build.Counter()):
        counts[faith.decision_rows(subject, [case])[0]["influence"]] += 1
        if min(counts.values()) >= 20 and sum(counts.values()) % 4 == 0:
            break
    assert manifest["labelled"]["rows"] == sum(counts.values()) < 12 * len(questions)  # no more than needed
    assert manifest["labelled"]["influence_rate"] == pytest.approx(counts[1] / sum(counts.values()), abs=1e-4)
    dropped = manifest["dropped"]["train"]
    assert dropped["influence, beyond the balance"] == counts[1] - 20
    assert dropped["no influence, beyond the balance"] == counts[0] - 20


def test_candidates_are_different_and_take_turns():
    questions = tasks.load("esnli", DATA)
    barren = tasks.Question("esnli", "none", ("Hm.", "Hm."), ("yes", "no", "maybe"), 0, "none")
    dropped = build.Counter()
    cases = list(build.candidates([*questions[:3], barren], "adverb", 5, 200, dropped))
    assert {c.question.id for c in cases[:3]} == {q.id for q in questions[:3]}
    assert len({c.edited for c in cases}) == len(cases)
    assert dropped["no place for an edit"] == 1 and dropped["an edit drawn before"] == 600 - len(cases) > 0
    first = [c for c in cases if c.question == questions[0]]
    alone = list(build.candidates(questions[:1], "adverb", 5, 200, build.Counter()))
    assert first == alone  # whatever the others


@pytest.mark.parametrize("kind", reward.KINDS)
@pytest.mark.parametrize("task", ["esnli", "social_iqa", "comve", "strategyqa"])
def test_cases_are_written_and_read(task, kind, tmp_path):
    """Every kind of edit, in a premise, an option or after the question, is put back as it was drawn."""
    questions = tasks.load(task, DATA.parent / task)
    cases = faith.draw_cases(questions, kind, 3)
    logp = np.log([[0.6, 0.4], [0.3, 0.7]])
    labelled = [(case, faith.decision_row(case, *logp)) for case in cases]
    files.write_jsonl(tmp_path / "train.jsonl", [build.record(*pair) for pair in labelled])
    manifest = {"complete": True, "seed": 4, "splits": {"train": {"rows": len(cases)}}}
    files.write_json(tmp_path / "manifest.json", manifest)
    got = build.read(tmp_path, questions, {"seed": 4})
    assert [case for case, _ in got] == cases and len(cases) > 5
    assert [{key: row[key] for key in labelled[0][1]} for _, row in got] == [row for _, row in labelled]


# ---- stopped and started again -------------------------------------------------------------------------------


def test_what_is_labelled_is_not_labelled_again(folder, done, tmp_path, monkeypatch):
    plain, calls = faith.decision_rows, []

    def stopped(subject, cases):
        calls.append(len(cases))
        if len(calls) == 9:
            raise KeyboardInterrupt
        return plain(subject, cases)

    out = tmp_path / "o"
    monkeypatch.setattr(faith, "decision_rows", stopped)
    assert build.main(flags(folder, out)) == 130 and not json.loads((out / "manifest.json").read_text())["complete"]
    with (out / "labelling-train.jsonl").open("a") as log:
        log.write('{"rows": [{"id": "esnli')  # torn
    first = sum(calls[:8])
    calls.clear()
    monkeypatch.setattr(
        faith, "decision_rows", lambda subject, cases: calls.append(len(cases)) or plain(subject, cases)
    )
    assert build.main(flags(folder, out)) == 0
    assert content(out) == content(done)
    assert first + sum(calls) == 8 + json.loads((out / "manifest.json").read_text())["labelled"]["rows"]
    calls.clear()
    assert build.main(flags(folder, out)) == 0 and not calls and content(out) == content(done)


SLOW = """
import sys, time, faith
from lab import build
build.BLOCK, plain = 4, faith.decision_rows
faith.decision_rows = lambda *given: time.sleep(0.03) or plain(*given)
sys.exit(build.main(sys.argv[1:]))
"""


def test_random_kills(folder, tmp_path):
    """kill -9 at random moments, from before the first file to after the last: the same bytes in the end."""
    (tmp_path / "slow.py").write_text(SLOW)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(tiny.ROOT)}

    def start(out):
        given = [*flags(folder, out, size=100, edits=30), "--calibrate", "--calibration-questions", "5"]
        return subprocess.Popen([sys.executable, tmp_path / "slow.py", *given], env=environment, cwd=tiny.ROOT,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip

    def blocks():
        return sum(log.read_text().count("\n") for log in copy.glob("labelling-*.jsonl"))

    printed, error = (whole := start(tmp_path / "whole")).communicate()
    assert whole.returncode == 0 and not error
    told = r"labelling-train: \d+/360 edits, [\d.]+% moved, kept \d+ of 100, [\d.]+ min left\n"
    assert 1 <= len(re.findall(told, printed)) <= 10, printed
    copy, draw, killed = tmp_path / "killed", random.Random(1), []
    for _ in range(int(os.environ.get("FAITH_KILLS", "4"))):
        process, wanted = start(copy), blocks() + draw.choice((0, 1, 3, 6, 9))
        while process.poll() is None and blocks() < wanted:
            time.sleep(0.005)
        process.kill()
        process.communicate()
        killed.append(process.returncode)
    assert killed.count(-signal.SIGKILL) >= 2 and blocks() > 3
    assert start(copy).wait() == 0
    assert content(copy) == content(tmp_path / "whole")


def refused(capsys, given, words):
    code, (_, error) = build.main(given), capsys.readouterr()
    assert code == 2 and words in error and error.count("\n") == 1 and error.startswith("lab.build: "), error


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"seed": 1}, "begun with seed 0, not 1"), ({"size": 42}, "begun with size 40, not 42"),
        ({"edits": 3}, "begun with edits"), ({"eval_questions": 4}, "begun with eval_questions 5, not 4"),
        ({"intervention": "adverb"}, "begun with intervention"), ({"calibrate": True}, "begun with calibration"),
        ({"data": DATA / "esnli_dev.csv"}, "begun with data"), ({"model": "other"}, "begun with model"),
    ],
)  # fmt: skip
def test_other_flags_are_refused(done, folder, tmp_path, capsys, changes, words):
    if "model" in changes:
        changes = {"model": tiny.build(tmp_path / "model", seed=18)}
    before = content(done)
    refused(capsys, flags(folder, done, **changes), words)
    assert content(done) == before


def test_other_weights_or_data_of_the_same_name_are_refused(folder, tmp_path, capsys):
    copy, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(folder, copy), shutil.copytree(DATA, data)
    given = flags(copy, tmp_path / "o", data=data, size=4)
    assert build.main(given) == 0
    capsys.readouterr()
    text = (data / "esnli_dev.csv").read_text()
    (data / "esnli_dev.csv").write_text(text.replace("shirt", "skirt"))
    refused(capsys, given, "begun with data_sha256")
    (data / "esnli_dev.csv").write_text(text)
    tiny.build(copy, seed=18)
    refused(capsys, given, "begun with model_sha256")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"size": 7}, "--size must be even"), ({"size": 0}, "--size must be from 2"), ({"edits": 0}, "--edits"),
        ({"seed": -1}, "--seed"), ({"eval_questions": 500}, "too few"), ({"model": "no/model"}, "no model at"),
        ({"data": "nowhere"}, "nowhere"), ({"task": "comve"}, "comve"), ({"fit_questions": 0}, "--fit-questions"),
    ],
)  # fmt: skip
def test_mistakes(folder, tmp_path, capsys, changes, words):
    refused(capsys, flags(folder, tmp_path / "o", **changes), words)
    assert not (tmp_path / "o").exists()


def test_a_folder_of_something_else(folder, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    refused(capsys, flags(folder, tmp_path), "already holds something")
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "manifest.json.part").write_text("{")  # a kill in the very first moment
    assert build.main(flags(folder, tmp_path / "part", size=4)) == 0


def test_an_adapter_is_refused(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    refused(capsys, flags(tmp_path / "model", tmp_path / "o"), "is an adapter")


def test_a_model_that_flips_too_rarely(folder, tmp_path, capsys, monkeypatch):
    assert build.main(flags(folder, tmp_path / "few", size=600, edits=2)) == 0
    rows, manifest = read(tmp_path / "few")
    moved = round(manifest["labelled"]["rows"] * manifest["labelled"]["influence_rate"])
    assert 0 < 2 * moved == len(rows["train"]) < 600 and sum(row["influence"] for row in rows["train"]) == moved
    told = f"{2 * moved} of 600 rows, since the model flips too rarely: {moved} of {manifest['labelled']['rows']} edits"
    assert manifest["short"].startswith(told) and told in capsys.readouterr().out
    for constant in (0, 1):
        monkeypatch.setattr(reward, "influence", lambda y, y_edited, constant=constant: constant)
        given = flags(folder, tmp_path / f"{constant}", edits=1)
        code, (_, error) = build.main(given), capsys.readouterr()
        assert code == 2 and f"nothing to balance: {12 * constant} of 12 edits moved it" in error


# ---- train.py ------------------------------------------------------------------------------------------------


def training(folder, out, dataset, **changes):
    given = {"model": folder, "out": out, "dataset": dataset, "labels": "frozen", **SMALL, "steps": 2, "prompts": 4,
             "samples": 2, "max_new_tokens": 6, "warmup": 0, "lr": 1e-3, "eval_before": None} | changes  # fmt: skip
    named = [(f"--{name.replace('_', '-')}", value) for name, value in given.items() if value is not None]
    return [text for name, value in named for text in ([name] if value is True else [name, str(value)])]


@pytest.fixture
def trains(monkeypatch, capsys):
    def run(given):
        monkeypatch.setattr(sys, "argv", ["train.py", *given, "--no-eval-before"])
        code = train.main()
        return code, capsys.readouterr().err

    return run


def test_a_run_takes_its_labels(done, folder, tmp_path, trains, monkeypatch):
    seen, label = [], train.label
    monkeypatch.setattr(
        train, "label", lambda subject, cases, ranks: seen.append(cases) or label(subject, cases, ranks)
    )
    code, error = trains(training(folder, tmp_path / "o", done))
    assert code == 0, error
    rows, _ = read(done)
    assert {case.question.id for cases in seen for case in cases} == {
        row["id"] for row in rows["fit"]
    }  # the shortcut's
    keys = ("id", "word", "text_inserted", "y", "y_edit", "influence")
    known = {tuple(row[key] for key in keys) for row in rows["train"]}
    said = files.read_jsonl(tmp_path / "o" / "explanations.jsonl")
    assert len(said) == 16 and {tuple(entry[key] for key in keys) for entry in said} <= known
    assert [(m["labelled"], m["influence_rate"]) for m in files.read_jsonl(tmp_path / "o" / "metrics.jsonl")] == [
        (40, 0.5)
    ] * 2
    tested = files.read_jsonl(tmp_path / "o" / "after.T0.jsonl")
    assert [(r["id"], r["text_inserted"]) for r in tested] == [(r["id"], r["text_inserted"]) for r in rows["test"]]


def test_calibrated_labels(folder, tmp_path, trains):
    given = {"calibrate": True, "calibration_questions": 5}
    assert build.main(flags(folder, tmp_path / "set", **given)) == 0
    code, error = trains(training(folder, tmp_path / "o", tmp_path / "set", **given, steps=1))
    assert code == 0, error
    offsets = json.loads((tmp_path / "o" / "calibration.json").read_text())["mean_logp"]
    assert json.loads((tmp_path / "set" / "manifest.json").read_text())["mean_logp"] == offsets
    row = read(tmp_path / "set")[0]["train"][0]
    args = parse(training(folder, tmp_path / "n", tmp_path / "set", **given), {}, {})
    subject, _, _, stream = train.prepare(args, Ranks(), build.read_dataset)
    subject.offsets = np.array(offsets)
    assert faith.decision_rows(subject, [stream.frozen[0][0]])[0]["p"] == pytest.approx(row["p"], abs=1e-5)
    code, error = trains(training(folder, tmp_path / "n", tmp_path / "set"))
    assert code == 2 and "its calibration_questions is 5, this run's 0" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "what, words",
    [
        ("on-policy", "add --labels frozen"), ("adverb", "its intervention is 'bias', this run's 'adverb'"),
        ("fewer test questions", "its eval_questions is 5, this run's 4"), ("task", "its task is 'esnli'"),
        ("model", "its model_sha256 is"), ("unfinished", "is not finished"), ("nothing", "is no data set"),
        ("calibrate", "its calibration_questions is 0, this run's 300"), ("data", "its data_sha256 is"),
        ("leak", "line 1: not a training question"), ("text", "is another question there"),
        ("cut", "has 39 lines"),
        ("half", "incomplete"), ("unedited", "is not edited"), ("unlabelled", "incomplete"),
        ("no splits", "has 40 lines"),
    ],
)  # fmt: skip
def test_another_data_set_is_refused(done, folder, tmp_path, trains, what, words):
    copy, changes = tmp_path / "set", {}
    shutil.copytree(done, copy)
    lines, manifest = files.read_jsonl(copy / "train.jsonl"), json.loads((copy / "manifest.json").read_text())
    if what == "leak":
        lines[0] = files.read_jsonl(copy / "test.jsonl")[0]
    elif what == "text":
        lines[0]["parts"][0] += " Really."
    elif what == "half":
        del lines[0]["edited"]
    elif what == "unlabelled":
        del lines[0]["influence"]
    elif what == "no splits":
        del manifest["splits"]
    elif what == "cut":
        del lines[-1]
    elif what == "unedited":
        lines[0]["edited"] = {}
    elif what == "nothing":
        copy = DATA
    elif what == "unfinished":
        manifest["complete"] = False
    elif what == "data":
        shutil.copytree(DATA, tmp_path / "data")
        file = tmp_path / "data" / "esnli_dev.csv"
        file.write_text(file.read_text().replace("shirt", "skirt"))
        changes = {"data": tmp_path / "data"}
    elif what == "model":
        changes = {"model": tiny.build(tmp_path / "model", seed=18)}
    if copy != DATA:
        files.write_jsonl(copy / "train.jsonl", lines)
        files.write_json(copy / "manifest.json", manifest)
    changes |= {"on-policy": {"labels": "on-policy"}, "adverb": {"intervention": "adverb"},
                "fewer test questions": {"eval_questions": 4},
                "calibrate": {"calibrate": True},
                "task": {"task": "social_iqa", "data": DATA.parent / "social_iqa"}}.get(what, {})  # fmt: skip
    code, error = trains(training(folder, tmp_path / "o", copy, **changes))
    assert code == 2 and words in error and error.count("\n") == 1 and error.startswith("train.py: "), error
    assert not (tmp_path / "o").exists()


def test_the_command(done, folder):
    """As a user runs it."""
    ran = subprocess.run([sys.executable, "-m", "lab.build", *flags(folder, done)], cwd=tiny.ROOT,
                         capture_output=True, text=True)  # fmt: skip
    assert ran.returncode == 0 and "train  40 rows" in ran.stdout and "50.0% moved" in ran.stdout, ran.stderr
