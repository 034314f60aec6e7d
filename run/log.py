"""The numbers of a run where people look: --log tensorboard or wandb, beside metrics.jsonl. Imported only if asked for.

A resumed run continues the same log. A logger that fails does not end the run. wandb works offline: WANDB_MODE=offline.
"""

import contextlib
import importlib
import math
import os
import sys
from pathlib import Path

from run import files
from run.args import Args, command
from run.progress import say


def find(name: str):
    """What --log NAME calls. ValueError where its package is missing or broken."""
    module, call = {"tensorboard": ("torch.utils.tensorboard", "SummaryWriter"), "wandb": ("wandb", "init")}[name]
    try:
        return getattr(importlib.import_module(module), call)
    except Exception as error:  # a broken package may raise anything
        raise ValueError(f"--log {name}: {' '.join(str(error).split())}; pip install {name}, or leave it out") from None


def tensorboard(args: Args, steps: int) -> tuple:
    writer = find("tensorboard")(Path(args.out) / "tensorboard", purge_step=steps)
    writer.add_text("flags", f"    torchrun train.py {command(args)}", steps)
    return lambda n, values: [writer.add_scalar(*pair, n) for pair in values.items()], lambda failed: writer.close()


def wandb(args: Args, steps: int) -> tuple:
    file, project = Path(args.out) / "wandb.txt", os.environ.get("WANDB_PROJECT", "faith")
    run = find("wandb")(project=project, name=file.parent.name, dir=file.parent, resume="allow", allow_val_change=True,
                        id=file.read_text() if file.exists() else None, config=vars(args),
                        settings={"console": "off", "quiet": True})  # fmt: skip
    files.write_text(file, run.id)  # with it a resumed run continues this one
    run.define_metric("*", step_metric="step")  # wandb's own counter cannot go back to a checkpoint
    write = lambda n, values: (run.log if "step" in values else run.summary.update)(values)  # noqa: E731
    return write, lambda failed: run.finish(exit_code=int(failed))


def numbers(value, name: str = "") -> dict[str, float]:
    """The finite numbers in dicts and lists within each other: {"picks/0": 0.4, "before/T1/phi/low": 0.1, …}."""
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return {n: number for key, part in parts for n, number in numbers(part, f"{name}/{key}").items()}
    finite = isinstance(value, int | float) and math.isfinite(value)
    return {name.lstrip("/").replace("=", ""): value} if finite else {}


@contextlib.contextmanager
def opened(args: Args, steps: int, rank: int):
    """Yields log(n, values): numbers of step n, or figures as of it. Rank 0 logs, replacing steps from `steps` on."""
    write = close = None

    def attempt(work, *given):
        nonlocal write, close
        try:
            return work(*given) if work else None
        except Exception as error:  # whatever it is, the run goes on
            say(f"--log {args.log} failed: {' '.join(str(error).split())}; the run goes on without it")
            write = close = None

    begin = None if rank else {"none": None, "tensorboard": tensorboard, "wandb": wandb}[args.log]
    write, close = attempt(begin, args, steps) or (None, None)
    try:
        yield lambda n, values: attempt(write, n, numbers(values))
    finally:
        attempt(close, sys.exc_info()[0] is not None)
