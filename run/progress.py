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

    rank: only rank 0 prints. lines: how many lines of a log the phase takes at most.
    """

    def __init__(self, phase: str, rank: int = 0, lines: int = 2, unit: str = "questions"):
        self.phase, self.quiet, self.lines, self.unit = phase, rank != 0, lines, unit
        self.started, self.printed = time.time(), 0

    def __call__(self, done: int, total: int, note: str = "") -> None:
        left = self.minutes_left(done, total - done)
        self.show(f"{self.phase}: {done}/{total} {self.unit}{note}, {left:.1f} min left", done, total)

    def minutes_left(self, done: int, remaining: int) -> float:
        """Minutes for the `remaining` items, at the rate of the `done` ones."""
        return (time.time() - self.started) / max(1, done) * remaining / 60

    def show(self, text: str, done: int, total: int) -> None:
        """Prints text for item `done` of `total`: in place on a terminal, in a log only a few times."""
        if self.quiet or not total:
            return
        if sys.stdout.isatty():
            text = text[: shutil.get_terminal_size().columns - 1]  # a wrapped line cannot be rewritten
            print(f"\r\x1b[K{text}", end="\n" if done >= total else "", flush=True)
        elif done * self.lines // total > self.printed:
            self.printed = done * self.lines // total
            print(text, flush=True)


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
        line = f"{self.prog}: {message}; see {self.prog} --help\n"
        self.exit(2, line if os.environ.get("RANK", "0") == "0" else None)


def command(prog: str):
    """Decorates a command's main(argv): for wrong input it prints one line and returns 2, else main's status or 0."""

    def decorate(main):
        @functools.wraps(main)
        def run(argv: list[str] | None = None) -> int:
            try:
                return main(argv) or 0
            except (ValueError, ImportError, OSError) as error:
                print(f"{prog}: {error}", file=sys.stderr)
                return 2

        return run

    return decorate
