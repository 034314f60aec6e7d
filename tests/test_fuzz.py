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
import gzip
import io
import json
import math
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
import reward
import tasks
from run import lora
from run.args import Args, parse

TIMES = int(os.environ.get("FAITH_FUZZ", "1"))
ROWS = tiny.ROOT / "tests" / "data"
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
    twice = data.rstrip()[:-1] + b', "rms_norm_eps": 0.5, "eos_token_id": 3, "mean_logp": [1.0, 2.0], "seed": 4}'
    return draw(st.sampled_from([data] * 12 + [
        data[:at], data + b"}", data + b"\n\n", b"", b" \n", gzip.compress(data), b"version https://git-lfs\noid x",
        codecs.BOM_UTF8 + data, data[:at] + b"\xe9" + data[at:], data.decode("utf-8", "replace").encode("utf-16"),
        data[:at] + b"\0" + data[at:], data[:at] + data[at + 1:], b"[" * 9999, b"null", b"[]", twice]))  # fmt: skip


@contextlib.contextmanager
def changed(folder, name, data):
    """A folder like `folder`, in which the file `name` holds these bytes."""
    with tempfile.TemporaryDirectory() as made:
        for file in folder.iterdir():
            (Path(made) / file.name).symlink_to(file)
        (Path(made) / name).unlink(missing_ok=True)
        (Path(made) / name).write_bytes(data)
        yield Path(made)


def accepted(main, *argv):
    """Runs a command in this process. True: it ended well; False: exit status 2 and one line on stderr."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            code = main([str(arg) for arg in argv])
        except SystemExit as end:
            code = end.code
    assert code == 0 or (code == 2 and error.getvalue().strip() and error.getvalue().count("\n") == 1), error.getvalue()
    return code == 0


def asked(folder, *more):
    given = ("--model", folder, "Is a whale a fish?", "--options", "yes", "no", "--max-new-tokens", 4, *more)
    return accepted(faith.main, "ask", *given)


# ---- the files of a model ----------------------------------------------------------------------------------------


def logits(network):
    with torch.no_grad():
        out = network(torch.arange(3, 75)[None])
    return getattr(out, "logits", out)


def their_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def their_ends(folder):
    values, config = (json.loads((folder / f"{name}.json").read_text()) for name in ("generation_config", "config"))
    found = GenerationConfig.from_dict({"eos_token_id": values.get("eos_token_id")}).eos_token_id
    found = config["eos_token_id"] if found is None else found
    return set(found if isinstance(found, list | tuple) else [found])


def their_turns(folder):
    chat, more = AutoTokenizer.from_pretrained(folder), {"tokenize": False, "enable_thinking": False}
    return [chat.apply_chat_template(turns, add_generation_prompt=True, **more) for turns in TURNS]


FILES = {  # what we read of a model, and what transformers reads
    "config.json": (lambda folder: logits(models.load(folder)), lambda folder: logits(their_model(folder))),
    "generation_config.json": (lambda folder: set(models.load(folder).config.end_of_turn), their_ends),
    "tokenizer_config.json": (lambda folder: [models.Tokenizer(folder).render(turns) for turns in TURNS], their_turns),
}


def agree(file, ours, before, theirs):
    """What we read of a spoiled file is what others read; where they fail, it is what we read before it was spoiled."""
    file.write_bytes(file.read_bytes().removeprefix(codecs.BOM_UTF8))  # they fail at a byte-order mark
    try:
        wanted = theirs(file.parent)
    except Exception:
        wanted = before
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3, equal_nan=True) if torch.is_tensor(ours) else None
    assert torch.is_tensor(ours) or ours == wanted


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """{family: a model}. The Llama has Llama-3.1's RoPE; the Qwen's RoPE is written as transformers 5 does."""
    made = {name: tiny.build(tmp_path_factory.mktemp(name), family=name) for name in ("llama", "qwen2")}
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}  # fmt: skip
    for name, more in (("llama", {"rope_scaling": scaling}),
                       ("qwen2", {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}})):  # fmt: skip
        file = made[name] / "config.json"
        values = json.loads(file.read_text()) | more
        del values["rope_theta" if name == "qwen2" else "mlp_bias"]
        file.write_text(json.dumps(values))
    return made


@pytest.mark.parametrize("name", FILES)
@examples(40)
@given(data=st.data())
def test_a_spoiled_file_of_a_model(family, name, data):
    folder = family[data.draw(st.sampled_from(list(family)))]
    ours, theirs = FILES[name]
    with changed(folder, name, data.draw(spoiled((folder / name).read_text()))) as other:
        if asked(other):
            agree(other / name, ours(other), ours(folder), theirs)


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    network = lora.attach(models.load(folder), 3, 12.0, seed=1)
    for layer in lora.adapters(network):
        for B in layer.B.values():
            torch.nn.init.normal_(B, std=0.1)
    path = tmp_path_factory.mktemp("adapter") / "adapter"
    models.save(network, path)
    return path


@examples(30)
@given(data=st.data())
def test_a_spoiled_adapter(folder, adapter, data):
    file = adapter / "adapter_config.json"
    with changed(adapter, file.name, data.draw(spoiled(file.read_text()))) as other:
        if asked(other):
            ours, before = logits(models.load(other)), logits(models.load(adapter))
            agree(
                other / file.name, ours, before, lambda it: logits(PeftModel.from_pretrained(their_model(folder), it))
            )


@examples(40)
@given(data=st.data())
def test_spoiled_offsets(folder, tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "calibration.json"
    subject = faith.open_subject(folder, "none", "", 2)
    subject.offsets = np.array([-0.75, -1.5])
    faith.write_offsets(subject, 5, "ask", file)
    file.write_bytes(data.draw(spoiled(file.read_text())))
    if asked(folder, "--calibration", file):
        used = faith.open_subject(folder, str(file), "", 2).offsets
        assert used.tolist() == json.loads(file.read_text("utf-8-sig"))["mean_logp"]


# ---- the files of a run ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A finished run with checkpoints after steps 2 and 3."""
    out = tmp_path_factory.mktemp("run") / "out"
    launch.ran(launch.flags(folder, out, steps=3, checkpoint_every=1, eval_questions=0))
    return out


@examples(40)
@given(data=st.data())
def test_spoiled_flags(run, data):
    """A resumed run has the flags that stand in its args.json, each of its own type."""
    text = (run / "args.json").read_text()
    with changed(run, "args.json", data.draw(spoiled(text))) as out:
        found = []

        def read(argv):
            found.append(parse(argv, {"task": tasks.TASKS, "intervention": reward.KINDS}, {}))
            return 0

        if accepted(read, "--resume", "--out", out):
            written, found = json.loads((out / "args.json").read_text("utf-8-sig")), vars(found[0])
            for field in dataclasses.fields(Args):
                if field.name not in ("resume", "out"):
                    assert found[field.name] == written.get(field.name, field.default), field.name
                    assert type(found[field.name]) is type(field.default)


@pytest.mark.parametrize("name", ["checkpoints/step-00000003/manifest.json", "identity.json"])
@examples(6)
@given(data=st.data())
def test_spoiled_records_of_a_run(run, tmp_path_factory, name, data):
    """It goes on as if nothing had happened, if need be from the checkpoint before; or it is refused."""
    with tempfile.TemporaryDirectory() as made:
        out = Path(shutil.copytree(run, Path(made) / "out"))
        (out / name).write_bytes(data.draw(spoiled((run / name).read_text())))

        def resume(argv):
            code, _, error = launch.call(argv)
            print(error, file=sys.stderr, end="")
            return code

        if accepted(resume, "--resume", "--out", out):
            for log in ("metrics.jsonl", "explanations.jsonl"):
                assert launch.timeless(out / log) == launch.timeless(run / log)
            same = "model/model.safetensors"
            assert (out / same).read_bytes() == (run / same).read_bytes()


# ---- rows of data ------------------------------------------------------------------------------------------------


FIRST = {
    "esnli": "esnli_dev.csv",
    "social_iqa": "dev.jsonl",
    "comve": "subtaskA_data_all.csv",
    "strategyqa": "dev.json",
}


def plainly(question, folder):
    """Does a plain reading of the line or entry that the question names give this question?"""
    file = folder / FIRST[question.task]
    number, text = int(question.id.split(":")[1]), file.read_text("utf-8-sig")
    lines = text.split("\n")
    if question.task == "strategyqa":
        row = json.loads(text)[number - 1]
        return (
            question.parts == (row["question"].strip(),)
            and ("yes", "no")[question.gold] == ("no", "yes")[row["answer"]]
        )
    if question.task == "social_iqa":
        row, label = json.loads(lines[number - 1]), int((folder / "dev-labels.lst").read_text().split("\n")[number - 1])
        answers = [row["answer" + letter].strip() for letter in "ABC"]
        same = question.parts == (row["context"].strip(), row["question"].strip())
        return (
            same
            and sorted(question.options) == sorted(answers)
            and question.options[question.gold] == answers[label - 1]
        )
    header, row = next(filter(None, csv.reader(lines))), next(csv.reader(line + "\n" for line in lines[number - 1 :]))
    row = {name: cell.strip() for name, cell in zip(header, row, strict=True)}
    if question.task == "esnli":
        gold = ("entailment", "contradiction", "neutral")[question.gold]
        return question.parts == (row["Sentence1"], row["Sentence2"]) and row["gold_label"] == gold
    answers = dict(line.split(",") for line in (folder / "subtaskA_answers_all.csv").read_text().split())
    return question.options == (row["sent0"], row["sent1"]) and answers[row["id"]] == str(question.gold)


@st.composite
def spoiled_rows(draw, text, line_by_line):
    """A data file, of which some rows are spoiled."""
    lines = text.split("\n")
    for _ in range(draw(st.integers(1, 3))):
        n = draw(st.integers(0, len(lines) - 1))
        at = draw(st.integers(0, len(lines[n])))
        piece = draw(
            st.sampled_from(['"', ",", "\n", "\r\n", "\0", "\\", "{", "[1]", "x,y", "\ufeff", "\u2028", '"\n"', ""])
        )
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
    ways = [spoiled_rows(text, not jsonl)] + [spoiled(text)] * (task == "strategyqa")
    with changed(ROWS / task, FIRST[task], data.draw(st.one_of(ways))) as folder:
        for skip in (False, True):
            with contextlib.redirect_stderr(io.StringIO()) as said:
                try:
                    questions = tasks.load(task, folder / FIRST[task], skip)
                except ValueError as error:
                    assert "\n" not in str(error) and FIRST[task].split(".")[0] in str(error)
                    continue
            assert said.getvalue().count("\n") <= skip
            assert questions and all(plainly(question, folder) for question in questions)
