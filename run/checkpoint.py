"""Checkpoints: a run's state, written whole, checked before it is read, the last few kept.

    OUT/checkpoints/step-00000040/                 what torch.distributed.checkpoint wrote: weights and optimizer
    OUT/checkpoints/step-00000040/manifest.json    the name and size of each of its files, and the place in the data

A checkpoint is written beside its place and then renamed, so a kill at any moment leaves the one before it. One that
was cut short afterwards is told by its sizes, and the one before it is taken. torch.distributed.checkpoint pickles
its index: resume runs of your own only. What others shall load is written by model.save, as safetensors.
"""

import json
import shutil
import warnings
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from run import files


def describe(error: BaseException) -> str:
    """The first cause in a line: torch.distributed.checkpoint wraps what went wrong."""
    inner = [e for pair in getattr(error, "failures", {}).values() for e in pair[:1]] or [error]
    lines = str(inner[0]).strip().splitlines()
    return getattr(inner[0], "strerror", None) or (lines[-1] if lines else type(inner[0]).__name__)


# To be used in one process is what is meant here, and needs no warning.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


def write(folder: Path, steps: int, tensors: dict[str, Tensor], place: dict, keep: int = 2, ranks=None) -> None:
    """Writes the state after `steps` steps, then removes all but the newest `keep`. One process calls this; or all
    `ranks`, where the tensors are cut among them, each writing its parts into a folder that all see.

    place: what else a run must know to go on, as JSON. ValueError where it cannot be written; those there stay.
    """
    target = folder / f"step-{steps:08d}"
    part = folder / f"{target.name}.part"

    def attempt(work):
        try:
            return work()
        except (OSError, ValueError, RuntimeError, CheckpointException) as error:
            there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
            free = shutil.disk_usage(there).free / 1e6  # a full disk is not always what the error names
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
        manifest = {"steps": steps, "place": place, "names": sorted(tensors), "files": sizes}
        files.write_json(part / "manifest.json", manifest)
        part.rename(target)
        whole = [path for path in sorted(folder.glob("step-*[0-9]")) if not faults(path)]
        for old in whole[:-keep]:
            shutil.rmtree(old, ignore_errors=True)

    def on_first(work):
        """work() on one rank, its result on all."""
        if ranks is None:
            return attempt(work)
        return ranks.gather([ranks.together(lambda: attempt(work) if ranks.rank == 0 else None)])[0]

    try:
        if on_first(begin):
            attempt(lambda: dcp.save(tensors, checkpoint_id=part, no_dist=ranks is None))  # fails on all ranks or none
            on_first(end)
    except ValueError:
        shutil.rmtree(part, ignore_errors=True)
        raise


def faults(path: Path) -> str:
    """What is wrong with the checkpoint in `path`, in a few words; nothing where it is whole."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, size in manifest["files"].items():
            if (path / name).stat().st_size != size:
                return f"{name} has {(path / name).stat().st_size} bytes of {size}"
        good = isinstance(manifest["place"], dict) and manifest["steps"] > 0 and isinstance(manifest["names"], list)
        return "" if good else "manifest.json is not one"
    except OSError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is broken or missing"


def newest(folder: Path, tell=print) -> Path | None:
    """The newest whole checkpoint; says of each newer one what is wrong with it."""
    for path in sorted(folder.glob("step-*[0-9]"), reverse=True):
        if not (wrong := faults(path)):
            return path
        tell(f"{path} is not whole ({wrong})")
    return None


def read(path: Path, tensors: dict[str, Tensor], alone: bool = True) -> tuple[int, dict]:
    """Reads a checkpoint into `tensors`, in place; returns the steps done and the place. ValueError for another's.

    Not `alone`, all ranks call it, and each reads its parts of tensors that are cut among them.
    """
    manifest = json.loads((path / "manifest.json").read_text())
    if odd := sorted(set(manifest["names"]) ^ tensors.keys()):
        raise ValueError(f"{path}: it does not fit this run ({odd[0]} is in one of them only)")
    try:
        dcp.load(tensors, checkpoint_id=path, no_dist=alone)
    except (OSError, ValueError, RuntimeError, KeyError, CheckpointException) as error:
        raise ValueError(f"{path}: it does not fit this run ({describe(error)})") from None
    return manifest["steps"], manifest["place"]


class State:
    """What a checkpoint holds: all tensors that an update changes, how many steps are done, where the data stands.

    cut: the tensors are cut among the ranks, so that all of them save; else the first alone, for all hold the same.
    """

    def __init__(self, folder: Path, optimizer, stream, ranks, cut: bool = False):
        self.folder, self.optimizer, self.stream, self.ranks, self.cut = folder, optimizer, stream, ranks, cut
        self.advance(0)

    def advance(self, steps: int) -> None:
        self.steps, self.place = steps, self.stream.place()

    def save(self) -> None:
        """Where it cannot be written, that is said, and the earlier ones stay."""
        if not self.steps or not (self.cut or self.ranks.rank == 0):
            return
        try:
            ranks = self.ranks if self.cut else None
            write(self.folder, self.steps, self.optimizer.state(), self.place, ranks=ranks)
        except ValueError as error:
            if self.ranks.rank == 0:
                print(f"no checkpoint after step {self.steps}: {error}; the earlier ones are kept", flush=True)

    def resume(self, every: int) -> None:
        """Goes back to the newest whole checkpoint, and cuts off what was logged after it.

        every: steps between checkpoints. ValueError where there is none though there should be, for then a run
        of many steps would be cut off whole; one that was killed before its first begins anew.
        """
        tell = self.ranks.rank == 0
        run, path = self.folder.parent, newest(self.folder, print if tell else lambda line: None)
        if path:
            self.steps, place = read(path, self.optimizer.state(), alone=not self.cut)
            self.optimizer.refresh()
            self.stream.go(**place)
            self.advance(self.steps)
        else:
            log = run / "metrics.jsonl"
            logged = len(log.read_text(encoding="utf-8").splitlines()) if log.exists() else 0
            if logged > every or (run / "model").exists() or any(self.folder.glob("step-*[0-9]")):
                raise ValueError(f"--resume: {self.folder} holds no whole checkpoint; start anew with another --out")
        if tell:
            print(f"going on after step {self.steps}" + f", from {path}" * bool(path), flush=True)
            for later in self.folder.glob("step-*[0-9]"):
                if path and later > path:  # broken
                    shutil.rmtree(later, ignore_errors=True)
            for name in ("metrics.jsonl", "explanations.jsonl"):
                files.cut_jsonl(run / name, lambda record: record["step"] < self.steps)
