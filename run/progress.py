"""What a command prints while it works, and how it ends: one progress line, and one line for what is wrong.

On a terminal the progress line is rewritten in place. In a log each phase prints a few lines.
"""

import argparse
import contextlib
import functools
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

from run.stop import Stopped, raised


class Progress:
    """progress(done, total) says how far a phase is: "measured before training: 640/1500 questions, 0.3 min left".

    rank: only rank 0 prints. lines: how many lines of a log the phase takes at most. first: items done by an earlier
    process. file: where it prints, by default stdout.
    """

    def __init__(self, phase: str, rank=0, lines=1, unit="questions", first=0, file=None):
        self.phase, self.quiet, self.lines, self.unit, self.first = phase, rank != 0, lines, unit, first
        self.started, self.printed, self.file = time.monotonic(), 0, file or sys.stdout

    def __call__(self, done: int, total: int, note: str = "") -> None:
        self.show(f"{self.phase}: {done}/{total} {self.unit}{note}, {self.minutes_left(done, total):.1f} min left",
                  done, total)  # fmt: skip

    def minutes_left(self, done: int, total: int) -> float:
        spent = max(0.0, time.monotonic() - self.started)
        return spent / max(1, done - self.first) * (total - done) / 60

    def show(self, text: str, done: int, total: int, always: bool = False) -> None:
        """Prints text for item `done` of `total`: in place on a terminal; in a log a few times, or `always`."""
        if self.quiet or not total:
            return
        if self.file.isatty():
            text = text[: shutil.get_terminal_size().columns - 1]  # a wrapped line cannot be rewritten
            print(f"\r\x1b[K{text}", end="\n" if done >= total else "", file=self.file, flush=True)
        elif always or done * self.lines // total > self.printed:
            self.printed = done * self.lines // total
            print(text, file=self.file, flush=True)


def say(line: str, file=None) -> None:
    """Prints a line; on a terminal it replaces a progress line that is under way."""
    file = file or sys.stdout
    print("\r\x1b[K" * file.isatty() + line, file=file, flush=True)


class Laps:
    """Times the phases of a step: lap("label_s") notes the seconds since the lap before, in `seconds`."""

    def __init__(self):
        self.last, self.seconds = time.monotonic(), {}

    def __call__(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self.last = max(0.0, now - self.last), now


def quoted(path) -> str:
    """A path as it can be pasted into a shell, also as the value of a flag."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def again(out) -> str:
    """The command that continues the run in the folder `out`, with as many processes on this machine as now."""
    script = quoted(sys.argv[0]) if Path(sys.argv[0]).name == "train.py" else "train.py"
    several = f"--nproc-per-node {launched()[3]} " * (launched()[3] > 1)
    return f"torchrun {several}{script} --resume --out {quoted(out)}"


def launched() -> tuple[int, int, int, int]:
    """What torchrun or another launcher says: this process's rank, how many there are, its rank on this machine, and
    how many there are here. Without a launcher: 0, 1, 0, 1. ValueError where the environment does not fit together.
    """
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    try:
        rank, world, local = (int(given.get(name, default)) for name, default in zip(names, (0, 1, 0), strict=False))
        here = int(given.get("LOCAL_WORLD_SIZE", local + 1))
        whole = world == 1 or given.keys() >= {"RANK", "MASTER_ADDR"} and int(given.get("MASTER_PORT", 0)) > 0
    except ValueError:
        whole = False
    if whole and 0 <= rank < world and 0 <= local < here <= world:
        return rank, world, local, here
    found = " ".join(f"{name}={value}" for name, value in given.items())
    raise ValueError(f"the environment has {found}, which does not describe one of several processes; unset what is "
                     "left there, or start with torchrun")  # fmt: skip


def other_rank() -> bool:
    """Is this one of several processes, and not the first, which speaks for all?"""
    try:
        return launched()[0] > 0
    except ValueError:
        return False


class Output:
    """A standard stream that does not stop its command: after a write that fails, nothing more is written to it.

    This happens when a pipe's reader has left, or the disk is full. A character that the encoding lacks is written as
    \\u2192.
    """

    def __init__(self, stream):
        self.stream, self.error = stream or open(os.devnull, "w"), None  # noqa: SIM115
        if getattr(self.stream, "errors", None) in ("strict", "surrogateescape"):
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, work) -> None:
        try:
            work()
        except OSError as error:
            self.error = error
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # it takes what is still buffered, too


@contextlib.contextmanager
def outputs():
    """Makes sys.stdout and sys.stderr an Output each, and yields the first."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Output, before)
    try:
        yield sys.stdout
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


class Parser(argparse.ArgumentParser):
    """argparse that raises ValueError with one line for a wrong command line; `command` prints it."""

    def __init__(self, **settings):
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message):
        start = "python -m " * self.prog.startswith("lab.")
        raise ValueError(f"{message}; see {start}{self.prog} --help")


def add_note(error: BaseException, text: str) -> None:
    """Adds to the line that `command` prints for an error. (Python 3.10 has no BaseException.add_note.)"""
    error.__notes__ = [*getattr(error, "__notes__", []), text]


def command(prog: str, ranks: bool = False):
    """Decorates a command's main(argv), which then returns the exit status: main's, or 0.

    Wrong input: one line, with the notes of the error, and 2. A signal: one line, and 128 + the signal. A
    full disk under what it prints: one line, and 2; a closed pipe is no error. ranks: other ranks than 0 print it late.
    """

    def decorate(main):
        @functools.wraps(main)
        def run(argv: list[str] | None = None) -> int:
            with outputs() as out, raised() as came:
                try:
                    status = main(argv) or 0
                except SystemExit as end:
                    status = end.code or 0
                except (Exception, KeyboardInterrupt) as error:
                    stopped = isinstance(error, KeyboardInterrupt) or came  # other ranks' end may look like an error
                    if not stopped and not isinstance(error, (ValueError, ImportError, OSError, MemoryError)):
                        raise
                    status = 128 + (came or [2])[0] if stopped else 2
                    line = f"{prog}: {Stopped(status - 128) if stopped else str(error) or 'not enough memory'}"
                    line = "; ".join([line, *getattr(error, "__notes__", [])])
                    if not (ranks and other_rank()):
                        say(line, sys.stderr)
                    elif not stopped:  # if rank 0 says the same, torchrun ends this one before
                        with contextlib.suppress(KeyboardInterrupt):
                            time.sleep(5)
                            say(f"rank {launched()[0]}: {line}", sys.stderr)
                out.flush()
                if out.error and not isinstance(out.error, BrokenPipeError):
                    say(f"{prog}: its output cannot be written ({out.error.strerror})", sys.stderr)
                    status = status or 2
            return status

        return run

    return decorate
