"""shard.py: a run whose masters are cut among ranks, against the same run in one process; stopped and resumed.

That a step is the same with weights, anchor, KL and activation checkpointing: test_ranks_change_nothing (test_train).
"""

import dataclasses
import os
import re
import shutil
import signal
import time
import types

import pytest
import tiny
import torch
from launch import close, finish, script, start, wait_for_step
from test_checkpoint import flags
from test_plan import config as config_of_smollm2

import model as models
from lab import plan
from run import checkpoint, files, shard
from run.args import Args


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("model"))


CHANGES = {"steps": 8, "checkpoint_every": 1000, "eval_questions": 0}


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The run in one process."""
    out = tmp_path_factory.mktemp("run") / "whole"
    code, _, error = finish(start(flags(folder, out, **CHANGES)))
    assert code == 0, error
    return out


def until(process, text):
    """Reads what a run prints up to a line with `text`."""
    return next(line for line in process.stdout if text in line)


def test_stopped_and_resumed(folder, whole, tmp_path):
    """SIGTERM to torchrun in a step; the parts saved by two ranks are then read by two, three, and by one alone."""
    out = tmp_path / "o"
    process = start(flags(folder, out, parallel="shard", **CHANGES), ranks=2)
    wait_for_step(process, out, 3)
    process.terminate()
    printed = process.stdout.read()
    process.wait(90)
    (done,) = re.findall(r"stopped after step (\d+); continue with", printed)
    path = checkpoint.newest(out / "checkpoints")
    assert path.name == f"step-{int(done):08d}" and not list((out / "checkpoints").glob("*.part"))
    assert len(list(path.glob("*.distcp"))) == 2  # each rank wrote its own
    for ranks, parallel in ((2, "shard"), (3, "shard"), (1, "replicate"), (2, "replicate")):
        copy = tmp_path / f"{parallel}{ranks}"
        shutil.copytree(out, copy)
        code, printed, error = finish(start(["--resume", "--out", copy, "--parallel", parallel], ranks))
        assert code == 0 and f"continuing after step {done}, from " in printed, error
        close(whole, copy)


def test_what_one_process_saved_is_cut(folder, whole, tmp_path):
    copy = tmp_path / "o"
    code, _, error = finish(start(flags(folder, copy, **CHANGES | {"checkpoint_every": 3})))
    assert code == 0, error
    shutil.rmtree(copy / "checkpoints" / "step-00000008")
    code, printed, error = finish(start(["--resume", "--out", copy, "--parallel", "shard"], ranks=2))
    assert code == 0 and "continuing after step 6, from " in printed, error
    close(whole, copy)


SLOW = """
sample = train.sample
def slow(subject, prompts, keys, n, args):
    if n == 2:
        os.write(1, f"rank {os.environ['RANK']} {os.getpid()} in step 3\\n".encode())  # whole, beside the other's
        time.sleep(100 if os.environ["RANK"] == "1" else 0)
    return sample(subject, prompts, keys, n, args)
train.sample = slow
"""


def test_one_rank_is_told_to_stop(folder, tmp_path):
    """Of a step in which it is busy alone, and the other waits: both save the steps done and leave."""
    given = flags(folder, tmp_path / "o", parallel="shard", **CHANGES)
    process = start(given, ranks=2, script=script(tmp_path / "slow.py", SLOW))
    pid = int(until(process, "rank 1").split()[2])
    time.sleep(1)
    os.kill(pid, signal.SIGTERM)
    began = time.time()
    assert until(process, "stopped after step 2; continue with")
    finish(process, timeout=60)
    assert time.time() - began < 60
    assert checkpoint.newest(tmp_path / "o" / "checkpoints").name == "step-00000002"
    assert len(files.read_jsonl(tmp_path / "o" / "metrics.jsonl")) == 2


FULL = """
from run import checkpoint
save, saves = checkpoint.dcp.save, []
def full(tensors, checkpoint_id, no_dist):
    saves.append(checkpoint_id)
    if len(saves) == 2:
        raise OSError(28, "No space left on device")
    save(tensors, checkpoint_id=checkpoint_id, no_dist=no_dist)
checkpoint.dcp.save = full
"""


def test_a_checkpoint_that_cannot_be_written(folder, tmp_path):
    """It is said once, the one before it stays, and the run goes on."""
    changes = CHANGES | {"steps": 5, "checkpoint_every": 2, "parallel": "shard"}
    code, printed, error = finish(
        start(flags(folder, tmp_path / "o", **changes), 2, script(tmp_path / "full.py", FULL))
    )
    assert code == 0, error
    assert printed.count("no checkpoint after step 4: ") == 1 and "No space left on device" in printed
    names = sorted(path.name for path in (tmp_path / "o" / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000005"]


def test_choose(folder, monkeypatch):
    """By hand; else replicated, except where the plan shards among several GPUs."""
    network, batch = models.load(folder), {"max_new_tokens": 200, "prompts": 64, "samples": 16, "recompute": True}

    def choose(network, world, plan=plan.plan, **changes):
        return shard.choose(Args(**batch | changes), network, world, plan)

    assert choose(network, 8, None) == "replicate"  # on a CPU
    for parallel in ("shard", "replicate"):
        assert choose(network, 2, None, parallel=parallel) == parallel
    with pytest.raises(ValueError, match="needs several ranks, and there is one; use torchrun"):
        choose(network, 1, parallel="shard")
    # Eight GPUs of 80 GB.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (79e9, 80e9))
    eight = plan.read(str(tiny.ROOT / "configs" / "llama-3.1-8b.json"))
    nine = dataclasses.replace(eight, layers=9)  # of its 32: what else is held decides
    for config, changes, kept in (
        (eight, {}, "shard"), (eight, {"lora": 16, "kl": 0.1}, "replicate"), (nine, {}, "replicate"),
        (nine, {"kl": 0.1}, "shard"), (nine, {"recompute": False}, "shard"),
        (nine, {"recompute": False, "micro": 1}, "replicate"), (config_of_smollm2(), {}, "replicate"),
        (network.config, {"max_new_tokens": 500}, "replicate"),  # hardly a prompt fits beside it
    ):  # fmt: skip
        big = types.SimpleNamespace(config=config, device=torch.device("cuda"))
        assert choose(big, 8, **changes) == kept, changes
    assert choose(big, 1) == "replicate"
