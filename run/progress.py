"""What a command prints while it works: one progress line, and one line for what is wrong.

On a terminal the progress line is rewritten in place. In a log each phase prints a few lines.
"""

import argparse
import functools
import os
import shutil
import sys
import time


class Progress:
    """progress(done, total) says how far a phase is: "measured before training: 640/1500 questions, 0.3 min left".

    rank: only rank 0 prints. lines: how many lines of a log the phase takes at most. first: items done by an earlier
    process. file: where it prints, by default stdout.
    """

    def __init__(self, phase: str, rank=0, lines=1, unit="questions", first=0, file=None):
        self.phase, self.quiet, self.lines, self.unit, self.first = phase, rank != 0, lines, unit, first
        self.started, self.printed, self.file = time.time(), 0, file or sys.stdout

    def __call__(self, done: int, total: int, note: str = "") -> None:
        self.show(f"{self.phase}: {done}/{total} {self.unit}{note}, {self.minutes_left(done, total):.1f} min left",
                  done, total)  # fmt: skip

    def minutes_left(self, done: int, total: int) -> float:
        return (time.time() - self.started) / max(1, done - self.first) * (total - done) / 60

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
        self.last, self.seconds = time.time(), {}

    def __call__(self, name: str) -> None:
        now = time.time()
        self.seconds[name], self.last = now - self.last, now


class Parser(argparse.ArgumentParser):
    """argparse with one line, and exit status 2, for a wrong command line. Under torchrun only rank 0 prints it."""

    def __init__(self, **settings):
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message):
        start = "python -m " * self.prog.startswith("lab.")
        line = f"{self.prog}: {message}; see {start}{self.prog} --help\n"
        self.exit(2, line if os.environ.get("RANK", "0") == "0" else None)


def command(prog: str):
    """Decorates a command's main(argv): for wrong input it prints one line and returns 2, else main's status or 0."""

    def decorate(main):
        @functools.wraps(main)
        def run(argv: list[str] | None = None) -> int:
            try:
                return main(argv) or 0
            except (ValueError, ImportError, OSError) as error:
                say(f"{prog}: {error}", sys.stderr)
                return 2

        return run

    return decorate
