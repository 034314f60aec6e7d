"""checkpoint.py and --resume: a killed run goes on as if it had not been killed; a broken checkpoint is passed over."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import launch
import pytest
import torch
from launch import call, close, finish, ran, refused, same, script, start, timeless, until

import model as models
import train
from lab import experiment
from run import checkpoint, files, lora, reading, results
from run.args import Args
from run.progress import again

STEPS = 24  # so that a run has some left when it is stopped


def flags(folder, out, **changes):
    several = {"steps": STEPS, "decay": "linear", "checkpoint_every": 2, "anchor": 0.5, "anchor_questions": 5,
               "kl": 0.01}  # fmt: skip
    return launch.flags(folder, out, **several | changes)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("run") / "whole"
    ran(flags(folder, out))
    return out


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def state(seed):
    torch.manual_seed(seed)
    return {"weight.a": torch.randn(5, 3), "step.a": torch.tensor(float(seed))}


def saved(folder, *steps):
    """Writes checkpoints, and returns the path of the last."""
    for n in steps:
        checkpoint.write(folder, n, state(n), {"left": n})
    return folder / f"step-{n:08d}"


def test_what_is_written_is_read(tmp_path):
    assert checkpoint.newest(tmp_path) is None and checkpoint.newest(tmp_path / "none") is None
    path, read = saved(tmp_path, 2, 4, 6), state(0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000006"]  # the last two
    assert checkpoint.newest(tmp_path) == path and checkpoint.read(path, read) == (6, {"left": 6})
    assert all(torch.equal(read[name], tensor) for name, tensor in state(6).items())
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["files"] == {p.name: p.stat().st_size for p in path.iterdir() if p.name != "manifest.json"}
    for shapes in ({"weight.b": (2,)}, {"weight.a": (7, 3), "step.a": ()}, {"weight.a": (5, 3)}):  # the last is a part
        with pytest.raises(ValueError, match="does not fit this run"):
            checkpoint.read(path, {name: torch.zeros(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize("what", ["cut", "gone", "manifest cut", "manifest gone", "half written"])
def test_a_broken_checkpoint_is_reported_and_passed_over(tmp_path, what):
    path = saved(tmp_path, 2, 4)
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
    told = [line.startswith(f"{path} is not whole (") and target.name in line for line in said]
    assert told == [True] * (what != "half written")
    later = saved(tmp_path, 6)
    assert checkpoint.newest(tmp_path) == later
    assert (tmp_path / "step-00000002").exists()  # the broken one is not counted
    shutil.rmtree(later)
    saved(tmp_path, 4)  # written anew
    assert checkpoint.newest(tmp_path, said.append) == path and not list(tmp_path.glob("*.part"))


def test_a_file_that_may_not_grow(tmp_path):
    """The files of this process may not grow beyond a limit: like test_a_full_disk, also where that is skipped."""
    saved(tmp_path, 2)
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

    A process in its own mount namespace has it. It is reached through that process, and goes with it.
    """
    holders = []

    def make(size):
        mount = f"sh -c 'mount -t tmpfs -o size={size} none /tmp && echo $$ && exec cat'"
        command = f"unshare --mount {mount} || unshare --mount --map-root-user {mount}"
        holders.append(subprocess.Popen(["sh", "-c", command], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE))  # fmt: skip
        if not (pid := holders[-1].stdout.readline().strip()):
            why = holders[-1].stderr.read().strip()  # any other failure is the test's own
            assert re.search("not permitted|denied|superuser|not found|No such file", why), why
            pytest.skip(f"no file system can be mounted here ({why})")
        return Path("/proc", pid, "root", "tmp")  # what that process sees as /tmp

    yield make
    for holder in holders:
        holder.communicate()


def pages_needed(small, work, failure, kept):
    """Gives work() a page more room on a small disk until it succeeds. Before, it fails and `kept` is all there is."""
    filler = small / "filler"
    for pages in range(100):
        filler.write_bytes(bytes(shutil.disk_usage(small).free - pages * 4096))
        try:
            work()
            break
        except ValueError as error:
            assert re.fullmatch(failure, str(error))
        filler.unlink()
        assert sorted(path.name for path in small.iterdir()) == kept
    return pages


def test_a_full_disk(disk):
    """With any room, a checkpoint is written whole, or an error says that it is not and the one before stays."""
    small, tensors = disk(2**20), {"weight.a": torch.randn(30000), "step.a": torch.tensor(4.0)}
    folder = small / "checkpoints"
    saved(folder, 2)

    def write():
        assert [path.name for path in folder.iterdir()] == ["step-00000002"]
        assert checkpoint.newest(folder).name == "step-00000002"
        checkpoint.write(folder, 4, tensors, {"left": 4})

    failure = r"/proc/\S+/step-00000004: cannot be written \(.+; 0 MB are free there\)"
    assert pages_needed(small, write, failure, ["checkpoints"]) * 4096 > tensors["weight.a"].nbytes
    read = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    assert checkpoint.read(checkpoint.newest(folder), read) == (4, {"left": 4})
    assert torch.equal(read["weight.a"], tensors["weight.a"])


@pytest.mark.parametrize("rank", [0, 4])
def test_a_full_disk_for_the_model(network, disk, rank):
    """The model is there as a whole, or not under its name; then an error says what is not written."""
    small, network = disk(2**20), lora.attach(network, rank, 8.0) if rank else network
    args, model = Args(out=str(small), lora=rank, resume=True, calibrate=True), small / "model"
    known = {"calibration.json": '{"mean_logp": [0, 0, 0]}', "identity.json": '{"made_of": {}}', "questions.txt": ""}
    for name, text in known.items():
        (small / name).write_text(text)
    failure = f"{model}.*cannot be written \\(.*No space left on device.*\\)"
    assert pages_needed(small, lambda: results.save_model(args, network, "model"), failure, [*known]) > 5
    assert json.loads((model / "training.json").read_text())["lora"] == rank
    assert (model / "calibration.json").read_text() == (small / "calibration.json").read_text()
    if not rank:
        assert torch.equal(models.load(model).embed_tokens.weight, network.embed_tokens.weight)


def test_lines_are_cut(tmp_path):
    file = tmp_path / "a.jsonl"
    text = "".join(json.dumps({"step": n, "x": 0.1}) + "\n" for n in range(4))
    for torn in ("", '{"step": 4, "x"', '{"step": 1}'):
        file.write_text(text + torn)
        files.cut_jsonl(file, lambda record: record["step"] < 3)
        assert file.read_text() == "".join(text.splitlines(keepends=True)[:3])
    files.cut_jsonl(tmp_path / "none", lambda record: True)


def resumed(out, *changes, after, ranks=1):
    """Resumes the run in `out`, checks that it continues after step `after` and returns what it prints."""
    printed = ran(["--resume", "--out", out, *changes], ranks)
    assert f"continuing after step {after}, from " in printed
    return printed


SLOW = """
sample = train.sample
def slow(subject, prompts, keys, n, args):
    if n == 3:
        print("in step 4", flush=True)
        time.sleep(100)
    return sample(subject, prompts, keys, n, args)
train.sample = slow
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_the_last_finished_step(folder, whole, tmp_path, number):
    """In a step that takes long, far from a periodic checkpoint: the step is given up, and no finished one is lost."""
    out = tmp_path / "o"
    process = start(flags(folder, out, checkpoint_every=1000), script=script(tmp_path / "slow.py", SLOW))
    until(process, "in step 4")
    process.send_signal(number)
    code, printed, error = finish(process, timeout=80)
    assert code == 128 + number and not error, error
    assert "stopped after step 3; continue with: torchrun train.py --resume --out " in printed
    assert len(reading.read_jsonl(out / "metrics.jsonl")) == 3
    assert checkpoint.newest(out / "checkpoints").name == "step-00000003"
    resumed(out, after=3)
    same(whole, out)


def test_a_signal_before_the_first_step(folder, whole, tmp_path, monkeypatch):
    """While the initial model is measured: a line says how to go on, and the run then begins anew."""
    out = tmp_path / "o"
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "evaluate", lambda *_: signal.raise_signal(signal.SIGTERM))
        assert call(flags(folder, out))[::2] == (143, f"train.py: stopped by SIGTERM; continue with: {again(out)}\n")
    assert "continuing after step 0\n" in ran(["--resume", "--out", out])
    same(whole, out)


def test_a_signal_while_weights_change(folder, whole, tmp_path, monkeypatch):
    """The step is finished first: weights, optimizer and logs belong to the same step."""
    out, update, updates = tmp_path / "o", torch.optim.AdamW.step, []

    def signalled(self, *rest):
        updates.append(1)
        if len(updates) == 3:
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL  # it would end the tests
            signal.raise_signal(signal.SIGTERM)
        return update(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", signalled)
    code, printed, error = call(flags(folder, out, checkpoint_every=1000))
    assert code == 128 + signal.SIGTERM and "stopped after step 3; continue with" in printed, error
    resumed(out, after=3)
    same(whole, out)


WAITING = """
from pathlib import Path
sample = train.sample
def waiting(subject, prompts, keys, n, args):
    if n == 3 and os.environ["RANK"] == "1":
        print("in step 4", flush=True)
        while not (Path(args.out) / "go").exists():
            time.sleep(0.1)
    return sample(subject, prompts, keys, n, args)
train.sample = waiting
"""


def test_two_ranks_are_stopped(folder, whole, tmp_path):
    """SIGTERM to torchrun after rank 0 has done its share of step 4: it does not wait for rank 1, which leaves later.

    Continued on one rank and on two, the run is the same up to rounding.
    """
    out, two = tmp_path / "o", tmp_path / "two"
    process = start(flags(folder, out, checkpoint_every=1000), 2, script(tmp_path / "waiting.py", WAITING))
    until(process, "in step 4")
    time.sleep(0.5)
    process.terminate()
    while not (path := checkpoint.newest(out / "checkpoints")):
        assert process.poll() is None
        time.sleep(0.05)
    (out / "go").touch()
    finish(process, timeout=60)
    assert path.name == "step-00000003"
    shutil.copytree(out, two)
    for ranks, run in ((1, out), (2, two)):
        resumed(run, after=3, ranks=ranks)
        close(whole, run, 1e-5)


def test_a_truncated_checkpoint_of_a_run(whole, copy):
    (copy / "after.json").unlink()
    path = copy / "checkpoints" / f"step-{STEPS:08d}"
    (data,) = path.glob("*.distcp")
    os.truncate(data, 100)
    assert f"{path} is not whole ({data.name} has 100 bytes of " in resumed(copy, after=STEPS - 2)
    same(whole, copy)


def test_no_room_for_a_second_checkpoint(folder, disk):
    """The run says so whenever a checkpoint is due, keeps the first, and goes on to its end. In shards: test_shard."""
    out = disk(900_000) / "o"
    printed = ran(flags(folder, out, steps=6))
    failed = re.findall(r"^no checkpoint after step (\d): .*; the earlier ones are kept$", printed, re.MULTILINE)
    assert failed == ["4", "6", "6"]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000002"]
    assert not checkpoint.faults(out / "checkpoints" / "step-00000002")
    assert len(reading.read_jsonl(out / "metrics.jsonl")) == 6 and (out / "model" / "model.safetensors").exists()


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
    """A line says what to do; the status is 2. With room again the run goes on; from shards: test_shard."""
    out = disk(5_000_000) / "o"
    several = "--nproc-per-node 2 " * (ranks == 2)
    way = f"; once that is fixed: torchrun {several}train.py --resume --out {out}"
    code, _, error = finish(start(flags(folder, out, parallel=parallel), ranks, script(tmp_path / "fill.py", FILL)))
    full = re.escape(f"cannot be written (No space left on device){way}\n")
    said = re.findall(f"train.py: {out}/(?:explanations|metrics).jsonl {full}", error)  # whichever needs a page first
    assert (code, [error]) == (2, said) if ranks == 1 else (code and error.count("train.py: ") == 1 == len(said))
    assert checkpoint.newest(out / "checkpoints").name == "step-00000002"
    early = refused(["--resume", "--out", out, "--parallel", "replicate"])
    assert early == f"train.py: {out}/metrics.jsonl cannot be written (No space left on device)\n"
    if ranks == 1:
        (out.parent / "filler").unlink()
        resumed(out, after=2)
        same(whole, out)
        assert not list(out.rglob("*.part*"))


def test_resume_mistakes(copy, tmp_path):
    """Each is one line and exit status 2, and nothing of the run is touched."""
    for out in (tmp_path / "none", tmp_path):
        assert "--resume: --out" in refused(["--resume", "--out", out])
    assert "--resume needs --out" in refused(["--resume"])
    known = json.loads((copy / "args.json").read_text())
    del known["lora"]  # as in a run from before this flag
    (copy / "args.json").write_text(json.dumps(known))
    contents = lambda: {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}  # noqa: E731
    before = contents()
    for changes in (["--seed", "5"], ["--eval-questions", "4"], ["--lora", "4"], ["--intervention", "adverb"]):
        assert f"{changes[0]} was " in refused(["--resume", "--out", copy, *changes])
        assert contents() == before
    for path in (copy / "checkpoints").iterdir():
        (path / "manifest.json").unlink()
    for every in ("2", "1000"):  # what counts is how often the run saved before
        code, _, error = call(["--resume", "--out", copy, "--checkpoint-every", every])
        assert code == 2 and "holds no whole checkpoint; start anew" in error and error.count("\n") == 1
        assert (copy / "metrics.jsonl").read_bytes() == before[copy / "metrics.jsonl"]
        shutil.rmtree(copy / "checkpoints", ignore_errors=True), shutil.rmtree(copy / "model", ignore_errors=True)
    known["checkpoint_every"] = STEPS + 1  # killed before its first checkpoint: it begins anew
    (copy / "args.json").write_text(json.dumps(known))
    code, printed, _ = call(["--resume", "--out", copy, "--checkpoint-every", "2"])
    assert code == 0 and "continuing after step 0\n" in printed
    assert len(reading.read_jsonl(copy / "metrics.jsonl")) == STEPS


def test_more_steps(whole, copy, monkeypatch):
    """A run that has ended may get more steps, at another learning rate. From then on it does not look ended."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "step", lambda *_: signal.raise_signal(signal.SIGTERM))
        assert call(["--resume", "--out", copy, "--steps", STEPS + 2, "--lr", "1e-4"])[0] == 143
    assert not [file.name for name in ("after.*", "difference.*") for file in copy.glob(name)]
    resumed(copy, after=STEPS)
    metrics = timeless(copy / "metrics.jsonl")
    assert metrics[:STEPS] == timeless(whole / "metrics.jsonl") and len(metrics) == STEPS + 2
    was, now = (json.loads((out / "args.json").read_text()) for out in (whole, copy))
    assert "history" not in was and now["history"] == [{"until": STEPS, "lr": was["lr"], "steps": STEPS}]
    assert now["steps"] == STEPS + 2
    assert json.loads((copy / "model" / "training.json").read_text())["history"] == now["history"]
    assert f"up to step {STEPS} with --lr {was['lr']} --steps {STEPS}\n" in (copy / "model" / "README.md").read_text()


def test_what_a_run_was_resumed_with_is_kept(tmp_path):
    """The flags of each part of a run, also if it went back to an earlier checkpoint, but not what changes nothing."""

    def history(done, **given):
        results.write_args(Args(out=str(tmp_path), resume=done is not None, **given), done or 0)
        return json.loads((tmp_path / "args.json").read_text()).get("history")

    first = {"until": 10, "lr": 2.0}
    assert history(None, lr=1.0) is None
    assert history(0, lr=2.0) is None  # nothing had been done
    assert history(10, lr=2.0, micro=1, note="a", steps=300, decay="constant") is None
    assert history(10, lr=3.0) == [first]
    assert history(10, lr=4.0) == [first]  # at 3.0 nothing was kept
    assert history(20, lr=4.0, clip_norm=2.0) == [first, {"until": 20, "clip_norm": 1.0}]
    assert history(15, lr=5.0) == [first, {"until": 15, "lr": 4.0}]  # and clip_norm as it was before 20
    assert history(5, lr=5.0) == [{"until": 5, "lr": 2.0}]
    assert history(30, lr=5.0, decay="linear", steps=7)[1:] == [{"until": 30, "decay": "constant", "steps": 100}]
