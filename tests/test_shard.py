"""shard.py: a run with its masters in shards, against the same run in one process; stopped and resumed.

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
from launch import close, finish, ran, script, start, until, wait_for_step
from test_checkpoint import flags, resumed
from test_plan import config as config_of_smollm2

from lab import plan
from run import checkpoint, reading, shard
from run.args import Args

CHANGES = {"steps": 6, "checkpoint_every": 1000, "eval_questions": 0}


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The run in one process. Its last checkpoints are of steps 4 and 6."""
    out = tmp_path_factory.mktemp("run") / "whole"
    ran(flags(folder, out, **CHANGES | {"checkpoint_every": 4}))
    return out


def test_stopped_and_resumed(folder, whole, tmp_path):
    """SIGTERM to torchrun during a step. Two, three and one rank then read the shards that two ranks saved."""
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
    for ranks, parallel in ((2, "shard"), (3, "shard"), (1, "replicate")):
        copy = shutil.copytree(out, tmp_path / f"{parallel}{ranks}")
        resumed(copy, "--parallel", parallel, after=done, ranks=ranks)
        close(whole, copy)


def test_what_one_process_saved_is_cut(whole, tmp_path):
    copy = shutil.copytree(whole, tmp_path / "o")
    shutil.rmtree(copy / "checkpoints" / "step-00000006")
    resumed(copy, "--parallel", "shard", after=4, ranks=2)
    close(whole, copy)


FAULTS = """
sample = train.sample
def slow(subject, prompts, keys, n, args):
    if n == 5:
        os.write(1, f"rank {os.environ['RANK']} {os.getpid()} in step 6\\n".encode())  # whole, beside the other's
        time.sleep(100 if os.environ["RANK"] == "1" else 0)
    return sample(subject, prompts, keys, n, args)
train.sample = slow
from torch.distributed.checkpoint.filesystem import FileSystemWriter
write, writes = FileSystemWriter.write_data, []
def full(self, *plans):
    writes.append(1)
    if len(writes) == 2 and os.environ["RANK"] == "1":
        raise OSError(28, "No space left on device")
    return write(self, *plans)
FileSystemWriter.write_data = full
from lab import experiment, rehearsal
run = experiment.measure_and_train
def rehearsed(args, ranks, policy, *rest):
    ranks.together(lambda: rehearsal.rehearse(rest[3], policy, rest[6].questions, args, ranks))
    return run(args, ranks, policy, *rest)
experiment.measure_and_train = rehearsed
"""


def test_one_rank_cannot_save_and_then_is_told_to_stop(folder, whole, tmp_path):
    """A shard that cannot be written is reported once, the checkpoint before it stays, and the run goes on.

    A rehearsal before it, in which all ranks take part, changes nothing. When one rank is told to stop while it works
    and the other waits, both save the finished steps and leave.
    """
    out = tmp_path / "o"
    given = flags(folder, out, parallel="shard", **CHANGES | {"checkpoint_every": 2})
    process = start(given, ranks=2, script=script(tmp_path / "faults.py", FAULTS))
    printed = []
    pid = next(int(line.split()[2]) for line in process.stdout if printed.append(line) or line.startswith("rank 1"))
    printed = "".join(printed)
    assert printed.count("no checkpoint after step 4: ") == 1 and "No space left on device" in printed
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000002"]
    time.sleep(0.5)  # rank 0 waits for the other now
    os.kill(pid, signal.SIGTERM)
    assert until(process, "stopped after step 5; continue with")
    finish(process, timeout=60)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000002", "step-00000005"]
    assert checkpoint.newest(out / "checkpoints").name == "step-00000005"
    metrics = [reading.read_jsonl(run / "metrics.jsonl") for run in (out, whole)]
    assert len(metrics[0]) == 5 and [m["reward"] for m in metrics[0]] == [m["reward"] for m in metrics[1][:5]]
    assert [m["loss"] for m in metrics[0]] == pytest.approx([m["loss"] for m in metrics[1][:5]], abs=1e-4)


def test_choose(network, monkeypatch):
    """--parallel decides. With auto the weights are replicated, unless the plan shards them over several GPUs."""
    batch = {"max_new_tokens": 200, "prompts": 64, "samples": 16, "recompute": True}

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
    nine, ten = (dataclasses.replace(eight, layers=n) for n in (9, 10))  # of 32: the rest of the memory decides
    for config, changes, kept in (
        (eight, {}, "shard"), (eight, {"lora": 16, "kl": 0.1}, "replicate"), (ten, {}, "replicate"),
        (ten, {"kl": 0.1}, "shard"), (nine, {"recompute": False}, "shard"),
        (nine, {"recompute": False, "micro": 1}, "replicate"), (config_of_smollm2(), {}, "replicate"),
        (network.config, {"max_new_tokens": 500}, "replicate"),  # leaves little context for the prompt
    ):  # fmt: skip
        big = types.SimpleNamespace(config=config, device=torch.device("cuda"), dtype=torch.bfloat16)
        assert choose(big, 8, **changes) == kept, changes
    for dtype, kept in ((torch.bfloat16, "shard"), (torch.float32, "replicate")):  # fp32 needs no fp32 copy beside it
        config = dataclasses.replace(eight, layers=12)
        big = types.SimpleNamespace(config=config, device=torch.device("cuda"), dtype=dtype)
        assert choose(big, 8) == kept
    assert choose(big, 1) == "replicate"
