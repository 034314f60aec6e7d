"""Spoiled files: the right result, or exit status 2 with one line, and never a traceback.

Hypothesis spoils each file that a user, a download or another program can spoil. What is still accepted is compared
with transformers, PEFT, or a plain reading of the file.

    FAITH_FUZZ=10 pytest tests/test_fuzz.py        ten times as many spoiled files, drawn anew each time
"""

import codecs
import contextlib
import copy
import csv
import dataclasses
import functools
import gzip
import io
import json
import math
import operator
import os
import shutil
import sys
import tempfile
from pathlib import Path

import launch
import numpy as np
import pytest
import tiny
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import faith
import model as models
import tasks
from lab import measure
from run import lora, results
from run.args import Args, parse
from run.progress import command

TIMES = int(os.environ.get("FAITH_FUZZ", "1"))
ROWS = tiny.ROOT / "tests" / "data"
CALIBRATION, KINDS = "calibration.json", ("", "generation_", "tokenizer_", "adapter_")
# fmt: off
VALUES = [None, True, False, 0, 1, -1, 2, 3, 0.5, 1e-300, 1e308, 2**31, 2**62, math.nan, math.inf, -math.inf, "", " ",
          "x", "1", "0.5", "none", "x" * 5000, "\ud800", "a\0b", "{{ x", [], [1], [[]], ["x"], {}, {"a": 1}]
# fmt: on
USER = {"role": "user", "content": " Is a whale a fish?\n(A) yes\n(B) no\n"}
TURNS = ([USER], [USER, {"role": "assistant", "content": "The best answer is: (B)"}, USER])


def examples(count):
    """How many spoiled files a test takes: the same ones each time, unless more are asked for."""
    return settings(max_examples=count * TIMES, deadline=None, derandomize=TIMES == 1, database=None,
                    phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck))  # fmt: skip


@st.composite
def spoiled(draw, text):
    """The bytes of a JSON text after one to three changes of its values, and maybe `damaged`."""
    value = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        holders, places = [value], []
        for holder in holders:
            for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
                places.append((holder, key))
                holders += [holder[key]] if isinstance(holder[key], dict | list) else []
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        old = holder[key]
        near = [[old], str(old), [old, old], {"value": old}]
        near += [-old, old + 1, old * 2, float(old)] if isinstance(old, int | float) else []
        change = draw(st.sampled_from(["delete", "value", "value", "near", "near", "rename", "swap"]))
        if change in ("delete", "rename"):
            del holder[key]
        if change == "rename" and isinstance(holder, dict):
            holder[f"{key}x"] = old
        elif change in ("value", "near"):
            holder[key] = copy.deepcopy(draw(st.sampled_from(VALUES if change == "value" else near)))
        elif change == "swap":
            holder[key] = copy.deepcopy(draw(st.sampled_from([other[at] for other, at in places])))
    text = json.dumps(value, indent=1, ensure_ascii=draw(st.booleans()))
    return draw(damaged(text.encode("utf-8", "surrogatepass")))


@st.composite
def damaged(draw, data):
    """In half of the cases the bytes as they are; else they are cut, encoded, or replaced by what is no such file."""
    at = draw(st.integers(0, len(data)))
    text = data.decode("utf-8", "replace")
    twice = data.rstrip()[:-1] + b', "rms_norm_eps": 0.5, "eos_token_id": 3, "mean_logp": [1.0, 2.0], "seed": 4}'
    return draw(st.sampled_from([data] * 12 + [
        data[:at], data + b"}", data + b"\n\n", b"", b" \n", gzip.compress(data, mtime=0), codecs.BOM_UTF8 + data,
        b"version https://git-lfs\noid x", data[:at] + b"\xe9" + data[at:], text.encode("utf-16"),
        data[:at] + b"\0" + data[at:], data[:at] + data[at + 1:], b"[" * 9999, b"null", b"[]", twice]))  # fmt: skip


@contextlib.contextmanager
def changed(folder, name, data):
    """A copy of the folder, in which the file `name` holds these bytes."""
    with tempfile.TemporaryDirectory() as made:
        shutil.copytree(folder, made, dirs_exist_ok=True)
        (Path(made) / name).write_bytes(data)
        yield Path(made)


def accepted(main, *argv):
    """Runs a command in this process. True: it ended well; False: exit status 2 and one line on stderr."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as error:
        try:
            code = main([str(arg) for arg in argv])
        except SystemExit as end:
            code = end.code
    assert code == 0 or (code == 2 and error.getvalue().strip() and error.getvalue().count("\n") == 1), error.getvalue()
    return code == 0


# ---- the files of a model ----------------------------------------------------------------------------------------


def logits(network):
    with torch.no_grad():
        out = network(torch.arange(3, 75)[None])
    return getattr(out, "logits", out)


def our_logits(folder):
    return logits(models.load(folder))


def their_logits(folder, base=None):
    if not base:  # transformers 5 refuses some keys that are null; for it too they are as absent
        values = json.loads((folder / "config.json").read_text()).items()
        (folder / "config.json").write_text(json.dumps({key: value for key, value in values if value is not None}))
    network = AutoModelForCausalLM.from_pretrained(base or folder, dtype=torch.float32).eval()
    return logits(PeftModel.from_pretrained(network, folder) if base else network)


def their_ends(folder):
    values, config = (json.loads((folder / f"{name}.json").read_text()) for name in ("generation_config", "config"))
    found = GenerationConfig.from_dict({"eos_token_id": values.get("eos_token_id")}).eos_token_id
    found = config["eos_token_id"] if found is None else found
    return set(found if isinstance(found, list | tuple) else [found])


def their_turns(folder):
    chat, more = AutoTokenizer.from_pretrained(folder), {"tokenize": False, "enable_thinking": False}
    return [chat.apply_chat_template(turns, add_generation_prompt=True, **more) for turns in TURNS]


@pytest.fixture(scope="module")
def read_from(tmp_path_factory):
    """{file: (the folder with it, what we read of the folder, what others read)}."""
    place = tmp_path_factory.mktemp("models")
    model, rope = tiny.build(place / "model"), {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = json.loads((model / "config.json").read_text()) | {"rope_parameters": rope}
    (model / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "rope_theta"}))
    network = lora.attach(models.load(model), 3, 12.0, seed=1)
    for layer in lora.adapters(network):
        for B in layer.B.values():
            torch.nn.init.normal_(B, std=0.1)
    models.save(network, place / "adapter")
    subject = faith.open_subject(model)
    subject.offsets = {"ask": np.array([-0.75, -1.5])}
    results.write_offsets(model / CALIBRATION, subject, 5, "ask")
    return {
        "config.json": (model, our_logits, their_logits),
        "generation_config.json": (model, lambda it: set(models.load(it).config.end_of_turn), their_ends),
        "tokenizer_config.json": (model, lambda it: [models.Tokenizer(it).render(t) for t in TURNS], their_turns),
        "adapter_config.json": (place / "adapter", our_logits, lambda it: their_logits(it, model)),
        CALIBRATION: (model, lambda it: measure.read_offsets(subject, it / CALIBRATION, 2, "").tolist(),
                      lambda it: json.loads((it / CALIBRATION).read_text())["mean_logp"]),
    }  # fmt: skip


@pytest.mark.parametrize("name", [*(f"{kind}config.json" for kind in KINDS), CALIBRATION])
@examples(40)
@given(data=st.data())
def test_a_spoiled_file_of_a_model(read_from, name, data):
    """Refused, or read as others read it. Where they fail, it must be as before: the spoiled part does not matter."""
    folder, ours, theirs = read_from[name]
    with changed(folder, name, data.draw(spoiled((folder / name).read_text()))) as other:
        given = ["--model", other, "Is a whale a fish?", "--options", "yes", "no", "--max-new-tokens", 4]
        given += ["--calibration", other / name] if name == CALIBRATION else []
        if accepted(faith.main, "ask", *given):
            got = ours(other)
            (other / name).write_bytes((other / name).read_bytes().removeprefix(codecs.BOM_UTF8))  # they fail at it
            try:
                wanted = theirs(other)
            except Exception:
                wanted = ours(folder)
            same = functools.partial(torch.allclose, rtol=1e-3, atol=1e-3, equal_nan=True)
            assert (same if torch.is_tensor(got) else operator.eq)(got, wanted)


# ---- the files of a run ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A finished run with checkpoints after steps 2 and 3."""
    out = tmp_path_factory.mktemp("run") / "out"
    launch.ran(launch.flags(folder, out, steps=3, checkpoint_every=1, eval_questions=0))
    return out


@examples(150)
@given(data=st.data())
def test_spoiled_flags(run, data):
    """A resumed run has the flags that stand in its args.json, each of its own type."""
    with changed(run, "args.json", data.draw(spoiled((run / "args.json").read_text()))) as out:
        found = {}

        @command("train.py")
        def read(argv):
            found.update(vars(parse(argv, {"task": tasks.TASKS}, {})))

        if accepted(read, "--resume", "--out", out):
            written = json.loads((out / "args.json").read_text("utf-8-sig"))
            for field in dataclasses.fields(Args):
                if field.name not in ("resume", "out"):
                    assert found[field.name] == written.get(field.name, field.default), field.name
                    assert type(found[field.name]) is type(field.default)


def resume(argv):
    code, _, error = launch.call(argv)
    print(error, file=sys.stderr, end="")
    return code


@pytest.mark.parametrize("name", ["checkpoints/step-00000003/manifest.json", "identity.json"])
@examples(6)
@given(data=st.data())
def test_spoiled_records_of_a_run(run, name, data):
    """It goes on as if nothing had happened, if need be from the checkpoint before; or it is refused."""
    with changed(run, name, data.draw(spoiled((run / name).read_text()))) as out:
        if accepted(resume, "--resume", "--out", out):
            for log in ("metrics.jsonl", "explanations.jsonl"):
                assert launch.timeless(out / log) == launch.timeless(run / log)
            saved = "model/model.safetensors"
            assert (out / saved).read_bytes() == (run / saved).read_bytes()


# ---- rows of data ------------------------------------------------------------------------------------------------


FIRST = {"esnli": "esnli_dev.csv", "social_iqa": "dev.jsonl", "comve": "subtaskA_data_all.csv",
         "strategyqa": "dev.json"}  # fmt: skip


def plainly(task, number, folder):
    """(parts, options in order, the right option) of the row in this line or entry, read plainly."""
    text = (folder / FIRST[task]).read_text("utf-8-sig")
    lines = io.StringIO(text, newline=None).readlines()
    if task == "strategyqa":
        row = json.loads(text)[number - 1]
        return (row["question"].strip(),), ["no", "yes"], ("no", "yes")[row["answer"]]
    if task == "social_iqa":
        row, labels = json.loads(text.split("\n")[number - 1]), (folder / "dev-labels.lst").read_text().split("\n")
        answers = [row["answer" + letter].strip() for letter in "ABC"]
        return (row["context"].strip(), row["question"].strip()), sorted(answers), answers[int(labels[number - 1]) - 1]
    header, cells = next(filter(None, csv.reader(lines))), next(csv.reader(lines[number - 1 :]))
    row = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
    if task == "esnli":
        right = {"entailment": "yes", "neutral": "maybe", "contradiction": "no"}[row["gold_label"]]
        return (row["Sentence1"], row["Sentence2"]), ["maybe", "no", "yes"], right
    answers = dict(line.split(",") for line in (folder / "subtaskA_answers_all.csv").read_text().split())
    pair = [row["sent0"], row["sent1"]]
    return (), sorted(pair), pair[int(answers[row["id"]])]


def rows_of(task, folder):
    """How many rows the file has, read plainly."""
    text = (folder / FIRST[task]).read_text("utf-8-sig")
    if task == "strategyqa":
        return len(json.loads(text))
    lines = io.StringIO(text, newline=None).readlines()
    return len(text.strip("\r\n").split("\n")) if task == "social_iqa" else sum(map(bool, csv.reader(lines))) - 1


@st.composite
def spoiled_rows(draw, text, line_by_line):
    """A data file, of which some rows are spoiled."""
    lines = text.split("\n")
    for _ in range(draw(st.integers(1, 3))):
        n = draw(st.integers(0, len(lines) - 1))
        at = draw(st.integers(0, len(lines[n])))
        pieces = ['"', ",", "\n", "\r\n", "\0", "\\", "{", "[1]", "x,y", "\ufeff", "\u2028", '"\n"', ""]
        piece = draw(st.sampled_from(pieces))
        cut = draw(st.sampled_from([0, 0, 1, 5, 9999]))
        lines[n] = lines[n][:at] + piece + lines[n][at + cut :]
        if draw(st.booleans()) and line_by_line:
            lines.insert(n, lines[draw(st.integers(0, len(lines) - 1))])
    return draw(damaged("\n".join(lines).encode()))


@pytest.mark.parametrize("task", FIRST)
@examples(40)
@given(data=st.data())
def test_spoiled_rows(task, data):
    """Read or refused; with --skip-bad-rows every question that is left is that of its line."""
    text, jsonl = (ROWS / task / FIRST[task]).read_text(), task == "social_iqa"
    ways = [spoiled_rows(text, not jsonl)]
    if task == "strategyqa":
        ways.append(
            spoiled(json.dumps([{key: row[key] for key in ("question", "answer")} for row in json.loads(text)]))
        )
    with changed(ROWS / task, FIRST[task], data.draw(st.one_of(ways))) as folder:
        for skip in (False, True):
            with contextlib.redirect_stderr(io.StringIO()) as said:
                try:
                    questions = tasks.load(task, folder / FIRST[task], skip)
                except ValueError as error:
                    assert "\n" not in str(error) and FIRST[task].split(".")[0] in str(error)
                    continue
            for q in questions:
                there = plainly(task, int(q.id.split(":")[1]), folder)
                assert (q.parts, sorted(q.options), q.options[q.gold]) == there
            assert said.getvalue().count("\n") <= skip and len(questions) > 0
            assert said.getvalue() or len(questions) == rows_of(task, folder)
