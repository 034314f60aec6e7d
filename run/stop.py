"""Stopping a run by SIGTERM or SIGINT at a moment in which its state can be saved (checkpoint.py)."""

import contextlib
import signal


class Stopped(Exception):
    """SIGTERM or SIGINT came."""


class Signals:
    """Raises Stopped when SIGTERM or SIGINT comes: at once (in a long kernel: after it), but between `hold` and
    `release` only at the latter.

    What is held is short: the moments in which weights, optimizer and logs belong to different steps. Where not to
    `heed`, on all ranks but the one that saves, the signal is noted only: it would be waited for in vain.

    With `ranks`, all of which have a part in the saving, none may stop where the others wait for it: the signal is
    noted, cuts short only work that is open to it, and all raise Stopped when they next meet.
    """

    def __init__(self, heed: bool = True, ranks=None):
        self.heed, self.ranks, self.number = heed, ranks, 0
        self.held, self.busy = not heed or ranks is not None, False

    def __enter__(self):
        self.before = {n: signal.signal(n, self.handle) for n in (signal.SIGTERM, signal.SIGINT)}
        if self.ranks:
            self.ranks.signals = self
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.ranks:
            self.ranks.signals = None

    def handle(self, number: int, frame) -> None:
        self.number = number
        if not self.held:
            self.held = True  # once is enough: what follows is the saving
            raise Stopped

    def hold(self) -> None:
        self.held = self.busy = True

    def release(self) -> None:
        self.busy = False
        if self.ranks:
            return  # asked when they next meet
        if self.heed and self.number:
            raise Stopped  # still held
        self.held = not self.heed

    @contextlib.contextmanager
    def open(self):
        """With ranks: work without collectives, which a signal may cut short."""
        self.held = self.busy
        try:
            yield
        finally:
            self.held = True
