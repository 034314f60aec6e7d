"""Runs of train.py for tests: in this process, or in processes of their own that can be killed."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
import types

import pytest
import safetensors.torch
import tiny
import torch

import train
from run import lora

torch.set_num_threads(1)  # as in the processes below: the number of threads changes the rounding
DATA = tiny.ROOT / "tests" / "data" / "esnli"
SMALL = {"data": DATA, "task": "esnli", "intervention": "bias", "steps": 2, "prompts": 4, "samples": 4,
         "candidates": 96, "frozen_questions": 40, "max_new_tokens": 10, "lr": 1e-3, "warmup": 0,
         "eval_questions": 5, "fit_questions": 5}  # fmt: skip


def flags(folder, out, **changes):
    """A command line: {name: value}, where True is a flag alone and None leaves one out."""
    given = [(f"--{k.replace('_', '-')}", v) for k, v in ({"model": folder, "out": out} | SMALL | changes).items()]
    return [x for k, v in given for x in ([k] if v is True else [] if v is None else [k, str(v)])]


def call(given):
    """train.main in this process: (exit status, stdout, stderr)."""
    out, error = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        patch.setattr(sys, "argv", ["train.py", *map(str, given)])
        try:
            code = train.main()
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), error.getvalue()


def start(given, ranks=1, script="train.py"):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(tiny.ROOT)}
    return subprocess.Popen([sys.executable, *launch, str(script), *map(str, given)], cwd=tiny.ROOT, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


def finish(process, timeout=300):
    """(exit status, stdout, stderr). A hang fails the test."""
    out, error = process.communicate(timeout=timeout)
    return process.returncode, out, error


def ran(given, ranks=1, script=None):
    """What a run prints. It must end well. One rank runs in this process, unless a script replaces train.py."""
    alone = ranks == 1 and not script
    code, printed, error = call(given) if alone else finish(start(given, ranks, script or "train.py"))
    assert code == 0, error[-3000:]
    return printed


def refused(given):
    """The one error line of a command line that train.py refuses."""
    code, _, error = call(given)
    assert code == 2 and error.count("\n") == 1 and error.startswith("train.py: "), error
    return error


def disturb(network, seed=5):
    """Adapters as after some training: B is no longer zero."""
    torch.manual_seed(seed)
    for adapter in lora.adapters(network):
        for b in adapter.B.values():
            b.data.normal_(std=0.1)
    return network


def step_on(policy, groups, rewards, anchor=lambda n: 0.0):
    """The record of train.step, without times, on given groups and rewards in place of its labels, samples, rewards."""
    batch = [(types.SimpleNamespace(edited=i, key=i), {"y_edit": 0}) for i in range(len(groups))]
    given = {"balanced_batch": lambda *_: (batch, batch), "batch_metrics": lambda *_: {},
             "explanation_prompt": lambda tokenizer, i, *_: groups[i][0],
             "sample": lambda subject, prompts, keys, *_: [groups[i][1] for i in keys],
             "score": lambda subject, case, *_: [{"reward": r} for r in rewards[case.key]]}  # fmt: skip
    subject = types.SimpleNamespace(tokenizer=None, opening="", why="leading")
    anchor = types.SimpleNamespace(backward=anchor)
    with pytest.MonkeyPatch.context() as patch:
        for name, function in given.items():
            patch.setattr(train, name, function)
        record, _ = train.step(0, subject, policy, None, anchor, policy.args, policy.ranks)
    return {name: value for name, value in record.items() if not name.endswith("_s")}


def script(file, body):
    """A file that changes the product as `body` says and then runs train.main."""
    file.write_text(f"import os, signal, sys, time\nimport train\n{body}\nsys.exit(train.main())\n")
    return file


def wait_for_step(process, out, n):
    """Returns when the run has logged step n (from 1)."""
    while len(lines(out / "metrics.jsonl")) < n:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def until(process, text):
    """Reads what a run prints, up to and with the first line that contains `text`."""
    return next(line for line in process.stdout if text in line)


def lines(path):
    """The whole lines of a JSON-lines file; none if it does not exist."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def timeless(path):
    return [{k: v for k, v in record.items() if not k.endswith("_s")} for record in lines(path)]


def weights(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def same(one, other):
    """Two runs are the same to the byte, except for times."""
    for name in ("metrics.jsonl", "explanations.jsonl"):
        assert timeless(one / name) == timeless(other / name)
    for name in ("before.json", "after.json", "difference.T1.json", "model/model.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def close(one, other, tolerance=1e-4):
    """The metrics of two runs agree up to rounding."""
    a_lines, b_lines = (timeless(out / "metrics.jsonl") for out in (one, other))
    assert len(a_lines) == len(b_lines) > 0
    for a, b in zip(a_lines, b_lines, strict=True):
        assert a.keys() == b.keys() and [k for k in a if a[k] is None] == [k for k in b if b[k] is None]
        numbers = [k for k in a if a[k] is not None]
        assert not {k: (a[k], b[k]) for k in numbers if a[k] != pytest.approx(b[k], abs=tolerance, rel=tolerance)}
