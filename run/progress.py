"""What a command prints while it works: one progress line, and one line for a wrong command line.

On a terminal the line is rewritten in place. In a log a phase prints at most ten lines.
"""

import argparse
import os
import sys
import time


def minutes_left(started: float, done: int, remaining: int) -> float:
    """Minutes for the `remaining` items, at the rate since `started` (time.time())."""
    return (time.time() - started) / done * remaining / 60


class Progress:
    """progress(done, total) says how far a phase is: "measured before: 640/1500 questions, 0.3 min left".

    rank 0 alone prints. lines: how many a log gets at most.
    """

    def __init__(self, phase: str, unit: str = "questions", rank: int = 0, lines: int = 10):
        self.phase, self.unit, self.quiet, self.lines = phase, unit, rank != 0, lines
        self.started, self.printed = time.time(), 0

    def __call__(self, done: int, total: int, note: str = "") -> None:
        if self.quiet or not total:
            return
        text = (
            f"{self.phase}: {done}/{total} {self.unit}, {minutes_left(self.started, done, total - done):.1f} min left"
        )
        self.show(text + ("  " + note if note else ""), done, total)

    def show(self, text: str, done: int, total: int) -> None:
        """Prints text, which is item `done` of `total`: in place on a terminal, else if a tenth is newly done."""
        if self.quiet:
            return
        if sys.stdout.isatty():
            print(f"\r\x1b[K{text}", end="\n" if done >= total else "", flush=True)
        elif done >= total or done * self.lines // total > self.printed:
            self.printed = done * self.lines // total
            print(text, flush=True)


class Parser(argparse.ArgumentParser):
    """argparse with one line, and exit status 2, for a wrong command line. Under torchrun only rank 0 prints it."""

    def __init__(self, **settings):
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message):
        line = f"{self.prog}: {message}; see {self.prog} --help\n"
        self.exit(2, line if os.environ.get("RANK", "0") == "0" else None)
