"""checkpoint.py and --resume: what was killed goes on as if it had not been; what is broken is told and passed over."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import launch
import pytest
import tiny
import torch
from launch import close, finish, lines, same, script, start, timeless, wait_for_step

import model as models
from run import checkpoint, files, lora, results
from run.args import Args

KILLS = int(os.environ.get("FAITH_KILLS", "4"))  # random kills of one run; more of them take minutes
STEPS = 6 * KILLS  # so that a run has some left when it is killed for the last time


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("model"))


def flags(folder, out, **changes):
    several = {
        "steps": STEPS,
        "decay": "linear",
        "checkpoint_every": 2,
        "anchor": 0.5,
        "anchor_questions": 5,
        "kl": 0.01,
    }
    return launch.flags(folder, out, **several | changes)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run that nobody disturbed, and the seconds it took."""
    out, began = tmp_path_factory.mktemp("run") / "whole", time.time()
    code, printed, error = finish(start(flags(folder, out)))
    assert code == 0, error
    return out, time.time() - began


# ---- the files -----------------------------------------------------------------------------------------------


def state(seed):
    torch.manual_seed(seed)
    return {"weight.a": torch.randn(5, 3), "step.a": torch.tensor(float(seed))}


def test_what_is_written_is_read(tmp_path):
    for steps in (2, 4, 6):
        checkpoint.write(tmp_path, steps, state(steps), {"left": steps})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000006"]  # the last two
    path, read = checkpoint.newest(tmp_path), state(0)
    assert path.name == "step-00000006" and checkpoint.read(path, read) == (6, {"left": 6})
    assert all(torch.equal(read[name], tensor) for name, tensor in state(6).items())
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["files"] == {p.name: p.stat().st_size for p in path.iterdir() if p.name != "manifest.json"}
    with pytest.raises(ValueError, match="does not fit this run"):
        checkpoint.read(path, {"weight.b": torch.zeros(2)})
    with pytest.raises(ValueError, match="does not fit this run"):
        checkpoint.read(path, {"weight.a": torch.zeros(7, 3), "step.a": torch.zeros(())})
    with pytest.raises(ValueError, match="does not fit this run"):
        checkpoint.read(path, {"weight.a": torch.zeros(5, 3)})  # it holds more than is asked for


@pytest.mark.parametrize("what", ["cut", "gone", "manifest cut", "manifest gone", "half written"])
def test_a_broken_checkpoint_is_told_and_passed_over(tmp_path, what):
    for steps in (2, 4):
        checkpoint.write(tmp_path, steps, state(steps), {})
    path = tmp_path / "step-00000004"
    (data,) = path.glob("*.distcp")
    target = path / "manifest.json" if "manifest" in what else data
    if "cut" in what:
        os.truncate(target, target.stat().st_size // 2)
    elif "gone" in what:
        target.unlink()
    else:
        path.rename(tmp_path / "step-00000004.part")
    said = []
    assert checkpoint.newest(tmp_path, said.append) == tmp_path / "step-00000002"
    assert [line.startswith(f"{path} is not whole (") and target.name in line for line in said] == [True] * (
        what != "half written"
    )
    checkpoint.write(tmp_path, 4, state(4), {})  # written anew
    assert checkpoint.newest(tmp_path, said.append) == path and not list(tmp_path.glob("*.part"))


def test_a_broken_one_is_not_counted(tmp_path):
    for steps in (2, 4):
        checkpoint.write(tmp_path, steps, state(steps), {})
    os.truncate(next((tmp_path / "step-00000004").glob("*.distcp")), 5)
    checkpoint.write(tmp_path, 6, state(6), {})
    assert checkpoint.newest(tmp_path).name == "step-00000006" and (tmp_path / "step-00000002").exists()


def test_none(tmp_path):
    assert checkpoint.newest(tmp_path) is None and checkpoint.newest(tmp_path / "none") is None


def test_a_file_that_may_not_grow(tmp_path):
    """Files of this process may not grow beyond a limit: as test_a_full_disk, wherever that is skipped."""
    checkpoint.write(tmp_path, 2, state(2), {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(
            ValueError, match=r"step-00000004: cannot be written \(.*; \d+ MB are free there\)"
        ) as error:
            checkpoint.write(tmp_path, 4, {"weight.a": torch.zeros(10000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert checkpoint.newest(tmp_path).name == "step-00000002" and len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def disk():
    """disk(size): a folder on a file system of its own that holds so many bytes.

    A process in its own mount namespace has it; it is reached through that process, and goes with it.
    """
    holders = []

    def make(size):
        mount, why = f"mount -t tmpfs -o size={size} none /tmp && echo made && exec cat", ""
        for command in (["unshare", "--mount"], ["unshare", "--mount", "--map-root-user"]):
            try:
                holders.append(subprocess.Popen([*command, "sh", "-c", mount], text=True, stdin=subprocess.PIPE,
                                                stdout=subprocess.PIPE, stderr=subprocess.PIPE))  # fmt: skip
            except OSError as error:
                pytest.skip(f"a small file system needs util-linux's unshare ({error})")
            if holders[-1].stdout.readline():
                return Path("/proc", str(holders[-1].pid), "root", "tmp")  # what it sees as /tmp
            why = holders[-1].stderr.read().strip()
        pytest.skip(f"no file system can be mounted here, not in a namespace of its own either ({why})")

    yield make
    for holder in holders:
        holder.kill()
        holder.communicate()


def test_a_full_disk(disk):
    """However much room there is, a checkpoint is written whole, or that is said and the one before it stays."""
    small, tensors = disk(2**20), {"weight.a": torch.randn(30000), "step.a": torch.tensor(4.0)}
    folder = small / "checkpoints"
    checkpoint.write(folder, 2, state(2), {})
    filler = small / "filler"
    for pages in range(100):
        filler.write_bytes(bytes(shutil.disk_usage(small).free - pages * 4096))
        try:
            checkpoint.write(folder, 4, tensors, {"left": 4})
            break
        except ValueError as error:
            assert re.fullmatch(r"/proc/\S+/step-00000004: cannot be written \(.+; 0 MB are free there\)", str(error))
        assert [path.name for path in folder.iterdir()] == ["step-00000002"]
        assert checkpoint.newest(folder).name == "step-00000002"
        filler.unlink()
    assert pages * 4096 > tensors["weight.a"].nbytes
    read = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    assert checkpoint.read(checkpoint.newest(folder), read) == (4, {"left": 4})
    assert torch.equal(read["weight.a"], tensors["weight.a"])


@pytest.mark.parametrize("rank", [0, 4])
def test_a_full_disk_for_the_model(folder, disk, rank):
    """It is there in whole, or not under its name; then a line says what is not written."""
    small, network = disk(2**20), models.load(folder)
    network = lora.attach(network, rank, 8.0) if rank else network
    args, filler = Args(out=str(small), lora=rank, resume=True, calibrate=True), small / "filler"
    (small / "calibration.json").write_text('{"mean_logp": [0, 0, 0]}')
    for pages in range(100):
        filler.write_bytes(bytes(shutil.disk_usage(small).free - pages * 4096))
        try:
            results.save_model(args, network, "model")
            break
        except ValueError as error:
            assert re.fullmatch(f"{small}/model.*cannot be written \\(.*No space left on device.*\\)", str(error))
            assert sorted(path.name for path in small.iterdir()) == ["calibration.json", "filler"]
        filler.unlink()
    assert pages > 5
    assert json.loads((small / "model" / "training.json").read_text())["lora"] == rank
    assert (small / "model" / "calibration.json").read_text() == (small / "calibration.json").read_text()
    if not rank:
        assert torch.equal(models.load(small / "model").embed_tokens.weight, network.embed_tokens.weight)


def test_lines_are_cut(tmp_path):
    file = tmp_path / "a.jsonl"
    text = "".join(json.dumps({"step": n, "x": 0.1}) + "\n" for n in range(4))
    for torn in ("", '{"step": 4, "x"', '{"step": 1}'):
        file.write_text(text + torn)
        files.cut_jsonl(file, lambda record: record["step"] < 3)
        assert file.read_text() == "".join(text.splitlines(keepends=True)[:3])
    files.cut_jsonl(tmp_path / "none", lambda record: True)


# ---- runs that are stopped -----------------------------------------------------------------------------------


def test_random_kills(folder, whole, tmp_path):
    """kill -9 at random moments, each time resumed: in the end the same metrics, explanations, weights, figures.

    A life is killed while it starts, or soon after its first or second step.
    """
    out, took = whole
    copy, draw, kills = tmp_path / "killed", random.Random(0), 0
    given = flags(folder, copy)
    while kills < KILLS:
        process = start(given)
        if draw.random() < 0.25:
            time.sleep(draw.uniform(0.2, 0.3 * took))
        else:
            seen = len(lines(copy / "metrics.jsonl")) + draw.choice((1, 2))
            while process.poll() is None and len(lines(copy / "metrics.jsonl")) < seen:
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.3))
        process.kill()
        code, _, error = finish(process)
        if code == 0:
            break
        assert code == -signal.SIGKILL, error
        kills += 1
        if (copy / "args.json").exists():
            given = ["--resume", "--out", copy]
        logged = len((copy / "metrics.jsonl").read_text().splitlines()) if (copy / "metrics.jsonl").exists() else 0
    assert kills == KILLS if "FAITH_KILLS" in os.environ else kills >= KILLS // 2
    code, printed, error = finish(start(given))
    assert code == 0, error
    (done,) = re.findall(r"continuing after step (\d+)", printed)
    assert logged - 3 <= int(done) <= logged  # a checkpoint every two steps, and one line may be torn
    same(out, copy)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_last_finished_step(folder, whole, tmp_path, number):
    """In the middle of a step, and without periodic checkpoints at hand: nothing of the steps done is lost."""
    copy = tmp_path / "o"
    process = start(flags(folder, copy, checkpoint_every=1000))
    wait_for_step(process, copy, 3)
    time.sleep(0.02)
    process.send_signal(number)
    code, printed, error = finish(process)
    assert code == 128 + number and not error, error
    (done,) = re.findall(r"stopped after step (\d+); continue with: torchrun train.py --resume --out ", printed)
    assert int(done) >= 3 and len(files.read_jsonl(copy / "metrics.jsonl")) == int(done)
    assert checkpoint.newest(copy / "checkpoints").name == f"step-{int(done):08d}"
    code, printed, error = finish(start(["--resume", "--out", copy]))
    assert code == 0 and f"continuing after step {done}, from " in printed, error
    same(whole[0], copy)


SLOW = """
sample = train.sample
def slow(subject, prompts, keys, n, args):
    if n == 3 {rank}:
        print("in step 4", flush=True)
        time.sleep(100)
    return sample(subject, prompts, keys, n, args)
train.sample = slow
"""


def test_a_signal_does_not_wait_for_the_step(folder, tmp_path):
    """A step that takes long is given up."""
    slow = script(tmp_path / "slow.py", SLOW.format(rank=""))
    process = start(flags(folder, tmp_path / "o", checkpoint_every=1000), script=slow)
    next(line for line in process.stdout if line.startswith("in step 4"))
    process.terminate()
    code, printed, error = finish(process, timeout=20)
    assert code == 128 + signal.SIGTERM and "stopped after step 3; continue with" in printed, error
    assert checkpoint.newest(tmp_path / "o" / "checkpoints").name == "step-00000003"


KILLED = """
from run import checkpoint
save, saves = checkpoint.dcp.save, []
def cut_short(tensors, checkpoint_id, no_dist):
    save(tensors, checkpoint_id=checkpoint_id, no_dist=no_dist)
    saves.append(checkpoint_id)
    if len(saves) == 2:  # all is written but the manifest
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.dcp.save = cut_short
"""


def test_a_kill_while_saving(folder, whole, tmp_path):
    copy = tmp_path / "o"
    code, _, _ = finish(start(flags(folder, copy), script=script(tmp_path / "killed.py", KILLED)))
    assert code == -signal.SIGKILL and list((copy / "checkpoints").glob("*.part"))
    code, printed, error = finish(start(["--resume", "--out", copy]))
    assert code == 0 and "continuing after step 2, from " in printed, error
    same(whole[0], copy)


def test_frozen_labels_and_calibration(folder, tmp_path):
    """What was taken from the initial model is again taken from it, not from the model that goes on."""
    changes = {"labels": "frozen", "frozen_questions": 20, "steps": 6, "eval_questions": 0, "lr": 1e-2}
    runs = []
    for name in ("whole", "stopped"):
        given = flags(folder, tmp_path / name, **changes) + ["--calibrate", "--calibration-questions", "5"]
        assert finish(start(given))[0] == 0
        runs.append(tmp_path / name)
    shutil.rmtree(runs[1] / "checkpoints" / "step-00000006")
    code, printed, error = finish(start(["--resume", "--out", runs[1]]))
    assert code == 0 and "continuing after step 4, from " in printed, error
    assert timeless(runs[0] / "metrics.jsonl") == timeless(runs[1] / "metrics.jsonl")
    assert (runs[0] / "calibration.json").read_text() == (runs[1] / "calibration.json").read_text()


HELD = """
import torch
update, updates = torch.optim.AdamW.step, []
def signalled(self, *rest):
    updates.append(1)
    if len(updates) == 3:  # in the moment in which weights change
        os.kill(os.getpid(), signal.SIGTERM)
    return update(self, *rest)
torch.optim.AdamW.step = signalled
"""


def test_a_signal_while_weights_change(folder, whole, tmp_path):
    """The step is finished first: weights, optimizer and logs are of the same step."""
    copy, held = tmp_path / "o", script(tmp_path / "held.py", HELD)
    code, printed, error = finish(start(flags(folder, copy, checkpoint_every=1000), script=held))
    assert code == 128 + signal.SIGTERM and "stopped after step 3; continue with" in printed, error
    code, printed, error = finish(start(["--resume", "--out", copy]))
    assert code == 0 and "continuing after step 3, from " in printed, error
    same(whole[0], copy)


def test_a_signal_while_waiting_for_another_rank(folder, tmp_path):
    """Rank 0 is done with its share of step 4, rank 1 is not: it need not be waited for."""
    waiting = script(tmp_path / "waiting.py", SLOW.format(rank="and os.environ['RANK'] == '1'"))
    process = start(flags(folder, tmp_path / "o", checkpoint_every=1000), 2, waiting)
    next(line for line in process.stdout if "in step 4" in line)
    time.sleep(1)
    process.terminate()
    process.stdout.read()
    process.wait(60)
    assert checkpoint.newest(tmp_path / "o" / "checkpoints").name == "step-00000003"


def test_other_ranks(folder, whole, tmp_path):
    """Begun on two ranks and stopped by SIGTERM to torchrun; ended on one: the same up to rounding."""
    copy = tmp_path / "o"
    process = start(flags(folder, copy), ranks=2)
    wait_for_step(process, copy, 3)
    process.terminate()
    finish(process, timeout=90)
    shutil.copytree(copy, tmp_path / "two")
    for ranks, path in ((1, copy), (2, tmp_path / "two")):
        code, printed, error = finish(start(["--resume", "--out", path], ranks))
        assert code == 0 and re.search(r"continuing after step [345], from ", printed), error
        close(whole[0], path, 1e-5)


def test_a_truncated_checkpoint_of_a_run(folder, whole, tmp_path):
    copy = tmp_path / "o"
    shutil.copytree(whole[0], copy)
    (copy / "after.json").unlink()
    path = copy / "checkpoints" / f"step-{STEPS:08d}"
    (data,) = path.glob("*.distcp")
    os.truncate(data, 100)
    code, printed, error = finish(start(["--resume", "--out", copy]))
    assert code == 0 and f"{path} is not whole ({data.name} has 100 bytes of " in printed, error
    assert f"continuing after step {STEPS - 2}, from " in printed
    same(whole[0], copy)


@pytest.mark.parametrize("ranks, parallel", [(1, "replicate"), (2, "shard")])
def test_no_room_for_a_second_checkpoint(folder, disk, ranks, parallel):
    """It is said whenever one is due, the first stays, and the run goes on to its end."""
    out = disk(900_000) / "o"
    code, printed, error = finish(start(flags(folder, out, steps=6, parallel=parallel), ranks))
    assert code == 0, error
    failed = re.findall(r"^no checkpoint after step (\d): .*; the earlier ones are kept$", printed, re.MULTILINE)
    assert failed == ["4", "6", "6"]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000002"]
    assert not checkpoint.faults(out / "checkpoints" / "step-00000002")
    assert len(files.read_jsonl(out / "metrics.jsonl")) == 6 and (out / "model" / "model.safetensors").exists()


FILL = """
import shutil
from pathlib import Path
sample = train.sample
def filling(subject, prompts, keys, n, args):
    folder = Path(args.out).parent
    if n == 3 and os.environ.get("RANK", "0") == "0":
        (folder / "filler").write_bytes(bytes(shutil.disk_usage(folder).free))
    return sample(subject, prompts, keys, n, args)
train.sample = filling
"""


@pytest.mark.parametrize("ranks, parallel", [(1, "replicate"), (2, "shard")])
def test_no_room_at_all(folder, whole, disk, tmp_path, ranks, parallel):
    """A line that says what to do, and status 2; with room again the run goes on, and ends as if nothing had been."""
    out = disk(5_000_000) / "o"
    way = f"; once that is fixed: torchrun train.py --resume --out {out}"
    code, _, error = finish(start(flags(folder, out, parallel=parallel), ranks, script(tmp_path / "fill.py", FILL)))
    full = re.escape(f"cannot be written (No space left on device){way}\n")
    said = re.findall(f"train.py: {out}/(?:explanations|metrics).jsonl: {full}", error)  # whichever needs a page first
    assert (code, [error]) == (2, said) if ranks == 1 else (code and error.count("train.py: ") == 1 == len(said))
    assert checkpoint.newest(out / "checkpoints").name == "step-00000002"
    code, _, error = finish(start(["--resume", "--out", out, "--parallel", "replicate"]))  # too early
    assert (code, error) == (2, f"train.py: {out}/metrics.jsonl: cannot be written (No space left on device)\n")
    (out.parent / "filler").unlink()
    code, printed, error = finish(start(["--resume", "--out", out], ranks))
    assert code == 0 and "continuing after step 2, from " in printed, error
    if ranks == 1:
        same(whole[0], out)
    close(whole[0], out)
    assert not list(out.rglob("*.part*"))


def test_resume_mistakes(folder, whole, tmp_path):
    """One line, status 2, and nothing of the run is touched."""
    for out in (tmp_path / "none", tmp_path):
        code, _, error = finish(start(["--resume", "--out", out]))
        assert code == 2 and "--resume: --out" in error and error.count("\n") == 1
    copy = tmp_path / "o"
    shutil.copytree(whole[0], copy)
    known = json.loads((copy / "args.json").read_text())
    del known["lora"]  # as of a run from before there was the flag
    (copy / "args.json").write_text(json.dumps(known))
    files = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    for changes in (["--seed", "5"], ["--eval-questions", "4"], ["--lora", "4"], ["--data", "elsewhere"]):
        code, _, error = finish(start(["--resume", "--out", copy, *changes]))
        assert code == 2 and f"{changes[0]} was " in error and error.count("\n") == 1
        assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == files
    for path in (copy / "checkpoints").iterdir():
        (path / "manifest.json").unlink()
    code, _, error = finish(start(["--resume", "--out", copy]))
    assert code == 2 and "holds no whole checkpoint; start anew" in error and error.count("\n") == 1
    assert (copy / "metrics.jsonl").read_bytes() == files[copy / "metrics.jsonl"]


def test_more_steps(folder, whole, tmp_path):
    """A run that has ended may be given more, at another learning rate."""
    copy = tmp_path / "o"
    shutil.copytree(whole[0], copy)
    code, printed, error = finish(start(["--resume", "--out", copy, "--steps", STEPS + 2, "--lr", "1e-4"]))
    assert code == 0 and f"continuing after step {STEPS}, from " in printed, error
    metrics = timeless(copy / "metrics.jsonl")
    assert metrics[:STEPS] == timeless(whole[0] / "metrics.jsonl") and len(metrics) == STEPS + 2
    saved = json.loads((copy / "args.json").read_text())
    assert saved["steps"] == STEPS + 2
    was = json.loads((whole[0] / "args.json").read_text())
    assert "history" not in was and saved["history"] == [{"until": STEPS, "lr": was["lr"], "steps": STEPS}]
    assert json.loads((copy / "model" / "training.json").read_text())["history"] == saved["history"]
    assert f"up to step {STEPS} with --lr {was['lr']} --steps {STEPS}\n" in (copy / "model" / "README.md").read_text()


def test_what_a_run_was_resumed_with_is_kept(tmp_path):
    """Which flags each of its parts had, also where it went back to an earlier checkpoint; not what changes nothing."""

    def resumed(done, **given):
        results.write_args(Args(out=str(tmp_path), resume=done is not None, **given), done or 0)
        return json.loads((tmp_path / "args.json").read_text()).get("history")

    assert resumed(None, lr=1.0) is None
    assert resumed(0, lr=2.0) is None  # nothing had been done
    assert resumed(10, lr=2.0, micro=1, note="a", steps=300, decay="constant") is None
    assert resumed(10, lr=3.0) == [{"until": 10, "lr": 2.0}]
    assert resumed(10, lr=4.0) == [{"until": 10, "lr": 2.0}]  # at 3.0 nothing was kept
    assert resumed(20, lr=4.0, clip_norm=2.0) == [{"until": 10, "lr": 2.0}, {"until": 20, "clip_norm": 1.0}]
    assert resumed(15, lr=5.0) == [{"until": 10, "lr": 2.0}, {"until": 15, "clip_norm": 1.0}]
    assert resumed(5, lr=5.0) == [{"until": 5, "lr": 2.0}]
    assert resumed(30, lr=5.0, decay="linear", steps=7)[1:] == [{"until": 30, "decay": "constant", "steps": 100}]
