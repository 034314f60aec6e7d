"""Checkpoints: the state of a run, written whole, checked before it is read, the last two kept.

    OUT/checkpoints/step-00000040/                 torch.distributed.checkpoint's files: weights and optimizer
    OUT/checkpoints/step-00000040/manifest.json    the name and size of each file, and the position in the data

A checkpoint is written under another name and then renamed, so a kill at any moment leaves the one before it. The sizes
show whether a file was cut short later; then the checkpoint before it is read. torch.distributed.checkpoint pickles its
index: resume only your own runs. model.save writes what others should load, as safetensors.
"""

import contextlib
import shutil
import warnings
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from run import files
from run.identity import check_same, digest
from run.progress import add_note, again, say
from run.reading import read_json

# Without shards one process writes alone, on purpose: hide torch's warning.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
STEPS = "step-*[0-9]"  # the folders of finished checkpoints


@contextlib.contextmanager
def first_cause(message):
    """Turns an error into a ValueError with message(first cause): torch.distributed.checkpoint wraps errors."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, CheckpointException) as error:
        cause = next((e for pair in getattr(error, "failures", {}).values() for e in pair[:1]), error)
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        raise ValueError(message(getattr(cause, "strerror", None) or lines[-1])) from None


def write(folder: Path, steps: int, tensors: dict[str, Tensor], position: dict, made_of=None, ranks=None):
    """Writes the state after `steps` steps, then removes all but the newest two checkpoints.

    One process calls this. With shards all `ranks` call it, each writes its own, and the folder must be visible to all.
    position: what else a run needs to continue, as JSON. made_of: hashes that `read` compares. Raises ValueError if
    it cannot be written; earlier checkpoints stay.
    """
    target = folder / f"step-{steps:08d}"
    part = target.with_suffix(".part")

    def failure(cause: str) -> str:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free / 1e6  # the error does not always name a full disk
        return f"{target}: cannot be written ({cause}; {free:.0f} MB are free there)"

    @first_cause(failure)
    def begin() -> bool:
        if not faults(target):
            return False
        for left in (*folder.glob("*.part"), target):
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir(parents=True)
        return True

    @first_cause(failure)
    def end() -> None:
        sizes = {file.name: file.stat().st_size for file in sorted(part.iterdir())}
        manifest = {"steps": steps, "position": position, "names": sorted(tensors), "files": sizes}
        manifest["made_of"] = made_of or {}
        manifest["sha256"] = digest(manifest)
        files.write_json(part / "manifest.json", manifest)
        part.rename(target)
        for old in [path for path in sorted(folder.glob(STEPS)) if not faults(path)][:-2]:
            shutil.rmtree(old, ignore_errors=True)

    on_first = ranks.on_first if ranks else lambda work: work()
    try:
        if on_first(begin):
            with first_cause(failure):
                dcp.save(tensors, checkpoint_id=part, no_dist=ranks is None)  # fails on all ranks or none
            on_first(end)
    except ValueError:
        shutil.rmtree(part, ignore_errors=True)
        raise


def faults(path: Path) -> str:
    """What is wrong with the checkpoint in `path`, in a few words; empty if it is whole."""
    try:
        manifest = dict(read_json(path / "manifest.json"))
        if manifest.pop("sha256", None) != digest(manifest):
            return "manifest.json was changed, or is of another version"
        for name, size in manifest["files"].items():
            if (found := (path / name).stat().st_size) != size:
                return f"{name} has {found} bytes of {size}"
    except OSError as error:
        return f"{Path(error.filename).name} is missing"
    except ValueError:
        return "manifest.json is broken or missing"
    return ""


def newest(folder: Path, report=lambda line: None) -> Path | None:
    """The newest whole checkpoint; report(line) says what is wrong with each newer one."""
    for path in sorted(folder.glob(STEPS), reverse=True):
        if not (wrong := faults(path)):
            return path
        report(f"{path} is not whole ({wrong})")
    return None


def steps_done(folder: Path) -> int:
    """Steps before the newest whole checkpoint; 0 without one."""
    path = newest(folder)
    return int(path.name.removeprefix("step-")) if path else 0


@contextlib.contextmanager
def way_on_named(args):
    """Adds to the line of a signal or an error, outside the training loop, the command that continues the run."""
    out = Path(args.out)
    try:
        yield
    except KeyboardInterrupt as stopped:
        if args.checkpoint_every and (out / "args.json").exists():
            add_note(stopped, f"continue with: {again(out)}")
        raise
    except (ValueError, OSError) as error:
        if not args.resume and newest(out / "checkpoints"):
            add_note(error, f"once that is fixed: {again(out)}")
        raise


def read(path: Path, tensors: dict[str, Tensor], made_of=None, one_process: bool = True) -> tuple[int, dict]:
    """Reads a checkpoint into `tensors`, in place; returns the steps done and the position.

    Raises ValueError if it belongs to another run. With shards all ranks call it, and one_process is False.
    """
    manifest = read_json(path / "manifest.json")
    if known := manifest.get("made_of"):
        check_same(known, made_of or {}, path, "give the checkpoints of this run")
    if odd := sorted(set(manifest["names"]) ^ tensors.keys()):
        raise ValueError(f"{path}: it does not fit this run ({odd[0]} is in one of them only)")
    with first_cause(lambda cause: f"{path}: it does not fit this run ({cause})"):
        dcp.load(tensors, checkpoint_id=path, no_dist=one_process)
    return manifest["steps"], manifest["position"]


class RunState:
    """What a checkpoint holds: the policy's tensors, the number of steps done, the position in the data."""

    def __init__(self, folder: Path, policy, stream, made_of: dict, ranks, every: int):
        """made_of: hashes of what the run is made of (identity.py). every: steps between checkpoints; 0: none."""
        self.folder, self.policy, self.stream, self.ranks, self.every = folder, policy, stream, ranks, every
        self.made_of = dict(made_of)
        self.print = say if ranks.rank == 0 else lambda line: None
        self.advance(0)

    def advance(self, steps: int) -> None:
        """`steps` steps are done. Notes the position now: at a stop the stream may already be ahead of the weights."""
        self.steps, self.position = steps, self.stream.position()

    def save(self) -> None:
        """If a checkpoint cannot be written, prints why and keeps the earlier ones."""
        ranks = self.ranks if self.policy.sharded else None
        if self.every and self.steps and (ranks or self.ranks.rank == 0):
            try:
                write(self.folder, self.steps, self.policy.state(), self.position, self.made_of, ranks=ranks)
            except ValueError as error:
                self.print(f"no checkpoint after step {self.steps}: {error}; the earlier ones are kept")

    def stop(self) -> None:
        """For run.stop: saves, and says how to continue."""
        self.save()
        how = f"continue with: {again(self.folder.parent)}" if self.every else "--checkpoint-every 0 saved nothing"
        self.print(f"stopped after step {self.steps}; {how}")

    def resume(self) -> None:
        """Goes back to the newest whole checkpoint, and cuts off what was logged after it.

        A run that was killed before its first checkpoint begins anew. Raises ValueError if a checkpoint should be there
        and none is: otherwise a run of many steps would be cut off.
        """
        path, log = newest(self.folder, self.print), self.folder.parent / "metrics.jsonl"
        if len(seen := {path and path.name for path in self.ranks.gather([path])}) > 1:
            which = " and ".join(map(str, seen))
            raise ValueError(
                f"--resume: ranks see different checkpoints in {self.folder}, {which}; give all that folder"
            )
        if path:
            steps, position = read(path, self.policy.state(), self.made_of, one_process=not self.policy.sharded)
            self.policy.refresh()
            self.stream.resume_at(**position)
            self.advance(steps)
        else:
            logged = len(log.read_text(encoding="utf-8").splitlines()) if log.exists() else 0
            flags = read_json(log.with_name("args.json"))  # of the command before this one
            every = flags.take("checkpoint_every", int, self.every)
            if logged > every or (log.parent / "model").exists() or any(self.folder.glob(STEPS)):
                raise ValueError(f"--resume: {self.folder} holds no whole checkpoint; start anew with another --out")
        self.print(f"continuing after step {self.steps}" + f", from {path}" * bool(path))
        if self.ranks.rank == 0:
            for broken in [later for later in self.folder.glob(STEPS) if later > path]:
                shutil.rmtree(broken, ignore_errors=True)
            for file in (log, log.with_name("explanations.jsonl")):
                files.cut_jsonl(file, lambda record: record["step"] < self.steps)
