"""lab.build: what a data set holds, that a killed build ends with the same bytes, and that train.py takes no other."""

import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from pathlib import Path

import launch
import numpy as np
import pytest
import tiny
import torch
from launch import DATA
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

import faith
import reward
import tasks
from lab import build, experiment
from run import files, identity, reading
from run.args import parse
from run.ranks import Ranks

SMALL = {"task": "esnli", "data": DATA, "intervention": "bias", "eval_questions": 5, "fit_questions": 3}
SPLITS = ("test", "fit", "train")


def flags(folder, out, **changes):
    given = {"model": folder, "out": out, **SMALL, "size": 40, "edits": 12} | changes
    named = [(f"--{name.replace('_', '-')}", value) for name, value in given.items()]
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


@pytest.fixture(scope="module")
def parts():
    return tasks.split(tasks.load("esnli", DATA), {"test": 5, "fit": 3, "train": -1}, seed=0)


def content(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def read(out):
    """({split: its rows}, manifest)"""
    rows = {name: reading.read_jsonl(out / f"{name}.jsonl") for name in SPLITS}
    return rows, reading.read_json(out / "manifest.json")


# ---- what is in it -------------------------------------------------------------------------------------------


def test_lines_give_the_cases_and_labels_of_the_model(done, subject):
    """The model is asked again, from what the lines alone hold, one question at a time."""
    for row in (row for rows in read(done)[0].values() for row in rows):
        plain = {"parts": row["parts"], "options": row["options"], "appeal": ""}
        x, x_edit = (
            tasks.Question(row["task"], "", tuple(q["parts"]), tuple(q["options"]), 0, "", q["appeal"])
            for q in (plain, plain | row["edited"])
        )
        assert row["text_inserted"] in faith.ask(x_edit) and row["text_inserted"] not in faith.ask(x)
        p, p_edit = (np.exp(faith.decide(subject, [q])[0]) for q in (x, x_edit))
        assert np.allclose(p, row["p"], atol=1e-5) and np.allclose(p_edit, row["p_edit"], atol=1e-5)
        assert (row["y"], row["y_edit"]) == (p.argmax(), p_edit.argmax())
        assert row["influence"] == (row["y"] != row["y_edit"])


def test_balance_and_splits(done, parts):
    rows, manifest = read(done)
    assert [row["influence"] for row in rows["train"]] == [1, 0] * 20
    groups = {name: {row["group"] for row in rows[name]} for name in SPLITS}
    assert all(groups.values()) and not any(groups[a] & groups[b] for a in SPLITS for b in SPLITS if a < b)
    for name in ("test", "fit"):
        assert [row["id"] for row in rows[name]] == [q.id for q in parts[name]]
    assert {row["id"] for row in rows["train"]} <= {q.id for q in parts["train"]}
    texts = [json.dumps([row["parts"], row["edited"]]) for row in rows["train"]]
    assert len(set(texts)) == len(texts)  # no edit twice
    for name in SPLITS:
        known, n = manifest["splits"][name], len(rows[name])
        assert known["rows"] == n and known["groups"] == len(groups[name])
        assert known["influence_rate"] == pytest.approx(np.mean([r["influence"] for r in rows[name]]), abs=1e-4)


@pytest.mark.parametrize("kind", reward.KINDS)
def test_held_out_words_are_in_test_cases_only(kind, tmp_path, monkeypatch):
    """Twenty questions in each split draw held-out words unless these are kept from them."""

    def rows(subject, cases):
        return [faith.decision_row(case, *np.eye(3)[[0, len(case.intervention.text) % 2]]) for case in cases]

    monkeypatch.setattr(faith, "decision_rows", rows)
    args = types.SimpleNamespace(intervention=kind, seed=0, edits=6, size=60)
    logs = {name: tmp_path / name for name in SPLITS}
    collected, _ = build.collect(None, dict.fromkeys(SPLITS, tasks.load("esnli", DATA)), logs, args)
    held_out = set(reward.words(kind, held_out=True))
    inserted = {name: [row["word"] for _, row in labelled] for name, labelled in collected.items()}
    assert min(map(len, inserted.values())) >= 15
    assert {name: bool(held_out.intersection(words)) for name, words in inserted.items()} == {
        "test": bool(held_out), "fit": False, "train": False,
    }  # fmt: skip


def test_manifest(done, folder, subject, parts):
    """How many edits were labelled is what an independent count gives."""
    manifest = read(done)[1]
    assert manifest["made_of"]["weights"] == identity.weights(folder)
    assert manifest["complete"] and manifest["short"] == "" and manifest["seed"] == 0
    assert {path.name for path in done.iterdir()} == {"manifest.json", *(f"{name}.jsonl" for name in SPLITS)}
    counts = Counter()
    for case in build.candidates(parts["train"], "bias", 0, 12):
        counts[faith.decision_rows(subject, [case])[0]["influence"]] += 1
        if min(counts[0], counts[1]) >= 20 and counts.total() % 4 == 0:
            break
    assert manifest["labelled"]["rows"] == counts.total() < 12 * len(parts["train"])  # no more than needed
    assert manifest["labelled"]["influence_rate"] == pytest.approx(counts[1] / counts.total(), abs=1e-4)


def test_candidates_are_different_and_take_turns():
    questions = tasks.load("esnli", DATA)
    no_place = tasks.Question("esnli", "none", ("Hm.", "Hm."), ("yes", "no", "maybe"), 0, "none")
    cases = list(build.candidates([*questions[:3], no_place], "adverb", 5, 200))
    assert {c.question.id for c in cases[:3]} == {q.id for q in questions[:3]}
    assert len({c.edited for c in cases}) == len(cases) < 600
    alone = list(build.candidates(questions[:1], "adverb", 5, 200))
    assert [c for c in cases if c.question == questions[0]] == alone  # whatever the others


@pytest.mark.parametrize("kind", reward.KINDS)
@pytest.mark.parametrize("task", ["esnli", "social_iqa", "comve", "strategyqa"])
def test_cases_are_written_and_read(task, kind, tmp_path, monkeypatch):
    """Every kind of edit, in a premise, an option or after the question, is put back as it was drawn."""
    questions = tasks.load(task, DATA.parent / task)
    cases = faith.draw_cases(questions, kind, 3)
    labelled = [(case, faith.decision_row(case, *np.log([[0.6, 0.4], [0.3, 0.7]]))) for case in cases]
    files.write_jsonl(tmp_path / "train.jsonl", [build.record(*pair) for pair in labelled])
    manifest = {"complete": True, "seed": 4, "splits": {"train": {"rows": len(cases)}}}
    files.write_json(tmp_path / "manifest.json", manifest)
    monkeypatch.setattr(build, "settings", lambda args: {"seed": 4})
    got = build.read_dataset(types.SimpleNamespace(dataset=tmp_path), {}, questions)
    assert [case for case, _ in got] == cases and len(cases) > 5
    assert [{key: row[key] for key in labelled[0][1]} for _, row in got] == [row for _, row in labelled]


# ---- stopped and started again -------------------------------------------------------------------------------


def test_what_is_labelled_is_not_labelled_again(folder, done, tmp_path, monkeypatch):
    plain, calls, out, stop = faith.decision_rows, [], tmp_path / "o", 9

    def rows(subject, cases):
        calls.append(len(cases))
        if len(calls) == stop:
            raise KeyboardInterrupt
        return plain(subject, cases)

    monkeypatch.setattr(faith, "decision_rows", rows)
    assert build.main(flags(folder, out)) == 130 and not reading.read_json(out / "manifest.json")["complete"]
    with (out / "labelling-train.jsonl").open("a") as log:
        log.write('{"rows": [{"id": "esnli')  # torn
    calls[8:], stop = [], None
    assert build.main(flags(folder, out)) == 0 and content(out) == content(done)
    assert sum(calls) == 8 + read(out)[1]["labelled"]["rows"]  # 5 test and 3 fit cases besides
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

    def start(out):
        given = flags(folder, out, size=100, edits=30, calibrate=True, calibration_questions=5)
        return launch.start(given, script=tmp_path / "slow.py")

    def blocks():
        return sum(log.read_text().count("\n") for log in copy.glob("labelling-*.jsonl"))

    code, printed, error = launch.finish(start(tmp_path / "whole"))
    assert code == 0 and "labelling-train: 100/100 rows, " in error
    line = r"labelling-train: \d+/100 rows, [\d.]+% of \d+ moved, [\d.]+ min left\n"
    assert len(re.findall(line, error)) <= 10 and not re.findall(line, printed)
    copy, draw, killed = tmp_path / "killed", random.Random(1), []
    for _ in range(int(os.environ.get("FAITH_KILLS", "4"))):
        process, wanted = start(copy), blocks() + draw.choice((0, 1, 3, 6, 9))
        while process.poll() is None and blocks() < wanted:
            time.sleep(0.005)
        process.kill()
        process.communicate()
        killed.append(process.returncode)
    assert killed.count(-signal.SIGKILL) >= 2 and blocks() > 3
    assert launch.finish(start(copy))[0] == 0 and content(copy) == content(tmp_path / "whole")


def refused(capsys, given, words):
    code, (_, error) = build.main(given), capsys.readouterr()
    *progress, line, end = error.split("\n")
    assert code == 2 and words in line and line.startswith("lab.build: ") and not end, error
    assert all(text.startswith("labelling-") for text in progress), error


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"seed": 1}, "built with seed 0, not 1"), ({"size": 42}, "built with size 40, not 42"),
        ({"edits": 3}, "built with edits"), ({"eval_questions": 4}, "built with eval_questions 5, not 4"),
        ({"intervention": "adverb"}, "built with intervention"), ({"calibrate": True}, "built with calibration"),
        ({"model": "other"}, "made with other weights"),
    ],
)  # fmt: skip
def test_other_flags_are_refused(done, folder, tmp_path, capsys, changes, words):
    if "model" in changes:
        changes = {"model": tiny.build(tmp_path / "model", seed=18)}
    before = content(done)
    refused(capsys, flags(folder, done, **changes), words)
    assert content(done) == before


def other_data(folder):
    """A copy of the data in which one word differs."""
    shutil.copytree(DATA, folder)
    file = folder / "esnli_dev.csv"
    file.write_text(file.read_text().replace("shirt", "skirt"))
    return folder


def test_other_weights_or_data_of_the_same_name_are_refused(folder, tmp_path, capsys):
    model, data = shutil.copytree(folder, tmp_path / "model"), shutil.copytree(DATA, tmp_path / "data")
    given = flags(model, tmp_path / "o", data=data, size=4)
    assert build.main(given) == 0
    capsys.readouterr()
    shutil.rmtree(data)
    other_data(data)
    refused(capsys, given, "made with other questions")
    shutil.copytree(DATA, data, dirs_exist_ok=True)
    tiny.build(model, seed=18)
    refused(capsys, given, "made with other weights")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"size": 7}, "--size must be even"), ({"size": 0}, "--size must be from 2"), ({"edits": 0}, "--edits"),
        ({"seed": -1}, "--seed"), ({"eval_questions": 500}, "too few"), ({"model": "no/model"}, "no model at"),
        ({"data": "nowhere"}, "nowhere"), ({"task": "comve"}, "comve"), ({"fit_questions": 0}, "--fit-questions"),
        ({"model": "adapter"}, "is an adapter"),
    ],
)  # fmt: skip
def test_mistakes(folder, tmp_path, capsys, changes, words):
    if changes == {"model": "adapter"}:
        changes = {"model": shutil.copytree(folder, tmp_path / "model")}
        (tmp_path / "model" / "adapter_config.json").write_text("{}")
    refused(capsys, flags(folder, tmp_path / "o", **changes), words)
    assert not (tmp_path / "o").exists()


def test_a_folder_of_something_else(folder, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    refused(capsys, flags(folder, tmp_path), "already holds something")
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "manifest.json.part").write_text("{")  # a kill in the very first moment
    assert build.main(flags(folder, tmp_path / "part", size=4)) == 0


def test_a_model_that_flips_too_rarely(folder, tmp_path, capsys, monkeypatch):
    assert build.main(flags(folder, tmp_path / "few", size=600, edits=2)) == 0
    rows, manifest = read(tmp_path / "few")
    moved = round(manifest["labelled"]["rows"] * manifest["labelled"]["influence_rate"])
    assert 0 < 2 * moved == len(rows["train"]) < 600 and sum(row["influence"] for row in rows["train"]) == moved
    line = f"{2 * moved} of 600 rows of esnli, since the model flips too rarely: {moved} of "
    line += f"{manifest['labelled']['rows']} edits"
    assert manifest["short"].startswith(line) and line in capsys.readouterr().out
    for constant in (0, 1):
        monkeypatch.setattr(reward, "influence", lambda y, y_edited, constant=constant: constant)
        words = ("too rarely: 0 of 12 edits moved it", "too often: 12 of 12 edits moved it")[constant]
        given = flags(folder, tmp_path / f"{constant}", edits=1)
        refused(capsys, given, f"nothing to balance: 0 of 40 rows of esnli, since the model flips {words}")


# ---- train.py ------------------------------------------------------------------------------------------------


def training(folder, out, dataset, **changes):
    given = {"dataset": dataset, "labels": "frozen", "samples": 2, "max_new_tokens": 6, "fit_questions": 3}
    return [*launch.flags(folder, out, **given | changes), "--no-eval-before"]


def test_a_run_takes_its_labels(done, folder, tmp_path, monkeypatch):
    seen, label = [], experiment.label
    monkeypatch.setattr(
        experiment, "label", lambda subject, cases, *rest: seen.extend(cases) or label(subject, cases, *rest)
    )
    launch.ran(training(folder, tmp_path / "o", done))
    rows, _ = read(done)
    assert {case.question.id for case in seen} == {row["id"] for row in rows["fit"]}  # for the shortcut baseline
    keys = ("id", "word", "text_inserted", "y", "y_edit", "influence")
    known = {tuple(row[key] for key in keys) for row in rows["train"]}
    log, metrics, tested = (
        reading.read_jsonl(tmp_path / "o" / f"{name}.jsonl") for name in ("explanations", "metrics", "after.T0")
    )
    assert len(log) == 16 and {tuple(entry[key] for key in keys) for entry in log} <= known
    assert [(m["labelled"], m["influence_rate"]) for m in metrics] == [(40, 0.5)] * 2
    assert [(r["id"], r["text_inserted"]) for r in tested] == [(r["id"], r["text_inserted"]) for r in rows["test"]]


def test_labels_of_an_adapter(done, folder, tmp_path):
    """One that is off while the model decides is trained on with its base's labels; another needs its own."""
    for only in ("explanation", "all"):
        was, given = tmp_path / only, {"lora": 4, "lora_targets": "q_proj", "train_only": only, "steps": 1, "lr": 0.01}
        launch.ran(training(folder, was, done, **given))
        goes_on = training(was / "model", tmp_path / f"{only}-on", done, **given)
        if only == "explanation":
            launch.ran(goes_on)
        else:
            assert "made with other weights" in launch.refused(goes_on)


def test_calibrated_labels(folder, tmp_path):
    given = {"calibrate": True, "calibration_questions": 5}
    assert build.main(flags(folder, tmp_path / "set", **given)) == 0
    launch.ran(training(folder, tmp_path / "o", tmp_path / "set", **given, steps=1))
    offsets = reading.read_json(tmp_path / "o" / "calibration.json")["mean_logp"]
    rows, manifest = read(tmp_path / "set")
    assert manifest["mean_logp"] == offsets
    args = parse(training(folder, tmp_path / "n", tmp_path / "set", **given), {}, {})
    subject, _, _, stream = experiment.prepare(args, Ranks())
    subject.offsets = {"esnli": np.array(offsets)}
    p = faith.decision_rows(subject, [stream.frozen[0][0]])[0]["p"]
    assert p == pytest.approx(rows["train"][0]["p"], abs=1e-5)
    error = launch.refused(training(folder, tmp_path / "n", tmp_path / "set"))
    assert "built with calibration_questions 5, not 0" in error


LEAK = object()  # stands for a line of the test questions
ANOTHER = [  # changes of train.py's flags, of the manifest (None removes), of the first line, and the error
    ({"labels": "on-policy"}, {}, {}, "add --labels frozen"),
    ({"intervention": "adverb"}, {}, {}, "built with intervention 'bias', not 'adverb'"),
    ({"eval_questions": 4}, {}, {}, "built with eval_questions 5, not 4"),
    ({"task": "social_iqa", "data": DATA.parent / "social_iqa"}, {}, {}, "built with task 'esnli'"),
    ({"model": "other"}, {}, {}, "made with other weights"), ({"data": "other"}, {}, {}, "made with other questions"),
    ({"calibrate": True}, {}, {}, "built with calibration_questions 0, not 300"),
    ({"dtype": "bf16"}, {"dtype": None}, {}, "built with dtype 'auto', not 'bf16'"),
    ({"dataset": DATA}, {}, {}, "is no data set"), ({}, {"complete": False}, {}, "is not finished"),
    ({}, {"splits": None}, {}, "splits must be an object"), ({}, {}, None, "has 39 lines"),
    ({}, {}, LEAK, "is no training question of this run"), ({}, {}, {"parts": ["A.", "B."]}, "is no training question"),
    ({}, {}, {"edited": None}, "edited must be an object; it is absent"), ({}, {}, {"influence": None}, "is missing"),
    ({}, {}, {"edited": {}}, "edited must be what the edit changed"), ({}, {}, {"y": "x"}, "y must be a whole number"),
    ({}, {}, {"edited": {"parts": 3}}, "parts must be a list, each a text"),
]  # fmt: skip


@pytest.mark.parametrize("flags, in_manifest, in_line, words", ANOTHER, ids=[words for *_, words in ANOTHER])
def test_another_data_set_is_refused(done, folder, tmp_path, flags, in_manifest, in_line, words):
    def changed(record, changes):
        return {key: value for key, value in (record | changes).items() if value is not None}

    copy = shutil.copytree(done, tmp_path / "set")
    rows, manifest = read(copy)
    lines = rows["train"][1:]
    if in_line == {}:
        lines = rows["train"]
    elif in_line is not None:
        lines = [rows["test"][0] if in_line is LEAK else changed(rows["train"][0], in_line), *lines]
    files.write_jsonl(copy / "train.jsonl", lines)
    files.write_json(copy / "manifest.json", changed(manifest, in_manifest))
    if flags.get("model") == "other":
        flags = {"model": tiny.build(tmp_path / "model", seed=18)}
    elif flags.get("data") == "other":
        flags = {"data": other_data(tmp_path / "data")}
    assert words in launch.refused(training(folder, tmp_path / "o", **{"dataset": copy} | flags))
    assert not (tmp_path / "o").exists()


def test_the_command(done, folder):
    """As a user runs it."""
    ran = subprocess.run([sys.executable, "-m", "lab.build", *flags(folder, done)], cwd=tiny.ROOT,
                         capture_output=True, text=True)  # fmt: skip
    assert ran.returncode == 0 and "train  40 rows" in ran.stdout and "50.0% moved" in ran.stdout, ran.stderr


def script(name):
    spec = importlib.util.spec_from_file_location(name, Path(build.__file__).parents[1] / "runs" / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_even(done, folder, tmp_path, capsys):
    """As many wrong own answers as right ones, moved or not; the labels are the model's; train.py takes it."""
    even, out = script("even"), tmp_path / "even"
    assert even.main([str(done), str(out)]) == 0
    rows = read(out)[0]["train"]
    cells = Counter((row["influence"], row["y"] == row["gold"]) for row in rows)
    assert len(cells) == 4 and len(set(cells.values())) == 1 and f"{len(rows)} rows" in capsys.readouterr().out
    launch.ran(training(folder, tmp_path / "o", dataset=out, steps=1))
    known = {(row["id"], row["text_inserted"]): row for row in read(done)[0]["train"]}
    both = [(row, known[key]) for row in rows if (key := (row["id"], row["text_inserted"])) in known]
    assert len(both) > len(rows) / 2 and all(
        row["y"] == was["y"] and row["y_edit"] == was["y_edit"] for row, was in both
    )
    assert even.main([str(done), str(out)]) == 2 and "empty or new" in capsys.readouterr().err


def test_probe(done, folder, subject, capsys):
    """Its states decide as the labels say, and its regression and AUC are scikit-learn's."""
    probe = script("probe")
    rows = read(done)[0]["train"][:6]
    found = torch.from_numpy(probe.states(subject, rows))  # (rows, places, layers, E), rounded to fp16
    network = subject.sampler.model
    logits = network.head(network.norm(found[:, 0, -1]))[:, faith.letter_tokens(subject.tokenizer, 3)]
    torch.testing.assert_close(logits.softmax(-1), torch.tensor([r["p_edit"] for r in rows]), atol=2e-3, rtol=0)
    x, one, two = np.random.default_rng(0).normal(size=(3, 30, 8))
    scaler = StandardScaler().fit(x)
    ours = probe.ridge(x, np.eye(3)[np.arange(30) % 3], one)
    theirs = Ridge(probe.LAMBDA).fit(scaler.transform(x), np.eye(3)[np.arange(30) % 3]).predict(scaler.transform(one))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    values, hit = np.round(two[:, 0], 1), np.arange(30) % 3 == 0  # with ties
    assert float(probe.scores(values, hit * 1).split()[0]) == pytest.approx(roc_auc_score(hit, values), abs=6e-4)
    assert probe.main([str(folder), str(done)]) == 0
    head, _, *lines, last = capsys.readouterr().out.splitlines()
    assert head.startswith("40 rows to fit, 5 to test") and last.startswith("shortcut")
    assert [line.split()[:2] for line in lines] == [[p, str(n)] for p in ("(", "letter", "last") for n in (1, 2)]
