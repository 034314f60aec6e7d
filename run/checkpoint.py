"""Checkpoints: the state of a run, written whole, checked before it is read, the last two kept.

    OUT/checkpoints/step-00000040/                 torch.distributed.checkpoint's files: weights and optimizer
    OUT/checkpoints/step-00000040/manifest.json    the name and size of each file, and the position in the data

A checkpoint is written under another name and then renamed, so a kill at any moment leaves the one before it. The sizes
tell when a file was cut short later; then the checkpoint before it is read. torch.distributed.checkpoint pickles its
index: resume only your own runs. What others should load is written by model.save, as safetensors.
"""

import json
import shutil
import warnings
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from run import files

# One process uses torch.distributed.checkpoint here on purpose.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


def describe(error: BaseException) -> str:
    """The first cause, in one line: torch.distributed.checkpoint wraps errors."""
    inner = [e for pair in getattr(error, "failures", {}).values() for e in pair[:1]] or [error]
    lines = str(inner[0]).strip().splitlines()
    return getattr(inner[0], "strerror", None) or (lines[-1] if lines else type(inner[0]).__name__)


def write(folder: Path, steps: int, tensors: dict[str, Tensor], position: dict, keep: int = 2, ranks=None) -> None:
    """Writes the state after `steps` steps, then removes all but the newest `keep` checkpoints.

    One process calls this. Where tensors are in shards, all `ranks` call it, each writes its shards, and all see the
    folder. position: what else a run needs to continue, as JSON. ValueError where it cannot be written; earlier
    checkpoints stay.
    """
    target = folder / f"step-{steps:08d}"
    part = folder / f"{target.name}.part"

    def attempt(work):
        try:
            return work()
        except (OSError, ValueError, RuntimeError, CheckpointException) as error:
            there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
            free = shutil.disk_usage(there).free / 1e6  # the error does not always name a full disk
            raise ValueError(f"{target}: cannot be written ({describe(error)}; {free:.0f} MB are free there)") from None

    def begin() -> bool:
        if not faults(target):
            return False
        for left in (*folder.glob("*.part"), target):
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir(parents=True)
        return True

    def end() -> None:
        sizes = {file.name: file.stat().st_size for file in sorted(part.iterdir())}
        manifest = {"steps": steps, "position": position, "names": sorted(tensors), "files": sizes}
        files.write_json(part / "manifest.json", manifest)
        part.rename(target)
        whole = [path for path in sorted(folder.glob("step-*[0-9]")) if not faults(path)]
        for old in whole[:-keep]:
            shutil.rmtree(old, ignore_errors=True)

    def on_first(work):
        return ranks.on_first(lambda: attempt(work)) if ranks else attempt(work)

    try:
        if on_first(begin):
            attempt(lambda: dcp.save(tensors, checkpoint_id=part, no_dist=ranks is None))  # fails on all ranks or none
            on_first(end)
    except ValueError:
        shutil.rmtree(part, ignore_errors=True)
        raise


def faults(path: Path) -> str:
    """What is wrong with the checkpoint in `path`, in a few words; empty where it is whole."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, size in manifest["files"].items():
            if (path / name).stat().st_size != size:
                return f"{name} has {(path / name).stat().st_size} bytes of {size}"
        good = isinstance(manifest["position"], dict) and manifest["steps"] > 0 and isinstance(manifest["names"], list)
        return "" if good else "manifest.json is no checkpoint's"
    except OSError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is broken or missing"


def newest(folder: Path, report=lambda line: None) -> Path | None:
    """The newest whole checkpoint; report(line) says what is wrong with each newer one."""
    for path in sorted(folder.glob("step-*[0-9]"), reverse=True):
        if not (wrong := faults(path)):
            return path
        report(f"{path} is not whole ({wrong})")
    return None


def read(path: Path, tensors: dict[str, Tensor], one_process: bool = True) -> tuple[int, dict]:
    """Reads a checkpoint into `tensors`, in place; returns the steps done and the position.

    ValueError where it is another run's. With shards all ranks call it, and one_process is False.
    """
    manifest = json.loads((path / "manifest.json").read_text())
    if odd := sorted(set(manifest["names"]) ^ tensors.keys()):
        raise ValueError(f"{path}: it does not fit this run ({odd[0]} is in one of them only)")
    try:
        dcp.load(tensors, checkpoint_id=path, no_dist=one_process)
    except (OSError, ValueError, RuntimeError, KeyError, CheckpointException) as error:
        raise ValueError(f"{path}: it does not fit this run ({describe(error)})") from None
    return manifest["steps"], manifest["position"]


class RunState:
    """What a checkpoint holds: the policy's tensors, the number of steps done, the position in the data."""

    def __init__(self, folder: Path, policy, stream, ranks, every: int):
        """every: steps between checkpoints; 0: none."""
        self.folder, self.policy, self.stream, self.ranks, self.every = folder, policy, stream, ranks, every
        self.advance(0)

    def advance(self, steps: int) -> None:
        """`steps` steps are done. The position is noted now: at a stop the stream may be ahead of the weights."""
        self.steps, self.position = steps, self.stream.position()

    def save(self) -> None:
        """Where a checkpoint cannot be written, prints why and keeps the earlier ones."""
        sharded = self.policy.sharded
        if not self.every or not self.steps or not (sharded or self.ranks.rank == 0):
            return
        try:
            ranks = self.ranks if sharded else None
            write(self.folder, self.steps, self.policy.state(), self.position, ranks=ranks)
        except ValueError as error:
            if self.ranks.rank == 0:
                print(f"no checkpoint after step {self.steps}: {error}; the earlier ones are kept", flush=True)

    def stop(self) -> None:
        """For run.stop: saves, and says how to continue."""
        self.save()
        if self.ranks.rank == 0:
            print(
                f"stopped after step {self.steps}; continue with: torchrun train.py --resume --out {self.folder.parent}"
            )

    def resume(self) -> None:
        """Goes back to the newest whole checkpoint, and cuts off what was logged after it.

        A run that was killed before its first checkpoint begins anew. ValueError where there should be a checkpoint and
        there is none: otherwise a run of many steps would be cut off.
        """
        first = self.ranks.rank == 0
        run, path = self.folder.parent, newest(self.folder, print if first else lambda line: None)
        if path:
            steps, position = read(path, self.policy.state(), one_process=not self.policy.sharded)
            self.policy.refresh()
            self.stream.resume_at(**position)
            self.advance(steps)
        else:
            log = run / "metrics.jsonl"
            logged = len(log.read_text(encoding="utf-8").splitlines()) if log.exists() else 0
            if logged > self.every or (run / "model").exists() or any(self.folder.glob("step-*[0-9]")):
                raise ValueError(f"--resume: {self.folder} holds no whole checkpoint; start anew with another --out")
        if first:
            print(f"continuing after step {self.steps}" + f", from {path}" * bool(path), flush=True)
            for later in self.folder.glob("step-*[0-9]"):
                if path and later > path:  # broken
                    shutil.rmtree(later, ignore_errors=True)
            for name in ("metrics.jsonl", "explanations.jsonl"):
                files.cut_jsonl(run / name, lambda record: record["step"] < self.steps)
