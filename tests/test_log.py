"""run/log.py: wandb and tensorboard get the numbers of metrics.jsonl, and the figures before and after."""

import importlib
import json
import math
import sys
import types

import pytest
from launch import flags, lines, ran, refused

from run import log
from run.args import Args

WANDB = """
import json, os, pathlib
CALLS = pathlib.Path(__file__).parent / "calls.jsonl"
def tell(call, **given):
    with CALLS.open("a") as file:
        file.write(json.dumps([call, given], default=str) + "\\n")
class Run:
    id = "the-id"
    summary = type("Summary", (), {"update": staticmethod(lambda values: tell("summary", **values))})
    def log(self, values):
        if os.environ.get("BROKEN") and values["step"] == 3:
            raise OSError("the network\\nis gone")
        tell("log", **values)
    def define_metric(self, name, step_metric):
        tell("define_metric", name=name, step_metric=step_metric)
    def finish(self, exit_code):
        tell("finish", exit_code=exit_code)
def init(**given):
    tell("init", **given)
    return Run()
"""


def flat(record):
    """The numbers of a line of metrics.jsonl, written out."""
    out = {f"picks/{i}": x for i, x in enumerate(record["picks"])} | record
    return {name: x for name, x in out.items() if name != "picks" and x is not None}


def figures(file):
    """{"T1/phi/value": …} of before.json or after.json."""
    given = json.loads(file.read_text())
    return {f"{t.replace('=', '')}/{name}/{part}": x for t, found in given.items() for name, figure in found.items()
            for part, x in figure.items() if x is not None}  # fmt: skip


def test_wandb(folder, tmp_path, monkeypatch):
    """A run, resumed with the same id; then the logger fails: one line, and the run ends well."""
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    out, file = tmp_path / "some run", tmp_path / "calls.jsonl"
    assert "--log" not in ran(flags(folder, out, log="wandb"))
    (begin, given), (_, metric), *calls, (end, status) = lines(file)
    assert (begin, end, status, metric["step_metric"]) == ("init", "finish", {"exit_code": 0}, "step")
    assert given["config"] == json.loads((out / "args.json").read_text())
    assert (given["project"], given["name"], given["dir"], given["id"]) == ("faith", "some run", str(out), None)
    assert [call for call, _ in calls] == ["summary", "log", "log", "summary"]
    metrics = lines(out / "metrics.jsonl")
    assert [values for call, values in calls if call == "log"] == [flat(record) for record in metrics]
    for phase, values in (("before", calls[0][1]), ("after", calls[3][1])):
        assert values == {f"{phase}/{name}": x for name, x in figures(out / f"{phase}.json").items()}
        assert f"{phase}/T1/accuracy/low" in values and f"{phase}/T0/n/value" in values
    file.unlink()
    monkeypatch.setenv("BROKEN", "yes")
    printed = ran(["--resume", "--out", out, "--steps", 5])
    calls = lines(file)
    assert [call for call, _ in calls] == ["init", "define_metric", "log"]  # before is known, step 3 fails
    assert (calls[0][1]["id"], calls[0][1]["resume"]) == ("the-id", "allow") and calls[2][1]["step"] == 2
    assert printed.count("--log wandb failed: the network is gone; the run goes on without it\n") == 1
    assert len(lines(out / "metrics.jsonl")) == 5 and (out / "after.json").exists()


class Writer:
    """In place of SummaryWriter: keeps the calls."""

    def __init__(self, folder, purge_step):
        self.calls = [("begin", str(folder), purge_step)]

    def add_text(self, *given):
        self.calls.append(given)

    def add_scalar(self, *given):
        if math.isinf(given[-1]):
            raise OSError("full")
        self.calls.append(given)

    def close(self):
        self.calls.append("closed")


def test_tensorboard_calls(tmp_path, monkeypatch, capsys):
    made, args = [], Args(out=str(tmp_path), log="tensorboard", lr=0.5)
    made_by = types.SimpleNamespace(SummaryWriter=lambda *a, **k: made.append(Writer(*a, **k)) or made[-1])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", made_by)
    with log.opened(args, 4, 0) as logged:
        logged(4, {"step": 4, "phi": math.nan, "reward": 0.5, "picks": [0.25, 0.75], "note": "x", "none": None})
        logged(9, {"after": {"T=1": {"phi": {"value": 0.1, "low": None}}}})
    text = f"    torchrun train.py --out {tmp_path} --lr 0.5 --log tensorboard"
    assert made.pop().calls == [
        ("begin", str(tmp_path / "tensorboard"), 4), ("flags", text, 4), ("step", 4, 4),
        ("reward", 0.5, 4), ("picks/0", 0.25, 4), ("picks/1", 0.75, 4), ("after/T1/phi/value", 0.1, 9), "closed",
    ]  # fmt: skip
    for rank, changes in ((1, {}), (0, {"log": "none"})):
        with log.opened(Args(**vars(args) | changes), 0, rank) as logged:
            logged(0, {"step": 0})
    assert not made and not capsys.readouterr().out
    with log.opened(args, 0, 0) as logged:
        logged(math.inf, {"a": 1.0})
        logged(1, {"a": 1.0})
    assert made[0].calls[2:] == [] and capsys.readouterr().out.count("\n") == 1


def test_tensorboard_reads_it(folder, tmp_path):
    """The real package, read back by its own reader; a resumed run replaces what came after its checkpoint."""
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "o"
    ran(flags(folder, out, log="tensorboard", steps=3, checkpoint_every=2))
    (out / "checkpoints" / "step-00000003" / "manifest.json").unlink()
    ran(["--resume", "--out", out, "--steps", 4])
    read = reader.EventAccumulator(str(out / "tensorboard"))
    read.Reload()
    metrics, tags = lines(out / "metrics.jsonl"), {tag for tag in read.Tags()["scalars"] if read.Scalars(tag)}
    for name in {name for record in metrics for name in flat(record)}:
        known = [(e.step, pytest.approx(e.value)) for e in read.Scalars(name)]
        assert known == [(r["step"], flat(r)[name]) for r in metrics if name in flat(r)], name
    for phase, step in (("before", 0), ("after", 4)):
        for name, value in figures(out / f"{phase}.json").items():
            assert [(e.step, pytest.approx(e.value)) for e in read.Scalars(f"{phase}/{name}")] == [(step, value)]
            tags.discard(f"{phase}/{name}")
    assert tags == {name for record in metrics for name in flat(record)}


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package(folder, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    error = refused(flags(folder, tmp_path / "o", log=name))
    assert f"--log {name}: " in error and f"pip install {name}, or leave it out" in error
    assert not (tmp_path / "o").exists()
